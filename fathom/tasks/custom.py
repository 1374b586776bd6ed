"""A user's own task, out of a Python file: `path/to/file.py:MyTask`.

    from fathom.tasks import Problem, Task

    class Reverse(Task):
        levels = 5

        def problem(self, random, level):
            word = "".join(random.choices("abcdefgh", k=2 + level))
            return Problem(f"Write '{word}' backwards.", answer=word[::-1], level=level)

        def check(self, problem, answer):
            return answer.strip() == problem.answer

`problem` is asked with a generator of its own, from which all chance has to come. What a mistake in the file, in
`problem` or in `levels` raises is one line with its place; one in `check` costs that answer its reward, and is counted.
"""

import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from fathom.errors import UserError, nearest
from fathom.tasks.faults import describe
from fathom.tasks.options import construct
from fathom.tasks.task import Task, require_levels


def open_custom(path: Path, name: str, options: Mapping[str, str]) -> Task:
    """The task that class `name` of the file makes. The file is run: its code is the user's own."""
    where = f"{path}:{name}"
    found = getattr(_run(path), name, None) if name else None
    if found is None:
        raise UserError(_without(path, name))
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(f"{where} is not a class derived from fathom.tasks.Task")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise UserError(f"{where} does not define {' and '.join(missing)}; a task needs both problem and check")
    try:
        task = construct(found, options, where=where)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: making it raised {describe(error, path)}") from error
    require_levels(task)
    return task


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    name = f"fathom_custom_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{path}: running it raised {describe(error, path)}") from error
    return module


def _without(path: Path, name: str) -> str:
    """What to say where the file has no class of that name."""
    tasks = [key for key, value in vars(_run(path)).items() if _is_own_task(value)]
    listed = f"; tasks in it: {', '.join(tasks)}" if tasks else "; it has no class derived from fathom.tasks.Task"
    if not name:
        return f"{path}: say which class, as in {path}:{tasks[0] if tasks else 'MyTask'}{listed}"
    return f"{path}: no class '{name}'{nearest(name, tasks)}{listed}"


def _is_own_task(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Task) and not inspect.isabstract(value)
