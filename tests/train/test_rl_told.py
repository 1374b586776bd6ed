"""What a run of reinforcement learning measures, says and keeps, whatever its rewards are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fathom.train.rl as module
from fathom.config.rl import RLRecipe
from fathom.train import rl_evaluate
from fathom.train.state import read_checkpoint
from tests.train import test_rl
from tests.train.test_rl import changed, lines, run, stop_after

recipe, start = test_rl.recipe, test_rl.start  # fixtures, of this file too

RULES = """
from fathom.tasks import Problem, Task


class Hopeless(Task):
    levels = 2

    def problem(self, random, level):
        return Problem(f"{random.randrange(10**6)}:{level}", level=level)

    def check(self, problem, answer):
        return 0.0


class Long(Hopeless):
    def problem(self, random, level):
        return Problem("7" * random.choice((9, 99)) + str(random.randrange(10**6)), level=level)
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    file = tmp_path / "rules.py"
    file.write_text(RULES)
    return file


@pytest.mark.parametrize("resample", [0, 1])
def test_equal_rewards_teach_nothing_and_are_measured_all_the_same(
    recipe: RLRecipe, rules: Path, resample: int, tmp_path: Path
) -> None:
    """Where every group's rewards are equal, weights stay as they are, nothing is divided by zero, it is said, and
    every step still has its entropy and the engine's gap."""
    task = {"name": f"{rules}:Hopeless", "levels": 2}
    result, said = run(changed(recipe, {"task": task, "rollout": {"resample": resample}}), tmp_path / "runs")
    assert "all rewards of every group are equal" in said
    before = module.load(recipe.model, dtype="float32")[0].state_dict()
    after = read_checkpoint(result.checkpoint).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    train = [line for line in lines(result) if line["kind"] == "train"]
    assert len(train) == 4
    for line in train:
        assert (line["loss"], line["uninformative"], line["updates"], line["clip_high"]) == (0, 1, 0, 0)
        assert line["entropy"] > 1
        assert abs(line["kl_sampler"]) < 1e-6
        assert line["sampler_gap_max"] < 1e-4


def test_problems_left_out_for_their_length_are_counted(recipe: RLRecipe, rules: Path, tmp_path: Path) -> None:
    """Every step's line has how many of its own problems were too long to be asked; with those asked they are all."""
    task = {"name": f"{rules}:Long", "levels": 2}
    changes = {"task": task, "rollout": {"problems": 8, "samples": 2}, "eval": {"probe": False}}
    result, _ = run(changed(recipe, changes), tmp_path / "runs")
    train = [line for line in lines(result) if line["kind"] == "train"]
    assert [line["too_long"] + line["problems"] for line in train] == [8] * 4
    assert len({line["too_long"] for line in train}) > 1


def test_cut_thoughts_are_said_in_one_line(recipe: RLRecipe, tmp_path: Path) -> None:
    """At the end of a run, and only there, pass@1 for each of `eval.budgets`, as in the metrics."""
    result, said = run(changed(recipe, {"eval": {"budgets": (0, 2)}, "train": {"steps": 2}}), tmp_path)
    last = lines(result)[-1]
    shares = f"{last['pass@1/budget_0']:.3f}, {last['pass@1/budget_2']:.3f}"
    assert said.count("thoughts cut at") == 1
    assert f"pass@1 with thoughts cut at 0, 2 tokens: {shares}" in said


def test_a_sample_shows_prompt_completion_and_reward_apart(recipe: RLRecipe, tmp_path: Path) -> None:
    """A section of the samples has the prompt as the model reads it, then its text, then the parts of the reward; what
    the model writes is indented, and a long text loses its middle."""
    prompt = {"style": "template", "template": "Solve {question} now."}
    changes = {"prompt": prompt, "train": {"steps": 1}, "eval": {"probe": False}}
    result, _ = run(changed(recipe, changes), tmp_path)
    section = (result.folder / "samples.md").read_text().split("## Step")[1]
    assert [line for line in section.splitlines()[1:] if line and line[0] != " "] == [
        "Prompt:",
        "Completion:",
        "Reward:",
    ]
    assert "Prompt:\n\n    Solve " in section
    assert " now.\n\nCompletion:\n" in section
    assert "Reward:\n\n    accuracy " in section
    with module.MetricsLog(result_folder := module.RunFolder(result.folder), step=1) as log:
        log.write_answer(1, {"Completion": "a" * 10**6 + "end"})
    written = result_folder.samples.read_text().split("Completion:")[-1]
    assert written.rstrip().endswith("aaaend")
    assert len(written) < 10_000


def test_a_curriculum_that_is_insisted_on_begins_at_once(
    recipe: RLRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without one asks all levels; resumed with `task.start` it goes on from that level, and from where it has
    come to when it is resumed once more."""
    recipe = changed(recipe, {"train": {"steps": 6}, "eval": {"probe": False}})
    stop_after(monkeypatch, 2)
    run(recipe, tmp_path)
    stop_after(monkeypatch, 2)
    recipe = changed(recipe, {"task": {"start": 1}})

    def raise_level(own: module.Learner, *_: Any) -> None:
        own.progress.data["level"] += own.progress.step == 4  # and nothing changes it after that

    monkeypatch.setattr(module, "_raise_level", raise_level)
    run(recipe, tmp_path, resume=True, accept_changes=True)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_raise_level", lambda *_: None)
    result, _ = run(recipe, tmp_path, resume=True)
    levels = [line["level"] for line in lines(result) if line["kind"] == "train"]
    assert levels == [2, 2, 1, 2, 2, 2]


def graded(*groups: tuple[int, list[float]]) -> list[Any]:
    """Groups of problems of a level, with the accuracies of their completions."""
    reward = lambda accuracy: SimpleNamespace(parts={"accuracy": accuracy})  # noqa: E731
    return [
        SimpleNamespace(
            problem=SimpleNamespace(level=level),
            rollouts=[SimpleNamespace(reward=reward(accuracy)) for accuracy in accuracies],
        )
        for level, accuracies in groups
    ]


@pytest.mark.parametrize(
    ("drawn", "level"),
    [
        (graded((1, [1.0] * 8), (2, [0.5, 0.25])), 2),  # the easier level is not what counts
        (graded((1, [0.0] * 8), (2, [0.5, 0.5])), 3),
        (graded((1, [0.0] * 8), (2, [1.0]), (2, [0.0])), 3),
        (graded((1, [1.0] * 8)), 2),  # none of the hardest was drawn
    ],
)
def test_a_level_is_added_when_the_hardest_is_solved_often_enough(
    recipe: RLRecipe, drawn: list[Any], level: int
) -> None:
    """All samples of the hardest level together reach `task.raise_at`, be it exactly; other levels do not matter."""
    task = recipe.task.model_copy(update={"levels": 4, "start": 1, "raise_at": 0.5})
    model = SimpleNamespace(config=None)
    progress = module.Progress(data={"level": 2})
    learner = module.Learner(recipe.model_copy(update={"task": task}), model, None, None, progress, None)
    module._raise_level(learner, drawn, lambda _: None)
    assert learner.level == level


@pytest.mark.parametrize(("scores", "kept"), [((0.1, 0.4, 0.2), 2), ((0.1, 0.4, 0.4), 2), ((0.1, 0.2, 0.4), 4)])
def test_the_best_model_is_kept(
    recipe: RLRecipe, scores: tuple[float, ...], kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`best` holds the one model folder of the first evaluation with the highest pass@1, and it opens."""
    left = iter(scores)
    monkeypatch.setattr(rl_evaluate, "_evaluate", lambda *a, **k: ({"pass@1": next(left), "accuracy": 0.0}, []))
    result, _ = run(changed(recipe, {"eval": {"probe": False}}), tmp_path)
    (best,) = (result.folder / "best").iterdir()
    assert best.name == f"step_{kept:08d}"
    module.load(best, dtype="float32")
