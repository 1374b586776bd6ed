"""Commands to try next, in a form that works as it stands."""

import os
import shutil
import sys
from pathlib import Path


def fathom_command() -> str:
    """How to call this very `fathom` from the present folder: by name where it is on PATH, else by its place."""
    program = Path(sys.executable).parent / "fathom"
    if not program.exists():
        return f"{sys.executable} -m fathom.cli"
    found = shutil.which("fathom")
    if found is not None and os.path.samefile(found, program):
        return "fathom"
    return str(program.relative_to(Path.cwd())) if program.is_relative_to(Path.cwd()) else str(program)
