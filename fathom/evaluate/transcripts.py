"""What a model said to a few of the problems: for people, who learn more from it than from shares."""

from collections.abc import Sequence
from dataclasses import dataclass

from fathom.evaluate.answers import Answer
from fathom.tasks.reading import Reading
from fathom.tasks.task import Problem
from fathom.train.metrics import shortened

SHOWN = 4
"""Problems of a task."""
LONGEST = 4000
"""Characters of each text: what is longer loses its middle."""


@dataclass(frozen=True)
class Transcript:
    """One problem and one sample of its answers."""

    question: str
    thought: str
    answer: str
    """Where no answer could be read, all that was written."""
    right: bool
    level: int

    @classmethod
    def of(cls, problem: Problem, answer: Answer, reading: Reading, *, right: bool) -> "Transcript":
        """What `reading` found in `answer`."""
        thought, said = (reading.thought, reading.answer) if reading.answer is not None else ("", answer.text)
        texts = (problem.question, thought, said)
        # A server may send half a character, which no file can hold.
        question, thought, said = (shortened(text.encode(errors="replace").decode(), LONGEST) for text in texts)
        return cls(question, thought, said, right, problem.level)


def shown(problems: Sequence[Problem]) -> list[Problem]:
    """Up to `SHOWN` of the problems, from the lowest level to the highest at equal distances."""
    by_level = sorted(problems, key=lambda problem: problem.level)
    last = len(by_level) - 1
    places = {round(part * last / (SHOWN - 1)) for part in range(SHOWN)}
    return [by_level[place] for place in sorted(places)]
