"""The figures that compare stages: what each gained, and what more thinking and more samples are worth."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fathom.report.axis import Axis
from fathom.report.bars import Bars, Share
from fathom.report.chart import Chart, Series
from fathom.report.figures import Figure
from fathom.report.stages import Stage, Story
from fathom.report.svg import COLOURS

_RIGHT = Axis("right, 95 % interval", percent=True, least=0, most=1)


def share_of(measured: Mapping[str, Any] | None) -> Share | None:
    """pass@1 with its interval."""
    return None if measured is None else Share.of(measured["pass@k"]["1"])


def gains(story: Story, stages: Sequence[Stage], name: str, title: str) -> Bars | None:
    """pass@1 of each of `stages` that was measured on problems that others were, too, on as many tasks as there are
    colours; None where none was."""
    tasks = story.tasks[:COLOURS]
    compared = [(task, story.comparable(task)) for task in tasks]
    rows = [
        (stage.name, tuple(share_of(stage.free(task)) if stage in found else None for task, found in compared))
        for stage in stages
    ]
    shown = tuple(row for row in rows if any(row[1]))
    return Bars(name, title, shown, tuple(story.task_names[task] for task in tasks)) if shown else None


def thinking_curves(story: Story) -> Iterator[Figure]:
    """For each task: accuracy over budgets of thought, and over the size of the vote, of whoever was measured so on the
    same problems."""
    for number, task in enumerate(story.tasks, start=1):
        compared = story.comparable(task)
        cut = [(stage, found) for stage in compared if len(found := _by_budget(stage, task)) > 1]
        if cut:
            free = cut[0][0].free(task) if len(cut) == 1 else None
            yield _figure(
                numbered("scaling", number),
                f"More thought: {story.task_names[task]}",
                f"Share of held-out problems solved where the thought{_whose(cut)} is cut off after so many tokens.",
                [_series(stage.name, found) for stage, found in cut[-COLOURS:]],
                "tokens of thought at most",
                level=None if free is None else ("thoughts as long as they get", free["pass@k"]["1"]["value"]),
            )
        voted = [(stage, found) for stage in _most_asked(story, task) if len(found := _by_votes(stage, task)) > 1]
        if voted:
            yield _figure(
                numbered("consensus", number),
                f"More samples: {story.task_names[task]}",
                "Share of held-out problems whose right answer has the most votes among so many samples.",
                [_series(stage.name, found) for stage, found in voted[-COLOURS:]],
                f"samples{_whose(voted)} that vote",
                doubling=True,
            )


def _whose(shown: Sequence[tuple[Stage, Any]]) -> str:
    """Where there is one line, no legend names it."""
    return f" of {shown[0][0].name}" if len(shown) == 1 else ""


def numbered(name: str, number: int) -> str:
    """The name of a figure of which there may be several: the first has no number."""
    return name if number == 1 else f"{name}-{number}"


def _by_budget(stage: Stage, task: str) -> dict[int, Any]:
    cut = [one for one in stage.measurements if one["task"] == task and one["budget"] is not None]
    return {one["budget"]: one["pass@k"]["1"] for one in sorted(cut, key=lambda one: one["budget"])}


def _by_votes(stage: Stage, task: str) -> dict[int, Any]:
    free = stage.free(task)
    found = {} if free is None else {int(size): estimate for size, estimate in free["cons@k"].items()}
    return dict(sorted(found.items()))


def _most_asked(story: Story, task: str) -> list[Stage]:
    """Of the stages of which most samples were drawn, those that are compared."""
    samples = {stage.name: found["samples"] for stage in story.comparable(task) if (found := stage.free(task))}
    most = [stage for stage in story.measured if samples.get(stage.name) == max(samples.values(), default=0)]
    cast = [stage for stage in most if stage in story.cast]
    return cast or most


def _series(name: str, found: Mapping[int, Any]) -> Series:
    return Series(
        name,
        tuple((place, estimate["value"]) for place, estimate in found.items()),
        marked=True,
        intervals=tuple((place, estimate["low"], estimate["high"]) for place, estimate in found.items()),
    )


def _figure(name: str, title: str, says: str, series: Sequence[Series], along: str, **more: Any) -> Figure:
    return Figure(Chart(name, title, tuple(series), _RIGHT, None, along, **more), says)
