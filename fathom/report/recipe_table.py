"""A run's recipe as a table: what it says, what it would say by itself, and what each field means."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fathom.config.section import section_at


@dataclass(frozen=True)
class Field:
    """One field of a recipe."""

    path: str
    value: str
    default: str
    """Empty where the recipe must say."""
    help: str
    changed: bool


def recipe_fields(values: dict[str, Any], kind: type[BaseModel]) -> list[Field]:
    """All fields of the recipe `values`, as in the file; one that `kind` does not know, from another version, too."""
    return list(_fields(values, kind, {}, ""))


def _fields(values: dict[str, Any], kind: type[BaseModel] | None, default: Any, prefix: str) -> Iterator[Field]:
    for name, value in values.items():
        field = kind.model_fields.get(name) if kind is not None else None
        usual = default.get(name, PydanticUndefined) if isinstance(default, dict) else PydanticUndefined
        if usual is PydanticUndefined and field is not None:
            usual = field.default
        if isinstance(usual, BaseModel):
            usual = usual.model_dump()
        if isinstance(value, dict):
            inner = section_at(kind, [name]) if kind is not None else None
            yield from _fields(value, inner, usual, f"{prefix}{name}.")
            continue
        sentence = " ".join((field.description or "").split()) if field is not None else ""
        yield Field(prefix + name, written(value), written(usual), sentence, written(value) != written(usual))


def written(value: Any) -> str:
    """A field's value for a person, whatever it is."""
    if value is PydanticUndefined:
        return ""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "; ".join(f"{name} = {written(own)}" for name, own in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(written, value)) or "(empty)"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
