"""Every number of a pipeline's page, worked out anew from what lies in its folder, by none of the page's own code."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fathom.config.hf import read_config
from fathom.model.accounting import flops_per_token
from fathom.report.page import write_report
from tests.evaluate.scripted import MODULAR
from tests.report import house
from tests.report.outline import headings, table_of, text_of

PRICE = 36.0 / 3600
"""Of a second, by the house's file."""
LENGTHS = {"pretrain": 64.0, "rl": 5.0, "sft": 2000 / (2 * 2)}
"""Tokens of a sequence, as the house's recipes and metrics say."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A house whose stages differ in all that is added up: a second task of fewer problems, energy, odd seconds."""
    folder = house.build(tmp_path_factory.mktemp("runs") / "house")
    found = house.states(folder)
    for number, state in enumerate(found.values()):
        state |= {"seconds": 7.77 * 3**number, "joules": 1234.5 * (number + 1)}
        if state["evaluation"] is not None:
            state["evaluation"] = house.evaluation(number % 5, MODULAR.replace(budgets=(0, 5)))
            measurements = state["evaluation"]["measurements"]
            other = json.loads(json.dumps(measurements[0])) | {"task": "stories", "problems": 2, "language": 0.25}
            other |= {"thought_tokens": {"mean": 40.0 + number, "median": 1.0}, "language_thoughts": 3}
            measurements[0] |= {"language": 1.0, "language_thoughts": number}
            measurements.append(other)
    house.write_states(folder, found)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def _seconds(said: str) -> float:
    units = {"h": 3600, "min": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (h|min|s)", said))


def _number(said: str) -> float:
    """Of three digits and a prefix."""
    found = re.fullmatch(r"([\d.,]+) ?([kMGTB]?)(?:J|FLOP)?", said)
    powers = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
    return float(found[1].replace(",", "")) * powers[found[2]]


def _share(estimate: dict[str, float]) -> str:
    return f"{100 * estimate['value']:.1f} % ({100 * estimate['low']:.1f}–{100 * estimate['high']:.1f})"


def _free(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in (state["evaluation"] or {"measurements": []})["measurements"] if one["budget"] is None]


def _learnt(folder: Path, name: str, verb: str) -> float | None:
    """The last line has the sum, or, of rewards, each line what 2 problems of 4 samples came to."""
    if verb in ("synth", "model"):
        return None
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    if verb == "rl":
        return sum(line["problems"] * 4 * line["completion_tokens"] for line in steps)
    return steps[-1]["tokens"]


def test_the_table_of_stages(folder: Path, page: str) -> None:
    """Shares as measured; thoughts over all answers, language over all thoughts with words; minutes of 60 seconds."""
    heading, *rows = table_of(page, "Stages")
    assert heading[2:] == ["modular, pass@1", "stories, pass@1", "tokens of thought", "language kept", "minutes"]
    for row, (name, state) in zip(rows, house.states(folder).items(), strict=True):
        assert row[0] == name
        assert float(row[6]) == pytest.approx(state["seconds"] / 60, abs=0.0501)
        if not (free := _free(state)):
            assert row[2:6] == ["", "", "", ""]
            continue
        assert row[2:4] == [_share(one["pass@k"]["1"]) for one in free]
        answers = [one["problems"] * one["samples"] for one in free]
        thoughts = [one["thought_tokens"]["mean"] for one in free]
        assert answers == [32, 8]
        assert float(row[4]) == pytest.approx((32 * thoughts[0] + 8 * thoughts[1]) / 40, abs=0.501)
        words = [one["language_thoughts"] for one in free]
        assert row[5] == f"{100 * (words[0] * 1.0 + words[1] * 0.25) / sum(words):.1f} %"


def test_cost_of_stages_and_their_sum(folder: Path, page: str) -> None:
    """Each cell by itself; the last row is the sum of the stages, and not of what was rounded."""
    heading, *rows, whole = table_of(page, "Cost of the stages")
    assert heading == ["stage", "time", "energy", "money", "tokens learnt from", "arithmetic", "of the machine's peak"]
    total = {"seconds": 0.0, "joules": 0.0, "tokens": 0.0, "flops": 0.0}
    for row, (name, state) in zip(rows, house.states(folder).items(), strict=True):
        tokens, flops = _learnt(folder, name, state["verb"]), 0.0
        assert _seconds(row[1]) == pytest.approx(state["seconds"], abs=31 if state["seconds"] > 3599 else 0.51)
        assert _number(row[2]) == pytest.approx(state["joules"], rel=5e-3)
        assert float(row[3].lstrip("€").replace(",", "")) == pytest.approx(state["seconds"] * PRICE, abs=0.0051)
        if tokens is None:
            assert row[4:6] == ["", ""]
        else:
            config = read_config(folder / name / "checkpoints" / "step_00000002")
            verb = state["verb"]
            flops = tokens * flops_per_token(config, round(LENGTHS[verb]), mtp=verb == "pretrain")
            assert _number(row[4]) == pytest.approx(tokens, rel=5e-3)
            assert _number(row[5]) == pytest.approx(flops, rel=5e-3)
        parts = {"seconds": state["seconds"], "joules": state["joules"], "tokens": tokens or 0.0, "flops": flops}
        total = {key: value + parts[key] for key, value in total.items()}
    assert _seconds(whole[1]) == pytest.approx(total["seconds"], abs=31)
    assert _number(whole[2]) == pytest.approx(total["joules"], rel=5e-3)
    assert float(whole[3].lstrip("€").replace(",", "")) == pytest.approx(total["seconds"] * PRICE, abs=0.0051)
    assert _number(whole[4]) == pytest.approx(total["tokens"], rel=5e-3)
    assert _number(whole[5]) == pytest.approx(total["flops"], rel=5e-3)
    facts = _facts(page)
    assert (facts["time"], facts["energy"], facts["money"]) == tuple(whole[1:4])


def test_what_stands_over_the_page_and_its_stages(folder: Path, page: str) -> None:
    """The same numbers as in the tables."""
    found, facts = house.states(folder), _facts(page)
    for task, one in zip(("modular", "stories"), _free(found["best"]), strict=True):
        assert facts[f"best on {task}"] == _share(one["pass@k"]["1"])
    assert facts["measured with held-out problems"] == "8 of modular, 2 of stories"
    costs = {row[0]: row for row in table_of(page, "Cost of the stages")}
    assert [title for title in headings(page, 2) if title[0].isdigit()] == [
        f"{number} {name}" for number, name in enumerate(found, start=1)
    ]
    for number, (name, state) in enumerate(found.items(), start=1):
        own = _facts(page.partition(f'id="stage-{number}"')[2])
        assert own["time"] == costs[name][1]
        if costs[name][4]:
            assert own["tokens drawn" if state["verb"] == "rl" else "tokens learnt from"] == costs[name][4]
        for task, one in zip(("modular", "stories"), _free(state), strict=False):
            assert own[f"pass@1 on {task}"] == _share(one["pass@k"]["1"])


def test_ways_to_teach_and_more_thought(folder: Path, page: str) -> None:
    """Minutes with the lessons'; what the curves show are the shares of the budgets and of the votes."""
    found = house.states(folder)
    rows = {row[0]: row for row in table_of(page, "Ways to teach given")[1:]}
    for name, row in rows.items():
        lessons = (
            found["lessons"]["seconds"] if name == "taught" else found["bricks"]["seconds"] if name == "best" else 0
        )
        assert float(row[-1]) == pytest.approx((found[name]["seconds"] + lessons) / 60, abs=0.0501)
        assert row[3:5] == [_share(one["pass@k"]["1"]) for one in _free(found[name])]
    heading, *budgets = table_of(page, "More thought: modular")
    for row in budgets:
        for name, said in zip(heading[1:], row[1:], strict=True):
            (one,) = (m for m in found[name]["evaluation"]["measurements"] if m["budget"] == int(row[0]))
            assert float(said.removesuffix(" %")) == pytest.approx(100 * one["pass@k"]["1"]["value"], rel=5e-3)
    heading, *votes = table_of(page, "More samples: modular")
    for row in votes:
        for name, said in zip(heading[1:], row[1:], strict=True):
            value = _free(found[name])[0]["cons@k"][row[0]]["value"]
            assert float(said.removesuffix(" %")) == pytest.approx(100 * value, rel=5e-3)


def _facts(part: str) -> dict[str, str]:
    """Of the first list of them."""
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", part.partition("</dl>")[0])
    return {text_of(name): text_of(value) for name, value in found}
