"""What models said: the same problems before and after, and the moment of the first self-correction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fathom.report.stages import Stage, Story
from fathom.train.honesty import reflections_in

LONGEST = 4000
"""Characters of a completion that are shown, around the word of doubt."""
TASKS = 2
"""Of so many tasks problems are shown."""


@dataclass(frozen=True)
class Turn:
    """What one stage's model said to a problem."""

    stage: str
    thought: str
    answer: str
    right: bool


@dataclass(frozen=True)
class Dialogue:
    """One problem, put to several models."""

    task: str
    level: int
    question: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Correction:
    """A completion in which the model corrects itself, in three pieces."""

    step: int
    question: str
    before: str
    word: str
    after: str


def dialogues(story: Story) -> list[Dialogue]:
    """All problems of which there are transcripts of every stage that is compared; none is picked."""
    return [found for task in story.tasks[:TASKS] for found in _of_task(story, task)]


def correction_of(kept: Mapping[str, Any]) -> Correction:
    """What `fathom.train.moments` has kept, parted at the word of doubt."""
    completion, word = kept["completion"], kept["word"]
    places = reflections_in(completion, [word])
    # In lower case, a few letters of other alphabets are longer than they were.
    whole = not places or len(places[0].string) != len(completion)
    start, end = (len(completion), len(completion)) if whole else places[0].span()
    before, after = completion[:start], completion[end:]
    if len(before) > LONGEST // 2:
        before = f"… {before[-LONGEST // 2 :]}"
    if len(after) > LONGEST // 2:
        after = f"{after[: LONGEST // 2]} …"
    return Correction(kept["step"], kept["question"], before, completion[start:end], after)


def _of_task(story: Story, task: str) -> list[Dialogue]:
    said = [(stage, found) for stage in story.cast if (found := _transcripts(stage, task))]
    questions = said[0][1] if said else {}
    called = story.task_names[task]
    return [
        Dialogue(called, first["level"], question, tuple(_turn(stage, found[question]) for stage, found in said))
        for question, first in questions.items()
        if all(question in found for _, found in said)
    ]


def _transcripts(stage: Stage, task: str) -> dict[str, Any]:
    """By question."""
    free = stage.free(task) or {}
    return {one["question"]: one for one in free.get("transcripts", ())}


def _turn(stage: Stage, said: Mapping[str, Any]) -> Turn:
    return Turn(stage.name, said["thought"], said["answer"], said["right"])
