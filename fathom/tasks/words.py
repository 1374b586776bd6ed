"""Texts as the units that are compared: words, numbers, signs; where no spaces are written, single characters.

Case, spaces, full-width forms and punctuation do not count. Signs do: `3+8` is not `3-8`.
"""

import re
from collections.abc import Sequence

from fathom.tasks.characters import PerCharacter, compatible, is_unseen

_UNIT = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|[^\s]")
_PUNCTUATION = frozenset(".,;:!?。、，；：！？\"'“”‘’`")


def units(text: str) -> list[str]:
    """In their order."""
    return [unit for unit in _UNIT.findall(text.translate(_PLAIN)) if unit not in _PUNCTUATION]


def ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """All stretches of `size` units; the whole where there are no more."""
    if len(words) <= size:
        return [tuple(words)] if words else []
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


_PLAIN = PerCharacter(lambda character: "" if is_unseen(character) else compatible(character).casefold())
