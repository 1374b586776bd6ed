"""Distillation: a pipeline of a teacher, a student, and the ways in which one learns from the other (DeepSeek-R1 §2.4,
table 6; on-policy: GKD, arXiv 2306.13649).

    runs/<name>/teacher      nothing but what it is measured at
                student      likewise, before it has learnt anything
                traces       what the teacher has written, and a rule has found right         way traces, both
                distilled    the student that has learnt it                                   way traces, both
                on-policy    the student that the teacher has judged, token by token          way on-policy, both
                rewards      the same student by rewards alone                                compare_rewards

Everyone is asked as they were taught: whoever has learnt from traces as a chat, for that is what traces are, and all
others as the teacher was. Where one that has learnt from traces draws for the teacher's judgement, it is asked as a
chat, and the teacher judges its answers behind its own prompt.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fathom.config import explain_recipe
from fathom.config.distill import DISTILLED, ON_POLICY, REWARDS, STUDENT, TEACHER, TRACES, DistillRecipe
from fathom.config.evaluation import EvaluationSettings
from fathom.config.pipeline import Pipeline, StageSection
from fathom.config.recipe import Recipe
from fathom.config.rewards import Layout
from fathom.config.rl import PromptSection, RLRecipe
from fathom.errors import UserError
from fathom.pipeline.dry_run import dry_run as dry_run_of_stages
from fathom.pipeline.run import PipelineResult, run_pipeline
from fathom.synth.plan import open_tasks
from fathom.synth.plan import resolved as resolved_traces
from fathom.train.rl import require_one_vocabulary
from fathom.train.rl_estimate import read_described
from fathom.train.run import model_folder


def distill(
    recipe: DistillRecipe, *, console: Console | None = None, runs: Path = Path("runs"), redo: bool = False
) -> PipelineResult:
    """Teach and measure as `recipe` says, in `runs/<recipe.name>`; what is finished stays, as `run_pipeline` has it.

    Raises `UserError` for everything a person can put right.
    """
    recipe = resolved(recipe)
    if not recipe.traces.draw.endpoint:
        folders = [(name, model_folder(name)) for name in (recipe.teacher, recipe.model)]
        if folders[0][1].resolve() == folders[1][1].resolve():
            raise UserError(f"teacher and model are both {folders[0][1]}; a model learns nothing from itself")
        if recipe.way != "traces":
            its, students = (read_described(folder, name) for name, folder in folders)
            require_one_vocabulary(recipe.teacher, its, students)
    return run_pipeline(pipeline_of(recipe), Path(), console=console, runs=runs, redo=redo)


def resolved(recipe: DistillRecipe) -> DistillRecipe:
    """The recipe with how everyone is asked. Raises `UserError` where the recipe of the teacher's run is broken, and
    where a teacher that is not on this machine would have to judge."""
    if recipe.traces.draw.endpoint and recipe.way != "traces":
        raise UserError(
            f"way = {recipe.way} with traces.draw.endpoint: a teacher that judges tokens must be on this machine; take "
            'way = "traces"'
        )
    asked = resolved_traces(recipe.traces.model_copy(update={"model": recipe.teacher}))
    prompt, layout = asked.prompt, asked.layout
    assert prompt is not None, "a model is asked"
    assert layout is not None, "a model is asked"
    chat, own = _as_learnt(recipe, prompt), {"prompt": prompt, "layout": layout}
    drawing = own
    if recipe.way == "both":
        drawing = {"prompt": chat.prompt, "layout": chat.layout}
        if (its := prompt.replace(opens_thought=chat.prompt.opens_thought)) != chat.prompt:
            drawing["teacher_prompt"] = its
    return recipe.model_copy(
        update={
            "traces": recipe.traces.model_copy(update=own),
            "on_policy": _asked(recipe.on_policy, drawing),
            "rewards_only": _asked(recipe.rewards_only, own),
            "evaluation": chat,
        }
    )


def pipeline_of(recipe: DistillRecipe) -> Pipeline:
    """The stages of a resolved recipe."""
    traces, stages = recipe.traces, []
    teacher, learnt = recipe.teacher, STUDENT

    def measure(name: str, model: str) -> None:
        own = {"model": model}
        stages.append(StageSection(name=name, verb="model", set=own, prompt=traces.prompt, layout=traces.layout))

    if not traces.draw.endpoint:
        measure(TEACHER, recipe.teacher)
        teacher = f"@{TEACHER}"
    measure(STUDENT, recipe.model)
    if recipe.way != "on-policy":
        stages.append(StageSection(name=TRACES, verb="synth", set=_fields(traces) | {"model": teacher}))
        stages.append(StageSection(name=DISTILLED, verb="sft", set=_fields(recipe.sft)))
        learnt = DISTILLED
    if recipe.way != "traces":
        stages.append(StageSection(name=ON_POLICY, verb="rl", set=_fields(recipe.on_policy) | {"model": f"@{learnt}"}))
        learnt = ON_POLICY
    if recipe.compare_rewards:
        stages.append(StageSection(name=REWARDS, verb="rl", set=_fields(recipe.rewards_only)))
    settings = {"name": recipe.name, "seed": recipe.seed, "evaluation": recipe.evaluation, "serves": learnt}
    return Pipeline(stages=tuple(stages), **settings)


def dry_run(recipe: DistillRecipe, *, console: Console | None = None, runs: Path = Path("runs")) -> None:
    """Print the resolved recipe, a sentence to every field, and its stages; fetch and write nothing.

    Raises `UserError` for what a run would refuse before its first stage, but for models that are not there yet.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    recipe = resolved(recipe)
    open_tasks(recipe.traces)
    console.print(explain_recipe(recipe), markup=False, highlight=False, soft_wrap=True)
    dry_run_of_stages(pipeline_of(recipe), Path(), console=console, runs=runs)


def _as_learnt(recipe: DistillRecipe, prompt: PromptSection) -> EvaluationSettings:
    """The evaluation, which asks as the traces do of a teacher that is asked with `prompt`, where it does not say."""
    rewrite, thinks = recipe.traces.rewrite, recipe.traces.filters.shortest_thought > 0
    instruction = prompt.instruction if prompt.style == "chat" else ""
    asked = {
        "prompt": PromptSection(
            style="chat",
            instruction=instruction if rewrite.instruction is None else rewrite.instruction,
            opens_thought=thinks,
        ),
        "layout": Layout(form=rewrite.form or "rest", thoughts="optional"),
    }
    said = recipe.evaluation.model_fields_set
    return recipe.evaluation.model_copy(update={name: own for name, own in asked.items() if name not in said})


def _asked(recipe: RLRecipe, asked: Mapping[str, Any]) -> RLRecipe:
    """`recipe` with prompts and layout, where it does not say them."""
    changes = {name: own for name, own in asked.items() if name != "layout" and name not in recipe.model_fields_set}
    if "layout" not in recipe.rewards.model_fields_set:
        changes["rewards"] = recipe.rewards.model_copy(update={"layout": asked["layout"]})
    return recipe.model_copy(update=changes)


def _fields(recipe: Recipe) -> dict[str, Any]:
    """What a stage sets: all that anyone has said."""
    return recipe.model_dump(exclude_unset=True, exclude={"name"})
