"""Options in a task's name: `countdown?key=value&other=value`, each read as the type that is asked for."""

import inspect
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from fathom.errors import UserError, nearest


def split_name(text: str) -> tuple[str, dict[str, str]]:
    """A name, and the options that follow its question mark."""
    name, mark, query = text.partition("?")
    options: dict[str, str] = {}
    for part in query.split("&") if mark else ():
        key, equals, value = part.partition("=")
        if not key or not equals:
            raise UserError(f"task {text}: '{part}' is not of the form key=value")
        if key in options:
            raise UserError(f"task {text}: '{key}' is given twice")
        options[key] = value
    return name, options


def short_names(tasks: Iterable[str]) -> dict[str, str]:
    """What each task is called in tables and figures: without its options, where that tells it apart."""
    bare = {task: task.partition("?")[0] for task in tasks}
    often = Counter(bare.values())
    return {task: name if often[name] == 1 else task for task, name in bare.items()}


def construct(make: Callable[..., Any], options: Mapping[str, str], *, where: str) -> Any:
    """`make(**options)`, for a class whose constructor takes its options by keyword."""
    known = {
        name: parameter
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    hints = typing.get_type_hints(make.__init__) if known else {}
    return make(**read_options(options, {name: hints.get(name, str) for name in known}, where=where))


def read_options(options: Mapping[str, str], kinds: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Every option as its type; `UserError` for one that there is not, and for a value that is no such thing."""
    values = {}
    for key, text in options.items():
        if key not in kinds:
            listed = f"; options: {', '.join(kinds)}" if kinds else "; it takes none"
            raise UserError(f"task {where}: unknown option '{key}'{nearest(key, kinds)}{listed}")
        try:
            values[key] = read_value(text, kinds[key])
        except ValueError as error:
            raise UserError(f"task {where}: {key} = '{text}': {error}") from None
    return values


def read_value(text: str, kind: Any) -> Any:
    """`text` as an int, a float, a bool, a choice, a list of such, or none; raises `ValueError` with what it is not."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if text == "none" else read_value(text, next(k for k in inner if k is not types.NoneType))
    if origin is Literal:
        return _choice(text, inner)
    if origin in (list, tuple) or kind in (list, tuple):
        return (origin or kind)(read_value(part, inner[0] if inner else str) for part in text.split(","))
    if kind is bool:
        return _choice(text, ("true", "false")) == "true"
    if kind in (int, float):
        return _number(text, kind)
    if kind is str:
        return text
    raise ValueError("this option cannot be given as text")


def _choice(text: str, choices: Sequence[str]) -> str:
    if text not in choices:
        raise ValueError(f"is not one of {', '.join(map(str, choices))}")
    return text


def _number(text: str, kind: type) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError("is not a whole number" if kind is int else "is not a number") from None
