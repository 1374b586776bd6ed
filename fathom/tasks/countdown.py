"""Countdown: make a number out of others."""

import operator
import random
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from fathom.tasks.task import Problem, Task

LONGEST = 300
"""Characters of the longest answer that is read."""
_DEEPEST = 20
_TOKEN = re.compile(r" *([0-9]{1,9}|[-+*/()=])")
_SIGNS = str.maketrans("×·÷−（）", "**/-()")
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


class Countdown(Task):
    """Make the target out of all the numbers, each used exactly once."""

    name = "countdown"
    levels = 5

    def problem(self, random: random.Random, level: int) -> Problem:
        """`level` plus one numbers; some target below 1000 that they make."""
        while True:
            numbers = [random.randrange(1, 11) if random.random() < 0.6 else random.randrange(11, 100)]
            numbers += [random.randrange(1, 26) for _ in range(level)]
            said, lines, target = _combine(random, numbers)
            if 1 <= target < 1000 and target not in numbers:
                break
        random.shuffle(numbers)
        question = (
            f"Use each of the numbers {', '.join(map(str, numbers))} exactly once, with + - * / and brackets, "
            f"to make {target}. Answer with the expression alone."
        )
        key = f"{sorted(numbers)} {target}"
        data = {"numbers": tuple(numbers), "target": int(target), "lines": tuple(lines)}
        return Problem(question, said, level, key=key, data=data)

    def check(self, problem: Problem, answer: str) -> float:
        """1 for an expression that uses the numbers given, each once, and has the target as its exact value.

        `= target` may follow it. Whole numbers, `+ - * /` (`× ÷` too) and round brackets are read, nothing else.
        """
        return float(makes(answer, problem.data["numbers"], problem.data["target"]))

    def solution(self, problem: Problem, random: random.Random) -> str:
        """The steps that make the target, a line each."""
        return "\n".join(problem.data["lines"])


def makes(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Whether `expression` uses exactly `numbers`, each once, and is exactly `target`."""
    try:
        value, used, claimed = _Expression(expression).read()
    except _Unreadable:
        return False
    return value == target and claimed in (None, target) and Counter(used) == Counter(numbers)


def _combine(random: random.Random, numbers: Sequence[int]) -> tuple[str, list[str], Fraction]:
    """An expression over all numbers, its steps, and its value: a whole number, as every step's is."""
    parts = [(str(number), Fraction(number)) for number in numbers]
    lines = []
    while len(parts) > 1:
        (left, a), (right, b) = (parts.pop(random.randrange(len(parts))) for _ in range(2))
        if a < b:
            left, a, right, b = right, b, left, a
        fitting = [s for s in "+-*" if (s != "-" or a > b) and (s != "*" or (b > 1 and a * b < 1000))]
        sign = random.choice(fitting + ["/"] * (b > 1 and a % b == 0))
        value = _APPLY[sign](a, b)
        lines.append(f"{a} {sign} {b} = {value}")
        parts.append((f"({left} {sign} {right})", value))
    said, value = parts[0]
    return said[1:-1], lines, value


class _Unreadable(Exception):
    """The answer is no expression, or one larger than is read."""


class _Expression:
    """A recursive-descent reader whose length and depth are bounded; values are exact."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise _Unreadable
        text = text.translate(_SIGNS).strip()
        self._tokens = _TOKEN.findall(text)
        if _TOKEN.sub("", text).strip():
            raise _Unreadable
        self._used: list[int] = []

    def read(self) -> tuple[Fraction, list[int], int | None]:
        """The value, the numbers used, and what the text says that it equals (None: nothing)."""
        value = self._sum(0)
        claimed = None
        if self._take("="):
            claimed = self._number()
        if self._tokens:
            raise _Unreadable
        return value, self._used, claimed

    def _sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while sign := self._take("+-"):
            value = _APPLY[sign](value, self._product(depth))
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._operand(depth)
        while sign := self._take("*/"):
            right = self._operand(depth)
            if sign == "/" and right == 0:
                raise _Unreadable
            value = _APPLY[sign](value, right)
        return value

    def _operand(self, depth: int) -> Fraction:
        if depth > _DEEPEST:
            raise _Unreadable
        if self._take("("):
            value = self._sum(depth + 1)
            if not self._take(")"):
                raise _Unreadable
            return value
        self._used.append(number := self._number())
        return Fraction(number)

    def _number(self) -> int:
        if not self._tokens or not self._tokens[0].isdecimal():
            raise _Unreadable
        return int(self._tokens.pop(0))

    def _take(self, signs: str) -> str:
        """The next token where it is one of `signs`, else an empty string."""
        return self._tokens.pop(0) if self._tokens and self._tokens[0] in signs else ""
