"""What a pipeline is and how far it has come: `pipeline.toml` and `pipeline.json` in its folder.

Nothing of training is imported here: a pipeline's folder names a model, so this is asked wherever one is opened.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fathom.config.pipeline import ModelRecipe, read_pipeline
from fathom.errors import UserError
from fathom.scratch import replace_text

RECIPE = "pipeline.toml"
"""The pipeline as run, every field that was set."""
STATE = "pipeline.json"
"""What is begun, and what is finished."""


@dataclass(frozen=True)
class StageState:
    """Where a stage stands."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    verb: str
    fingerprint: str
    """Of its recipe, and of the stages that it builds on."""
    finished: bool = False
    seconds: float = 0.0
    """Of all its sessions, with the measurement that holds: one that another has replaced is left out, as in joules."""
    evaluation: dict[str, Any] | None = None
    """As `fathom eval` writes it; None for a stage that yields no model."""
    joules: float | None = None
    """Of this machine's processors in all its sessions, whoever used them; None where they cannot be read."""
    below: str = ""
    """Fingerprint of the stages alone that it builds on; empty where it is not known."""
    asked: str = ""
    """Fingerprint of the held-out problems that it was measured with; empty where it is not known."""
    done: float = 0.0
    """Share of it that was over when last recorded. Only the time left is worked out from it."""


_STATES = TypeAdapter(dict[str, StageState])
_READ = {"task", "budget", "problems", "samples", "pass@k", "thought_tokens", "cost"}
"""Of every measurement."""


@dataclass(frozen=True)
class Served:
    """What the folder of a pipeline stands for where a model is asked for."""

    model: str
    """Its path: a stage's folder, or whatever a stage `model` names."""
    state: StageState


def served(folder: Path) -> Served | None:
    """The stage that the pipeline in `folder` serves, where that is finished, else the last finished one that has
    trained a model; None where `folder` is no pipeline's. Raises `UserError` where nothing is finished yet."""
    if not (states := read_state(folder)):
        return None
    pipeline = read_pipeline(folder / RECIPE, []) if (folder / RECIPE).is_file() else None  # older ones have none
    if pipeline is not None:  # a stage that was taken out of it is kept, and is not what it stands for
        states = {stage.name: states[stage.name] for stage in pipeline.stages if stage.name in states}
    finished = {name: state for name, state in states.items() if state.finished and state.evaluation is not None}
    if pipeline is not None and pipeline.serves in finished:
        name = pipeline.serves
    else:
        name = next((name for name in reversed(finished) if finished[name].verb != "model"), None)
    if name is None:
        raise UserError(f"{folder}: no stage of this pipeline has a finished model yet; run the pipeline on")
    model = str(folder / name)
    if pipeline is not None and finished[name].verb == "model":
        recipe = pipeline.recipes(folder, beside=folder)[name]
        assert isinstance(recipe, ModelRecipe)
        model = recipe.model
    return Served(model, finished[name])


def measured_stage(run: Path) -> StageState | None:
    """The stage of a pipeline that `run` is the folder of, where it has been measured; None for any other folder.
    Raises `UserError`."""
    run = run.absolute()
    state = read_state(run.parent).get(run.name)
    return None if state is None or state.evaluation is None else state


def is_pipeline(folder: Path) -> bool:
    """Whether a pipeline was begun there."""
    return any((folder / name).is_file() for name in (RECIPE, STATE))


def read_state(folder: Path) -> dict[str, StageState]:
    """By stage, in their order; empty where nothing was begun. Raises `UserError` for a file that is none."""
    file = folder / STATE
    try:
        states = _STATES.validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except ValidationError as error:
        raise _damaged(file, error) from None
    for name, state in states.items():
        if state.evaluation is not None and not _is_measured(state.evaluation):
            states[name] = replace(state, evaluation=None)  # it is then measured again
    return states


def _damaged(file: Path, error: ValidationError) -> UserError:
    mistake = error.errors()[0]
    what = ": ".join(filter(None, (".".join(map(str, mistake["loc"])), mistake["msg"])))
    return UserError(
        f"{file}: damaged, or of a newer Fathom ({what}); put a whole copy in its place, or give the pipeline another "
        "--name: what its stages have made stays in their folders, and can be named as models"
    )


def _is_measured(evaluation: Mapping[str, Any]) -> bool:
    """Whether it has what is read of it."""
    settings, found = evaluation.get("settings"), evaluation.get("measurements")
    return (
        isinstance(settings, dict)
        and isinstance(found, list)
        and all(isinstance(one, dict) and one.keys() >= _READ and "1" in one["pass@k"] for one in found)
    )


def write_state(folder: Path, stages: Mapping[str, StageState]) -> None:
    """A kill leaves the file either old or new. Raises `UserError` where the disk refuses."""
    text = json.dumps({name: asdict(stage) for name, stage in stages.items()}, indent=2, ensure_ascii=False)
    write_file(folder / STATE, text + "\n")


def write_file(file: Path, text: str) -> None:
    """In a folder that is made if need be; a kill leaves the file either old or new. Raises `UserError`."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, text)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error}); make room") from None
