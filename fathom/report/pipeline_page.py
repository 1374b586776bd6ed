"""The page on a pipeline: the story of its stages in order, and then what compares them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fathom.evaluate.written import mean_language, mean_thought
from fathom.model.accounting import count_parameters
from fathom.pipeline.state import RECIPE
from fathom.report.bars import Bars
from fathom.report.cost import Cost, cost_of, cost_table, duration, energy, money
from fathom.report.dialogues import Correction, correction_of, dialogues
from fathom.report.document import render, share
from fathom.report.figures import Figure, figures, headline, probe
from fathom.report.stage_figures import gains, numbered, share_of, thinking_curves
from fathom.report.stages import Stage, Story
from fathom.report.svg import COLOURS
from fathom.report.synthesis import Rows, Synthesis, synthesis
from fathom.report.tables import count

_FIGURES = {
    "pretrain": ("loss", "max-vio", "mtp-acceptance"),
    "rl": ("right-answers", "lengths", "reward", "entropy", "teacher"),
    "sft": ("loss",),
}
"""What a stage's own part of the story shows; its own report shows all."""
_DRAWING = ("samples", "temperature", "top_p", "max_tokens")
"""Of its measurement: how answers were drawn."""


@dataclass(frozen=True)
class Chapter:
    """One stage."""

    stage: Stage
    told: str
    facts: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...]
    synthesis: Synthesis | None
    correction: Correction | None


@dataclass(frozen=True)
class Comparison:
    """A student's family beside its teachers."""

    figure: Bars
    rows: Rows


def pipeline_page(story: Story) -> str:
    """The text of the page."""
    main = _headline(story)
    return render(
        "pipeline.html.jinja",
        name=story.pipeline.name,
        facts=list(_facts(story)),
        headline=main,
        same_problems=story.same_problems,
        without_bars=[story.task_names[task] for task in story.tasks[COLOURS:]],
        apart=[f"{stage.name} on {story.task_names[task]}" for stage, task in story.apart],
        otherwise=list(_drawn_otherwise(story)),
        stages=stage_table(story),
        chapters=[_chapter(story, stage) for stage in story.stages if stage.state is not None],
        comparisons=list(_comparisons(story)),
        curves=list(thinking_curves(story)),
        dialogues=dialogues(story),
        cost=cost_table(story) if any(stage.state for stage in story.stages) else [],
        energy=energy(_costs(story)),
        price=f"{story.pipeline.currency}{story.pipeline.price_per_hour:,.2f}",
        recipe=(story.folder / RECIPE).read_text(encoding="utf-8"),
    )


def pipeline_figures(story: Story) -> dict[str, Figure]:
    """The figures that can be had by name, the main one first."""
    main = _headline(story)
    found = [] if main is None else [Figure(main, "")]
    found += [Figure(comparison.figure, "") for comparison in _comparisons(story)]
    found += thinking_curves(story)
    return {figure.chart.name: figure for figure in found}


def stage_table(story: Story) -> Rows:
    """As in table 3 of DeepSeek-R1's paper (arXiv 2501.12948v2): what each stage gained, and in what time."""
    tasks = story.tasks
    mixed = any(mean_language(_free(stage)) not in (None, 1.0) for stage in story.measured)
    rows = [["stage", "what it is", *(f"{story.task_names[task]}, pass@1" for task in tasks), "tokens of thought",
             *(["language kept"] if mixed else []), "minutes"]]  # fmt: skip
    for stage in story.stages:
        rows.append(
            [
                stage.name,
                story.told(stage) + (f" ({stage.standing})" if stage.standing else ""),
                *(_written_share(story, stage, task) for task in tasks),
                _thought(stage),
                *([_written_language(stage)] if mixed else []),
                _minutes(stage),
            ]
        )
    return rows


def _headline(story: Story) -> Bars | None:
    return gains(story, story.stages, "stages", "What each stage gained: pass@1 on held-out problems")


def _facts(story: Story) -> Iterator[tuple[str, str]]:
    """What a person wants to know first."""
    made = [stage for stage in story.stages if stage.state is not None and stage.state.finished]
    total = len(story.stages)
    yield "stages", f"all {total} made" if len(made) == total else f"{len(made)} of {total} made"
    if final := story.final:
        for task in story.tasks:
            if (found := share_of(final.free(task))) is not None:
                yield f"{final.name} on {story.task_names[task]}", found.write()
    costs = _costs(story)
    seconds = sum(cost.seconds for cost in costs)
    yield "time", duration(seconds)
    yield "money", money(story, seconds)
    if joules := energy(costs):
        yield "energy", joules
    asked = [(story.task_names[task], story.comparable(task)[0].free(task)) for task in story.tasks]
    if counts := [f"{found['problems']:,} of {name}" for name, found in asked if found is not None]:
        yield "measured with held-out problems", ", ".join(counts)


def _costs(story: Story) -> list[Cost]:
    return [cost for stage in story.stages if (cost := cost_of(stage)) is not None]


def _chapter(story: Story, stage: Stage) -> Chapter:
    run, shown = stage.run, _FIGURES.get(stage.verb, ())
    found: list[Figure] = []
    if run is not None and shown:
        found = [*filter(None, [headline(run.measured, stage.verb)]), *figures(run.measured, stage.verb)]
        found = [figure for figure in found if figure.chart.name in shown]
        found += filter(None, [probe(run.measured)])
    return Chapter(
        stage,
        story.told(stage),
        tuple(_told(story, stage)),
        tuple(_named(figure, stage) for figure in found),
        None if run is None or run.counts is None else _synthesis(run.counts, stage),
        None if run is None or run.correction is None else correction_of(run.correction),
    )


def _told(story: Story, stage: Stage) -> Iterator[tuple[str, str]]:
    """A few facts on one stage."""
    run = stage.run
    if stage.config is not None and story.named(stage.model) is None:
        parameters = count_parameters(stage.config)
        active = "" if parameters.active == parameters.total else f", {count(parameters.active)} active per token"
        yield "model", f"{stage.config.model_type}, {count(parameters.total)} parameters{active}"
    if run is not None:
        if stage.verb == "pretrain":
            yield "reads", str(run.field("data", "path"))
        if stage.verb == "rl":
            yield "task", str(run.field("task", "name"))
        if stage.verb != "synth" and run.measured.step:
            yield "steps", f"{run.measured.step:,}" if run.steps is None else f"{run.measured.step:,} of {run.steps:,}"
    if (cost := cost_of(stage)) is not None:
        if cost.tokens:
            yield "tokens drawn" if stage.verb == "rl" else "tokens learnt from", count(cost.tokens)
        yield "time", duration(cost.seconds)
    for task in story.tasks:
        if (found := share_of(stage.free(task))) is not None:
            yield f"pass@1 on {story.task_names[task]}", found.write()


def _named(figure: Figure, stage: Stage) -> Figure:
    """The figure under a name that no other stage's has."""
    return replace(figure, chart=replace(figure.chart, name=f"stage-{stage.number}-{figure.chart.name}"))


def _synthesis(counts: dict[str, Any], stage: Stage) -> Synthesis:
    found = synthesis(counts)
    return replace(found, funnel=None if found.funnel is None else _named(found.funnel, stage))


def _comparisons(story: Story) -> Iterator[Comparison]:
    """For each family of students: its teachers, what it began as, and what came of it in which way."""
    for number, (origin, family) in enumerate(story.students.items(), start=1):
        teachers = [teacher for stage in family for teacher in story.teachers(stage) if story.origin(teacher) != origin]
        shown = [*dict.fromkeys([*teachers, *family])]
        figure = gains(story, shown, numbered("distillation", number), f"Ways to teach {origin}")
        if figure is None:
            continue
        tasks = story.task_names.values()
        rows = [["model", "how", "parameters", *tasks, "tokens of thought", "minutes, lessons included"]]
        for stage in shown:
            parameters = "" if stage.config is None else count(count_parameters(stage.config).total)
            rows.append(
                [
                    stage.name,
                    "the teacher" if stage in teachers else story.told(stage),
                    parameters,
                    *(_written_share(story, stage, task) for task in story.tasks),
                    _thought(stage),
                    _minutes(stage, *story.lessons(stage)),
                ]
            )
        yield Comparison(figure, rows)


def _free(stage: Stage) -> list[dict[str, Any]]:
    return [found for found in stage.measurements if found["budget"] is None]


def _written_share(story: Story, stage: Stage, task: str) -> str:
    """With a star where it is not to be compared."""
    if (found := share_of(stage.free(task))) is None:
        return ""
    return found.write() if stage in story.comparable(task) else f"{found.write()} *"


def _drawn_otherwise(story: Story) -> Iterator[str]:
    """The stages whose answers were not drawn as those of most were, and how they were."""
    for name in _DRAWING:
        values = {stage.name: stage.settings[name] for stage in story.measured if name in stage.settings}
        if values:
            usual, _ = Counter(values.values()).most_common(1)[0]
            for stage, own in values.items():
                if own != usual:
                    yield f"{stage} with {name} = {own:g}, where most have {usual:g}"


def _thought(stage: Stage) -> str:
    return "" if (found := mean_thought(_free(stage))) is None else f"{found:.0f}"


def _minutes(*stages: Stage) -> str:
    """Of all of them; empty where none is begun."""
    begun = [stage.state.seconds for stage in stages if stage.state is not None]
    return f"{sum(begun) / 60:.1f}" if begun else ""


def _written_language(stage: Stage) -> str:
    found = mean_language(_free(stage))
    return "" if found is None else share(found)
