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
import tempfile
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.cpp")
_LOG = logging.getLogger(__name__)
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be built (said once, as a warning)."""
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        warnings.warn(
            "no C++ compiler found: decoding uses PyTorch's operators, which is slower; install g++", stacklevel=2
        )
        return None
    try:
        return _opened(compiler)
    # `Path.home` raises RuntimeError for a user that the system does not know.
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or "").strip() or str(error)
        warnings.warn(
            f"decoding kernels could not be built, so PyTorch's operators are used: {reason.splitlines()[-1]}",
            stacklevel=2,
        )
        return None


def _opened(compiler: str) -> ctypes.CDLL:
    """The shared library, compiled if this machine has none yet, or one that cannot be opened (a disk was full)."""
    texts = [file.read_text() for file in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    identity = "\n".join([*texts, compiler, *FLAGS, torch.backends.cpu.get_cpu_capability(), _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fathom"
    target = folder / f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if target.exists():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(target))
    folder.mkdir(parents=True, exist_ok=True)
    _LOG.info("compiling kernels for this processor, once, a few seconds")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / target.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
        built.replace(target)
    return ctypes.CDLL(str(target))


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        kept = [
            line for line in cpuinfo.read_text().splitlines() if line.startswith(("model name", "flags", "Features"))
        ]
        return "\n".join(kept[:2])
    return platform.processor()
