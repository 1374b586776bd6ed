"""Charts: what is drawn is what was measured, for eyes and for screen readers."""

import re
from xml.etree import ElementTree

from fathom.report.axis import Axis
from fathom.report.bars import Bars, draw_bars
from fathom.report.chart import Chart, Series, draw, table

SVG = "{http://www.w3.org/2000/svg}"


def _chart(*series: Series, **settings) -> Chart:
    return Chart("c", "A <title> & more", series, settings.pop("axis", Axis("value")), **settings)


def _paths(svg: str) -> list[str]:
    return [
        path.get("d", "") for path in ElementTree.fromstring(svg).iter(f"{SVG}path") if path.get("class") == "line s1"
    ]


def test_a_gap_is_not_bridged() -> None:
    """A value that is missing splits the line; one that stands alone between two gaps is a dot."""
    line = Series("a", ((0, 1.0), (1, 2.0), (2, None), (3, 4.0), (4, None), (5, 1.0), (6, 2.0)))
    svg = draw(_chart(line))
    (path,) = _paths(svg)
    assert path.count("M") == 3
    assert path.count("L") == 2
    assert svg.count("<circle") == 1


def test_what_a_logarithm_has_no_place_for_is_a_gap() -> None:
    """Zero on an axis of powers of ten is left out, and the rest is drawn."""
    line = Series("a", ((0, 1e-3), (1, 0.0), (2, 1e-5), (3, 1e-4)))
    (path,) = _paths(draw(_chart(line, axis=Axis("value", log=True))))
    assert path.count("M") == 2


def test_each_line_is_read_off_its_own_axis() -> None:
    """Equal heights on the page mean different values where a line belongs to the right-hand axis."""
    left = Series("a", ((0, 0.0), (1, 1.0)))
    right = Series("b", ((0, 0.0), (1, 500.0)), second=True)
    svg = draw(_chart(left, right, second=Axis("tokens", least=0)))
    drawn = re.findall(r'class="line s[12]" d="(M[^"]+L[^"]+)"', svg)
    assert len(drawn) == 2
    assert drawn[0] == drawn[1]
    assert ">500</text>" in svg


def test_everything_lies_inside_the_picture() -> None:
    """No point and no text begins outside the view box, with long names and large numbers too."""
    lines = tuple(Series(f"a rather long name {k}", ((0, -4e6 * k), (10**6, 9e6))) for k in range(1, 6))
    for width in (400, 720):
        root = ElementTree.fromstring(draw(_chart(*lines), width=width))
        for text in root.iter(f"{SVG}text"):
            x, room = float(text.get("x", "nan")), 7.5 * len(text.text or "")
            first = x - {"start": 0.0, "middle": room / 2, "end": room}[text.get("text-anchor", "start")]
            assert first >= -1
            assert first + room <= width + 8
            assert 0 < float(text.get("y", "nan")) < 250


def test_a_chart_speaks() -> None:
    """Title and description are elements that the picture refers to, escaped, with first, last and extreme values."""
    line = Series("a", ((0, 0.5), (20, 0.25), (40, 0.75)))
    root = ElementTree.fromstring(draw(_chart(line, axis=Axis("value", percent=True))))
    named = {element.get("id"): element.text for element in root}
    assert named[root.get("aria-labelledby")] == "A <title> & more"
    said = named[root.get("aria-describedby")]
    assert said == "a: 50 % at step 0, 75 % at step 40; lowest 25 % (step 20), highest 75 % (step 40)."


def test_the_table_has_every_number() -> None:
    """A row for each step of any line, empty where a line has no value there."""
    chart = _chart(Series("a", ((0, 1.0), (1, None))), Series("b", ((1, 2.0), (2, 3.0)), second=True), second=Axis("x"))
    assert table(chart) == [["step", "a", "b"], ["0", "1", ""], ["1", "", "2"], ["2", "", "3"]]


def test_a_file_of_its_own_brings_its_colours() -> None:
    """Alone, a chart has a style for light and dark; on a page it has none and uses the page's."""
    line = Series("a", ((0, 1.0), (1, 2.0)))
    assert "prefers-color-scheme: dark" in draw(_chart(line), alone=True)
    assert "<style>" not in draw(_chart(line))


def test_a_bar_is_as_long_as_its_share() -> None:
    """Half of all is a bar of half the track's length; what is above all is no longer than the track."""
    root = ElementTree.fromstring(draw_bars(Bars("p", "Probe", (("half", 0.5), ("more", 1.2)))))
    length = {kind: [float(r.get("width", "nan")) for r in root.iter(f"{SVG}rect") if r.get("class") == kind]
              for kind in ("track", "bar")}  # fmt: skip
    assert length["bar"] == [length["track"][0] / 2, length["track"][1]]
