"""What the parts of a reward add up to."""

import math

import pytest

from fathom.config.rewards import Layout, Rewards
from fathom.errors import UserError
from fathom.tasks.rewards import overlong, score
from fathom.tasks.task import Problem
from tests.tasks.broken import Broken

PROBLEM = Problem("?", "42")


def given(completion: str, settings: Rewards, *, tokens: int = 10):
    return score(
        Broken(),
        PROBLEM,
        completion,
        tokens=tokens,
        max_tokens=100,
        finished=True,
        starts_thinking=False,
        settings=settings,
    )


def test_the_published_punishment_of_length() -> None:
    """DAPO's figures: of 20,480 tokens the last 4,096 are punished, in proportion."""
    assert [overlong(tokens, 20480, 0.2) for tokens in (0, 16384, 18432, 20480, 30000)] == [0, 0, -0.5, -1, -1]


def test_the_total_is_the_weighted_sum() -> None:
    """Every weight counts for its own part alone."""
    parts = {"accuracy": 1.0, "format": 1.0, "language": 0.5, "overlong": -0.5}
    for weights in ({}, {"accuracy": 3.0}, {"format": 0.25}, {"language": 2.0}, {"overlong": 4.0}):
        settings = Rewards(**weights)
        reward = given("<think>it 是</think><answer>42</answer>", settings, tokens=90)
        assert reward.parts == parts
        assert reward.total == pytest.approx(sum(getattr(settings, name) * value for name, value in parts.items()))


def test_defaults_are_those_of_r1_zero() -> None:
    """Accuracy and format count alike, and nothing else does."""
    assert given("<think>it 是</think><answer>42</answer>", Rewards(), tokens=100).total == 2.0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("raise", "ValueError"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("two", "2"),
        ("none", "TypeError"),
        ("deep", "Recursion"),
    ],
)
def test_a_failing_check_scores_nothing_and_is_reported(answer: str, said: str) -> None:
    """A check that raises, or gives no number from 0 to 1, is a fault of its own; the form still counts."""
    reward = given(f"<think>it is</think><answer>{answer}</answer>", Rewards())
    assert reward.parts["accuracy"] == 0
    assert reward.total == 1
    assert said in reward.fault
    assert "\n" not in reward.fault
    assert math.isfinite(reward.total)


def test_wrong_settings_are_explained() -> None:
    """A weight below zero and an unknown layout are one line that says where."""
    with pytest.raises(UserError, match="'overlong'"):
        Rewards.parse({"overlong": -1.0}, where="recipe")
    with pytest.raises(UserError, match=r"layout\.form"):
        Rewards.parse({"layout": {"form": "box"}}, where="recipe")
    assert Rewards.parse({"layout": {"form": "boxed"}}, where="recipe").layout == Layout(form="boxed")
