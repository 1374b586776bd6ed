"""The evaluation itself: held-out problems, asked often, read and checked, counted.

Problems are drawn by `held_out_problems` with the seed of the settings: the same for every model, and never among those
that training draws. Each is graded as soon as its samples are there, while others are still being drawn. So an
evaluation that is cut short has measured what had ended by then, which are rather the problems with short answers.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from fathom.config.evaluation import EvaluationSettings
from fathom.engine.consensus import one_spelling
from fathom.errors import UserError
from fathom.evaluate.answers import Answers, Reply
from fathom.evaluate.energy import EnergyMeter
from fathom.evaluate.results import Evaluation, Graded, Measurement, Prices, Spent, Tried, measured
from fathom.evaluate.transcripts import shown
from fathom.tasks import language
from fathom.tasks.catalogue import open_task
from fathom.tasks.checker import Checker
from fathom.tasks.mixture import uses_sandbox
from fathom.tasks.programs import shared_sandbox, use_sandbox
from fathom.tasks.reading import read
from fathom.tasks.task import Problem
from fathom.train.rollout import held_out_problems

INTERRUPTED = "interrupted"
"""Why an evaluation that Ctrl-C ended is not complete."""


@dataclass(frozen=True)
class Progress:
    """How far an evaluation has come."""

    task: str
    budget: int | None
    done: int
    """Problems, over all tasks and budgets."""
    total: int


def evaluate(
    answers: Answers,
    settings: EvaluationSettings,
    *,
    model: str,
    problems: Mapping[str, Sequence[Problem]] | None = None,
    prices: Prices | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Evaluation:
    """Measure what answers, which is called `model`, as `settings` say; `tell` is called after each problem.
    `problems` are those of `held_out`, where that was called before.

    A `KeyboardInterrupt`, or an error once something has been measured, ends it early: what was measured is returned,
    with the reason in `stopped`. Before that, raises `UserError` for everything a person can put right: no such task or
    level, no held-out problems, a model that cannot be asked so, an endpoint that does not answer.
    """
    answers.require(settings)
    problems = problems or held_out(settings)
    plan = [_Trial(task, budget, problems[task]) for task in settings.tasks for budget in (None, *settings.budgets)]
    total, done, stopped = sum(len(trial.problems) for trial in plan), 0, ""
    try:
        for task in settings.tasks:
            with Checker(task, seconds=settings.check_seconds) as checker:
                for trial in [trial for trial in plan if trial.task == task]:
                    for _ in trial.run(answers, checker, settings):
                        done += 1
                        tell(Progress(task, trial.budget, done, total))
    except KeyboardInterrupt:
        stopped = INTERRUPTED
        if not any(trial.tried for trial in plan):
            raise
    except UserError as error:
        stopped = str(error)
        if not any(trial.tried for trial in plan):
            raise
    found = tuple(trial.measured(settings, prices) for trial in plan if trial.tried)
    return Evaluation(model, settings, found, stopped)


def held_out(settings: EvaluationSettings) -> dict[str, list[Problem]]:
    """The problems of each task. Raises `UserError` for what cannot be measured, whatever the model."""
    return {task: _problems(task, settings) for task in settings.tasks}


def _problems(name: str, settings: EvaluationSettings) -> list[Problem]:
    task = open_task(name)
    if settings.levels is not None and settings.levels > task.levels:
        raise UserError(f"levels = {settings.levels}, but task {task.called} has {task.levels}; lower it")
    if uses_sandbox(task):
        use_sandbox(settings.sandbox)
        shared_sandbox()  # where there is none, the person hears of it now, and not as wrong answers
    found = held_out_problems(task, settings.levels or task.levels, settings.problems, seed=settings.seed)
    if not found:
        raise UserError(f"task {task.called}: has no held-out problems; give it more problems, or other levels")
    return found


@dataclass
class _Trial:
    """One task at one budget, under way."""

    task: str
    budget: int | None
    problems: Sequence[Problem]
    tried: list[Tried] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)

    def run(self, answers: Answers, checker: Checker, settings: EvaluationSettings) -> Iterator[None]:
        """Yields after each problem."""
        began, energy = time.perf_counter(), EnergyMeter() if answers.here else None
        with closing(answers.replies(self.problems, settings, budget=self.budget)) as replies:
            for reply in replies:
                if reply.missing:
                    self.left_out.append(reply.missing)
                else:
                    self.tried.append(grade(reply, checker, settings))
                self.spent = Spent(time.perf_counter() - began, energy and energy.read())
                yield
        if not self.tried:
            raise UserError(f"task {self.task}: no problem could be answered: {self.left_out[0]}")

    def measured(self, settings: EvaluationSettings, prices: Prices | None) -> Measurement:
        """By the problems tried so far."""
        return measured(
            self.task,
            self.budget,
            self.tried,
            settings,
            self.spent,
            prices=prices,
            left_out=self.left_out,
            shown=shown(self.problems),
        )


def grade(reply: Reply, checker: Checker, settings: EvaluationSettings) -> Tried:
    """Read and check all answers to a problem."""
    readings = [
        read(answer.text, settings.layout, starts_thinking=False, finished=answer.finished) for answer in reply.answers
    ]
    verdicts = checker.check_all([(reply.problem, reading.answer) for reading in readings])
    graded = tuple(
        Graded(
            answer,
            reading,
            None if reading.answer is None else one_spelling(reading.answer),
            verdict.score,
            language.share(reading.thought, reply.problem.language),
            verdict.fault,
        )
        for answer, reading, verdict in zip(reply.answers, readings, verdicts, strict=True)
    )
    return Tried(reply.problem, graded)
