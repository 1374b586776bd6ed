"""The runner of a pipeline: a stage that is finished is not made again, a broken one is resumed, and after each stage
that yields a model it is measured on the same held-out problems.

    runs/r1/
        pipeline.toml        the pipeline as run (`fathom.pipeline.state`)
        pipeline.json        what is begun and what is finished
        held-out.jsonl       the problems that stages are measured with, which no stage may learn from
        base/, zero/, …      the stages' own runs
        …/evaluation.json    what was measured after each
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fathom.config.pipeline import ModelRecipe, Pipeline, StageSection, dump_pipeline
from fathom.config.sft import SFTRecipe
from fathom.config.synth import SynthRecipe
from fathom.engine.engine import Engine, EngineSettings
from fathom.errors import UserError
from fathom.evaluate.answers import EngineAnswers
from fathom.evaluate.command import RESULT
from fathom.evaluate.energy import EnergyMeter
from fathom.evaluate.evaluate import INTERRUPTED, evaluate, held_out
from fathom.evaluate.screen import notes
from fathom.model.checkpoint import load
from fathom.pipeline.foresight import require_what_is_elsewhere, require_what_is_here
from fathom.pipeline.plan import Plan, plan_pipeline
from fathom.pipeline.progress import PipelineProgress
from fathom.pipeline.state import RECIPE, StageState, is_pipeline, write_file, write_state
from fathom.pipeline.table import print_stages, result_of
from fathom.scratch import neighbour, sweep
from fathom.synth.factory import synthesize
from fathom.train.display import Display, part_of
from fathom.train.pretrain import pretrain
from fathom.train.rl import train_rl
from fathom.train.run import RunFolder, locked, model_folder
from fathom.train.sft import train_sft
from fathom.train.signals import sigterm_interrupts

_TRAINERS: Mapping[str, Callable[..., Any]] = {"pretrain": pretrain, "sft": train_sft, "rl": train_rl}
_HELD_OUT = "held-out.jsonl"


@dataclass(frozen=True)
class PipelineResult:
    """How a session ended."""

    folder: Path
    stages: dict[str, StageState]
    """Those that were begun, in their order."""
    interrupted: bool = False
    """Stopped by a signal; the pipeline goes on where it is run again."""


def run_pipeline(
    pipeline: Pipeline,
    beside: Path,
    *,
    console: Console | None = None,
    runs: Path = Path("runs"),
    redo: bool = False,
    fresh: bool = False,
) -> PipelineResult:
    """Make all stages that are not finished, in `runs/<pipeline.name>`; recipes are read from the folder `beside`.

    A finished stage whose model is to be measured otherwise than it was is measured again, and not made again. `redo`
    makes stages again whose recipe has changed, and those that build on them; without it they are refused. `fresh`
    deletes all that is there, once nothing stands in the way of beginning anew. Raises `UserError` for everything a
    person can put right; what was finished before stays so.
    """
    plan = plan_pipeline(pipeline, beside, runs, fresh=fresh)
    if plan.stale and not redo:
        raise UserError(
            f"{plan.folder}: stage {plan.stale[0]} was {'made' if plan.before[plan.stale[0]].finished else 'begun'} by "
            "another recipe, or on another stage; put it back, give the pipeline another --name, or make it and what "
            "builds on it again with --redo"
        )
    require_what_is_here(plan)
    require_what_is_elsewhere(plan)
    if fresh:
        remove_pipeline(plan.folder)
    rows = [json.dumps({"question": question}, ensure_ascii=False) for question in plan.questions]
    with sigterm_interrupts(), locked(plan.folder):
        write_file(plan.folder / RECIPE, dump_pipeline(pipeline, beside))
        write_file(plan.folder / _HELD_OUT, "\n".join(rows) + "\n")
        to_go_on = "run it again without --fresh" if fresh else "run it again"
        return _Session(plan, console or Console(stderr=True), to_go_on).run()


def remove_pipeline(folder: Path) -> None:
    """Delete a pipeline with all its stages, where one is in `folder`. Raises `UserError` where it is under way."""
    if is_pipeline(folder):
        with locked(folder):
            # One rename: a kill while it is being deleted leaves no half of it to be gone on with.
            folder.rename(neighbour(folder, "removed"))
    sweep(folder, "removed")


class _Session:
    """The stages from where they stand to where they end."""

    def __init__(self, plan: Plan, console: Console, to_go_on: str) -> None:
        """`to_go_on`: what to do once it has stopped."""
        self._plan, self._console, self._to_go_on = plan, console, to_go_on
        kept = [name for name in plan.recipes if name in plan.before and name not in plan.stale]
        self._states = {name: plan.before[name] for name in kept}
        self._gone: set[str] = set()
        again = {name: plan.settings[name] for name in plan.outdated}
        self._progress = PipelineProgress(
            plan.pipeline.stages, self._states, record=self._record_in_passing, again=again
        )

    def run(self) -> PipelineResult:
        """Stage by stage, until all are finished or a person stops them. Raises `UserError`."""
        stages, plan = self._plan.pipeline.stages, self._plan
        for number, stage in enumerate(stages, 1):
            if finished := stage.name in plan.finished:
                again = ", and measured again, for it is measured otherwise now" if stage.name in plan.outdated else ""
                self._say(f"stage {number} of {len(stages)}, {stage.name}: finished before{again}")
                if not again:
                    continue
            if not (self._measure_again(stage) if finished else self._finish(stage)):
                self._say(f"stopped in stage {stage.name}; to go on, {self._to_go_on}")
                return PipelineResult(plan.folder, self._in_order(), interrupted=True)
        print_stages(self._in_order(), self._console)
        return PipelineResult(self._plan.folder, self._in_order())

    def _finish(self, stage: StageSection) -> bool:
        """Make what is missing of a stage, and measure it; False where a person stopped it."""
        self._begin(stage)
        evaluation = None
        try:
            with part_of(self._progress):
                ended = self._make(stage)
                if ended and stage.yields_model:
                    evaluation = self._measure(stage)
                    ended = evaluation["complete"]
        except KeyboardInterrupt:
            ended = False
        except (UserError, OSError) as error:
            self._record_in_passing()
            raise self._told(stage, error) from None
        asked = self._plan.asked.get(stage.name, "")
        self._record(finished=ended, evaluation=evaluation if ended else None, asked=asked if ended else "")
        if ended and evaluation is not None:
            self._say(f"{stage.name}: {result_of(self._states[stage.name])}")
        return ended

    def _measure_again(self, stage: StageSection) -> bool:
        """Put a new measurement in the place of a finished stage's; False where a person stopped it, and nothing has
        changed then."""
        before = self._plan.before[stage.name]
        began, energy = time.perf_counter(), EnergyMeter()
        self._progress.begin_again(stage)
        try:
            with part_of(self._progress):
                evaluation = self._measure(stage)
        except KeyboardInterrupt:
            return False
        except (UserError, OSError) as error:
            raise self._told(stage, error) from None
        if not evaluation["complete"]:
            return False
        costs = [found["cost"] for found in (before.evaluation or {}).get("measurements", ())]
        spent, joules = energy.read(), [cost["joules"] for cost in costs]
        known = before.joules is not None and spent is not None and None not in joules
        self._states[stage.name] = replace(
            before,
            seconds=before.seconds - sum(cost["seconds"] for cost in costs) + time.perf_counter() - began,
            joules=before.joules - sum(joules) + spent if known else None,
            evaluation=evaluation,
            asked=self._plan.asked[stage.name],
        )
        self._write()
        self._say(f"{stage.name}: {result_of(self._states[stage.name])}")
        return True

    def _told(self, stage: StageSection, error: UserError | OSError) -> UserError:
        """What is to be put right, and what to do then."""
        said = error if isinstance(error, UserError) else f"{error.filename or 'a file'}: {error.strerror or error}"
        outside = isinstance(error, OSError) or isinstance(error.__context__, OSError)
        again = "once mended, " if outside else "put that right, in the recipe or behind the command; then "
        return UserError(f"stage {stage.name}: {said}; what is finished is kept: {again}{self._to_go_on}")

    def _begin(self, stage: StageSection) -> None:
        """Take up a stage where earlier sessions left it."""
        plan, name = self._plan, stage.name
        if name in plan.stale:
            self._clear(name)
        self._name, self._began, self._energy = name, time.perf_counter(), EnergyMeter()
        now = plan.fingerprints[name]
        earlier = self._states.get(name) or StageState(stage.verb, "", joules=0.0)
        self._states[name] = self._earlier = replace(earlier, fingerprint=now.whole, below=now.below)
        self._write()
        self._progress.begin(stage, plan.settings.get(name))
        self._say(self._progress.words())

    def _clear(self, name: str) -> None:
        """Delete a stage that is to be made again, and what was built on it: it could not be told from what will be."""
        gone = [one for one in self._plan.built_on(name) if one in self._plan.before]
        # First they are not believed any more: a kill while they are being deleted leaves nothing that looks whole.
        self._states |= {one: StageState(self._plan.before[one].verb, "") for one in gone}
        self._write()
        for one in gone:
            _remove(self._plan.folder / one)
            del self._states[one]
        self._gone.update(gone)

    def _make(self, stage: StageSection) -> bool:
        """Run a stage to its end; False where a person stopped it."""
        recipe, folder = self._plan.recipes[stage.name], self._plan.folder
        if isinstance(recipe, ModelRecipe):
            return True
        how = {"console": self._console, "runs": folder, "resume": RunFolder(folder / stage.name).recipe.exists()}
        if isinstance(recipe, SynthRecipe):
            kept_out = (*recipe.decontamination.files, str(folder / _HELD_OUT))
            section = recipe.decontamination.replace(files=kept_out)
            # A copy, and not `replace`: what the recipe leaves to its model stays unsaid.
            return not synthesize(recipe.model_copy(update={"decontamination": section}), **how).interrupted
        if isinstance(recipe, SFTRecipe):
            self._plan.refuse_contaminated(recipe.data.files)
        return not _TRAINERS[stage.verb](recipe, **how).interrupted

    def _measure(self, stage: StageSection) -> dict[str, Any]:
        """The stage's model on held-out problems, as JSON. Raises `UserError` where it cannot be asked."""
        recipe, folder = self._plan.recipes[stage.name], self._plan.folder
        settings = self._plan.settings[stage.name]
        problems = held_out(settings)
        path = recipe.model if isinstance(recipe, ModelRecipe) else folder / stage.name
        model, tokenizer = load(model_folder(path), dtype="float32")
        if tokenizer is None:
            raise UserError(f"{path}: has no tokenizer, without which no problem can be put to it")
        self._progress.begin_measuring()
        total = sum(map(len, problems.values())) * (1 + len(settings.budgets))
        with (
            Engine(model, tokenizer, EngineSettings()) as engine,
            Display(self._console, total=total, done=0, unit="problem") as display,
        ):
            answers, tell = EngineAnswers(engine, tokenizer), lambda progress: display.step(progress.done, {})
            found = evaluate(answers, settings, model=stage.name, problems=problems, tell=tell)
        if found.stopped not in ("", INTERRUPTED):
            raise UserError(found.stopped)
        for line in notes(found):
            self._say(f"{stage.name}: {line}")
        text = json.dumps(found.as_json(), indent=2, ensure_ascii=False)
        if not found.stopped:  # else a whole one may be there already
            write_file(folder / stage.name / RESULT, text + "\n")
        return json.loads(text)

    def _record(self, **changes: Any) -> None:
        """Keep what the stage under way has come to, and what it has taken so far. Raises `UserError`."""
        spent, earlier = self._energy.read(), self._earlier
        self._states[self._name] = replace(
            earlier,
            seconds=earlier.seconds + time.perf_counter() - self._began,
            joules=None if earlier.joules is None or spent is None else earlier.joules + spent,
            done=self._progress.done,
            **changes,
        )
        self._write()

    def _write(self) -> None:
        """Stages that were taken out of the recipe are kept, for they may come back. Raises `UserError`."""
        known = self._in_order()
        left_out = {n: own for n, own in self._plan.before.items() if n not in known and n not in self._gone}
        write_state(self._plan.folder, known | left_out)

    def _record_in_passing(self) -> None:
        # Where the disk refuses, the stage is about to say so itself, once it has saved what it can.
        with contextlib.suppress(UserError):
            self._record()

    def _in_order(self) -> dict[str, StageState]:
        """Where every stage stands; one that is to be made again, and whose turn has not come, as it was."""
        before = {name: own for name, own in self._plan.before.items() if name not in self._gone}
        known = before | self._states
        return {name: known[name] for name in self._plan.recipes if name in known}

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _remove(run: Path) -> None:
    try:
        shutil.rmtree(run)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{run}: cannot be removed ({error.strerror})") from None
