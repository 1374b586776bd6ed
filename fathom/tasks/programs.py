"""Task "programs": a small Python function or script is to be written; tests in the sandbox say whether it is right.

**What counts as the answer.** The code alone, or a text with code in Markdown fences: then the last fence, to its end
or to the end of the text where it is not closed. What stands around it is not read.

**What is right.** Every test passes, or the score is 0; there is no credit for some of them. The tests are hidden (some
corners and some drawn inputs) and never expect the same of all inputs. The sandbox gets the inputs alone; the values
that come out are compared here, and only here:

* types count: True is not 1, a tuple is not a list, a set is no frozenset, a string is not bytes;
* where a float is expected, an int of equal value passes, and so does what differs by no more than a billionth,
  relative or absolute; NaN passes for NaN; where an int is expected, no float passes;
* the order of a dictionary's keys does not count; an integer of more than 4300 digits is no value;
* of printed text, spaces at the ends of lines and empty lines at its end do not count.

A program must also end by itself within its limits: one that prints all that is right and then hangs, floods, or ends
with an exit status other than 0, fails.
"""

import atexit
import math
import os
import random
import re
import threading
from typing import Any

from fathom.tasks.program_families import FAMILIES, Arguments, Puzzle
from fathom.tasks.sandbox import Calls, Kind, Limits, Runs, Sandbox
from fathom.tasks.task import Problem, Task

_DRAWN = 8
_TRIES = 200
_FENCE = re.compile(r"[ \t]{0,3}(```+|~~~+)[^`]*")
_TOLERANCE = 1e-9
_SCRIPT_TAIL = "\nimport sys\n\nprint(answer(sys.stdin.read()))\n"


class Programs(Task):
    """Functions and scripts of a few lines, from parametrised families; the description leaves no corner open."""

    name = "programs"
    levels = len(FAMILIES)

    def problem(self, random: random.Random, level: int) -> Problem:
        """`level` 1 takes one expression, 2 a loop or a few lines, 3 a small simulation or state."""
        puzzle = random.choice(FAMILIES[level - 1])(random)
        solve = _reference(puzzle)
        example = puzzle.draw(random)
        inputs, expected = _tests(puzzle, solve, random)
        signature = puzzle.source.splitlines()[0].removeprefix("def ").removesuffix(":")
        if puzzle.is_script:
            question = (
                f"Write a Python program that reads standard input and prints to standard output. {puzzle.text}\n"
                f"Example: for the input\n{example[0].rstrip()}\nit prints\n{solve(*example)}\n"
            )
        else:
            call = f"{signature.partition('(')[0]}({', '.join(map(repr, example))})"
            question = (
                f"Write a Python function with the signature `{signature}` that {puzzle.text}.\n"
                f"Example: {call} returns {solve(*example)!r}.\n"
            )
        return Problem(
            question + "Answer with the code alone, which may use Python's standard library.",
            puzzle.source + (_SCRIPT_TAIL if puzzle.is_script else ""),
            level,
            key=f"{signature} {puzzle.text}",
            data={
                "function": None if puzzle.is_script else signature.partition("(")[0],
                "inputs": inputs,
                "expected": expected,
            },
        )

    def check(self, problem: Problem, answer: str) -> float:
        """1 if the program passes every test, else 0. Raises where the sandbox, not the program, is at fault."""
        program, function, inputs = read_program(answer), problem.data["function"], problem.data["inputs"]
        if function is None:
            check = Runs(program, [text for (text,) in inputs])
        else:
            check = Calls(program, function, inputs)
        outcome = shared_sandbox().run(check)
        if outcome.status in ("lost", "stopped"):
            raise RuntimeError(outcome.message)
        if outcome.status != "ok":
            return 0.0
        compare = same_text if function is None else same
        pairs = zip(problem.data["expected"], outcome.outputs, strict=True)
        return float(all(compare(expected, given) for expected, given in pairs))


def in_sandbox(task: Task) -> bool:
    """Whether the sandbox bounds the checks of `task`, so that they need no clock and no process of their own.

    No task is asked, or a user's check could escape both; for the same reason a class derived from `Programs` is not
    trusted with it.
    """
    return type(task) is Programs


def read_program(answer: str) -> str:
    """The code of an answer: what the last fence holds, and the whole answer where there is none."""
    code, mark = None, ""
    for line in answer.splitlines():
        fence = _FENCE.fullmatch(line)
        if code is not None and mark:
            if fence and fence[1].startswith(mark) and line.strip() == fence[1]:
                mark = ""
            else:
                code.append(line)
        elif fence:
            code, mark = [], fence[1]
    return answer if code is None else "\n".join(code)


def same(expected: Any, given: Any) -> bool:
    """Whether `given`, plain data out of the sandbox, is what is expected; the rules are on top of this file."""
    if type(expected) is float:
        return type(given) in (int, float) and _close(expected, given)
    if type(expected) is not type(given):
        return False
    if isinstance(expected, (list, tuple)):
        return len(expected) == len(given) and all(map(same, expected, given))
    if isinstance(expected, dict):
        if len(expected) != len(given):
            return False
        kept = {(type(key), key): value for key, value in given.items()}  # 1 and True are one key, but not one type
        return all((type(key), key) in kept and same(value, kept[type(key), key]) for key, value in expected.items())
    if isinstance(expected, (set, frozenset)):
        return {(type(one), one) for one in expected} == {(type(one), one) for one in given}
    return expected == given


def same_text(expected: str, given: str) -> bool:
    """Whether two printed texts are equal but for spaces at the ends of lines and empty lines at the end."""
    return _trimmed(expected) == _trimmed(given)


def _trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _close(expected: float, given: int | float) -> bool:
    try:
        number = float(given)
    except OverflowError:  # an int beyond all floats
        return False
    if math.isnan(expected):
        return math.isnan(number)
    return math.isclose(expected, number, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def _reference(puzzle: Puzzle) -> Any:
    """The puzzle's own program as a function of this process: it is our text, not a model's."""
    names: dict[str, Any] = {}
    exec(puzzle.source, names)
    return names[puzzle.source.removeprefix("def ").partition("(")[0]]


def _tests(puzzle: Puzzle, solve: Any, random: random.Random) -> tuple[list[Arguments], list[Any]]:
    """Corners and drawn inputs with what is expected; never the same for all, or one constant would pass."""
    for _ in range(_TRIES):
        inputs = [*puzzle.corners, *(puzzle.draw(random) for _ in range(_DRAWN))]
        expected = [solve(*arguments) for arguments in inputs]
        if any(not same(expected[0], other) for other in expected):
            return inputs, expected
    raise AssertionError(f"all inputs of this puzzle have the same answer: {puzzle.text}")


_lock = threading.Lock()
_sandbox: Sandbox | None = None
_settings: tuple[Kind, Limits, int | None] = ("bubblewrap", Limits(), None)


def use_sandbox(kind: Kind = "bubblewrap", limits: Limits | None = None, workers: int | None = None) -> None:
    """How programs are run from now on in this process; what was running them is closed. Nothing is started yet."""
    global _settings
    with _lock:
        _settings = (kind, limits or Limits(), workers)
        _close_sandbox()


def shared_sandbox() -> Sandbox:
    """The sandbox that all checks of this process share, started when it is first asked for, closed at exit.

    Raises `UserError` where this machine cannot have it (`Sandbox`).
    """
    global _sandbox
    with _lock:
        if _sandbox is None:
            kind, limits, workers = _settings
            _sandbox = Sandbox(limits, workers=workers, kind=kind)
        return _sandbox


def _close_sandbox() -> None:
    global _sandbox
    if _sandbox is not None:
        _sandbox.close()
        _sandbox = None


def _forget_sandbox() -> None:
    """In a forked child: the workers are the parent's, and so are their locks."""
    global _sandbox, _lock
    _sandbox, _lock = None, threading.Lock()


atexit.register(_close_sandbox)
os.register_at_fork(after_in_child=_forget_sandbox)
