"""What was drawn, and the file that keeps it: one line for each problem, written when all of it is known.

Everything that costs time goes in here, right or wrong; which rows are written is worked out from it afterwards. So a
kill loses a batch at most, and other filters need no new draws.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fathom.config.rewards import Layout
from fathom.errors import UserError
from fathom.tasks.reading import Reading, read
from fathom.tasks.task import Problem


@dataclass(frozen=True)
class Candidate:
    """One solution, and what its check said."""

    text: str
    """The completion; empty where there is none."""
    seed: int
    round: int = 0
    """Times that the problem was answered wrongly before, in the same conversation."""
    tokens: int | None = None
    """Its length; None for a worked solution, which no tokenizer has seen."""
    finished: bool = True
    """Whether the model ended it; False where it was cut off."""
    score: float = 0.0
    """The task's, 0 to 1."""
    fault: str = ""
    """Why the check itself failed."""
    failure: str = ""
    """Why there is no completion."""

    @property
    def right(self) -> bool:
        """Wholly, by the task's rule."""
        return self.score >= 1

    def reading(self, layout: Layout, *, starts_thinking: bool) -> Reading:
        """Thought and answer."""
        return read(self.text, layout, starts_thinking=starts_thinking, finished=self.finished)


@dataclass(frozen=True)
class Solved:
    """A problem with its candidates, of all rounds."""

    task: str
    """By the name in the recipe."""
    question: str
    candidates: tuple[Candidate, ...]


class DrawnFile:
    """`drawn.jsonl`. The n-th line is the n-th problem of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def recover(self, problems: Sequence[tuple[str, Problem]]) -> int:
        """How many of `problems` (task and problem) are done; what a kill left of a line is cut away.

        Raises `UserError` where the lines are of other problems, and where the file cannot be read and cut.
        """
        try:
            return self._recovered(problems)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read and written ({error.strerror or error}); see who may, then resume"
            ) from None

    def _recovered(self, problems: Sequence[tuple[str, Problem]]) -> int:
        done = end = 0
        if not self.path.exists():
            return 0
        for number, (line, solved) in enumerate(self._lines(), 1):
            known = problems[done] if done < len(problems) else None
            if known is None or (solved.task, solved.question) != (known[0], known[1].question):
                raise UserError(
                    f"{self.path}:{number}: holds another problem than task {solved.task} gives now, so it cannot be "
                    "gone on with; begin anew with --overwrite or another --name"
                )
            done, end = done + 1, end + len(line)
        os.truncate(self.path, end)
        return done

    def append(self, solved: Sequence[Solved]) -> None:
        """Put a batch on disk. Raises `OSError`; whole lines that were written then stay."""
        text = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in solved)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[Solved]:
        return (solved for _, solved in self._lines())

    def _lines(self) -> Iterator[tuple[bytes, Solved]]:
        """Whole lines, and what they say."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield line, _solved(line)
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise UserError(f"{self.path}:{number}: damaged; delete this line and all below it") from None


def _solved(line: bytes) -> Solved:
    values = json.loads(line)
    return Solved(values["task"], values["question"], tuple(Candidate(**one) for one in values["candidates"]))
