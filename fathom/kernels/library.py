"""Builds `kernels.cpp` and its headers for this machine's processor, once, and opens it.

The shared library lies in the user's cache folder under a name that changes with the source, the compiler and the
processor. It is written whole or not at all, so several processes may build at once. Without a compiler there is no
library: `library` says so once, and every operator falls back to torch's, slower and right.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import threading
import warnings
from pathlib import Path

import torch

from fathom.scratch import neighbour, sweep, sync

SOURCE = Path(__file__).with_name("kernels.cpp")
_LOG = logging.getLogger(__name__)
_BUILDING = threading.Lock()
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be built (said once, as a warning)."""
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        warnings.warn(
            "no C++ compiler found: PyTorch's operators are used in the place of kernels, which is slower; install g++",
            stacklevel=2,
        )
        return None
    try:
        return _opened(compiler)
    # `Path.home` raises RuntimeError for a user that the system does not know.
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or "").strip() or str(error)
        warnings.warn(
            f"kernels could not be built, so PyTorch's operators are used, which is slower: {reason.splitlines()[-1]}",
            stacklevel=2,
        )
        return None


def _opened(compiler: str) -> ctypes.CDLL:
    """The shared library, compiled if this machine has none yet, or one that is not whole (a disk was full)."""
    texts = [file.read_text() for file in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    built_by = Path(compiler).resolve().stat()
    identity = [*texts, compiler, f"{built_by.st_size} {built_by.st_mtime_ns}", *FLAGS]
    identity += [torch.backends.cpu.get_cpu_capability(), _processor()]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fathom"
    name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    target = folder / f"kernels-{name}.so"
    with _BUILDING:
        if _is_whole(target):
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(target))
        folder.mkdir(parents=True, exist_ok=True)
        _LOG.info("compiling kernels for this processor, once, a few seconds")
        _build(compiler, target)
        return ctypes.CDLL(str(target))


def _build(compiler: str, target: Path) -> None:
    """Compile in a hidden neighbour of `target`, which one rename then makes it."""
    sweep(target, "building")
    scratch = neighbour(target, "building")
    scratch.mkdir()
    try:
        built = scratch / target.name
        # In a session of its own: Ctrl-C on the terminal is for this program to heed, and must not make a training run
        # that only wants to save go on without kernels.
        subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(built)],
            check=True, capture_output=True, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        built.write_bytes(_sealed(built.read_bytes()))
        sync(built)
        built.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sealed(content: bytes) -> bytes:
    """With its own digest behind it, where a loader does not look."""
    return content + hashlib.sha256(content).digest()


def _is_whole(file: Path) -> bool:
    """Whether the file ends with the digest of what is before it: to open a library that was cut short is to crash."""
    try:
        content = file.read_bytes()
    except OSError:
        return False
    return content == _sealed(content[: -hashlib.sha256().digest_size])


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        kept = [
            line for line in cpuinfo.read_text().splitlines() if line.startswith(("model name", "flags", "Features"))
        ]
        return "\n".join(kept[:2])
    return platform.processor()
