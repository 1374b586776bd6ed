"""Task "programs": problems, reading of code, comparison, and cheats that earn nothing."""

import random
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from fathom.errors import UserError
from fathom.tasks import programs
from fathom.tasks.program_families import FAMILIES, Family
from fathom.tasks.programs import Programs, read_program, same, same_text, shared_sandbox, use_sandbox
from fathom.tasks.sandbox import Calls, Limits, Outcome, Runs
from fathom.tasks.task import Problem, judge

ALL = [(level, family) for level, families in enumerate(FAMILIES, 1) for family in families]


@pytest.fixture(scope="module", autouse=True)
def _small_sandbox() -> Iterator[None]:
    use_sandbox("bubblewrap", Limits(cpu_seconds=1, wall_seconds=5.0), workers=1)
    yield
    use_sandbox()


@pytest.fixture
def task() -> Programs:
    """The task, where programs can be run."""
    try:
        shared_sandbox()
    except UserError as error:
        pytest.skip(str(error))
    return Programs()


def problem_of(family: Family, seed: int = 0) -> Problem:
    """A problem of one family."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "FAMILIES", ((family,),))
        return Programs().problem(random.Random(seed), 1)


def function_problem(body: str, inputs: list[tuple[Any, ...]], expected: list[Any]) -> Problem:
    """A problem whose hidden tests are given here."""
    return Problem("q", body, data={"function": "f", "inputs": inputs, "expected": expected})


@pytest.mark.parametrize(("level", "family"), ALL, ids=[family.__name__ for _, family in ALL])
def test_a_right_program_passes_and_a_constant_fails(task: Programs, level: int, family: Family) -> None:
    """The family's own program earns 1, bare and fenced; one that always gives the first expected value earns 0."""
    for seed in range(2):
        problem = problem_of(family, seed)
        assert task.check(problem, problem.answer) == 1
        assert task.check(problem, f"Here it is:\n```python\n{problem.answer}```\nDone.") == 1
        first = problem.data["expected"][0]
        name = problem.data["function"]
        constant = f"print({first!r})" if name is None else f"def {name}(*_): return {first!r}"
        assert task.check(problem, constant) == 0


@pytest.mark.parametrize("level", [1, 2, 3])
def test_problems_are_repeatable_and_splits_disjoint(level: int) -> None:
    """The same seed makes the same problems; both splits have many different ones, and share none."""
    task = Programs()

    def draw(split: Any, count: int) -> list[Problem]:
        stream = task.problems(split, level=level, seed=5)
        return [next(stream) for _ in range(count)]

    train, held_out = draw("train", 60), draw("held-out", 20)
    assert train == draw("train", 60)
    assert len({problem.key for problem in train}) > 40
    assert len({problem.key for problem in held_out}) > 10
    assert not {problem.key for problem in train} & {problem.key for problem in held_out}


def test_questions_do_not_hold_the_tests() -> None:
    """A question gives one example and not the list of hidden inputs or what they expect."""
    for level, families in enumerate(FAMILIES, 1):
        for seed in range(len(families) * 3):
            problem = Programs().problem(random.Random(seed), level)
            assert repr(problem.data["inputs"]) not in problem.question
            assert repr(problem.data["expected"]) not in problem.question
            assert len(problem.data["inputs"]) >= 8
            assert problem.question.count("Example:") == 1


def test_what_is_expected_never_goes_to_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check hands to the sandbox holds the program and the inputs, and nothing of the expected values."""
    recording = Scripted(Outcome((), "error", "not run"))
    monkeypatch.setattr(programs, "shared_sandbox", lambda: recording)
    problem = function_problem("", [(1,), (2,)], ["expected-one", "expected-two"])
    assert Programs().check(problem, "def f(x): return x") == 0
    script = Problem("q", data={"function": None, "inputs": [("a",)], "expected": ["expected"]})
    assert Programs().check(script, "print()") == 0
    assert recording.asked == [Calls("def f(x): return x", "f", [(1,), (2,)]), Runs("print()", ["a"])]


def test_a_failing_sandbox_is_a_fault_and_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sandbox lost the check or was closed, the verdict says so, and does not blame the program."""
    for status in ("lost", "stopped"):
        outcome = Outcome((), status, "the worker is gone")
        monkeypatch.setattr(programs, "shared_sandbox", lambda outcome=outcome: Scripted(outcome))
        verdict = judge(Programs(), function_problem("", [(1,)], [1]), "def f(x): return x")
        assert verdict.score == 0
        assert "the worker is gone" in verdict.fault


class Scripted:
    """A sandbox that gives one outcome, and remembers what it was asked."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.asked: list[Calls | Runs] = []

    def run(self, check: Calls | Runs) -> Outcome:
        """The outcome."""
        self.asked.append(check)
        return self.outcome


CHEATS = {
    "exits early": "import os\nos._exit(0)",
    "exits early in the call": "import sys\ndef f(x): sys.exit(0)",
    "equal to everything": "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "an int equal to everything": "class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "patches the comparison": (
        "import builtins, sys\nfor m in list(sys.modules.values()):\n"
        "    for n in ('same', 'check', 'write', 'read'):\n"
        "        try: setattr(m, n, lambda *a, **k: True)\n        except Exception: pass\n"
        "def f(x): return 0"
    ),
    "searches for the expected values": (
        "import gc, sys\ndef f(x):\n    for one in gc.get_objects():\n"
        "        if isinstance(one, dict) and 'expected' in one: return one['expected'][0]\n"
        "    frame = sys._getframe()\n    while frame:\n"
        "        if 'expected' in frame.f_locals: return frame.f_locals['expected']\n        frame = frame.f_back\n"
    ),
    "claims too many results": (
        'import os\nos.write(4, b\'{"dict": [["returned", ["2", "4", "6", "8"]]]}\')\nos._exit(0)'
    ),
    "says that it passed": "print('OK 3 tests passed')\ndef f(x): print('PASSED'); return True",
    "right for the first alone": "def f(x): return 2",
    "floats for ints": "def f(x): return 2.0 * x",
    "right, then hangs": "import atexit\ndef f(x):\n    if x == 3:\n        while True: pass\n    return 2 * x",
    "not code": "The answer is 2 * x.",
    "empty": "",
    "answer in another fence": "```\ndef f(x): return 2 * x\n```\n```\ndef f(x): return 0\n```",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_earn_nothing(task: Programs, name: str) -> None:
    """A program that does not compute the values earns 0 without disturbing the check, whatever else it does."""
    problem = function_problem("", [(1,), (2,), (3,)], [2, 4, 6])
    verdict = judge(task, problem, CHEATS[name])
    assert (verdict.score, verdict.fault) == (0, "")
    assert judge(task, problem, "def f(x): return x + x").score == 1


def test_scripts_are_judged_by_what_they_print_and_how_they_end(task: Programs) -> None:
    """Right output counts if the script ends with status 0, not if it fails, exits otherwise or goes on for ever."""
    problem = Problem("q", data={"function": None, "inputs": [("1\n",), ("2\n",)], "expected": ["1\n1", "2\n2"]})
    right = "n = input()\nprint(n)\nprint(n, '  ')\nprint()\n"
    assert task.check(problem, right) == 1
    assert task.check(problem, right + "raise SystemExit(0)") == 1
    assert task.check(problem, "if __name__ == '__main__':\n    n = input()\n    print(n, n, sep='\\n')") == 1
    for end in ("raise SystemExit(1)", "1 / 0", "import os\nos._exit(0)", "while True: pass", "print('more')"):
        assert task.check(problem, right + end) == 0


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1"),
        ("Text.\n\n~~~ py\nx = '''\n```\n'''\n~~~\nMore.", "x = '''\n```\n'''"),
        ("```\nx = 1\n```\nor\n```\nx = 2\n```", "x = 2"),
        ("```python\nx = 1\ny = 2", "x = 1\ny = 2"),
        ("````\n```\nx\n```\n````", "```\nx\n```"),
        ("```\n```", ""),
        ("`x = 1`", "`x = 1`"),
        ("", ""),
    ],
)
def test_code_is_read_by_one_rule(answer: str, program: str) -> None:
    """The last fence counts, to its end or that of the text; without a fence everything does."""
    assert read_program(answer) == program


SAME = [
    (1, 1), (1.0, 1), (1.0, 1.0 + 1e-12), (0.1 + 0.2, 0.3), (float("nan"), float("nan")), (float("inf"), float("inf")),
    ([1, (2.0,)], [1, (2,)]), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({1, 2}, {2, 1}), (None, None), (b"a", b"a"),
]  # fmt: skip
OTHER = [
    (1, True), (True, 1), (0, False), (1, 1.0), (1, "1"), ("1", 1), (1.0, True), (1.0, 1.001), (1.0, "1.0"),
    (1.0, 10**400), (1.0, None), (None, False), (float("nan"), 0.0), (float("inf"), float("-inf")), ([1], (1,)),
    ((1,), [1]), ([1], [1, 1]), ([], None), ({1}, frozenset({1})), ({1}, {True}), ({1: 2}, {True: 2}),
    ({"a": 1}, {"a": 1, "b": 2}), ({"a": 1}, {"a": True}), ("a", b"a"), ("a", "a "), ([[1]], [[True]]),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "given"), SAME)
def test_equal_values_are_the_same(expected: Any, given: Any) -> None:
    """What the rules call right is right."""
    assert same(expected, given)


@pytest.mark.parametrize(("expected", "given"), OTHER)
def test_values_of_another_type_are_not_the_same(expected: Any, given: Any) -> None:
    """What Python calls equal across types, or is merely near, is wrong."""
    assert not same(expected, given)


def test_printed_text_may_differ_in_trailing_space_alone() -> None:
    """Spaces at ends of lines and empty lines at the end do not count; all else does."""
    assert same_text("a\nb", "a  \nb\n\n")
    assert same_text("", "\n")
    for other in ("a b", "a\n\nb", " a\nb", "A\nb", "a\nb\nc", "a"):
        assert not same_text("a\nb", other)


def test_without_bubblewrap_the_check_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where programs cannot be contained no program is run: the first check raises what the sandbox says."""
    use_sandbox()
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    problem = function_problem("", [(1,)], [1])
    with pytest.raises(UserError, match=r"--task\.sandbox none"):
        Programs().check(problem, "def f(x): return x")


def test_the_kind_of_sandbox_can_be_set() -> None:
    """`use_sandbox("none")` runs programs without bubblewrap, warned of when it starts."""
    use_sandbox("none", Limits(), workers=1)
    with pytest.warns(UserWarning, match="unprotected"):
        assert Programs().check(function_problem("", [(1,)], [1]), "def f(x): return x") == 1
    use_sandbox("bubblewrap" if sys.platform == "linux" else "none", Limits(cpu_seconds=1), workers=1)
