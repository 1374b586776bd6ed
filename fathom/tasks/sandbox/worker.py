"""One worker as the trusted side sees it: a server process, a socket to it, and four pipes per execution.

Nothing that comes out of the pipes is believed, only bounded; how an execution ended comes over the socket, which no
program ever holds.
"""

import contextlib
import io
import os
import select
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

from fathom.tasks.sandbox.inside import server
from fathom.tasks.sandbox.launch import Kind, start
from fathom.tasks.sandbox.limits import Limits

_CHUNK = 1 << 16
_STOP_SECONDS = 2.0


@dataclass(frozen=True)
class Execution:
    """How one run of a program ended, and what came out of its pipes."""

    ended: Literal["exit", "time", "output", "lost"]
    """By itself or by a signal; at the deadline; by flooding a pipe; with its worker. Only the first leaves one."""
    status: int = 0
    """As `os.waitstatus_to_exitcode` gives it: the exit status, or minus the signal's number."""
    cpu_seconds: float = 0.0
    stdout: bytes = b""
    result: bytes = b""


class Worker:
    """A started server. One thread at a time may `execute`; `interrupt` may come from any."""

    def __init__(self, kind: Kind, limits: Limits) -> None:
        """Start it; raises `UserError` where that fails."""
        self.executions = 0
        self._cap = limits.output_kb << 10
        self._scratch = tempfile.mkdtemp(prefix="fathom-sandbox-") if kind == "none" else None
        self._process: subprocess.Popen[bytes]
        self._control: socket.socket
        try:
            self._process, self._control = start(kind, limits, self._scratch or "/tmp")
        except BaseException:
            self._remove_scratch()
            raise

    @property
    def pid(self) -> int:
        """The outermost process of the worker."""
        return self._process.pid

    def execute(self, request: bytes, stdin: str | None, deadline: float) -> Execution:
        """One run in a new child. `stdin` None: it has no input, and what it prints is dropped.

        `deadline` is on the clock of `time.monotonic`; the call returns then at the latest.
        """
        self.executions += 1
        with contextlib.ExitStack() as stack:
            requested, request_end = _pipe(stack)
            result_end, result = _pipe(stack)
            feeds = {request_end.fileno(): (request_end, memoryview(request))}
            sinks = {result_end.fileno(): (result_end, bytearray())}
            if stdin is None:
                given = printed = stack.enter_context(open(os.devnull, "r+b", buffering=0))
            else:
                given, given_end = _pipe(stack)
                printed_end, printed = _pipe(stack)
                feeds[given_end.fileno()] = (given_end, memoryview(stdin.encode(errors="surrogateescape")))
                sinks[printed_end.fileno()] = (printed_end, bytearray())
            try:
                socket.send_fds(self._control, [b"x"], [one.fileno() for one in (requested, given, printed, result)])
            except OSError:
                return Execution("lost")
            for end in {requested, given, printed, result}:
                end.close()
            ended = _exchange(self._control, feeds, sinks, deadline, self._cap)
            if isinstance(ended, str):
                return Execution(ended)
            texts = [bytes(held) for _, held in sinks.values()]
            return Execution("exit", *ended, stdout=texts[1] if stdin is not None else b"", result=texts[0])

    def interrupt(self) -> None:
        """End the server and what it runs; an `execute` under way returns as lost."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """End it and leave nothing of it: no process, descriptor or file."""
        self.interrupt()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._control.close()
        self._remove_scratch()

    def _remove_scratch(self) -> None:
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)


_Feeds = dict[int, tuple[io.FileIO, memoryview]]
_Sinks = dict[int, tuple[io.FileIO, bytearray]]


def _pipe(stack: contextlib.ExitStack) -> tuple[io.FileIO, io.FileIO]:
    """The end to read and the end to write. Ours is not to block, theirs is: the two ends have flags of their own."""
    reading, writing = os.pipe()
    return stack.enter_context(io.FileIO(reading, "r")), stack.enter_context(io.FileIO(writing, "w"))


def _exchange(
    control: socket.socket, feeds: _Feeds, sinks: _Sinks, deadline: float, cap: int
) -> tuple[int, float] | Literal["time", "output", "lost"]:
    """Feed and drain the pipes until the server reports the end: its exit code and seconds; else why not."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    for descriptor in feeds:
        os.set_blocking(descriptor, False)
        poll.register(descriptor, select.POLLOUT)
    for descriptor in sinks:
        os.set_blocking(descriptor, False)
        poll.register(descriptor, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        events = poll.poll(max(0.0, left) * 1000)
        if not events and left <= 0:  # what has arrived counts, even if this process slept past the deadline
            return "time"
        for descriptor, _ in events:
            if descriptor in feeds:
                end, rest = feeds[descriptor]
                feeds[descriptor] = end, (rest := _feed(end, rest))
                if not rest:
                    poll.unregister(descriptor)
                    end.close()
            elif descriptor in sinks:
                if not _drain(*sinks[descriptor], cap):  # it was readable, and there was nothing: it has ended
                    poll.unregister(descriptor)
                if len(sinks[descriptor][1]) > cap:
                    return "output"
        if any(descriptor == control.fileno() for descriptor, _ in events):
            return _last_words(control, sinks, cap)


def _last_words(control: socket.socket, sinks: _Sinks, cap: int) -> tuple[int, float] | Literal["output", "lost"]:
    """The server's report, and what the pipes still hold of a program that has ended."""
    try:
        report = control.recv(server.REPORT.size)
    except OSError:
        report = b""
    if len(report) < server.REPORT.size:
        return "lost"
    for end, held in sinks.values():
        while len(held) <= cap and _drain(end, held, cap):
            pass
        if len(held) > cap:
            return "output"
    status, seconds = server.REPORT.unpack(report)
    return os.waitstatus_to_exitcode(status), seconds


def _feed(end: io.FileIO, rest: memoryview) -> memoryview:
    """Write what the pipe takes; what is left, nothing if nobody reads any more."""
    try:
        return rest[end.write(rest[:_CHUNK]) or 0 :]
    except BrokenPipeError:
        return rest[:0]


def _drain(end: io.FileIO, held: bytearray, cap: int) -> bool:
    """Add what the pipe holds, one byte more than `cap` at most; whether there was anything."""
    piece = end.read(min(_CHUNK, cap + 1 - len(held)))
    held += piece or b""
    return bool(piece)
