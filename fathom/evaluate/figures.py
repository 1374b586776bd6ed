"""The charts of an evaluation, in one SVG file: accuracy over thought, over samples, by level."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from fathom.evaluate.results import Evaluation, Measurement
from fathom.evaluate.statistics import Estimate
from fathom.report.axis import Axis
from fathom.report.chart import Chart, Series, draw
from fathom.tasks.options import short_names

WIDTH, HEIGHT = 720, 340
"""Of each chart."""


def draw_evaluation(evaluation: Evaluation) -> str | None:
    """All charts under one another, as the text of an SVG file; None where there is nothing to draw a line through."""
    charts = list(_charts(evaluation))
    if not charts:
        return None
    parts = [
        # Inside another one, an element needs a place and a size of its own.
        draw(chart, width=WIDTH, height=HEIGHT, alone=True).replace(
            "<svg ", f'<svg y="{place * HEIGHT}" width="{WIDTH}" height="{HEIGHT}" ', 1
        )
        for place, chart in enumerate(charts)
    ]
    size = f'viewBox="0 0 {WIDTH} {HEIGHT * len(charts)}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *parts, "</svg>\n"])


def _charts(evaluation: Evaluation) -> Iterator[Chart]:
    for number, (task, called) in enumerate(short_names(evaluation.settings.tasks).items(), start=1):
        free, cut = evaluation.free(task), evaluation.by_budget(task)
        if len(cut) > 1:
            yield _by_budget(f"budget-{number}", called, free, cut)
        if free and len(free.cons_at) > 1:
            yield _by_samples(f"samples-{number}", called, free)
        if free and len(free.levels) > 1:
            yield _by_level(f"levels-{number}", called, free)


def _by_budget(name: str, task: str, free: Measurement | None, cut: list[Measurement]) -> Chart:
    points = {found.budget: found.pass_at_1 for found in cut if found.budget is not None}
    level = ("thoughts free", free.pass_at_1.value) if free else None
    series = _series("thought cut", points)
    return _chart(name, f"{task}: accuracy over thought", (series,), "tokens of thought at most", level)


def _by_samples(name: str, task: str, free: Measurement) -> Chart:
    series = (_series("cons@k: the majority is right", free.cons_at), _series("pass@k: one is right", free.pass_at))
    return replace(_chart(name, f"{task}: accuracy over samples", series, "samples"), doubling=True)


def _by_level(name: str, task: str, free: Measurement) -> Chart:
    most = max(free.cons_at)
    series = [_series("pass@1", {level: found.pass_at_1 for level, found in free.levels.items()})]
    if most > 1:
        voted = {level: found.cons_at[most] for level, found in free.levels.items()}
        series.append(_series(f"cons@{most}: the majority is right", voted))
    return _chart(name, f"{task}: by level", tuple(series), "level")


def _series(name: str, points: Mapping[int, Estimate]) -> Series:
    return Series(
        name,
        tuple((place, found.value) for place, found in points.items()),
        marked=True,
        intervals=tuple((place, found.low, found.high) for place, found in points.items()),
    )


def _chart(
    name: str, title: str, series: tuple[Series, ...], along: str, level: tuple[str, float] | None = None
) -> Chart:
    return Chart(name, title, series, Axis("right, 95 % interval", percent=True, least=0, most=1), None, along, level)
