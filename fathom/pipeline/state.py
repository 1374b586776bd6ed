"""What is begun and what is finished of a pipeline: `pipeline.json` in its folder."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fathom.errors import UserError
from fathom.train.run import replace_text

_FILE = "pipeline.json"


@dataclass(frozen=True)
class StageState:
    """Where a stage stands."""

    verb: str
    fingerprint: str
    """Of its recipe, and of the stages that it builds on."""
    finished: bool = False
    seconds: float = 0.0
    """Of all its sessions, measuring included."""
    evaluation: dict[str, Any] | None = None
    """As `fathom eval` writes it; None for a stage that yields no model."""


def read_state(folder: Path) -> dict[str, StageState]:
    """By stage, in their order; empty where nothing was begun. Raises `UserError` for a file that is none."""
    file = folder / _FILE
    try:
        return {name: StageState(**values) for name, values in json.loads(file.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give the pipeline another --name, or remove it") from None


def write_state(folder: Path, stages: Mapping[str, StageState]) -> None:
    """A kill leaves the file either old or new. Raises `UserError` where the disk refuses."""
    text = json.dumps({name: asdict(stage) for name, stage in stages.items()}, indent=2, ensure_ascii=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / _FILE, text + "\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
