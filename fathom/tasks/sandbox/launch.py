"""Starting a worker's process: the command line, with bubblewrap or without."""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Literal

from fathom.errors import UserError
from fathom.tasks.sandbox.inside import confine, server
from fathom.tasks.sandbox.limits import Limits

Kind = Literal["bubblewrap", "none"]
"""`bubblewrap`: contained; `none`: limits and filter alone, the program sees and can write what its user can."""

_HERE = Path(__file__).parent
OTHERWISE = (
    "or take task.sandbox none (fathom rl … --task.sandbox none, fathom tasks try … --sandbox none), "
    "which runs programs unprotected"
)
"""What every refusal ends with."""
_START_SECONDS = 60.0
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def start(kind: Kind, limits: Limits, scratch: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A server that is ready, and the socket to it. `scratch` is the folder for temporary files that it sees.

    The process is a session of its own, so that Ctrl-C in a terminal does not reach it, and dies with the thread that
    called this. Raises `UserError` where it does not start.
    """
    command = _command(kind, limits)
    ours, theirs = socket.socketpair()
    with theirs, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=_environment(scratch),
            cwd="/",
            start_new_session=True,
        )
        theirs.close()
        ours.settimeout(_START_SECONDS)
        try:
            ready = ours.recv(1) == server.READY
        except OSError:
            ready = False
        ours.settimeout(None)
        if ready:
            return process, ours
        ours.close()
        process.kill()
        process.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    name = "bubblewrap" if kind == "bubblewrap" else "Python"
    advice = (
        "it needs bwrap 0.8 or newer and user namespaces, which the system or its container may forbid; "
        f"allow them, {OTHERWISE}"
        if kind == "bubblewrap"
        else "try the same with `python -c pass`, or raise memory_mb"
    )
    raise UserError(f"sandbox: {name} does not start ({said[-1][:200]}); {advice}")


def _environment(folder: str) -> dict[str, str]:
    """All that a program finds in its environment. Hashes are fixed, so that a set prints alike every time."""
    return {
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "PATH": "/usr/bin:/bin",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
    }


def _command(kind: Kind, limits: Limits) -> list[str]:
    bounds = {
        "cpu": limits.cpu_seconds,
        "memory": limits.memory_mb << 20,
        "files": limits.files_mb << 20,
        "open_files": limits.open_files,
    }
    home = "/fathom" if kind == "bubblewrap" else str(_HERE)
    boot = f"import sys; sys.path.insert(0, {home!r}); from inside import server; sys.path.pop(0); server.main()"
    # -P -s -S: neither the working folder nor any installed package can be imported.
    python = [os.path.realpath(sys.executable), "-P", "-s", "-S", "-B", "-c", boot, kind, json.dumps(bounds)]
    return python if kind == "none" else [*_bubblewrap(Path(python[0])), "--", *python]


def _find_bubblewrap() -> str:
    """Where `bwrap` is; raises `UserError` where it is not, or would not be enough."""
    if not confine.FILTERED:
        raise UserError(
            "sandbox: model-written programs are contained on Linux (x86_64, aarch64) alone; "
            f"use such a machine, {OTHERWISE}"
        )
    found = shutil.which("bwrap")
    if found is None:
        raise UserError(
            "sandbox: bubblewrap is not installed, and model-written programs are not run without it; "
            f"install it (apt install bubblewrap, dnf install bubblewrap), {OTHERWISE}"
        )
    return found


def _bubblewrap(python: Path) -> list[str]:
    """A root of its own, in which there is only what Python needs; see the package's docstring for what that keeps out.

    CAP_SYS_ADMIN holds within the sandbox's own user namespace only; the server needs it to give every child new
    namespaces, and the child drops it before it runs the program. No further user namespace can be made, in which one
    could be had again.
    """
    command = [
        _find_bubblewrap(),
        "--unshare-user",
        "--disable-userns",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
    ]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    command += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--new-session", "--die-with-parent", "--as-pid-1"]
    command += ["--clearenv"]
    for name, value in _environment("/tmp").items():
        command += ["--setenv", name, value]
    for folder in _SYSTEM:
        command += ["--ro-bind-try", folder, folder]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    for folder in _python_folders(python):
        command += ["--ro-bind", str(folder), str(folder)]
    for folder in _package_folders():
        command += ["--tmpfs", str(folder), "--remount-ro", str(folder)]
    command += ["--ro-bind", str(_HERE / "inside"), "/fathom/inside", "--dir", "/tmp", "--remount-ro", "/"]
    return [*command, "--chdir", "/"]


def _python_folders(python: Path) -> list[Path]:
    """Where this Python lives, outermost first, as far as the system's folders do not hold it anyway."""
    folders = {Path(sys.base_prefix), Path(sys.base_prefix).resolve(), Path(sys.base_exec_prefix), python.parent}
    return sorted(one for one in folders if not any(one.is_relative_to(system) for system in _SYSTEM))


def _package_folders() -> list[Path]:
    """Where packages are installed for this Python and the system's, to be hidden: programs have no use for them."""
    names = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folders = {Path(sysconfig.get_path(which, vars=names)) for which in ("purelib", "platlib")}
    folders |= {Path("/usr/lib/python3/dist-packages"), Path(f"/usr/local/lib/{version}/dist-packages")}
    return sorted(one for one in folders if one.is_dir())
