"""How far a pipeline has come, and the time left for the whole of it.

A stage's `minutes` say what it takes on the machine they were measured on. This machine's factor is what has been spent
over what was foreseen for it, so the time left is what is foreseen for the rest times that factor.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from fathom.config.evaluation import EvaluationSettings
from fathom.config.pipeline import StageSection
from fathom.pipeline.state import StageState

_TELLING = 0.01
"""Share of the whole behind which this machine's factor is believed: the first steps of all are no measure of it."""
_SECONDS_BETWEEN_RECORDS = 30.0


class PipelineProgress:
    """What `fathom.train.display` shows above each stage's own bar."""

    def __init__(
        self,
        stages: Sequence[StageSection],
        states: Mapping[str, StageState],
        *,
        record: Callable[[], None],
        again: Mapping[str, EvaluationSettings] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`states` are looked into whenever asked; `record` is called now and then while a stage is under way. The
        stages of `again` are finished, and are only to be measured so in their turn."""
        self._stages, self._states, self._record, self._clock = stages, states, record, clock
        self._minutes = {stage.name: stage.minutes for stage in stages if stage.minutes is not None}
        self._recorded = clock()
        self._stage = stages[0]
        self._done, self._measuring, self._start, self._width = 0.0, 0.0, 0.0, 1.0
        self._first: tuple[float, float] | None = None
        self._again = {name: self._seconds_of_measuring(settings) or 0.0 for name, settings in again.items()}

    @property
    def done(self) -> float:
        """Of the stage that is under way."""
        return self._done

    def begin(self, stage: StageSection, settings: EvaluationSettings | None) -> None:
        """A stage begins, which is then measured with `settings`."""
        self._stage, self._first = stage, None
        self._done = self._states[stage.name].done if stage.name in self._states else 0.0
        self._measuring = 1.0 if stage.verb == "model" else self._share_of_measuring(settings)
        self._start, self._width = 0.0, 1.0 - self._measuring

    def begin_again(self, stage: StageSection) -> None:
        """A finished stage is only measured."""
        self._stage, self._done, self._first, self._measuring = stage, 0.0, None, 1.0
        self._start, self._width = 0.0, 1.0

    def begin_measuring(self) -> None:
        """The stage's work is done, and only its model is to be measured."""
        self._start, self._width = 1.0 - self._measuring, self._measuring

    def moved(self, share: float) -> None:
        """So much of what is under way in the stage is done, of 1."""
        now = self._clock()
        done = self._start + self._width * share
        if self._first is None:  # compiling and warming up say nothing about the rest
            self._done = done  # what was recorded may have gone further than what is gone on with
            self._first = now, done
        self._done = max(self._done, done)
        if now - self._recorded >= _SECONDS_BETWEEN_RECORDS and not self._is_finished(self._stage.name):
            self._recorded = now
            self._record()

    def share(self) -> float:
        """Of the whole, by the stages' minutes where all have them, else by their number."""
        equal = len(self._minutes) < len(self._stages)
        weights = {stage.name: 1.0 if equal else self._minutes[stage.name] for stage in self._stages}
        return sum(weight * self._share_of(name) for name, weight in weights.items()) / sum(weights.values())

    def seconds_left(self) -> float | None:
        """For the whole; None where a stage that is left does not say its minutes."""
        left = [stage.name for stage in self._stages if not self._is_finished(stage.name)]
        if not set(left) <= self._minutes.keys():
            return None
        foreseen = sum(self._minutes[name] * (1 - self._share_of(name)) for name in left)
        return 60 * foreseen * self._factor() + self._seconds_again()

    def words(self) -> str:
        """As in `stage 3 of 12, dev1, about 7 min left of the whole`."""
        number = 1 + [stage.name for stage in self._stages].index(self._stage.name)
        stage = f"stage {number} of {len(self._stages)}, {self._stage.name}"
        left = self.seconds_left()
        return stage if left is None else f"{stage}, about {_about(left)} left of the whole"

    def _seconds_again(self) -> float:
        """For the finished stages that are to be measured again and are not before the one under way."""
        names = [stage.name for stage in self._stages]
        rest = names[names.index(self._stage.name) :]
        own = self._again.get(self._stage.name, 0.0)
        return sum(self._again.get(name, 0.0) for name in rest) - self._done * own

    def _factor(self) -> float:
        """Seconds spent over seconds foreseen, for what is done; 1 where that is too little to tell."""
        over = [name for name in self._minutes if self._is_finished(name)]
        spent, foreseen = sum(self._states[name].seconds for name in over), sum(self._minutes[name] for name in over)
        if self._first is not None and not self._is_finished(self._stage.name):
            began, done = self._first
            spent += self._clock() - began
            foreseen += self._minutes.get(self._stage.name, 0.0) * (self._done - done)
        return spent / (60 * foreseen) if foreseen > _TELLING * sum(self._minutes.values()) else 1.0

    def _share_of_measuring(self, settings: EvaluationSettings | None) -> float:
        """Of the time of the stage that begins, by what measuring has taken after other stages."""
        minutes = self._minutes.get(self._stage.name)
        if settings is None or minutes is None or (seconds := self._seconds_of_measuring(settings)) is None:
            return 0.0
        return min(0.9, seconds / (60 * minutes * self._factor()))

    def _seconds_of_measuring(self, settings: EvaluationSettings) -> float | None:
        """By what measuring has taken so far; None where nothing was measured."""
        found = [one for state in self._states.values() for one in (state.evaluation or {}).get("measurements", ())]
        answers = sum(one["problems"] * one["samples"] for one in found)
        if not answers:
            return None
        drawn = len(settings.tasks) * settings.problems * settings.samples * (1 + len(settings.budgets))
        return drawn * sum(one["cost"]["seconds"] for one in found) / answers

    def _share_of(self, name: str) -> float:
        """Of a stage, what is done."""
        return 1.0 if self._is_finished(name) else self._done if name == self._stage.name else 0.0

    def _is_finished(self, name: str) -> bool:
        return name in self._states and self._states[name].finished


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
