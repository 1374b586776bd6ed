"""Problems with known answers out of a JSON Lines file: `path/to/file.jsonl`.

A row is an object with `question` (or `problem`) and `answer`, a text or a number, and may have `level` (from 1),
`split` (`train`, `held-out` or `test`; all rows or none) and `language` (`en` or `zh`). Questions that differ in case
or space alone are one; one that is held out is not for training with other punctuation either. Of an answer in the form
of GSM8K, `reasoning #### 42`, what follows `####` counts; of one that holds a `\\boxed{…}`, what it holds.

How answers are compared depends on the right one (`equality`): a number is compared as a number, a formula by value,
a number with a unit as both, anything else as words.
"""

import functools
import importlib.util
import json
import math
import random
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from fathom.errors import UserError, nearest
from fathom.tasks.equality import equal
from fathom.tasks.task import Problem, Split, Task

_QUESTIONS = ("question", "problem")
_NEARLY = 0.65
_SPLITS: dict[str, Split] = {"train": "train", "held-out": "held-out", "test": "held-out"}


class JsonLines(Task):
    """The rows of one file."""

    def __init__(self, path: Path) -> None:
        """Reads the whole file. Raises `UserError` with the file, the line and what is wrong there."""
        self.name = str(path)
        self._rows: dict[int, list[Problem]] = defaultdict(list)
        problems = _read(path)
        self.hold_out(problem.question for problem in problems if problem.held_out)
        for problem in problems:
            self._rows[problem.level].append(problem)
        self.levels = max(self._rows)

    def problem(self, random: random.Random, level: int) -> Problem:
        """One of the rows of that level."""
        if not self._rows.get(level):
            raise UserError(f"{self.name}: no row has level {level}; levels: {', '.join(map(str, sorted(self._rows)))}")
        return random.choice(self._rows[level])

    def check(self, problem: Problem, answer: str) -> float:
        """1 where `answer` is the row's; raises `isolation.Overrun` where mathematics took too long."""
        return float(equal(problem.answer, answer))


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
    problems = {n: _problem(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()}
    if not problems:
        raise UserError(f"{path}: no rows; each line is an object with 'question' and 'answer'")
    _check_splits(problems, path)
    return list(problems.values())


def _require_math_verify(path: Path) -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(f"{path}: comparing answers needs the package math-verify: pip install 'fathom-lm[tasks]'")


def _problem(line: str, where: str) -> Problem:
    try:
        row = json.loads(line, parse_constant=_refuse)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UserError(
            f"{where}: {half} is half a character and no text; write both halves, or the character"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} (character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is an object with 'question' and 'answer', not {type(row).__name__}")
    _check_keys(row, where)
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
    key = " ".join(question.split()).casefold()
    return Problem(question, answer, level, key, language, split=_SPLITS[split] if split else None)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _text(row: Mapping[str, Any], keys: tuple[str, ...], where: str) -> str:
    """The value of the first of `keys` that the row has."""
    key = next((key for key in keys if key in row), None)
    if key is None:
        has = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"{where}: the row has no {' or '.join(repr(key) for key in keys)}; it has {has}")
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {key!r} is larger than any number that a computer keeps; write it as a text")
        return str(value)
    if value == "":
        raise UserError(f"{where}: {key!r} is empty")
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


def _check_splits(problems: Mapping[int, Problem], path: Path) -> None:
    """Raises `UserError` where rows, by their number, do not go together."""
    given = {problem.split for problem in problems.values()}
    if None in given and len(given) > 1:
        raise UserError(f"{path}: some rows have 'split' and some have none; give it to all or to none")
    answers: dict[str, str] = {}
    for problem in problems.values():
        if answers.setdefault(problem.key, problem.answer) != problem.answer:
            raise UserError(f"{path}: a question has two different answers; leave one out: {problem.question[:60]!r}")
    held_out = {one.key: number for number, one in problems.items() if one.split == "held-out"}
    for number, problem in problems.items():
        if problem.split == "train" and (other := held_out.get(problem.key)) is not None:
            raise UserError(
                f"{path}: a question is both for training and held out: {problems[other].question[:60]!r} (rows "
                f"{number} and {other}); leave one out"
            )


@functools.lru_cache
def _meant(key: str, missing: tuple[str, ...]) -> str:
    return nearest(key.casefold(), missing, cutoff=_NEARLY)


def _check_keys(row: Mapping[str, Any], where: str) -> None:
    """Raises `UserError` for what is nearly a key that may be left out, and would be."""
    missing = tuple(key for key in ("level", "split", "language") if key not in row)
    for key in row:
        if meant := _meant(key, missing):
            raise UserError(f"{where}: {key!a} is not read{meant}; spell it so, or name it otherwise")
