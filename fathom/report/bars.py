"""A few shares side by side, as horizontal bars with their numbers written behind them."""

from dataclasses import dataclass
from html import escape

from fathom.report.axis import plain

BAR, GAP, NAME_ROW = 18.0, 16.0, 20.0


@dataclass(frozen=True)
class Bars:
    """Named shares of 1."""

    name: str
    """Of letters and dashes, for identifiers: no other figure of the page has it."""
    title: str
    shares: tuple[tuple[str, float], ...]

    def describe(self) -> str:
        """The figure in words."""
        return "; ".join(f"{name}: {plain(100 * share)} %" for name, share in self.shares) + "."


def draw_bars(bars: Bars, *, width: float = 360) -> str:
    """One `<svg>` element: a name above each bar, the number behind it, the whole width being 100 %."""
    full = width - 28 - 60
    height = len(bars.shares) * (NAME_ROW + BAR + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-labelledby="{bars.name}-title" aria-describedby="{bars.name}-desc">',
        f'<title id="{bars.name}-title">{escape(bars.title)}</title>',
        f'<desc id="{bars.name}-desc">{escape(bars.describe())}</desc>',
    ]
    for place, (name, share) in enumerate(bars.shares):
        y = place * (NAME_ROW + BAR + GAP) + NAME_ROW
        length = full * min(max(share, 0.0), 1.0)
        parts += [
            f'<text class="legend" x="14" y="{y - 6:g}">{escape(name)}</text>',
            f'<rect class="track" x="14" y="{y:g}" width="{full:g}" height="{BAR:g}"/>',
            f'<rect class="bar" x="14" y="{y:g}" width="{length:.1f}" height="{BAR:g}"/>',
            f'<text class="legend" x="{full + 22:g}" y="{y + BAR - 4:g}">{plain(100 * share)} %</text>',
        ]
    return "\n".join([*parts, "</svg>"])
