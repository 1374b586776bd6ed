"""Calls into other people's checkers, in a process of their own and with a bound on their processor time.

A checker of a library may need for ever on a model's text (`9**9**9`), take all memory, print, or need the main
thread for its alarm clock; in another process all of that is harmless. The bound is on processor time, not on the
clock, so that a busy machine never turns a right answer into a wrong one. This is no sandbox: the process has the
user's rights, so a checker that evaluates text must be shown none that calls anything.
"""

import atexit
import contextlib
import importlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any

SECONDS = 5.0
"""Processor time of one call."""
_MEMORY = 4 << 30
_START = "import sys; sys.path[:] = sys.argv[1:]; from fathom.tasks.isolation import serve; serve()"


class Overrun(Exception):
    """The call took more than `SECONDS`, or ended its process in another way."""


class Failed(Exception):
    """What the call raised, by name: its own class may not be known here."""


def isolated(function: Callable[..., Any], *arguments: Any, needs: Sequence[str] = ()) -> Any:
    """`function(*arguments)`, computed in the other process, where sets have the same order in every run.

    `function` stands at the top of a module; `needs` are modules whose import shall not count as its time. One call
    runs at a time. Raises `Overrun` or `Failed`.
    """
    with _lock:
        return _other_process().call(function, arguments, needs)


class _Process:
    """The other process, as seen from this one."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # an interrupt at the terminal is for us, not for it
        )

    @property
    def usable(self) -> bool:
        """Whether it is alive and, after a fork, ours."""
        return self.owner == os.getpid() and self._process.poll() is None

    def call(self, function: Callable[..., Any], arguments: Sequence[Any], needs: Sequence[str]) -> Any:
        request = pickle.dumps(
            (function.__module__, function.__qualname__, tuple(needs), SECONDS, pickle.dumps(arguments))
        )
        try:
            reply = self._ask(request)
        except BaseException:  # an answer that nobody read must not be taken for the next one's
            self.end()
            raise
        if not reply:
            raise Overrun(self._cause())
        raised, value = pickle.loads(reply)
        if raised:
            raise Failed(value)
        return value

    def _ask(self, request: bytes) -> bytes:
        """The reply; empty where the process died instead."""
        with contextlib.suppress(BrokenPipeError):
            _send(self._process.stdin, request)
        return _receive(self._process.stdout)

    def _cause(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return f"took more than {SECONDS:g} s of processor time"
        return f"ended its process (code {code})"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


_lock = threading.RLock()
_current: _Process | None = None


def _other_process() -> _Process:
    global _current
    if _current is None or not _current.usable:
        _current = _Process()
    return _current


@atexit.register
def _end() -> None:
    if _current is not None and _current.usable:
        _current.end()


def serve() -> None:
    """The other process's life: calls from standard input, results to standard output, until there are no more."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a checker prints is no reply
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    while request := _receive(requests):
        _send(replies, _answer(request))


def _answer(request: bytes) -> bytes:
    """Whether the call raised, and its result or what it raised."""
    module, name, needs, seconds, packed = pickle.loads(request)
    try:
        for needed in needs:
            importlib.import_module(needed)
        function = getattr(importlib.import_module(module), name)
        arguments = pickle.loads(packed)
        # Without a handler the signal ends the process, even in the midst of one huge multiplication.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        return pickle.dumps((False, function(*arguments)))
    except Exception as error:  # whatever a library raises is for the caller to hear of
        return pickle.dumps((True, f"{type(error).__name__}: {error}"[:500]))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _send(stream: IO[bytes], message: bytes) -> None:
    stream.write(len(message).to_bytes(8) + message)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    """The next message; empty at the end of the stream."""
    return stream.read(int.from_bytes(stream.read(8)))
