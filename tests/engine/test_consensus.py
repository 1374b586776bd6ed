"""Votes among answers."""

import pytest

from fathom.engine.consensus import Consensus, consensus, final_answer
from fathom.errors import UserError


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{1} or \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{7} and \\boxed{unclosed", "7"),
        ("Because.\n**Answer:** 1,234.50", "1234.5"),
        ("reason\n#### -007", "-7"),
        ("Answer:\n\n 12.0 \n", "12"),
        ("the answer is: is it?\nAnswer is : 3", "3"),
        ("Answer: 3\nAnswer:\n", "3"),
        ("\\boxed{a\\boxed{b}c}", "b"),
        ("} \\boxed{1} {\\boxed{2", "1"),
        ("The answer is  Paris.", "paris"),
        ("  $42$ ", "42"),
        ("1e2", "100"),
        ("1,2", "1,2"),
        ("", ""),
        ("9" * 40, "9" * 40),
        ("nan", "nan"),
        ("1e999999999", "1e999999999"),
    ],
)
def test_equal_answers_have_one_spelling(text: str, answer: str) -> None:
    """The answer is found where it is marked, and numbers, case and spaces are written one way."""
    assert final_answer(text) == answer


def test_the_majority_wins_and_the_first_of_it_speaks() -> None:
    """Votes count final answers, not texts; ties go to the first; empty answers have no vote."""
    assert consensus(["Answer: 3", "x\nAnswer: 4.0", "\\boxed{4}"]) == Consensus(1, [1, 2, 2])
    assert consensus(["a", "b"]).winner == 0
    assert consensus(["", "", "b"]) == Consensus(2, [0, 0, 1])
    assert consensus([""]) == Consensus(0, [0])


def test_a_rule_goes_before_the_majority() -> None:
    """The answer that the rule scores highest wins; votes break ties, also where it finds none right."""
    texts = ["5", "5", "4"]
    assert consensus(texts, check=lambda text: text == "4") == Consensus(2, [2, 2, 1])
    assert consensus(["4", "5", "5.0"], check=lambda text: len(text) < 3).winner == 1
    assert consensus(["4", "5", "5.0"], check=len).winner == 2
    assert consensus(texts, check=lambda text: False) == Consensus(0, [2, 2, 1])
    with pytest.raises(UserError, match="NaN"):
        consensus(texts, check=lambda text: float("nan"))


def test_hostile_answers_take_no_time() -> None:
    """Long runs of what the patterns look for are read in linear time (this would not end otherwise)."""
    answer = "answer" + " " * 100_000
    for text in (
        answer,
        "\\boxed{" * 100_000,
        "answer" + "\n" * 100_000,
        "\n" * 100_000,
        "* " * 100_000,
        "answer" * 50_000,
        "{" * 100_000,
        "1," * 100_000,
    ):
        assert len(final_answer(text)) <= len(text)
