"""A training row: what is written of a candidate, and the files of rows.

    {"messages": [{"role": "user", "content": …},
                  {"role": "assistant", "reasoning_content": …, "content": …}],
     "task": …, "level": …, "key": …, "question": …, "right": …, "score": …, "source": …, "round": …, "seed": …,
     "tokens": …, "language": …}

Whoever learns from it reads `messages`; the rest says where it comes from. JSON Lines and Parquet hold the same.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow
import pyarrow.parquet

from fathom.config.rewards import Layout
from fathom.config.synth import RewriteSection
from fathom.data.chat import CLOSING, OPENING
from fathom.synth.candidates import Candidate
from fathom.tasks.reading import Reading, read
from fathom.tasks.task import Problem

Row = dict[str, Any]
Format = Literal["jsonl", "parquet"]

_GROUP = 1024
_TEXT, _WHOLE = pyarrow.string(), pyarrow.int64()
_MESSAGE = pyarrow.struct({"role": _TEXT, "reasoning_content": _TEXT, "content": _TEXT})
_SCHEMA = pyarrow.schema(
    {
        "messages": pyarrow.list_(_MESSAGE),
        "task": _TEXT,
        "level": _WHOLE,
        "key": _TEXT,
        "question": _TEXT,
        "right": _TEXT,
        "score": pyarrow.float64(),
        "source": _TEXT,
        "round": _WHOLE,
        "seed": _WHOLE,
        "tokens": _WHOLE,
        "language": _TEXT,
    }
)


def make_row(
    problem: Problem,
    candidate: Candidate,
    reading: Reading,
    *,
    task: str,
    source: str,
    instruction: str,
    rewrite: RewriteSection,
) -> Row:
    """A candidate as written. `instruction` is what follows the question in the prompt that was drawn with."""
    assert reading.answer is not None
    wanted = instruction if rewrite.instruction is None else rewrite.instruction
    thought = reading.thought and rewrite.thought_template.replace("{thought}", reading.thought)
    return {
        "messages": [
            {"role": "user", "content": "\n".join(part for part in (problem.question, wanted) if part)},
            {
                "role": "assistant",
                "reasoning_content": thought,
                "content": rewrite.answer_template.replace("{answer}", reading.answer),
            },
        ],
        "task": task,
        "level": problem.level,
        "key": problem.key or problem.question,
        "question": problem.question,
        "right": problem.answer,
        "score": candidate.score,
        "source": source,
        "round": candidate.round,
        "seed": candidate.seed,
        "tokens": candidate.tokens,
        "language": problem.language,
    }


def text_of(row: Row) -> str:
    """All that a reader of the row sees."""
    question, answer = row["messages"]
    return "\n".join((question["content"], answer["reasoning_content"], answer["content"]))


def answer_in(row: Row, rewrite: RewriteSection) -> str | None:
    """The answer that a reader of the row finds; None where there is none, or something besides it is not as it should
    be (a think tag in the thought, a second answer)."""
    said = row["messages"][1]
    thought, content = said["reasoning_content"], said["content"]
    completion = f"{OPENING}{thought}{CLOSING}{content}" if thought else content
    layout = Layout(form=rewrite.form or "rest", thoughts="optional")
    reading = read(completion, layout, starts_thinking=False, finished=True)
    if reading.answer is None or not reading.well_formed:
        return None
    if rewrite.form is not None:
        return reading.answer
    before, after = rewrite.answer_template.split("{answer}")
    return content.removeprefix(before).removesuffix(after)


class RowWriter(Protocol):
    """An open file of rows."""

    def write(self, row: Row) -> None:
        """One row more."""
        ...

    def close(self) -> None:
        """The last rows, and the end of the file."""
        ...


@contextmanager
def row_file(path: Path, kind: Format) -> Iterator[RowWriter]:
    """A file that takes its name when the block ends well, and until then leaves what was there. Raises `OSError`."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        writer: RowWriter = _JsonLines(scratch) if kind == "jsonl" else _Parquet(scratch)
        try:
            yield writer
        finally:
            writer.close()
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


class _JsonLines:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, row: Row) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _Parquet:
    def __init__(self, path: Path) -> None:
        self._file = pyarrow.parquet.ParquetWriter(path, _SCHEMA)
        self._rows: list[Row] = []

    def write(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) == _GROUP:
            self._flush()

    def close(self) -> None:
        try:
            self._flush()
        finally:
            self._file.close()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pyarrow.Table.from_pylist(self._rows, schema=_SCHEMA))
        self._rows = []
