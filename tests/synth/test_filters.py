"""What each filter drops, and what it must let pass."""

import itertools
import random

import pytest

from fathom.config.rewards import Layout
from fathom.config.synth import FilterSection
from fathom.synth.candidates import Candidate
from fathom.synth.filters import FILTERS, compression_ratio, reason_to_drop, repeated_share
from fathom.tasks.catalogue import open_task
from fathom.tasks.task import Language, Problem

LAYOUT = Layout(form="tags")
SETTINGS = FilterSection(shortest_thought=5, longest_thought=400, repetition=0.5, compression=10.0)
THOUGHT = "First 3 + 8 = 11. Then 11 - 5 = 6."


def reason(
    thought: str = THOUGHT,
    tail: str = " <answer>6</answer>",
    *,
    settings: FilterSection = SETTINGS,
    language: Language = "en",
    **changes: object,
) -> str:
    """Why a candidate with this thought is dropped: right, finished and of a known layout unless `changes` say else."""
    candidate = Candidate(f"<think>{thought}</think>{tail}", **{"seed": 1, "tokens": 9, "score": 1.0} | changes)
    reading = candidate.reading(LAYOUT, starts_thinking=False)
    return reason_to_drop(candidate, reading, Problem("3+8-5=", "6", language=language), settings)


def test_a_clean_row_passes() -> None:
    """A right, whole, tidy candidate is dropped by no filter."""
    assert reason() == ""


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        ("not drawn", {"failure": "the server went away", "score": 0.0}),
        ("wrong", {"score": 0.0}),
        ("wrong", {"score": 0.99}),
        ("wrong", {"tail": " 6"}),
        ("wrong", {"tail": " <answer>6</answer> <answer>7</answer>"}),
        ("cut off", {"finished": False}),
        ("layout", {"tail": " so: <answer>6</answer>"}),
        ("language", {"thought": "First we add the two. 然后我们从里面减去五，得到六。"}),
        ("language", {"language": "zh"}),
        ("language", {"thought": "先把三和八加起来 and then we take five away", "language": "zh"}),
        ("short thought", {"thought": "hm"}),
        ("long thought", {"thought": "".join(map(chr, range(0x4E00, 0x4E00 + 401))), "language": "zh"}),
        ("repetition", {"thought": "Wait, let me check that. " * 12}),
        ("repetition", {"thought": "让我再检查一下。" * 30, "language": "zh"}),
    ],
)
def test_each_filter_drops_for_its_own_reason(expected: str, changes: dict[str, object]) -> None:
    """A candidate that is bad in one way alone is dropped, and the reason names that way."""
    assert reason(**changes) == expected


def test_a_loop_with_a_counter_is_found_by_compression_alone() -> None:
    """Turns that differ in a number repeat no 8-gram, and are dropped all the same."""
    loop = " ".join(f"Let me try {number}: no, not it." for number in range(300))
    assert repeated_share(loop) < 0.1
    assert reason(loop, settings=SETTINGS.replace(longest_thought=None)) == "repetition"


@pytest.mark.parametrize(
    ("thought", "language"),
    [
        ("3+8=1;1-5=6", "en"),
        ("设苹果有 x 个，则 x + 5 = 11，所以 x = 6。", "zh"),
        ("Let x be the price, so that \\frac{x}{2} + 5 = 8 and x = 6.", "en"),
        ("So 5 * 5 = 25, and 5 * 5 = 25 again; the sum is 50, half of it 25.", "en"),
    ],
)
def test_formulas_and_honest_repeats_pass(thought: str, language: Language) -> None:
    """Figures alone, variables in Chinese, commands in English and a step made twice are no fault."""
    assert reason(thought, language=language) == ""


def test_filters_that_are_off_drop_nothing() -> None:
    """Every filter but that of right answers can be turned off by its field."""
    off = FilterSection(finished=False, layout=False, language=0.0, repetition=1.0, compression=1e6)
    assert reason("哈 " * 500, " so <answer>6</answer>", settings=off) == ""
    assert reason(finished=False, settings=off) == ""
    assert reason(score=0.0, settings=off) == "wrong"


def test_worked_solutions_of_every_task_pass() -> None:
    """No default of the filters drops what the built-in tasks write by rule, at any level."""
    for name in ("arithmetic", "modular", "equations", "countdown", "logic", "bilingual"):
        task = open_task(name)
        for level in range(1, task.levels + 1):
            for problem in itertools.islice(task.problems("train", level=level), 8):
                text = f"<think>{task.solution(problem, random.Random(1))}</think>{problem.answer}"
                candidate = Candidate(text, seed=1, score=1.0)
                found = candidate.reading(Layout(form="rest"), starts_thinking=False)
                why = reason_to_drop(candidate, found, problem, FilterSection())
                assert why == "", (name, level, why, repeated_share(text), compression_ratio(text))


def test_reasons_are_told_apart() -> None:
    """No two filters give the same reason, and none an empty one."""
    assert all(FILTERS)
    assert len(set(FILTERS.values())) == len(FILTERS)
