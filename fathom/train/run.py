"""A run is a folder.

runs/<name>/
    recipe.toml     as run, every field written out
    metrics.jsonl   one line per step and per evaluation
    samples.md      what the model wrote at each evaluation
    first_correction.json   the first time that it corrected itself while it learnt from rewards (`moments.py`)
    tensorboard/
    checkpoints/    the newest few, each a model folder (`state.py`)
    .lock           held by the process that trains here
"""

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fathom.config import PretrainRecipe, dump_recipe
from fathom.config.recipe import Recipe
from fathom.data.dataset import is_data_folder
from fathom.errors import UserError
from fathom.model.checkpoint import resolve
from fathom.pipeline.state import served
from fathom.scratch import partial, replace_text
from fathom.train.schedule import constant_lr_at, full_micro_batches, lr_at
from fathom.train.state import checkpoints, damage, read_checkpoint_recipe, sweep

LOCK = ".lock"
"""File in a run's folder; locked, not merely present, while a process trains there."""


@dataclass(frozen=True)
class RunFolder:
    """The places in a run's folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe as run."""
        return self.path / "recipe.toml"

    @property
    def metrics(self) -> Path:
        """JSON lines."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Markdown."""
        return self.path / "samples.md"

    @property
    def tensorboard(self) -> Path:
        """Folder of event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"


@dataclass(frozen=True)
class RunResult:
    """How a session of training ended."""

    folder: Path
    step: int
    """Steps made, in all sessions."""
    checkpoint: Path | None
    """The newest one."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """The last one of this session, as in `metrics.jsonl`."""
    interrupted: bool = False
    """Stopped by a signal before the last step; the run can be resumed."""


@contextmanager
def run_folder(folder: Path) -> Iterator[RunFolder]:
    """Hold a run's folder for this process alone; inside, no other can train in it.

    The folder is made if need be, and taken away at the end if no run was begun in it. Raises `UserError` for a folder
    that another process holds or that has something else in it.
    """
    run = RunFolder(folder)
    if not run.recipe.exists() and _holds_something_else(folder):
        raise UserError(f"{folder}: exists and is not a run; choose another name or remove it yourself")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with locked(folder):
            try:
                yield run
            finally:
                if not run.recipe.exists():
                    (folder / LOCK).unlink(missing_ok=True)
    finally:
        if not run.recipe.exists():
            _remove_empty(made)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, for this process alone. Raises `UserError` where another one does.

    The kernel lets go of the lock when its holder dies.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is training here; wait for it, stop it, or give this run another --name"
            ) from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be locked ({error.strerror})") from None
        yield


def find_checkpoint(
    run: RunFolder,
    recipe: Recipe,
    *,
    resume: bool,
    overwrite: bool,
    accept_changes: bool,
    say: Callable[[str], None],
) -> Path | None:
    """The checkpoint to resume from, if any. Changes nothing.

    Raises `UserError` for an existing run without `resume` or `overwrite`, for a recipe that computes something else
    than the checkpoint did (unless `accept_changes`, and where that can be accepted), and when every checkpoint is
    damaged.
    """
    folder = run.path
    if not run.recipe.exists():
        if resume:
            raise UserError(f"{folder}: there is no run to resume; leave --resume out to start it")
        return None
    if overwrite:
        return None
    if not resume:
        raise UserError(
            f"{folder}: this run exists; continue it with --resume, replace it with --overwrite, or give another --name"
        )
    checkpoint = latest(folder, say)
    if checkpoint is None:
        say(f"{folder}: no checkpoint yet; starting from the beginning")
    else:
        _compare(folder, checkpoint, recipe, accept_changes, say)
    return checkpoint


def begin_run(run: RunFolder, recipe: Recipe, *, overwrite: bool) -> None:
    """Write the recipe, and clear the folder of what a killed run left, or with `overwrite` of everything else.

    Raises `UserError` when the disk refuses; an older run is then still there.
    """
    hidden = run.path / ".removed"
    try:
        replace_text(run.recipe, dump_recipe(recipe))
        if overwrite and run.checkpoints.exists():
            # One rename: a kill while they are being deleted leaves no checkpoint of the old run to be resumed.
            shutil.rmtree(hidden, ignore_errors=True)
            run.checkpoints.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
        if overwrite:
            run.metrics.unlink(missing_ok=True)
            run.samples.unlink(missing_ok=True)
            for told in ("report.html", "evaluation.json", "evaluation.svg"):
                (run.path / told).unlink(missing_ok=True)
            shutil.rmtree(run.path / "best", ignore_errors=True)
            shutil.rmtree(run.tensorboard, ignore_errors=True)
        run.checkpoints.mkdir(exist_ok=True)
        sweep(run.checkpoints)
    except OSError as error:
        raise UserError(f"{run.path}: cannot be written ({error.strerror})") from None


def latest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of the run in `folder`; None when it has none at all.

    A damaged one is passed over, and `say` gets a sentence. Raises `UserError` when all are damaged.
    """
    found = checkpoints(RunFolder(folder).checkpoints)
    for checkpoint in reversed(found):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint
        say(f"{checkpoint} is damaged ({wrong}) and passed over")
    if found:
        raise UserError(
            f"{folder}: every checkpoint is damaged, so training cannot go on; 'fathom load {found[-1]}' says whether "
            "its weights still open; start again under another --name"
        )
    return None


def newest_model(folder: Path) -> Path | None:
    """The model folder that the run in `folder` wrote last; None when `folder` is no run or has no checkpoint yet.

    One with a missing or cut file is passed over; where all are, the newest is named, whose weights may be whole.
    """
    return _newest(RunFolder(folder).checkpoints)


def _newest(folder: Path) -> Path | None:
    found = checkpoints(folder)
    whole = (path for path in reversed(found) if damage(path, digests=False) is None)
    return next(whole, found[-1] if found else None)


def model_folder(path: str | Path) -> Path:
    """Where the model lies that `path` names: the newest checkpoint of a run or of its folder `best`, or of the stage
    that a pipeline serves; a model folder, a `.gguf` file, or what is fetched for a hub name. Raises `UserError`."""
    run = RunFolder(Path(path).expanduser())
    if (stage := served(run.path)) is not None:
        return model_folder(stage.model)
    if (newest := newest_model(run.path) or _newest(run.path)) is not None:
        return newest
    if run.recipe.exists():
        raise UserError(f"{path}: this run has no checkpoint yet; train it on with --resume")
    if is_data_folder(run.path):
        raise UserError(f"{path}: holds tokens to train on, not a model; name a run or a model folder")
    return resolve(path)


def changed_fields(before: Recipe, now: Recipe) -> list[str]:
    """Names of the fields that differ and enter the arithmetic; `train.steps` does, by the shares of the schedule."""
    old, new = _flat(before.model_dump()), _flat(now.model_dump())
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    free = tuple(f"{name}." for name in now.FREE_TO_CHANGE)
    return [key for key in changed if not f"{key}.".startswith(free)]


def _holds_something_else(folder: Path) -> bool:
    """Whether there is anything but what a start that was killed may have left."""
    if not folder.is_dir():
        return folder.exists()
    ours = {LOCK, partial(RunFolder(folder).recipe).name}
    return any(path.name not in ours for path in folder.iterdir())


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _compare(folder: Path, checkpoint: Path, now: Recipe, accept_changes: bool, say: Callable[[str], None]) -> None:
    before = read_checkpoint_recipe(checkpoint, type(now))
    changed = changed_fields(before, now)
    if not changed:
        return
    fixed = [name for name in changed if f"{name}.".startswith(tuple(f"{name}." for name in now.FIXED))]
    if fixed:
        raise UserError(
            f"{folder}: cannot resume, {', '.join(fixed)} changed, which cannot be insisted on; "
            "change it back, or give the run another --name"
        )
    names = ", ".join(changed)
    step = int(checkpoint.name.removeprefix("step_"))
    rates = f"learning rate {_lr(before, step - 1):.3g} in step {step}, {_lr(now, step):.3g} in the next"
    if not accept_changes:
        raise UserError(
            f"{folder}: cannot resume, the recipe has changed in {names}; change it back, give the run another --name, "
            f"or insist with --resume --accept-changes ({rates})"
        )
    say(f"resuming with changed {names}: {rates}")


def _lr(recipe: Recipe, step: int) -> float:
    """The rate of the step after `step` steps; after the last one, the rate that was left."""
    if not isinstance(recipe, PretrainRecipe):
        return constant_lr_at(step, recipe.train.warmup_steps, recipe.optimizer.lr)
    total = recipe.train.steps
    return lr_at(min(step, total - 1), total, full_micro_batches(recipe), recipe.schedule, recipe.optimizer.lr)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
