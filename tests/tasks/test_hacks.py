"""Rewards against the corpus of hacks."""

import functools

import pytest

from fathom.config.rewards import Rewards
from fathom.errors import UserError
from fathom.tasks import open_task
from fathom.tasks.rewards import score
from fathom.tasks.task import Task
from tests.tasks.hacks import HONEST, MAX_TOKENS, ROWS, Row


@functools.cache
def task_called(name: str) -> Task:
    """The task; the test is skipped where this machine cannot run it."""
    if name == "programs":
        from fathom.tasks.programs import shared_sandbox

        try:
            shared_sandbox()
        except UserError as error:
            pytest.skip(str(error))
    return open_task(name)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.why)
def test_earns_what_an_honest_reader_gives(row: Row) -> None:
    """Every part of the reward of every row is exactly the one written beside it."""
    reward = score(
        task_called(row.task),
        row.problem,
        row.completion,
        tokens=row.tokens,
        max_tokens=MAX_TOKENS,
        finished=row.finished,
        starts_thinking=row.starts_thinking,
        settings=Rewards(layout=row.layout),
    )
    expected = {"accuracy": row.accuracy, "format": row.format, "language": row.language, "overlong": row.overlong}
    assert reward.parts == pytest.approx(expected, abs=1e-12), reward.reading.fault
    assert not reward.fault
    assert bool(reward.reading.fault) == (not row.format)


def test_corpus_is_large_and_has_honest_rows() -> None:
    """At least 80 hacks and 15 honest completions with a right answer in good form; no row stands twice."""
    assert len(ROWS) - len(HONEST) >= 80
    assert sum(row.accuracy == row.format == 1 for row in HONEST) >= 15
    assert len({row.why for row in ROWS}) == len(ROWS)
