"""What a child of the server gives up before it runs a program: each step cannot be taken back.

`fork_apart` makes a child that is alone in process, mount and ipc namespaces of its own: process 1 of its namespace,
so that the server has no number by which the child could name it, and what the child mounts only it sees. `confine`
then gives it an empty bounded /tmp, takes its capabilities, sets its limits and filters its system calls.

The filter (seccomp) is a list of refusals. A refused call fails with EPERM, as if there were no permission. It serves
three ends: one execution is one thread (so that the limit on address space is a limit on memory, and nothing can be
left behind); no memory that address space does not count; none of the kernel's rooms that a program has no business
in, sockets first (vsock, unlike the rest of the network, has no namespace).
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

_NEW_NAMESPACES = 0x20000 | 0x8000000 | 0x20000000  # CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID
_SET_DUMPABLE, _SET_NO_NEW_PRIVS, _SET_SECCOMP = 4, 38, 22  # prctl's numbers
_NOSUID_NODEV = 6
_TIMERS = 64  # also signals that wait
_NOT_THERE = None

# What is refused, with its numbers on x86_64 and aarch64.
_REFUSED = {
    "fork": (57, _NOT_THERE), "vfork": (58, _NOT_THERE), "clone": (56, 220), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282), "bpf": (321, 280), "perf_event_open": (298, 241),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "fanotify_init": (300, 262), "inotify_init": (253, _NOT_THERE), "inotify_init1": (294, 26),
    "socket": (41, 198), "ptrace": (101, 117), "kcmp": (312, 272),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "quotactl": (179, 60), "personality": (135, 92), "modify_ldt": (154, _NOT_THERE),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, and the kernel's AUDIT_ARCH

FILTERED = sys.platform == "linux" and platform.machine() in _MACHINES
"""Whether system calls can be filtered on this machine."""

_libc = ctypes.PyDLL(None, use_errno=True)


def _filter() -> bytes:
    """Rules that refuse the calls above, and kill a process that calls by another machine's numbers."""
    column, machine = _MACHINES[platform.machine()]
    refused = [numbers[column] for numbers in _REFUSED.values() if numbers[column] is not None]
    load, jump_if_equal, jump_if_at_least, answer = 0x20, 0x15, 0x35, 0x06
    kill, refuse, allow = 0x80000000, 0x50001, 0x7FFF0000
    rules = [
        (load, 0, 0, 4),  # the machine
        (jump_if_equal, 1, 0, machine),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),  # the call's number
        (jump_if_at_least, len(refused) + 1, 0, 0x40000000),  # x32: the same calls by other numbers
        *((jump_if_equal, len(refused) - place, 0, number) for place, number in enumerate(refused)),
        (answer, 0, 0, allow),
        (answer, 0, 0, refuse),
    ]
    return b"".join(struct.pack("=HBBI", *rule) for rule in rules)


_FILTER = _filter() if FILTERED else b""  # made once, not in every child


def fork_apart() -> int:
    """As `os.fork`, but the child is alone in new process, mount and ipc namespaces. Needs CAP_SYS_ADMIN."""
    ctypes.pythonapi.PyOS_BeforeFork()
    clone = _REFUSED["clone"][_MACHINES[platform.machine()][0]]
    child = _libc.syscall(clone, _NEW_NAMESPACES | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if child < 0:
        raise OSError(ctypes.get_errno(), "clone")
    return child


def confine(limits: dict[str, int], *, apart: bool) -> None:
    """Bind the calling process for good to `limits` (bytes, seconds, numbers; see `launch`) and to the filter."""
    if apart:
        options = f"size={limits['files']},nr_inodes=1000,mode=700".encode()
        _do(_libc.mount(b"tmpfs", b"/tmp", b"tmpfs", _NOSUID_NODEV, options), "mount /tmp")
        header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)  # version 3 of the call, this process
        _do(_libc.capset(header, nothing), "capset")
        os.chdir("/tmp")
    bounds = {
        resource.RLIMIT_CPU: limits["cpu"],
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["files"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform == "linux":
        bounds[resource.RLIMIT_SIGPENDING] = _TIMERS
    for kind, bound in bounds.items():
        resource.setrlimit(kind, (bound, bound))
    if sys.platform == "linux":
        _do(_libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    if FILTERED:
        _filter_system_calls()


def _filter_system_calls() -> None:
    held = ctypes.create_string_buffer(_FILTER, len(_FILTER))
    program = struct.pack("@HP", len(_FILTER) // 8, ctypes.addressof(held))
    _do(_libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _do(_libc.prctl(_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def _do(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)
