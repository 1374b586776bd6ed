"""Which of several answers to one question to give: the one most agree with, or one that a rule finds right.

Answers are strangers' texts of any length: whatever looks into one here takes time in proportion to it.

Majority voting over sampled solutions is self-consistency (arXiv 2203.11171, section 2); DeepSeek-R1 reports it as
cons@64 (arXiv 2501.12948, table 2).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from fathom.errors import UserError

_MARK = re.compile(r"\W*(?:final answer|the answer is|answer|####)", re.IGNORECASE)
_MARK_ENDS = (re.compile(r"is\b", re.IGNORECASE), re.compile(":"))
"""What may stand between a mark and the answer, in this order."""
_BRACE = re.compile(r"\\boxed\{|[{}]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_LONGEST_NUMBER = 28
"""Digits to which `Decimal` is exact."""


@dataclass(frozen=True)
class Consensus:
    """The outcome of a vote."""

    winner: int
    """Place of the answer to give."""
    votes: list[int]
    """For each answer, how many agree with it, itself included."""


def consensus(texts: Sequence[str], *, check: Callable[[str], float] | None = None) -> Consensus:
    """The first of `texts` whose final answer has most votes; with `check`, of those that it scores highest.

    `check` gives a number, or whether a text is right. An empty answer votes for nothing. Raises `UserError` for a
    score that cannot be compared.
    """
    assert texts, "a vote needs answers"
    answers = [final_answer(text) for text in texts]
    counts = Counter(answer for answer in answers if answer)
    votes = [counts[answer] for answer in answers]
    scores = [0.0] * len(texts) if check is None else [float(check(text)) for text in texts]
    if any(math.isnan(score) for score in scores):
        raise UserError("check: it gave NaN for an answer; give a number, or whether the answer is right")
    return Consensus(max(range(len(texts)), key=lambda place: (scores[place], votes[place])), votes)


def final_answer(text: str) -> str:
    """What `text` answers in the end, in one spelling for equal answers.

    The last `\\boxed{…}`, else the last line that names itself an answer (`Answer: …`, `#### …`; or the line after it,
    if it says no more), else all of it.
    Numbers lose thousands commas and trailing zeros; case, spaces, dollar signs and final full stops do not count.
    """
    return one_spelling(next((found for found in (_last_boxed(text), _last_marked(text)) if found is not None), text))


def one_spelling(answer: str) -> str:
    """`answer` as `final_answer` spells what it finds: equal for equal answers."""
    answer = " ".join(answer.replace("$", "").replace("**", "").split()).rstrip(".").strip().casefold()
    if len(answer) > _LONGEST_NUMBER:
        return answer
    try:
        number = Decimal(_THOUSANDS.sub("", answer))
    except InvalidOperation:
        return answer
    return f"{number.normalize():f}" if number.is_finite() and abs(number.adjusted()) < _LONGEST_NUMBER else answer


def _last_boxed(text: str) -> str | None:
    """What stands between the braces of the last `\\boxed{…}` that is closed."""
    opened: list[int | None] = []  # where a box's content begins; None for a brace of another kind
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append(None if brace[0] == "{" else brace.end())
        elif opened and (start := opened.pop()) is not None and (last is None or start > last[0]):
            last = (start, brace.start())
    return None if last is None else text[slice(*last)]


def _last_marked(text: str) -> str | None:
    """What follows the last mark of an answer, on its own line or else on the next that is not blank."""
    following: str | None = None
    for line in reversed(text.split("\n")):
        if (mark := _MARK.match(line)) is not None:
            rest = line[mark.end() :].strip()
            for end in _MARK_ENDS:
                if (found := end.match(rest)) is not None:
                    rest = rest[found.end() :].lstrip()
            if rest or following is not None:
                return rest or following
        if line.strip():
            following = line
    return None
