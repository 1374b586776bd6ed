"""The sandbox that others use: a few workers, shared by any number of threads."""

import json
import os
import queue
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from fathom.errors import UserError
from fathom.tasks.sandbox.check import Calls, Check, Outcome, Runs, Status
from fathom.tasks.sandbox.inside import plain
from fathom.tasks.sandbox.inside.program import OUT_OF_MEMORY
from fathom.tasks.sandbox.launch import OTHERWISE, Kind
from fathom.tasks.sandbox.limits import Limits
from fathom.tasks.sandbox.worker import Execution, Worker

_PER_WORKER = 5000  # executions, after which it is replaced
_WORDS = 200


class Sandbox:
    """Runs checks on a pool of workers; a context manager.

    `run` may be called from any thread. It returns within `limits.wall_seconds` of getting a worker, whatever the
    program does; a worker is waited for while all are busy. A worker is replaced after anything but a plain end (time,
    memory, output, a crash) and after some thousands of executions; the next starts while others work.
    """

    def __init__(self, limits: Limits | None = None, *, workers: int | None = None, kind: Kind = "bubblewrap") -> None:
        """Start the workers (default: one per core, 4 at most); raises `UserError` where the machine does not allow it.

        `kind="none"` warns that it contains nothing; it is for programs one trusts, or a machine one can lose.
        """
        if kind == "none":
            warnings.warn("sandbox none: programs run unprotected, with all that this user may do", stacklevel=2)
        self._limits, self._kind = limits or Limits(), kind
        self._stopping = threading.Event()
        self._free: queue.SimpleQueue[_Seat] = queue.SimpleQueue()
        # A worker dies with the thread that started it, so that one that lives as long as the pool starts them all.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="sandbox")
        self._seats = [_Seat(self._starter.submit(Worker, kind, self._limits)) for _ in range(workers or _cores())]
        for seat in self._seats:
            self._free.put(seat)
        try:
            for seat in self._seats:
                seat.worker.result()
            self._try()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def workers(self) -> int:
        """How many checks run at the same time."""
        return len(self._seats)

    def run(self, check: Check) -> Outcome:
        """What the program of `check` gave. Nothing the program does raises here.

        Raises `UserError` where a worker has to be started and cannot be, and `TypeError` or `ValueError` for arguments
        that are no plain data.
        """
        requests = _requests(check)
        seat = self._free.get()
        sound = False
        try:
            outcome, sound = self._run_on(seat, check, requests)
        finally:
            try:
                if not self._stopping.is_set() and not (sound and seat.worker.result().executions < _PER_WORKER):
                    self._renew(seat)
            finally:  # `close` waits for every seat, also where none can be renewed because the interpreter is ending
                self._free.put(seat)
        return outcome

    def run_many(self, checks: Sequence[Check]) -> list[Outcome]:
        """`run` for each, as many at a time as there are workers; outcomes in the order of the checks."""
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(self.run, checks))

    def close(self) -> None:
        """End all workers, leave nothing behind; checks under way or waiting return as stopped. May be called twice."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        for seat in self._seats:
            if worker := seat.started():
                worker.interrupt()
        for _ in self._seats:  # until nobody uses one
            self._free.get()
        self._starter.shutdown(wait=True)
        for seat in self._seats:
            if worker := seat.started():
                worker.stop()
            self._free.put(seat)  # who still waits is told that the sandbox is closed

    def _try(self) -> None:
        """Raise `UserError` unless a program runs: a system that forbids what a child needs would fail every one."""
        outcome = self.run(Calls("def one(): return 1", "one", [()]))
        if outcome != Outcome((1,), "ok"):
            raise UserError(
                f"sandbox: not even a trivial program runs in it ({outcome.status}: {outcome.message}); allow nested "
                f"namespaces and mounts in this system or container, or raise the limits, {OTHERWISE}"
            )

    def _run_on(self, seat: "_Seat", check: Check, requests: list["_Request"]) -> tuple[Outcome, bool]:
        """The outcome, and whether the worker is beyond doubt."""
        if self._stopping.is_set():
            return _CLOSED, True
        worker = seat.worker.result()
        deadline = time.monotonic() + self._limits.wall_seconds
        outputs: list[Any] = []
        for request in requests:
            execution = worker.execute(request.text, request.stdin, deadline)
            if execution.ended == "lost" and not self._stopping.is_set():  # killed by somebody; once more, on a new one
                self._renew(seat)
                worker = seat.worker.result()
                execution = worker.execute(request.text, request.stdin, deadline)
            if execution.ended == "lost" and self._stopping.is_set():
                return _CLOSED, True
            gave, status, message = _read(execution, check, self._limits)
            outputs += gave
            if status != "ok":
                crashed = execution.status < 0
                return Outcome(tuple(outputs), status, message), status in ("error", "exited") and not crashed
        return Outcome(tuple(outputs), "ok"), True

    def _renew(self, seat: "_Seat") -> None:
        """Give the seat a new worker as soon as there is one, and end the old one."""
        old = seat.started()

        def replace() -> Worker:
            if old:
                old.stop()
            return Worker(self._kind, self._limits)

        seat.worker = self._starter.submit(replace)


@dataclass
class _Seat:
    """A worker's place in the pool, with the worker that is in it or on its way."""

    worker: Future[Worker]

    def started(self) -> Worker | None:
        """The worker, if it has started."""
        return self.worker.result() if self.worker.done() and not self.worker.exception() else None


@dataclass(frozen=True)
class _Request:
    """What goes to one child: a JSON text, and standard input where it has one."""

    text: bytes
    stdin: str | None = None


_CLOSED = Outcome((), "stopped", "the sandbox is closed")


def _cores() -> int:
    return min(4, os.cpu_count() or 1)


def _requests(check: Check) -> list[_Request]:
    """One for all calls of a function, one for each run of a script."""
    if isinstance(check, Runs):
        text = json.dumps({"program": check.program}).encode()
        return [_Request(text, stdin) for stdin in check.inputs]
    arguments = [plain.write(tuple(one)) for one in check.arguments]
    asked = {"program": check.program, "function": check.function, "arguments": arguments}
    return [_Request(json.dumps(asked).encode())]


def _read(execution: Execution, check: Check, limits: Limits) -> tuple[list[Any], Status, str]:
    """The outputs of one execution, how it ended, and a line on that."""
    code = execution.status
    if execution.ended == "time":
        return [], "time", f"took longer than {limits.wall_seconds:g} s"
    if execution.ended == "output":
        return [], "output", f"gave more than {limits.output_kb} KiB"
    if execution.ended == "lost":
        return [], "lost", "the worker was killed twice"
    if code in (-signal.SIGKILL, -signal.SIGXCPU) and execution.cpu_seconds > limits.cpu_seconds - 0.2:
        return [], "time", f"used more than {limits.cpu_seconds} s of processor time"
    if code == OUT_OF_MEMORY:
        return [], "memory", f"asked for more than {limits.memory_mb} MiB"
    wrong, returned = _report(execution.result)
    if wrong is None and (code != 0 or (isinstance(check, Calls) and returned is None)):
        return [], "exited", f"signal {-code}" if code < 0 else f"ended itself with exit status {code}"
    if isinstance(check, Runs):
        outputs = [] if wrong else [execution.stdout.decode(errors="replace")]
    else:
        try:
            outputs = [plain.read(text) for text in returned or []]
        except (ValueError, TypeError, AttributeError):
            return [], "error", "its result cannot be read"
        if wrong is None and len(outputs) != len(check.arguments):
            return [], "error", "its result cannot be read"
    return outputs, "error" if wrong else "ok", wrong or ""


def _report(result: bytes) -> tuple[str | None, list[Any] | None]:
    """What went wrong by the program's own account, and what it says its function returned."""
    try:
        report = plain.read(result)
        wrong, returned = report.get("error"), report.get("returned")
    except (ValueError, AttributeError):
        return None, None
    shown = None if wrong is None else "".join(c if c.isprintable() else " " for c in str(wrong)[:_WORDS]).strip()
    return shown or (None if wrong is None else "it failed"), returned if isinstance(returned, list) else None
