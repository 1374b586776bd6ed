"""What is measured with is not learnt, in reinforcement learning with any task."""

from pathlib import Path

import pytest

import fathom.train.rl as module
from fathom.config.rl import RLRecipe
from fathom.tasks.catalogue import open_task
from fathom.tasks.task import Problem
from fathom.train.rollout import draw_problems, held_out_problems
from tests.train.test_rl import changed, recipe, run, start

__all__ = ["recipe", "start"]

TASK = '''
from fathom.tasks import Problem, Task


class Twice(Task):
    """Two hundred questions, each in many problems, some of them for training and others held out."""

    def problem(self, random, level):
        return Problem(f"{random.randrange(200)}?", key=str(random.random()))

    def check(self, problem, answer):
        return float(len(answer.encode()) % 2)
'''


def test_a_question_that_is_measured_is_not_learnt(
    recipe: RLRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task whose keys tell problems of one question apart has it on both sides: training draws others then."""
    (tmp_path / "task.py").write_text(TASK)
    task, learnt = open_task(f"{tmp_path / 'task.py'}:Twice"), []
    measured = {problem.question for problem in held_out_problems(task, 1, 64, seed=recipe.seed)}
    assert measured & {problem.question for problem in draw_problems(task, "train", 1, 12, seed=1)}

    def noted(*arguments: object, **options: object) -> list[Problem]:
        learnt.extend(found := draw_problems(*arguments, **options))
        return found

    monkeypatch.setattr(module, "draw_problems", noted)
    sections = {
        "task": {"name": f"{tmp_path / 'task.py'}:Twice", "levels": 1},
        "rollout": {"problems": 12},
        "train": {"steps": 1},
        "eval": {"problems": 64},
    }
    run(changed(recipe, sections), tmp_path / "runs")
    assert len(learnt) == 12
    assert not measured & {problem.question for problem in learnt}
