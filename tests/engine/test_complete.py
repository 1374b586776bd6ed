"""Whole completions: more of them than the queue holds, the best of several, and ends that nobody waited for."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fathom.engine.complete import complete
from fathom.engine.protocol import Request
from fathom.errors import UserError
from fathom.model.transformer import Transformer
from tests.engine.running import GQA, PLAIN, Outcome, ask, engine_of
from tests.model.configs import build


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(GQA)


def test_more_prompts_than_may_wait_are_all_completed(model: Transformer) -> None:
    """Twenty prompts go through a queue of two, and each gets what it gets alone."""
    prompts = [[5, place] for place in range(20)]
    with engine_of(model, PLAIN, queue=2, max_running=1) as engine:
        together = engine.generate(prompts, max_tokens=3, temperature=0.0)
        assert [one.token_ids for one in together] == [
            engine.generate([prompt], max_tokens=3, temperature=0.0)[0].token_ids for prompt in prompts
        ]


def test_when_it_fails_nothing_is_left_behind(model: Transformer) -> None:
    """Once `complete` has raised, the engine is idle: those before the refused request have been let go."""
    with engine_of(model, PLAIN) as engine:
        with pytest.raises(UserError, match="no tokens"):
            complete(engine, [*(ask([5], 400) for _ in range(8)), ask([])])
        levels = engine.statistics()
        assert (levels.running, levels.waiting, levels.cache_blocks_used) == (0, 0, 0)


def test_an_interrupted_wait_collects_the_cancelled(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What interrupts the caller leaves no request at work."""

    class Interrupted(threading.Semaphore):
        def acquire(self, *args: object, **more: object) -> bool:
            if not interrupted.is_set():
                interrupted.set()
                raise KeyboardInterrupt
            return super().acquire()

    interrupted = threading.Event()
    with engine_of(model, PLAIN) as engine:
        monkeypatch.setattr("fathom.engine.complete.threading.Semaphore", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            complete(engine, [ask([5], 400) for _ in range(4)])
        assert engine.statistics().running == 0


def test_samples_of_a_seed_differ_as_those_of_the_service_do(model: Transformer) -> None:
    """The i-th completion has the seed plus i."""
    with engine_of(model, PLAIN) as engine:
        together = engine.generate([[5]] * 4, max_tokens=8, seed=7)
        alone = [engine.generate([[5]], max_tokens=8, seed=7 + place)[0] for place in range(4)]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert len({tuple(one.token_ids) for one in together}) > 1


def test_the_best_is_what_the_rule_scores_highest(model: Transformer) -> None:
    """Of `best_of` samples for each prompt the rule's favourite is given; a rule alone is refused."""
    with engine_of(model, PLAIN) as engine:
        drawn = engine.generate([[5]] * 6, max_tokens=6, seed=1)
        asked: list[str] = []
        best = engine.generate(
            [[5]] * 2, max_tokens=6, seed=1, best_of=3, check=lambda text: asked.append(text) or len(text)
        )
        assert asked == [one.text for one in drawn]
        groups = (drawn[:3], drawn[3:])
        assert [one.text for one in best] == [max((one.text for one in group), key=len) for group in groups]
        for given in ({"check": len}, {"best_of": 0}):
            with pytest.raises(UserError, match="best_of"):
                engine.generate([[5]], **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompts": [[1.5, 2]]}, "whole numbers"),
        ({"prompts": [["a"]]}, "whole numbers"),
        ({"prompts": [None]}, "whole numbers"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number, not 1.5"),
        ({"max_tokens": "5"}, "max_tokens must be a whole number, not '5'"),
        ({"thinking_budget": -1}, "thinking_budget"),
    ],
)
def test_wrong_types_are_the_caller_s_alone(model: Transformer, given: dict, said: str) -> None:
    """What is no whole number is a sentence to whoever gave it; a request beside it is answered."""
    with engine_of(model) as engine:
        other = Outcome()
        engine.submit(ask([5], 60), other.take)
        with pytest.raises(UserError, match=said):
            engine.generate(**{"prompts": [[1]], **given})
        assert other.wait().last.finish_reason == "length"


def test_a_single_stop_string_is_one(model: Transformer) -> None:
    """`stop="xyz"` is the text, not its letters."""
    with engine_of(model, PLAIN) as engine:
        seen: list[Request] = []
        submit = engine.submit
        engine.submit = lambda request, deliver: seen.append(request) or submit(request, deliver)  # type: ignore
        engine.generate([[5]], max_tokens=2, stop="xyz")
    assert seen[0].stop == ("xyz",)


@pytest.mark.parametrize("how", ["leave", "interrupt"])
def test_a_program_may_end_while_its_engine_works(how: str) -> None:
    """Neither its last line nor Ctrl-C in `generate` ends a process by a signal of its own making."""
    command = [sys.executable, "-m", "tests.engine.run_and_leave", how]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert "terminate called" not in ended.stderr
    assert (ended.returncode == 0) == (how == "leave"), ended
    assert "KeyboardInterrupt" in ended.stderr or how == "leave"
