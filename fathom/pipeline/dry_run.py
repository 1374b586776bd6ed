"""What a pipeline would do: stage by stage what it reads and learns, how long that takes, and where it stands."""

import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fathom.config.pipeline import ModelRecipe, Pipeline, StageSection
from fathom.config.recipe import PretrainRecipe, Recipe
from fathom.config.rl import RLRecipe
from fathom.config.sft import SFTRecipe
from fathom.config.synth import SynthRecipe
from fathom.pipeline.foresight import require_what_is_elsewhere, require_what_is_here
from fathom.pipeline.plan import Plan, plan_pipeline
from fathom.report.tables import count, plural
from fathom.tasks.mixture import BETWEEN

_OPTIONS = re.compile(r"\?[^ ,]*")
"""Of a task's name, which would fill the table."""

_NAMED = 3
"""Tasks that are named one by one."""


def dry_run(pipeline: Pipeline, beside: Path, *, console: Console | None = None, runs: Path = Path("runs")) -> None:
    """Print the stages; fetch and write nothing. Raises `UserError` for what a run would refuse before its first
    stage, but for models that are not on this machine yet, which are taken to be right."""
    console = console or Console(highlight=False, soft_wrap=True)
    plan = plan_pipeline(pipeline, beside, runs)
    require_what_is_here(plan)
    require_what_is_elsewhere(plan, fetch=False)
    table = Table(box=None, pad_edge=False, show_edge=False)
    for heading in ("stage", "verb", "reads", "does", "measured with", "minutes", ""):
        table.add_column(heading, justify="right" if heading == "minutes" else "left", overflow="fold")
    for stage in pipeline.stages:
        minutes = "" if stage.minutes is None else f"{stage.minutes:g}"
        recipe, measured, standing = plan.recipes[stage.name], _measured(plan, stage), _standing(plan, stage)
        told = [_OPTIONS.sub("", text) for text in (_reads(plan, stage, recipe), _does(recipe))]
        table.add_row(stage.name, stage.verb, *told, measured, minutes, standing)
    console.print(f"pipeline '{pipeline.name}' in {plan.folder}", markup=False)
    console.print(table, markup=False)
    left = [stage.minutes for stage in pipeline.stages if stage.name not in plan.finished]
    known = [minutes for minutes in left if minutes is not None]
    took = f", about {sum(known):.0f} min on a machine of two cores" if len(known) == len(left) and left else ""
    console.print(f"{plural(len(left), 'stage')} of {len(pipeline.stages)} to be made{took}", markup=False)


def _reads(plan: Plan, stage: StageSection, recipe: Recipe) -> str:
    """Models and files, those of the pipeline by their stage."""
    named = {own.model: name for name, own in plan.recipes.items() if isinstance(own, ModelRecipe)}
    if isinstance(recipe, ModelRecipe):
        return recipe.model
    if isinstance(recipe, PretrainRecipe):
        found: list[Any] = list(recipe.data.sources)
    else:
        found = [getattr(recipe, name, None) for name in ("model", "teacher")]
        found += recipe.data.files if isinstance(recipe, SFTRecipe) else ()
    told = [named.get(one, str(one).removeprefix(f"{plan.folder}/")) for one in found if one is not None]
    return ", ".join(told) or "rules"


def _does(recipe: Recipe) -> str:
    """With how much of what."""
    if isinstance(recipe, PretrainRecipe):
        tokens = count(recipe.train.steps * recipe.train.batch_tokens)
        return f"{plural(recipe.train.steps, 'step')}, {tokens} tokens"
    if isinstance(recipe, RLRecipe):
        drawn = f"{recipe.rollout.problems} × {recipe.rollout.samples} of {_tasks(recipe.task.name.split(BETWEEN))}"
        return f"{plural(recipe.train.steps, 'step')} of {drawn}"
    if isinstance(recipe, SynthRecipe):
        tasks = [task.name for task in recipe.tasks]
        return f"{plural(recipe.problems, 'problem')} × {recipe.draw.samples} of {_tasks(tasks)}"
    if isinstance(recipe, SFTRecipe):
        return f"{recipe.train.epochs:g} × all, {recipe.train.batch} to a step"
    return "nothing"


def _tasks(names: list[str]) -> str:
    """A few by name, more by their number: they stand in a narrow column."""
    return " + ".join(names) if len(names) <= _NAMED else plural(len(names), "task")


def _measured(plan: Plan, stage: StageSection) -> str:
    settings = plan.settings.get(stage.name)
    if settings is None:
        return ""
    budgets = f", {plural(len(settings.budgets), 'budget')}" if settings.budgets else ""
    return f"{plural(len(settings.tasks), 'task')}, {settings.problems} × {settings.samples}{budgets}"


def _standing(plan: Plan, stage: StageSection) -> str:
    if stage.name in plan.stale:
        return "changed, needs --redo"
    if stage.name not in plan.before:
        return ""
    if stage.name in plan.outdated:
        return "finished, to be measured again"
    return "finished" if stage.name in plan.finished else "begun"
