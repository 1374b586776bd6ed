"""What is said before the first problem."""

import itertools

from fathom.tasks import open_task


def test_every_matter_is_spoken_of_in_training_and_held_out():
    """No reply is asked for in one split alone, or measuring would ask for what could not be learnt."""
    task = open_task("smalltalk")
    replies = {
        split: {problem.answer for problem in itertools.islice(task.problems(split), 3000)}
        for split in ("train", "held-out")
    }
    assert replies["train"] == replies["held-out"]


def test_a_reply_is_right_whatever_its_punctuation_and_no_other_is():
    """Capitals, spaces and marks do not count; words do."""
    task = open_task("smalltalk")
    for problem in itertools.islice(task.problems("train"), 50):
        assert task.check(problem, problem.answer.upper().replace(",", " ").replace("。", "")) == 1
        assert task.check(problem, f"{problem.answer} And more.") == 0
        assert task.check(problem, problem.answer[2:]) == 0
