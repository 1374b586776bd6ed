"""Hidden neighbours of a folder or file in the making, and what to do about those that a killed process left."""

import os
import shutil
from pathlib import Path


def neighbour(target: Path, purpose: str) -> Path:
    """`.NAME.PURPOSE-PID` beside `target`: on the same disk, and this process's own."""
    return target.with_name(f".{target.name}.{purpose}-{os.getpid()}")


def sweep(target: Path, *purposes: str) -> None:
    """Delete the neighbours of `target` that processes no longer running on this machine left, and our own."""
    for purpose in purposes:
        for leftover in leftovers(target, purpose):
            shutil.rmtree(leftover, ignore_errors=True)


def leftovers(target: Path, purpose: str) -> list[Path]:
    """The neighbours of `target` that belong to no other running process."""
    prefix = f".{target.name}.{purpose}-"
    if not target.parent.is_dir():
        return []
    found = [path for path in target.parent.iterdir() if path.name.startswith(prefix)]
    return sorted(path for path in found if _is_over(path.name.removeprefix(prefix)))


def partial(file: Path) -> Path:
    """Where a file is written before it takes its place."""
    return file.with_name(f".{file.name}.partial")


def replace_text(file: Path, text: str) -> None:
    """Write a file that a kill leaves either old or new, and a full disk old."""
    replace_bytes(file, text.encode())


def replace_bytes(file: Path, content: bytes) -> None:
    """As `replace_text`."""
    scratch = partial(file)
    try:
        scratch.write_bytes(content)
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_over(number: str) -> bool:
    if not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)  # asks whether the process exists, and sends nothing
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False  # somebody else's, running
    return int(number) == os.getpid()
