"""Pre-training, from top to bottom: data, model, and a loop of steps.

A step is: micro-batches, whose gradients add up to that of one large batch → a check that loss and gradient are numbers
→ clipping → the optimizer → the router bias, by the load of the whole batch (DeepSeek-V3 §2.1.2) → metrics. A step
whose loss or gradient is not finite, or which met an FP8 tile without a number, changes nothing but the position in the
data.

N steps, a stop and N more are bitwise the same as 2N: everything a step reads is in the checkpoint (`state.py`) or
a function of the recipe and the step's number (`schedule.py`).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fathom.config import PretrainRecipe
from fathom.data import Loader, TokenDataset
from fathom.errors import UserError
from fathom.model.accounting import count_parameters, flops_per_token
from fathom.model.transformer import Transformer
from fathom.precision.fp8 import FP8
from fathom.report.command import fathom_command
from fathom.report.tables import count
from fathom.train.corpus import open_data
from fathom.train.display import Display, describe, is_part
from fathom.train.estimate import dry_run
from fathom.train.evaluate import BitsPerByte, averaged, evaluate, token_bytes, write_sample
from fathom.train.machine import device, measure_gemm_peak, use_compiler
from fathom.train.metrics import MetricsLog
from fathom.train.numbers import what_was_wrong
from fathom.train.objective import Report, max_violation, pretrain_loss
from fathom.train.optimizers import Optimizer, build_optimizer
from fathom.train.precision import fp8_notice, set_precision, take_bad_tiles
from fathom.train.run import RunFolder, RunResult, begin_run, newest_model
from fathom.train.schedule import (
    bias_rate_at,
    check_schedule,
    full_micro_batches,
    lr_at,
    micro_batches_at,
    mtp_weight_at,
)
from fathom.train.session import training_session
from fathom.train.signals import StopRequest
from fathom.train.state import Contents, Progress, State, read_checkpoint
from fathom.train.writer import CheckpointWriter

__all__ = ["RunResult", "dry_run", "pretrain"]


@dataclass
class Training:
    """Everything that a step reads and changes."""

    model: Transformer
    optimizer: Optimizer
    loader: Loader
    progress: Progress
    ema: State | None
    """Averaged parameters by name, float32."""
    token_bytes: Tensor
    """int64 [vocab]."""
    fp8: FP8 | None
    """What the model's layers share if they multiply in FP8."""

    def contents(self, recipe: PretrainRecipe, dataset: TokenDataset) -> Contents:
        """What a checkpoint of this moment holds."""
        self.progress.data = self.loader.state()
        weights = self.model.state_dict()
        return Contents(
            config=recipe.model,
            weights=weights,
            optimizer=self.optimizer.state_dict(),
            ema=None if self.ema is None else weights | self.ema,
            progress=self.progress,
            recipe=recipe,
            tokenizer=dataset.tokenizer,
        )


def pretrain(
    recipe: PretrainRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: bool = False,
    console: Console | None = None,
    runs: Path = Path("runs"),
) -> RunResult:
    """Train as `recipe` says, in the folder `runs/<recipe.name>`.

    `resume` continues from the newest checkpoint, `overwrite` deletes an older run of that name first,
    `accept_changes` resumes although the recipe computes something else than before. SIGTERM and Ctrl-C save and
    return once training has begun; before, both raise `KeyboardInterrupt` and nothing half-made is left. Raises
    `UserError` for everything a person can put right.
    """
    how = {"resume": resume, "overwrite": overwrite, "accept_changes": accept_changes}
    with training_session(recipe, runs, console, **how) as begun:
        # Everything that may be refused comes before `begin_run`, which is the first to change or delete anything.
        run, checkpoint, say = begun.run, begun.checkpoint, begun.told.say
        if warning := check_schedule(recipe):
            say(warning)
        compiled = use_compiler(recipe.train)
        dataset = open_data(recipe, begun.console)
        training = _start(recipe, dataset, checkpoint)
        begin_run(run, recipe, overwrite=overwrite)
        _announce(training, recipe, run, say)
        if compiled:
            training.model.compile_blocks()
        elif recipe.train.recompute or training.fp8 is not None:
            say("layers run uncompiled: they decide themselves what is kept for the backward pass")
        return _train(training, dataset, recipe, run, checkpoint, begun.console)


def _train(
    training: Training,
    dataset: TokenDataset,
    recipe: PretrainRecipe,
    run: RunFolder,
    checkpoint: Path | None,
    console: Console,
) -> RunResult:
    """The loop: step, checkpoint, evaluation. The checkpoint comes first, so that no evaluation can cost it; a kill
    between the two leaves an evaluation to be made when the run is resumed."""
    model, progress, total = training.model, training.progress, recipe.train.steps
    dtype = model.compute_dtype
    assert dtype is not None
    evaluation: dict[str, float] = {}
    saved = progress.step

    with (
        CheckpointWriter(run.checkpoints, keep=recipe.checkpoint.keep) as writer,
        MetricsLog(run, step=progress.step) as log,
        Display(console, total=total, done=progress.step) as display,
        StopRequest() as stop,
    ):

        def evaluate_if_due() -> bool:
            nonlocal evaluation
            if progress.step < total and progress.step % recipe.eval.every:
                return False
            evaluation = _evaluate(training, dataset, recipe)
            if (sample := write_sample(model, dataset.tokenizer, recipe)) is not None:
                log.write_sample(progress.step, recipe.eval.sample_prompt, sample)
            log.write("eval", progress.step, evaluation)
            display.say(f"step {progress.step}: held out  {describe(evaluation)}")
            return True

        if progress.step and not log.evaluated:
            evaluate_if_due()
        if progress.step >= total:
            display.advise(
                f"{run.path}: all {total} steps are made; more are a change of the schedule: raise train.steps and "
                "insist with --accept-changes"
            )
            return RunResult(run.path, progress.step, checkpoint, evaluation)
        if use_compiler(recipe.train):
            display.say("compiling (about half a minute)…")
        peak = measure_gemm_peak(dtype)
        flops = flops_per_token(model.config, recipe.data.sequence_length)
        while progress.step < total and not stop.asked:
            began, tokens_before = time.perf_counter(), progress.tokens
            values = train_step(training, recipe)
            seconds, tokens = time.perf_counter() - began, progress.tokens - tokens_before
            speed = {"seconds": seconds, "tokens_per_second": tokens / seconds}
            values |= speed | {"gemm_share": flops * tokens / seconds / peak}
            log.write("train", progress.step, values)
            display.step(progress.step, values)
            if values["skipped"]:
                writer.wait()  # the newest checkpoint is to be named
                _report_bad_step(progress, recipe, values, display, newest_model(run.path))

            if progress.step == total or stop.asked or progress.step % recipe.checkpoint.every == 0:
                writer.save(training.contents(recipe, dataset))
                saved = progress.step
            if evaluate_if_due():
                peak = max(peak, measure_gemm_peak(dtype))  # an earlier measurement may have been disturbed
            writer.check()
        if saved < progress.step:  # asked to stop while evaluating
            writer.save(training.contents(recipe, dataset))
        writer.wait()
        interrupted = progress.step < total
        if interrupted:
            display.advise(
                f"stopped at step {progress.step}; go on with: {fathom_command()} pretrain {run.recipe} --resume"
            )
    return RunResult(run.path, progress.step, newest_model(run.path), evaluation, interrupted)


def train_step(training: Training, recipe: PretrainRecipe) -> dict[str, Any]:
    """One step. Returns its metrics; `skipped` says that loss or gradient was not finite and nothing was changed."""
    model, progress, train = training.model, training.progress, recipe.train
    step, total = progress.step, train.steps
    full = full_micro_batches(recipe)
    micro_batches = micro_batches_at(step, total, full, recipe.schedule)
    lr = lr_at(step, total, full, recipe.schedule, recipe.optimizer.lr)
    mtp_weight = mtp_weight_at(step, total, full, recipe.schedule, recipe.mtp)
    bias_rate = bias_rate_at(step, total, full, recipe.schedule, recipe.balance)

    tally = _Tally(micro_batches, training.token_bytes)
    take_bad_tiles(training.fp8)  # of what came between two steps
    for _ in range(micro_batches):
        tokens = training.loader.next_batch().to(training.token_bytes.device)
        loss, report = pretrain_loss(model, tokens, mtp_weight=mtp_weight, balance_weight=recipe.balance.sequence_loss)
        (loss / micro_batches).backward()
        tally.add(loss, report, tokens)
        progress.tokens += report.nll.numel()

    parameters = [p for p in model.parameters() if p.grad is not None]
    grad_norm = get_total_norm([p.grad for p in parameters])
    bad_tiles = take_bad_tiles(training.fp8)
    skipped = bad_tiles > 0 or not (math.isfinite(grad_norm) and tally.finite)
    if not skipped:
        clip_grads_with_norm_(parameters, recipe.optimizer.clip_norm, grad_norm)
        training.optimizer.step(lr)
        model.update_router_bias(tally.load, bias_rate)
        if training.ema is not None:
            _move_average(training.ema, model, recipe.train.ema_decay)
    training.optimizer.zero_grad()

    progress.step += 1
    progress.bad_steps += skipped
    progress.bad_in_a_row = progress.bad_in_a_row + 1 if skipped else 0
    rates = {"lr": lr, "mtp_weight": mtp_weight, "bias_rate": bias_rate}
    return {
        "tokens": progress.tokens,
        "skipped": skipped,
        **tally.metrics(model),
        "grad_norm": float(grad_norm),
        **({} if training.fp8 is None else {"bad_tiles": bad_tiles}),
        **rates,
    }


class _Tally:
    """Means over the micro-batches of a step; tensors until they are asked for, so that no device is waited for."""

    def __init__(self, micro_batches: int, token_bytes: Tensor) -> None:
        zero = token_bytes.new_zeros((), dtype=torch.float32)
        self._share = 1 / micro_batches
        self._loss, self._nll, self._balance = zero, zero, zero
        self._mtp: Tensor | None = None
        self._bits = BitsPerByte(token_bytes)
        self.load: Tensor | None = None
        """[routers, E]: tokens per expert in the whole batch."""

    def add(self, loss: Tensor, report: Report, tokens: Tensor) -> None:
        self._loss = self._loss + self._share * loss.detach()
        self._nll = self._nll + self._share * report.nll.mean()
        if losses := report.mtp_losses():
            self._mtp = self._share * torch.stack(losses).mean() + (0 if self._mtp is None else self._mtp)
        self._balance = self._balance + self._share * report.balance
        self._bits.add(report.nll, tokens[:, 1:])
        self.load = report.load if self.load is None else self.load + report.load

    @property
    def finite(self) -> bool:
        """Whether the loss is a number."""
        return bool(self._loss.isfinite())

    def metrics(self, model: Transformer) -> dict[str, float | None]:
        values = {"loss": float(self._nll), "bits_per_byte": self._bits.value()}
        if len(model.mtp):
            values["mtp_loss"] = None if self._mtp is None else float(self._mtp)
        if model.routers:
            values |= {"balance": float(self._balance), "max_vio": max_violation(self.load)}
        return values


def _start(recipe: PretrainRecipe, dataset: TokenDataset, checkpoint: Path | None) -> Training:
    """A run's beginning, or where `checkpoint` left it."""
    loader = Loader(
        dataset,
        split="train",
        sequence_length=recipe.data.sequence_length,
        batch=recipe.train.micro_batch,
        seed=recipe.seed,
        fim_rate=recipe.data.fim_rate,
    )
    resumed = None if checkpoint is None else read_checkpoint(checkpoint)
    if resumed is None:
        model = Transformer(recipe.model)
        model.init_weights(recipe.seed)
    else:
        model = resumed.model
        loader.load_state(resumed.progress.data)
    model = model.to(device())
    optimizer = build_optimizer(model, recipe.optimizer)
    if resumed is not None:
        optimizer.load_state_dict(resumed.optimizer)
    ema = None
    if recipe.train.ema_decay is not None:
        source = model.state_dict() if resumed is None or resumed.ema is None else resumed.ema
        ema = {name: source[name].detach().clone().to(device()) for name, _ in model.named_parameters()}
    progress = Progress() if resumed is None else resumed.progress
    return Training(
        model,
        optimizer,
        loader,
        progress,
        ema,
        token_bytes(dataset.tokenizer, recipe.model.vocab_size, device()),
        set_precision(
            model,
            recipe.train.precision,
            recompute=recipe.train.recompute,
            gradient_blocks=recipe.train.fp8_gradients == "blocks",
        ),
    )


def _announce(training: Training, recipe: PretrainRecipe, run: RunFolder, say: Callable[[str], None]) -> None:
    """What is about to be trained, and where."""
    say(f"run '{recipe.name}' in {run.path}")
    parameters = count_parameters(recipe.model)
    say(
        f"model: {recipe.model.model_type}, {count(parameters.total)} parameters, {count(parameters.active)} active "
        "per token"
    )
    if notice := fp8_notice(training.fp8):
        say(notice)
    if step := training.progress.step:
        say(f"resuming from step {step} of {recipe.train.steps}")


@torch.no_grad()
def _move_average(ema: State, model: Transformer, decay: float) -> None:
    for name, p in model.named_parameters():
        ema[name].lerp_(p, 1 - decay)


def _evaluate(training: Training, dataset: TokenDataset, recipe: PretrainRecipe) -> dict[str, float]:
    values = evaluate(training.model, dataset, recipe)
    if training.ema is not None:
        with averaged(training.model, training.ema):
            values["ema_loss"] = evaluate(training.model, dataset, recipe)["loss"]
    return values


def _report_bad_step(
    progress: Progress, recipe: PretrainRecipe, values: dict[str, Any], display: Display, checkpoint: Path | None
) -> None:
    """Say that a step was skipped; raise `UserError` when it was one too many."""
    row, limit = progress.bad_in_a_row, recipe.train.max_bad_steps
    display.say(f"step {progress.step}: skipped, {what_was_wrong(values)} ({row} in a row, {limit} stop the run)")
    if row >= limit:
        good = f"{checkpoint} is the last good checkpoint" if checkpoint else "there is no checkpoint yet"
        raise UserError(
            f"stopped at step {progress.step}: {row} steps in a row without a finite loss and gradient; {good}; "
            f"lower optimizer.lr or look at the data{'' if is_part() else ', then --resume --accept-changes'}"
        )
