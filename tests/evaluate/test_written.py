"""Evaluations as files: what passes for one, which of two stays, and sums over tasks."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fathom.errors import UserError
from fathom.evaluate.evaluate import evaluate
from fathom.evaluate.written import is_replaced_by, looked_over, mean_language, mean_thought
from tests.evaluate.scripted import MODULAR, Scripted

_ALL_RIGHT = Scripted(lambda p, n, b: f"<think>so</think>{p.answer}")
WHOLE = json.loads(json.dumps(evaluate(_ALL_RIGHT, MODULAR.replace(budgets=(3,)), model="m").as_json()))


def _changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    found = json.loads(json.dumps(WHOLE))
    change(found)
    return found


def _without(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda found: [one.pop(name) for one in found["measurements"] for name in names]


def _first(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found["measurements"][0].update(values)


ODD = {
    "a list": lambda found: [],
    "nothing in it": lambda found: {},
    "no settings": lambda found: {key: value for key, value in found.items() if key != "settings"},
    "no measurements": lambda found: found | {"measurements": "x"},
    "no number": lambda found: _into(found, "pass@k", {"1": {"value": math.nan, "low": 0.0, "high": 1.0}}),
    "no share": lambda found: _into(found, "pass@k", {"1": {"value": 7.0, "low": 0.0, "high": 1.0}}),
    "no interval": lambda found: _into(found, "pass@k", {"1": {"value": 0.5}}),
    "no pass@1": lambda found: _into(found, "pass@k", {"2": {"value": 0.5, "low": 0.0, "high": 1.0}}),
    "no vote": lambda found: _into(found, "cons@k", {}),
    "no size": lambda found: _into(found, "cons@k", {"x": {"value": 0.5, "low": 0.0, "high": 1.0}}),
    "no count": lambda found: _into(found, "problems", "8"),
    "half a transcript": lambda found: _into(found, "transcripts", [{"question": "q"}]),
}


def _into(found: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    found["measurements"][0][name] = value
    return found


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_evaluation_is_refused_in_a_line(name: str) -> None:
    """With the file, and what to do."""
    odd = ODD[name](json.loads(json.dumps(WHOLE)))
    with pytest.raises(UserError, match=r"^x\.json: is not what 'fathom eval' writes .*measure again$") as said:
        looked_over(odd, "x.json")
    assert "\n" not in str(said.value)


def test_what_was_written_passes() -> None:
    """As it is, and without what older versions did not have, or with what later ones may."""
    assert looked_over(WHOLE, "x") is WHOLE
    older = _changed(_without("transcripts", "language", "language_thoughts", "levels", "unread"))
    assert looked_over(older, "x") is older
    looked_over(WHOLE | {"another": 1, "version": 9}, "x")


def test_what_says_less_does_not_replace_what_says_more(tmp_path: Path) -> None:
    """Fewer problems, samples, levels, budgets or tasks, and what was broken off; all else may."""
    file = tmp_path / "e.json"
    assert is_replaced_by(file, WHOLE)
    file.write_text(json.dumps(WHOLE), encoding="utf-8")
    assert is_replaced_by(file, copy.deepcopy(WHOLE))
    assert is_replaced_by(file, _changed(_first(problems=9)))
    less = [_first(problems=7), _first(samples=3), _first(levels={"1": {"problems": 8}}), _first(task="other"),
            _first(budget=5), lambda found: found.update(complete=False)]  # fmt: skip
    for change in less:
        assert not is_replaced_by(file, _changed(change))
    file.write_text(json.dumps(_changed(lambda found: found.update(complete=False))), encoding="utf-8")
    assert is_replaced_by(file, WHOLE)
    assert not is_replaced_by(file, _changed(_first(problems=7)))
    file.write_text(json.dumps(WHOLE)[:100], encoding="utf-8")
    assert is_replaced_by(file, _changed(_first(problems=1)))


def test_means_over_tasks_are_of_answers() -> None:
    """A task of ten problems counts ten times as much as one of one; for language, thoughts with words do."""
    free = {"problems": 10, "samples": 4, "thought_tokens": {"mean": 10.0}, "language": 1.0}
    few = {"problems": 1, "samples": 4, "thought_tokens": {"mean": 120.0}, "language": 0.0}
    assert mean_thought([free, few]) == pytest.approx((400 + 4 * 120) / 44)
    assert mean_language([free, few]) == pytest.approx(10 / 11)
    assert mean_language([free | {"language_thoughts": 2}, few | {"language_thoughts": 2}]) == 0.5
    assert mean_thought([free, few | {"thought_tokens": None}]) == 10
    assert mean_language([free | {"language": None, "language_thoughts": 0}]) is None
