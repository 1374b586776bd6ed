"""What became of the candidates of a data factory: the tables beside its funnel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fathom.report.document import share
from fathom.report.figures import Figure, funnel

Rows = list[list[str]]
"""A table; the first row is the heading."""


@dataclass(frozen=True)
class Synthesis:
    """One run of the factory."""

    funnel: Figure | None
    dropped: Rows
    """How many for which reason."""
    rounds: Rows
    """Of repair, each with its yield; empty where there was one."""
    levels: Rows
    """By task and level."""


def synthesis(counts: Mapping[str, Any]) -> Synthesis:
    """Of what `synth.json` holds."""
    total = counts["total"]
    dropped = [
        [reason, f"{number:,}", share(_part(number, total["drawn"]))] for reason, number in total["dropped"].items()
    ]
    rounds = [
        [f"repair {row['round']}" if row["round"] else "first answers", *_counted(row)] for row in counts["rounds"]
    ]
    levels = [[f"{row['task']} {row['level']}", *_counted(row)] for row in counts["levels"]]
    heading = ["drawn", "right", "kept", "yield"]
    return Synthesis(
        funnel(counts),
        [["why not kept", "candidates", "of all"], *dropped] if dropped else [],
        [["round", *heading], *rounds] if len(rounds) > 1 else [],
        [["task and level", *heading], *levels],
    )


def _counted(row: Mapping[str, Any]) -> Sequence[str]:
    return [*(f"{row[name]:,}" for name in ("drawn", "right", "kept")), share(_part(row["kept"], row["drawn"]))]


def _part(number: int, whole: int) -> float | None:
    return number / whole if whole else None
