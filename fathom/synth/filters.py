"""Filters that look at one candidate: each a pure function that gives a reason to drop it, or nothing.

What looks at several rows is elsewhere: `duplicates.py`, `decontamination.py`, and a problem's share in `selection.py`.

Repetition is measured twice, because each way is blind to what the other sees. *Repeated n-grams*, the share of a
text's 8-grams that stood in it before (Gopher's rule, arXiv 2112.11446 §A.1.1, over units of any script), find a
sentence that is said over and over, but nothing where a counter makes every turn a little different. *Compression*,
how many times longer the text is than zlib makes it, finds those once they are long. Worked solutions of all levels of
the built-in tasks have at most 0.65 and 12.5 (long lists of cases); loops reach 0.9 and 20.
"""

import zlib
from collections.abc import Callable

from fathom.config.synth import FilterSection
from fathom.synth.candidates import Candidate
from fathom.tasks import language
from fathom.tasks.reading import Reading
from fathom.tasks.task import Problem
from fathom.tasks.words import ngrams, units

Filter = Callable[[Candidate, Reading, Problem, FilterSection], bool]
"""Whether a candidate is to be dropped."""

_REPEATED = 8


def reason_to_drop(candidate: Candidate, reading: Reading, problem: Problem, settings: FilterSection) -> str:
    """The first of `FILTERS` that drops it; empty where none does."""
    return next((name for name, drops in FILTERS.items() if drops(candidate, reading, problem, settings)), "")


def not_drawn(candidate: Candidate, reading: Reading, problem: Problem, settings: FilterSection) -> bool:
    """There is no completion."""
    return bool(candidate.failure)


def wrong(candidate: Candidate, reading: Reading, problem: Problem, settings: FilterSection) -> bool:
    """The task's rule does not find it wholly right, or it has no answer."""
    return not candidate.right or reading.answer is None


def cut_off(candidate: Candidate, reading: Reading, problem: Problem, settings: FilterSection) -> bool:
    """The model did not end it."""
    return settings.finished and not candidate.finished


def untidy(candidate: Candidate, reading: Reading, problem: Problem, settings: FilterSection) -> bool:
    """The layout is not kept to the letter, apart from its being cut off."""
    return settings.layout and candidate.finished and not reading.well_formed


def mixed(candidate: Candidate, reading: Reading, problem: Problem, settings: FilterSection) -> bool:
    """Too many of the thought's words are not of the problem's language. Figures are of every language."""
    share = language.share(reading.thought, problem.language)
    return share is not None and share < settings.language


def too_short(candidate: Candidate, reading: Reading, problem: Problem, settings: FilterSection) -> bool:
    """The thought has too few characters."""
    return len(reading.thought) < settings.shortest_thought


def too_long(candidate: Candidate, reading: Reading, problem: Problem, settings: FilterSection) -> bool:
    """The thought has too many characters."""
    return settings.longest_thought is not None and len(reading.thought) > settings.longest_thought


def repetitive(candidate: Candidate, reading: Reading, problem: Problem, settings: FilterSection) -> bool:
    """The text goes round in circles."""
    return (
        repeated_share(candidate.text) > settings.repetition or compression_ratio(candidate.text) > settings.compression
    )


FILTERS: dict[str, Filter] = {
    "not drawn": not_drawn,
    "wrong": wrong,
    "cut off": cut_off,
    "layout": untidy,
    "language": mixed,
    "short thought": too_short,
    "long thought": too_long,
    "repetition": repetitive,
}
"""By the reason that each gives, in the order in which they are asked."""


def repeated_share(text: str) -> float:
    """The share of 8-grams that stood in the text before, 0 to 1."""
    found = ngrams(units(text), _REPEATED)
    return 1 - len(set(found)) / len(found) if found else 0.0


def compression_ratio(text: str) -> float:
    """Bytes of the text for every byte that zlib needs; about 1 for short texts."""
    plain = text.encode()
    return len(plain) / len(zlib.compress(plain)) if plain else 1.0
