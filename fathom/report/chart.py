"""Line charts as SVG, drawn here and not by a plotting library.

What a report draws is lines over steps, on one axis or two. Matplotlib can do that and very much more, as a dependency
many times heavier than the need, and fixes its colours when the picture is made, so that a page for light and dark
would hold every picture twice. The few functions below leave text as text, give every chart a title and a description
in words, and name colours by class: one picture follows the reader's theme (`chart.css`). A library in JavaScript would
do that too, and make the page a program.

A chart is laid out from top to bottom: a legend, where there is more than one line; what the axes show; the lines; the
steps. Lengths are in units of the view box, a pixel where the picture is shown in its own size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from fathom.report.axis import Axis, Scale, doubling_scale, scale, steps_scale
from fathom.report.svg import LETTER, PAD, ROW, SWATCH, frame, head, legend_places, text

Point = tuple[float, float | None]
"""A step and a value; None is a gap."""


@dataclass(frozen=True)
class Series:
    """One line."""

    name: str
    points: tuple[Point, ...]
    """In the order of their steps."""
    marked: bool = False
    """With a dot at every point: for what is measured now and then."""
    second: bool = False
    """Read off the right-hand axis."""
    intervals: tuple[tuple[float, float, float], ...] = ()
    """A step, and from where to where the value may lie: an upright stroke."""

    @property
    def known(self) -> list[tuple[float, float]]:
        """The points that are no gaps."""
        return [(step, value) for step, value in self.points if value is not None]


@dataclass(frozen=True)
class Chart:
    """Lines over steps."""

    name: str
    """Of letters and dashes, for identifiers: no other chart of the page has it."""
    title: str
    series: tuple[Series, ...]
    """Each with at least one point that its axis holds."""
    axis: Axis
    second: Axis | None = None
    """The right-hand one."""
    along: str = "step"
    """What the lines run over."""
    level: tuple[str, float] | None = None
    """A name and a value for a straight line across."""
    doubling: bool = False
    """Each doubling along the way takes the same room."""

    def axis_of(self, series: Series) -> Axis:
        """The axis that a line is read off."""
        if not series.second:
            return self.axis
        assert self.second is not None
        return self.second

    def describe(self) -> str:
        """The chart in words: where each line begins and ends, and its extremes."""
        said = [_in_words(series, self.axis_of(series), self.along) for series in self.series]
        if self.level is not None:
            said.append(f"{self.level[0]}: {self.axis.write(self.level[1])}.")
        return " ".join(said)


def draw(chart: Chart, *, width: float = 360, height: float = 240, alone: bool = False) -> str:
    """The chart as one `<svg>` element; with `alone`, as a file that brings its title, colours and ground along."""
    x, lefts, rights, top = _layout(chart, width, height, alone)
    bottom = height - 2 * ROW - 4
    parts = frame(f"{chart.name}-{width:g}", chart.title, chart.describe(), width, height, alone=alone)
    parts += _legend(chart, width, first_row=head(alone=alone))
    parts.append(text(PAD, top - ROW / 2 - 5, chart.axis.title, "axis"))
    for value, label in lefts.ticks:
        parts.append(f'<path class="grid" d="M{x.start:.1f},{lefts(value):.1f}H{x.end:.1f}"/>')
        parts.append(text(x.start - 7, lefts(value) + 4.5, label, "tick", "end"))
    if chart.second is not None and rights is not None:
        parts.append(text(width - PAD, top - ROW / 2 - 5, chart.second.title, "axis", "end"))
        parts += [text(x.end + 7, rights(value) + 4.5, label, "tick") for value, label in rights.ticks]
    parts += [text(x(value), bottom + ROW - 2, label, "tick", "middle") for value, label in x.ticks]
    parts += [f'<path class="grid" d="M{x(value):.1f},{bottom:.1f}v4"/>' for value, _ in x.ticks]
    parts.append(text((x.start + x.end) / 2, height - 5, chart.along, "axis", "middle"))
    if chart.level is not None:
        parts.append(f'<path class="level" d="M{x.start:.1f},{lefts(chart.level[1]):.1f}H{x.end:.1f}"/>')
    for number, series in enumerate(chart.series, start=1):  # under all lines
        parts += _intervals(series, number, x, lefts)
    for number, series in sorted(enumerate(chart.series, start=1), key=lambda pair: pair[1].marked):
        y = rights if series.second and rights is not None else lefts
        parts += _line(series, number, x, y, chart.axis_of(series))
    return "\n".join([*parts, "</svg>"])


def _layout(chart: Chart, width: float, height: float, alone: bool) -> tuple[Scale, Scale, Scale | None, float]:
    """Scales of steps, left and right axis, and the upper end of the lines' area."""
    rows = 1 + max((row for row, _, _ in legend_places(_named(chart), width)), default=-1)
    top, bottom = head(alone=alone) + rows * ROW + ROW + 13, height - 2 * ROW - 4

    def fit(axis: Axis, *, second: bool) -> Scale:
        lines = [series for series in chart.series if series.second is second]
        values = [value for series in lines for _, value in series.known]
        values += [end for series in lines for _, *ends in series.intervals for end in ends]
        level = [] if second or chart.level is None else [chart.level[1]]
        return scale(axis, values + level, bottom, top)

    lefts = fit(chart.axis, second=False)
    rights = None if chart.second is None else fit(chart.second, second=True)
    steps = [step for series in chart.series for step, _ in series.points]
    before = PAD + 7 + _room(lefts)
    after = PAD + 7 + _room(rights) if rights is not None else 20.0
    wanted = 6 if width < 500 else 10
    along = (doubling_scale if chart.doubling else steps_scale)(steps, before, width - after, wanted=wanted)
    return along, lefts, rights, top


def _room(of: Scale) -> float:
    return max(len(label) for _, label in of.ticks) * LETTER


def _named(chart: Chart) -> list[str]:
    """Everything that the legend names."""
    return [series.name for series in chart.series] + ([] if chart.level is None else [chart.level[0]])


def _legend(chart: Chart, width: float, *, first_row: float) -> Iterator[str]:
    for number, (row, place, name) in enumerate(legend_places(_named(chart), width), start=1):
        y = first_row + (row + 0.75) * ROW
        kind = _kind(chart.series[number - 1], number) if number <= len(chart.series) else "level"
        yield f'<path class="{kind}" d="M{place:.1f},{y - 4.5:.1f}h{SWATCH - 7:g}"/>'
        yield text(place + SWATCH, y, name, "legend")


def _line(series: Series, number: int, x: Scale, y: Scale, axis: Axis) -> Iterator[str]:
    """A path with a piece for every stretch without a gap; what stands alone between gaps is a dot."""
    pieces, dots = [], []
    for whole, run in groupby(series.points, key=lambda point: point[1] is not None and axis.holds(point[1])):
        if whole:
            places = [f"{x(step):.1f},{y(value):.1f}" for step, value in run if value is not None]
            pieces.append("M" + "L".join(places))
            dots += places if series.marked or len(places) == 1 else []
    yield f'<path class="{_kind(series, number)}" d="{"".join(pieces)}"/>'
    for place in dots:
        cx, _, cy = place.partition(",")
        yield f'<circle class="dot s{number}" cx="{cx}" cy="{cy}" r="3"/>'


def _intervals(series: Series, number: int, x: Scale, y: Scale) -> Iterator[str]:
    for step, low, high in series.intervals:
        yield f'<path class="interval s{number}" d="M{x(step):.1f},{y(low):.1f}V{y(high):.1f}"/>'


def _kind(series: Series, number: int) -> str:
    return f"line s{number}{' marked' if series.marked else ''}"


def _in_words(series: Series, axis: Axis, along: str) -> str:
    known = series.known
    (first, began), (last, ended) = known[0], known[-1]
    if len(known) == 1:
        return f"{series.name}: {axis.write(began)} at {along} {first:g}."
    (at_low, low), (at_high, high) = min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])
    return (
        f"{series.name}: {axis.write(began)} at {along} {first:g}, {axis.write(ended)} at {along} {last:g}; "
        f"lowest {axis.write(low)} ({along} {at_low:g}), highest {axis.write(high)} ({along} {at_high:g})."
    )


def table(chart: Chart) -> list[list[str]]:
    """The chart's numbers: a row per step, a column per line; the first row is the heading."""
    columns: Sequence[dict[float, float | None]] = [dict(series.points) for series in chart.series]
    steps = sorted({step for column in columns for step in column})
    rows = [[chart.along, *(series.name for series in chart.series)]]
    for step in steps:
        row = [f"{step:g}"]
        for series, column in zip(chart.series, columns, strict=True):
            value = column.get(step)
            row.append("" if value is None else chart.axis_of(series).write(value))
        rows.append(row)
    return rows
