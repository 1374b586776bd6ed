"""What a person sees while a run goes on: a bar and a line on a terminal, now and then a line elsewhere.

A run may be a part of something larger, which then has a bar of its own above the run's. Trainers need not know:
whoever runs them says so around them, with `part_of`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 10.0
"""Where there is no terminal."""
SECONDS_BETWEEN_LINES_OF_A_PART = 30.0
BAR_WIDTH = 16
ALWAYS = ("step", "loss", "reward", "tokens_per_second", "left")
"""What a narrow terminal keeps of a step's line, dearest first."""


class Whole(Protocol):
    """What a run is a part of."""

    def moved(self, share: float) -> None:
        """The part that is under way has come so far, of 1."""

    def share(self) -> float:
        """How far the whole has come, of 1."""

    def words(self) -> str:
        """Which part it is, and the time left for the whole, where that is known."""


_WHOLE: ContextVar[Whole | None] = ContextVar("whole", default=None)


@contextmanager
def part_of(whole: Whole) -> Iterator[None]:
    """Inside, whatever runs is a part of `whole`."""
    before = _WHOLE.set(whole)
    try:
        yield
    finally:
        _WHOLE.reset(before)


def is_part() -> bool:
    """Whether what runs here is a part of something larger: it is then told in few lines."""
    return _WHOLE.get() is not None


class Display:
    """Shows progress on `console`. Use as a context."""

    def __init__(self, console: Console, *, total: int, done: int, unit: str = "step") -> None:
        """`total` steps, or whatever `unit` calls them, of which `done` were made before this session."""
        self._console, self._total, self._first, self._unit = console, total, done, unit
        self._live = Progress(BarColumn(bar_width=BAR_WIDTH), TextColumn("{task.description}"), console=console)
        self._whole = _WHOLE.get()
        if self._whole is not None:
            self._above = self._live.add_task(escape(self._whole.words()), total=1.0, completed=self._whole.share())
        self._task = self._live.add_task("", total=total, completed=done)
        self._began: float | None = None
        self._printed = float("-inf") if self._whole is None else time.monotonic()
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, line: str) -> None:
        """One line that stays."""
        self._console.print(escape(line), highlight=False, soft_wrap=True)

    def advise(self, line: str) -> None:
        """The same, of what to do with this run; of a part that is not said, for the whole is what is run again."""
        if self._whole is None:
            self.say(line)

    def say_once(self, matter: str, line: str) -> None:
        """The same, where nothing has been said of this `matter` before."""
        if matter not in self._said:
            self._said.add(matter)
            self.say(line)

    def step(self, step: int, values: dict[str, Any]) -> None:
        """After each step, with its training metrics."""
        parts = {"step": f"{self._unit} {step}/{self._total}", **_words(values)}
        now = time.monotonic()
        if self._began is None:
            # The first step of a session compiles and warms up: time left is counted from its end.
            self._began, self._first = now, step
        elif step < self._total:
            left = (now - self._began) / (step - self._first) * (self._total - step)
            parts["left"] = f"{_duration(left)} left"
        if self._whole is not None:
            self._whole.moved(step / self._total)
        if self._console.is_terminal:
            text = _fit(parts, self._console.width - BAR_WIDTH - 1)
            self._live.update(self._task, completed=step, description=escape(text))
            if self._whole is not None:
                above = {"completed": self._whole.share(), "description": escape(self._whole.words())}
                self._live.update(self._above, **above)
        elif self._whole is not None:
            if now - self._printed >= SECONDS_BETWEEN_LINES_OF_A_PART:
                self._printed = now
                self.say(_GAP.join([self._whole.words(), *parts.values()]))
        elif now - self._printed >= SECONDS_BETWEEN_LINES or step == self._total:
            self._printed = now
            self.say(_GAP.join(parts.values()))


def describe(values: dict[str, Any]) -> str:
    """Metrics as words, in a fixed order; what was not measured is left out."""
    return _GAP.join(_words(values).values())


def share_of_peak(share: float) -> str:
    """A share of the measured peak. Above 1 it says what that means: the peak was measured while others computed."""
    return f"{share:.0%} of {'a peak measured while the machine was busy' if share > 1 else 'peak'}"


_GAP = "  "


def _fit(parts: dict[str, str], width: int) -> str:
    """As many of `parts` as `width` characters hold: those of `ALWAYS` first, then the others in their order."""
    kept: set[str] = set()
    room = width + len(_GAP)
    for name in (*ALWAYS, *(name for name in parts if name not in ALWAYS)):
        needed = len(parts.get(name, "")) + len(_GAP)
        if name in parts and needed <= room:
            kept.add(name)
            room -= needed
    return _GAP.join(text for name, text in parts.items() if name in kept)


def _words(values: dict[str, Any]) -> dict[str, str]:
    formats = {
        "loss": "loss {:.3f}".format,
        "bits_per_byte": "{:.3f} bits/byte".format,
        "tokens_per_second": "{:,.0f} tokens/s".format,
        "gemm_share": share_of_peak,
        "max_vio": "MaxVio {:.2f}".format,
        "mtp_loss": "MTP loss {:.3f}".format,
        "mtp_acceptance": "MTP accepts {:.0%}".format,
        "ema_loss": "averaged weights {:.3f}".format,
        "pass@1": "pass@1 {:.3f}".format,
        "reward": "reward {:.3f}".format,
        "accuracy": "accuracy {:.2f}".format,
        "thought_tokens": "{:.0f} tokens of thought".format,
        "truncated": "{:.0%} cut off".format,
        "kl_sampler": "engine gap {:.1e}".format,
        "entropy": "entropy {:.2f}".format,
        "level": "level {:.0f}".format,
    }
    return {key: write(values[key]) for key, write in formats.items() if values.get(key) is not None}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
