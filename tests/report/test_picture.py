"""Figures as PNG: what SVG shows in the light, in colours and type that need no browser."""

import re
import struct
import sys
from functools import partial
from pathlib import Path

import pytest
import resvg_py

from fathom.cli import main
from fathom.errors import UserError
from fathom.report.axis import Axis
from fathom.report.bars import Bars, Share, draw_bars
from fathom.report.chart import Chart, Series, draw
from fathom.report.picture import ZOOM, in_the_light, png_of
from tests.report import house

CHART = draw(
    Chart("c", "Title", (Series("a", ((0, 1.0), (1, 2.0))),), Axis("value")), width=720, height=340, alone=True
)
BARS = draw_bars(Bars("b", "Title", (("a", (Share(0.5, 0.4, 0.6),)),)), width=720, alone=True)


def test_words_stay_as_they_are() -> None:
    """A task may be called what a style is."""
    name = "var(--s1) --s2: red; @media"
    svg = draw_bars(Bars("b", name, ((name, (Share(0.5),)),)), width=720, alone=True)
    assert in_the_light(svg).count(name) == svg.count(name) > 1


@pytest.mark.parametrize("svg", [CHART, BARS])
def test_no_colour_is_left_to_a_browser(svg: str) -> None:
    """Every variable has the value that it has in the light, and dark is gone."""
    light = in_the_light(svg)
    assert "var(" not in light
    assert "--" not in light
    assert "@media" not in light
    ground = re.search(r"\.chart \.ground { fill: (#[0-9a-f]{6})", light)
    assert ground is not None
    assert ground[1] == "#ffffff"


def test_a_picture_is_twice_as_fine_as_it_is_large() -> None:
    """A PNG of the view box's size, times `ZOOM`, on a ground that is not transparent."""
    png = png_of(CHART)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", png[16:24]) == (720 * ZOOM, 340 * ZOOM)
    assert len(set(png)) > 50


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--out FILE.png` is the main figure, `--figure` another one, and a name that there is not is refused."""
    folder = house.build(tmp_path / "house")
    assert main(["report", str(folder), "--out", str(tmp_path / "a.png")]) == 0
    assert main(["report", str(folder), "--out", str(tmp_path / "b.png"), "--figure", "consensus"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/a.png\nwrote {tmp_path}/b.png\n"
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert main(["report", str(folder), "--out", str(tmp_path / "c.png"), "--figure", "nothing"]) == 2
    assert "there are: stages, distillation, consensus" in capsys.readouterr().err


def test_without_a_font_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than write a picture without type."""
    monkeypatch.setattr(resvg_py, "svg_to_bytes", partial(resvg_py.svg_to_bytes, skip_system_fonts=True))
    with pytest.raises(UserError, match="PNG needs a font"):
        png_of(CHART)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and only where a PNG is asked for."""
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"PNG needs .*pip install 'fathom-lm\[report\]'$"):
        png_of(CHART)
