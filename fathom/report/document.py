"""What all pages have in common: one HTML file that needs no network and no JavaScript.

What a model has written is hostile text: templates escape everything (Jinja's autoescape), the page's own policy
forbids scripts, and control characters are made visible.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from fathom.report.bars import Bars, draw_bars, table_of_bars
from fathom.report.chart import Chart, draw, table
from fathom.report.visible import visible

WIDE = {"width": 720.0, "height": 340.0}
"""A headline figure where there is room, and in a file of its own."""


def render(template: str, **values: Any) -> str:
    """A page."""
    return visible(_environment().get_template(template).render(**values))


def picture(of: Chart | Bars, *, wide: bool = False, alone: bool = False) -> str:
    """The figure as one `<svg>` element; with `alone`, as a file of its own."""
    if isinstance(of, Bars):
        return draw_bars(of, width=WIDE["width"] if wide else 360, alone=alone)
    return draw(of, **(WIDE if wide else {}), alone=alone)


def share(value: float | None) -> str:
    """A share of 1 as per cent."""
    return "–" if value is None else f"{100 * value:.1f} %"


@cache
def _environment() -> Environment:
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": share, "prose": _prose}
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    styles = "\n".join((here / name).read_text(encoding="utf-8") for name in ("page.css", "chart.css"))
    environment.globals |= {
        "styles": Markup(styles),
        "draw": lambda of: Markup(picture(of)),
        "draw_wide": lambda of: Markup(picture(of, wide=True)),
        "table": lambda of: table_of_bars(of) if isinstance(of, Bars) else table(of),
    }
    return environment


def _prose(docstring: str) -> Markup:
    """A field's docstring; what stands in backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(docstring))))
