"""Which of several answers to one question to give: the one most agree with, or one that a rule finds right.

Majority voting over sampled solutions is self-consistency (arXiv 2203.11171, section 2); DeepSeek-R1 reports it as
cons@64 (arXiv 2501.12948, table 2).
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

_MARKED = re.compile(
    r"^[^\w\n]*(?:final answer|the answer is|answer|####)\s*(?:is\b)?\s*:?\s*(.+)$", re.IGNORECASE | re.MULTILINE
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_LONGEST_NUMBER = 28
"""Digits to which `Decimal` is exact."""


@dataclass(frozen=True)
class Consensus:
    """The outcome of a vote."""

    winner: int
    """Place of the answer to give."""
    votes: list[int]
    """For each answer, how many agree with it, itself included; with a rule, 1 where it holds and 0 elsewhere."""


def consensus(texts: Sequence[str], *, check: Callable[[str], bool] | None = None) -> Consensus:
    """The first of `texts` whose final answer has most votes; with `check`, the first that it finds right.

    Where `check` holds for none, the majority decides. An empty answer votes for nothing.
    """
    assert texts, "a vote needs answers"
    if check is not None:
        right = [int(check(text)) for text in texts]
        if any(right):
            return Consensus(right.index(1), right)
    answers = [final_answer(text) for text in texts]
    counts = Counter(answer for answer in answers if answer)
    votes = [counts[answer] for answer in answers]
    return Consensus(votes.index(max(votes)), votes)


def final_answer(text: str) -> str:
    """What `text` answers in the end, in one spelling for equal answers.

    The last `\\boxed{…}`, else the last line that names itself an answer (`Answer: …`, `#### …`), else all of it.
    Numbers lose thousands commas and trailing zeros; case, spaces, dollar signs and final full stops do not count.
    """
    boxed = _last_boxed(text)
    marked = _MARKED.findall(text)
    answer = boxed if boxed is not None else marked[-1] if marked else text
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
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for place in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : place]
        start = text.rfind("\\boxed{", 0, start)
    return None
