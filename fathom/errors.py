"""The one exception that a person, not a programmer, is meant to read; and the exit code of what a person stopped."""

import difflib
from collections.abc import Iterable, Mapping

INTERRUPTED = 130
"""Exit code, as a shell's, of a command that a person stopped: what `&&` joins to it does not begin."""


class UserError(Exception):
    """A wrong input: one line that says what, where and what to do. The CLI prints it and exits with 2."""


def nearest(word: str, known: Iterable[str], *, shown: Mapping[str, str] | None = None, cutoff: float = 0.5) -> str:
    """`" (did you mean 'x'?)"` for the closest known word, or an empty string when none is close.

    `shown` says how a known word is written out (a field's name with its section); `cutoff`, from 0 to 1, how alike
    words must be. Where many words come from elsewhere and are no misspellings, a low one guesses wildly.
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean '{(shown or {}).get(match[0], match[0])}'?)" if match else ""
