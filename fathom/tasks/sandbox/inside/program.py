"""Runs one program in a process that is already confined, and says what came of it.

Everything here shares the process with the program, which can change any of it. That is of no consequence: all that
goes home is what this program claims to have given, and the trusted side takes it for no more.
"""

import atexit
import json
import os
import sys
import types
from typing import Any

from . import plain

OUT_OF_MEMORY = 86
"""The exit status of a program that had to stop for want of memory, when there may be none to say so."""
_WORDS = 200


def run(request: bytes, result: int) -> int:
    """Do what `request` (JSON) asks, write what came of it to the descriptor `result`; the exit status."""
    asked = json.loads(request)
    send, dump = os.write, plain.write  # as they are before the program may put others in their place
    try:
        if "function" in asked:
            report, status = _call(asked)
        else:
            report, status = _main(asked["program"])
        text = dump(report).encode()
    except MemoryError:
        return OUT_OF_MEMORY
    while text:
        text = text[send(result, text) :]
    return status


def _call(asked: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Define, then call once per arguments, up to the first call that fails."""
    returned: list[str] = []
    write = plain.write
    try:
        function = _execute(asked["program"], "program").get(asked["function"])
        if function is None:
            return {"error": f"it defines no {asked['function']}", "returned": returned}, 0
        for arguments in asked["arguments"]:
            returned.append(write(function(*plain.read(arguments))))
    except MemoryError:
        raise
    except BaseException as error:  # SystemExit and its like included: a program must not get past its calls
        return {"error": _line(error), "returned": returned}, 0
    return {"returned": returned}, 0


def _main(program: str) -> tuple[dict[str, Any], int]:
    """Run as a script: what it prints is its output, its exit status is that of a script."""
    try:
        try:
            _execute(program, "__main__")
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
    except MemoryError:
        raise
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        return {}, status & 0xFF
    except BaseException as error:
        return {"error": _line(error)}, 1
    return {}, 0


def _execute(program: str, name: str) -> dict[str, Any]:
    """The names a program defines, run as the module `name` (dataclasses and typing look for it in `sys.modules`)."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(program, "program.py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _line(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_WORDS]
    except BaseException:  # its own __str__ raised
        return type(error).__name__[:_WORDS]
