"""What a person sees of an evaluation: how far it is, and then the numbers."""

import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from fathom.evaluate.evaluate import Progress
from fathom.evaluate.results import Evaluation, Measurement
from fathom.evaluate.statistics import Estimate
from fathom.report.axis import plain
from fathom.report.tables import plural, print_rows

SECONDS_BETWEEN_LINES = 10.0
"""Where there is no terminal."""
_MANY = 0.5
"""A share of samples without an answer that says more about how they were asked than about the model."""


class ProgressView:
    """A bar with the time left on a terminal, a line now and then elsewhere. Use as a context."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
        self._bar = Bar(*columns, TextColumn("problems, left"), TimeRemainingColumn(), console=console, transient=True)
        self._task = self._bar.add_task("", total=None)
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def tell(self, progress: Progress) -> None:
        """After each problem."""
        what = progress.task + ("" if progress.budget is None else f", {progress.budget} tokens of thought")
        self._bar.update(self._task, description=what, completed=progress.done, total=progress.total)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            left = (now - self._began) / progress.done * (progress.total - progress.done)
            line = f"{what}: {progress.done} of {progress.total} problems, {left:.0f} s left"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def show(evaluation: Evaluation, console: Console) -> None:
    """All numbers, task by task."""
    for task in evaluation.settings.tasks:
        free, cut = evaluation.free(task), evaluation.by_budget(task)
        if free is None:
            continue
        problems = f"{plural(free.problems, 'held-out problem')} × {plural(free.samples, 'sample')}"
        drawn = f"temperature {evaluation.settings.temperature:g}, top-p {evaluation.settings.top_p:g}"
        console.print(f"\n{task}: {problems}, {drawn}", markup=False, highlight=False, soft_wrap=True)
        print_rows("", list(_rows(free)), console)
        _print(console, _samples(free))
        if len(free.levels) > 1:
            most = max(free.cons_at)
            voted = (f"cons@{most}",) if most > 1 else ()
            rows = [
                (str(level), str(own.problems), _share(own.pass_at_1), *(_share(own.cons_at[most]) for _ in voted))
                for level, own in free.levels.items()
            ]
            _print(console, _table(("level", "problems", "pass@1", *voted), rows))
        if cut:
            _print(
                console,
                _table(
                    ("thought at most", "pass@1", "tokens of thought", "completion", "no answer"),
                    map(_budget_row, cut),
                ),
            )


def notes(evaluation: Evaluation) -> list[str]:
    """What a person must know of these numbers, a line each."""
    said = []
    for found in evaluation.measurements:
        where = found.task + ("" if found.budget is None else f" with {found.budget} tokens of thought")
        if not evaluation.stopped and found.problems + found.left_out < evaluation.settings.problems:
            said.append(f"{where}: no more held-out problems were found; {evaluation.settings.problems} were wanted")
        if found.unread > _MANY and found.budget is None:
            form = evaluation.settings.layout.form
            said.append(
                f"{where}: {_percent(found.unread)} of the samples have no answer where layout {form} looks for it, "
                f"most often: {found.unread_for}; prompt and layout say where it should stand (--style, --instruction, "
                "--layout)"
            )
        if found.faults:
            said.append(f"{where}: {plural(found.faults, 'check')} failed and count as wrong; the first: {found.fault}")
        if found.left_out:
            said.append(f"{where}: {plural(found.left_out, 'problem')} left out; the first: {found.left_out_for}")
    for task in evaluation.settings.tasks:
        if unread := [found for found in evaluation.by_budget(task) if found.unread > _MANY]:
            cut = ", ".join(f"{found.budget} ({_percent(found.unread)})" for found in unread)
            said.append(
                f"{task}: cut at these tokens of thought, so many samples have no answer where layout "
                f"{evaluation.settings.layout.form} looks for it, and count as wrong: {cut}"
            )
    return said


def _rows(found: Measurement) -> Iterator[tuple[str, str]]:
    cost = found.cost
    yield "pass@1", _share(found.pass_at_1)
    if found.score != found.pass_at_1.value:
        yield "mean score", _percent(found.score)
    for name, spread in (("tokens of thought", found.thought_tokens), ("of completion", found.completion_tokens)):
        yield name, "not told" if spread is None else f"{plain(spread.mean)}, median {plain(spread.median)}"
    yield "cut off", _percent(found.truncated)
    yield "no answer found", _percent(found.unread)
    yield "layout kept", _percent(found.well_formed)
    if found.language is not None and found.language < 1:
        yield "language kept", f"{_percent(found.language)} of the words of a thought"
    yield "failed checks", str(found.faults)
    energy = "joules not readable here" if cost.joules is None else f"{cost.joules:.0f} J"
    yield "took", f"{cost.seconds:.1f} s, {energy}"
    units = {"completion_tokens": "tokens", "seconds": "s", "joules": "J", "money": "of money"}
    spent = [f"{plain(value)} {units[name]}" for name, value in cost.per_solved().items() if value is not None]
    yield "per right answer", ", ".join(spent) or ("not told" if cost.right else "none was right")


def _samples(found: Measurement) -> Table:
    """pass@k and cons@k side by side."""
    sizes = sorted(found.pass_at.keys() | found.cons_at.keys())
    rows = [(str(k), _at(found.pass_at, k), _at(found.cons_at, k)) for k in sizes]
    return _table(("k", "pass@k", "cons@k"), rows)


def _budget_row(found: Measurement) -> tuple[str, ...]:
    lengths = [
        "" if spread is None else plain(spread.mean) for spread in (found.thought_tokens, found.completion_tokens)
    ]
    return str(found.budget), _share(found.pass_at_1), *lengths, _percent(found.unread)


def _at(found: Mapping[int, Estimate], k: int) -> str:
    return _share(found[k]) if k in found else ""


def _share(found: Estimate) -> str:
    return f"{_percent(found.value)}  ({100 * found.low:.1f}–{100 * found.high:.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(*heading, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _print(console: Console, table: Table) -> None:
    console.print()
    console.print(table)
