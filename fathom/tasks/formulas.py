"""Mathematics as answers are written, in LaTeX or plainly: what is wholly a formula, and whether two are equal.

`math-verify` knows when two formulas are equal. But it was made to find some mathematics in a long text, and passes
over what it does not understand: units, the base of a number, brackets around a list, all but the last of several
equations. So texts come to it in three steps, and what fails at one of them equals nothing:

- **Words.** A formula is made of numbers, variables, operators, brackets, the functions of `_FUNCTIONS` and the LaTeX
  of `_COMMANDS`, and nothing else. A variable is one letter, and case counts. Letters that touch are variables where
  all are of one piece of the alphabet (`xyz`, `ab`), or where they are two and the text has a `+`, `^`, `=` or
  backslash: `mc^2`, but not `5 km`, `3 pm`, `days`. No number follows a letter (`H2O`, `A1`) or another number.
- **Lists.** Tuples, intervals, sets, matrices, unions and lists without brackets are compared part by part, and their
  brackets must be the same. Order counts but in sets, in unions, and where every part has a name. A name may be left
  out: `x = 3` and `3` are equal, `x = 3` and `y = 3` are not.
- **Values.** Where the right one is a number, the other must be that number. Other formulas are equal where the library
  says so of the whole of each, and only if they also agree to a millionth of their size, for it rounds to six places
  after the point. Numbers with nothing but `-` and `/` between them are no formula but a date, a range or a score.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fathom.tasks import numerals

LONGEST = 1000
"""Characters of the longest text that is read."""

_DEEPEST = 20
_TOLERANCE = 1e-6
_FUNCTIONS = re.compile("arccos|arcsin|arctan|cosh?|cot|csc|exp|ln|log|pi|sec|sinh?|sqrt|tanh?")
_GREEK = (
    "alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|theta|lambda|mu|nu|xi|rho|sigma|tau|(?:var)?phi|chi|psi|omega|"
    "Delta|Theta|Lambda|Sigma|Phi|Psi|Omega"
)
_COMMANDS = re.compile(rf"\\(?:{_FUNCTIONS.pattern}|{_GREEK}|begin|end|cdot|cup|frac|ge|in|infty|le|ne|pm|times)")
_SPELLINGS = {
    **dict.fromkeys(("\\dfrac", "\\tfrac"), "\\frac"),
    **dict.fromkeys(("\\geq", ">="), "\\ge"),
    **dict.fromkeys(("\\leq", "<="), "\\le"),
    **dict.fromkeys(("\\neq", "!="), "\\ne"),
    **dict.fromkeys(("\\left", "\\right"), ""),
    **{f"\\{end}{{{matrix}}}": f"\\{end}" for end in ("begin", "end") for matrix in ("pmatrix", "bmatrix")},
    "\\lt": "<",
    "\\gt": ">",
    "\\div": "/",
    "**": "^",
}
_SIGNS = dict(
    zip("·×±√≤≥≠πθ∞∪", ("cdot", "times", "pm", "sqrt", "le", "ge", "ne", "pi", "theta", "infty", "cup"), strict=True)
)
_PLAIN = str.maketrans(
    {chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)}  # full width, as Chinese keyboards write
    | {sign: f"\\{name} " for sign, name in _SIGNS.items()}
    | {"−": "-", "÷": "/"}
)
_PIECE = re.compile(
    r"\\(?:begin|end)\{[bp]matrix\}|\\[A-Za-z]+|\\[\\{}]|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[A-Za-z]+|\*\*|[<>!]=|"
    r"[-+*/^_=<>!|&,;()\[\]{}]"
)
_ALPHABETS = ("abcd", "pqrs", "uvw", "xyz")
_OPERATED = re.compile(r"[+^=\\]")
_ROOT_SIGN = re.compile(r"√ ?([0-9.]+|[A-Za-z])")
_SHORT_ROOT = re.compile(r"(\\sqrt) ?([0-9A-Za-z])")
_SHORT_FRACTION = re.compile(r"(\\[dt]?frac) ?([0-9]) ?([0-9])")
_FRACTION = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>[0-9]*) ?\\[dt]?frac ?(?:\{ ?(-?[0-9]+) ?\} ?\{ ?([0-9]+) ?\}|([0-9]) ?([0-9]))"
)
_OPENING, _CLOSING = frozenset(("(", "[", "{", "\\{", "\\begin")), frozenset((")", "]", "}", "\\}", "\\end"))
_SEPARATORS = (frozenset(("&", "\\\\")), frozenset((",", ";")), frozenset(("\\cup",)))
_RELATIONS = frozenset(("=", "<", ">", "\\le", "\\ge", "\\ne", "\\in"))
_OF_ROWS = frozenset(("\\in", "\\{", "\\}", "\\begin", "\\end")).union(*_SEPARATORS)
_BEFORE_A_BRACE = frozenset(("\\frac", "\\sqrt", "^", "_", "}", "]"))
_NAME = re.compile(
    rf"(?:[A-Za-z]|\\(?:{_GREEK}))(?: _ (?:\w+|\{{ \w+ \}}))?(?: \( [A-Za-z] \))?|\( [A-Za-z](?: , [A-Za-z])+ \)"
)
_NO_VALUE = re.compile(
    r"(?:^|(?<= ))[A-Za-z] [0-9.]|"  # A1, 1e5
    r"(?<!_ )(?<![0-9.])[0-9.]+ [0-9.]|"  # 1 2, 1.2.3
    r"[0-9.)}\]|] _|"  # 1011_2
    r"_ (?:[0-9]+|\{ [0-9]+ \}) [A-Z]|"  # H_2O
    r"[0-9] [eE] [-+] [0-9]|"
    r"^[0-9./ -]*$"  # 2024-01-05, 1945-1950
)


@dataclass(frozen=True)
class Row:
    """A tuple, interval, set, matrix, union or list without brackets; or one value with its name."""

    kind: str
    """Its brackets; or the name and what stands between it and the value."""
    between: tuple[str, ...]
    """What separates the parts."""
    parts: tuple["Formula", ...]

    @property
    def is_named(self) -> bool:
        return self.kind.endswith(("=", "\\in"))

    @property
    def is_unordered(self) -> bool:
        if self.kind:
            return self.kind == "\\{ \\}"
        return set(self.between) == {"\\cup"} or all(isinstance(part, Row) and part.is_named for part in self.parts)


Formula = Row | str
"""A row; or the words of one that is none, with spaces between them."""


class _NoFormulaError(Exception):
    """The text is none, or not wholly."""


def read_formula(text: str) -> Formula | None:
    """The formula that the whole of `text` is; None where it is none."""
    try:
        return _formula(_words(text))
    except _NoFormulaError:
        return None


def same_formula(right: str, answer: str) -> bool | None:
    """Whether two texts that are formulas are equal; None where the library cannot read the right one.

    May take for ever, or all memory: it is to be called through `isolation`.
    """
    formula, given = read_formula(right), read_formula(answer)
    assert formula is not None, right
    assert given is not None, answer
    if any(_parsed(leaf) is None for leaf in _leaves(formula)):
        return None
    return _same(formula, given)


def read_exact(text: str) -> Fraction | None:
    """The number that the whole of `text` is: as `numerals` reads it, or with a `\\frac`, a mixed one too."""
    found = _FRACTION.fullmatch(text)
    if found is None or len(text) > numerals.LONGEST:
        return numerals.read_number(text)
    over, under = (int(digits) for digits in found.groups()[2:] if digits)
    if under == 0 or (found["whole"] and over < 0):
        return None
    value = int(found["whole"] or 0) + Fraction(over, under)
    return -value if found["sign"] == "-" else value


def _words(text: str) -> tuple[str, ...]:
    """The words of a formula, each in one spelling."""
    text = _ROOT_SIGN.sub(r"\\sqrt{\1}", text).translate(_PLAIN)
    text = _SHORT_ROOT.sub(r"\1{\2}", _SHORT_FRACTION.sub(r"\1{\2}{\3}", text))
    pieces = _PIECE.findall(text)
    if len(text) > LONGEST or "".join(pieces) != "".join(text.split()):
        raise _NoFormulaError
    may_touch = 2 if _OPERATED.search(text) else 1
    words = tuple(word for piece in pieces for word in _spelt(piece, may_touch))
    depths = list(itertools.accumulate((word in _OPENING) - (word in _CLOSING) for word in words))
    if not words or min(depths) < 0 or max(depths) > _DEEPEST or depths[-1] != 0:
        raise _NoFormulaError
    return words


def _spelt(piece: str, may_touch: int) -> Sequence[str]:
    """Letters that touch are several words, marks of layout none."""
    if _FUNCTIONS.fullmatch(piece):
        return [f"\\{piece}"]
    if piece.isalpha():
        if len(piece) > may_touch and not any(set(piece) <= set(alphabet) for alphabet in _ALPHABETS):
            raise _NoFormulaError
        return piece
    word = _SPELLINGS.get(piece, piece)
    if word[1:].isalpha() and not _COMMANDS.fullmatch(word):
        raise _NoFormulaError
    return [word] if word else []


def _formula(words: tuple[str, ...]) -> Formula:
    brackets, inner = _opened(words)
    for separators in _SEPARATORS:
        between, parts = _split(inner, separators)
        if between:
            return Row(brackets, between, tuple(map(_formula, parts)))
    if brackets == "( )":
        return _formula(inner)
    if brackets:
        return Row(brackets, (), (_formula(inner),))
    return _named(words) or _single(words)


def _opened(words: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The brackets around all of it, and what they hold."""
    if not words or words[0] not in _OPENING or _partner(words, 0) != len(words) - 1:
        return "", words
    kind = " ".join((words[0], words[-1]))
    return ("\\{ \\}" if kind == "{ }" else kind), words[1:-1]


def _partner(words: Sequence[str], place: int) -> int:
    """Where the bracket at `place` is closed."""
    depth = 0
    for end in range(place, len(words)):
        depth += (words[end] in _OPENING) - (words[end] in _CLOSING)
        if depth == 0:
            return end
    raise AssertionError(f"not balanced: {words}")


def _split(words: tuple[str, ...], separators: frozenset[str]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The separators that stand outside brackets, and what they separate."""
    between, parts, depth, begin = [], [], 0, 0
    for place, word in enumerate(words):
        depth += (word in _OPENING) - (word in _CLOSING)
        if depth == 0 and word in separators:
            between.append(word)
            parts.append(words[begin:place])
            begin = place + 1
    return tuple(between), [*parts, words[begin:]]


def _named(words: tuple[str, ...]) -> Row | None:
    """A value and its name, `x = 3` or `x \\in (1, 2)`."""
    for place, word in enumerate(words):
        if word in ("=", "\\in"):
            name, value = " ".join(words[:place]), words[place + 1 :]
            if _NAME.fullmatch(name) and not _RELATIONS.intersection(value):
                return Row(f"{name} {word}", (), (_formula(value),))
            return None
    return None


def _single(words: tuple[str, ...]) -> str:
    text, relations = " ".join(words), [word for word in words if word in _RELATIONS]
    number = read_exact(text.replace(" ", ""))
    if not words or _OF_ROWS.intersection(words) or ("=" in relations and len(relations) > 1):
        raise _NoFormulaError
    if number is None and _NO_VALUE.search(text):
        raise _NoFormulaError
    if any(word == "{" and before not in _BEFORE_A_BRACE for before, word in itertools.pairwise(("", *words))):
        raise _NoFormulaError
    return text


def _leaves(formula: Formula) -> Iterator[str]:
    if isinstance(formula, str):
        yield formula
    else:
        for part in formula.parts:
            yield from _leaves(part)


def _same(right: Formula, answer: Formula) -> bool:
    if isinstance(right, str) and isinstance(answer, str):
        return _same_value(right, answer)
    if isinstance(right, Row) and isinstance(answer, Row) and _shape(right) == _shape(answer):
        if right.is_unordered and answer.is_unordered:
            return _same_in_any_order(right, answer)
        return all(map(_same, right.parts, answer.parts))
    if _is_named(right) != _is_named(answer):
        return _same(_unnamed(right), _unnamed(answer))
    return False


def _same_in_any_order(right: Row, answer: Row) -> bool:
    left = list(answer.parts)
    for part in right.parts:
        found = next((other for other in left if _same(part, other)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _shape(row: Row) -> tuple[str, tuple[str, ...]]:
    return row.kind, row.between


def _is_named(formula: Formula) -> bool:
    return isinstance(formula, Row) and formula.is_named


def _unnamed(formula: Formula) -> Formula:
    return formula.parts[0] if isinstance(formula, Row) and formula.is_named else formula


def _same_value(right: str, answer: str) -> bool:
    from math_verify import verify

    number = read_exact(right.replace(" ", ""))
    if number is not None:
        return read_exact(answer.replace(" ", "")) == number
    if _RELATIONS.isdisjoint(right.split()) != _RELATIONS.isdisjoint(answer.split()):
        return False  # of an equation the library would take the right side
    expected, given = _parsed(right), _parsed(answer)
    # Time is bounded from outside: the library's own alarm would need the main thread.
    return given is not None and verify(expected, given, timeout_seconds=None) and _agree(expected, given)


@functools.lru_cache
def _parsed(words: str) -> Any:
    """What the library reads; None where it cannot."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    config = ConversionConfig(lowercase_symbols=False)
    try:
        return latex2sympy(_latex(words), is_real=True, normalization_config=None, conversion_config=config)
    except Exception:  # it raises whatever comes up
        return None


def _latex(words: str) -> str:
    """In the library's dialect, where spaces keep it from joining what we have told apart."""
    out = words.split(" ")
    for place, word in enumerate(out[:-1]):
        if word in ("^", "\\sqrt") and out[place + 1] == "(":
            end = _partner(out, place + 1)
            if out[end] == ")":
                out[place + 1], out[end] = "{", "}"
        elif word == "^" and out[place + 1] == "-" and place + 2 < len(out):
            out[place + 1 : place + 3] = ["{ -", f"{out[place + 2]} }}"]
    # `d` before a letter would be a differential and `I` the imaginary unit: give both a name nobody uses.
    text = " ".join({"d": "\\iota", "I": "\\Upsilon"}.get(word, word) for word in out)
    # A number before a number in brackets would be a mixed one.
    text = re.sub(r"\) (?=[0-9.(]|\\frac)", r") \\cdot ", text)
    return re.sub(r"(?<![_^] )(?<![0-9.])([0-9.]+) \(", r"\1 \\cdot (", text)


def _agree(right: Any, answer: Any) -> bool:
    """Where the library is content with less than equality: of what is small, and of equations without solution."""
    import sympy

    if isinstance(right, sympy.Eq) and isinstance(answer, sympy.Eq):
        ratio = sympy.simplify((right.lhs - right.rhs) / (answer.lhs - answer.rhs))
        return bool(ratio.is_number or sympy.solve(right))
    if not (isinstance(right, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return True
    names = sorted({symbol.name for symbol in right.free_symbols | answer.free_symbols})
    point = {name: sympy.Rational(137 + 31 * place, 100) for place, name in enumerate(names)}
    one, other = (
        sympy.N(value.subs({symbol: point[symbol.name] for symbol in value.free_symbols}), 30)
        for value in (right, answer)
    )
    difference, size = abs(one - other), abs(one)
    if difference.is_comparable and size.is_comparable:
        return bool(difference <= _TOLERANCE * size)
    return True  # infinite, or a function that is not known
