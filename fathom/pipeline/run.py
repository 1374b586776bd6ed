"""The runner of a pipeline: a stage that is finished is not made again, a broken one is resumed, and after each stage
that yields a model it is measured on the same held-out problems.

    runs/r1/
        pipeline.json        what is begun and what is finished (`fathom.pipeline.state`)
        base/, zero/, …      the stages' own runs
        …/evaluation.json    what was measured after each
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fathom.config.evaluation import EvaluationSettings
from fathom.config.pipeline import Pipeline, StageSection
from fathom.config.recipe import Recipe
from fathom.config.rl import RLRecipe
from fathom.config.synth import SynthRecipe
from fathom.engine.engine import Engine, EngineSettings
from fathom.errors import UserError
from fathom.evaluate.answers import EngineAnswers
from fathom.evaluate.command import RESULT
from fathom.evaluate.evaluate import evaluate, held_out
from fathom.evaluate.results import Evaluation
from fathom.model.checkpoint import load
from fathom.pipeline.state import StageState, read_state, write_state
from fathom.pipeline.table import print_stages
from fathom.synth.factory import synthesize
from fathom.train.pretrain import pretrain
from fathom.train.rl import train_rl
from fathom.train.run import RunFolder, model_folder, replace_text
from fathom.train.sft import train_sft

_INERT = ("checkpoint", "eval")
"""Sections of a recipe that do not change what its run ends with."""
_TRAINERS: Mapping[str, Callable[..., Any]] = {"pretrain": pretrain, "sft": train_sft, "rl": train_rl}


@dataclass(frozen=True)
class PipelineResult:
    """How a session ended."""

    folder: Path
    stages: dict[str, StageState]
    """Those that were begun, in their order."""
    interrupted: bool = False
    """Stopped by a signal; the pipeline goes on where it is run again."""


def run_pipeline(
    pipeline: Pipeline, beside: Path, *, console: Console | None = None, runs: Path = Path("runs"), redo: bool = False
) -> PipelineResult:
    """Make all stages that are not finished, in `runs/<pipeline.name>`; recipes are read from the folder `beside`.

    `redo` makes stages again whose recipe has changed, and those that build on them; without it they are refused.
    Raises `UserError` for everything a person can put right; what was finished before stays so.
    """
    console = console or Console(stderr=True)
    folder = runs / pipeline.name
    # Every recipe is read before the first stage begins: a typo in the last should not cost an hour.
    recipes = {stage.name: stage.resolved(folder, pipeline.seed, beside) for stage in pipeline.stages}
    held_out(pipeline.evaluation)
    if RunFolder(folder).recipe.exists():
        raise UserError(f"{folder}: is a single run, not a pipeline's; give the pipeline another --name")
    fingerprints = _fingerprints(pipeline, recipes)
    before = read_state(folder)
    stale = [name for name, own in fingerprints.items() if name in before and before[name].fingerprint != own]
    if stale and not redo:
        raise UserError(
            f"{folder}: stage {stale[0]} was made by another recipe, or on another stage; put it back, give the "
            "pipeline another --name, or make it and what builds on it again with --redo"
        )
    stages = {name: before[name] for name in recipes if name in before and name not in stale}
    for number, stage in enumerate(pipeline.stages, 1):
        own = stages.get(stage.name) or StageState(stage.verb, fingerprints[stage.name])
        title = f"stage {number} of {len(pipeline.stages)}, {stage.name} ({stage.verb})"
        if own.finished:
            _say(console, f"{title}: finished before")
            continue
        _say(console, title)
        began = time.perf_counter()
        if stage.name in stale:
            _remove(folder / stage.name)
        elif stage.name not in before and (folder / stage.name).exists():
            raise UserError(f"{folder / stage.name}: is there and was not made by this pipeline; remove it yourself")
        stages[stage.name] = own
        write_state(folder, stages)
        ended = _make(stage, recipes[stage.name], folder, console)
        evaluation = None
        if ended and not isinstance(recipes[stage.name], SynthRecipe):
            found = _measure(stage, recipes[stage.name], pipeline.evaluation, folder)
            ended, evaluation = not found.stopped, found.as_json()
        seconds = own.seconds + time.perf_counter() - began
        stages[stage.name] = replace(own, finished=ended, seconds=seconds, evaluation=evaluation if ended else None)
        write_state(folder, stages)
        if not ended:
            _say(console, f"stopped in stage {stage.name}; run the same command again to go on")
            return PipelineResult(folder, stages, interrupted=True)
        if evaluation is not None:
            print_stages(stages, console)
    return PipelineResult(folder, stages)


def _make(stage: StageSection, recipe: Recipe, folder: Path, console: Console) -> bool:
    """Run a stage to its end; False where a person stopped it."""
    how = {"console": console, "runs": folder, "resume": RunFolder(folder / stage.name).recipe.exists()}
    if isinstance(recipe, SynthRecipe):
        return not synthesize(recipe, **how).interrupted
    return not _TRAINERS[stage.verb](recipe, **how).interrupted


def _measure(stage: StageSection, recipe: Recipe, settings: EvaluationSettings, folder: Path) -> Evaluation:
    """The stage's model on the pipeline's held-out problems, asked as it was trained to be."""
    asked: dict[str, Any] = {}
    if isinstance(recipe, RLRecipe):
        asked = {"prompt": recipe.prompt.model_dump(), "layout": recipe.rewards.layout.model_dump()}
    asked |= {name: own.model_dump() for name in ("prompt", "layout") if (own := getattr(stage, name)) is not None}
    model, tokenizer = load(model_folder(folder / stage.name), dtype="float32")
    assert tokenizer is not None, "a run has a tokenizer"
    with Engine(model, tokenizer, EngineSettings()) as engine:
        found = evaluate(EngineAnswers(engine, tokenizer), settings.replace(**asked), model=stage.name)
    try:
        replace_text(folder / stage.name / RESULT, json.dumps(found.as_json(), indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{folder / stage.name}: cannot be written ({error.strerror or error})") from None
    return found


def _fingerprints(pipeline: Pipeline, recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """What each stage hands on: equal where its recipe, and those of all that it builds on, are."""
    found: dict[str, str] = {}
    for stage in pipeline.stages:
        # More counts than when a run is resumed by itself: what a stage hands on depends on how many steps it makes,
        # and on the factory's filters.
        fields = {key: own for key, own in recipes[stage.name].model_dump().items() if key not in _INERT}
        below = [found[name] for name in sorted(stage.references)]
        text = json.dumps([fields, below], sort_keys=True, default=str)
        found[stage.name] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return found


def _remove(run: Path) -> None:
    try:
        shutil.rmtree(run)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{run}: cannot be removed ({error.strerror})") from None


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
