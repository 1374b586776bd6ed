"""Checkpoints: a model folder that anyone can open, and in it what resuming needs; whole or not there at all.

    step_00000200/
        config.json, model.safetensors, tokenizer …   an ordinary Hugging Face folder, weights in float32
        training_state/
            optimizer.safetensors                     every state tensor, `<parameter>.<name>`
            progress.json                             steps, tokens, the data loader's position
            recipe.toml                               what was being run
            ema/                                      averaged weights, a model folder too, where a recipe asks for them
            reference/                                the reference policy of a KL term, likewise
            manifest.json                             size and SHA-256 of every other file

**Why a kill cannot hurt.** Everything is written into a hidden neighbour, each file and folder is fsynced, and one
rename gives it its name. A checkpoint is taken away the other way round: renamed to hidden, then deleted. So a folder
that is called `step_…` was whole at some time; the manifest says whether it still is. What a kill leaves behind is
hidden, and swept at the next start.

**What is not stored:** states of random generators. Nothing in training draws from a global one: first weights, data
order and samples are functions of the seed and the position.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fathom.config import ModelConfig, PretrainRecipe, dump_recipe, read_recipe
from fathom.config.recipe import AnyRecipe, Recipe
from fathom.data.tokenizer import Tokenizer
from fathom.errors import UserError
from fathom.model.checkpoint import load_model, new_folder, write_model
from fathom.model.transformer import Transformer
from fathom.scratch import sync

State = dict[str, Tensor]

TRAINING = "training_state"
OPTIMIZER, PROGRESS, RECIPE, EMA, REFERENCE, MANIFEST = (
    f"{TRAINING}/{name}"
    for name in ("optimizer.safetensors", "progress.json", "recipe.toml", "ema", "reference", "manifest.json")
)


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Steps made."""
    tokens: int = 0
    """Tokens trained on."""
    bad_steps: int = 0
    """Steps skipped for a loss or gradient that was not finite."""
    bad_in_a_row: int = 0
    """Those since the last good step."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the next problems or tokens depend on: `Loader.state()`, or a curriculum's level."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of; tensors may be shared with the run or be copies."""

    config: ModelConfig
    weights: State
    optimizer: State
    ema: State | None
    progress: Progress
    recipe: Recipe
    tokenizer: Tokenizer
    reference: State | None = None


@dataclass(frozen=True)
class Resumed:
    """A checkpoint, read back."""

    model: Transformer
    optimizer: State
    ema: State | None
    progress: Progress
    reference: State | None = None


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps; names sort as steps do."""
    return f"step_{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first, damaged ones included."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())


def write_checkpoint(folder: Path, contents: Contents) -> Path:
    """Write `folder/step_…` and return it. Raises `UserError` when the disk refuses; nothing is left then."""
    target = folder / checkpoint_name(contents.progress.step)
    remove(target)  # a damaged one that was passed over when resuming
    with new_folder(target) as scratch:
        (scratch / TRAINING).mkdir()
        write_model(scratch, contents.config, contents.weights, tokenizer=contents.tokenizer, dtype="float32")
        for place, weights in ((EMA, contents.ema), (REFERENCE, contents.reference)):
            if weights is not None:
                (scratch / place).mkdir()
                write_model(scratch / place, contents.config, weights, tokenizer=contents.tokenizer, dtype="float32")
        _save_tensors(contents.optimizer, scratch / OPTIMIZER)
        _write_json(scratch / PROGRESS, asdict(contents.progress))
        (scratch / RECIPE).write_text(dump_recipe(contents.recipe), encoding="utf-8")
        _write_json(scratch / MANIFEST, {"files": _digests(scratch)})
        for path in [scratch, *scratch.rglob("*")]:
            sync(path)
    return target


def read_checkpoint(checkpoint: Path) -> Resumed:
    """Everything a run goes on from, with float32 weights. Raises `UserError`."""
    try:
        progress = Progress(**json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8")))
        optimizer = load_file(checkpoint / OPTIMIZER)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{checkpoint}: its training state cannot be read ({error})") from None
    ema, reference = (
        load_model(checkpoint / place, dtype="float32").state_dict() if (checkpoint / place).exists() else None
        for place in (EMA, REFERENCE)
    )
    return Resumed(load_model(checkpoint, dtype="float32"), optimizer, ema, progress, reference)


def read_checkpoint_recipe(checkpoint: Path, kind: type[AnyRecipe] = PretrainRecipe) -> AnyRecipe:
    """The recipe that was being run. Raises `UserError`."""
    return read_recipe(checkpoint / RECIPE, [], kind)


def damage(checkpoint: Path, *, digests: bool = True) -> str | None:
    """What is wrong with a checkpoint, in a few words: a file that is missing, cut or changed. None if it is whole.

    Without `digests` only sizes are compared, which reads no weights.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            size = (checkpoint / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
        for name, expected in files.items() if digests else ():
            if _digest(checkpoint / name)["sha256"] != expected["sha256"]:
                return f"{name} was changed"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def remove(checkpoint: Path) -> None:
    """Take a checkpoint away so that at no time a part of it goes by its name."""
    if checkpoint.exists():
        hidden = checkpoint.parent / f".{checkpoint.name}.removed-{os.getpid()}"
        checkpoint.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)  # what stays is hidden, and swept later


def sweep(folder: Path) -> None:
    """Delete what a killed run left behind: half-written and half-removed checkpoints, all of them hidden."""
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _save_tensors(tensors: State, file: Path) -> None:
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): _digest(p) for p in files}


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
