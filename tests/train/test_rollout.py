"""Problems and completions as a step of reinforcement learning gets them."""

import itertools
from collections.abc import Callable

import pytest

from fathom.engine.protocol import Chunk, Request, Usage
from fathom.errors import UserError
from fathom.tasks.catalogue import open_task
from fathom.train.rollout import draw, draw_problems, held_out_problems


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
