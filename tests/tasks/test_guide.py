"""What the guide to reinforcement learning shows is as it says."""

import random
import re
from pathlib import Path

import pytest

from fathom.tasks.catalogue import open_task
from fathom.tasks.task import judge

GUIDE = Path(__file__).parents[2] / "docs/guides/reinforcement.md"


def block(start: str) -> str:
    """The code block of the guide that begins with `start`."""
    found = re.search(rf"```\w*\n({re.escape(start)}.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert found, start
    return found[1]


def test_own_task_of_the_guide_takes_its_own_answers_and_no_others(tmp_path: Path) -> None:
    """The class shown opens, and at every level its answers are right and the next digit is wrong."""
    file = tmp_path / "mine.py"
    file.write_text(block("# mine.py"), encoding="utf-8")
    task = open_task(f"{file}:Sums")
    for level in range(1, task.levels + 1):
        problem = next(task.problems("held-out", level=level))
        assert eval(problem.question.removesuffix("=")) % 10 == int(problem.answer)
        assert judge(task, problem, f" {problem.answer}\n").score == 1
        assert judge(task, problem, str((int(problem.answer) + 1) % 10)).score == 0


def test_rows_of_the_guide_are_a_task(tmp_path: Path) -> None:
    """The lines shown are read, and their answers are right in another form too."""
    pytest.importorskip("math_verify")
    file = tmp_path / "problems.jsonl"
    file.write_text(block('{"question"'), encoding="utf-8")
    task = open_task(str(file))
    assert task.levels == 2
    for level, answer in ((1, "\\frac{7}{8}"), (2, "lima")):
        problem = task.problem(random.Random(0), level)
        assert judge(task, problem, answer).score == 1
