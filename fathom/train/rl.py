"""Reinforcement learning with rewards by rule, from top to bottom (DeepSeek-R1-Zero, arXiv 2501.12948).

A step is: problems → groups of completions from the engine → rewards → advantages within each group → for each
mini-batch of groups the policy's loss (`grpo.py`), a check that it is a number, clipping, the optimizer → the engine
gets the new weights. A step whose loss or gradient is not finite changes nothing but the step's number.

Engine and trainer are two programs for one model and round differently; the difference is measured at every step
(`kl_sampler`), and for a mixture of experts made small by training on the experts that the engine chose.

What a step reads is in the checkpoint or a function of the recipe and the step's number, so a resumed run is the
unbroken one, bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fathom.config.rl import RLRecipe
from fathom.data.tokenizer import Tokenizer
from fathom.engine.engine import Engine, EngineSettings
from fathom.engine.protocol import Engine as EngineProtocol
from fathom.errors import UserError
from fathom.model.accounting import count_parameters
from fathom.model.checkpoint import load, new_folder, write_model
from fathom.model.cross_entropy import logprobs_and_entropy
from fathom.model.forest import Forest, Tree
from fathom.model.transformer import Transformer
from fathom.report.command import fathom_command
from fathom.report.tables import count
from fathom.tasks.catalogue import open_task
from fathom.tasks.checker import Checker
from fathom.train.display import Display, describe
from fathom.train.grpo import (
    PolicyBatch,
    PolicyReport,
    completion_weights,
    group_advantages,
    policy_loss,
)
from fathom.train.honesty import measured, rollout_metrics
from fathom.train.machine import device, use_bf16
from fathom.train.metrics import MetricsLog
from fathom.train.optimizers import Optimizer, build_optimizer
from fathom.train.rollout import Group, Roller, draw_problems, held_out_problems, seed_of
from fathom.train.run import RunFolder, begin_run, find_checkpoint, model_folder, newest_model, run_folder
from fathom.train.schedule import constant_lr_at
from fathom.train.signals import StopRequest, sigterm_interrupts
from fathom.train.state import (
    Contents,
    Progress,
    State,
    checkpoint_name,
    checkpoints,
    read_checkpoint,
    remove,
    sweep,
)
from fathom.train.writer import CheckpointWriter


@dataclass(frozen=True)
class RLResult:
    """How a session ended."""

    folder: Path
    step: int
    """Steps made, in all sessions."""
    checkpoint: Path | None
    """The newest one."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """The last one of this session, as in `metrics.jsonl`."""
    interrupted: bool = False
    """Stopped by a signal before the last step; the run can be resumed."""


@dataclass
class Learner:
    """Everything that a step reads and changes."""

    recipe: RLRecipe
    model: Transformer
    tokenizer: Tokenizer
    optimizer: Optimizer
    progress: Progress
    reference: Transformer | None
    """The policy that `loss.kl` keeps near to."""

    @property
    def level(self) -> int:
        """The hardest level that problems come from."""
        return self.progress.data["level"]

    def contents(self) -> Contents:
        """What a checkpoint of this moment holds."""
        return Contents(
            config=self.model.config,
            weights=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=None,
            progress=self.progress,
            recipe=self.recipe,
            tokenizer=self.tokenizer,
            reference=None if self.reference is None else self.reference.state_dict(),
        )


def train_rl(
    recipe: RLRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: bool = False,
    console: Console | None = None,
    runs: Path = Path("runs"),
) -> RLResult:
    """Train as `recipe` says, in the folder `runs/<recipe.name>`; arguments and signals as in `pretrain`.

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
        task = open_task(recipe.task.name)
        if recipe.task.levels > task.levels:
            raise UserError(f"task.levels = {recipe.task.levels}, but {task.called} has {task.levels}")
        if task.runs_programs:
            from fathom.tasks.programs import shared_sandbox, use_sandbox

            use_sandbox(recipe.task.sandbox)
            shared_sandbox()  # where there is none, the person hears of it now, and not as a run of wrong answers
        learner = _start(recipe, checkpoint)
        with ExitStack() as stack:
            checker = stack.enter_context(Checker(recipe.task.name, seconds=recipe.task.check_seconds))
            engine = stack.enter_context(_engine(learner))
            roller = Roller(recipe, engine, learner.tokenizer, checker)
            begin_run(run, recipe, overwrite=overwrite)
            parameters = count_parameters(learner.model.config)
            say(f"run '{recipe.name}' in {run.path}: {recipe.task.name}, {count(parameters.total)} parameters")
            if step := learner.progress.step:
                say(f"resuming from step {step} of {recipe.train.steps}")
            return _train(learner, roller, engine, run, checkpoint, console)


def _train(
    learner: Learner, roller: Roller, engine: EngineProtocol, run: RunFolder, checkpoint: Path | None, console: Console
) -> RLResult:
    """The loop: step, new weights for the engine, evaluation, checkpoint."""
    recipe, progress = learner.recipe, learner.progress
    total, saved = recipe.train.steps, progress.step
    task = open_task(recipe.task.name)
    problems = held_out_problems(task, recipe.task.levels, recipe.eval.problems, seed=recipe.seed)
    evaluation: dict[str, float] = {}
    with (
        CheckpointWriter(run.checkpoints, keep=recipe.checkpoint.keep) as writer,
        MetricsLog(run, step=progress.step) as log,
        Display(console, total=total, done=progress.step) as display,
        StopRequest() as stop,
    ):

        def evaluate() -> None:
            nonlocal evaluation
            began = time.perf_counter()
            evaluation = _evaluate(roller, recipe, problems, learner.tokenizer, last=progress.step == total)
            if progress.step == 0 and recipe.eval.probe:
                evaluation |= _probe(roller, recipe, problems, learner.tokenizer)
            log.write("eval", progress.step, evaluation | {"seconds": time.perf_counter() - began})
            display.say(f"step {progress.step}: held out  {_told(evaluation)}")
            if evaluation["pass@1"] > progress.data.get("best", -1.0):
                progress.data |= {"best": evaluation["pass@1"], "best_step": progress.step}
                if progress.step:
                    _save_best(run, learner)

        try:
            if not log.evaluated and (progress.step == 0 or progress.step % recipe.eval.every == 0):
                evaluate()
            while progress.step < total and not stop.asked:
                began = time.perf_counter()
                groups, drawn = _roll_out(learner, roller, task, display.say)
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
                if progress.step == total or progress.step % recipe.eval.every == 0:
                    for rollout in drawn[0].rollouts[:2] if drawn else ():
                        log.write_sample(progress.step, drawn[0].problem.question, _sample(rollout))
                    evaluate()
                if progress.step == total or stop.asked or progress.step % recipe.checkpoint.every == 0:
                    writer.save(learner.contents())
                    saved = progress.step
                writer.check()
        except UserError:
            if saved < progress.step:  # an endpoint went away, a check broke: what was learnt is kept
                writer.save(learner.contents())
            raise
        if saved < progress.step:
            writer.save(learner.contents())
        writer.wait()
        interrupted = progress.step < total
        if interrupted:
            display.say(f"stopped at step {progress.step}; go on with: {fathom_command()} rl {run.recipe} --resume")
    return RLResult(run.path, progress.step, newest_model(run.path), evaluation, interrupted)


def _roll_out(
    learner: Learner, roller: Roller, task: Any, say: Callable[[str], None]
) -> tuple[list[Group], list[Group]]:
    """The groups to learn from, and all that were drawn. With dynamic sampling only informative groups are learnt from,
    and others are drawn in the place of the rest, as often as the recipe allows."""
    recipe, step = learner.recipe, learner.progress.step
    wanted, kept, drawn = recipe.rollout.problems, [], []
    for round in range(1 + recipe.rollout.resample):
        seed = seed_of(recipe.seed, step, round)
        problems = draw_problems(task, "train", learner.level, wanted - len(kept), seed=seed)
        groups = roller.groups(problems, recipe.rollout.samples, seed=seed)
        drawn += groups
        kept += [group for group in groups if group.informative] if recipe.rollout.resample else groups
        if len(kept) >= wanted:
            break
    if not any(group.informative for group in drawn):
        say(
            f"step {step + 1}: all rewards of every group are equal, so there is nothing to learn from; easier or "
            "harder levels (task.levels), more rollout.samples or rollout.resample may help"
        )
    return kept, drawn


def update(learner: Learner, groups: Sequence[Group]) -> dict[str, Any]:
    """The optimizer steps of one rollout. Returns their metrics; `skipped` says that one was not made."""
    recipe, progress, model = learner.recipe, learner.progress, learner.model
    progress.step += 1
    lr = constant_lr_at(progress.step - 1, recipe.train.warmup_steps, recipe.optimizer.lr)
    if recipe.loss.kl > 0 and (progress.step - 1) % recipe.train.reference_every == 0:
        learner.reference = _copy(model)
    parts = recipe.train.mini_batches
    batches = [batch for part in range(parts) if (batch := _MiniBatch.of(groups[part::parts], learner))]
    if parts > 1:
        for batch in batches:
            batch.remember_old(learner)
    report: PolicyReport | None = None
    loss, norms, skipped = 0.0, [], False
    for batch in batches:
        for place in range(len(batch.pieces)):
            piece_loss, piece_report = batch.loss(place, learner)
            piece_loss.backward()
            loss += float(piece_loss.detach()) / len(batches)
            report = piece_report if report is None else report + piece_report
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = float(get_total_norm([p.grad for p in parameters]))
        norms.append(norm)
        if math.isfinite(norm) and math.isfinite(loss):
            clip_grads_with_norm_(parameters, recipe.optimizer.clip_norm, torch.tensor(norm))
            learner.optimizer.step(lr)
        else:
            skipped = True
        learner.optimizer.zero_grad()
    progress.tokens += 0 if report is None else int(report.tokens)
    progress.bad_steps += skipped
    progress.bad_in_a_row = progress.bad_in_a_row + 1 if skipped else 0
    metrics = {"loss": loss, "skipped": skipped, "grad_norm": max(norms, default=0.0), "lr": lr}
    return metrics | ({} if report is None else report.means())


@dataclass(frozen=True)
class _Piece:
    """What one forward pass computes: some groups of a mini-batch."""

    forest: Forest
    completions: Tensor
    """[branches] int64: each branch's row in the mini-batch."""
    sampler_logprobs: Tensor
    """[M]: the engine's."""
    routes: Tensor | None
    """[mixtures, S, K] int64."""


@dataclass
class _MiniBatch:
    """Groups that one optimizer step is made of."""

    advantages: Tensor
    """[N]."""
    weights: Tensor
    """[N]."""
    pieces: list[_Piece]
    """Without the groups that no gradient comes from."""
    old_logprobs: list[Tensor] = field(default_factory=list)
    """[M] per piece, where later mini-batches compare with the policy before the first."""

    @classmethod
    def of(cls, groups: Sequence[Group], learner: Learner) -> "_MiniBatch | None":
        """None where there is nothing to learn."""
        if not groups:
            return None
        recipe, on = learner.recipe, learner.model.model.embed_tokens.weight.device
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        owner = torch.tensor([place for place, group in enumerate(groups) for _ in group.rollouts], device=on)
        rewards = torch.tensor([rollout.reward.total for rollout in rollouts], device=on)
        advantages = group_advantages(rewards, owner, recipe.loss)
        weights = completion_weights(
            torch.tensor([len(rollout.drawn.tokens) for rollout in rollouts], device=on),
            recipe.loss,
            max_tokens=recipe.rollout.max_tokens,
            truncated=torch.tensor([not rollout.drawn.finished for rollout in rollouts], device=on),
        )
        firsts, first = [], 0
        for group in groups:
            firsts.append(first)
            first += len(group.rollouts)
        teaching = [
            (group, first)
            for group, first in zip(groups, firsts, strict=True)
            if group.informative or recipe.loss.kl > 0
        ]
        pieces = [_piece(part, learner) for part in _packed(teaching, recipe.train.rows)]
        return cls(advantages, weights, pieces) if pieces else None

    def remember_old(self, learner: Learner) -> None:
        """Keep the policy's log-probabilities as they are now."""
        with torch.no_grad():
            self.old_logprobs = [_logprobs(learner.model, piece, learner)[0] for piece in self.pieces]

    def loss(self, place: int, learner: Learner) -> tuple[Tensor, PolicyReport]:
        """The part of the mini-batch's loss that comes from the piece at `place`."""
        recipe, piece = learner.recipe, self.pieces[place]
        logprobs, entropy = _logprobs(learner.model, piece, learner)
        reference = None
        if recipe.loss.kl > 0 and learner.reference is not None:
            with torch.no_grad():
                reference = _logprobs(learner.reference, piece, learner)[0]
        old = self.old_logprobs[place] if self.old_logprobs else logprobs.detach()
        batch = PolicyBatch(
            owner=piece.completions[piece.forest.owners],
            advantages=self.advantages,
            weights=self.weights,
            old_logprobs=old,
            reference_logprobs=reference,
            # The engine speaks of temperature 1.
            sampler_logprobs=piece.sampler_logprobs if recipe.rollout.temperature == 1 else None,
            entropy=entropy,
        )
        return policy_loss(logprobs, batch, recipe.loss)


def _packed(groups: Sequence[tuple[Group, int]], rows: int) -> Iterator[list[tuple[Group, int]]]:
    """Neighbouring groups, as many as `rows` tokens hold but at least one."""
    part: list[tuple[Group, int]] = []
    taken = 0
    for group, first in groups:
        size = _tree(group).rows
        if part and taken + size > rows:
            yield part
            part, taken = [], 0
        part.append((group, first))
        taken += size
    if part:
        yield part


def _tree(group: Group) -> Tree:
    return Tree(group.prompt_ids, [rollout.drawn.tokens for rollout in group.rollouts])


def _piece(groups: Sequence[tuple[Group, int]], learner: Learner) -> _Piece:
    on = learner.model.model.embed_tokens.weight.device
    forest = Forest.plant([_tree(group) for group, _ in groups], on)
    rollouts = [rollout for group, _ in groups for rollout in group.rollouts]
    completions = [first + place for group, first in groups for place in range(len(group.rollouts))]
    sampled = [logprob for rollout in rollouts for logprob in rollout.drawn.logprobs]
    routes = None
    if learner.recipe.rollout.replay_routes and all(rollout.drawn.routes is not None for rollout in rollouts):
        routes = torch.cat([part for group, _ in groups for part in _routes(group)]).transpose(0, 1).long().to(on)
    return _Piece(forest, torch.tensor(completions, device=on), torch.tensor(sampled, device=on), routes)


def _routes(group: Group) -> Iterator[Tensor]:
    """The routes of a tree's rows, [rows, mixtures, K] each: of its trunk, then of every branch."""
    length = len(group.prompt_ids)
    found = [rollout.drawn.routes for rollout in group.rollouts if rollout.drawn.routes is not None]
    yield found[0][:length]
    for routes in found:
        yield routes[length:]


def _logprobs(model: Transformer, piece: _Piece, learner: Learner) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [M] of every token that was drawn."""
    hidden, _ = model.forest_states(piece.forest, routes=piece.routes)
    return logprobs_and_entropy(
        hidden[piece.forest.sources],
        model.lm_head.weight,
        piece.forest.targets,
        temperature=learner.recipe.rollout.temperature,
    )


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
        if resumed.reference is not None:
            reference = _copy(model)
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

        return RemoteEngine(RemoteSettings(url=recipe.rollout.endpoint), learner.tokenizer)
    samples = recipe.rollout.problems * recipe.rollout.samples
    settings = EngineSettings(
        max_running=min(256, samples),
        queue=samples + recipe.eval.problems,
        record_routes=recipe.rollout.replay_routes and bool(learner.model.routers),
    )
    return Engine(learner.model, learner.tokenizer, settings)


def _copy(model: Transformer) -> Transformer:
    """The same numbers in tensors of their own, not to be trained."""
    with torch.device("meta"):
        copy = Transformer(model.config)
    state: State = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    copy.load_state_dict(state, assign=True)
    copy.compute_dtype = model.compute_dtype
    return copy.requires_grad_(False)


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


def _evaluate(roller: Roller, recipe: RLRecipe, problems: Sequence, tokenizer: Tokenizer, *, last: bool) -> dict:
    """pass@1 over held-out problems and by level; at the end also with thoughts cut short."""
    seed = seed_of(recipe.seed, "held-out")
    found = roller.measure(problems, temperature=recipe.eval.temperature, seed=seed)
    values = measured(found, tokenizer, recipe.eval.reflections)
    for budget in recipe.eval.budgets if last else ():
        cut = roller.measure(problems, temperature=recipe.eval.temperature, seed=seed, budget=budget)
        values[f"pass@1/budget_{budget}"] = measured(cut, tokenizer, ())["pass@1"]
    return values


def _probe(roller: Roller, recipe: RLRecipe, problems: Sequence, tokenizer: Tokenizer) -> dict[str, float]:
    """The base made to think, and made to guess: without a gap between them there is no reason to learn to think."""
    seed = seed_of(recipe.seed, "probe")
    thinks = roller.measure(problems, temperature=recipe.eval.temperature, seed=seed, begin="<think>")
    guess = {"tags": "<answer>", "boxed": "\\boxed{", "line": "Answer:", "rest": ""}[recipe.rewards.layout.form]
    opening = tokenizer.encode("<think>", special=True)
    bias = {opening[0]: -100.0} if not guess and len(opening) == 1 else None
    guesses = roller.measure(problems, temperature=recipe.eval.temperature, seed=seed, begin=guess, bias=bias)
    return {f"probe_{name}": measured(found, tokenizer, ())["accuracy"] for name, found in
            (("thinking", thinks), ("guessing", guesses))}  # fmt: skip


def _told(values: dict[str, float]) -> str:
    """An evaluation in words."""
    probe = ""
    if "probe_thinking" in values:
        probe = f"  made to think {values['probe_thinking']:.3f}, made to guess {values['probe_guessing']:.3f}"
    return describe(values) + probe


def _sample(rollout: Any) -> str:
    parts = ", ".join(f"{name} {value:g}" for name, value in rollout.reward.parts.items())
    return f"{rollout.text}\n[{parts}]"


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


def _report_bad_step(progress: Progress, recipe: RLRecipe, values: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say that a step was skipped; raise `UserError` when it was one too many."""
    row, limit = progress.bad_in_a_row, recipe.train.max_bad_steps
    what = f"loss {values['loss']:.3g}, gradient norm {values['grad_norm']:.3g}"
    if row >= limit:
        raise UserError(f"step {progress.step}: not finite ({what}), {row} in a row; lower optimizer.lr")
    say(f"step {progress.step}: not finite ({what}), skipped; {limit - row} more in a row will stop the run")
