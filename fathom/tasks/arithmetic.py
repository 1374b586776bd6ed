"""Chains of whole numbers: with the usual order of operations, and modulo ten from left to right."""

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fathom.errors import UserError
from fathom.tasks.numerals import read_number
from fathom.tasks.task import Problem, Task

_APPLY: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class _Size:
    """What the chains of one level are made of."""

    numbers: int
    digits: int
    factors: int = 0
    """How many of the operations multiply; one of the two numbers multiplied then has a single digit."""


_SIZES = (
    _Size(2, 1),
    _Size(2, 2),
    _Size(3, 2),
    _Size(4, 2),
    _Size(4, 2, factors=1),
    _Size(5, 3, factors=1),
    _Size(6, 3, factors=2),
    _Size(8, 4, factors=2),
)


class Arithmetic(Task):
    """Chains such as 12 + 7 * 3 - 5; multiplication goes before addition and subtraction."""

    name = "arithmetic"
    levels = len(_SIZES)

    def __init__(self, *, corrections: float = 0.0) -> None:
        """`corrections` is the share of steps in worked solutions that first go wrong and are then put right."""
        self._corrections = _share(self.name, corrections)

    def problem(self, random: random.Random, level: int) -> Problem:
        """`level` sets how many numbers, of how many digits, and how many multiplications."""
        chain = _draw_chain(random, _SIZES[level - 1])
        question = f"What is {' '.join(map(str, chain))}? Answer with the number alone."
        return Problem(question, str(_evaluate(chain)[-1]), level, data={"chain": chain})

    def check(self, problem: Problem, answer: str) -> float:
        """1 for the number, however it is written (`numerals`)."""
        return float(read_number(answer) == int(problem.answer))

    def solution(self, problem: Problem, random: random.Random) -> str:
        """One line an operation: products first, then from left to right."""
        return "\n".join(
            f"{said} = {_slip(result, random)}. Wait, {said} = {result}"
            if random.random() < self._corrections
            else f"{said} = {result}"
            for said, result in zip(*_work_out(problem.data["chain"]), strict=True)
        )


class Modular(Task):
    """Chains such as 3+8*7-5= worked out from left to right, keeping only the last digit: 1, 7, 2.

    Every step is one of 300 facts, so that a very small model can learn them all, but a chain cannot be guessed.
    Subtraction never goes below zero: it borrows a ten, so that 2-5 is 7. `level` is the number of operations.
    """

    name = "modular"
    levels = 12

    def __init__(self, *, corrections: float = 0.05) -> None:
        """`corrections` is the share of steps in worked solutions that first go wrong: `3+8=4!1`."""
        self._corrections = _share(self.name, corrections)

    def problem(self, random: random.Random, level: int) -> Problem:
        """The question is the bare chain, the answer one digit."""
        question = str(random.randrange(10))
        for _ in range(level):
            question += random.choice("+-*") + str(random.randrange(10))
        return Problem(f"{question}=", _steps(question)[-1][-1], level)

    def check(self, problem: Problem, answer: str) -> float:
        """1 for the digit."""
        return float(read_number(answer) == int(problem.answer))

    def solution(self, problem: Problem, random: random.Random) -> str:
        """The steps, as in `3+8=1;1*7=7;7-5=2`; a `!` takes back the digit before it."""
        steps = []
        for said, digit in _steps(problem.question.removesuffix("=")):
            slip = ""
            if random.random() < self._corrections:
                slip = f"{(int(digit) + random.randrange(1, 10)) % 10}!"
            steps.append(f"{said}={slip}{digit}")
        return ";".join(steps)


def _share(task: str, value: float) -> float:
    if not 0 <= value < 1:
        raise UserError(f"task {task}: corrections = {value} is not a share from 0 to below 1")
    return value


def _draw_chain(random: random.Random, size: _Size) -> list[int | str]:
    """Numbers and signs in turn."""
    multiplied = set(random.sample(range(size.numbers - 1), size.factors))
    chain: list[int | str] = []
    for place in range(size.numbers):
        digits = 1 if place - 1 in multiplied else size.digits
        chain.append(random.randrange(10 ** (digits - 1), 10**digits))
        if place < size.numbers - 1:
            chain.append("*" if place in multiplied else random.choice("+-"))
    return chain


def _work_out(chain: Sequence[int | str]) -> tuple[list[str], list[int]]:
    """Every operation in the order in which it is done: as written, and its result."""
    said, results, rest = [], [], list(chain)
    for signs in ("*", "+-"):
        place = 1
        while place < len(rest):
            if rest[place] not in signs:
                place += 2
                continue
            left, sign, right = rest[place - 1 : place + 2]
            rest[place - 1 : place + 2] = [result := _APPLY[sign](left, right)]
            said.append(f"{left} {sign} {right}")
            results.append(result)
    return said, results


def _evaluate(chain: Sequence[int | str]) -> list[int]:
    return _work_out(chain)[1]


def _slip(result: int, random: random.Random) -> int:
    """A wrong result of the kind that people write down."""
    return result + random.choice((-10, -2, -1, 1, 2, 10))


def _steps(chain: str) -> list[tuple[str, str]]:
    """For every operation, from left to right: what is written, and its last digit."""
    digit, steps = chain[0], []
    for place in range(1, len(chain), 2):
        said = digit + chain[place : place + 2]
        digit = str(_APPLY[said[1]](int(said[0]), int(said[2])) % 10)
        steps.append((said, digit))
    return steps
