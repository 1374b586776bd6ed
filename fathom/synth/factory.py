"""A run of the data factory, from top to bottom.

problems of each task → candidates of a teacher, checked by the task's rule → wrong answers asked again →
`drawn.jsonl`, batch by batch → filters, rewriting and its check → `traces.jsonl` or `traces.parquet`, and `synth.json`
with the counts.

Which problems are asked and with which seeds is a function of the recipe, and rows are worked out from what is in
`drawn.jsonl` alone. So a run that was killed and resumed writes the file of an unbroken one, and a finished run can be
resumed with other filters, which draws nothing.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from rich.console import Console

from fathom.config import dump_recipe, read_recipe
from fathom.config.rewards import Rewards
from fathom.config.synth import SynthRecipe
from fathom.errors import UserError
from fathom.report.command import fathom_command
from fathom.report.tables import plural
from fathom.scratch import replace_text
from fathom.synth.candidates import Candidate, DrawnFile, Solved
from fathom.synth.counts import print_counts
from fathom.synth.decontamination import HeldOutSets, read_questions, refuse_contaminated
from fathom.synth.plan import Problems, open_tasks, plan_problems, reader_of, resolved
from fathom.synth.rows import Format, Row, row_file
from fathom.synth.selection import Selection
from fathom.synth.teachers import Asking, Attempt, Teacher, open_teacher
from fathom.tasks.checker import Checker, Sample
from fathom.tasks.task import Problem, Task
from fathom.train.display import Display, is_part
from fathom.train.rollout import held_out_problems, seed_of
from fathom.train.run import RunFolder, changed_fields, run_folder
from fathom.train.signals import Stopped, StopRequest, sigterm_interrupts


@dataclass(frozen=True)
class SynthResult:
    """How a session ended."""

    folder: Path
    traces: Path | None
    """The file of rows; None where the session was stopped before it was written."""
    rows: int
    interrupted: bool = False
    """Stopped by a signal; the run can be resumed."""


def synthesize(
    recipe: SynthRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    runs: Path = Path("runs"),
) -> SynthResult:
    """Draw, check, filter and write as `recipe` says, in the folder `runs/<recipe.name>`.

    Raises `UserError` for everything a person can put right; what was drawn before is then on disk.
    """
    console = console or Console(stderr=True)
    recipe, resume = resolved(recipe), resume and not overwrite
    with sigterm_interrupts(), run_folder(runs / recipe.name) as run:
        _admit(run, recipe, resume=resume, overwrite=overwrite)
        told = Display(console, total=1, done=0)
        say = told.say
        say(f"run '{recipe.name}' in {run.path}: {plural(recipe.problems, 'problem')}")
        with ExitStack() as stack:
            tasks = open_tasks(recipe)
            problems = plan_problems(recipe, tasks, say)
            drawn = DrawnFile(run.path / "drawn.jsonl")
            done = drawn.recover(problems) if resume else 0
            stop = stack.enter_context(StopRequest())
            factory = Factory(recipe, tasks, problems, drawn, stop.heed, console)
            factory.refuse_contaminated()
            teacher = stack.enter_context(open_teacher(recipe, stop.heed)) if done < len(problems) else None
            factory.start_checks(stack)
            _begin(run, recipe, resume=resume)
            if done:
                say(f"resuming behind problem {done:,} of {len(problems):,}")
            again = f"{fathom_command()} synth {run.recipe} --resume"
            try:
                if teacher is not None:
                    factory.draw(teacher, done)
                return factory.write(run)
            except Stopped:
                told.advise(f"stopped; go on with: {again}")
                return SynthResult(run.path, None, 0, interrupted=True)
            except UserError:
                told.advise(f"what was drawn is kept; once mended, go on with: {again}")
                raise


class Factory:
    """What a run works with."""

    def __init__(
        self,
        recipe: SynthRecipe,
        tasks: dict[str, Task],
        problems: Problems,
        drawn: DrawnFile,
        heed: Callable[[], None],
        console: Console,
    ) -> None:
        self._recipe, self._tasks, self._problems, self._drawn = recipe, tasks, problems, drawn
        self._heed, self._console = heed, console
        self._reader = reader_of(recipe)
        self._checkers: dict[str, Checker] = {}
        self._held_out = self._read_held_out()

    def _read_held_out(self) -> HeldOutSets:
        """Held-out problems of the tasks, and the questions of each file."""
        settings = self._recipe.decontamination
        sets = [list(read_questions(Path(file))) for file in settings.files]
        for task in self._recipe.tasks if settings.held_out else ():
            # With the same seed, those that training and evaluation measure with.
            found = held_out_problems(self._tasks[task.name], task.levels, settings.held_out, seed=self._recipe.seed)
            sets.append([problem.question for problem in found])
        return HeldOutSets(sets, settings.overlap)

    def refuse_contaminated(self) -> None:
        """Raises `UserError` where training rows that the person named ask a held-out question."""
        refuse_contaminated(self._recipe.decontamination.refuse, self._held_out, where="decontamination.refuse")

    def start_checks(self, stack: ExitStack) -> None:
        """Start a checker for every task; `stack` ends them."""
        for name in self._tasks:
            checker = Checker(name, seconds=self._recipe.check.seconds, heed=self._heed)
            self._checkers[name] = stack.enter_context(checker)

    def draw(self, teacher: Teacher, done: int) -> None:
        """Put candidates of all problems after the first `done` on disk. Raises `Stopped`, `UserError`."""
        right = tokens = asked = 0
        began = time.monotonic()
        with Display(self._console, total=len(self._problems), done=done, unit="problem") as display:
            for name, batch in self._batches(done):
                self._heed()
                solved = self._solve(teacher, name, batch)
                self._keep(solved, done)
                done += len(batch)
                candidates = [candidate for one in solved for candidate in one.candidates]
                asked, right = asked + len(candidates), right + sum(candidate.right for candidate in candidates)
                tokens += sum(candidate.tokens or 0 for candidate in candidates)
                speed = tokens / (time.monotonic() - began)
                display.step(done, {"accuracy": right / asked, "tokens_per_second": speed or None})

    def _keep(self, solved: Sequence[Solved], done: int) -> None:
        """Put a batch on disk, behind `done` problems."""
        try:
            self._drawn.append(solved)
        except OSError as error:
            raise UserError(
                f"{self._drawn.path}: cannot be written ({error.strerror or error}); all before problem {done + 1:,} "
                "is kept: make room, then resume"
            ) from None

    def write(self, run: RunFolder) -> SynthResult:
        """Filter what was drawn, and write rows and counts. Raises `Stopped`, `UserError`."""
        target = run.path / f"traces.{self._recipe.format}"
        selection = Selection(self._recipe, self._reader, self._held_out)
        counts = selection.counts
        try:
            with row_file(target, self._recipe.format) as file:
                for row in self._selected(selection):
                    file.write(row)
                summary = counts.summary()
                replace_text(run.path / "synth.json", json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
                if not (rows := counts.total("kept")):
                    print_counts(summary, f"run '{self._recipe.name}'", self._console)
                    raise UserError(
                        f"{run.path}: no row is left of {counts.yields()}; all candidates are in {self._drawn.path}"
                    )
            for kind in set(get_args(Format)) - {self._recipe.format}:
                (run.path / f"traces.{kind}").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{target}: cannot be written ({error.strerror or error}); all that was drawn is kept: make room, then "
                "resume"
            ) from None
        title = f"run '{self._recipe.name}': {plural(rows, 'row')} in {target}"
        print_counts(summary, title, self._console, short=is_part())
        return SynthResult(run.path, target, rows)

    def _selected(self, selection: Selection) -> Iterator[Row]:
        """The rows of all that was drawn."""
        drawn, done = iter(self._drawn), 0
        with Display(self._console, total=len(self._problems), done=0, unit="filtered") as display:
            for name, batch in self._batches(0):
                self._heed()
                # A line of what was drawn is a problem: the batch, which comes first, says how many are taken.
                yield from selection.rows(list(zip(batch, drawn, strict=False)), self._checkers[name])
                done += len(batch)
                display.step(done, {})

    def _batches(self, done: int) -> Iterator[tuple[str, list[Problem]]]:
        """The problems after the first `done`, in pieces of one task."""
        size = self._recipe.draw.batch
        while done < len(self._problems):
            name = self._problems[done][0]
            batch = [problem for task, problem in self._problems[done : done + size] if task == name]
            yield name, batch
            done += len(batch)

    def _solve(self, teacher: Teacher, name: str, problems: Sequence[Problem]) -> list[Solved]:
        """Candidates of all rounds, checked."""
        task = self._tasks[name]
        askings = [
            Asking(problem, seed_of(self._recipe.seed, task.called, problem.key or problem.question, sample))
            for problem in problems
            for sample in range(self._recipe.draw.samples)
        ]
        places = [place for place in range(len(problems)) for _ in range(self._recipe.draw.samples)]
        found: list[list[Candidate]] = [[] for _ in problems]
        for round in range(1 + self._recipe.draw.repair_rounds):
            candidates = self._checked(name, askings, teacher.solve(task, askings))
            for place, candidate in zip(places, candidates, strict=True):
                found[place].append(candidate)
            wrong = [
                (place, again)
                for place, asking, candidate in zip(places, askings, candidates, strict=True)
                if (again := self._again(asking, candidate, round + 1)) is not None
            ]
            if not wrong:
                break
            places, askings = [place for place, _ in wrong], [asking for _, asking in wrong]
        return [Solved(name, problem.question, tuple(own)) for problem, own in zip(problems, found, strict=True)]

    def _again(self, asking: Asking, candidate: Candidate, round: int) -> Asking | None:
        """The same conversation with the verdict on a wrong answer; None where there is nothing to say that of."""
        answer = candidate.reading(self._reader.layout, starts_thinking=self._reader.starts_thinking).answer
        if candidate.right or candidate.failure or candidate.fault or answer is None:
            return None
        attempts = (*asking.attempts, Attempt(candidate.text, answer))
        return Asking(asking.problem, seed_of(asking.seed, round), attempts)

    def _checked(self, name: str, askings: Sequence[Asking], candidates: Sequence[Candidate]) -> list[Candidate]:
        samples = [
            Sample(asking.problem, candidate.text, candidate.tokens or 0, candidate.finished)
            for asking, candidate in zip(askings, candidates, strict=True)
        ]
        rewards = self._checkers[name].score_all(
            samples,
            max_tokens=self._recipe.draw.max_tokens,
            starts_thinking=self._reader.starts_thinking,
            settings=Rewards(layout=self._reader.layout),
        )
        return [
            replace(candidate, score=reward.parts["accuracy"], fault=reward.fault)
            for candidate, reward in zip(candidates, rewards, strict=True)
        ]


def _admit(run: RunFolder, recipe: SynthRecipe, *, resume: bool, overwrite: bool) -> None:
    """Raises `UserError` where the folder is another run's, or this run is there and was not asked for."""
    if not run.recipe.exists():
        if resume:
            raise UserError(f"{run.path}: there is no run to resume; leave --resume out to start it")
        return
    if run.checkpoints.exists():
        raise UserError(f"{run.path}: holds a model's training; give this run another --name")
    if overwrite:
        return
    if not resume:
        raise UserError(
            f"{run.path}: this run exists; continue it with --resume, replace it with --overwrite, or give another "
            "--name"
        )
    if changed := changed_fields(read_recipe(run.recipe, [], SynthRecipe), recipe):
        raise UserError(
            f"{run.path}: cannot resume, the recipe has changed in {', '.join(changed)}; change it back, or give the "
            "run another --name"
        )


def _begin(run: RunFolder, recipe: SynthRecipe, *, resume: bool) -> None:
    """Write the recipe, in the place of an older run, whose draws go first: they are not to be taken for this one's.

    Of a run that is gone on with, the draws stay; its rows and counts go where the recipe has changed, for they are
    not what it says, and come back with it from the draws.
    """
    if resume and read_recipe(run.recipe, [], SynthRecipe) == recipe:
        return
    made = (*(f"traces.{kind}" for kind in get_args(Format)), "synth.json")
    try:
        for name in made if resume else ("drawn.jsonl", *made):
            (run.path / name).unlink(missing_ok=True)
        replace_text(run.recipe, dump_recipe(recipe))
    except OSError as error:
        raise UserError(f"{run.path}: cannot be written ({error.strerror or error})") from None
