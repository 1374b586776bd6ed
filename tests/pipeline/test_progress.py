"""How far a pipeline has come: the time left for the whole of it, and what is said while it runs."""

import io
from dataclasses import dataclass, field

import pytest
from rich.console import Console

import fathom.train.display as displays
from fathom.config.evaluation import EvaluationSettings
from fathom.config.pipeline import StageSection
from fathom.pipeline.progress import PipelineProgress
from fathom.pipeline.state import StageState
from fathom.train.display import Display, part_of

SETTINGS = EvaluationSettings(tasks=("modular",), problems=64, samples=4)
STAGES = [
    StageSection(name="base", verb="pretrain", minutes=6.0),
    StageSection(name="zero", verb="rl", minutes=1.0),
    StageSection(name="traces", verb="synth", minutes=0.1),
    StageSection(name="dev", verb="sft", minutes=0.4),
    StageSection(name="teacher", verb="model", minutes=0.1),
    StageSection(name="r1", verb="rl", minutes=0.8),
]
MEASURING, WARMING = 5.0, 3.0
"""Seconds of each stage, where minutes are right."""


@dataclass
class Machine:
    """Runs `STAGES` at `factor` times their minutes, and notes what is left, foreseen and true."""

    factor: float
    stages: list[StageSection]
    now: float = 0.0
    states: dict[str, StageState] = field(default_factory=dict)
    said: list[tuple[float, float | None]] = field(default_factory=list)
    """Time, and seconds left then."""

    def run(self) -> None:
        """All stages that are not finished, each in its steps and then its measurement."""
        progress = PipelineProgress(self.stages, self.states, record=lambda: None, clock=lambda: self.now)
        for stage in self.stages:
            if stage.name in self.states:
                continue
            began, measuring = self.now, 0.0 if stage.verb == "synth" else MEASURING
            progress.begin(stage, SETTINGS if measuring else None)
            work = 60 * (stage.minutes or 1.0) - measuring - WARMING
            self.now += WARMING * self.factor
            for seconds in (work, measuring):
                for step in range(50):
                    self.now += seconds / 50 * self.factor
                    if seconds:
                        progress.moved((step + 1) / 50)
                    self.said.append((self.now, progress.seconds_left()))
                progress.begin_measuring()
            cost = {"problems": 64, "samples": 4, "cost": {"seconds": measuring * self.factor}}
            found = {"measurements": [cost]} if measuring else None
            self.states[stage.name] = StageState(stage.verb, "", True, self.now - began, found)


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_time_left_is_right_on_any_machine(factor: float) -> None:
    """Where every stage takes the same multiple of its minutes, the time left is right within 30 % from when 2 % of all
    is done until 2 % are left, although nothing is learnt from what comes before a stage's first step."""
    machine = Machine(factor, STAGES)
    machine.run()
    ended = machine.now
    off = [
        (now / ended, left / (ended - now))
        for now, left in machine.said
        if left is not None and 0.02 < now / ended < 0.98
    ]
    assert len(off) > 400
    assert all(0.7 < ratio < 1.3 for _, ratio in off), max(off, key=lambda pair: abs(pair[1] - 1))


def test_time_left_is_right_after_a_resumption() -> None:
    """What earlier sessions have taken says how fast the machine is, before the first step of this one."""
    machine = Machine(4.0, STAGES)
    machine.states["base"] = StageState("pretrain", "", True, 4.0 * 360)
    machine.run()
    now, left = machine.said[0]
    assert left == pytest.approx(machine.now - now, rel=0.3)


def test_time_left_of_a_broken_stage_is_of_what_is_left_of_it() -> None:
    """Before its first step, what it had come to counts, on a machine four times as slow as foreseen."""
    base = StageState("pretrain", "", True, 4.0 * 360)
    states = {"base": base, "zero": StageState("rl", "", seconds=4.0 * 45, done=0.75)}
    progress = PipelineProgress(STAGES, states, record=lambda: None)
    progress.begin(STAGES[1], None)
    assert progress.seconds_left() == pytest.approx(4.0 * (15 + 6 + 24 + 6 + 48))
    progress.moved(0.25)  # a kill has cost what came after the last checkpoint
    assert progress.seconds_left() == pytest.approx(4.0 * (45 + 6 + 24 + 6 + 48))


def test_measuring_again_takes_its_time() -> None:
    """Finished stages that are to be measured otherwise count what that takes by the measurements there are, until
    their turn is over."""
    cost = {"problems": 64, "samples": 4, "cost": {"seconds": 5.0}}
    states = {
        stage.name: StageState(stage.verb, "", True, 60.0, None if stage.verb == "synth" else {"measurements": [cost]})
        for stage in STAGES
    }
    more = SETTINGS.replace(samples=8)
    again = {stage.name: more for stage in STAGES if stage.verb != "synth"}
    progress = PipelineProgress(STAGES, states, record=lambda: None, again=again)
    assert progress.seconds_left() == pytest.approx(50)
    progress.begin_again(STAGES[1])
    assert progress.seconds_left() == pytest.approx(40)
    progress.moved(0.5)
    assert progress.seconds_left() == pytest.approx(35)
    progress.begin_again(STAGES[5])
    progress.begin_measuring()
    progress.moved(1.0)
    assert progress.seconds_left() == pytest.approx(0)


def test_no_time_is_guessed_without_minutes() -> None:
    """Where a stage that is left does not say what it takes, nothing is said of the whole; once it is over, it is."""
    stages = [STAGES[0], StageSection(name="zero", verb="rl"), STAGES[5]]
    machine = Machine(1.0, stages)
    machine.run()
    known = [left is not None for _, left in machine.said]
    assert known == [False] * 200 + [True] * 100


def test_a_part_is_told_in_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal a line comes every 30 seconds and says what is left of the whole; what to do with the run
    alone is not said."""
    now = [0.0]
    monkeypatch.setattr(displays.time, "monotonic", lambda: now[0])
    progress = PipelineProgress(STAGES, {}, record=lambda: None, clock=lambda: now[0])
    progress.begin(STAGES[0], SETTINGS)
    said = io.StringIO()
    with part_of(progress), Display(Console(file=said, width=200), total=100, done=0) as display:
        for step in range(100):
            now[0] += 7.2
            display.step(step + 1, {})
        display.advise("go on with --resume")
    lines = said.getvalue().splitlines()
    assert len(lines) == 20
    assert all("of the whole  step" in line for line in lines)
    assert lines[0].startswith("stage 1 of 6, base, about")


def test_a_terminal_shows_the_whole_above_the_stage() -> None:
    """Two bars: the pipeline's, which says the stage, and the stage's own."""
    progress = PipelineProgress(STAGES, {}, record=lambda: None)
    progress.begin(STAGES[0], SETTINGS)
    said = io.StringIO()
    console = Console(file=said, width=120, force_terminal=True, color_system=None)
    with part_of(progress), Display(console, total=4, done=0) as display:
        display.step(2, {"loss": 1.5})
    above, own = [line for line in said.getvalue().splitlines() if "━" in line][-2:]
    assert "stage 1 of 6, base, about 5 min left of the whole" in above
    assert "step 2/4  loss 1.500" in own
