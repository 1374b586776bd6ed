"""The table of stages, as DeepSeek-R1's paper has one (arXiv 2501.12948v2, table 3): what each of them gained."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from fathom.evaluate.written import mean_thought
from fathom.pipeline.state import StageState
from fathom.tasks.options import short_names


def result_of(stage: StageState) -> str:
    """What a measured stage came to, on one line."""
    short = short_names(found["task"] for found in _free(stage))
    parts = [f"{short[found['task']]} pass@1 {_estimate(found['pass@k']['1'])}" for found in _free(stage)]
    return ", ".join([*parts, *([f"{thought} tokens of thought"] if (thought := _thought(stage)) else [])])


def print_stages(stages: Mapping[str, StageState], console: Console) -> None:
    """A row for every stage that was measured, a column for every task."""
    shown = {name: stage for name, stage in stages.items() if stage.evaluation is not None}
    tasks = list(dict.fromkeys(found["task"] for stage in shown.values() for found in _free(stage)))
    short = short_names(tasks)
    table = Table(box=None, pad_edge=False, show_edge=False)
    for heading in ("stage", *(f"{short[task]} pass@1" for task in tasks), "tokens of thought", "minutes"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for name, stage in shown.items():
        found = {measured["task"]: measured for measured in _free(stage)}
        table.add_row(
            name,
            *(_estimate(found[task]["pass@k"]["1"]) if task in found else "" for task in tasks),
            _thought(stage),
            f"{stage.seconds / 60:.1f}",
        )
    console.print(table, markup=False, highlight=False)


def _free(stage: StageState) -> list[dict[str, Any]]:
    """Its measurements with thoughts free."""
    return [found for found in (stage.evaluation or {}).get("measurements", ()) if found["budget"] is None]


def _thought(stage: StageState) -> str:
    """Mean tokens of thought of an answer; empty where they are not known."""
    return "" if (found := mean_thought(_free(stage))) is None else f"{found:.0f}"


def _estimate(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} ± {(found['high'] - found['low']) / 2:.3f}"
