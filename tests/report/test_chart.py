"""Charts: what is drawn is what was measured, for eyes and for screen readers."""

import re
from itertools import pairwise
from unicodedata import combining, east_asian_width
from xml.etree import ElementTree

import pytest

from fathom.report.axis import Axis
from fathom.report.bars import Bars, Share, draw_bars, table_of_bars
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


def _length(words: str) -> float:
    """Of Latin letters 7 units, of Chinese ones 13, and of what stands above others nothing."""
    return sum(0 if combining(sign) else 13 if east_asian_width(sign) in "WF" else 7 for sign in words)


@pytest.mark.parametrize("name", ["n" * 200, "很长的名字" * 30, "e\u0301" * 40, "مهمة" * 40])
def test_names_in_any_writing_end_inside_the_picture(name: str) -> None:
    """Titles, legends and the names of bars: a Chinese sign takes the room of almost two letters, an accent none."""
    line = Series(name, ((0, 1.0), (1, 2.0)))
    chart = Chart("c", name, (line, Series("b", line.points)), Axis("value"))
    bars = Bars("b", name, ((name, (Share(0.1), Share(0.9))),), (name, "b"))
    for width in (360, 720):
        for svg in (draw(chart, width=width, alone=True), draw_bars(bars, width=width, alone=True)):
            root = ElementTree.fromstring(svg)
            for text in root.iter(f"{SVG}text"):
                if text.get("text-anchor") == "start" and (text.text or "").startswith(name[:4]):
                    larger = 16 / 13 if text.get("class") == "title" else 1
                    assert float(text.get("x", "nan")) + larger * _length(text.text or "") <= width
    assert name[:80] in draw(Chart("c", name[:80], (line,), Axis("value")), width=1400, alone=True)


def test_a_picture_is_xml_whatever_its_names_are() -> None:
    """Control characters, halves of characters and mark-up in a name."""
    name = "\x00\x1b[31m\ud83d\uffff</text><script>"
    for svg in (
        draw(Chart("c", name, (Series(name, ((0, 1.0), (1, 2.0))),), Axis("value")), alone=True),
        draw_bars(Bars("b", name, ((name, (Share(0.5),)),)), alone=True),
    ):
        assert not [element for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("script")]
        assert "␀␛[31m\ufffd\ufffd&lt;/text&gt;" in svg
        svg.encode()


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


def _widths(svg: str, kind: str) -> list[float]:
    return [
        float(r.get("width", "nan")) for r in ElementTree.fromstring(svg).iter(f"{SVG}rect") if r.get("class") == kind
    ]


def test_a_bar_is_as_long_as_its_share() -> None:
    """Half of all is a bar of half the length of all; what is above all is no longer than that."""
    bars = Bars("p", "Probe", (("half", (Share(0.5),)), ("all", (Share(1.0),)), ("more", (Share(1.2),))))
    half, whole, more = _widths(draw_bars(bars), "bar s1")
    assert half == whole / 2
    assert more == whole


def test_bars_of_several_series_lie_under_one_another() -> None:
    """Each in its own colour, which the legend names; what was not measured has no bar and an empty cell."""
    bars = Bars("p", "Two", (("a", (Share(0.5), Share(0.25))), ("b", (None, Share(1.0)))), ("one", "two"))
    for width in (360, 720):
        svg = draw_bars(bars, width=width)
        assert len(_widths(svg, "bar s1")) == 1 + 1
        assert len(_widths(svg, "bar s2")) == 2 + 1
    assert table_of_bars(bars) == [["", "one", "two"], ["a", "50.0 %", "25.0 %"], ["b", "", "100.0 %"]]
    assert "a: one 50.0 %, two 25.0 %; b: two 100.0 %." in draw_bars(bars)


def test_a_whisker_spans_its_interval() -> None:
    """From the lower to the upper end, on the scale of the bar."""
    svg = draw_bars(Bars("p", "One", (("a", (Share(0.5, 0.25, 1.0),)), ("b", (Share(1.0),)))))
    (whisker,) = (path for path in ElementTree.fromstring(svg).iter(f"{SVG}path") if path.get("class") == "whisker")
    low, high = map(float, re.match(r"M([\d.]+),[\d.]+H([\d.]+)", whisker.get("d", "")).groups())
    assert high - low == pytest.approx(0.75 * _widths(svg, "bar s1")[1], abs=0.2)
    assert "50.0 % (25.0–100.0)" in svg


def test_names_and_numbers_of_bars_lie_inside() -> None:
    """Above a narrow bar or beside a wide one, a name ends before the picture or the bar begins; numbers have room."""
    bars = Bars("p", "Names", (("n" * 90, (Share(0.1),)), ("short", (Share(1.0, 0.99, 1.0),))))
    for width in (360, 720):
        root = ElementTree.fromstring(draw_bars(bars, width=width))
        for text in root.iter(f"{SVG}text"):
            if text.get("text-anchor") == "start":
                assert float(text.get("x", "nan")) + 7.2 * len(text.text or "") <= width
        left = float(next(root.iter(f"{SVG}rect")).get("x", "nan"))
        if width == 720:
            name = next(text for text in root.iter(f"{SVG}text") if "nnn" in (text.text or ""))
            assert 14 + 7.6 * len(name.text or "") <= left


def test_doublings_take_the_same_room() -> None:
    """1, 2, 4, 8 and 16 stand at equal distances, and are the ticks."""
    line = Series("a", tuple((2**power, power / 4) for power in range(5)), marked=True)
    root = ElementTree.fromstring(draw(_chart(line, doubling=True)))
    places = [float(dot.get("cx", "nan")) for dot in root.iter(f"{SVG}circle")]
    assert {round(after - before, 0) for before, after in pairwise(places)} == {round(places[1] - places[0], 0)}
    assert {"1", "2", "4", "8", "16"} <= {text.text for text in root.iter(f"{SVG}text")}
