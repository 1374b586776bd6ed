"""The base of every configuration: strict, immutable, documented field by field.

A field's docstring is its help text. An unknown key is an error that names the nearest known one, and
every error is one line that says where: a typo in a recipe must never be read as a default.
"""

import reprlib
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from fathom.errors import UserError, nearest


class Section(BaseModel):
    """A group of settings. Unknown keys are refused and instances are frozen.

    Types are taken at their word: `true` is no number and "7" is a text. Two things pass for another: a whole number
    where a float is asked for, and a list where a tuple is (TOML and JSON have no tuples).
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _lists_become_tuples(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            key: tuple(value) if isinstance(value, list) and _is_tuple(field_type(cls, [key])) else value
            for key, value in values.items()
        }

    @classmethod
    def parse(cls, values: dict[str, Any], *, where: str, flags: Collection[str] = ()) -> Self:
        """Validate `values`; a mistake raises `UserError` that starts with `where` (a file, a flag).

        `flags` are the dotted paths whose values came from the command line: what is wrong with one of those starts
        with its flag instead, and a rule between fields that a flag may have broken with both.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            said: dict[str, list[str]] = {}
            for mistake in _of_their_own(error)[:3]:
                said.setdefault(_origin(mistake, where, flags), []).append(_explain(cls, mistake))
            raise UserError("; ".join(f"{place}: {'; '.join(lines)}" for place, lines in said.items())) from None

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).model_validate({**self.model_dump(), **changes})


def _of_their_own(error: ValidationError) -> list[ErrorDetails]:
    """Its mistakes, but for lists that are too short only because what they hold is mistaken."""
    found = error.errors()
    held = {mistake["loc"][:end] for mistake in found for end in range(len(mistake["loc"]))}
    return [mistake for mistake in found if mistake["type"] != "too_short" or mistake["loc"] not in held]


def field_type(cls: type[BaseModel], path: Sequence[int | str]) -> Any:
    """The annotation of the field at `path` below `cls`; None where there is no such field."""
    *parents, name = path
    owner = section_at(cls, parents)
    field = owner.model_fields.get(str(name)) if owner else None
    return field.annotation if field else None


def is_optional(annotation: Any) -> bool:
    """Whether a field of this type may be None."""
    return type(None) in typing.get_args(annotation)


def section_at(cls: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel] | None:
    """The section at `path` below `cls`, through optional ones too; None where there is no section."""
    for part in path:
        field = cls.model_fields.get(str(part))
        if field is None:
            return None
        annotation = field.annotation
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
            annotation = next((a for a in typing.get_args(annotation) if a is not type(None)), None)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        cls = annotation
    return cls


def field_paths(cls: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every field name at or below `cls`, with its dotted path; of equal names the outermost and first counts."""
    own = {name: prefix + name for name in cls.model_fields}
    below: dict[str, str] = {}
    for name, path in own.items():
        if section := section_at(cls, [name]):
            below = field_paths(section, f"{path}.") | below
    return below | own


def sentence(docstring: str | None) -> str:
    """A docstring for a terminal: on one line, without the backticks."""
    return " ".join((docstring or "").split()).replace("`", "")


def _is_tuple(annotation: Any) -> bool:
    """Whether a field of this type is a tuple, or one or None."""
    return any(typing.get_origin(kind) is tuple for kind in (annotation, *typing.get_args(annotation)))


def _origin(error: ErrorDetails, where: str, flags: Collection[str]) -> str:
    """What the mistake is to be looked for in: the flag that gave the value, else `where`."""
    place = f"{'.'.join(str(part) for part in error['loc'])}."
    given = [f"--{flag}" for flag in flags if place.startswith(f"{flag}.")]
    inside = [f"--{flag}" for flag in flags if place == "." or flag.startswith(place)]
    if error["type"] == "extra_forbidden":  # an unknown section is there because of the flags that name it
        given = given or inside
    if given:
        return ", ".join(given)
    return f"{where} with {', '.join(inside)}" if inside else where


def _explain(cls: type[BaseModel], error: ErrorDetails) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, field = error["loc"]
        owner = section_at(cls, parents)
        beside = {name: ".".join(map(str, [*parents, name])) for name in owner.model_fields} if owner else {}
        paths = field_paths(cls) | beside
        return f"unknown key '{path}'{nearest(str(field), paths, shown=paths)}"
    if error["type"] == "missing":
        return f"'{path}' is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not path:
        return message
    if error["type"] == "model_type" and (table := section_at(cls, error["loc"])):
        names = ", ".join(table.model_fields)
        return f"'{path}' is a table, not {_SHORT.repr(error['input'])}; say which field of it ('{path}.…'): {names}"
    if isinstance(error["input"], dict):  # the rule is between fields, and the message names those it is about
        return f"'{path}': {message}"
    return f"'{path}' = {_SHORT.repr(error['input'])}: {message}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
