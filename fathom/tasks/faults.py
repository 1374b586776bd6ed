"""What a user's own code raised, said in one line."""

import os
from pathlib import Path


def describe(error: BaseException, file: str | Path | None) -> str:
    """`ValueError: no way (line 3)`, with the line of `file` where it was raised."""
    said = str(error.msg if isinstance(error, SyntaxError) else error).partition("\n")[0]
    line = _line(error, os.path.abspath(file)) if file else None
    return f"{type(error).__name__}{': ' if said else ''}{said}{f' (line {line})' if line else ''}"


def _line(error: BaseException, file: str) -> int | None:
    if isinstance(error, SyntaxError):
        return error.lineno
    found, trace = None, error.__traceback__
    while trace is not None:
        if os.path.abspath(trace.tb_frame.f_code.co_filename) == file:
            found = trace.tb_lineno
        trace = trace.tb_next
    return found
