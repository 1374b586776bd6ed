"""The first self-correction of a run: found where it is, once, and never made up."""

import json
from pathlib import Path

import pytest

from fathom.config.rewards import Layout
from fathom.config.rl import RLRecipe
from fathom.tasks.reading import read
from fathom.tasks.rewards import Reward
from fathom.tasks.task import Problem
from fathom.train.moments import FILE, CorrectionLog, first_correction
from fathom.train.rollout import Drawn, Group, Rollout
from fathom.train.run import RunFolder
from tests.train import test_rl
from tests.train.test_rl import changed, run, stop_after

recipe, start = test_rl.recipe, test_rl.start  # fixtures, of this file too
WORDS = ("wait", "!", "不对")
RIGHT = "<think>1+1=3, Wait no, 2</think>2"


def _group(question: str, *completions: tuple[str, float]) -> Group:
    rollouts = []
    for text, accuracy in completions:
        reading = read(text, Layout(form="rest"), starts_thinking=False, finished=True)
        rollouts.append(Rollout(Drawn(finished=True), text, Reward(accuracy, {"accuracy": accuracy}, reading)))
    return Group(Problem(question), [], rollouts)


@pytest.mark.parametrize(
    ("completion", "word"),
    [
        (RIGHT, "wait"),
        ("<think>8*2=8!6</think>6", "!"),
        ("<think>三加三，不对，是六</think>6", "不对"),
        ("<think>8*2=6!6</think>6", None),
        ("<think>2*8=6!6;6+1=8!7</think>7", "!"),
        ("<think>Wait, it is 2</think>2", None),
        ("<think>It is 2. Wait!</think>2", None),
        ("<think>I await 2 waiters</think>2", None),
        ("<think>two</think>wait, 2", None),
        ("wait, it is 2", None),
    ],
)
def test_a_correction_says_something_else_behind_the_word(completion: str, word: str | None) -> None:
    """Other letters or figures follow it than stand before it, within the thought; parts of words are no words."""
    found = first_correction([_group("q", (completion, 1.0))], WORDS, 3)
    assert (found and found.word) == word


def test_the_first_right_one_is_taken() -> None:
    """In the order in which groups and their completions were drawn, and no wrong answer, however it doubts itself."""
    groups = [_group("a", (RIGHT, 0.0), ("<think>2</think>2", 1.0)), _group("b", (RIGHT, 0.5), (RIGHT + " ", 1.0))]
    found = first_correction([*groups, _group("c", (RIGHT, 1.0))], WORDS, 7)
    assert found is not None
    assert (found.step, found.question, found.completion, found.word) == (7, "b", RIGHT + " ", "wait")
    assert first_correction(groups[:1], WORDS, 7) is None


def test_it_is_written_once_and_kept_when_the_run_goes_on(tmp_path: Path) -> None:
    """Later corrections, and those of a resumed session, do not take its place; without one there is no file."""
    folder = RunFolder(tmp_path)
    log = CorrectionLog(folder, WORDS, step=0)
    log.look([_group("none", ("2", 1.0))], 1)
    assert not (tmp_path / FILE).exists()
    for step, question in ((2, "first"), (3, "second")):
        log.look([_group(question, (RIGHT, 1.0))], step)
    kept = {"step": 2, "question": "first", "completion": RIGHT, "word": "wait"}
    assert json.loads((tmp_path / FILE).read_text()) == kept
    CorrectionLog(folder, WORDS, step=2).look([_group("third", (RIGHT, 1.0))], 3)
    assert json.loads((tmp_path / FILE).read_text()) == kept


def test_what_was_drawn_after_the_checkpoint_is_forgotten(tmp_path: Path) -> None:
    """A session that begins before the step of what is kept looks anew, as the metrics are cut back."""
    folder = RunFolder(tmp_path)
    CorrectionLog(folder, WORDS, step=0).look([_group("lost", (RIGHT, 1.0))], 9)
    CorrectionLog(folder, WORDS, step=8).look([_group("other", (RIGHT, 1.0))], 12)
    assert json.loads((tmp_path / FILE).read_text())["question"] == "other"


def test_a_run_keeps_what_it_drew(recipe: RLRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run that is stopped and resumed has the file of an unbroken one, and of the step in which it was drawn."""
    looked = []

    def found(groups: list[Group], words: tuple[str, ...], step: int):
        looked.append(step)
        group = groups[0]
        first = [_group(group.problem.question, (RIGHT, 1.0))] if step >= 2 else []
        return first_correction(first, words, step)

    monkeypatch.setattr("fathom.train.moments.first_correction", found)
    steps = changed(recipe, {"eval": {"probe": False, "reflections": WORDS}})
    whole, _ = run(steps, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run(steps, tmp_path / "broken")
    broken, _ = run(steps, tmp_path / "broken", resume=True)
    assert json.loads((whole.folder / FILE).read_text())["step"] == 2
    assert (whole.folder / FILE).read_bytes() == (broken.folder / FILE).read_bytes()
    assert looked == [1, 2, 1, 2]
