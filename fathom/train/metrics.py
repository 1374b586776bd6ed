"""What a run has measured: JSON lines for programs, TensorBoard for eyes, Markdown for samples.

On resuming, everything after the checkpoint's step is cut away, so that the files read as if nothing had happened.
Times and what is derived from them are the only values that differ between two equal runs.
"""

import itertools
import json
import math
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from fathom.errors import UserError
from fathom.train.run import RunFolder

SAMPLE_CHARACTERS = 8000
"""Most that the log shows of a prompt, or of a completion."""
_SAMPLE_HEADING = re.compile(rb"^## Step (\d+)\n", re.MULTILINE)


class MetricsLog:
    """Appends to a run's metrics after cutting them back to `step`. Use as a context.

    A checkpoint is saved before its step is evaluated, and the sample is written before the evaluation's line. So a
    step without that line has not been evaluated, and its sample, if it has one, is cut away with the rest.
    """

    def __init__(self, run: RunFolder, *, step: int) -> None:
        """Raises `UserError` for a `metrics.jsonl` that cannot be read up to `step`; nothing is cut then."""
        self._run = run
        with _disk(run.path):
            end, self.evaluated = _end_of_metrics(run.metrics, step)
            _cut(run.metrics, end)
            _cut(run.samples, _end_of_samples(run.samples, step if self.evaluated else step - 1))
            self._lines = run.metrics.open("a", encoding="utf-8")
            self._board = _Board(run.tensorboard, purge_step=step + 1 if step else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        with _disk(self._run.path):
            try:
                self._lines.close()
            finally:
                self._board.close()

    def write(self, kind: Literal["train", "eval"], step: int, values: dict[str, Any]) -> None:
        """One line, at once on disk. Numbers that are not finite become null: JSON has no word for them."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with _disk(self._run.path):
            self._lines.write(json.dumps({"kind": kind, "step": step, **finite}, ensure_ascii=False) + "\n")
            self._lines.flush()
            numbers = {f"{kind}/{name}": value for name, value in finite.items() if isinstance(value, int | float)}
            self._board.add(step, numbers)

    def write_sample(self, step: int, prompt: str, text: str) -> None:
        """A text and how the model went on with it, as one section of `samples.md`."""
        self._write_section(step, _block(prompt + text))

    def write_answer(self, step: int, parts: dict[str, str]) -> None:
        """A problem and its answer, as one section of `samples.md` with a paragraph for each of `parts`."""
        self._write_section(step, "\n\n".join(f"{name}:\n\n{_block(shortened(text))}" for name, text in parts.items()))

    def _write_section(self, step: int, body: str) -> None:
        with _disk(self._run.path), self._run.samples.open("a", encoding="utf-8") as file:
            file.write(f"## Step {step}\n\n{body}\n\n")


def _block(text: str) -> str:
    """Indented, so that nothing in it can pass for a heading."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def shortened(text: str, most: int = SAMPLE_CHARACTERS) -> str:
    """A text of more than `most` characters without its middle."""
    half, left_out = most // 2, len(text) - most
    return text if left_out <= 0 else f"{text[:half]}\n[… {left_out:,} characters …]\n{text[-half:]}"


class _Board:
    """Scalars for TensorBoard, written at once: torch's `SummaryWriter` writes in a thread, whose failure on a full
    disk is a traceback that nobody can catch."""

    _numbers = itertools.count()

    def __init__(self, folder: Path, *, purge_step: int | None) -> None:
        """What an earlier file says of `purge_step` and later steps no longer counts."""
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names: the time comes first.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}.{next(self._numbers)}"
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            restart = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=purge_step, session_log=restart))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Values of one step, by name."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All lines of a `metrics.jsonl`, but for a last one that is cut short. Raises `UserError` that names a bad one."""
    return [_parse(file, number, line) for number, line in _whole_lines(file)]


def _whole_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line. A crash leaves the last one without its end: it is passed over with a note."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):
                yield number, line
            else:
                warnings.warn(f"{file}: line {number}, the last, is cut short and left out", stacklevel=2)


def _parse(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
        if isinstance(values["step"], int) and values["kind"] in ("train", "eval"):
            return values
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file}: line {number} is not a line of metrics; put it right or delete it")


def _end_of_metrics(file: Path, step: int) -> tuple[int, bool]:
    """Bytes up to the last whole line of `step` or an earlier one; whether `step` has been evaluated."""
    end, evaluated = 0, False
    if file.exists():
        for number, line in _whole_lines(file):
            values = _parse(file, number, line)
            if values["step"] > step:
                break
            evaluated = evaluated or (values["kind"], values["step"]) == ("eval", step)
            end += len(line)
    return end, evaluated


def _end_of_samples(file: Path, step: int) -> int:
    """Bytes before the first section of a step after `step`."""
    content = file.read_bytes() if file.exists() else b""
    later = (m.start() for m in _SAMPLE_HEADING.finditer(content) if int(m[1]) > step)
    return next(later, len(content))


def _cut(file: Path, size: int) -> None:
    if file.exists():
        with file.open("r+b") as stream:
            stream.truncate(size)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: metrics cannot be written ({error.strerror or error})") from None
