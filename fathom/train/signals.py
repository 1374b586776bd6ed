"""SIGTERM and Ctrl-C: the first asks, the second ends."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM is what Ctrl-C is, a `KeyboardInterrupt`, so that what was begun is taken away in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Stopped(Exception):
    """What was under way has been given up, because a signal asked for it."""


class StopRequest:
    """Inside this context the first SIGTERM or SIGINT only sets `asked`; a second one ends the process at once.

    What a second one cuts short is harmless: checkpoints appear whole or not at all. Outside the main thread, where
    Python allows no signal handlers, nothing is installed and `asked` stays false.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def heed(self) -> None:
        """Raise `Stopped` where that was asked for: to be called, from any thread, where work may be given up."""
        if self.asked:
            raise Stopped

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        # Not through a stream: the signal may have come in the middle of a write to it.
        cause = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        os.write(2, f"\nstopping ({cause}): saving what is learnt; once more to stop at once\n".encode())
