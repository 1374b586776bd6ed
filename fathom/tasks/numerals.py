"""Reads one number out of an answer, as a strict but fair reader would.

Read as a number: `42`, `-7`, `+7`, `007`, `3.50`, `.5`, `1,234` (groups of three), `3/4`, `1.5e3` (an exponent of at
most two digits), a full stop after it, `$` `€` `£` `¥` before it, and where the caller names them a letter with an
equals sign before it (`x = 42`) and a unit after it (`42 apples`).

Not read: two numbers (`41 or 42`), words, per cent, sums still to be worked out, `nan`, `inf`, anything longer than
`LONGEST` characters. Digits are ASCII or full-width, which Chinese keyboards write (`４２`); those of other scripts,
superscripts and mathematical alphabets are refused: nothing in an honest answer asks for them.
"""

import re
from collections.abc import Collection
from fractions import Fraction

LONGEST = 200
"""Characters of the longest text that is read."""

_PLAIN = str.maketrans("０１２３４５６７８９＋－−．，／＝＄￥。", "0123456789+--.,/=$¥.")
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"(?P<before>[-+]?)[$€£¥]?(?P<sign>[-+]?)(?P<value>{_DECIMAL})"
    rf"(?:[eE](?P<exponent>[-+]?[0-9]{{1,2}})| ?/ ?(?P<divisor>{_WHOLE}))?"
)


def read_number(text: str, *, name: str = "", units: Collection[str] = ()) -> Fraction | None:
    """The one number that `text` says, exactly; None where it does not say one.

    `name` may stand before it with an equals sign, one of `units` after it; in both, case does not count.
    """
    if len(text) > LONGEST:
        return None
    text = text.translate(_PLAIN).strip().removesuffix(".").rstrip()
    left, equals, right = text.partition("=")
    if equals and name and left.strip().lower() == name.lower():
        text = right.strip()
    found = _NUMBER.match(text)
    if found is None or (found["before"] and found["sign"]):
        return None
    rest = text[found.end() :].strip().lower()
    if rest and rest not in {unit.lower() for unit in units}:
        return None
    return _value(found)


def write_number(number: Fraction) -> str:
    """As `read_number` reads it: `7`, `-7`, `3/4`."""
    return str(number)


def _value(found: re.Match[str]) -> Fraction | None:
    value = Fraction(found["value"].replace(",", ""))
    if found["divisor"]:
        divisor = int(found["divisor"].replace(",", ""))
        if divisor == 0:
            return None
        value /= divisor
    if found["exponent"]:
        value *= Fraction(10) ** int(found["exponent"])
    return -value if "-" in (found["before"], found["sign"]) else value
