"""Tasks by name: built in, of reasoning-gym, out of a JSONL file, out of a user's Python file."""

import importlib
from collections.abc import Mapping
from pathlib import Path

from fathom.errors import UserError, nearest
from fathom.tasks.mixture import BETWEEN, Mixture
from fathom.tasks.options import construct, read_options, split_name
from fathom.tasks.task import Task, require_levels

BUILT_IN: Mapping[str, tuple[str, str]] = {
    "arithmetic": ("arithmetic", "Arithmetic"),
    "modular": ("arithmetic", "Modular"),
    "equations": ("equations", "Equations"),
    "countdown": ("countdown", "Countdown"),
    "logic": ("logic", "Logic"),
    "bilingual": ("bilingual", "Bilingual"),
    "programs": ("programs", "Programs"),
    "smalltalk": ("smalltalk", "Smalltalk"),
}
"""Name to module of this package and class."""

FORMS = "a built-in task, gym:DATASET, a .jsonl file, FILE.py:CLASS, or several with ' + ' between them"
"""What a name may be."""


def open_task(name: str) -> Task:
    """The task called `name`, one of `FORMS`, with `?option=value&…` after it where it takes options; several with
    ` + ` between them are one (`mixture`).

    Every task takes `levels=N`, which leaves its levels above N out. Raises `UserError` for a name or an option that
    there is not, a file that cannot be read, a missing package.
    """
    parts = name.split(BETWEEN)
    return Mixture([_open(part) for part in parts]) if len(parts) > 1 else _open(name)


def _open(name: str) -> Task:
    base, options = split_name(name.strip())
    limit = {"levels": options.pop("levels")} if "levels" in options else {}
    levels = read_options(limit, {"levels": int}, where=base).get("levels")
    task = _named(base, options)
    if levels is not None:
        require_levels(task)
        if not 1 <= levels <= task.levels:
            raise UserError(f"task {base}: levels = {levels}, but it has 1 to {task.levels}")
        task.levels = levels
    return task


def _named(base: str, options: dict[str, str]) -> Task:
    if base in BUILT_IN:
        module, cls = BUILT_IN[base]
        return construct(getattr(importlib.import_module(f"fathom.tasks.{module}"), cls), options, where=base)
    if base.startswith("gym:"):
        from fathom.tasks.gym import Gym

        return Gym(base.removeprefix("gym:"), options)
    file, colon, cls = base.rpartition(":")
    if (file if colon else base).endswith(".py"):
        from fathom.tasks.custom import open_custom

        return open_custom(Path(file if colon else base), cls if colon else "", options)
    if base.endswith(".jsonl"):
        from fathom.tasks.jsonl import JsonLines

        if options:
            raise UserError(f"task {base}: unknown option '{next(iter(options))}'; a file takes none")
        return JsonLines(Path(base))
    raise UserError(f"unknown task '{base}'{nearest(base, BUILT_IN)}; a task is {FORMS}; see 'fathom tasks list'")
