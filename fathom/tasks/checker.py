"""Checks of many answers at once, whatever a check does.

A check is somebody's code on a model's text: a regular expression may never end, a library may end the process. So they
run in processes of their own, each with a clock. One that overruns it is killed with all that it started, its answer
scores 0 and the fault is said; the next process takes over. A process that ends by itself is replaced too, and the
answer that it was at is tried once more, alone to blame if that ends the same way.

Programs have limits and processes of their own, in the sandbox: the checks of that one task run in threads here.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Self

from fathom.config.rewards import Rewards
from fathom.errors import UserError
from fathom.tasks.catalogue import open_task
from fathom.tasks.check_worker import Chunk, Ready, Unusable
from fathom.tasks.mixture import part_of, stays_in_sandbox
from fathom.tasks.programs import in_sandbox
from fathom.tasks.reading import read
from fathom.tasks.rewards import Reward, combine
from fathom.tasks.task import Problem, Task, Verdict, judge

_START = "import sys; sys.path[:] = sys.argv[2:]; from fathom.tasks.check_worker import serve; serve(int(sys.argv[1]))"
_START_SECONDS = 120.0
_STARTS = 3
# The first check in a process may have libraries to import.
_FIRST_SECONDS = 20.0
_LARGEST_CHUNK = 32
_HUNG_IN_A_ROW = 20
_HEED_SECONDS = 0.1


@dataclass(frozen=True)
class Sample:
    """One completion to be scored."""

    problem: Problem
    completion: str
    tokens: int
    """Its length in tokens."""
    finished: bool
    """Whether the model ended it; False where it was cut off at the token limit."""


class Checker:
    """A pool that checks answers to one task's problems; a context manager. One thread at a time may use it."""

    def __init__(
        self,
        task: Task | str,
        *,
        seconds: float = 10.0,
        workers: int | None = None,
        heed: Callable[[], None] = lambda: None,
    ) -> None:
        """`task` by name (`fathom.tasks.catalogue`), or itself where it can be pickled; `seconds` for each check.

        `workers`: processes, by default one a core and 4 at most. Nothing starts before the `with`. `heed` is called
        again and again while checks run, from any thread; what it raises ends them.
        """
        self.task = open_task(task) if isinstance(task, str) else task
        self._in_sandbox = stays_in_sandbox(self.task)
        self.hung = 0
        """Checks so far that overran their time."""
        self.lost = 0
        """Processes so far that ended in the midst of a check."""
        self._seconds, self._heed = seconds, heed
        self._count = workers or min(4, os.cpu_count() or 1)
        self._sent = task if isinstance(task, str) else b"" if self._in_sandbox else _pickled(self.task)
        self._workers: list[_Worker] = []
        self._hung_in_a_row = 0
        self._failed_starts = 0

    def __enter__(self) -> Self:
        """Start the processes. Raises `UserError` where the task cannot be opened in one."""
        if not self._in_sandbox:
            try:
                self._workers = [_Worker(self.task.called, self._sent) for _ in range(self._count)]
                for worker in self._workers:
                    worker.await_ready()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def score_all(
        self, samples: Sequence[Sample], *, max_tokens: int, starts_thinking: bool, settings: Rewards
    ) -> list[Reward]:
        """The rewards of `samples`, in their order: those that `score` would give.

        Raises `UserError` when checks hang one after the other: the task is then broken, not an answer.
        """
        readings = [
            read(sample.completion, settings.layout, starts_thinking=starts_thinking, finished=sample.finished)
            for sample in samples
        ]
        verdicts = self.check_all(
            [(sample.problem, reading.answer) for sample, reading in zip(samples, readings, strict=True)]
        )
        return [
            combine(reading, verdict, sample.problem, tokens=sample.tokens, max_tokens=max_tokens, settings=settings)
            for sample, reading, verdict in zip(samples, readings, verdicts, strict=True)
        ]

    def check_all(self, answers: Sequence[tuple[Problem, str | None]]) -> list[Verdict]:
        """The verdicts on `answers`, in their order; where there is no answer (None), 0."""
        jobs = {place: (problem, text) for place, (problem, text) in enumerate(answers) if text is not None}
        bounded = {place: job for place, job in jobs.items() if in_sandbox(part_of(self.task, job[0])[0])}
        with ThreadPoolExecutor(self._count) as threads:
            verdicts = dict(zip(bounded, threads.map(self._judge, bounded.values()), strict=True))
        if others := {place: job for place, job in jobs.items() if place not in bounded}:
            try:
                verdicts |= _Batch(self, others).run()
            except BaseException:  # verdicts still under way would be taken for those of the next batch
                self.close()
                raise
        return [verdicts.get(place, Verdict(0.0)) for place in range(len(answers))]

    def _judge(self, job: tuple[Problem, str]) -> Verdict:
        self._heed()
        return judge(self.task, *job)


class _Batch:
    """One call of `check_all`: who is at which job, and what came of each."""

    def __init__(self, checker: Checker, jobs: dict[int, tuple[Problem, str]]) -> None:
        assert checker._workers, "a Checker is used inside `with`"
        self._checker, self._workers = checker, checker._workers
        self._jobs, self._waiting = jobs, deque(jobs)
        self._chunk = max(1, min(_LARGEST_CHUNK, len(jobs) // (4 * len(self._workers))))
        self._verdicts: dict[int, Verdict] = {}
        self._suspects: set[int] = set()
        """Jobs at which a process has ended once."""

    def run(self) -> dict[int, Verdict]:
        while len(self._verdicts) < len(self._jobs):
            self._checker._heed()
            for worker in [worker for worker in self._workers if worker.idle]:
                self._give(worker)
            busy = {worker.connection: worker for worker in self._workers if not worker.idle}
            nearest = min(worker.deadline for worker in busy.values())
            heard = wait(list(busy), min(_HEED_SECONDS, max(0.0, nearest - time.monotonic())))
            for connection in heard:
                self._hear(busy[connection])
            for worker in busy.values():
                if worker.connection not in heard and worker.deadline < time.monotonic() and not worker.has_spoken:
                    self._stop(worker)
        return self._verdicts

    def _give(self, worker: "_Worker") -> None:
        places = [self._waiting.popleft() for _ in range(min(self._chunk, len(self._waiting)))]
        if not places:
            return
        try:
            worker.give(places, [self._jobs[place] for place in places], self._checker._seconds)
        except (BrokenPipeError, ConnectionResetError):
            self._replace(worker)

    def _hear(self, worker: "_Worker") -> None:
        try:
            said = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._lose(worker)
            return
        if isinstance(said, Verdict):
            self._checker._hung_in_a_row = 0
            self._verdicts[worker.places.popleft()] = said
            worker.deadline = time.monotonic() + self._checker._seconds
        else:
            worker.opened(said)
            self._checker._failed_starts = 0

    def _lose(self, worker: "_Worker") -> None:
        """A process that ended by itself, or was ended by someone else."""
        if not worker.ready:
            self._checker._failed_starts += 1
            if self._checker._failed_starts == _STARTS:
                raise UserError(worker.unusable("its process ended while starting"))
            self._replace(worker)
            return
        self._checker.lost += 1
        place = worker.places[0]
        if place in self._suspects:
            worker.places.popleft()
            self._verdicts[place] = Verdict(0.0, f"{self._checker.task.called}: its check ended its process")
        self._suspects.add(place)
        self._replace(worker)

    def _stop(self, worker: "_Worker") -> None:
        """A process that is past its deadline."""
        if not worker.ready:
            raise UserError(worker.unusable(f"its process did not start within {_START_SECONDS:g} s"))
        called, seconds = self._checker.task.called, self._checker._seconds
        self._checker.hung += 1
        self._checker._hung_in_a_row += 1
        if self._checker._hung_in_a_row == _HUNG_IN_A_ROW:
            raise UserError(f"task {called}: {_HUNG_IN_A_ROW} checks in a row took over {seconds:g} s; mend its check")
        self._verdicts[worker.places.popleft()] = Verdict(0.0, f"{called}: its check took over {seconds:g} s")
        self._replace(worker)

    def _replace(self, worker: "_Worker") -> None:
        self._waiting.extend(worker.places)
        worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(worker.called, worker.sent)


class _Worker:
    """One process, as seen from here."""

    def __init__(self, called: str, sent: str | bytes) -> None:
        self.called, self.sent = called, sent
        self.ready = False
        self.places: deque[int] = deque()
        """The jobs that it was given and has not answered; it is at the first."""
        self.deadline = time.monotonic() + _START_SECONDS
        self._allowance = _FIRST_SECONDS
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # an interrupt at the terminal is for us; and what a check starts dies with it
            )
        with contextlib.suppress(BrokenPipeError):  # then it has ended, which is found out by listening
            self.connection.send(sent)

    @property
    def idle(self) -> bool:
        return self.ready and not self.places

    @property
    def has_spoken(self) -> bool:
        return self.connection.poll()

    def await_ready(self) -> None:
        """Wait for the task to be open in it; raises `UserError` where that fails."""
        if not self.connection.poll(max(0.0, self.deadline - time.monotonic())):
            raise UserError(self.unusable(f"its process did not start within {_START_SECONDS:g} s"))
        try:
            self.opened(self.connection.recv())
        except EOFError:
            raise UserError(self.unusable("its process ended while starting")) from None

    def opened(self, said: Ready | Unusable) -> None:
        """Take note of how opening the task went."""
        if isinstance(said, Unusable):
            raise UserError(self.unusable(f"{said.why}; name the task instead, as in 'path/to/file.py:MyTask'"))
        self.ready = True

    def unusable(self, why: str) -> str:
        """What to say where no check can be run in a process like this."""
        return f"task {self.called}: its checks cannot be run in a process of their own: {why}"

    def give(self, places: Sequence[int], jobs: Sequence[tuple[Problem, str]], seconds: float) -> None:
        """Let it check `jobs`, each in `seconds`."""
        self.places.extend(places)
        patience = seconds + self._allowance
        self.deadline = time.monotonic() + patience
        self._allowance = 0.0
        try:
            self.connection.send(Chunk(jobs, 2 * patience * len(jobs)))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise UserError(f"task {self.called}: a problem's data cannot be sent to its check: {error}") from None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()


def _pickled(task: Task) -> bytes:
    try:
        return pickle.dumps(task)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UserError(f"task {task.called}: cannot be sent to another process ({error}); give its name") from None
