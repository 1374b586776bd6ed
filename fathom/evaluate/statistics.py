"""Estimates from several samples a problem: their mean with an interval, pass@k, cons@k.

All are functions of how often each answer was given, not of the order, and exact: nothing is drawn at random.

**Intervals.** Samples of one problem are no independent draws, so the problem is the unit. With p the mean of the N
problems' own means and SE² = Σ(pᵢ − p)² / N(N−1), the samples are worth as many independent draws as would have that
error: n = p(1−p)/SE², at most all that were drawn. The 95 % interval is Wilson's for n draws, which stays within 0 and
1 and is no point where everything was right or wrong (Korn and Graubard 1998; there, n = N, as if the samples of a
problem were one). It is meant for some thirty problems or more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959964
"""Of the normal distribution, 95 % lie within so many standard deviations."""
_EXTREME = 1e-9
"""Nearer than this to 0 or 1 is there: probabilities that were summed up are not exact."""


@dataclass(frozen=True)
class Estimate:
    """A share and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Votes:
    """One of the answers to a problem."""

    count: int
    """Samples that gave it."""
    right: float
    """Share of them that were right: 0 or 1, unless a check tells equal answers apart."""


def estimate(values: Sequence[float], draws: int) -> Estimate:
    """The mean of `values`, one for each problem and each from so many independent `draws`; see above."""
    count = len(values)
    mean = math.fsum(values) / count
    independent = float(count)
    if count > 1 and _EXTREME < mean < 1 - _EXTREME:
        squared_error = math.fsum((value - mean) ** 2 for value in values) / (count * (count - 1))
        worth = mean * (1 - mean) / squared_error if squared_error else math.inf
        independent = min(worth, count * draws)
    shrink = 1 + _Z**2 / independent
    centre = (mean + _Z**2 / (2 * independent)) / shrink
    half = _Z / shrink * math.sqrt(max(0.0, mean * (1 - mean)) / independent + (_Z / (2 * independent)) ** 2)
    return Estimate(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def pass_at(k: int, *, samples: int, right: int) -> float:
    """Chance that one of `k` of the samples, drawn without putting back, is right (arXiv 2107.03374, eq. 1)."""
    assert 1 <= k <= samples, f"{k=} {samples=}"
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def cons_at(k: int, answers: Sequence[Votes], *, silent: int) -> float:
    """Chance that the majority of `k` samples, drawn without putting back, is right (arXiv 2203.11171; cons@64 of R1).

    `silent` further samples gave no answer and vote for none. Answers with equally many votes share the win. The mean
    over all sets of `k` samples is counted and not sampled: for each number of votes that a right answer may have, the
    ways in which no other has more.
    """
    samples = silent + sum(answer.count for answer in answers)
    assert 1 <= k <= samples, f"{k=} {samples=}"
    ways = 0.0
    for place, winner in enumerate(answers):
        others = [answer.count for other, answer in enumerate(answers) if other != place]
        for votes in range(1, min(winner.count, k) + 1) if winner.right else ():
            by_ties = _ways(others, silent, k - votes, most=votes)
            shared = sum(number / (ties + 1) for ties, number in enumerate(by_ties))
            ways += winner.right * math.comb(winner.count, votes) * shared
    return float(ways / math.comb(samples, k))


def _ways(counts: Sequence[int], silent: int, size: int, *, most: int) -> np.ndarray:
    """float64 [ties + 1]: the ways to choose `size` of the samples with no answer more than `most` times, by how many
    answers are chosen exactly so often."""
    table = np.zeros((size + 1, size // most + 1))
    table[0, 0] = 1.0
    for count in counts:
        grown = np.zeros_like(table)
        for chosen in range(min(count, most, size) + 1):
            part = math.comb(count, chosen) * table[: size + 1 - chosen]
            if chosen < most:
                grown[chosen:] += part
            else:
                grown[chosen:, 1:] += part[:, :-1]
        table = grown
    return sum(math.comb(silent, chosen) * table[size - chosen] for chosen in range(min(silent, size) + 1))
