"""Which of several right candidates become rows."""

from collections.abc import Sequence
from typing import Any

import pytest

from fathom.config.rewards import Layout
from fathom.config.synth import SynthRecipe
from fathom.synth.candidates import Candidate, Solved
from fathom.synth.decontamination import HeldOutSets
from fathom.synth.selection import Reader, Selection
from fathom.tasks.task import Problem, Verdict

THOUGHTS = ("one two three four", "a b", "one two three", "A  b")


class Trusting:
    """A checker to which every answer is right."""

    def check_all(self, answers: Sequence[tuple[Problem, str | None]]) -> list[Verdict]:
        return [Verdict(float(text is not None)) for _, text in answers]


def chosen(**filters: Any) -> tuple[list[str], dict[str, int]]:
    """The thoughts that are written of two problems with the same candidates each, and why the others are not."""
    recipe = SynthRecipe(name="x", source="worked", tasks=({"name": "modular"},), filters={"language": 0.0} | filters)
    reader = Reader(Layout(form="rest"), starts_thinking=False, instruction="", source="worked")
    selection = Selection(recipe, reader, HeldOutSets([], 0.5))
    solved = []
    for question in ("3+8=", "4+7="):
        candidates = tuple(
            Candidate(f"<think>{thought}</think>1", seed=seed, score=1.0) for seed, thought in enumerate(THOUGHTS)
        )
        solved.append((Problem(question, "1"), Solved("modular", question, candidates)))
    rows = selection.rows(solved, Trusting())  # type: ignore[arg-type]
    return [row["messages"][1]["reasoning_content"] for row in rows], selection.counts.summary()["total"]["dropped"]


def test_all_that_differ_are_kept() -> None:
    """Without a limit every candidate is written but copies of one that is, in case or spaces; another question makes
    another row."""
    rows, dropped = chosen()
    assert sorted(row.lower().split() for row in rows[:3]) == [["a", "b"], ["one", "two", "three"], THOUGHTS[0].split()]
    assert len(rows) == 6
    assert dropped == {"duplicate": 2}


def test_shortest_are_chosen() -> None:
    """`choice = shortest` writes the shortest of each problem, and what it passes over is counted."""
    assert chosen(per_problem=1, choice="shortest") == (["a b", "a b"], {"duplicate": 2, "surplus": 4})


@pytest.mark.parametrize("most", [1, 2])
def test_random_choice_is_the_same_every_time(most: int) -> None:
    """`choice = random` writes so many of each problem, the same whenever asked."""
    rows, _ = chosen(per_problem=most)
    assert len(rows) == 2 * most
    assert rows == chosen(per_problem=most)[0]


def test_a_duplicate_of_what_is_not_written_is_none() -> None:
    """A row is left out as a near-duplicate only of one that is written: not of one passed over for a shorter."""
    pytest.importorskip("datasketch")
    rows, dropped = chosen(per_problem=1, choice="shortest", duplicates=0.99)
    assert rows == ["a b", "a b"]
    assert dropped == {"duplicate": 2, "surplus": 4}
