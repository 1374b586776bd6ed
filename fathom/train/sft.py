"""Supervised fine-tuning: learn to say what conversations say (DeepSeek-R1 §2.3).

Every answer is a tree of one branch in a forest (`fathom.model.forest`): packed behind others without padding, and no
answer sees another. Only what assistants say is learnt; the loss is the mean over those tokens of a batch,
-1/M Σ log p(token | all before it).

Which answers a step reads is a function of the seed and the step, so a resumed run is the unbroken one. The router bias
of a mixture of experts and the multi-token-prediction modules stay as they are, as in reinforcement learning.
"""

import hashlib
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fathom.config.sft import SFTRecipe
from fathom.data.conversations import Turn, TurnEncoder, read_conversations
from fathom.data.tokenizer import Tokenizer
from fathom.engine.generate import generate_ids
from fathom.engine.protocol import Sampling
from fathom.errors import UserError
from fathom.model.accounting import count_parameters
from fathom.model.forest import Forest, Tree
from fathom.model.token_logprobs import Head, logprobs_and_entropy
from fathom.model.transformer import Transformer
from fathom.report.command import fathom_command
from fathom.report.tables import count, plural
from fathom.train.display import Display, describe
from fathom.train.metrics import MetricsLog
from fathom.train.numbers import require_numbers, what_was_wrong
from fathom.train.packing import packed
from fathom.train.precision import fp8_notice, take_bad_tiles
from fathom.train.run import RunResult, begin_run, newest_model
from fathom.train.schedule import cosine_lr_at
from fathom.train.session import Trainee, open_trainee, training_session
from fathom.train.signals import StopRequest
from fathom.train.state import Progress
from fathom.train.writer import CheckpointWriter

_LONGEST = "(data.max_tokens, or the model's context)"


@dataclass(frozen=True)
class Answers:
    """What is learnt, and what is kept to measure it by."""

    train: list[Turn]
    held_out: list[Turn]
    longest: int
    """Tokens up to which an answer may end."""
    too_long: int
    """Answers left out as they end later."""

    def in_epochs(self, epochs: float) -> int:
        """Answers that are read in so many epochs, at least one."""
        return max(1, round(epochs * len(self.train)))

    @property
    def fingerprint(self) -> str:
        """Equal for equal answers in the same order, on the same sides."""
        digest = hashlib.blake2b(digest_size=16)
        for side in (self.train, self.held_out):
            digest.update(f"{len(side)}".encode())
            for turn in side:
                digest.update(repr((turn.prompt_ids, turn.response_ids)).encode())
        return digest.hexdigest()


class Student(Trainee):
    """A model, with the recipe that says how it learns answers."""

    recipe: SFTRecipe


def train_sft(
    recipe: SFTRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: bool = False,
    console: Console | None = None,
    runs: Path = Path("runs"),
) -> RunResult:
    """Train as `recipe` says, in the folder `runs/<recipe.name>`; the switches are those of `pretrain`.

    Raises `UserError` for everything a person can put right.
    """
    how = {"resume": resume, "overwrite": overwrite, "accept_changes": accept_changes}
    with training_session(recipe, runs, console, **how) as begun:
        run, told, say = begun.run, begun.told, begun.told.say
        student = open_trainee(Student, recipe, begun.checkpoint, unable="it reads no conversation")
        answers = read_answers(recipe, student.tokenizer, context=student.model.config.max_position_embeddings)
        _check_data(answers, student.progress, accept_changes)
        total = math.ceil(answers.in_epochs(recipe.train.epochs) / recipe.train.batch)
        if student.progress.step < total:
            begin_run(run, recipe, overwrite=overwrite)
        else:
            told.advise(f"all {total} steps are made; for more, raise train.epochs")
        if answers.too_long:
            say(f"left out: {plural(answers.too_long, 'answer')} of more than {answers.longest} tokens {_LONGEST}")
        if recipe.data.held_out and not answers.held_out:
            say("no answer is held out, so nothing can be measured; there are few: give data.held_out a larger share")
        say(
            f"run '{recipe.name}' in {run.path}: {count(len(answers.train))} answers of "
            f"{count(sum(len(turn.response_ids) for turn in answers.train))} tokens, "
            f"{len(answers.held_out)} held out, {count(count_parameters(student.model.config).total)} parameters"
        )
        if notice := fp8_notice(student.fp8):
            say(notice)
        with (
            CheckpointWriter(run.checkpoints, keep=recipe.checkpoint.keep) as writer,
            MetricsLog(run, step=student.progress.step) as log,
            Display(begun.console, total=total, done=student.progress.step) as display,
            StopRequest() as stop,
        ):
            course = _Course(student, answers, total, log, display)
            if not log.evaluated:
                course.evaluate_if_due()
            saved = student.progress.step
            while student.progress.step < total and not stop.asked:
                course.step()
                if student.progress.step == total or student.progress.step % recipe.checkpoint.every == 0:
                    writer.save(student.contents())
                    saved = student.progress.step
                course.evaluate_if_due()
                writer.check()
            if saved < student.progress.step:
                writer.save(student.contents())
            writer.wait()
            interrupted = student.progress.step < total
            if interrupted:
                again = f"{fathom_command()} sft {run.recipe} --resume"
                display.advise(f"stopped at step {student.progress.step}; go on with: {again}")
    return RunResult(run.path, student.progress.step, newest_model(run.path), course.evaluation, interrupted)


class _Course:
    """The steps and evaluations of one session."""

    def __init__(self, student: Student, answers: Answers, total: int, log: MetricsLog, display: Display) -> None:
        self._student, self._answers, self._total = student, answers, total
        self._log, self._display = log, display
        self.evaluation: dict[str, float] = {}

    def step(self) -> None:
        """One optimizer step, and what is said of it."""
        student, recipe = self._student, self._student.recipe
        progress, train = student.progress, recipe.train
        began = time.perf_counter()
        lr = cosine_lr_at(progress.step, self._total, train.warmup_steps, train.floor, recipe.optimizer.lr)
        turns = batch_at(
            self._answers.train, progress.step, train.batch, seed=recipe.seed, of=self._answers.in_epochs(train.epochs)
        )
        values = update(student, turns, lr)
        seconds = time.perf_counter() - began
        values |= {"lr": lr, "seconds": seconds, "tokens_per_second": sum(turn.rows for turn in turns) / seconds}
        self._log.write("train", progress.step, values)
        self._display.step(progress.step, values)
        if values["skipped"]:
            what = what_was_wrong(values)
            if progress.bad_in_a_row >= train.max_bad_steps:
                raise UserError(
                    f"step {progress.step}: not finite ({what}), {progress.bad_in_a_row} in a row; lower optimizer.lr"
                )
            self._display.say(f"step {progress.step}: not finite ({what}), skipped")

    def evaluate_if_due(self) -> None:
        """The loss of held-out answers, and one of them as the model gives it."""
        student, held_out = self._student, self._answers.held_out
        step = student.progress.step
        if not held_out or (step < self._total and step % student.recipe.eval.every):
            return
        began = time.perf_counter()
        self.evaluation = {"loss": loss_of(student, held_out[: student.recipe.eval.answers])}
        if student.recipe.eval.sample_tokens:
            self._write_sample(held_out[0])
        took = {"seconds": time.perf_counter() - began}
        self._log.write("eval", step, self.evaluation | took)
        self._display.say(f"step {step}: held out  {describe(self.evaluation)}")

    def _write_sample(self, turn: Turn) -> None:
        student = self._student
        ids = generate_ids(
            student.model,
            turn.prompt_ids,
            max_tokens=student.recipe.eval.sample_tokens,
            sampling=Sampling(temperature=0.0),
            stop_ids=student.tokenizer.eos_token_ids,
        )
        prompt, answer = (student.tokenizer.decode(tokens) for tokens in (turn.prompt_ids, list(ids)))
        self._log.write_sample(student.progress.step, prompt, answer)


def read_answers(recipe: SFTRecipe, tokenizer: Tokenizer, *, context: int) -> Answers:
    """All answers of the recipe's files. Raises `UserError` where none is left to be learnt."""
    data, encoder = recipe.data, TurnEncoder(tokenizer)
    longest = min(data.max_tokens, context)
    train: list[Turn] = []
    held_out: list[Turn] = []
    too_long = 0
    for file in data.files:
        for conversation in read_conversations(Path(file)):
            side = held_out if _is_held_out(conversation.question, data.held_out) else train
            for turn in encoder.turns(conversation.with_system(data.default_system)):
                if turn.rows > longest:
                    too_long += 1
                else:
                    side.append(turn)
    if not train and held_out:
        raise UserError(f"data.files: nothing to train on: all are held out; lower data.held_out = {data.held_out}")
    if not train and too_long:
        raise UserError(f"data.files: nothing to train on: all {too_long} have more than {longest} tokens {_LONGEST}")
    if not train:
        raise UserError("data.files: nothing to train on: the files hold no conversation")
    return Answers(train, held_out, longest, too_long)


def batch_at(turns: Sequence[Turn], step: int, batch: int, *, seed: int, of: int) -> list[Turn]:
    """The answers of a step, of `of` in all: each once an epoch, in an order of the epoch's own; the last step takes
    what is left."""
    first, last = step * batch, min((step + 1) * batch, of)
    found = []
    for epoch in range(first // len(turns), (last - 1) // len(turns) + 1):
        order = list(range(len(turns)))
        random.Random(f"{seed} epoch {epoch}").shuffle(order)
        begin = epoch * len(turns)
        found += [turns[order[place - begin]] for place in range(max(first, begin), min(last, begin + len(turns)))]
    return found


def update(student: Student, turns: Sequence[Turn], lr: float) -> dict[str, Any]:
    """One optimizer step on `turns`. Returns its metrics; `skipped` says that nothing was changed."""
    model, progress, recipe = student.model, student.progress, student.recipe
    learnt = sum(len(turn.response_ids) for turn in turns)
    head, loss, entropy = Head.of_model(model), 0.0, 0.0
    take_bad_tiles(student.fp8)  # of what came between two steps
    for piece in _packed(turns, recipe.train.rows):
        logprobs, entropies = _score(model, head, piece)
        piece_loss = -logprobs.sum() / learnt
        piece_loss.backward()
        loss += float(piece_loss.detach())
        entropy += float(entropies.sum()) / learnt
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = float(get_total_norm([p.grad for p in parameters]))
    bad_tiles = take_bad_tiles(student.fp8)
    skipped = bad_tiles > 0 or not (math.isfinite(norm) and math.isfinite(loss))
    if not skipped:
        clip_grads_with_norm_(parameters, recipe.optimizer.clip_norm, torch.tensor(norm))
        student.optimizer.step(lr)
        require_numbers(model, progress.step + 1)
    student.optimizer.zero_grad()
    progress.step += 1
    progress.tokens += learnt
    progress.bad_steps += skipped
    progress.bad_in_a_row = progress.bad_in_a_row + 1 if skipped else 0
    metrics = {"loss": loss, "entropy": entropy, "grad_norm": norm, "skipped": skipped, "tokens": progress.tokens}
    return metrics if student.fp8 is None else metrics | {"bad_tiles": bad_tiles}


@torch.no_grad()
def loss_of(student: Student, turns: Sequence[Turn]) -> float:
    """Mean loss of the answers' tokens, in nats."""
    head, total = Head.of_model(student.model), 0.0
    for piece in _packed(turns, student.recipe.train.rows):
        total -= float(_score(student.model, head, piece)[0].sum())
    return total / sum(len(turn.response_ids) for turn in turns)


def _packed(turns: Sequence[Turn], rows: int) -> Iterator[list[Turn]]:
    # By length: texts that are much the same length attend in one product.
    return packed(sorted(turns, key=lambda turn: turn.rows), lambda turn: turn.rows, rows)


def _score(model: Transformer, head: Head, turns: Sequence[Turn]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of every token of the answers."""
    on = model.model.embed_tokens.weight.device
    forest = Forest.plant([Tree(turn.prompt_ids, [turn.response_ids]) for turn in turns], on)
    hidden, _ = model.forest_states(forest)
    return logprobs_and_entropy(hidden[forest.sources], head, forest.targets, 1.0)


def _is_held_out(question: str, share: float) -> bool:
    # A hash of its own: rows made from a task's training problems would all be on one side of the task's.
    text = " ".join(question.split()).casefold()
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"sft").digest()
    return int.from_bytes(digest) < share * 2**64


def _check_data(answers: Answers, progress: Progress, accept_changes: bool) -> None:
    """Raise `UserError` where a resumed run would read other answers than before."""
    now, before = answers.fingerprint, progress.data.get("fingerprint")
    if before is not None and before != now and not accept_changes:
        raise UserError(
            "data.files: their answers are not those that this run began with; put them back, give the run another "
            "--name, or insist with --accept-changes"
        )
    progress.data = {"fingerprint": now}
