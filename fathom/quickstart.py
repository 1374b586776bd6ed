"""The first quarter of an hour: from nothing to a model that reasons, by every stage of DeepSeek-R1's recipe."""

import resource
import sys
from pathlib import Path

from rich.console import Console

import fathom
from fathom.config.pipeline import read_pipeline
from fathom.errors import INTERRUPTED, UserError, nearest
from fathom.model.accounting import count_parameters
from fathom.pipeline.run import run_pipeline
from fathom.recipe_verbs import add_report
from fathom.report.command import fathom_command
from fathom.report.cost import money
from fathom.report.dialogues import Dialogue, dialogues
from fathom.report.stages import Stage, Story
from fathom.report.tables import count, plural, print_rows

_PIPELINE = "r1"
_DIALOGUES = 3
_LONGEST = 300
"""Characters of a thought that are shown."""


def quickstart(overrides: list[str], *, fresh: bool) -> int:
    """Make `recipes/r1.toml`, or go on where it stopped; then what was made, what it says, and a report of it."""
    file = shipped_recipe(_PIPELINE)
    pipeline = read_pipeline(file, ["--name", "quickstart", *overrides])
    result = run_pipeline(pipeline, file.parent, fresh=fresh)
    if result.interrupted:
        return INTERRUPTED
    story = Story.read(result.folder)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for dialogue in dialogues(story)[:_DIALOGUES]:
        _show(dialogue, console)
    console.print()
    print_rows("results", _results(story), console)
    console.print()
    add_report(result.folder)
    command = fathom_command()
    console.print("\nNow try:")
    for rest in (
        f"serve {result.folder}          # and ask on its page, with DeepThink and without",
        f"chat {result.folder} --effort high",
        f"recipe {_PIPELINE} --dry-run           # the stages; any field of theirs can be changed",
    ):
        console.print(f"  {command} {rest}")
    return 0


def shipped_recipe(name: str) -> Path:
    """The pipeline of that name which is shipped, inside a package or beside it in a clone. Raises `UserError`."""
    package = Path(fathom.__file__).parent
    folders = [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]
    files = [file for folder in folders for file in folder.glob("*.toml")]
    known = {file.stem: file for file in files if "[[stages]]" in file.read_text(encoding="utf-8")}
    if name in known:
        return known[name]
    told = ", ".join(sorted(known)) or "none"
    raise UserError(f"recipes: no pipeline '{name}'{nearest(name, known)}; there are: {told}")


def _show(dialogue: Dialogue, console: Console) -> None:
    """One held-out problem, as the first model answers it and as the one that the pipeline is for does."""
    console.print(f"\n─── {dialogue.question.strip()}")
    for turn in (dialogue.turns[0], dialogue.turns[-1]):
        thought = " ".join(turn.thought.split())
        if len(thought) > _LONGEST:
            thought = f"{thought[:_LONGEST]} …"
        told = f"({thought}) {turn.answer.strip()}" if thought else turn.answer.strip() or "no answer"
        console.print(f"{turn.stage}: {told}  [{'right' if turn.right else 'wrong'}]")


def _results(story: Story) -> list[tuple[str, str]]:
    """What was made, what each model of the story can do, and what it took."""
    rows = [(stage.name, _result(story, stage)) for stage in _shown(story)]
    states = [stage.state for stage in story.stages if stage.state is not None]
    seconds = sum(state.seconds for state in states)
    took = f"{plural(len(states), 'stage')} in {seconds / 60:.1f} min, {money(story, seconds)}"
    joules = [state.joules for state in states if state.joules is not None]
    if len(joules) == len(states):
        took += f", {sum(joules) / 3600:.2f} Wh of this machine's processors"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return [*rows, ("took", took), ("memory", f"{peak / 1e9:.1f} GB at most, in this session")]


def _shown(story: Story) -> list[Stage]:
    """The stages that the story compares, and what became of its students."""
    students = [stage for family in story.students.values() for stage in family if stage.measurements]
    return sorted({stage.name: stage for stage in (*story.cast, *students)}.values(), key=lambda stage: stage.number)


def _result(story: Story, stage: Stage) -> str:
    found = [free for task in story.tasks if (free := stage.free(task)) is not None]
    scores = ", ".join(f"{story.task_names[free['task']]} {free['pass@k']['1']['value']:.3f}" for free in found)
    size = "" if stage.config is None else f"; {count(count_parameters(stage.config).total)} parameters"
    return f"pass@1 {scores} ({story.told(stage)}{size})"
