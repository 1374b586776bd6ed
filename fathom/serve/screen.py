"""What a conversation looks like in a terminal, and what of it goes down a pipe.

At a terminal thoughts and figures are dimmed and stand between the lines. Anywhere else standard output gets the
answers alone, and everything else goes to standard error. What a model prints is a stranger's text: control
characters, with which it could move the cursor or rename the window, are not passed on.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import TextIO

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Screen:
    """Writes the parts of a conversation to `out`, and to `notes` what is no answer unless `out` is a terminal too."""

    def __init__(self, out: TextIO, notes: TextIO, *, interactive: bool) -> None:
        self.interactive = interactive
        """A person sits there."""
        self._out = out
        self._notes = out if interactive else notes
        coloured = interactive and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._dim, self._plain = (_DIM, _PLAIN) if coloured else ("", "")
        self._unended: list[TextIO] = []
        """Where the last line is still open."""

    def answer(self, text: str) -> None:
        """A piece of an answer."""
        clean = _CONTROL.sub("", text)
        self._write(self._out, clean, ends_line=clean.endswith("\n"))

    def thought(self, text: str) -> None:
        """A piece of a thought."""
        clean = _CONTROL.sub("", text)
        self._write(self._notes, f"{self._dim}{clean}{self._plain}" if clean else "", ends_line=clean.endswith("\n"))

    def note(self, text: str) -> None:
        """A line about the conversation."""
        self._line(f"{self._dim}[{_CONTROL.sub('', text)}]{self._plain}\n")

    def say(self, text: str) -> None:
        """Lines that a person asked for, or must read."""
        self._line(f"{_CONTROL.sub('', text)}\n")

    def _line(self, text: str) -> None:
        for stream in list(self._unended):
            self._write(stream, "\n", ends_line=True)
        self._write(self._notes, text, ends_line=True)

    def _write(self, stream: TextIO, text: str, *, ends_line: bool) -> None:
        if not text:
            return
        stream.write(text)
        stream.flush()
        self._unended = [other for other in self._unended if other is not stream]
        if not ends_line:
            self._unended.append(stream)


@contextlib.contextmanager
def keyboard_kept() -> Iterator[None]:
    """Meanwhile a terminal does not show what is typed: it is kept, and shown at the first prompt."""
    if not sys.stdin.isatty():
        yield
        return
    import termios  # not on every system, as terminals are not

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)
