"""Problems and completions as a step of reinforcement learning gets them."""

import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from fathom.config.rl import RLRecipe
from fathom.data import train_bpe
from fathom.engine.protocol import Chunk, Request, Usage
from fathom.errors import UserError
from fathom.tasks.catalogue import open_task
from fathom.tasks.reading import Reading
from fathom.tasks.rewards import Reward
from fathom.tasks.task import Problem, Task
from fathom.train.rollout import Roller, draw, draw_problems, held_out_problems


class Unreliable:
    """An engine that fails the requests it is told to."""

    context = 100

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self._fails, self._count = fails, itertools.count()

    def submit(self, request: Request, deliver: Callable[[Chunk], None]) -> None:
        failed = self._fails(next(self._count))
        ids = [] if failed else [5, 1]
        reason = "error" if failed else "stop"
        deliver(Chunk("answer", "", ids, None, Usage(), reason, "gone" if failed else ""))


def test_a_failed_completion_is_asked_for_again() -> None:
    """Requests that fail are drawn again, the others are not; what fails for good is named and costs no other."""
    requests = [Request([1], 4) for _ in range(3)]
    drawn = draw(Unreliable(lambda n: n == 1), requests, retries=1)
    assert [one.tokens for one in drawn] == [[5, 1]] * 3
    drawn = draw(Unreliable(lambda n: n >= 1), requests, retries=1)
    assert [one.failure for one in drawn] == ["", "gone", "gone"]
    with pytest.raises(UserError, match="gone"):
        draw(Unreliable(lambda n: True), requests, retries=2)


def test_training_and_held_out_problems_never_meet() -> None:
    """No held-out problem is drawn for training, whatever seed and level; neither has one twice."""
    task = open_task("modular")
    held = held_out_problems(task, 3, 30, seed=1)
    train = [p for seed in range(5) for p in draw_problems(task, "train", 3, 40, seed=seed)]
    assert not {p.question for p in held} & {p.question for p in train}
    assert len({p.question for p in held}) == len(held) == 30
    assert {p.level for p in held} == {1, 2, 3}


class Uneven(Task):
    """Level `few` has five problems, the others as many as one likes."""

    levels = 3

    def __init__(self, few: int) -> None:
        self._few = few

    def problem(self, random: random.Random, level: int) -> Problem:
        return Problem(
            f"{level}: {random.randrange(5 if level == self._few else 10**6)}", level=level, split="held-out"
        )

    def check(self, problem: Problem, answer: str) -> float:
        return 0.0


@pytest.mark.parametrize("few", [1, 2, 3])
def test_what_a_level_lacks_others_have_more_of(few: int) -> None:
    """As many held-out problems as asked for, whichever level has too few; the same ones again, and only what is not
    there is missing."""
    held = held_out_problems(Uneven(few), 3, 30, seed=1)
    assert len({p.question for p in held}) == len(held) == 30
    assert sum(p.level == few for p in held) == 5
    assert held == held_out_problems(Uneven(few), 3, 30, seed=1)
    assert len(held_out_problems(Uneven(1), 1, 30, seed=1)) == 5


@pytest.mark.parametrize(("retries", "drawn"), [(0, [3, 4]), (1, [4, 4])])
def test_a_recipe_says_how_often_completions_are_asked_for_again(retries: int, drawn: list[int]) -> None:
    """`rollout.retries` is what a failed completion gets: without one it is missing from its group."""
    recipe = RLRecipe(
        name="r",
        model="m",
        task={"name": "modular"},
        prompt={"style": "template"},
        rollout={"max_tokens": 4, "retries": retries},
    )
    reward = Reward(0.0, {}, Reading("", None, False, ""), "")
    checker = SimpleNamespace(score_all=lambda samples, **_: [reward] * len(samples))
    tokenizer = train_bpe(["0123456789"], 266)
    roller = Roller(recipe, Unreliable(lambda n: n == 1), tokenizer, checker)
    groups = roller.groups([Problem("1"), Problem("2")], 4, seed=1)
    assert [len(group.rollouts) for group in groups] == drawn
