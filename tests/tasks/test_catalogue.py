"""Opening tasks by name."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fathom.errors import UserError
from fathom.tasks import Task, open_task
from fathom.tasks.catalogue import BUILT_IN

MINE = """
from fathom.tasks import Problem, Task


class Reverse(Task):
    levels = 5

    def __init__(self, *, letters: int = 2):
        self.letters = letters

    def problem(self, random, level):
        word = "".join(random.choices("abcdefgh", k=self.letters + level))
        return Problem(f"Write '{word}' backwards.", answer=word[::-1], level=level)

    def check(self, problem, answer):
        return float(answer.strip() == problem.answer)


class Half(Task):
    def problem(self, random, level):
        return Problem("?")


NUMBER = 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_task_opens_under_its_name(name: str) -> None:
    """Every name of the catalogue opens a task that is called so and makes problems of every level."""
    task = open_task(name)
    assert task.called == name
    for level in range(1, task.levels + 1):
        assert task.problem(random.Random(0), level).level == level


def test_own_task_opens_from_its_file(mine: str) -> None:
    """A user's class is a task like any other, with its constructor's options."""
    task = open_task(f"{mine}:Reverse?letters=6")
    problem = next(task.problems("train", level=2))
    assert len(problem.answer) == 8
    assert task.check(problem, problem.answer) == 1
    assert isinstance(task, Task)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("", "say which class, as in {}:Reverse; tasks in it: Reverse"),
        (":", "say which class"),
        (":Revers", "no class 'Revers' (did you mean 'Reverse'?)"),
        (":NUMBER", "is not a class derived from fathom.tasks.Task"),
        (":Half", "{}:Half does not define check"),
        (":Reverse?letter=2", "unknown option 'letter' (did you mean 'letters'?)"),
        (":Reverse?letters=two", "letters = 'two': is not a whole number"),
        (":Reverse?letters=1&letters=2", "'letters' is given twice"),
    ],
)
def test_mistake_about_an_own_task_is_one_line(mine: str, after: str, said: str) -> None:
    """A class that is missing, abstract, or none, and a wrong option, are said with the file."""
    with pytest.raises(UserError) as error:
        open_task(f"{mine}{after}")
    assert said.format(mine) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\nraise ValueError('no\\nway')", "running it raised ValueError: no (line 2)"),
        (
            "x = 1\nimport nowhere_at_all",
            "running it raised ModuleNotFoundError: No module named 'nowhere_at_all' (line 2)",
        ),
        ("def f(:\n    pass", "running it raised SyntaxError: invalid syntax (line 1)"),
        ("import sys\nsys.exit(3)", "running it raised SystemExit: 3 (line 2)"),
        ("", "it has no class derived from fathom.tasks.Task"),
        (
            "from fathom.tasks import Task\nclass T(Task):\n  problem = check = None\n  def __init__(self): 1 / 0",
            ":T: making it raised ZeroDivisionError: division by zero",
        ),
    ],
)
def test_file_that_fails_is_one_line(tmp_path: Path, source: str, said: str) -> None:
    """Whatever a user's file raises is said with its place, without a traceback."""
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(UserError) as error:
        open_task(f"{tmp_path}/bad.py:T")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("aritmetic", "unknown task 'aritmetic' (did you mean 'arithmetic'?)"),
        ("", "unknown task ''"),
        ("nowhere.py:T", "nowhere.py: no such file"),
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("nowhere.jsonl?x=1", "unknown option 'x'"),
        ("modular?correction=0.1", "unknown option 'correction' (did you mean 'corrections'?)"),
        ("equations?x=1", "unknown option 'x'; it takes none"),
        ("modular?", "'' is not of the form key=value"),
    ],
)
def test_wrong_name_is_one_line(name: str, said: str) -> None:
    """A name that is no task's says which one is near, and what a name may be."""
    with pytest.raises(UserError) as error:
        open_task(name)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_level_out_of_range_is_refused() -> None:
    """Levels count from 1 to the task's last."""
    for level in (0, 13):
        with pytest.raises(UserError, match=f"level {level} is not among 1 to 12"):
            next(open_task("modular").problems("train", level=level))


def test_opening_a_built_in_task_imports_nothing_heavy() -> None:
    """The command line starts without the libraries of the adapters."""
    code = (
        "import sys; from fathom.tasks import open_task; open_task('modular');"
        "print(sorted({'torch', 'reasoning_gym', 'sympy', 'math_verify', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(("package", "name"), [("reasoning_gym", "gym:gcd"), ("math_verify", "x.jsonl")])
def test_missing_package_is_one_line_with_the_command(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the extra, an adapter says what to install."""
    (tmp_path / "x.jsonl").write_text('{"question": "a", "answer": "1"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'fathom-lm\[tasks\]'"):
        open_task(name)


def test_problems_of_a_task_are_drawn_with_its_random_alone() -> None:
    """The global generator's state does not matter."""
    draws = []
    for seed in (1, 2):
        random.seed(seed)
        draws.append([list(itertools.islice(open_task(name).problems("train"), 3)) for name in BUILT_IN])
    assert draws[0] == draws[1]
