"""What a task is: it makes problems, and a rule of its own says whether an answer is right.

Everything that asks "is this true?" asks a task: rewards, evaluation, the data factory, best-of-n. No model judges.

Problems come from a seed and a level of difficulty (1 is the easiest). Those of training and those held out never meet:
a problem belongs to the one or the other by a hash of its `key`, whatever seed and level it was drawn with, so that
asking for more of either can never leak.
"""

import hashlib
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fathom.errors import UserError

Split = Literal["train", "held-out"]
Language = Literal["en", "zh"]
_HELD_OUT_SHARE = 0.1
# So many problems of the other split in a row say that a level has too few different problems for two splits.
_PATIENCE = 10_000


@dataclass(frozen=True)
class Problem:
    """One question, and all that its check needs."""

    question: str
    """As a person would be asked it; says in which form the answer is wanted."""
    answer: str = ""
    """A right answer in plain text, for people and for worked solutions; empty where none is known."""
    level: int = 1
    key: str = ""
    """Equal for problems that are the same problem; the question itself where empty."""
    language: Language = "en"
    """What the question is written in, and thoughts should be."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What only the task's check understands."""
    split: Split | None = None
    """Which it belongs to by somebody's decision; None: by its key's hash."""

    @property
    def held_out(self) -> bool:
        """Whether it is for measuring; others are for training."""
        if self.split is not None:
            return self.split == "held-out"
        digest = hashlib.blake2b((self.key or self.question).encode(), digest_size=8).digest()
        return int.from_bytes(digest) < _HELD_OUT_SHARE * 2**64


class Task(ABC):
    """Makes problems and checks answers. To write one, subclass and give `problem` and `check`."""

    name: str = ""
    """How people call it; the class's name where empty."""
    levels: int = 1
    """Difficulties there are: 1 to this."""
    runs_programs: bool = False
    """Whether checking an answer runs it as a program."""

    @abstractmethod
    def problem(self, random: random.Random, level: int) -> Problem:
        """One problem of `level` (1 to `levels`), drawn with `random` alone."""

    @abstractmethod
    def check(self, problem: Problem, answer: str) -> float:
        """How right `answer` is, 0 (wrong) to 1 (right). `answer` is model output: any text at all."""

    def solution(self, problem: Problem, random: random.Random) -> str | None:
        """Thoughts that lead to the answer, written out by rule, for synthetic training text; None: it has none."""
        return None

    def problems(self, split: Split, *, level: int = 1, seed: int = 0) -> Iterator[Problem]:
        """Endless problems of one split; the same for the same arguments.

        Raises `UserError` for a level that there is not, and where a level has no problem of that split.
        """
        if not 1 <= level <= self.levels:
            raise UserError(f"task {self.called}: level {level} is not among 1 to {self.levels}")
        source = random.Random(f"{self.called} {split} {level} {seed}")
        missed = 0
        while True:
            problem = self.problem(source, level)
            if problem.held_out == (split == "held-out"):
                missed = 0
                yield problem
            elif (missed := missed + 1) == _PATIENCE:
                raise UserError(f"task {self.called}: level {level} has too few different problems: none is {split}")

    @property
    def called(self) -> str:
        """Its name, or its class's."""
        return self.name or type(self).__name__


@dataclass(frozen=True)
class Verdict:
    """What came of checking one answer."""

    score: float
    """0 to 1."""
    fault: str = ""
    """One line where the check itself failed (raised, gave no number, took too long); the score is then 0."""


def judge(task: Task, problem: Problem, answer: str) -> Verdict:
    """`task.check`, whatever it does: one that raises or gives no number between 0 and 1 scores 0 and says so."""
    try:
        score = float(task.check(problem, answer))
    except Exception as error:  # a check is somebody's code on a model's text: nothing it raises may end a run
        return Verdict(0.0, f"{task.called}: its check raised {type(error).__name__}: {error}".splitlines()[0])
    if not math.isfinite(score) or not 0 <= score <= 1:
        return Verdict(0.0, f"{task.called}: its check gave {score}, not a number from 0 to 1")
    return Verdict(score)
