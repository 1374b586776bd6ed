"""How much memory there is: the machine's, or less where a container may not have all of it."""

import os
from pathlib import Path

from fathom.errors import UserError

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Files with the limit and what is used of it, in version 2 and 1 of control groups."""


def memory(cgroup: Path = _CGROUP) -> tuple[int, int | None]:
    """(bytes in all, bytes free now) for this process; None where the system does not tell."""
    total, free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for limit, used in _LIMITS:
        most = next(iter(_lines(cgroup / limit)), "max")
        if most.isdecimal() and int(most) < total:  # version 1 writes a huge number for "no limit"
            left = int(most) - int(next(iter(_lines(cgroup / used)), "0"))
            total, free = int(most), max(0, left if free is None else min(free, left))
    return total, free


def check_cache_memory(gigabytes: float) -> None:
    """Raises `UserError` for a cache beyond what this machine has: the process would be killed when it fills."""
    total, free = memory()
    if gigabytes * 1e9 > total:
        now = "" if free is None else f", {free / 1e9:.0f} of them free"
        raise UserError(f"--cache-memory {gigabytes:g}: this machine has {total / 1e9:.0f} GB{now}; give less")


def _lines(file: Path) -> list[str]:
    """No lines where the system has no such file."""
    try:
        return file.read_text(encoding="ascii").split("\n")
    except OSError:
        return []
