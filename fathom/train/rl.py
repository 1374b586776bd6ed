"""Reinforcement learning with rewards by rule, from top to bottom (DeepSeek-R1-Zero, arXiv 2501.12948).

A step is: problems → groups of completions from the engine → rewards → advantages within each group → for each
mini-batch of groups the policy's loss (`grpo.py`), a check that it is a number, clipping, the optimizer → the engine
gets the new weights. A mini-batch whose loss or gradient is not finite changes nothing.

Engine and trainer are two programs for one model and round differently; the difference is measured at every step
(`kl_sampler`), and for a mixture of experts made small by training on the experts that the engine chose.

What a step reads is in the checkpoint or a function of the recipe and the step's number, so a resumed run is the
unbroken one, bit for bit. That also allows a signal to cut a rollout or an evaluation short: it is made again.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fathom.config.model import ModelConfig
from fathom.config.rl import RLRecipe
from fathom.data.tokenizer import Tokenizer
from fathom.engine.engine import Engine, EngineSettings
from fathom.engine.protocol import Engine as EngineProtocol
from fathom.errors import UserError
from fathom.model.accounting import count_parameters
from fathom.model.checkpoint import load, new_folder, write_model
from fathom.report.command import fathom_command
from fathom.report.tables import count
from fathom.tasks.catalogue import open_task
from fathom.tasks.checker import Checker
from fathom.tasks.task import Problem, Task
from fathom.train.display import Display, describe
from fathom.train.honesty import measured, rollout_metrics
from fathom.train.learner import Learner, NoNumbers, frozen_copy, update
from fathom.train.machine import device, use_bf16
from fathom.train.metrics import MetricsLog, read_metrics
from fathom.train.optimizers import build_optimizer
from fathom.train.rollout import Group, Roller, Rollout, draw_problems, held_out_problems, seed_of
from fathom.train.run import RunFolder, RunResult, begin_run, find_checkpoint, model_folder, newest_model, run_folder
from fathom.train.signals import Stopped, StopRequest, sigterm_interrupts
from fathom.train.state import (
    Progress,
    checkpoint_name,
    checkpoints,
    read_checkpoint,
    remove,
    sweep,
)
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
    console = console or Console(stderr=True)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    say = Display(console, total=recipe.train.steps, done=0).say
    with sigterm_interrupts(), run_folder(runs / recipe.name) as run:
        checkpoint = find_checkpoint(
            run, recipe, resume=resume, overwrite=overwrite, accept_changes=accept_changes, say=say
        )
        task = task_of(recipe)
        if task.runs_programs:
            from fathom.tasks.programs import shared_sandbox, use_sandbox

            use_sandbox(recipe.task.sandbox)
            shared_sandbox()  # where there is none, the person hears of it now, and not as a run of wrong answers
        learner, stop = _start(recipe, checkpoint), StopRequest()
        with ExitStack() as stack:
            checker = Checker(recipe.task.name, seconds=recipe.task.check_seconds, heed=stop.heed)
            stack.enter_context(checker)
            engine = stack.enter_context(_engine(learner))
            roller = Roller(recipe, engine, learner.tokenizer, checker, stop.heed)
            begin_run(run, recipe, overwrite=overwrite)
            parameters = count_parameters(learner.model.config)
            say(f"run '{recipe.name}' in {run.path}: {recipe.task.name}, {count(parameters.total)} parameters")
            if step := learner.progress.step:
                say(f"resuming from step {step} of {recipe.train.steps}")
            return _train(learner, roller, engine, run, console, stop)


def _train(
    learner: Learner, roller: Roller, engine: EngineProtocol, run: RunFolder, console: Console, stop: StopRequest
) -> RunResult:
    """The loop: step, new weights for the engine, evaluation, checkpoint."""
    recipe, progress = learner.recipe, learner.progress
    total, saved, interrupted = recipe.train.steps, progress.step, False
    task = open_task(recipe.task.name)
    problems = held_out_problems(task, recipe.task.levels, recipe.eval.problems, seed=recipe.seed)
    if len(problems) < recipe.eval.problems:
        Display(console, total=total, done=0).say(
            f"task {recipe.task.name}: no more than {len(problems)} different held-out problems were found where "
            f"eval.problems = {recipe.eval.problems}"
        )
    evaluation: dict[str, float] = {}
    if recipe.rollout.endpoint is not None and recipe.rollout.replay_routes and learner.model.routers:
        Display(console, total=total, done=0).say("routes cannot be replayed: the endpoint does not say them")
    with (
        CheckpointWriter(run.checkpoints, keep=recipe.checkpoint.keep) as writer,
        MetricsLog(run, step=progress.step) as log,
        Display(console, total=total, done=progress.step) as display,
        stop,
    ):
        best = _best_so_far(run)

        def save() -> None:
            nonlocal saved
            writer.save(learner.contents())
            saved = progress.step

        def evaluate_if_due() -> None:
            nonlocal evaluation, best
            if progress.step < total and progress.step % recipe.eval.every:
                return
            began = time.perf_counter()
            evaluation, found = _evaluate(roller, recipe, problems, learner.tokenizer, last=progress.step == total)
            if progress.step == 0 and recipe.eval.probe:
                evaluation |= _probe(roller, recipe, problems, learner.tokenizer, display.say)
            for problem, rollout in found[:: max(1, len(found) - 1)]:  # of the lowest level and of the highest
                log.write_sample(progress.step, problem.question, _sample(rollout))
            log.write("eval", progress.step, evaluation | {"seconds": time.perf_counter() - began})
            display.say(f"step {progress.step}: held out  {_told(evaluation)}")
            if roller.too_long:
                display.say_once(
                    "too long",
                    f"{roller.too_long} problems so far had prompts that leave no room for rollout.max_tokens = "
                    f"{recipe.rollout.max_tokens} in this model's context, and were left out; lower it or the level",
                )
            if evaluation["pass@1"] > best:
                best = evaluation["pass@1"]
                if progress.step:  # at the start it is the model that training begins with
                    _save_best(run, learner)

        try:
            if not log.evaluated:
                evaluate_if_due()
            while progress.step < total:
                stop.heed()
                began = time.perf_counter()
                groups, drawn = _roll_out(learner, roller, task, display)
                if not drawn:
                    raise UserError(f"task {recipe.task.name}: no problem is left to be asked; try other levels")
                rolled = time.perf_counter()
                values = rollout_metrics(drawn, learner.tokenizer, recipe.eval.reflections)
                values |= update(learner, groups)
                if isinstance(engine, Engine):
                    engine.load_weights(learner.model)
                _raise_level(learner, drawn, display.say)
                ended = time.perf_counter()
                tokens = sum(len(rollout.drawn.tokens) for group in drawn for rollout in group.rollouts)
                values |= {
                    "level": float(learner.level),
                    "rollout_seconds": rolled - began,
                    "update_seconds": ended - rolled,
                    "tokens_per_second": tokens / (ended - began),
                }
                log.write("train", progress.step, values)
                display.step(progress.step, values)
                if values["skipped"]:
                    _report_bad_step(progress, recipe, values, display.say)
                else:
                    _report_missing_updates(groups, progress, recipe, values["updates"], display)
                # First the checkpoint, so that no evaluation can cost it.
                if progress.step == total or progress.step % recipe.checkpoint.every == 0:
                    save()
                evaluate_if_due()
                writer.check()
        except Stopped:
            interrupted = True
        except NoNumbers:
            raise
        except Exception:
            if saved < progress.step:  # an endpoint went away, memory ran out: what was learnt is kept
                save()
            writer.wait()
            if progress.step:
                again = f"{fathom_command()} rl {run.recipe} --resume"
                display.say(f"what was learnt up to step {progress.step} is saved; once mended, go on with: {again}")
            raise
        if saved < progress.step:
            save()
        writer.wait()
        if interrupted:
            display.say(f"stopped at step {progress.step}; go on with: {fathom_command()} rl {run.recipe} --resume")
    return RunResult(run.path, progress.step, newest_model(run.path), evaluation, interrupted)


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
    elif drawn and not any(group.informative for group in drawn):
        display.say(
            f"step {step + 1}: all rewards of every group are equal, so there is nothing to learn from; easier or "
            "harder levels (task.levels), more rollout.samples or rollout.resample may help"
        )
    return kept, drawn


def _start(recipe: RLRecipe, checkpoint: Path | None) -> Learner:
    """A run's beginning, or where `checkpoint` left it."""
    reference = None
    if checkpoint is None:
        model, tokenizer = load(model_folder(recipe.model), dtype="float32")
        progress = Progress(data={"level": recipe.task.start or recipe.task.levels})
        optimizer_state = None
    else:
        resumed = read_checkpoint(checkpoint)
        model, progress, optimizer_state = resumed.model, resumed.progress, resumed.optimizer
        tokenizer = Tokenizer.from_folder(checkpoint)
        if resumed.reference is not None and recipe.loss.kl > 0:
            reference = frozen_copy(model)
            reference.load_state_dict(resumed.reference)
    if tokenizer is None:
        raise UserError(f"{recipe.model}: has no tokenizer, without which no problem can be put to it")
    model = model.to(device())
    model.compute_dtype = torch.bfloat16 if use_bf16(recipe.train.precision) else torch.float32
    if reference is not None:
        reference = reference.to(device())
        reference.compute_dtype = model.compute_dtype
    # A multi-token-prediction module takes no part in the loss: it drafts for the engine, and stays as it is.
    for module in model.mtp:
        module.requires_grad_(False)
    optimizer = build_optimizer(model, recipe.optimizer)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    return Learner(recipe, model, tokenizer, optimizer, progress, reference)


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
        raise UserError(f"task.levels = {recipe.task.levels}, but {task.called} has {task.levels}")
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


def _evaluate(
    roller: Roller, recipe: RLRecipe, problems: Sequence[Problem], tokenizer: Tokenizer, *, last: bool
) -> tuple[dict[str, float], list[tuple[Problem, Rollout]]]:
    """pass@1 over held-out problems and by level, and the answers; at the end pass@1 with thoughts cut short, too."""
    seed = seed_of(recipe.seed, "held-out")
    found = roller.measure(problems, temperature=recipe.eval.temperature, seed=seed)
    values = measured(found, tokenizer, recipe.eval.reflections)
    for budget in recipe.eval.budgets if last else ():
        cut = roller.measure(problems, temperature=recipe.eval.temperature, seed=seed, budget=budget)
        values[f"pass@1/budget_{budget}"] = measured(cut, tokenizer, ())["pass@1"]
    return values, found


def _probe(
    roller: Roller, recipe: RLRecipe, problems: Sequence[Problem], tokenizer: Tokenizer, say: Callable[[str], None]
) -> dict[str, float]:
    """The base made to think, and made to guess: without a gap between them there is no reason to learn to think.

    Nothing, and `say` why, where the prompt itself opens a thought, or where a guess cannot be asked for: a layout
    without a mark before the answer, in a vocabulary whose think tag is ordinary text.
    """
    guess = {"tags": "<answer>", "boxed": "\\boxed{", "line": "Answer:", "rest": ""}[recipe.rewards.layout.form]
    opening = tokenizer.encode("<think>", special=True)
    why = None
    if recipe.prompt.opens_thought:
        why = "the prompt opens the thought (prompt.opens_thought)"
    elif not guess and len(opening) > 1:
        why = "rewards.layout.form = rest has no mark to begin a guess with, and <think> is no token to be forbidden"
    if why is not None:
        say(f"not measured made to think and made to guess (eval.probe): {why}")
        return {}
    seed = seed_of(recipe.seed, "probe")
    thinks = roller.measure(problems, temperature=recipe.eval.temperature, seed=seed, begin="<think>")
    bias = None if guess else {opening[0]: -100.0}
    guesses = roller.measure(problems, temperature=recipe.eval.temperature, seed=seed, begin=guess, bias=bias)
    return {f"probe_{name}": measured(found, tokenizer, ())["accuracy"] for name, found in
            (("thinking", thinks), ("guessing", guesses))}  # fmt: skip


def _told(values: dict[str, float]) -> str:
    """An evaluation in words."""
    probe = ""
    if "probe_thinking" in values:
        probe = f"  made to think {values['probe_thinking']:.3f}, made to guess {values['probe_guessing']:.3f}"
    return describe(values) + probe


def _sample(rollout: Rollout) -> str:
    parts = ", ".join(f"{name} {value + 0.0:g}" for name, value in rollout.reward.parts.items())
    return f"{rollout.text}\n[{parts}]"


def _best_so_far(run: RunFolder) -> float:
    """The best pass@1 that the run has measured."""
    return max((line["pass@1"] for line in read_metrics(run.metrics) if line["kind"] == "eval"), default=-1.0)


def _save_best(run: RunFolder, learner: Learner) -> None:
    """The weights as a model folder `best/step_…`, in the place of an earlier best."""
    best = run.path / "best"
    target = best / checkpoint_name(learner.progress.step)
    try:
        remove(target)
        with new_folder(target) as scratch:
            write_model(
                scratch, learner.model.config, learner.model.state_dict(), tokenizer=learner.tokenizer, dtype="float32"
            )
        for old in checkpoints(best):
            if old != target:
                remove(old)
        sweep(best)
    except OSError as error:
        raise UserError(f"{run.path}: the best model cannot be written ({error.strerror or error})") from None


def _report_missing_updates(
    groups: Sequence[Group], progress: Progress, recipe: RLRecipe, updates: int, display: Display
) -> None:
    """Say, once, that a step that had something to learn made fewer updates than the recipe asks for."""
    informative, wanted = sum(group.informative for group in groups), recipe.train.mini_batches
    if updates < wanted and informative:
        display.say_once(
            "updates",
            f"step {progress.step}: {updates} of {wanted} mini-batches (train.mini_batches) had something to learn "
            f"from: {informative} of {recipe.rollout.problems} groups have rewards that differ"
            + (", and what was cut off is left out (loss.drop_truncated)" if recipe.loss.drop_truncated else ""),
        )


def _report_bad_step(progress: Progress, recipe: RLRecipe, values: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say that a step was skipped; raise `UserError` when it was one too many."""
    row, limit = progress.bad_in_a_row, recipe.train.max_bad_steps
    what = f"loss {values['loss']:.3g}, gradient norm {values['grad_norm']:.3g}"
    if row >= limit:
        raise UserError(f"step {progress.step}: not finite ({what}), {row} in a row; lower optimizer.lr")
    say(f"step {progress.step}: not finite ({what}), skipped; {limit - row} more in a row will stop the run")
