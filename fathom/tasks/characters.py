"""Characters as a reader sees them, one at a time.

Whole texts are never normalised here: that takes quadratic time for long runs of combining marks, which model output
may hold, and no text may stall a run.
"""

import unicodedata
from collections.abc import Callable

# Joiners belong to the spelling of some languages, and to emoji.
_JOINERS = "\u200c\u200d"
# Letters and signs by category, yet drawn as nothing.
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"


class PerCharacter(dict[int, str]):
    """A table for `str.translate` that asks `fold` once for every different character."""

    def __init__(self, fold: Callable[[str], str]) -> None:
        super().__init__()
        self._fold = fold

    def __missing__(self, code: int) -> str:
        self[code] = folded = self._fold(chr(code))
        return folded


def is_unseen(character: str) -> bool:
    """Whether it shows nothing, or changes how others are shown: controls, zero width, direction marks, surrogates."""
    if character in "\t\n\r" or character in _JOINERS:
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") or character in _BLANKS


def is_mark(character: str) -> bool:
    """Whether it is drawn onto the character before it."""
    return unicodedata.category(character) in ("Mn", "Me")


def compatible(character: str) -> str:
    """The plain letters that a full-width, mathematical or ligature character stands for (NFKC)."""
    return unicodedata.normalize("NFKC", character)
