"""Problems and answers that a test makes up."""

from collections.abc import Callable, Iterator, Sequence

from fathom.config.evaluation import EvaluationSettings
from fathom.evaluate.answers import Answer, Reply
from fathom.tasks.task import Problem

MODULAR = EvaluationSettings(
    tasks=("modular",),
    levels=2,
    problems=8,
    samples=4,
    max_tokens=24,
    prompt={"style": "template"},
    layout={"form": "rest", "thoughts": "optional"},
)
"""Questions like `7-6*2=`, whose answer is a digit."""


class Scripted:
    """Answers as `say` does: (problem, number of the sample, budget) -> text. All of 10 tokens, 4 of them thoughts."""

    here = False

    def __init__(self, say: Callable[[Problem, int, int | None], str | BaseException]) -> None:
        self._say = say
        self.asked: list[tuple[Problem, int | None]] = []
        self.closed = 0

    def require(self, settings: EvaluationSettings) -> None:
        """Nothing."""

    def replies(
        self, problems: Sequence[Problem], settings: EvaluationSettings, *, budget: int | None
    ) -> Iterator[Reply]:
        """One after another; what is an exception is raised."""
        try:
            for problem in problems:
                self.asked.append((problem, budget))
                texts = [self._say(problem, number, budget) for number in range(settings.samples)]
                for text in texts:
                    if isinstance(text, BaseException):
                        raise text
                yield Reply(problem, tuple(Answer(str(text), True, 5, 10, 4) for text in texts))
        finally:
            self.closed += 1
