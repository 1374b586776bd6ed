"""Problems with known answers out of a JSON Lines file: `path/to/file.jsonl`.

A row is an object with `question` (or `problem`) and `answer`, a text or a number, and may have `level` (from 1),
`split` (`train`, `held-out` or `test`; all rows or none) and `language` (`en` or `zh`). Of an answer in the form of
GSM8K, `reasoning #### 42`, what follows `####` counts; of one that holds a `\\boxed{…}`, what it holds.

How answers are compared depends on the right one:

- a number: the answer must be that number (`numerals`; `$…$`, `\\boxed{}`, `\\frac{}{}` are read too). A sum that
  would come to it does not count, or the question could be handed back as its answer;
- other mathematics (a digit, a backslash, or an operator in it): equal in the sense of `math-verify`, which compares
  values, not forms;
- anything else: the same words. Case, the space between them and a full stop do not count.
"""

import importlib.util
import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fathom.errors import UserError
from fathom.tasks.isolation import isolated
from fathom.tasks.numerals import read_number
from fathom.tasks.task import Problem, Split, Task

LONGEST = 1000
"""Characters of the longest answer that is read as mathematics."""

_QUESTIONS = ("question", "problem")
_SPLITS: dict[str, Split] = {"train": "train", "held-out": "held-out", "test": "held-out"}
_MATHEMATICS = re.compile(r"[0-9\\=+*/^<>]")
_FRACTION = re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
_TWO_NUMBERS = re.compile(r"[0-9]\s+[0-9]")


class JsonLines(Task):
    """The rows of one file."""

    def __init__(self, path: Path) -> None:
        """Reads the whole file. Raises `UserError` with the file, the line and what is wrong there."""
        self.name = str(path)
        self._rows: dict[int, list[Problem]] = defaultdict(list)
        for problem in _read(path):
            self._rows[problem.level].append(problem)
        self.levels = max(self._rows)

    def problem(self, random: random.Random, level: int) -> Problem:
        """One of the rows of that level."""
        if not self._rows.get(level):
            raise UserError(f"{self.name}: no row has level {level}; levels: {', '.join(map(str, sorted(self._rows)))}")
        return random.choice(self._rows[level])

    def check(self, problem: Problem, answer: str) -> float:
        """1 where `answer` is the row's; raises `isolation.Overrun` where mathematics took too long."""
        right = problem.answer
        if _plain(answer) == _plain(right):
            return 1.0
        if len(answer) > LONGEST or not _MATHEMATICS.search(right):
            return 0.0
        number = read_number(_without_latex(right))
        if number is not None:
            return float(read_number(_without_latex(answer)) == number)
        if not answer.strip() or _TWO_NUMBERS.search(answer):
            return 0.0
        return float(isolated(equal, right, answer, needs=("math_verify",)))


def equal(right: str, answer: str) -> bool:
    """Whether `math-verify` takes both, each as a whole, for the same."""
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list[Any]:
        formula = _unwrapped(text).replace("**", "^")
        return parse(f"${formula}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)

    # Time is bounded from outside: the library's own alarm would need the main thread.
    return bool(verify(read(right), read(answer), timeout_seconds=None))


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").casefold()


def _unwrapped(text: str) -> str:
    """Without the marks of a formula around it."""
    text = text.strip().removesuffix(".")
    for before, after in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}")):
        if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
            text = text[len(before) : -len(after)].strip()
    return text


def _without_latex(text: str) -> str:
    """A number as `numerals` reads it."""
    return _FRACTION.sub(r"\1/\2", _unwrapped(text)).replace("\\$", "$").replace("{,}", ",").replace("\\,", "")


def _read(path: Path) -> list[Problem]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    _require_math_verify(path)
    problems = [_problem(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not problems:
        raise UserError(f"{path}: no rows; each line is an object with 'question' and 'answer'")
    _check_splits(problems, path)
    return problems


def _require_math_verify(path: Path) -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(f"{path}: comparing answers needs the package math-verify: pip install 'fathom-lm[tasks]'")


def _problem(line: str, where: str) -> Problem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is an object with 'question' and 'answer', not {type(row).__name__}")
    question, answer = _text(row, _QUESTIONS, where), _final(_text(row, ("answer",), where))
    if not answer:
        raise UserError(f"{where}: 'answer' is empty")
    level = row.get("level", 1)
    if isinstance(level, bool) or not isinstance(level, int) or level < 1:
        raise UserError(f"{where}: 'level' = {level!r} is not a whole number of at least 1")
    language, split = row.get("language", "en"), row.get("split")
    if language not in ("en", "zh"):
        raise UserError(f"{where}: 'language' = {language!r} is not en or zh")
    if split is not None and split not in list(_SPLITS):
        raise UserError(f"{where}: 'split' = {split!r} is not one of {', '.join(_SPLITS)}")
    return Problem(question, answer, level, language=language, split=_SPLITS[split] if split else None)


def _text(row: Mapping[str, Any], keys: tuple[str, ...], where: str) -> str:
    """The value of the first of `keys` that the row has."""
    key = next((key for key in keys if key in row), None)
    if key is None:
        has = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"{where}: the row has no {' or '.join(repr(key) for key in keys)}; it has {has}")
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key!r} is {json.dumps(value)[:40]}, not a text")
    return value


def _final(answer: str) -> str:
    """What counts of an answer that was reasoned out."""
    answer = answer.rpartition("####")[2].strip()
    start = answer.rfind("\\boxed{")
    if start < 0:
        return answer
    depth, begin = 0, start + len("\\boxed{")
    for end in range(begin - 1, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[end], 0)
        if depth == 0:
            return answer[begin:end].strip()
    return answer


def _check_splits(problems: list[Problem], path: Path) -> None:
    given = {problem.split for problem in problems}
    if None in given and len(given) > 1:
        raise UserError(f"{path}: some rows have 'split' and some have none; give it to all or to none")
    held_out = {problem.question for problem in problems if problem.split == "held-out"}
    if both := next((p.question for p in problems if p.split == "train" and p.question in held_out), None):
        raise UserError(f"{path}: a question is both for training and held out: {both[:60]!r}")
