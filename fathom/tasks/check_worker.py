"""The process in which checks run for a `Checker`: answers in, verdicts out, until there are no more."""

import faulthandler
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from fathom.tasks.catalogue import open_task
from fathom.tasks.task import Problem, Task, judge


@dataclass(frozen=True)
class Ready:
    """The task is open."""


@dataclass(frozen=True)
class Unusable:
    """The task could not be opened."""

    why: str


@dataclass(frozen=True)
class Chunk:
    """Answers to check, one after the other; a verdict is sent after each."""

    jobs: Sequence[tuple[Problem, str]]
    seconds: float
    """After so long the process ends itself: whoever was to stop it is gone."""


def serve(descriptor: int) -> None:
    """The process's life. The first message is the task: its name, or pickled."""
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    try:
        task = _open(connection.recv())
    except Exception as error:  # it is for the other side to say
        connection.send(Unusable(f"{type(error).__name__}: {error}".splitlines()[0]))
        return
    connection.send(Ready())
    with open(os.devnull, "w") as nowhere:
        while chunk := _next(connection):
            # Its clock needs neither the interpreter nor a signal, so that no check can hold it up.
            faulthandler.dump_traceback_later(chunk.seconds, exit=True, file=nowhere)
            for problem, answer in chunk.jobs:
                connection.send(judge(task, problem, answer))
            faulthandler.cancel_dump_traceback_later()


def _next(connection: Connection) -> Chunk | None:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return None


def _open(task: str | bytes) -> Task:
    return open_task(task) if isinstance(task, str) else pickle.loads(task)
