"""What a run has measured, as lines over steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fathom.errors import UserError
from fathom.report.chart import Point, Series
from fathom.train.metrics import read_metrics

POINTS = 240
"""More of them a chart cannot show, nor anybody read in its table."""

Kind = Literal["train", "eval"]


@dataclass(frozen=True)
class Measurements:
    """The lines of a run's `metrics.jsonl`, in the order of their steps."""

    train: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, file: Path) -> "Measurements":
        """Nothing where there is no file yet. Raises `UserError` for one that cannot be read, and for a bad line."""
        try:
            lines = sorted(read_metrics(file) if file.exists() else [], key=lambda line: line["step"])
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
        return cls(
            tuple(line for line in lines if line["kind"] == "train"),
            tuple(line for line in lines if line["kind"] == "eval"),
        )

    @property
    def step(self) -> int:
        """The last step that was measured."""
        return max((line["step"] for line in (*self.train, *self.evaluations)), default=0)

    @property
    def stride(self) -> int:
        """Steps of training that a point of a line stands for."""
        return max(1, math.ceil(len(self.train) / POINTS))

    def line(self, kind: Kind, key: str, name: str, *, second: bool = False) -> Series:
        """The values of `key`; those of training as means over `stride` steps, at the last of them."""
        lines = self.train if kind == "train" else self.evaluations
        points: list[Point] = [(line["step"], number(line.get(key))) for line in lines]
        if kind == "train":
            parts = [points[start : start + self.stride] for start in range(0, len(points), self.stride)]
            points = [(part[-1][0], _mean([value for _, value in part])) for part in parts]
        return Series(name, tuple(points), marked=kind == "eval", second=second)

    def total(self, kind: Kind, key: str) -> float:
        """The sum of `key` over all lines that have it."""
        lines = self.train if kind == "train" else self.evaluations
        return sum(value for line in lines if (value := number(line.get(key))) is not None)

    def latest(self, prefix: str) -> dict[str, float]:
        """What the keys that begin with `prefix` were when they were last measured, by the rest of the key."""
        found: dict[str, float] = {}
        for line in self.evaluations:
            for key, value in line.items():
                if key.startswith(prefix) and (known := number(value)) is not None:
                    found[key.removeprefix(prefix)] = known
        return found


def number(value: Any) -> float | None:
    """A measured value; None for what is missing, not finite or no number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    return None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
