"""What a pipeline comes to before anything is made: every stage's recipe and measurement, and where each stands."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.config.evaluation import EvaluationSettings
from fathom.config.pipeline import ModelRecipe, Pipeline
from fathom.config.recipe import Recipe, read_recipe
from fathom.config.synth import DecontaminationSection, SynthRecipe
from fathom.errors import UserError
from fathom.evaluate.evaluate import held_out
from fathom.pipeline.state import StageState, is_pipeline, read_state
from fathom.synth.decontamination import HeldOut, refuse_contaminated
from fathom.synth.plan import resolved
from fathom.train.run import RunFolder, changed_fields

_INERT = ("checkpoint", "eval")
"""Sections of a recipe that do not change what its run ends with."""


@dataclass(frozen=True)
class Fingerprint:
    """Equal for stages that hand on the same."""

    whole: str
    """Of a stage's recipe, and those of all that it builds on."""
    below: str
    """Of the latter alone."""


@dataclass(frozen=True)
class Plan:
    """A pipeline, read and looked over."""

    pipeline: Pipeline
    folder: Path
    recipes: dict[str, Recipe]
    """By stage."""
    settings: dict[str, EvaluationSettings]
    """By stage, of those that yield a model."""
    questions: tuple[str, ...]
    """All held-out problems that anything is measured with."""
    asked: dict[str, str]
    """By stage, of those that yield a model: equal for stages that are measured with the same problems."""
    fingerprints: dict[str, Fingerprint]
    """By stage."""
    before: dict[str, StageState]
    """What earlier sessions have begun and finished."""
    stale: tuple[str, ...]
    """Stages of these that cannot be gone on with: made by another recipe, or on another stage."""

    @property
    def outdated(self) -> tuple[str, ...]:
        """Finished stages whose models are to be measured again, for they were measured otherwise than they are now."""
        return tuple(name for name in self.finished if name in self.settings and not self._holds(name))

    def _holds(self, name: str) -> bool:
        """Whether the measurement of a finished stage is the one that it would get now."""
        before = self.before[name]
        if before.evaluation is None or before.asked not in ("", self.asked[name]):
            return False
        try:
            return EvaluationSettings.parse(before.evaluation["settings"], where=name) == self.settings[name]
        except UserError:  # of an older Fathom
            return False

    @property
    def finished(self) -> tuple[str, ...]:
        """Stages that are not to be made again."""
        return tuple(name for name, state in self.before.items() if state.finished and name not in self.stale)

    def built_on(self, name: str) -> list[str]:
        """That stage, and those that learn from it, directly or not; in their order."""
        found = [name]
        for stage in self.pipeline.stages:
            if not stage.references.isdisjoint(found) and stage.name not in found:
                found.append(stage.name)
        return found

    def refuse_contaminated(self, files: Sequence[str]) -> None:
        """Raises `UserError` that names the rows of `files`, which are to be learnt, that ask a held-out question."""
        held_out = HeldOut(self.questions, DecontaminationSection().overlap)
        refuse_contaminated(files, held_out, where="data.files")


def plan_pipeline(pipeline: Pipeline, beside: Path, runs: Path, *, fresh: bool = False) -> Plan:
    """Read everything that the stages of `pipeline` will, but for what they make themselves: a mistake in the last
    should not cost an hour. With `fresh` as if nothing had been made before. Raises `UserError`; changes nothing."""
    folder = runs / pipeline.name
    recipes = pipeline.recipes(folder, beside)
    settings = {
        stage.name: pipeline.settings(stage, recipes[stage.name]) for stage in pipeline.stages if stage.yields_model
    }
    if RunFolder(folder).recipe.exists():
        raise UserError(f"{folder}: is a single run, not a pipeline's; give the pipeline another --name")
    asked = _asked(settings)
    if not (fresh and is_pipeline(folder)):
        _refuse_others(folder, recipes, read_state(folder))
    questions = tuple(dict.fromkeys(question for own in asked.values() for question in own))
    fingerprints, before = _fingerprints(pipeline, recipes), {} if fresh else read_state(folder)
    stale = tuple(
        name
        for name, own in fingerprints.items()
        if name in before
        and before[name].fingerprint != own.whole
        and not _can_go_on(folder / name, recipes[name], before[name], own)
    )
    digests = {name: _digest(list(own)) for name, own in asked.items()}
    return Plan(pipeline, folder, recipes, settings, questions, digests, fingerprints, before, stale)


def _refuse_others(folder: Path, recipes: Mapping[str, Recipe], before: Mapping[str, StageState]) -> None:
    for name in recipes:
        if name not in before and (folder / name).exists():
            raise UserError(f"{folder / name}: is there and was not made by this pipeline; remove it yourself")


def _can_go_on(run: Path, recipe: Recipe, before: StageState, now: Fingerprint) -> bool:
    """Whether a begun stage, whose recipe has changed, may be resumed: nothing changed that entered what was made."""
    if before.finished or before.below != now.below:
        return False
    if not (file := RunFolder(run).recipe).exists():
        return True
    try:
        as_run = resolved(recipe) if isinstance(recipe, SynthRecipe) else recipe
        began = read_recipe(file, [], type(recipe))
    except UserError:
        return False
    # More steps may follow those that were made, but it may have made more already than it now is to.
    shorter = any(_length(as_run, field) < _length(began, field) for field in ("steps", "epochs"))
    return not shorter and not changed_fields(began, as_run)


def _length(recipe: Recipe, field: str) -> float:
    return getattr(getattr(recipe, "train", None), field, 0.0)


def _asked(settings: Mapping[str, EvaluationSettings]) -> dict[str, tuple[str, ...]]:
    """The questions of each measurement."""
    drawn: dict[tuple[Any, ...], tuple[str, ...]] = {}
    found = {}
    for name, own in settings.items():
        which = (own.tasks, own.levels, own.problems, own.seed)
        if which not in drawn:
            drawn[which] = tuple(problem.question for problems in held_out(own).values() for problem in problems)
        found[name] = drawn[which]
    return found


def _fingerprints(pipeline: Pipeline, recipes: Mapping[str, Recipe]) -> dict[str, Fingerprint]:
    found: dict[str, Fingerprint] = {}
    for stage in pipeline.stages:
        # More counts than when a run is resumed by itself: what a stage hands on depends on how many steps it makes,
        # and on the factory's filters.
        recipe = recipes[stage.name]
        inert = (*_INERT, "seed") if isinstance(recipe, ModelRecipe) else _INERT
        fields = {key: own for key, own in recipe.model_dump().items() if key not in inert}
        below = [found[name].whole for name in sorted(stage.references)]
        found[stage.name] = Fingerprint(_digest([fields, below]), _digest(below))
    return found


def _digest(values: list[Any]) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
