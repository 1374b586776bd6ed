"""Estimates against numbers worked by hand, and against counting every set of samples."""

import itertools
import random
from collections import Counter
from math import comb

import pytest

from fathom.evaluate.statistics import Votes, cons_at, estimate, pass_at


def test_the_interval_of_four_problems_by_hand() -> None:
    """Means 1, ½, 0, ½ of two samples: SE² = 0.5/12, so worth ¼/SE² = 6 draws; Wilson's interval for 3 of 6."""
    found = estimate([1.0, 0.5, 0.0, 0.5], 2)
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((0.18762, 0.81238), abs=1e-5)


def test_the_problem_is_the_unit() -> None:
    """Eight samples that agree within every problem are worth one; samples that differ as coins do, worth all."""
    one, eight = estimate([1.0, 0.0] * 20, 1), estimate([1.0, 0.0] * 20, 8)
    assert eight == one
    coins, independent = estimate([0.5] * 40, 8), estimate([1.0, 0.0] * 160, 1)
    assert (coins.low, coins.high) == pytest.approx((independent.low, independent.high), abs=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_certainty_is_never_claimed(value: float) -> None:
    """Where everything was right, or wrong, the interval of 20 problems is Wilson's 16 %, however many samples."""
    found = estimate([value] * 20, 64)
    assert found.value == value
    assert found.high - found.low == pytest.approx(3.841459 / 23.841459, abs=1e-5)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(
    ("easy", "hard", "problems", "least"),
    [(0.8, 0.4, 60, 0.93), (0.8, 0.4, 30, 0.93), (1, 1, 128, 0.93), (2, 8, 60, 0.93), (5, 0.25, 60, 0.93),
     (19, 1, 30, 0.93), (2, 0.1, 30, 0.88)],
)  # fmt: skip
def test_the_interval_holds_the_truth_as_often_as_it_says(
    easy: float, hard: float, problems: int, least: float
) -> None:
    """Over 400 simulated evaluations with problems of different difficulty, 93 to 98 % hold the true mean; 88 % where
    there are few and most are solved always."""
    draw = random.Random(7)
    truth = easy / (easy + hard)
    held = 0
    for _ in range(400):
        chances = [draw.betavariate(easy, hard) for _ in range(problems)]
        values = [sum(draw.random() < chance for _ in range(4)) / 4 for chance in chances]
        found = estimate(values, 4)
        held += found.low <= truth <= found.high
    assert least <= held / 400 <= 0.98


@pytest.mark.parametrize(("easy", "hard"), [(0.8, 0.4), (1, 1), (2, 8)])
def test_the_intervals_of_sets_of_samples_hold_the_truth_too(easy: float, hard: float) -> None:
    """pass@4 out of 8 samples of 60 problems, whose sets overlap: 90 to 99 % of 300 simulated evaluations."""
    draw = random.Random(5)
    pool = [draw.betavariate(easy, hard) for _ in range(20_000)]
    truth = sum(1 - (1 - chance) ** 4 for chance in pool) / len(pool)
    held = 0
    for _ in range(300):
        chances = [draw.betavariate(easy, hard) for _ in range(60)]
        right = [sum(draw.random() < chance for _ in range(8)) for chance in chances]
        found = estimate([pass_at(4, samples=8, right=count) for count in right], 8 // 4)
        held += found.low <= truth <= found.high
    assert 0.9 <= held / 300 <= 0.99


def test_one_problem_has_an_interval() -> None:
    """However often it was asked, it is one draw."""
    assert estimate([0.5], 64) == estimate([0.5], 1)
    assert (estimate([1.0], 64).low, estimate([0.0], 64).high) == pytest.approx((0.2065, 0.7935), abs=1e-4)


def test_pass_at_k_by_hand() -> None:
    """2 of 5 right: one of one 2/5, one of two 1 − 3/10, one of four 1."""
    assert [pass_at(k, samples=5, right=2) for k in (1, 2, 4, 5)] == pytest.approx([0.4, 0.7, 1.0, 1.0])
    assert pass_at(8, samples=8, right=0) == 0


def test_pass_at_k_grows_with_k() -> None:
    """More tries never lose."""
    for right in range(9):
        values = [pass_at(k, samples=8, right=right) for k in range(1, 9)]
        assert values == sorted(values)


def test_cons_at_k_by_hand() -> None:
    """Right twice, wrong alike once: of the three pairs one is right alone and two are ties, which count half."""
    answers = [Votes(2, 1.0), Votes(1, 0.0)]
    assert [cons_at(k, answers, silent=0) for k in (1, 2, 3)] == pytest.approx([2 / 3, 1 / 3 + 2 / 3 / 2, 1.0])
    assert cons_at(2, [Votes(1, 1.0)], silent=1) == 1  # who says nothing votes for nothing
    assert cons_at(2, [], silent=2) == 0


def test_cons_at_k_is_what_counting_every_set_gives() -> None:
    """Against all sets of k samples, for random tables of answers, some of them silent and some right in two ways."""
    draw = random.Random(3)
    for _ in range(40):
        given = [draw.choice(["a", "b", "c", "d", "d", ""]) for _ in range(draw.randint(1, 9))]
        right = {letter: draw.choice([0.0, 1.0, 0.5]) for letter in "abcd"}
        counts = Counter(letter for letter in given if letter)
        answers = [Votes(count, right[letter]) for letter, count in counts.items()]
        for k in range(1, len(given) + 1):
            sets = list(itertools.combinations(given, k))
            expected = sum(_majority(chosen, right) for chosen in sets) / len(sets)
            assert cons_at(k, answers, silent=given.count("")) == pytest.approx(expected)


def _majority(chosen: tuple[str, ...], right: dict[str, float]) -> float:
    counts = Counter(letter for letter in chosen if letter)
    winners = [letter for letter, count in counts.items() if count == max(counts.values())]
    return sum(right[letter] for letter in winners) / len(winners) if winners else 0.0


def test_a_vote_of_one_is_a_sample() -> None:
    """cons@1 is pass@1, whatever the answers."""
    draw = random.Random(5)
    for _ in range(50):
        answers = [Votes(draw.randint(1, 6), float(draw.random() < 0.5)) for _ in range(draw.randint(0, 5))]
        silent = draw.randint(0 if answers else 1, 4)
        samples = silent + sum(answer.count for answer in answers)
        right = sum(answer.count for answer in answers if answer.right)
        assert cons_at(1, answers, silent=silent) == pytest.approx(pass_at(1, samples=samples, right=right))


def test_a_vote_of_many_samples_is_exact() -> None:
    """256 samples, 140 of them right against 116 that agree on one wrong answer: 101 decide as binomials say."""
    expected = sum(comb(140, won) * comb(116, 101 - won) for won in range(51, 102)) / comb(256, 101)
    assert cons_at(101, [Votes(140, 1.0), Votes(116, 0.0)], silent=0) == pytest.approx(expected, rel=1e-9)
