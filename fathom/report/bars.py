"""Shares side by side, as horizontal bars with their numbers written behind them and strokes for their intervals."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fathom.report.svg import PAD, ROW, SWATCH, clipped, frame, head, legend_places, length, text

GAP = 14.0
"""Between one name's bars and the next one's."""
NUMBER = 58.0
"""Room behind the longest bar for its number."""
BESIDE = 600.0
"""From this width on names stand before their bars, else above them."""
_MARKS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Share:
    """A share of 1."""

    value: float
    low: float | None = None
    high: float | None = None
    """From where to where it may lie."""

    @classmethod
    def of(cls, estimate: Mapping[str, float]) -> "Share":
        """As an evaluation's JSON has it."""
        return cls(estimate["value"], estimate["low"], estimate["high"])

    @property
    def end(self) -> float:
        """Where its picture ends."""
        return max(self.value, self.high or 0.0)

    def write(self) -> str:
        """For a person: the share, and its interval, which is not symmetric near 0 and 1."""
        interval = "" if self.low is None or self.high is None else f" ({100 * self.low:.1f}–{100 * self.high:.1f})"
        return f"{100 * self.value:.1f} %{interval}"


@dataclass(frozen=True)
class Bars:
    """Named shares."""

    name: str
    """Of letters, digits and dashes, for identifiers: no other figure of the page has it."""
    title: str
    rows: tuple[tuple[str, tuple[Share | None, ...]], ...]
    """A name, and its share for each of `series`; None where it was not measured."""
    series: tuple[str, ...] = ("share",)

    def describe(self) -> str:
        """The figure in words."""
        return "; ".join(f"{name}: {', '.join(self._said(shares))}" for name, shares in self.rows) + "."

    def _said(self, shares: tuple[Share | None, ...]) -> Iterator[str]:
        for series, share in zip(self.series, shares, strict=True):
            if share is not None:
                yield share.write() if len(self.series) == 1 else f"{series} {share.write()}"


def draw_bars(bars: Bars, *, width: float = 360, alone: bool = False) -> str:
    """One `<svg>` element; the whole width of a bar is 100 %."""
    beside = width >= BESIDE
    thick = 18.0 if len(bars.series) == 1 else 15.0
    left = min(PAD + max(length(name) for name, _ in bars.rows) + 10, width / 3) if beside else PAD
    full = width - left - PAD - NUMBER
    room = left - PAD - 8 if beside else full
    inner = 0 if beside else ROW
    row = inner + thick * len(bars.series) + GAP
    legend = legend_places(bars.series, width)
    top = head(alone=alone) + (ROW * (1 + legend[-1][0]) + 4 if legend else 0) + GAP / 2
    bottom = top + len(bars.rows) * row
    identity, height = f"{bars.name}-{width:g}", bottom + ROW
    parts = frame(identity, bars.title, bars.describe(), width, height, alone=alone)
    for number, (line, x, name) in enumerate(legend, start=1):
        y = head(alone=alone) + line * ROW
        parts.append(f'<rect class="bar s{number}" x="{x:.1f}" y="{y + 4:.1f}" width="{SWATCH - 7:g}" height="12"/>')
        parts.append(text(x + SWATCH, y + 14.5, name, "legend"))
    for mark in _MARKS:
        x = left + mark * full
        parts.append(f'<path class="grid" d="M{x:.1f},{top:.1f}V{bottom:.1f}"/>')
        parts.append(text(x, bottom + ROW - 5, f"{100 * mark:.0f} %", "tick", "middle"))
    for place, (name, shares) in enumerate(bars.rows):
        y = top + place * row + inner
        middle = y + thick * len(shares) / 2
        parts.append(text(PAD, middle + 4.5 if beside else y - 5, clipped(name, room), "legend"))
        for number, share in enumerate(shares, start=1):
            if share is not None:
                parts += _bar(share, number, left, y + (number - 1) * thick, full, thick)
    return "\n".join([*parts, "</svg>"])


def table_of_bars(bars: Bars) -> list[list[str]]:
    """The figure's numbers: a row for each name, a column for each series; the first row is the heading."""
    rows = [["", *bars.series]]
    return rows + [[name, *("" if share is None else share.write() for share in shares)] for name, shares in bars.rows]


def _bar(share: Share, number: int, left: float, y: float, full: float, thick: float) -> Iterator[str]:
    def at(value: float) -> float:
        return left + full * min(max(value, 0.0), 1.0)

    middle = y + thick / 2
    yield (
        f'<rect class="bar s{number}" x="{left:.1f}" y="{y + 1:.1f}" width="{at(share.value) - left:.1f}" '
        f'height="{thick - 2:.1f}"/>'
    )
    if share.low is not None and share.high is not None:
        low, high = at(share.low), at(share.high)
        ends = "".join(f"M{x:.1f},{middle - 4:.1f}v8" for x in (low, high))
        yield f'<path class="whisker" d="M{low:.1f},{middle:.1f}H{high:.1f}{ends}"/>'
    yield text(at(share.end) + 7, middle + 4.5, f"{100 * share.value:.1f} %", "legend")
