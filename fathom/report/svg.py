"""What all pictures of a report share: their frame, their type, their colours."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from unicodedata import combining, east_asian_width

from fathom.report.visible import visible

LETTER = 7.6
"""A letter's mean width in the size of type that `chart.css` sets."""
ROW = 19.0
"""From one line of type to the next."""
PAD = 14.0
SWATCH = 26.0
"""A legend's piece of colour, with the gap after it."""
COLOURS = 5
"""That `chart.css` has for lines and bars."""
_TITLE = 16 / 13
"""How much larger a title is."""
_WIDE = 13 / LETTER
"""Letters that a sign of Chinese or Japanese is as wide as."""


def frame(identity: str, title: str, description: str, width: float, height: float, *, alone: bool) -> list[str]:
    """The beginning of an `<svg>` element, with its title and what it shows in words; with `alone`, as a file that
    brings its title, colours and ground along."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-labelledby="{identity}-title" aria-describedby="{identity}-desc">',
        f'<title id="{identity}-title">{escape(visible(title))}</title>',
        f'<desc id="{identity}-desc">{escape(visible(description))}</desc>',
    ]
    if alone:
        style = Path(__file__).with_name("chart.css").read_text(encoding="utf-8")
        parts += [f"<style>{style}</style>", f'<rect class="ground" width="{width:g}" height="{height:g}"/>']
        parts.append(text(PAD, ROW + 3, clipped(title, (width - 2 * PAD) / _TITLE), "title"))
    return parts


def head(*, alone: bool) -> float:
    """What the title takes of a file; on a page the title is the page's."""
    return ROW + 12 if alone else 2.0


def legend_places(names: Sequence[str], width: float) -> list[tuple[int, float, str]]:
    """Row, place in it and name of everything that a legend names, which is nothing where there is one thing."""
    row, place, found = 0, PAD, []
    for name in names if len(names) > 1 else ():
        shown = clipped(name, width - 2 * PAD - SWATCH)
        needed = SWATCH + length(shown)
        if place > PAD and place + needed > width - PAD:
            row, place = row + 1, PAD
        found.append((row, place, shown))
        place += needed + 16
    return found


def length(words: str) -> float:
    """About the room that they take."""
    return LETTER * sum(_letters(sign) for sign in words)


def clipped(words: str, room: float) -> str:
    """As much of them as has room."""
    if length(words) <= room:
        return words
    kept, left = 0, room - LETTER
    for sign in words:
        left -= LETTER * _letters(sign)
        if left < 0:
            break
        kept += 1
    return f"{words[:kept]}…"


def _letters(sign: str) -> float:
    return 0.0 if combining(sign) else _WIDE if east_asian_width(sign) in "WF" else 1.0


def text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    """One line of type."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(visible(words))}</text>'
