"""What the folder of a run says: its recipe, its metrics, and what the data factory or the model left there."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.config.pipeline import KINDS
from fathom.config.recipe import Recipe
from fathom.errors import UserError
from fathom.evaluate.command import RESULT as EVALUATION
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
        left = (_read(path / name) for name in ("synth.json", CORRECTION, EVALUATION))
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


def _read(file: Path) -> dict[str, Any] | None:
    """None where it is not there. Raises `UserError`."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); put it right or delete it") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: is not what a run writes there; delete it")
    return values
