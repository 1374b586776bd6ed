"""What became of every candidate: by task, level and round, and as a person reads it."""

from collections import Counter, defaultdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fathom.report.tables import plural
from fathom.synth.filters import FILTERS

HELD_OUT, REWRITING, DUPLICATE, SURPLUS = "held out", "rewriting", "duplicate", "surplus"
"""Reasons to drop that no filter of one candidate gives."""
REASONS = (*FILTERS, HELD_OUT, REWRITING, DUPLICATE, SURPLUS)
"""All, in the order in which they are asked."""

_ADVICE = {
    "not drawn": "see what the drawing says in synth.json",
    "wrong": "take easier levels, a stronger teacher, more draw.samples or draw.repair_rounds; look at drawn.jsonl "
    "whether prompt and layout are what the model was trained with",
    "cut off": "raise draw.max_tokens",
    "layout": "look at drawn.jsonl whether prompt.instruction and layout say the same, or set filters.layout = false",
    "language": "lower filters.language",
    "short thought": "lower filters.shortest_thought",
    "long thought": "raise filters.longest_thought",
    "repetition": "raise filters.repetition or filters.compression",
    HELD_OUT: "take problems of another seed, or see decontamination.files",
    REWRITING: "see whether rewrite.form finds the answer in rewrite.answer_template",
    DUPLICATE: "raise filters.duplicates",
    SURPLUS: "raise filters.per_problem",
}

Place = tuple[str, int, int]
"""Task, level, round."""


class Counts:
    """Candidates by what became of them."""

    def __init__(self) -> None:
        self._of: dict[Place, Counter[str]] = defaultdict(Counter)
        self.faults: Counter[str] = Counter()
        """Checks that failed and completions that could not be drawn, by what they said."""

    def add(self, place: Place, what: str) -> None:
        """One candidate is `drawn`, `right`, `kept`, or dropped for one of `REASONS`."""
        self._of[place][what] += 1

    def total(self, what: str) -> int:
        """Over all tasks, levels and rounds."""
        return sum(counter[what] for counter in self._of.values())

    def summary(self) -> dict[str, Any]:
        """For `synth.json`."""
        rounds = sorted({place[2] for place in self._of})
        levels = sorted({place[:2] for place in self._of})
        return {
            "total": self._row(None, None, None),
            "rounds": [{"round": number, **self._row(None, None, number)} for number in rounds],
            "levels": [{"task": task, "level": level, **self._row(task, level, None)} for task, level in levels],
            "faults": dict(self.faults.most_common(5)),
        }

    def _row(self, task: str | None, level: int | None, round: int | None) -> dict[str, Any]:
        """The sum over what is None."""
        wanted = (task, level, round)
        found: Counter[str] = Counter()
        for place, counter in self._of.items():
            if all(asked is None or asked == is_ for asked, is_ in zip(wanted, place, strict=True)):
                found.update(counter)
        dropped = {reason: found[reason] for reason in REASONS if found[reason]}
        return {"drawn": found["drawn"], "right": found["right"], "kept": found["kept"], "dropped": dropped}

    def yields(self) -> str:
        """In one line: what was drawn and why it was dropped; and what to change for the reason that cost the most."""
        dropped = {reason: self.total(reason) for reason in REASONS if self.total(reason)}
        told = ", ".join(f"{reason} {number:,}" for reason, number in dropped.items())
        worst = max(dropped, key=dropped.__getitem__)
        return f"{plural(self.total('drawn'), 'candidate')}, of which {told}; {_ADVICE[worst]}"


def print_counts(summary: dict[str, Any], title: str, console: Console, *, short: bool = False) -> None:
    """A table with a line for each task and level, for each round where there are several, and for all, or if `short`
    one line in its place; below it, how many were dropped for which reason."""
    if short:
        total = summary["total"]
        title += f", of {plural(total['drawn'], 'candidate')}, {total['right']:,} of them right"
    console.print(escape(title), highlight=False, soft_wrap=True)
    if not short:
        console.print(_table(summary))
    dropped = ", ".join(f"{reason} {number:,}" for reason, number in summary["total"]["dropped"].items())
    console.print(f"dropped: {dropped or 'none'}", highlight=False, soft_wrap=True)
    for fault, number in list(summary["faults"].items())[:1]:
        console.print(escape(f"failed, most often ({number:,} times): {fault}"), highlight=False, soft_wrap=True)


def _table(summary: dict[str, Any]) -> Table:
    table = Table("", "drawn", "right", "kept", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(label: str, row: dict[str, Any]) -> None:
        table.add_row(escape(label), *(f"{row[name]:,}" for name in ("drawn", "right", "kept")))

    for row in summary["levels"]:
        add(f"{row['task']} {row['level']}", row)
    if len(summary["rounds"]) > 1:
        for row in summary["rounds"]:
            add(f"repair round {row['round']}" if row["round"] else "first answers", row)
    add("all", summary["total"])
    return table
