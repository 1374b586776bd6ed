"""Programs that attack the sandbox, and a pool that has to answer right afterwards."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from fathom.errors import UserError
from fathom.tasks.sandbox import Calls, Kind, Limits, Outcome, Runs, Sandbox

SMALL = Limits(cpu_seconds=1, wall_seconds=3.0, memory_mb=128, files_mb=4, output_kb=32)
SECRET = "FATHOM_TEST_SECRET"
DOUBLE = "def double(x):\n    return 2 * x\n"


def _why_not() -> str:
    """Why there can be no bubblewrap sandbox here; empty where there can."""
    try:
        Sandbox(SMALL, workers=1).close()
    except UserError as error:
        return str(error)
    return ""


WHY_NOT = _why_not()
contained = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "there is a sandbox")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One pool for all attacks, so that each meets what the earlier ones left."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    os.environ[SECRET] = "in the environment"
    with Sandbox(SMALL, workers=2) as opened:
        yield opened
    del os.environ[SECRET]


def call(sandbox: Sandbox, body: str, *arguments: object) -> Outcome:
    """What a function `attack` of this body (or text that defines it) gives."""
    text = dedent(body)
    return sandbox.run(Calls(text, "attack", [arguments]))


def still_answers(sandbox: Sandbox) -> None:
    """Every worker, new ones too, gives right answers."""
    checks = [Calls(DOUBLE, "double", [(n,)]) for n in range(4)]
    assert [outcome.outputs for outcome in sandbox.run_many(checks)] == [(0,), (2,), (4,), (6,)]


def pids(sandbox: Sandbox) -> list[int]:
    """The outermost processes of its workers."""
    return [seat.worker.result().pid for seat in sandbox._seats]


def below(pid: int) -> set[int]:
    """The processes that descend from `pid`, itself included, zombies too."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it ended meanwhile
    found, more = {pid}, True
    while more:
        more = {one for one, parent in parents.items() if parent in found} - found
        found |= more
    return found & parents.keys()


def until(holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold while we wait, for long if need be."""
    for _ in range(1500):
        if holds():
            return True
        time.sleep(0.02)
    return False


# Programs that end badly, and how (in which ways, where that is up to the machine or the version of Python).
# They are scripts, run with an empty input.
ENDINGS = {
    "endless loop": ("while True: pass", "time"),
    "sleep forever": ("import time\nwhile True: time.sleep(100)", "time"),
    "print, then hang": ("print('right', flush=True)\nimport time\ntime.sleep(100)", "time"),
    "ignore every signal and loop": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "time",
    ),
    "atexit hook that hangs": ("import atexit\n@atexit.register\ndef hook():\n    while True: pass", "time"),
    "__del__ that hangs": ("class A:\n    def __del__(self):\n        while True: pass\nA()", "time"),
    "endless output": ("while True: print('x' * 1000)", "output"),
    "endless output, raw": ("import os\nwhile True: os.write(1, b'x' * 65536)", "output"),
    "endless output on errors": ("import sys\nwhile True: print('x' * 1000, file=sys.stderr)", "time"),
    "endless result": ("import os\nwhile True: os.write(4, b'x' * 65536)", "output"),
    "bytearray": ("bytearray(10**9)", "memory"),
    "growing list": ("held = []\nwhile True: held.append('x' * 10**6)", "memory time"),
    "doubling list": ("held = [0]\nwhile True: held += held", "memory time"),
    "memory, caught and again": (
        "held = []\nwhile True:\n    try: held.append(bytearray(10**6))\n    except MemoryError: pass",
        "time",
    ),
    "fork": ("import os\nos.fork()", "error"),
    "subprocess": ("import subprocess\nsubprocess.run(['/bin/true'])", "error"),
    "exec": ("import os\nos.execv('/bin/true', ['true'])", "error"),
    "thread that never ends": (
        "import threading, time\nthreading.Thread(target=lambda: time.sleep(100)).start()",
        "error",
    ),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", "exited"),
    "abort": ("import os\nos.abort()", "exited"),
    "exit status": ("print('right')\nraise SystemExit(3)", "exited"),
    "exit with a text": ("import sys\nsys.exit('no')", "exited"),
    "os._exit": ("import os\nos._exit(1)", "exited"),
    "KeyboardInterrupt": ("class Mine(KeyboardInterrupt): pass\nraise Mine('x')", "error"),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda n: f(n + 1) + 1\nf(0)",
        "memory error exited time",
    ),
    "deep recursion in C": (
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
        "memory error exited time",
    ),
    "huge power": ("9 ** 9 ** 9 ** 9", "time memory"),
    "compiler bomb": ("(" * 100_000, "error"),
    "NUL in the text": ("print(1)\0", "error"),
    "lone surrogate in the text": ("print('\ud800')\nx = (", "error"),
    "every descriptor closed": ("import os\nos.closerange(0, 1000)\nprint('x')", "exited"),
}


@contained
@pytest.mark.parametrize("name", ENDINGS)
def test_a_program_that_ends_badly_earns_nothing_and_breaks_nothing(sandbox: Sandbox, name: str) -> None:
    """Whatever way a program ends, its check ends as documented, without an output, and the next checks are right."""
    program, statuses = ENDINGS[name]
    outcome = sandbox.run(Runs(program, [""]))
    assert outcome.status in statuses.split(), outcome
    assert outcome.outputs == ()
    assert outcome.message.isprintable()
    assert 0 < len(outcome.message) <= 200
    still_answers(sandbox)


# Functions that try what they should not be able to, and return what they achieved; all are to achieve nothing.
ATTEMPTS = {
    "read what is private": """
        import os
        def attack(*paths):
            seen = []
            for path in paths:
                try: seen.append(open(path, "rb").read(10) if not os.path.isdir(path) else os.listdir(path))
                except OSError: pass
            python = set(os.path.dirname(os.__file__).split("/"))  # the folders above Python have to be there
            return [one for one in seen if isinstance(one, bytes) or not set(one) <= python]
        """,
    "write outside /tmp": """
        import os
        def attack(*paths):
            done = []
            for folder in (*paths, "/", "/usr", "/usr/lib", "/etc", "/dev", "/dev/shm", "/var/tmp", "/fathom",
                           "/fathom/inside", os.path.dirname(os.__file__), "/root", "/home", "/proc", "/sys"):
                try:
                    open(os.path.join(folder, "left"), "w")
                    done.append(folder)
                except OSError: pass
            return done
        """,
    "network": """
        import socket
        def attack(*_):
            done = []
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, 16, 17, 38, 40):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                    try:
                        socket.socket(family, kind)
                        done.append((family, kind))
                    except OSError: pass
            for ask in (
                lambda: socket.getaddrinfo("example.com", 80), lambda: socket.create_connection(("192.0.2.1", 53)),
            ):
                try: done.append(ask() and "reached")
                except OSError: pass
            return done
        """,
    "name, trace, read or limit another process": """
        import ctypes, os, resource
        def attack(*_):
            done = []
            libc = ctypes.CDLL(None, use_errno=True)
            buffer = ctypes.create_string_buffer(64)
            for pid in (os.getppid(), *range(2, 300)):
                if os.path.exists(f"/proc/{pid}"): done.append(("proc", pid))
                for name, act in (
                    ("kill", lambda: os.kill(pid, 9)), ("priority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19)),
                    ("limit", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0))),
                    ("affinity", lambda: os.sched_setaffinity(pid, {0})),
                ):
                    if pid == 0: continue  # 0 is this process itself
                    try:
                        act()
                        done.append((name, pid))
                    except OSError: pass
            for pid in range(1, 300):
                if libc.ptrace(16, pid, 0, 0) == 0: done.append(("ptrace", pid))
                if libc.process_vm_readv(pid, buffer, 1, buffer, 1, 0) >= 0: done.append(("memory", pid))
                if libc.syscall(434, pid, 0) >= 0: done.append(("pidfd", pid))
            try:
                os.kill(-1, 9)
                done.append("kill all")
            except OSError: pass
            return done
        """,
    "memory that no limit counts": """
        import ctypes, os, mmap
        def attack(*_):
            done = []
            libc = ctypes.CDLL(None, use_errno=True)
            if hasattr(os, "memfd_create"):
                try: done.append(("memfd", os.memfd_create("x")))
                except OSError: pass
            if libc.shmget(0, 1 << 20, 0o1600) >= 0: done.append("shmget")
            if libc.msgget(0, 0o1600) >= 0: done.append("msgget")
            if libc.semget(0, 1, 0o1600) >= 0: done.append("semget")
            try:
                from multiprocessing import shared_memory
                done.append(("shm", shared_memory.SharedMemory(create=True, size=1 << 20).name))
            except OSError: pass
            for flags in (mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
                try: done.append(("mmap", len(mmap.mmap(-1, 1 << 30, flags))))
                except OSError: pass
            return done
        """,
    "new namespaces, mounts, capabilities": """
        import ctypes, os
        def attack(*_):
            done = []
            libc = ctypes.CDLL(None, use_errno=True)
            for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000):
                if libc.unshare(flag) == 0: done.append(("unshare", flag))
            if libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) == 0: done.append("mount")
            if libc.umount2(b"/tmp", 2) == 0: done.append("umount")
            if libc.sethostname(b"x", 1) == 0: done.append("name")
            disk = os.makedev(8, 0)
            for act in (lambda: os.chroot("/tmp"), lambda: os.setuid(0), lambda: os.mknod("/tmp/disk", 0o60600, disk)):
                try:
                    act()
                    done.append("privilege")
                except OSError: pass
            return done
        """,
    "terminal, standard input, descriptors": """
        import os, sys
        def attack(*_):
            done = [sys.stdin.read()] if sys.stdin.read() else []
            for device in ("/dev/tty", "/dev/console", "/dev/kmsg", "/dev/mem"):
                try: done.append(os.open(device, os.O_RDWR))
                except OSError: pass
            for descriptor in range(5, 1000):
                try: done.append((descriptor, os.fstat(descriptor).st_mode))
                except OSError: pass
            return done
        """,
    "higher limits": """
        import resource
        def attack(*_):
            done = []
            for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
                try:
                    resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                    done.append(kind)
                except (OSError, ValueError): pass
            return done
        """,
}


@contained
@pytest.mark.parametrize("name", ATTEMPTS)
def test_an_attempt_achieves_nothing(sandbox: Sandbox, tmp_path: Path, name: str) -> None:
    """A program that tries all it can think of reaches nothing outside itself, and its worker needs no replacing."""
    (tmp_path / "secret").write_text("of the test")
    before = pids(sandbox)
    paths = [
        tmp_path, tmp_path / "secret", Path.home(), "/root", "/home", "/etc/shadow", "/etc/passwd", "/etc/hostname",
        "/proc/1/mem", "/proc/self/environ", "/proc/1/cmdline", "/sys", "/var", "/run", "/mnt", "/srv",
        Path(__file__), Path(__file__).parents[2] / "pyproject.toml", Path(sys.prefix) / "pyvenv.cfg",
    ]  # fmt: skip
    outcome = call(sandbox, ATTEMPTS[name], *map(str, paths))
    assert outcome == Outcome(([],), "ok")
    assert pids(sandbox) == before
    still_answers(sandbox)


@contained
def test_no_environment_leaks(sandbox: Sandbox) -> None:
    """A program's environment holds nothing of ours, and its command line nothing but the limits."""
    ((environment, arguments),) = call(
        sandbox, "import os, sys\ndef attack(): return dict(os.environ), sys.argv"
    ).outputs
    assert environment.keys() <= {"HOME", "TMPDIR", "LANG", "PATH", "PWD", "PYTHONHASHSEED", "PYTHONUTF8"}
    assert len(arguments) == 3


@contained
def test_nothing_stays_for_the_next_check(sandbox: Sandbox) -> None:
    """Files, changed modules and changed built-ins of one check are not there in the next, on any worker."""
    leave = """
        import builtins, json, os, sys
        def attack():
            os.makedirs("/tmp/left/deep")
            open("/tmp/left/deep/file", "w").write("x")
            os.chmod("/tmp", 0)
            builtins.len = json.dumps = json.loads = lambda *_, **__: 7
            os.write = os.read = None
            sys.modules["math"] = None
            return True
        """
    look = """
        import json, math, os
        def attack():
            return os.listdir("/tmp"), len([]), json.dumps([1]), os.getcwd()
        """
    for _ in range(4):
        call(sandbox, leave)
    for _ in range(4):
        assert call(sandbox, look).outputs == (([], 0, "[1]", "/tmp"),)


@contained
def test_tmp_is_bounded(sandbox: Sandbox) -> None:
    """/tmp takes `files_mb` and no more, in one file or in many, in bytes or in entries."""
    fill = """
        import os
        def attack():
            written = entries = 0
            for name in range(10_000):
                try:
                    with open(f"/tmp/{name}", "wb", buffering=0) as file:
                        entries += 1
                        while name < 50:
                            written += file.write(b"x" * 65536)
                except OSError: pass
            return written, entries
        """
    ((written, entries),) = call(sandbox, fill).outputs
    assert 3 << 20 <= written <= 4 << 20
    assert entries < 1100
    still_answers(sandbox)


@contained
def test_what_is_written_to_the_pipes_is_a_claim_and_no_more(sandbox: Sandbox) -> None:
    """Garbage and forged reports on every descriptor end the one check that wrote them; no later check sees them."""
    forge = """
        import os, struct
        def attack(text):
            for descriptor in range(64):
                for forged in (text.encode(), struct.pack("=id", 0, 0.0), b"R"):
                    try: os.write(descriptor, forged)
                    except OSError: pass
            os._exit(0)
        """
    texts = [
        "\x00\xff" * 100, '{"dict": [["returned", ["1"]]]}', '{"dict": [["returned", "11"]]}', '{"dict": 3}', "[]",
        '{"returned": ["1"]}', '{"dict": [["returned", [["1"]]]]}', "[" * 10_000, '{"dict": [[[], 1]]}', "1" * 10_000,
        '{"dict": [["returned", ["' + "1" * 10_000 + '"]]]}', '{"dict": [["returned", ["1", "2"]]]}',
        '{"dict": [["error", {"dict": []}]]}',
    ]  # fmt: skip
    for text in texts:
        outcome = call(sandbox, forge, text)
        assert outcome.status in ("error", "exited")
        assert outcome.message.isprintable()
        still_answers(sandbox)


@contained
def test_a_forged_report_earns_what_it_claims(sandbox: Sandbox) -> None:
    """A program that writes the report itself is taken at its word: it has returned what it says, right or wrong."""
    program = """
        import os
        os.write(4, b'{"dict": [["returned", ["41"]]]}')
        os._exit(0)
        """
    assert call(sandbox, program) == Outcome((41,), "ok")


UNPLAIN = {
    "equal to everything": "class A:\n    def __eq__(self, _): return True\ndef attack(): return A()",
    "an int of its own": "class A(int):\n    def __eq__(self, _): return True\ndef attack(): return [A(1)]",
    "pickling runs code": "class A:\n    def __reduce__(self): return exit, (0,)\ndef attack(): return A()",
    "repr runs code": "class A:\n    def __repr__(self): return '1'\ndef attack(): return A()",
    "a str of its own as key": "class A(str): pass\ndef attack(): return {A('x'): 1}",
    "a list within itself": "def attack():\n    x = []\n    x.append(x)\n    return x",
    "a huge integer": "def attack(): return 10**4300",
    "a huge negative integer": "def attack(): return -(10**100_000)",
    "complex": "def attack(): return 1j",
    "a generator": "def attack():\n    yield 1",
    "SystemExit": "import sys\ndef attack(): sys.exit(0)",
    "raises what cannot be shown": "class A(Exception):\n    def __str__(self): raise A\ndef attack(): raise A",
    "not defined": "x = 1",
    "not callable": "attack = 3",
    "takes no arguments": "def attack(a): return a",
    "defined for a script alone": "if __name__ == '__main__':\n    def attack(): return 1",
}


@contained
@pytest.mark.parametrize("name", UNPLAIN)
def test_only_plain_data_comes_out(sandbox: Sandbox, name: str) -> None:
    """What a function returns or raises becomes plain data of built-in types, or an error; no object crosses."""
    outcome = call(sandbox, UNPLAIN[name])
    assert (outcome.status, outcome.outputs) == ("error", ())


@contained
def test_plain_data_keeps_its_types(sandbox: Sandbox) -> None:
    """Values of every plain type, nested, come back equal and of the same type as they went in."""
    values = [
        None, True, 1, -(10**4299), 1.0, -0.0, 1e308, float("inf"), "", "\ud800\0é\"\\", b"\x00\xff", [], (), {}, set(),
        frozenset({1, (2, "x")}), {1: [True, (None,)], "1": {2.5}, (1, 2): {}}, [[(1,)], {"dict": [["tuple", 1]]}],
    ]  # fmt: skip
    outcome = sandbox.run(Calls("def same(x): return x", "same", [(value,) for value in values]))
    assert list(map(repr, outcome.outputs)) == list(map(repr, values))
    (nan,) = sandbox.run(Calls("def same(x): return x", "same", [(float("nan"),)])).outputs
    assert nan != nan


@contained
def test_outputs_end_at_the_first_failure(sandbox: Sandbox) -> None:
    """A check has an output for each input up to the first that fails, for calls and for runs."""
    calls = sandbox.run(Calls("def f(x): return 6 / x", "f", [(1,), (2,), (0,), (3,)]))
    assert (calls.outputs, calls.status, calls.message) == ((6.0, 3.0), "error", "ZeroDivisionError: division by zero")
    runs = sandbox.run(Runs("print(6 // int(input()))", ["1", "2", "0", "3"]))
    assert (runs.outputs, runs.status) == (("6\n", "3\n"), "error")


@contained
def test_large_inputs_and_unread_inputs(sandbox: Sandbox) -> None:
    """Input beyond what a pipe holds arrives whole, and a program need not read it."""
    text = "word\n" * 100_000
    assert sandbox.run(Runs("import sys\nprint(len(sys.stdin.read()))", [text])).outputs == ("500000\n",)
    assert sandbox.run(Runs("print(1)", [text])).outputs == ("1\n",)
    assert sandbox.run(Calls("def f(x): return len(x)", "f", [(text,)])).outputs == (500_000,)


@contained
def test_a_program_cannot_see_beyond_its_inputs(sandbox: Sandbox) -> None:
    """The frames and objects a program can reach hold nothing of an earlier program."""
    marker = "an-earlier-" + "program"
    call(sandbox, f"held = {marker!r} * 3\ndef attack(): return held")
    search = """
        import gc, sys
        def attack(first, second):
            marker = first + second
            def strings(frame):
                while frame:
                    yield from map(str, frame.f_locals.values())
                    frame = frame.f_back
            return sum(marker in text for text in strings(sys._getframe(1))), sum(
                isinstance(one, (str, bytes)) and marker in str(one) for one in gc.get_objects()
            )
        """
    for _ in range(4):
        assert call(sandbox, search, "an-earlier-", "program").outputs == ((0, 0),)


@contained
def test_many_at_once(sandbox: Sandbox) -> None:
    """200 checks from as many threads at once, good and bad ones mixed, each get their own answer."""
    outcomes: dict[int, Outcome] = {}

    def ask(n: int) -> None:
        program = DOUBLE if n % 10 else "import os\nos._exit(5)"
        outcomes[n] = sandbox.run(Calls(program, "double", [(n,)]))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: outcome.outputs for n, outcome in outcomes.items()} == {
        n: (2 * n,) if n % 10 else () for n in range(200)
    }


@contained
def test_a_worker_killed_from_outside_costs_no_answer() -> None:
    """A check whose worker is killed while it runs is run again on a new one, and comes out right."""
    with Sandbox(SMALL, workers=1) as sandbox:
        answers: list[Outcome] = []
        slow = Calls("import time\ndef f(x):\n    time.sleep(0.5)\n    return x", "f", [(1,)])
        thread = threading.Thread(target=lambda: answers.append(sandbox.run(slow)))
        (first,) = pids(sandbox)
        idle = len(below(first))
        thread.start()
        assert until(lambda: len(below(first)) > idle)
        os.kill(first, signal.SIGKILL)
        thread.join()
        assert answers == [Outcome((1,), "ok")]
        assert pids(sandbox) != [first]
        still_answers(sandbox)


@contained
def test_a_wedged_worker_costs_one_check() -> None:
    """A worker that has stopped answering altogether ends its check at the time limit, and is replaced."""
    with Sandbox(SMALL, workers=1) as sandbox:
        before = pids(sandbox)
        for pid in below(before[0]) - set(before):
            os.kill(pid, signal.SIGSTOP)
        assert sandbox.run(Calls(DOUBLE, "double", [(1,)])).status == "time"
        still_answers(sandbox)
        assert pids(sandbox) != before
        assert until(lambda: not Path(f"/proc/{before[0]}").exists())


@contained
def test_closing_ends_what_runs_and_what_waits() -> None:
    """Closing during checks returns every one of them as stopped, at once; so does any check after it."""
    sandbox = Sandbox(Limits(wall_seconds=600.0), workers=2)
    outcomes: list[Outcome] = []
    endless = Runs("import time\ntime.sleep(1000)", [""])
    threads = [threading.Thread(target=lambda: outcomes.append(sandbox.run(endless))) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert until(lambda: all(len(below(pid)) == 3 for pid in pids(sandbox)))
    sandbox.close()
    sandbox.close()
    for thread in threads:
        thread.join()
    assert [outcome.status for outcome in outcomes] == ["stopped"] * 5
    assert sandbox.run(endless).status == "stopped"


@pytest.mark.skipif(sys.platform != "linux", reason="processes and descriptors are read from /proc")
@pytest.mark.filterwarnings("ignore:sandbox none")
@pytest.mark.parametrize("kind", [pytest.param("bubblewrap", marks=contained), "none"])
def test_closing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    """After a good, a crashed and a timed-out check and `close`, no process, descriptor or file of the pool is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, processes = set(os.listdir("/proc/self/fd")), below(os.getpid())
    with Sandbox(SMALL, workers=2, kind=kind) as sandbox:
        sandbox.run_many([Runs(program, [""]) for program in ("print(1)", "import os\nos.abort()", "while True: pass")])
    assert set(os.listdir("/proc/self/fd")) == before
    assert below(os.getpid()) <= processes
    assert list(tmp_path.iterdir()) == []


@contained
def test_workers_outlive_the_thread_that_opened_the_pool() -> None:
    """A pool opened in a thread that has ended works on with the same workers."""
    opened: list[Sandbox] = []
    thread = threading.Thread(target=lambda: opened.append(Sandbox(SMALL, workers=2)))
    thread.start()
    thread.join()
    with opened[0] as sandbox:
        before = pids(sandbox)
        still_answers(sandbox)
        assert pids(sandbox) == before


TRAINER = """
import os, sys, threading, time
from fathom.tasks.sandbox import Calls, Limits, Runs, Sandbox
sandbox = Sandbox(Limits(cpu_seconds=600, wall_seconds=600.0), workers=2)
pids = [seat.worker.result().pid for seat in sandbox._seats]
if sys.argv[1] == "busy":
    for program in ("while True: pass", "import time; time.sleep(1000)"):
        threading.Thread(target=sandbox.run, args=(Runs(program, [""]),), daemon=True).start()
    time.sleep(0.5)
try:
    print("ready", flush=True)
    time.sleep(1000)
except KeyboardInterrupt:
    outcome = sandbox.run(Calls("def f(x): return x", "f", [(7,)]))
    same = pids == [seat.worker.result().pid for seat in sandbox._seats]
    print(outcome.outputs, same, flush=True)
    sandbox.close()
"""


def trainer(mode: str) -> subprocess.Popen[str]:
    """A process of its own with an open sandbox, in a group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, mode],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@contained
def test_nothing_outlives_a_killed_trainer() -> None:
    """When the trainer is killed with SIGKILL, its workers and the programs they run end too."""
    with trainer("busy") as process:
        family = below(process.pid)
        assert len(family) >= 1 + 2 * 3
        process.kill()
        process.wait()
    assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))


@contained
def test_ctrl_c_does_not_reach_the_workers() -> None:
    """SIGINT to the trainer's whole process group leaves its workers as they are."""
    with trainer("idle") as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.read() == "(7,) True\n"


def test_without_bubblewrap_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `bwrap` is missing the sandbox refuses, and says how to get it and what task.sandbox = none means."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"install.*--task\.sandbox none.*unprotected"):
        Sandbox(SMALL)


@pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is for Linux")
def test_a_bubblewrap_that_fails_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `bwrap` is there but may not make namespaces, the error holds its own words and nothing is left behind."""
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with pytest.raises(UserError, match=r"No permissions to create new namespace.*--task\.sandbox none") as caught:
        Sandbox(SMALL, workers=2)
    assert "\n" not in str(caught.value)
    assert list(scratch.iterdir()) == []


@contained
def test_a_system_that_forbids_what_a_child_needs_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the server starts but cannot confine a child, opening the pool fails, instead of every program in it."""
    fake = tmp_path / "bwrap"
    fake.write_text(
        '#!/bin/sh\nfor a do shift; [ "$a" = CAP_SYS_ADMIN ] && a=CAP_CHOWN; set -- "$@" "$a"; done\n'
        f'exec {shutil.which("bwrap")} "$@"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"not even a trivial program runs.*--task\.sandbox none"):
        Sandbox(SMALL, workers=1)


@pytest.fixture(scope="module")
def unprotected() -> Iterator[Sandbox]:
    """A pool that contains nothing, for what limits alone do; it says so once."""
    with pytest.warns(UserWarning, match="unprotected") as said:
        opened = Sandbox(SMALL, workers=2, kind="none")
    assert len(said) == 1
    with opened:
        yield opened


@pytest.mark.parametrize(
    "name", ["endless loop", "sleep forever", "endless output", "bytearray", "segmentation fault", "exit status"]
)
def test_limits_hold_without_bubblewrap(unprotected: Sandbox, name: str) -> None:
    """Limits on time, memory and output need no bubblewrap."""
    program, statuses = ENDINGS[name]
    if name == "bytearray" and sys.platform != "linux":
        pytest.skip("this system does not keep to a limit on address space")
    assert unprotected.run(Runs(program, [""])).status in statuses.split()
    still_answers(unprotected)


def test_without_bubblewrap_each_check_has_its_own_folder(unprotected: Sandbox) -> None:
    """Without bubblewrap too a program starts in an empty folder, and what it leaves there is removed."""
    look = "import os\ndef attack():\n    seen = os.listdir('.')\n    open('left', 'w')\n    return seen, os.getcwd()"
    for _ in range(4):
        ((seen, folder),) = call(unprotected, look).outputs
        assert seen == []
        assert not Path(folder).exists()
