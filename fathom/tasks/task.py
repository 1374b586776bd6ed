"""What a task is: it makes problems, and a rule of its own says whether an answer is right.

Everything that asks "is this true?" asks a task: rewards, evaluation, the data factory, best-of-n. No model judges.

Problems come from a seed and a level of difficulty (1 is the easiest). Those of training and those held out never meet:
a problem belongs to the one or the other by a hash of its `key`, whatever seed and level it was drawn with, so that
asking for more of either can never leak. Where the same question may stand under two keys, as it may in a file or in
several tasks together, those that are known to be held out (`hold_out`) are passed over in training.
"""

import hashlib
import math
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fathom.errors import UserError
from fathom.tasks.faults import describe
from fathom.tasks.words import units

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

    def __post_init__(self) -> None:
        """Raises `TypeError` or `ValueError` for a field that is not what it should be."""
        kinds = {"question": str, "answer": str, "level": int, "key": str, "data": Mapping}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"a problem's {name} is {_short(value)}, which is no {kind.__name__.lower()}")
            if kind is str and (half := half_character(value)):
                raise ValueError(f"a problem's {name} holds {half}, half a character and no text")
        if self.level < 1:
            raise ValueError(f"a problem's level is {self.level}; levels count from 1")
        for name, values in (("language", get_args(Language)), ("split", (*get_args(Split), None))):
            if getattr(self, name) not in values:
                raise ValueError(f"a problem's {name} is {_short(getattr(self, name))}, not one of {values}")

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
    held_out_questions: frozenset[tuple[str, ...]] = frozenset()
    """Those that are known one by one, as `words.units`; of problems made by rule, none are unless `hold_out` says."""

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

        Raises `UserError` for a level that there is not, where a level has no problem of that split, and where
        `problem` raises or gives something else.
        """
        require_levels(self)
        if not 1 <= level <= self.levels:
            raise UserError(f"task {self.called}: level {level} is not among 1 to {self.levels}")
        found = self._drawn(split, level, random.Random(f"{self.called} {split} {level} {seed}"))
        return self._for_training(found, level) if split == "train" else found

    def hold_out(self, questions: Iterable[str]) -> None:
        """From now on these are not among the training problems, in whichever case, spaces and punctuation."""
        self.held_out_questions |= {tuple(units(question)) for question in questions}

    def _for_training(self, problems: Iterator[Problem], level: int) -> Iterator[Problem]:
        """Those that ask no known held-out question. Raises `UserError` where there are none."""
        missed = 0
        for problem in problems:
            if not self.held_out_questions or tuple(units(problem.question)) not in self.held_out_questions:
                missed = 0
                yield problem
            elif (missed := missed + 1) == _PATIENCE:
                raise UserError(
                    f"task {self.called}: level {level} has nothing for training that is not held out as well; take "
                    "these questions out, or give it more problems"
                )

    def _drawn(self, split: Split, level: int, source: random.Random) -> Iterator[Problem]:
        missed = 0
        while True:
            problem = self._one(source, level)
            if problem.held_out == (split == "held-out"):
                missed = 0
                yield problem
            elif (missed := missed + 1) == _PATIENCE:
                side = "held out" if split == "held-out" else "for training"
                raise UserError(
                    f"task {self.called}: level {level} has too few different problems, none of them {side}; make "
                    "more, or say of each which it is (split)"
                )

    def _one(self, source: random.Random, level: int) -> Problem:
        try:
            problem = self.problem(source, level)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            file = getattr(sys.modules.get(type(self).__module__), "__file__", None)
            raise UserError(f"task {self.called}: its problem() raised {describe(error, file)}; mend it") from error
        if not isinstance(problem, Problem):
            raise UserError(
                f"task {self.called}: its problem() gave {_short(problem)}, which is no Problem; "
                "let it return Problem(question, answer, level)"
            )
        return problem

    @property
    def called(self) -> str:
        """Its name, or its class's."""
        return self.name or type(self).__name__


def require_levels(task: Task) -> None:
    """Raises `UserError` where the task's levels are no number of levels."""
    if not isinstance(task.levels, int) or isinstance(task.levels, bool) or task.levels < 1:
        raise UserError(f"task {task.called}: levels = {_short(task.levels)}; give it a whole number of at least 1")


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


def half_character(text: str) -> str:
    """The first surrogate in it, spelt out, which no file can hold; empty where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ascii(text[error.start])
    return ""


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:59]}…"
