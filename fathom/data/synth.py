"""Synthetic text: a task's problems with their answers, some of them with the thoughts that lead there.

    3+8*7-5=<think>3+8=1;1*7=7;7-5=2</think>2          a share `thinking` of the documents
    3+8=1;1*7=7;7-5=2                                  a share `steps`
    3+8*7-5=2                                          the others

So a model trained on it can reason, and does not always: what reinforcement learning then has to find out is that
reasoning pays. Only training problems are used, never held-out ones, and every answer is checked by the task's own rule
before it is written.

A step may be a short problem as a whole: all of `modular`'s level 1, held out or not, stand in the thoughts about
longer chains, so that how many of them are solved says what was learnt by heart. Longer problems do not come as steps.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Self

from pydantic import Field, model_validator

from fathom.config.recipe import Share
from fathom.config.section import Section
from fathom.errors import UserError
from fathom.tasks.catalogue import open_task
from fathom.tasks.options import read_options, split_name
from fathom.tasks.task import Problem, Task, judge


class SyntheticSettings(Section):
    """What is written of a task; options of its source beside the task's own."""

    documents: int = Field(default=100_000, ge=1)
    """How many; equal ones count."""
    thinking: Share = 0.5
    """Share of documents with thoughts."""
    steps: Share = 0.0
    """Share of documents that are thoughts alone, as a textbook has them: they teach steps, and not when to think."""
    seed: int = 1
    """Seed of problems and thoughts."""

    @model_validator(mode="after")
    def _leaves_no_more_than_all(self) -> Self:
        if self.thinking + self.steps > 1:
            raise ValueError(f"thinking = {self.thinking} and steps = {self.steps} are more than all documents")
        return self


class WorkedProblems:
    """Documents of the source `task:NAME?option=value&…`: `SyntheticSettings`' options and the task's own.

    Levels come equally often.
    """

    def __init__(self, source: str) -> None:
        """Raises `UserError` for a task or option that there is not, and for a task that shows no way to its answer."""
        name, options = split_name(source.removeprefix("task:"))
        fields = SyntheticSettings.model_fields
        own = {key: value for key, value in options.items() if key in fields}
        kinds = {key: field.annotation for key, field in fields.items()}
        self.settings = SyntheticSettings.parse(read_options(own, kinds, where=name), where=source)
        self.task = open_task(_spelt(name, {key: value for key, value in options.items() if key not in fields}))
        example = next(self.task.problems("train"))
        if not example.answer or self.task.solution(example, random.Random(0)) is None:
            raise UserError(f"{source}: this task writes no worked solutions; give it a `solution`, or take another")

    def documents(self) -> Iterator[tuple[str, str]]:
        """Text and what it is; the same every time. Raises `UserError` where a task's answer fails its own check."""
        settings, task = self.settings, self.task
        levels = range(1, task.levels + 1)
        problems = [task.problems("train", level=level, seed=settings.seed) for level in levels]
        source = random.Random(f"{task.called} documents {settings.seed}")
        for _ in range(settings.documents):
            problem = next(source.choice(problems))
            if judge(task, problem, problem.answer).score < 1:
                raise UserError(f"task {task.called}: its check refuses its own answer to {problem.question!r}")
            yield _document(task, problem, source, settings), f"task:{task.called}"


def _document(task: Task, problem: Problem, source: random.Random, settings: SyntheticSettings) -> str:
    kind = source.random()
    if kind >= settings.thinking + settings.steps:
        return problem.question + problem.answer
    steps = task.solution(problem, source)
    if kind >= settings.thinking:
        return steps or problem.question
    return f"{problem.question}<think>{steps}</think>{problem.answer}"


def _spelt(name: str, options: Mapping[str, str]) -> str:
    return f"{name}?{'&'.join(f'{key}={value}' for key, value in options.items())}" if options else name
