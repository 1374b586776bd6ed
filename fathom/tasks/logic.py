"""Puzzles with exactly one solution: who lies (knights and knaves), and who stands where (orderings)."""

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fathom.tasks.task import Problem, Task

LONGEST = 500
"""Characters of the longest answer that is read."""

NAMES = ("Ann", "Bob", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivan", "Jill", "Kofi", "Lena")
_ORDERS = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("heavier", "heaviest", "lightest"),
)
_NUMBERED = ("first", "second", "third", "fourth", "fifth")
_WORD = re.compile(r"[a-z]+")
# What may stand between the words of an answer.
_BETWEEN = re.compile(r"[\s,;:.=>*-]*")

World = tuple[Any, ...]
"""One way that things may be: for each person whether a knight, or the people in order."""


@dataclass(frozen=True)
class _Claim:
    """A sentence about the world."""

    words: str
    holds: Callable[[World], bool]


class Logic(Task):
    """Knights and knaves of 2, 3, 4, 5 people, and orderings of 3, 4, 5; each level has more worlds to rule out."""

    name = "logic"
    levels = 7
    _people = (2, 3, 3, 4, 4, 5, 5)
    _orderings = frozenset((2, 5, 7))

    def problem(self, random: random.Random, level: int) -> Problem:
        """Levels 2, 5 and 7 are orderings; the possible worlds number 4, 6, 8, 16, 24, 32, 120."""
        names = random.sample(NAMES, self._people[level - 1])
        return (_ordering if level in self._orderings else _knights)(random, names, level)

    def check(self, problem: Problem, answer: str) -> float:
        """1 for the one solution, with any case, separators and (of knights and knaves) order of people."""
        if len(answer) > LONGEST:
            return 0.0
        words = _WORD.findall(answer.lower())
        if _BETWEEN.fullmatch(_WORD.sub("", answer.lower())) is None:
            return 0.0
        wanted = problem.data["solution"]
        if problem.data["kind"] == "ordering":
            return float([word for word in words if word not in ("then", "and")] == list(wanted))
        words = [word for word in words if word not in ("is", "a", "and")]
        pairs = list(zip(words[::2], words[1::2], strict=False))
        return float(len(words) == 2 * len(wanted) and sorted(pairs) == sorted(wanted))

    def solution(self, problem: Problem, random: random.Random) -> str:
        """The worlds one after the other, each with the sentence that rules it out; then the one that is left."""
        return "\n".join(problem.data["trials"])


def _knights(random: random.Random, names: Sequence[str], level: int) -> Problem:
    worlds = list(itertools.product((True, False), repeat=len(names)))
    while True:
        claims = [_statement(random, names, speaker) for speaker in range(len(names))]
        fitting = [w for w in worlds if all(c.holds(w) == w[i] for i, c in enumerate(claims))]
        if len(fitting) == 1:
            break
    said = " ".join(f'{name} says: "{claim.words}."' for name, claim in zip(names, claims, strict=True))
    question = (
        f"Knights always tell the truth, knaves always lie; everybody here is one or the other. {said} "
        "Who is what? Name everybody with their kind, in the form 'Zoe: knight, Max: knave'."
    )
    truth = fitting[0]
    trials = [
        f"If {_roles(names, world)}: {_knights_fault(names, claims, world)}"
        for world in random.sample(worlds, len(worlds))
        if world != truth
    ]
    solution = tuple((name.lower(), _role(knight)) for name, knight in zip(names, truth, strict=True))
    data = {"kind": "knights", "solution": solution, "trials": (*trials, f"So {_roles(names, truth)}.")}
    return Problem(question, _roles(names, truth), level, key=said, data=data)


def _statement(random: random.Random, names: Sequence[str], speaker: int) -> _Claim:
    """Something that `speaker` may say about others, or about oneself and another."""
    other = random.choice([i for i in range(len(names)) if i != speaker])
    kind, role = random.randrange(4), random.random() < 0.5
    if kind == 0:
        return _Claim(f"{names[other]} is a {_role(role)}", lambda w: w[other] == role)
    if kind == 1:
        return _Claim(f"{names[other]} and I are of the same kind", lambda w: w[other] == w[speaker])
    if kind == 2:
        return _Claim(
            f"I am a {_role(role)} or {names[other]} is a knave", lambda w: w[speaker] == role or not w[other]
        )
    amount = random.randrange(1, len(names))
    return _Claim(f"Exactly {amount} of us {'is a knave' if amount == 1 else 'are knaves'}", _exactly_knaves(amount))


def _exactly_knaves(amount: int) -> Callable[[World], bool]:
    return lambda world: world.count(False) == amount


def _knights_fault(names: Sequence[str], claims: Sequence[_Claim], world: World) -> str:
    speakers = zip(names, claims, world, strict=True)
    name, knight = next((name, knight) for name, claim, knight in speakers if claim.holds(world) != knight)
    return f"{name}, a {_role(knight)}, would {'lie' if knight else 'tell the truth'}."


def _role(knight: bool) -> str:
    return "knight" if knight else "knave"


def _roles(names: Sequence[str], world: World) -> str:
    return ", ".join(f"{name}: {_role(knight)}" for name, knight in zip(names, world, strict=True))


def _ordering(random: random.Random, names: Sequence[str], level: int) -> Problem:
    more, most, least = random.choice(_ORDERS)
    truth = tuple(random.sample(names, len(names)))
    worlds = list(itertools.permutations(names))
    possible = [claim for claim in _comparisons(names, more, most, least) if claim.holds(truth)]
    claims = _needed(random.sample(possible, len(possible)), worlds)
    said = " ".join(f"{claim.words}." for claim in claims)
    question = f"{said} List everybody from {most} to {least}. Answer with the names, separated by commas."
    trials = [
        f"{', '.join(world)}: no, {next(c.words for c in claims if not c.holds(world))}."
        for world in random.sample(worlds, len(worlds))
        if world != truth
    ]
    solution = tuple(name.lower() for name in truth)
    data = {"kind": "ordering", "solution": solution, "trials": (*trials, f"So {', '.join(truth)}.")}
    return Problem(question, ", ".join(truth), level, key=said, data=data)


def _comparisons(names: Sequence[str], more: str, most: str, least: str) -> list[_Claim]:
    """Everything that a puzzle may say about the order of `names`."""
    claims = []
    for a, b in itertools.permutations(names, 2):
        claims.append(_Claim(f"{a} is {more} than {b}", lambda w, a=a, b=b: w.index(a) < w.index(b)))
    for name in names:
        claims.append(_Claim(f"{name} is not the {most}", lambda w, name=name: w[0] != name))
        claims.append(_Claim(f"{name} is not the {least}", lambda w, name=name: w[-1] != name))
        for place in range(1, len(names) - 1):
            words = f"{name} is the {_NUMBERED[place]} {most}"
            claims.append(_Claim(words, lambda w, name=name, place=place: w[place] == name))
    return claims


def _needed(claims: Sequence[_Claim], worlds: Sequence[World]) -> list[_Claim]:
    """So many of `claims` that one world is left, none of which could be left out."""
    kept = list(claims)
    for claim in claims:
        fewer = [other for other in kept if other is not claim]
        if sum(all(other.holds(world) for other in fewer) for world in worlds) == 1:
            kept = fewer
    return kept
