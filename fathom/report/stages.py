"""A pipeline as its folder tells it: which stages are made, what each was made from, and what was measured after it.

What a stage is to the story follows from its verb and from the stages that its fields name (`@name`): a model descends
from the one that it begins with, and a student is a model that learns from a model of other descent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fathom.config.hf import read_config
from fathom.config.model import ModelConfig
from fathom.config.pipeline import Pipeline, StageSection, read_pipeline
from fathom.errors import UserError
from fathom.evaluate.written import looked_over
from fathom.pipeline.state import RECIPE, STATE, StageState, read_state
from fathom.report.run_data import Run
from fathom.tasks.options import short_names
from fathom.train.run import newest_model


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage, made or not."""

    number: int
    """From 1 on."""
    section: StageSection
    state: StageState | None
    """None: not begun."""
    run: Run | None
    """None where nothing was trained or drawn (yet)."""
    config: ModelConfig | None
    """Of its newest model."""

    @property
    def name(self) -> str:
        """As in the pipeline's file."""
        return self.section.name

    @property
    def verb(self) -> str:
        """What is done."""
        return self.section.verb

    @property
    def standing(self) -> str:
        """What is still to be done; empty where it is finished."""
        if self.state is None:
            return "not made yet"
        return "" if self.state.finished else "under way"

    @property
    def measurements(self) -> list[dict[str, Any]]:
        """As in its `evaluation.json`; empty where it was not measured."""
        evaluation = None if self.state is None else self.state.evaluation
        return [] if evaluation is None else evaluation["measurements"]

    def free(self, task: str) -> dict[str, Any] | None:
        """The measurement of `task` with thoughts as long as they get."""
        return next((one for one in self.measurements if one["task"] == task and one["budget"] is None), None)

    @property
    def settings(self) -> dict[str, Any]:
        """How it was measured; empty where it was not."""
        evaluation = None if self.state is None else self.state.evaluation
        return {} if evaluation is None else evaluation["settings"]

    def asked(self, task: str) -> tuple[Any, ...] | None:
        """Equal for stages that were asked the same problems of `task`; None where it was asked none."""
        if (found := self.free(task)) is None:
            return None
        count = found["problems"] + found.get("left_out", 0)
        return self.settings.get("seed"), self.settings.get("levels"), count

    @property
    def model(self) -> str:
        """What it begins with, or whom it asks: `@name` of a stage, or a path; empty where there is none."""
        model = self.section.set.get("model") or (self.run and self.run.field("model"))
        return model if isinstance(model, str) else ""

    @property
    def teacher(self) -> str:
        """Of on-policy distillation: `@name` of a stage, or a path; empty without one."""
        teacher = self.section.set.get("teacher") or (self.run and self.run.field("teacher"))
        return teacher if self.verb == "rl" and isinstance(teacher, str) else ""


@dataclass(frozen=True)
class Story:
    """All stages."""

    folder: Path
    pipeline: Pipeline
    stages: tuple[Stage, ...]

    @classmethod
    def read(cls, folder: Path) -> "Story":
        """Raises `UserError` for a folder that is no pipeline's, and for files that cannot be read."""
        if not (folder / RECIPE).is_file():
            raise UserError(f"{folder}: a pipeline without {RECIPE}, from an older version; run it once more")
        pipeline, states = read_pipeline(folder / RECIPE, []), read_state(folder)
        sections = enumerate(pipeline.stages, start=1)
        return cls(
            folder,
            pipeline,
            tuple(_read(folder, number, section, states.get(section.name)) for number, section in sections),
        )

    @classmethod
    def of_one(cls, run: Run, evaluation: dict[str, Any]) -> "Story":
        """A run that was measured by itself: a story of one stage."""
        path = run.folder.path
        name = path.resolve().name
        # Not validated: a folder may have been given any name since.
        section = StageSection.model_construct(name=name, verb=run.verb)
        pipeline = Pipeline.model_construct(name=name, stages=(section,))
        state = StageState(run.verb, "", finished=True, evaluation=evaluation)
        return cls(path, pipeline, (Stage(1, section, state, run, None),))

    @property
    def measured(self) -> list[Stage]:
        """Those that were."""
        return [stage for stage in self.stages if stage.measurements]

    @property
    def same_problems(self) -> bool:
        """Whether all were measured on the same ones: a stage may have settings of its own."""
        return all(len(self.comparable(task)) == len(self.measured) for task in self.tasks)

    def comparable(self, task: str) -> list[Stage]:
        """The stages that were asked the same problems of `task`; where not all were, most of them, or rather the
        later ones."""
        groups: dict[tuple[Any, ...], list[Stage]] = {}
        for stage in self.measured:
            if (asked := stage.asked(task)) is not None:
                groups.setdefault(asked, []).append(stage)
        return max(groups.values(), key=lambda group: (len(group), group[-1].number), default=[])

    @property
    def apart(self) -> list[tuple[Stage, str]]:
        """Each stage, with the task, that was asked other problems of it than those that are compared."""
        return [
            (stage, task)
            for task in self.tasks
            for stage in self.measured
            if stage.asked(task) is not None and stage not in self.comparable(task)
        ]

    @property
    def tasks(self) -> list[str]:
        """All that were measured."""
        return list(dict.fromkeys(found["task"] for stage in self.stages for found in stage.measurements))

    @cached_property
    def task_names(self) -> Mapping[str, str]:
        """What each task is called on the page."""
        return short_names(self.tasks)

    @cached_property
    def _by_name(self) -> Mapping[str, Stage]:
        return {stage.name: stage for stage in self.stages}

    def named(self, reference: str) -> Stage | None:
        """The stage that `@name` or `@name/file` stands for."""
        return self._by_name.get(reference[1:].partition("/")[0]) if reference.startswith("@") else None

    def called(self, reference: str) -> str:
        """A stage's name, or else the path as it is."""
        stage = self.named(reference)
        return reference if stage is None else stage.name

    def origin(self, stage: Stage) -> str:
        """What a model descends from: a stage's name, or the path of a model from elsewhere."""
        parent = self.named(stage.model)
        if stage.verb not in ("sft", "rl", "model") or (stage.verb == "model" and parent is None):
            return stage.name
        return stage.model if parent is None else self.origin(parent)

    def teachers(self, stage: Stage) -> list[Stage]:
        """The models whose answers or whose judgement a stage learns from."""
        found = [self.named(stage.teacher)]
        if stage.verb == "sft":
            found += [self.named(lesson.model) for lesson in self.lessons(stage)]
        return list(dict.fromkeys(teacher for teacher in found if teacher is not None))

    @property
    def students(self) -> dict[str, list[Stage]]:
        """The families, by what they descend from, of which a model that was measured has learnt from another one's."""
        families: dict[str, list[Stage]] = {}
        for stage in self.stages:
            if stage.section.yields_model:
                families.setdefault(self.origin(stage), []).append(stage)
        return {
            origin: family
            for origin, family in families.items()
            if any(
                self.origin(teacher) != origin
                for stage in family
                if stage.measurements
                for teacher in self.teachers(stage)
            )
        }

    @property
    def final(self) -> Stage | None:
        """The stage whose model the pipeline is for, or the last that was measured until that one is."""
        measured = self.measured
        chosen = [stage for stage in measured if stage.name == self.pipeline.serves]
        return next(reversed(chosen or measured), None)

    @property
    def cast(self) -> list[Stage]:
        """Those that are compared where all would be too many: the first, the first that learnt from rewards, the last
        of the same descent, and the one that the pipeline is for."""
        measured = self.measured
        if not measured:
            return []
        rewarded = [stage for stage in measured if stage.verb == "rl" and not stage.teacher]
        kin = [stage for stage in measured if self.origin(stage) == self.origin(measured[0])]
        chosen = [measured[0], *rewarded[:1], kin[-1], *filter(None, [self.final])]
        return sorted({stage.name: stage for stage in chosen}.values(), key=lambda stage: stage.number)

    def told(self, stage: Stage) -> str:
        """What the stage does, in a phrase."""
        model = self.called(stage.model)
        if stage.verb == "pretrain":
            return "pre-training from nothing"
        if stage.verb == "model":
            return f"{model} as it is"
        if stage.verb == "synth":
            return f"solutions by {model}" if model else "solutions by rule"
        if stage.verb == "sft":
            rows = " and ".join(lesson.name for lesson in self.lessons(stage))
            return f"fine-tuning of {model}" + (f" on {rows}" if rows else "")
        if stage.teacher:
            return f"on-policy distillation of {model} by {self.called(stage.teacher)}"
        return f"reinforcement learning from {model}"

    def lessons(self, stage: Stage) -> list[Stage]:
        """The stages whose rows it learns."""
        return [one for one in self.stages if one.verb == "synth" and one.name in stage.section.references]


def _read(folder: Path, number: int, section: StageSection, state: StageState | None) -> Stage:
    path = folder / section.name
    run = Run.read(path) if state is not None and (path / "recipe.toml").exists() else None
    if state is not None and state.evaluation is not None:
        looked_over(state.evaluation, f"{folder / STATE}: stage {section.name}")
    return Stage(number, section, state, run, _config(path))


def _config(path: Path) -> ModelConfig | None:
    """None where there is no model, or one that cannot be read: then its arithmetic is not told."""
    checkpoint = newest_model(path)
    try:
        return None if checkpoint is None else read_config(checkpoint)
    except UserError:
        return None
