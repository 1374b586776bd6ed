"""An axis: how its numbers are written, where its ticks stand, and where on the page a value lies."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """What is read off one side of a chart."""

    title: str
    percent: bool = False
    """Values are shares of 1 and are written as per cent."""
    log: bool = False
    """Powers of ten at equal distances; what is not above zero has no place."""
    least: float | None = None
    """The axis begins here or below."""
    most: float | None = None
    """The axis ends here or above."""

    def holds(self, value: float) -> bool:
        """Whether `value` has a place."""
        return value > 0 or not self.log

    def write(self, value: float) -> str:
        """`value` for a person, to about three digits."""
        return f"{plain(100 * value)} %" if self.percent else plain(value)


def plain(value: float) -> str:
    """Three significant digits, thousands whole, the very small and the very large as powers of ten."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e7):
        power = math.floor(math.log10(size))
        mantissa = f"{value / 10**power:.3g}"
        if mantissa.lstrip("-") == "10":  # what three digits have rounded up
            mantissa, power = mantissa.replace("10", "1"), power + 1
        return mantissa.replace("-", "−") + f" × 10{str(power).translate(_SUPERSCRIPTS)}"
    text = f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


@dataclass(frozen=True)
class Scale:
    """Values `low`…`high` along `start`…`end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]
    """Value and label of each."""
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where `value` lies."""
        return self.start + (self.end - self.start) * (self._of(value) - self._of(self.low)) / (
            self._of(self.high) - self._of(self.low)
        )

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value


def scale(axis: Axis, values: Iterable[float], start: float, end: float, *, wanted: int = 5) -> Scale:
    """A scale that holds all `values`, with about `wanted` ticks. It ends at ticks, if logarithmic at powers of ten."""
    held = [value for value in values if axis.holds(value)]
    if axis.log:
        lowest, highest = math.floor(math.log10(min(held))), math.ceil(math.log10(max(held)))
        highest += lowest == highest
        stride = max(1, math.ceil((highest - lowest) / wanted))
        powers = range(lowest, highest + 1, stride)
        ticks = tuple((10.0**power, f"10{str(power).translate(_SUPERSCRIPTS)}") for power in powers)
        return Scale(10.0**lowest, 10.0**highest, start, end, ticks, log=True)
    low = min([*held, *([] if axis.least is None else [axis.least])])
    high = max([*held, *([] if axis.most is None else [axis.most])])
    if low == high:
        margin = abs(low) / 2 or (0.01 if axis.percent else 1.0)
        low, high = (low - margin if low != axis.least else low), high + margin
    step = nice_step((high - low) / wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = [index * step for index in range(first, last + 1)]
    return Scale(places[0], places[-1], start, end, tuple(zip(places, _labels(places, step, axis), strict=True)))


def steps_scale(values: Sequence[float], start: float, end: float, *, wanted: int = 6) -> Scale:
    """A scale of whole numbers that ends with the data, not at a tick."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 1, high + 1
    step = max(1.0, nice_step((high - low) / wanted))
    places = [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Scale(low, high, start, end, tuple((place, _short(place)) for place in places))


def doubling_scale(values: Sequence[float], start: float, end: float, *, wanted: int = 6) -> Scale:
    """A scale on which each doubling takes the same room, with ticks at powers of two; of values from 1 up."""
    low, high = max(1.0, min(values)), max(2.0, *values)
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    places = powers[:: max(1, math.ceil(len(powers) / wanted))]
    return Scale(low, high, start, end, tuple((2.0**power, f"{2**power:,}") for power in places), log=True)


def nice_step(rough: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten at or above `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _labels(places: Sequence[float], step: float, axis: Axis) -> list[str]:
    """Labels of ticks, all with as many decimals as their distance needs."""
    factor = 100.0 if axis.percent else 1.0
    largest = max(abs(place) for place in places)
    if factor * largest < 1e-2 or largest >= 1e7:
        power = math.floor(math.log10(largest))
        decimals = max(0, power - math.floor(math.log10(step)))
        tail = f"×10{str(power).translate(_SUPERSCRIPTS)}"
        return ["0" if not place else f"{place / 10.0**power:.{decimals}f}{tail}".replace("-", "−") for place in places]
    decimals = max(0, -math.floor(math.log10(factor * step) + 1e-9))
    unit = " %" if axis.percent else ""
    written = [_short(place) if step >= 1000 else f"{factor * place:,.{decimals}f}" for place in places]
    return [f"{text}{unit}".replace("-", "−") for text in written]


def _short(place: float) -> str:
    """A whole number for a tick: thousands as k, millions as M where they are round."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(place) >= 10 * size and place % (size / 10) == 0:
            return f"{place / size:g} {letter}"
    return f"{place:,.0f}"
