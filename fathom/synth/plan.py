"""What a recipe comes to before anything is drawn: how the model is asked, which problems, and what that takes."""

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from fathom.config import explain_recipe
from fathom.config.evaluation import R1_INSTRUCTION
from fathom.config.rewards import Layout
from fathom.config.rl import PromptSection, RLRecipe
from fathom.config.section import Section
from fathom.config.synth import SynthRecipe
from fathom.errors import UserError
from fathom.pipeline.state import served
from fathom.report.tables import plural, print_rows
from fathom.synth.selection import Reader
from fathom.synth.teachers import WORKED_LAYOUT
from fathom.tasks.catalogue import open_task
from fathom.tasks.mixture import uses_sandbox
from fathom.tasks.programs import shared_sandbox, use_sandbox
from fathom.tasks.task import Problem, Task, require_levels
from fathom.train.rollout import draw_problems, seed_of
from fathom.train.run import RunFolder

AnySection = TypeVar("AnySection", bound=Section)

Problems = Sequence[tuple[str, Problem]]
"""All problems of a run, each with the name of its task; those of one task stand together."""


def resolved(recipe: SynthRecipe) -> SynthRecipe:
    """The recipe with prompt and layout, where a model is asked. Raises `UserError` where the model's is broken."""
    if recipe.model is None:
        return recipe
    trained = _trained_with(recipe.model)
    prompt = trained.prompt if trained else PromptSection(style="chat", instruction=R1_INSTRUCTION)
    layout = trained.rewards.layout if trained else Layout(form="boxed", thoughts="optional")
    return recipe.replace(
        prompt=_said(recipe.prompt, prompt, "style").model_dump(),
        layout=_said(recipe.layout, layout, "form").model_dump(),
    )


def _said(own: AnySection | None, else_: AnySection, kind: str) -> AnySection:
    """What the recipe says; the rest as the model learnt it, unless another `kind` of it is asked for."""
    if own is None:
        return else_
    if kind in own.model_fields_set:
        return own
    return else_.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})


def _trained_with(model: str) -> RLRecipe | None:
    """The recipe of the `fathom rl` run that `model` is, or whose folder `best` it is."""
    folder = Path(model).expanduser()
    if (stage := served(folder)) is not None:
        folder = Path(stage.model)
    file = RunFolder(folder.parent if folder.name == "best" else folder).recipe
    if not file.is_file():
        return None
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give prompt and layout in your recipe") from None
    return RLRecipe.parse(values, where=str(file)) if "rollout" in values else None


def reader_of(recipe: SynthRecipe) -> Reader:
    """How the completions of a resolved recipe are read."""
    if recipe.prompt is None or recipe.layout is None:
        return Reader(WORKED_LAYOUT, starts_thinking=False, instruction="", source="worked")
    source = f"endpoint:{recipe.draw.endpoint}" if recipe.draw.endpoint else f"model:{recipe.model}"
    instruction = recipe.prompt.instruction if recipe.prompt.style == "chat" else ""
    return Reader(recipe.layout, recipe.prompt.opens_thought, instruction, source)


def open_tasks(recipe: SynthRecipe) -> dict[str, Task]:
    """The tasks by their names. Raises `UserError` where there is no such task, or not with so many levels."""
    tasks = {}
    for wanted in recipe.tasks:
        task = tasks[wanted.name] = open_task(wanted.name)
        require_levels(task)
        if wanted.levels > task.levels:
            raise UserError(f"task {wanted.name}: levels = {wanted.levels}, but it has {task.levels}")
        if uses_sandbox(task):
            use_sandbox(recipe.check.sandbox)
            shared_sandbox()  # where there is none, the person hears of it now, and not as a run of wrong answers
    return tasks


def plan_problems(recipe: SynthRecipe, tasks: dict[str, Task], say: Callable[[str], None]) -> Problems:
    """The same problems whenever asked. Raises `UserError` where a task has none; `say` where it has too few."""
    problems: list[tuple[str, Problem]] = []
    for wanted, count in zip(recipe.tasks, shares(recipe), strict=True):
        task = tasks[wanted.name]
        # By what the task is called, and not by its name here: a file may lie elsewhere another time.
        seed = seed_of(recipe.seed, "problems", task.called)
        found = draw_problems(task, "train", wanted.levels, count, seed=seed)
        if len(found) < count:
            say(
                f"task {wanted.name}: no more than {len(found):,} different problems were found where {count:,} were "
                "wanted; more levels give more"
            )
        problems += [(wanted.name, problem) for problem in found]
    return problems


def shares(recipe: SynthRecipe) -> list[int]:
    """How many problems each task gets: at least one, and `problems` together."""
    whole = sum(task.share for task in recipe.tasks)
    exact = [(recipe.problems - len(recipe.tasks)) * task.share / whole for task in recipe.tasks]
    counts = [1 + int(part) for part in exact]
    by_rest = sorted(range(len(exact)), key=lambda place: int(exact[place]) - exact[place])
    for place in by_rest[: recipe.problems - sum(counts)]:
        counts[place] += 1
    return counts


def dry_run(recipe: SynthRecipe, console: Console | None = None) -> None:
    """Print the resolved recipe, a sentence to every field, and what is drawn at most; open no model, write nothing.

    Raises `UserError` for a task or level that there is not.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    recipe = resolved(recipe)
    open_tasks(recipe)
    console.print(explain_recipe(recipe), markup=False, highlight=False, soft_wrap=True)
    first = recipe.problems * recipe.draw.samples
    most = first * (1 + recipe.draw.repair_rounds)
    rows = [
        (task.name, f"{plural(count, 'problem')} of {plural(task.levels, 'level')}")
        for task, count in zip(recipe.tasks, shares(recipe), strict=True)
    ]
    again = f", {most:,} with all repair rounds" if most > first else ""
    rows.append(("candidates", f"{first:,}{again}"))
    if recipe.source == "model":
        rows.append(("tokens drawn", f"{most * recipe.draw.max_tokens:,} at most"))
    print_rows(f"run '{recipe.name}'", rows, console)
