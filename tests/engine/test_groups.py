"""Requests with one prompt that come together: read once, and answered as if each had come alone."""

import pytest
import torch

from fathom.engine.engine import Engine
from fathom.engine.protocol import Request, Sampling
from fathom.model.transformer import Transformer
from tests.engine.running import CONFIGS, Outcome, alone, ask, at_once, engine_of, memory_for, run
from tests.model.configs import build, tokens

pytestmark = pytest.mark.usefixtures("kernels")
every_kind = pytest.mark.parametrize("name", CONFIGS)
SIZE = 8


def group(length: int, max_tokens: int = 30, *, seed: int = 0, **more: object) -> list[Request]:
    """Samples of one prompt, every other one greedy."""
    prompt = tokens(CONFIGS["gqa"], length, seed=seed).tolist()
    return [
        ask(prompt, max_tokens, Sampling(temperature=sample % 2, seed=sample), logprobs=2, **more)
        for sample in range(SIZE)
    ]


def answers(outcomes: list[Outcome]) -> list[tuple]:
    return [(outcome.ids, outcome.logprobs) for outcome in outcomes]


def solo(model: Transformer, requests: list[Request]) -> list[tuple]:
    """Answers that owe nothing to one another."""
    found = []
    for request in requests:
        with engine_of(model) as engine:
            found += answers(alone(engine, [request]))
    return found


def read_by(engine: Engine) -> int:
    """Tokens of prompts that were computed, without the one of `at_once`."""
    return engine.statistics().read_tokens - 1


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("length", [1, 2, 10, 64, 65, 70, 257, 300, 384])
def test_a_group_reads_its_prompt_once(name: str, dtype: torch.dtype, length: int) -> None:
    """All tokens of a prompt are computed once and its last by everybody; answers are, to the bit, those of requests
    that come alone; usage and statistics say what was spared."""
    model = build(CONFIGS[name])
    model.compute_dtype = dtype
    requests = group(length, 20)
    with engine_of(model) as engine:
        outcomes = at_once(engine, requests)
        counted = engine.statistics()
        read = read_by(engine)
    assert read == length + SIZE - 1
    assert [outcome.last.usage.cached for outcome in outcomes] == [0] + [length - 1] * (SIZE - 1)
    assert counted.cached_tokens == (length - 1) * (SIZE - 1)
    assert answers(outcomes) == solo(model, requests)


@every_kind
@pytest.mark.parametrize("length", [10, 70, 300])
def test_a_reader_that_ends_at_once_has_read_for_all(name: str, length: int) -> None:
    """A prompt is read once even if nobody writes more than one token after it."""
    model, requests = build(CONFIGS[name]), group(length, 1)
    with engine_of(model) as engine:
        outcomes = at_once(engine, requests)
        assert read_by(engine) == length + SIZE - 1
    assert answers(outcomes) == solo(model, requests)


@every_kind
def test_groups_mix(name: str) -> None:
    """Samples of several prompts that take turns in the queue, beside prompts that only begin alike, are answered as
    alone, every prompt read once."""
    model = build(CONFIGS[name])
    lengths = (10, 70, 130)
    groups = [group(length, seed=seed) for seed, length in enumerate(lengths)]
    mixed = [request for turn in zip(*groups, strict=True) for request in turn]
    longer = [ask([*groups[1][0].prompt_ids, extra], 10, logprobs=2) for extra in range(3)]
    with engine_of(model) as engine:
        outcomes = at_once(engine, [*mixed, *longer])
        assert read_by(engine) <= sum(lengths) + 3 * (SIZE - 1) + 3 * 71
    assert answers(outcomes) == solo(model, [*mixed, *longer])


def test_unlike_salts_read_apart() -> None:
    """Nothing is shared between users, however alike their prompts are."""
    requests = [request for salt in "ab" for request in group(70, 5, cache_salt=salt)]
    with engine_of(build(CONFIGS["gqa"])) as engine:
        outcomes = at_once(engine, requests)
        assert read_by(engine) == 2 * (70 + SIZE - 1)
    assert [outcome.last.usage.cached for outcome in outcomes] == ([0] + [69] * (SIZE - 1)) * 2


def _during_reading(engine: Engine, outcomes: list[Outcome], act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, when the first request has read some of its prompt but not all: cancel it, or fail."""
    plan, done = engine._plan, []

    def interfere() -> object:
        readers = [s for s in engine._running if 0 < s.computed < s.prompt_length - 1]
        if readers and not done:
            done.append(readers[0])
            if act == "cancel":
                readers[0].cancelled = True
                engine._take_in()
            else:
                monkeypatch.setattr(engine._stepper._model, "hidden_states", None)
        elif act == "fail" and done:
            monkeypatch.undo()
        return plan()

    monkeypatch.setattr(engine, "_plan", interfere)
    outcomes += at_once(engine, group(70))
    assert done, "the first had read all before it could be stopped: the test tests nothing"


@every_kind
@pytest.mark.parametrize(("act", "ended"), [("cancel", "cancelled"), ("fail", "error")])
def test_a_reader_that_does_not_finish_strands_nobody(
    name: str, act: str, ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the first is cancelled or fails while it reads, the next reads, and all others are answered as alone."""
    model, outcomes = build(CONFIGS[name]), []
    with engine_of(model, prefill_tokens=16) as engine, monkeypatch.context() as patch:
        _during_reading(engine, outcomes, act, patch)
        assert engine.statistics().read_tokens < 2 * 70 + SIZE
    assert [outcome.last.finish_reason for outcome in outcomes] == [ended] + ["length"] * (SIZE - 1)
    assert answers(outcomes[1:]) == solo(model, group(70)[1:])


@every_kind
@pytest.mark.parametrize("length", [10, 70, 150])
@pytest.mark.parametrize("bound", ["pages", "max_running"])
def test_little_room_changes_nothing(name: str, length: int, bound: str) -> None:
    """Groups of whom only some can run at once, and give their pages back while they write, are answered as alone."""
    model, requests = build(CONFIGS[name]), group(length, 90)
    pages = {"cache_memory": memory_for(CONFIGS[name], 7, mtp_layers=int(name == "mla"))}
    with engine_of(model, **(pages if bound == "pages" else {"max_running": 2})) as engine:
        outcomes = at_once(engine, requests)
    assert answers(outcomes) == solo(model, requests)


def test_nobody_waits_for_the_prompt_of_others() -> None:
    """A request behind a group whose prompt takes several steps to read starts before it has been read."""
    steps = []
    with engine_of(build(CONFIGS["gqa"]), prefill_tokens=32) as engine:
        plan = engine._plan

        def note() -> list:
            work = plan()
            steps.append({(item.sequence.request.max_tokens, item.stop) for item in work})
            return work

        engine._plan = note  # type: ignore[method-assign]
        at_once(engine, [*group(300, 3), ask([5], 2)])
    assert next(n for n, step in enumerate(steps) if (2, 1) in step) < next(
        n for n, step in enumerate(steps) if (3, 300) in step
    )


def test_a_prompt_that_was_read_before_is_not_waited_for() -> None:
    """Behind remembered blocks a group begins where they end, and reads the rest once."""
    with engine_of(build(CONFIGS["mla"])) as engine:
        run(engine, group(130, 3)[:1])
        before = engine.statistics().read_tokens
        outcomes = at_once(engine, group(130, 3))
        assert engine.statistics().read_tokens - before - 1 == 2 + SIZE - 1
    assert [outcome.last.usage.cached for outcome in outcomes] == [128] + [129] * (SIZE - 1)
