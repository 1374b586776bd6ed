"""Linear equations in one unknown."""

import random
from fractions import Fraction

from fathom.tasks.numerals import read_number, write_number
from fathom.tasks.task import Problem, Task


class Equations(Task):
    """One unknown to solve for: in one step, in two, with it on both sides, with brackets and fractions."""

    name = "equations"
    levels = 5

    def problem(self, random: random.Random, level: int) -> Problem:
        """From level 4 on the solution may be a fraction."""
        name = random.choice("xyzn")
        root = Fraction(random.randrange(-9, 10))
        lines = (_one_step, _two_steps, _both_sides, _brackets, _fractions)[level - 1](random, name, root)
        question = f"Solve for {name}: {lines[0]}. Answer with the value of {name}."
        answer = lines[-1].partition(" = ")[2]
        return Problem(question, answer, level, key=lines[0], data={"name": name, "lines": tuple(lines)})

    def check(self, problem: Problem, answer: str) -> float:
        """1 for the value in any form that `numerals` reads: `x = 3`, `3`, `3.0`, `6/2`."""
        return float(read_number(answer, name=problem.data["name"]) == Fraction(problem.answer))

    def solution(self, problem: Problem, random: random.Random) -> str:
        """The equation, one step simpler a line."""
        return "\n".join(problem.data["lines"])


def _one_step(random: random.Random, name: str, root: Fraction) -> list[str]:
    if random.random() < 0.5:
        shift = _nonzero(random, 30)
        return [f"{_sum(1, name, shift)} = {root + shift}", f"{name} = {root}"]
    factor = random.randrange(2, 13)
    return [f"{factor}{name} = {factor * root}", f"{name} = {root}"]


def _two_steps(random: random.Random, name: str, root: Fraction) -> list[str]:
    return _solve(name, random.randrange(2, 13), _nonzero(random, 30), 0, root)


def _both_sides(random: random.Random, name: str, root: Fraction) -> list[str]:
    left, right = random.sample([*range(-9, 0), *range(1, 13)], 2)
    return _solve(name, left, _nonzero(random, 30), right, root)


def _brackets(random: random.Random, name: str, root: Fraction) -> list[str]:
    """outer(inner·x + shift) = right·x + rest; every second time or so `root` is not quite its solution."""
    outer, inner, shift = random.randrange(2, 7), random.randrange(1, 6), _nonzero(random, 9)
    right = random.choice([n for n in range(-9, 10) if n not in (0, outer * inner)])
    rest = (outer * inner - right) * root + outer * shift + random.choice((0, _nonzero(random, 9)))
    equation = f"{outer}({_sum(inner, name, shift)}) = {_sum(right, name, int(rest))}"
    return [equation, *_lines(name, outer * inner, outer * shift, right, int(rest))]


def _fractions(random: random.Random, name: str, root: Fraction) -> list[str]:
    """(factor·x + shift)/divisor = right·x + rest."""
    divisor, factor, shift = random.randrange(2, 8), random.randrange(1, 10), _nonzero(random, 20)
    right = random.choice([n for n in range(-6, 7) if n and n * divisor != factor])
    rest = random.randrange(-20, 21)
    equation = f"({_sum(factor, name, shift)})/{divisor} = {_sum(right, name, rest)}"
    return [equation, *_lines(name, factor, shift, right * divisor, rest * divisor)]


def _solve(name: str, left: int, shift: int, right: int, root: Fraction) -> list[str]:
    """left·x + shift = right·x + rest, with the rest that makes `root` its solution."""
    return _lines(name, left, shift, right, int((left - right) * root + shift))


def _lines(name: str, left: int, shift: int, right: int, rest: int) -> list[str]:
    """The equation left·x + shift = right·x + rest, and what it becomes step by step."""
    lines = [f"{_sum(left, name, shift)} = {_sum(right, name, rest)}"]
    factor, value = left - right, rest - shift
    collected = f"{_sum(factor, name, 0)} = {value}"
    solved = f"{name} = {write_number(Fraction(value, factor))}"
    return list(dict.fromkeys([*lines, collected, solved]))


def _sum(factor: int, name: str, shift: int) -> str:
    """`3x - 4`, leaving out what is zero and a factor of one."""
    term = {0: "", 1: name, -1: f"-{name}"}.get(factor, f"{factor}{name}")
    if not term:
        return str(shift)
    return f"{term} {'-' if shift < 0 else '+'} {abs(shift)}" if shift else term


def _nonzero(random: random.Random, most: int) -> int:
    return random.choice((-1, 1)) * random.randrange(1, most + 1)
