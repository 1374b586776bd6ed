"""The fork server: a Python that has imported what programs like to import, and forks a child per execution.

The trusted side holds the other end of descriptor 0, a socket. For every execution it sends one byte with four
descriptors (the request, standard input, standard output, the result) and gets one report back when the child has
ended. The server reads none of them, so that nothing of one program is left in its memory for the next to find. When
the socket closes, however the trusted side ended, the server ends, and with it everything it started.
"""

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile

from . import confine, program

READY = b"R"
REPORT = struct.Struct("=id")
"""How a child ended, as `os.waitpid` says it, and the processor seconds it used."""
_LIKED = (
    "abc array bisect collections copy dataclasses datetime decimal enum fractions functools heapq itertools math "
    "operator queue random re statistics string textwrap time typing"
)
_PARKED = 32  # descriptors are parked from here on while those below get their places
_REQUEST, _RESULT = 3, 4


def main() -> None:
    """Serve until the trusted side is gone. Arguments: "bubblewrap" or "none", and the limits as JSON."""
    apart, limits = sys.argv[1] == "bubblewrap", json.loads(sys.argv[2])
    if sys.platform == "linux":
        ctypes.PyDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody may trace or read this process
    for name in _LIKED.split():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is here now stays shared with the children
    control = socket.socket(fileno=0)
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    control.sendall(READY)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 4)
        if not message:
            return
        with _scratch(apart) as folder:
            child = confine.fork_apart() if apart else os.fork()
            if child == 0:
                _serve_one(descriptors, limits, folder, apart=apart)
            for descriptor in descriptors:
                os.close(descriptor)
            ended = _wait(child, control, woken, apart=apart)
        if ended is None:
            return
        control.sendall(REPORT.pack(*ended))


@contextlib.contextmanager
def _scratch(apart: bool):
    """The folder a child works in: apart, each child mounts its own; else a new one, which is removed."""
    if apart:
        yield "/tmp"
        return
    folder = tempfile.mkdtemp()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(child: int, control: socket.socket, woken: socket.socket, *, apart: bool) -> tuple[int, float] | None:
    """How the child ended and the seconds it used; None, and the child killed, when the trusted side is gone."""
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            if not apart:
                _kill_group(child)
            return status, usage.ru_utime + usage.ru_stime
        readable, _, _ = select.select([control, woken], [], [])
        if control in readable:  # nothing is sent while a child runs: it was closed
            if not apart:
                _kill_group(child)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            return None
        with contextlib.suppress(BlockingIOError):
            woken.recv(4096)


def _kill_group(child: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def _serve_one(descriptors: list[int], limits: dict[str, int], folder: str, *, apart: bool) -> None:
    """What the child does; it never returns."""
    leave, status = os._exit, 1  # the program may put another function in the place of os._exit
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        _place(descriptors)
        os.chdir(folder)
        os.environ["HOME"] = os.environ["TMPDIR"] = folder
        confine.confine(limits, apart=apart)
        with open(_REQUEST, "rb") as source:
            request = source.read()
        sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        sys.stdout = sys.__stdout__ = open(  # noqa: SIM115
            1, "w", encoding="utf-8", errors="surrogateescape", closefd=False
        )
        status = program.run(request, _RESULT)
    finally:
        leave(status)


def _place(descriptors: list[int]) -> None:
    """The child's descriptors: 0 standard input, 1 output, 2 nowhere, 3 request, 4 result, and none else."""
    request, stdin, stdout, result = (fcntl.fcntl(one, fcntl.F_DUPFD, _PARKED) for one in descriptors)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for source, target in ((stdin, 0), (stdout, 1), (nowhere, 2), (request, _REQUEST), (result, _RESULT)):
        os.dup2(source, target)
    os.closerange(_RESULT + 1, 1024)
