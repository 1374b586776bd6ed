"""Numbers and ticks as a person reads them."""

import math
import random

import pytest

from fathom.report.axis import Axis, plain, scale, steps_scale


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"),
        (0.5322, "0.532"),
        (-0.25, "−0.25"),
        (1835.4, "1,835"),
        (0.0002, "2 × 10⁻⁴"),
        (0.00099999, "1 × 10⁻³"),
        (-3.4e-9, "−3.4 × 10⁻⁹"),
        (12_345_678.0, "1.23 × 10⁷"),
    ],
)
def test_a_number_is_short(value: float, said: str) -> None:
    """Three digits, thousands whole, the very small and large as powers of ten, and never '10 × 10'."""
    assert plain(value) == said


@pytest.mark.parametrize("axis", [Axis("a"), Axis("a", log=True), Axis("a", percent=True, least=0, most=1)])
def test_every_value_lies_on_the_axis(axis: Axis) -> None:
    """Whatever the values are, they are on the page, in their order, and the labels of ticks differ."""
    draw = random.Random(5)
    for _ in range(300):
        values = [10 ** draw.uniform(-9, 9) for _ in range(draw.randint(1, 5))]
        if axis.percent:
            values = [draw.uniform(-0.2, 1.3) for _ in values]
        found = scale(axis, values, 200, 20)
        places = [found(value) for value in sorted(values)]
        assert all(20 - 1e-6 <= place <= 200 + 1e-6 for place in places)
        assert places == sorted(places, reverse=True)
        labels = [label for _, label in found.ticks]
        assert 2 <= len(labels) == len(set(labels)) <= 14


def test_a_flat_line_has_an_axis() -> None:
    """Equal values, zeros too, do not make an axis of no length."""
    for axis in (Axis("a"), Axis("a", least=0)):
        for value in (0.0, 3.0, -2.0):
            assert math.isfinite(scale(axis, [value, value], 200, 20)(value))
    assert scale(Axis("a", log=True), [10.0], 200, 20)(10.0) == pytest.approx(200)
    nothing = scale(Axis("a", percent=True, least=0), [0.0, 0.0], 200, 20)
    assert [label for _, label in nothing.ticks] == ["0.0 %", "0.2 %", "0.4 %", "0.6 %", "0.8 %", "1.0 %"]


def test_a_logarithmic_axis_leaves_no_decade_empty() -> None:
    """However many decades there are, values reach into the lowest and the highest one."""
    for decades in range(1, 30):
        found = scale(Axis("a", log=True), [2e-9, 2e-9 * 10.0 ** (decades - 1)], 200, 20)
        assert found.low == pytest.approx(1e-9)
        assert found.high == pytest.approx(1e-9 * 10.0**decades)
        assert 2 <= len(found.ticks) <= 7


def test_steps_are_whole_numbers() -> None:
    """A run of two steps has no tick at a step and a half, and a run of one step has a place for it."""
    assert [label for _, label in steps_scale([0, 2], 0, 100).ticks] == ["0", "1", "2"]
    assert steps_scale([7, 7], 0, 100)(7) == pytest.approx(50)
    assert [label for _, label in steps_scale([0, 60_000], 0, 100).ticks][1:3] == ["10 k", "20 k"]
