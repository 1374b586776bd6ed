import platform
import resource
import subprocess
import sys

import pytest

from fathom.kernels import memory

PROGRAM = """
import resource, torch
from fathom.kernels.memory import keep_freed_memory
if {keep}: keep_freed_memory()
for turn in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3): torch.zeros(40 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    program = PROGRAM.format(keep=keep)
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_memory_that_was_freed_is_used_again() -> None:
    """Large tensors in turns cost page faults at every turn by default, and none once memory is kept."""
    pages = (40 << 20) // resource.getpagesize()
    assert faults(keep=False) > pages
    assert faults(keep=True) < pages // 100


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose C library knows no mallopt goes on as it is."""
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.keep_freed_memory()
