"""The moment at which a model first corrects itself: looked for in what it draws while it learns, and kept.

DeepSeek-R1-Zero's authors saw one in an intermediate checkpoint, a thought that says "Wait, wait" and begins anew, and
printed it (arXiv 2501.12948, table 3). Here the first one is kept as it was drawn, with its step.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fathom.errors import UserError
from fathom.train.honesty import reflections_in
from fathom.train.rollout import Group
from fathom.train.run import RunFolder, replace_text

_WORD = re.compile(r"[^\W_]+")
FILE = "first_correction.json"
"""In a run's folder, where there was one."""


@dataclass(frozen=True)
class Correction:
    """A right completion whose thought stops at a word of doubt and then says something else."""

    step: int
    """In which it was drawn; the first is 1."""
    question: str
    completion: str
    word: str
    """As it is written there, in lower case."""


def first_correction(groups: Sequence[Group], words: Sequence[str], step: int) -> Correction | None:
    """The first in the order of `groups`; None where there is none. `words` are those of doubt."""
    for group in groups:
        for rollout in group.rollouts:
            if rollout.reward.parts["accuracy"] >= 1 and (word := _corrects(rollout.reward.reading.thought, words)):
                return Correction(step, group.problem.question, rollout.text, word)
    return None


class CorrectionLog:
    """Keeps a run's first correction in its folder."""

    def __init__(self, run: RunFolder, words: Sequence[str], *, step: int) -> None:
        """`step`: the last one that was made. What a later one left behind is gone, as are its metrics: it will be made
        again, or the run is another."""
        self._file, self._words = run.path / FILE, words
        self._kept = (found := _read(self._file)) is not None and found <= step
        if not self._kept:
            self._file.unlink(missing_ok=True)

    def look(self, groups: Sequence[Group], step: int) -> None:
        """Write what the groups of a step hold, if it is the first. Raises `UserError` where the disk refuses."""
        found = None if self._kept else first_correction(groups, self._words, step)
        if found is None:
            return
        try:
            replace_text(self._file, json.dumps(asdict(found), ensure_ascii=False, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{self._file}: cannot be written ({error.strerror or error})") from None
        self._kept = True


def _corrects(thought: str, words: Sequence[str]) -> str:
    """The first of `words` between two that differ: in `5!5` nothing is taken back. Empty where there is none."""
    lowered = thought.lower()
    for found in reflections_in(thought, words):
        before, after = _WORD.findall(lowered[: found.start()]), _WORD.search(lowered, found.end())
        if before and after and before[-1] != after[0]:
            return found[0]
    return ""


def _read(file: Path) -> int | None:
    """The step of what is kept; None where nothing is."""
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
