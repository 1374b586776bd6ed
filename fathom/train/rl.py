"""Reinforcement learning with rewards by rule, from top to bottom (DeepSeek-R1-Zero, arXiv 2501.12948).

A step is: problems → groups of completions from the engine → rewards → advantages within each group → for each
mini-batch of groups the policy's loss (`grpo.py`), a check that it is a number, clipping, the optimizer → the engine
gets the new weights. A mini-batch whose loss or gradient is not finite changes nothing.

On-policy distillation is the same with a teacher's judgement of every token as its advantage (`grpo.py`, "Teacher").
Rewards are then only measured. The teacher is no part of a checkpoint: it is opened anew from where it lies.

Engine and trainer are two programs for one model and round differently; the difference is measured at every step
(`kl_sampler`), and for a mixture of experts made small by training on the experts that the engine chose.

What a step reads is in the checkpoint or a function of the recipe and the step's number, so a resumed run is the
unbroken one, bit for bit. That also allows a signal to cut a rollout or an evaluation short: it is made again.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fathom.config.model import ModelConfig
from fathom.config.rl import RLRecipe
from fathom.data.tokenizer import Tokenizer
from fathom.engine.engine import Engine, EngineSettings
from fathom.engine.protocol import Engine as EngineProtocol
from fathom.errors import UserError
from fathom.model.accounting import count_parameters
from fathom.model.checkpoint import load
from fathom.model.fp8 import train_in_fp8
from fathom.model.transformer import Transformer
from fathom.report.command import fathom_command
from fathom.report.tables import count
from fathom.tasks.catalogue import open_task
from fathom.tasks.checker import Checker
from fathom.tasks.mixture import uses_sandbox
from fathom.tasks.programs import shared_sandbox, use_sandbox
from fathom.tasks.task import Problem, Task
from fathom.train.display import Display
from fathom.train.honesty import rollout_metrics
from fathom.train.learner import Learner, observe, update
from fathom.train.machine import device
from fathom.train.metrics import MetricsLog
from fathom.train.moments import CorrectionLog
from fathom.train.numbers import NoNumbers, what_was_wrong
from fathom.train.precision import fp8_notice
from fathom.train.rl_evaluate import HeldOut
from fathom.train.rollout import Group, Roller, draw_problems, held_out_problems, seed_of
from fathom.train.run import RunFolder, RunResult, begin_run, model_folder, newest_model
from fathom.train.session import open_trainee, training_session
from fathom.train.signals import Stopped, StopRequest
from fathom.train.state import Progress, read_checkpoint_recipe
from fathom.train.writer import CheckpointWriter


def train_rl(
    recipe: RLRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: bool = False,
    console: Console | None = None,
    runs: Path = Path("runs"),
) -> RunResult:
    """Train as `recipe` says, in the folder `runs/<recipe.name>`; arguments and signals as in `pretrain`, but that a
    signal also cuts short what only draws: nothing has been learnt from it.

    Raises `UserError` for everything a person can put right. What was learnt before is then in a checkpoint.
    """
    how = {"resume": resume, "overwrite": overwrite, "accept_changes": accept_changes}
    with training_session(recipe, runs, console, **how) as begun:
        run, told, say = begun.run, begun.told, begun.told.say
        task = task_of(recipe)
        if uses_sandbox(task):
            use_sandbox(recipe.task.sandbox)
            shared_sandbox()  # where there is none, the person hears of it now, and not as a run of wrong answers
        learner, stop = _start(recipe, begun.checkpoint), StopRequest()
        with ExitStack() as stack:
            checker = Checker(recipe.task.name, seconds=recipe.task.check_seconds, heed=stop.heed)
            stack.enter_context(checker)
            engine = stack.enter_context(_engine(learner))
            roller = Roller(recipe, engine, learner.tokenizer, checker, stop.heed)
            problems = held_out_problems(task, recipe.task.levels, recipe.eval.problems, seed=recipe.seed)
            task.hold_out(problem.question for problem in problems)  # under whichever key they come back
            if learner.progress.step < recipe.train.steps:
                begin_run(run, recipe, overwrite=overwrite)
            else:
                told.advise(f"all {recipe.train.steps} steps are made; for more, raise train.steps")
            parameters = count_parameters(learner.model.config)
            say(f"run '{recipe.name}' in {run.path}: {recipe.task.name}, {count(parameters.total)} parameters")
            if learner.teacher is not None:
                say(f"taught by {recipe.teacher}, {count(count_parameters(learner.teacher.config).total)} parameters")
            if notice := fp8_notice(learner.fp8):
                say(notice)
            if step := learner.progress.step:
                say(f"resuming from step {step} of {recipe.train.steps}")
            return _train(learner, roller, engine, task, problems, run, begun.console, stop)


def _train(
    learner: Learner,
    roller: Roller,
    engine: EngineProtocol,
    task: Task,
    problems: Sequence[Problem],
    run: RunFolder,
    console: Console,
    stop: StopRequest,
) -> RunResult:
    """The loop over steps, and what becomes of the run when it ends, in whichever way."""
    recipe, progress = learner.recipe, learner.progress
    total, interrupted = recipe.train.steps, False
    with (
        CheckpointWriter(run.checkpoints, keep=recipe.checkpoint.keep) as writer,
        MetricsLog(run, step=progress.step) as log,
        Display(console, total=total, done=progress.step) as display,
        stop,
    ):
        exam = HeldOut(learner, roller, problems, run, log, display)
        corrections = CorrectionLog(run, recipe.eval.reflections, step=progress.step)
        session = _Session(learner, roller, engine, task, log, corrections, writer, display, saved=progress.step)
        session.say_what_is_missing(len(problems))
        try:
            if not log.evaluated:
                exam.take_if_due()
            while progress.step < total:
                stop.heed()
                session.step()
                # First the checkpoint, so that no evaluation can cost it.
                if progress.step == total or progress.step % recipe.checkpoint.every == 0:
                    session.save()
                exam.take_if_due()
                writer.check()
        except Stopped:
            interrupted = True
        except NoNumbers:
            raise
        except Exception:
            session.save()  # an endpoint went away, memory ran out: what was learnt is kept
            writer.wait()
            if progress.step:
                again = f"{fathom_command()} rl {run.recipe} --resume"
                display.advise(f"what was learnt up to step {progress.step} is saved; once mended, go on with: {again}")
            raise
        session.save()
        writer.wait()
        if interrupted:
            display.advise(f"stopped at step {progress.step}; go on with: {fathom_command()} rl {run.recipe} --resume")
    return RunResult(run.path, progress.step, newest_model(run.path), exam.values, interrupted)


@dataclass
class _Session:
    """A run under way: what it learns with, and where it writes."""

    learner: Learner
    roller: Roller
    engine: EngineProtocol
    task: Task
    log: MetricsLog
    corrections: CorrectionLog
    writer: CheckpointWriter
    display: Display
    saved: int
    """The step of the last checkpoint."""

    def say_what_is_missing(self, held_out: int) -> None:
        """What the recipe asks for and cannot have, with `held_out` problems found."""
        recipe = self.learner.recipe
        if held_out < recipe.eval.problems:
            self.display.say(
                f"task {recipe.task.name}: no more than {held_out} different held-out problems were found where "
                f"eval.problems = {recipe.eval.problems}"
            )
        if recipe.rollout.endpoint is not None and recipe.rollout.replay_routes and self.learner.model.routers:
            self.display.say("routes cannot be replayed: the endpoint does not say them")

    def save(self) -> None:
        """A checkpoint, where this step has none."""
        if self.saved < self.learner.progress.step:
            self.writer.save(self.learner.contents())
            self.saved = self.learner.progress.step

    def step(self) -> None:
        """Rollout, update, new weights for the engine, and the step's line of metrics."""
        learner, recipe, display = self.learner, self.learner.recipe, self.display
        began, too_long = time.perf_counter(), self.roller.too_long
        groups, drawn = _roll_out(learner, self.roller, self.task, display)
        if not drawn:
            raise UserError(f"task {recipe.task.name}: no problem is left to be asked; try other levels")
        rolled = time.perf_counter()
        values = rollout_metrics(drawn, learner.tokenizer, recipe.eval.reflections)
        values |= update(learner, groups)
        if "entropy" not in values:  # nothing was learnt from
            values |= observe(learner, drawn)
        if isinstance(self.engine, Engine):
            self.engine.load_weights(learner.model)
        _raise_level(learner, drawn, display.say)
        ended = time.perf_counter()
        tokens = sum(len(rollout.drawn.tokens) for group in drawn for rollout in group.rollouts)
        values |= {
            "level": float(learner.level),
            "too_long": self.roller.too_long - too_long,
            "rollout_seconds": rolled - began,
            "update_seconds": ended - rolled,
            "tokens_per_second": tokens / (ended - began),
        }
        self.log.write("train", learner.progress.step, values)
        self.corrections.look(drawn, learner.progress.step)
        display.step(learner.progress.step, values)
        if values["skipped"]:
            _report_bad_step(learner.progress, recipe, values, display.say)
        else:
            _report_missing_updates(groups, learner.progress, recipe, values["updates"], display)


def _roll_out(learner: Learner, roller: Roller, task: Task, display: Display) -> tuple[list[Group], list[Group]]:
    """The groups to learn from, and all that were drawn. With dynamic sampling only informative groups are learnt from,
    and others are drawn in the place of the rest, as often as the recipe allows."""
    recipe, step = learner.recipe, learner.progress.step
    wanted, kept, drawn, asked = recipe.rollout.problems, [], [], set()
    for round in range(1 + recipe.rollout.resample):
        seed = seed_of(recipe.seed, step, round)
        missing = wanted - len(kept)
        problems = draw_problems(task, "train", learner.level, missing, seed=seed, without=asked)
        asked |= {problem.question for problem in problems}
        if len(problems) < missing:
            display.say_once(
                "problems",
                f"step {step + 1}: task {recipe.task.name} has given {len(asked)} different problems where "
                f"{len(asked) + missing - len(problems)} were wanted, so steps are smaller; lower rollout.problems or "
                "try other levels (task.levels)",
            )
        if not problems:
            break
        groups = roller.groups(problems, recipe.rollout.samples, seed=seed)
        drawn += groups
        kept += [group for group in groups if group.informative] if recipe.rollout.resample else groups
        if len(kept) >= wanted:
            break
    faults = [rollout.reward.fault for group in drawn for rollout in group.rollouts if rollout.reward.fault]
    if faults:
        display.say_once(
            "faults",
            f"step {step + 1}: {len(faults)} checks of task {recipe.task.name} failed, and count as wrong answers; the "
            f"first: {faults[0]}",
        )
    elif recipe.teacher is None and drawn and not any(group.informative for group in drawn):
        display.say(
            f"step {step + 1}: all rewards of every group are equal, so there is nothing to learn from; easier or "
            "harder levels (task.levels), more rollout.samples or rollout.resample may help"
        )
    return kept, drawn


def _start(recipe: RLRecipe, checkpoint: Path | None) -> Learner:
    """A run's beginning, or where `checkpoint` left it."""
    learner = open_trainee(Learner, recipe, checkpoint, unable="no problem can be put to it")
    if checkpoint is None:
        learner.progress.data = {"level": recipe.task.start or recipe.task.levels}
    elif recipe.task.start not in (None, read_checkpoint_recipe(checkpoint, RLRecipe).task.start):
        learner.progress.data["level"] = recipe.task.start  # a curriculum that was insisted on: it begins now
    if recipe.loss.kl == 0:
        learner.reference = None
    learner.teacher = _open_teacher(recipe, learner)
    return learner


def _open_teacher(recipe: RLRecipe, learner: Learner) -> Transformer | None:
    """Frozen, and computing as the student does. Raises `UserError` where it cannot judge the student's tokens."""
    if recipe.teacher is None:
        return None
    teacher, own = load(model_folder(recipe.teacher), dtype="float32")
    require_one_vocabulary(recipe.teacher, (teacher.config, own), (learner.model.config, learner.tokenizer))
    teacher = teacher.to(device()).requires_grad_(False)
    teacher.compute_dtype = learner.model.compute_dtype
    if learner.fp8 is not None:
        train_in_fp8(teacher, learner.fp8)
    return teacher


def require_one_vocabulary(
    teacher: str, its: tuple[ModelConfig, Tokenizer | None], students: tuple[ModelConfig, Tokenizer]
) -> None:
    """Raise `UserError` where the model called `teacher` has other tokens than the student, or none for some."""
    (config, tokenizer), (student_config, student_tokenizer) = its, students
    same = tokenizer is not None and tokenizer.backend.get_vocab() == student_tokenizer.backend.get_vocab()
    if not same or config.vocab_size < student_config.vocab_size:
        raise UserError(
            f"teacher {teacher}: has another vocabulary than the student, so it cannot judge the student's tokens; let "
            'it write traces that the student learns from: fathom distill with way = "traces"'
        )


def _engine(learner: Learner) -> Any:
    """The engine of this process, or a remote one."""
    recipe = learner.recipe
    if recipe.rollout.endpoint is not None:
        from fathom.engine.remote import RemoteEngine, RemoteSettings

        settings = RemoteSettings(
            url=recipe.rollout.endpoint,
            model=recipe.rollout.endpoint_model,
            api_key_env=recipe.rollout.endpoint_key_env,
        )
        return RemoteEngine(settings, learner.tokenizer, vocab_size=learner.model.config.vocab_size)
    return Engine(learner.model, learner.tokenizer, engine_settings(recipe, learner.model.config))


def engine_settings(recipe: RLRecipe, config: ModelConfig) -> EngineSettings:
    """Those of the engine of this process."""
    samples = recipe.rollout.problems * recipe.rollout.samples
    return EngineSettings(
        max_running=min(256, samples),
        queue=samples + recipe.eval.problems,
        record_routes=recipe.rollout.replay_routes and any(map(config.is_moe_layer, range(config.num_hidden_layers))),
    )


def task_of(recipe: RLRecipe) -> Task:
    """What is to be learnt. Raises `UserError` where there is no such task, or not with so many levels."""
    task = open_task(recipe.task.name)
    if recipe.task.levels > task.levels:
        raise UserError(
            f"task.levels = {recipe.task.levels}, but {task.called} has {task.levels}; give --task.levels {task.levels}"
        )
    return task


def _raise_level(learner: Learner, drawn: Sequence[Group], say: Callable[[str], None]) -> None:
    """One level more, where a curriculum's hardest so far is solved often enough."""
    section = learner.recipe.task
    if section.start is None or learner.level >= section.levels:
        return
    hardest = [
        rollout.reward.parts["accuracy"]
        for group in drawn
        if group.problem.level == learner.level
        for rollout in group.rollouts
    ]
    if hardest and sum(hardest) / len(hardest) >= section.raise_at:
        learner.progress.data["level"] += 1
        say(f"step {learner.progress.step}: level {learner.level - 1} is learnt, level {learner.level} is added")


def _report_missing_updates(
    groups: Sequence[Group], progress: Progress, recipe: RLRecipe, updates: int, display: Display
) -> None:
    """Say, once, that a step that had something to learn made fewer updates than the recipe asks for."""
    informative, wanted = sum(group.informative for group in groups), recipe.train.mini_batches
    if recipe.teacher is None and updates < wanted and informative:
        display.say_once(
            "updates",
            f"step {progress.step}: {updates} of {wanted} mini-batches (train.mini_batches) had something to learn "
            f"from: {informative} of {recipe.rollout.problems} groups have rewards that differ"
            + (", and what was cut off is left out (loss.drop_truncated)" if recipe.loss.drop_truncated else ""),
        )


def _report_bad_step(progress: Progress, recipe: RLRecipe, values: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say that a step was skipped; raise `UserError` when it was one too many."""
    row, limit = progress.bad_in_a_row, recipe.train.max_bad_steps
    what = what_was_wrong(values)
    if row >= limit:
        raise UserError(f"step {progress.step}: not finite ({what}), {row} in a row; lower optimizer.lr")
    say(f"step {progress.step}: not finite ({what}), skipped; {limit - row} more in a row will stop the run")
