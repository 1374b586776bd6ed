"""What would stop a pipeline midway and can be told before it begins: a later stage's task, package or file that is not
there, a model that is not to be had or cannot do what it is to do, rows that must not be learnt, a disk without room.

What a stage needs of an earlier one is known by where that began: its vocabulary and its context are those of the model
that the first of them started from.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fathom.config.hf import read_config
from fathom.config.model import ModelConfig
from fathom.config.pipeline import ModelRecipe
from fathom.config.recipe import PretrainRecipe, Recipe
from fathom.config.rl import RLRecipe
from fathom.config.sft import SFTRecipe
from fathom.config.synth import SynthRecipe
from fathom.data.conversations import TurnEncoder
from fathom.data.tokenizer import Tokenizer
from fathom.errors import UserError
from fathom.model.accounting import count_parameters
from fathom.pipeline.plan import Plan
from fathom.synth.decontamination import read_questions
from fathom.synth.duplicates import Duplicates
from fathom.synth.plan import open_tasks
from fathom.synth.teachers import Asking, WorkedSolutions
from fathom.tasks.mixture import uses_sandbox
from fathom.tasks.programs import shared_sandbox, use_sandbox
from fathom.train.corpus import find_data
from fathom.train.rl import require_one_vocabulary, task_of
from fathom.train.rollout import Asker, draw_problems
from fathom.train.run import model_folder

_TRIED = 8
"""Problems by which is seen whether a task writes solutions."""
_BYTES = 8
"""Of a parameter in a checkpoint, at least: float32 weights, and one moment of the optimizer."""


@dataclass(frozen=True)
class _Origin:
    """What a stage's model has from the one that it began as."""

    config: ModelConfig | None = None
    """None where only loading it would tell."""
    tokenizer: Tokenizer | None = None
    """None where that is still to be made, or only loading would tell."""


def require_what_is_here(plan: Plan) -> None:
    """Look over what stages that are left need, but for models and rows from outside the pipeline. Raises `UserError`;
    fetches and writes nothing."""
    built: set[str] = set()
    for name, recipe in _left(plan):
        with _in_stage(name):
            if isinstance(recipe, SynthRecipe):
                _require_synth(recipe)
            elif isinstance(recipe, RLRecipe):
                if uses_sandbox(task_of(recipe)):
                    use_sandbox(recipe.task.sandbox)
                    shared_sandbox()
            elif isinstance(recipe, PretrainRecipe):
                if recipe.data.path not in built:  # else an earlier stage makes it
                    find_data(recipe, Console(quiet=True))
                built.add(recipe.data.path)
            _require_of_earlier(plan, recipe)


def require_what_is_elsewhere(plan: Plan, *, fetch: bool = True) -> None:
    """Look over models and rows from outside the pipeline, and the room on the disk. Raises `UserError` where one is
    not to be had, cannot be used so, or must not be learnt. Without `fetch`, models that are
    not on this machine yet are taken to be right."""
    origins: dict[str, _Origin] = {}
    needed = 0
    for name, recipe in plan.recipes.items():
        left = name not in plan.finished
        with _in_stage(name):
            if isinstance(recipe, PretrainRecipe):
                origins[name] = _Origin(recipe.model)
            elif recipe.model is not None:
                origins[name] = _origin(plan, recipe.model, origins, fetch=fetch and left)
            if left and name in origins:
                _require_of_models(plan, name, origins, fetch=fetch)
            if isinstance(recipe, SFTRecipe):
                _refuse_contaminated(plan, recipe.data.files, left=left)
        if left and not isinstance(recipe, ModelRecipe | SynthRecipe) and (config := origins[name].config) is not None:
            needed += _BYTES * count_parameters(config).total
    _require_room(plan.folder, needed)


def _left(plan: Plan) -> list[tuple[str, Recipe]]:
    return [(name, recipe) for name, recipe in plan.recipes.items() if name not in plan.finished]


@contextmanager
def _in_stage(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"stage {name}: {error}") from None


def _require_synth(recipe: SynthRecipe) -> None:
    tasks = open_tasks(recipe)
    Duplicates(recipe.filters.duplicates)
    for file in recipe.decontamination.files:
        list(read_questions(Path(file)))
    for wanted in recipe.tasks if recipe.source == "worked" else ():
        task = tasks[wanted.name]
        problems = draw_problems(task, "train", wanted.levels, _TRIED, seed=recipe.seed)
        if problems:
            WorkedSolutions().solve(task, [Asking(problem, recipe.seed) for problem in problems])


def _require_of_earlier(plan: Plan, recipe: Recipe) -> None:
    """What is named of an earlier stage is of a kind that it makes."""
    for field in ("model", "teacher"):
        path = getattr(recipe, field, None)
        if isinstance(path, str) and (stage := _stage_of(plan, path)) and not _yields_model(plan, stage):
            raise UserError(f"{field} = @{stage}: that stage yields rows and no model; name one that does")
    for path in recipe.data.files if isinstance(recipe, SFTRecipe) else ():
        if not (stage := _stage_of(plan, path)):
            continue
        if not isinstance(made := plan.recipes[stage], SynthRecipe):
            raise UserError(f"data.files: {path}: stage {stage} writes no rows; name a stage 'synth' that does")
        if Path(path) != plan.folder / stage / f"traces.{made.format}":
            raise UserError(
                f"data.files: {path}: the rows of stage {stage} are @{stage}/traces.{made.format}; name that"
            )


def _yields_model(plan: Plan, stage: str) -> bool:
    return stage in plan.settings


def _stage_of(plan: Plan, path: str) -> str | None:
    """The stage in whose folder `path` lies; None where it is not the pipeline's own."""
    if not Path(path).is_relative_to(plan.folder):
        return None
    first = Path(path).relative_to(plan.folder).parts[:1]
    return first[0] if first and first[0] in plan.recipes else None


def _origin(plan: Plan, path: str, origins: Mapping[str, _Origin], *, fetch: bool) -> _Origin:
    """Of the model at `path`. Raises `UserError` where there is none, or it cannot be asked."""
    if (stage := _stage_of(plan, path)) is not None:
        return origins.get(stage, _Origin())
    if not fetch and not (path.startswith("package:") or Path(path).expanduser().exists()):
        return _Origin()  # to be fetched
    try:
        folder = model_folder(path)
    except UserError:
        if fetch:
            raise
        return _Origin()
    if folder.suffix == ".gguf":
        return _Origin()
    if (tokenizer := Tokenizer.from_folder(folder)) is None:
        raise UserError(f"{path}: has no tokenizer, without which no problem can be put to it")
    return _Origin(read_config(folder), tokenizer)


def _require_of_models(plan: Plan, name: str, origins: Mapping[str, _Origin], *, fetch: bool) -> None:
    """The model of a stage can do what it is to do."""
    recipe, origin = plan.recipes[name], origins[name]
    teacher = recipe.teacher if isinstance(recipe, RLRecipe) else None
    its = None if teacher is None else _origin(plan, teacher, origins, fetch=fetch)
    if origin.tokenizer is not None:
        if isinstance(recipe, SFTRecipe):
            TurnEncoder(origin.tokenizer)
        if isinstance(recipe, RLRecipe):
            Asker(origin.tokenizer, recipe.prompt)
        if name in plan.settings:
            Asker(origin.tokenizer, plan.settings[name].prompt)
        if its is not None and its.tokenizer is not None and its is not origin:
            assert origin.config is not None, "where there is a tokenizer"
            assert its.config is not None, "where there is a tokenizer"
            require_one_vocabulary(str(teacher), (its.config, its.tokenizer), (origin.config, origin.tokenizer))
    drawing = {"rollout": getattr(recipe, "rollout", None), "draw": getattr(recipe, "draw", None)}
    for field, section in drawing.items():
        if section is None or section.endpoint is not None or origin.config is None:
            continue
        if section.max_tokens >= (context := origin.config.max_position_embeddings):
            raise UserError(
                f"{field}.max_tokens = {section.max_tokens}, but prompt and completion together have {context} tokens "
                "at most in this model"
            )


def _refuse_contaminated(plan: Plan, files: Sequence[str], *, left: bool) -> None:
    """Rows from elsewhere that are to be learnt; where other problems are measured with than before, also those that
    a finished stage has learnt, of whatever stage."""
    if left:
        plan.refuse_contaminated([file for file in files if not _stage_of(plan, file)])
    elif plan.outdated:
        try:
            plan.refuse_contaminated([file for file in files if Path(file).is_file()])
        except UserError as error:
            raise UserError(
                f"{error}, or, as this stage has learnt them, put [evaluation] back as it was or give the pipeline "
                "another --name"
            ) from None


def _require_room(folder: Path, needed: int) -> None:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise UserError(
            f"{folder}: the disk has {free / 1e9:.1f} GB free, and a checkpoint of each stage that is left takes "
            f"{needed / 1e9:.1f} GB together; make room, or take a smaller model"
        )
