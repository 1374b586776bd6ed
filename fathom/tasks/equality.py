"""Whether an answer says the same as the right one, where nothing but the right one is known.

How they are compared depends on what the right one is; the first of these that fits:

- **A number** (`numerals`, and `\\frac{1}{2}`, `2\\frac{1}{2}`): the answer must be that number; a variable may stand
  before it, as in `x = 42`. A sum that would come to it does not count, or the question could be handed back.
- **A formula**, from its first character to its last: equal in value by `math-verify`. Integrals, sums and limits are
  none, for the same reason. What a formula is made of, and how it is compared, is told in `formulas`.
- **A number with a unit** (`5 km`, `50%`, `45^\\circ`): the number as a number, what follows it as words. The bare
  number is not enough, and `mW` is not `MW`.
- **Anything else**: the same words.

Words are the same whatever their case, the space between them and a full stop at their end; `$…$`, `\\boxed{}` and
`\\text{}` around them do not count. Two currencies are never the same; one that is named on one side alone does not
count.

Names, dates and ranges are words: `H2O`, `A1`, `2024-01-05`, `1945-1950`, `555-1234`, `1011_2`.
"""

import re
import unicodedata
from fractions import Fraction

from fathom.tasks.formulas import LONGEST, read_exact, read_formula, same_formula
from fathom.tasks.isolation import isolated

_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}"))
_TEXT = re.compile(r"(?<!\\)\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox) ?\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!])(?=[0-9]{3}(?![0-9]))")
_SPACE = re.compile(r"(?<!\\)\\[,;:! ]|\\q?quad(?![A-Za-z])|~")
_DEGREE = re.compile(r" ?\^ ?(?:\{ ?\\circ ?\}|\\circ)|\\degree|(?<=[0-9]) degrees?(?![A-Za-z ])")
_DASH = re.compile(r"[–−](?=[0-9.])")
_COLON = re.compile(r"(?<=[0-9]) ?: ?(?=[0-9])")
_MONEY = re.compile(r"[$€£¥]")
_PREFIXED = re.compile(r"[mM][A-Z][a-z]?")
"""Units that begin with milli or mega, which case alone tells apart."""
_NAMED = re.compile(r"^[A-Za-z] ?= ?")
_FORMULA = re.compile(r"[0-9\\=+*/^<>≤≥×√π]")
_BRACES = re.compile(r"([_^])\{(\w+)\}")
_QUANTITY = re.compile(
    r"([$€£¥]?)([-+]?[0-9][0-9.,]*(?: ?/ ?[0-9]+)?|[-+]?[0-9]*\\[dt]?frac\{[0-9]+\}\{[0-9]+\}) ?"
    r"([^\W\d_].*|[%°′″'\"].*)"
)


def equal(right: str, answer: str) -> bool:
    """Whether `answer` says what `right` does. Raises `isolation.Overrun` where mathematics takes too long."""
    if len(answer) > len(right) + LONGEST:
        return False
    right, answer = _bare(right), _bare(answer)
    if len(_money(right) | _money(answer)) > 1:
        return False
    if (number := read_exact(right)) is not None:
        return read_exact(_NAMED.sub("", answer, count=1)) == number
    if _FORMULA.search(right) and read_formula(right) is not None:
        if right == answer:
            return True
        verdict = read_formula(answer) is not None and isolated(same_formula, right, answer, needs=("math_verify",))
        if verdict is not None:
            return verdict
    if (quantity := _quantity(right)) is not None:
        return _quantity(answer) == quantity
    return _BRACES.sub(r"\1\2", answer).casefold() == _BRACES.sub(r"\1\2", right).casefold()


def _bare(text: str) -> str:
    """Without the marks of a formula around it, those of text and space within it, and a full stop."""
    text = _DASH.sub("-", unicodedata.normalize("NFC", text)).strip().removesuffix(".").rstrip()
    for before, after in _WRAPPERS:
        if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
            text = text[len(before) : -len(after)]
    text = _SPACE.sub(" ", _THOUSANDS.sub(",", _TEXT.sub(r"\1", text)))
    text = _COLON.sub(":", _DEGREE.sub("°", text)).replace("\\%", "%").replace("\\$", "$")
    return " ".join(text.split()).removesuffix(".").rstrip()


def _quantity(text: str) -> tuple[str, Fraction, str] | None:
    """A currency or nothing, a number, and what it is a number of."""
    found = _QUANTITY.fullmatch(text)
    number = read_exact(found[2]) if found else None
    if number is None:
        return None
    unit = found[3]
    return found[1], number, unit if _PREFIXED.fullmatch(unit) else unit.casefold()


def _money(text: str) -> set[str]:
    """The currencies that it names by a sign."""
    return set(_MONEY.findall(text))
