"""Tasks that people write, with mistakes in them."""

import re
import textwrap
from pathlib import Path

import pytest

from fathom.cli import main
from fathom.errors import UserError
from fathom.tasks import Problem, Task, custom, open_task
from fathom.tasks.task import judge


def _write(tmp_path: Path, made: str, levels: str = "1") -> str:
    """A task whose problems are what the expression `made` gives; the expression is on line 6."""
    (tmp_path / "mine.py").write_text(
        "from fathom.tasks import Problem, Task\n"
        "class Mine(Task):\n"
        f"    levels = {levels}\n"
        "    def problem(self, random, level):\n"
        "        nothing = None\n"
        f"        return {made}\n"
        "    def check(self, problem, answer):\n"
        "        return answer == problem.answer\n"
    )
    return f"{tmp_path / 'mine.py'}:Mine"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("1 / 0", "its problem() raised ZeroDivisionError: division by zero (line 6); mend it"),
        ("nothing.x", "raised AttributeError: 'NoneType' object has no attribute 'x' (line 6)"),
        ("exit('of two\\nlines')", "raised SystemExit: of two (line 6)"),
        (
            "Problem()",
            "raised TypeError: Problem.__init__() missing 1 required positional argument: 'question' (line 6)",
        ),
        ("None", "its problem() gave None, which is no Problem; let it return Problem(question, answer, level)"),
        ("'What?'", "its problem() gave 'What?', which is no Problem"),
        ("(Problem('?'),)", "which is no Problem"),
        ("Problem(3)", "a problem's question is 3, which is no str (line 6)"),
        ("Problem('?', 42)", "a problem's answer is 42, which is no str (line 6)"),
        ("Problem('?', None)", "a problem's answer is None, which is no str (line 6)"),
        ("Problem('?', level='2')", "a problem's level is '2', which is no int (line 6)"),
        ("Problem('?', level=True)", "a problem's level is True, which is no int"),
        ("Problem('?', level=0)", "a problem's level is 0; levels count from 1 (line 6)"),
        ("Problem('?', key=(1, 2))", "a problem's key is (1, 2), which is no str"),
        ("Problem('?', language='fr')", "a problem's language is 'fr', not one of ('en', 'zh') (line 6)"),
        ("Problem('?', language=['en'])", "a problem's language is ['en'], not one of"),
        ("Problem('?', split='test')", "a problem's split is 'test', not one of ('train', 'held-out', None)"),
        ("Problem('?', data=[1])", "a problem's data is [1], which is no mapping"),
    ],
)
def test_a_faulty_problem_is_one_line(tmp_path: Path, made: str, said: str) -> None:
    """Whatever a user's `problem` raises or gives is said with the task, what is wrong, and where."""
    with pytest.raises(UserError) as error:
        next(open_task(_write(tmp_path, made)).problems("train"))
    assert str(error.value).startswith("task Mine: its problem() ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("levels", ["'3'", "0", "-1", "None", "2.0", "True"])
def test_levels_are_a_number(tmp_path: Path, levels: str) -> None:
    """A task whose levels are none is refused when it is opened, before anything counts with them."""
    with pytest.raises(UserError, match=rf"task Mine: levels = {levels}; give it a whole number of at least 1"):
        open_task(_write(tmp_path, "Problem('?')", levels))


def test_the_example_is_a_task(tmp_path: Path) -> None:
    """What the documentation of such files shows opens, and takes its own answers."""
    shown = re.findall(r"^(?: {4}.*)?\n", custom.__doc__ or "", re.MULTILINE)
    (tmp_path / "mine.py").write_text(textwrap.dedent("".join(shown)))
    task = open_task(f"{tmp_path / 'mine.py'}:Reverse")
    problem = next(task.problems("train", level=5))
    assert judge(task, problem, f"{problem.answer}\n").score == 1
    assert judge(task, problem, problem.question).score == 0


def test_levels_are_refused_of_a_task_that_no_file_holds() -> None:
    """Asking for problems finds it out too."""

    class Mine(Task):
        levels = "3"

        def problem(self, random, level):
            return Problem("?")

        def check(self, problem, answer):
            return 0.0

    with pytest.raises(UserError, match="levels = '3'"):
        Mine().problems("train")


def test_the_line_is_said_of_a_file_named_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A relative path, as people type it, loses nothing; the command ends with exit code 2."""
    _write(tmp_path, "1 / 0")
    monkeypatch.chdir(tmp_path)
    assert main(["tasks", "show", "mine.py:Mine"]) == 2
    assert capsys.readouterr() == (
        "",
        "fathom: task Mine: its problem() raised ZeroDivisionError: division by zero (line 6); mend it\n",
    )
