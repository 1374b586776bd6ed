"""What the folder of a run says: its recipe, its metrics, and what the data factory or the model left there."""

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from fathom.config.pipeline import KINDS
from fathom.config.recipe import Recipe
from fathom.errors import UserError
from fathom.evaluate.command import RESULT as EVALUATION
from fathom.evaluate.written import first_mistake, looked_over
from fathom.report.measurements import Measurements
from fathom.train.moments import FILE as CORRECTION
from fathom.train.run import RunFolder


@dataclass(frozen=True)
class Run:
    """A run, finished or not."""

    folder: RunFolder
    verb: str
    """What made it: `pretrain`, `sft`, `rl` or `synth`."""
    recipe: dict[str, Any]
    """As in its file."""
    measured: Measurements
    counts: dict[str, Any] | None
    """Of `synth`: what became of the candidates."""
    correction: dict[str, Any] | None
    """Of `rl`: the first self-correction that was drawn."""
    evaluation: dict[str, Any] | None
    """What `fathom eval`, or a pipeline, measured on held-out problems."""

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Raises `UserError` for a folder that is no run, and for files that cannot be read."""
        folder = RunFolder(path)
        if not folder.recipe.is_file():
            raise UserError(f"{path}: is not a run, it has no {folder.recipe.name}; name a folder in runs/")
        try:
            recipe = tomllib.loads(folder.recipe.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{folder.recipe}: not valid TOML ({error})") from None
        kinds = {"synth.json": _of_shape(_Counts), CORRECTION: _of_shape(_Correction), EVALUATION: looked_over}
        left = (_read(path / name, look_over) for name, look_over in kinds.items())
        return cls(folder, _verb(recipe), recipe, Measurements.of(folder.metrics), *left)

    @property
    def kind(self) -> type[Recipe]:
        """What its recipe is."""
        return KINDS[self.verb]

    def field(self, *path: str) -> Any:
        """A field of the recipe; None where it is not there."""
        value: Any = self.recipe
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    @property
    def steps(self) -> int | None:
        """How many the recipe asks for."""
        steps = self.field("train", "steps")
        return steps if isinstance(steps, int) else None


def _verb(recipe: Mapping[str, Any]) -> str:
    """Which command's recipe this is, by what only that one's has."""
    if "tasks" in recipe:
        return "synth"
    if "task" in recipe:
        return "rl"
    data = recipe.get("data")
    return "sft" if isinstance(data, dict) and "files" in data else "pretrain"


class _Counted(BaseModel):
    drawn: NonNegativeInt
    right: NonNegativeInt
    kept: NonNegativeInt


class _Total(_Counted):
    dropped: dict[str, NonNegativeInt]


class _Round(_Counted):
    round: int


class _Level(_Counted):
    task: str
    level: int


class _Counts(BaseModel):
    """What is shown of `synth.json`."""

    model_config = ConfigDict(strict=True)
    total: _Total
    rounds: list[_Round]
    levels: list[_Level]


class _Correction(BaseModel):
    """Of `fathom.train.moments`."""

    model_config = ConfigDict(strict=True)
    step: int
    question: str
    completion: str
    word: str


def _read(file: Path, look_over: Callable[[Any, Path], Any]) -> dict[str, Any] | None:
    """None where it is not there. Raises `UserError`, as `look_over` does for what is something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); put it right or delete it") from None
    look_over(values, file)
    return values


def _of_shape(shape: type[BaseModel]) -> Callable[[Any, Path], None]:
    def look_over(values: Any, file: Path) -> None:
        try:
            shape.model_validate(values)
        except ValidationError as error:
            raise UserError(
                f"{file}: is not what a run writes there ({first_mistake(error)}); put it right or delete it"
            ) from None

    return look_over
