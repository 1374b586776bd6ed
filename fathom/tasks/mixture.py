"""Several tasks as one: `modular?levels=8 + bilingual?levels=3`, as R1's reinforcement learning is on mathematics, code
and logic at once.

Problems are drawn from all parts equally often, and each is checked by the part that it is of. Parts may have different
numbers of levels: the mixture has as many as the most of them, and each part's own are spread over those, so that
level 1 is the easiest of all and the last the hardest. What a part holds out, the mixture holds out: a question that is
held out in one file, and for training in another part, is passed over there.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fathom.errors import UserError
from fathom.tasks.programs import in_sandbox
from fathom.tasks.task import Problem, Split, Task, require_levels

BETWEEN = " + "
"""Stands between the names of its parts."""


class Mixture(Task):
    """Problems of several tasks. `data` of each says which part it is of, and holds that part's problem."""

    def __init__(self, parts: Sequence[Task]) -> None:
        """Raises `UserError` for a part whose levels are no number of levels."""
        self.parts = tuple(parts)
        self.name = BETWEEN.join(part.called for part in parts)
        for part in parts:
            require_levels(part)
        self.levels = max(part.levels for part in parts)
        self.held_out_questions = frozenset().union(*(part.held_out_questions for part in parts))

    def problem(self, random: random.Random, level: int) -> Problem:
        """One of any part."""
        place = random.randrange(len(self.parts))
        return self._own(place, self.parts[place].problem(random, self._level(place, level)), level)

    def problems(self, split: Split, *, level: int = 1, seed: int = 0) -> Iterator[Problem]:
        """As each part draws them itself."""
        if not 1 <= level <= self.levels:
            raise UserError(f"task {self.called}: level {level} is not among 1 to {self.levels}")
        streams = [
            part.problems(split, level=self._level(place, level), seed=seed) for place, part in enumerate(self.parts)
        ]
        if split == "train":
            streams = [self._for_training(stream, level) for stream in streams]
        return self._mixed(streams, level, random.Random(f"{self.called} {split} {level} {seed}"))

    def check(self, problem: Problem, answer: str) -> float:
        """By the rule of its part."""
        part, own = self.part_of(problem)
        return part.check(own, answer)

    def solution(self, problem: Problem, random: random.Random) -> str | None:
        """As its part writes it."""
        part, own = self.part_of(problem)
        return part.solution(own, random)

    def part_of(self, problem: Problem) -> tuple[Task, Problem]:
        """The part that a problem is of, and the problem as that part made it."""
        return self.parts[problem.data["part"]], problem.data["problem"]

    def _mixed(self, streams: Sequence[Iterator[Problem]], level: int, source: random.Random) -> Iterator[Problem]:
        while True:
            place = source.randrange(len(streams))
            yield self._own(place, next(streams[place]), level)

    def _own(self, place: int, problem: Problem, level: int) -> Problem:
        return replace(problem, level=level, data={"part": place, "problem": problem})

    def _level(self, place: int, level: int) -> int:
        """The level of a part that is as far among its own as `level` is among the mixture's."""
        return -(-level * self.parts[place].levels // self.levels)


def part_of(task: Task, problem: Problem) -> tuple[Task, Problem]:
    """The task that checks a problem, and the problem as that task made it: for all but a mixture, themselves."""
    # By its very type: a class derived from it is somebody's code, which is not to say what checks it.
    return task.part_of(problem) if type(task) is Mixture else (task, problem)


def uses_sandbox(task: Task) -> bool:
    """Whether some of its checks run in the sandbox."""
    return any(map(in_sandbox, _parts(task)))


def stays_in_sandbox(task: Task) -> bool:
    """Whether all of its checks do, so that they need no process of their own."""
    return all(map(in_sandbox, _parts(task)))


def _parts(task: Task) -> Sequence[Task]:
    return task.parts if type(task) is Mixture else (task,)
