"""The engine against plain generation, and against itself in other company, with little memory, and ill-treated."""

import json
import random
import threading
import time

import pytest
import torch

from fathom.engine.engine import Engine, EngineSettings
from fathom.engine.generate import generate_ids
from fathom.engine.protocol import Chunk, Constraint, QueueFull, Request, Sampling, Thinking
from fathom.errors import UserError
from fathom.kernels import ops
from fathom.kernels.ops import PAGE
from fathom.model.accounting import kv_bytes_per_token
from fathom.model.transformer import Transformer
from tests.engine.running import (
    CLOSE,
    CONFIGS,
    CONTEXT,
    GQA,
    MLA,
    OPEN,
    PLAIN,
    Outcome,
    alone,
    ask,
    assert_idle,
    engine_of,
    memory_for,
    run,
    submit,
)
from tests.model.configs import build

every_kind = pytest.mark.parametrize("name", CONFIGS)
SAMPLED = Sampling(temperature=1.0, top_p=0.95, seed=11)


@pytest.fixture(scope="module")
def models() -> dict[str, Transformer]:
    return {name: build(config) for name, config in CONFIGS.items()}


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


PROMPTS = [prompt(length) for length in (1, 2, 30, 63, 64, 65, 128, 129, 200, 256, 257, 300)]


@every_kind
@pytest.mark.parametrize("has_kernels", [True, False], ids=["kernels", "torch"])
def test_greedy_text_is_that_of_plain_generation(
    name: str, has_kernels: bool, models: dict[str, Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of lengths around pages and chunks, all at once, get the tokens of `generate_ids`, kernels or not."""
    if not has_kernels:
        monkeypatch.setattr(ops, "library", lambda: None)
    with engine_of(models[name]) as engine:
        outcomes = run(engine, [ask(ids, 8) for ids in PROMPTS])
    for ids, outcome in zip(PROMPTS, outcomes, strict=True):
        sampling = Sampling(temperature=0.0)
        assert outcome.ids == list(generate_ids(models[name], ids, max_tokens=8, sampling=sampling)), len(ids)
        assert outcome.last.finish_reason == "length"
        assert outcome.last.usage.prompt == len(ids)
        assert outcome.last.usage.completion == 8


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.usefixtures("kernels")
def test_a_text_is_the_same_in_any_company(name: str, dtype: torch.dtype) -> None:
    """Greedy and sampled texts with their log-probabilities are, to the bit, the same alone, beside eleven others that
    come while some are being written, with memory for less than all of them, and behind remembered blocks."""
    model = build(CONFIGS[name])
    model.compute_dtype = dtype
    requests = [
        ask(ids, 40, Sampling(temperature=index % 2, seed=index), logprobs=2) for index, ids in enumerate(PROMPTS)
    ]
    with engine_of(model, speculate=False, queue=64) as engine:
        solo = alone(engine, requests)
    expected = [(o.ids, o.logprobs) for o in solo]
    small = memory_for(CONFIGS[name], 9) // (4 // dtype.itemsize)  # the longest fits, and not much beside it
    with engine_of(model, speculate=False, cache_memory=small, queue=64) as engine:
        first = [submit(engine, request) for request in requests[:6]]
        first[0].wait()
        later = [submit(engine, request) for request in requests[6:]]
        together = [outcome.wait() for outcome in (*first, *later)]
    with engine_of(model, speculate=False, queue=64) as engine:
        run(engine, [ask(r.prompt_ids, 1) for r in requests])
        again = run(engine, requests)
        cached = engine.statistics().cached_tokens
    assert [(o.ids, o.logprobs) for o in together] == expected
    assert [(o.ids, o.logprobs) for o in again] == expected
    assert cached > 0


@pytest.mark.usefixtures("kernels")
def test_giving_memory_back_changes_nothing(models: dict[str, Transformer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that had to give their pages back while they wrote end with the same seeded texts."""
    requests = [ask(prompt(20, seed), 130, Sampling(seed=seed, presence_penalty=0.5)) for seed in range(4)]
    with engine_of(models["gqa"]) as engine:
        expected = [outcome.ids for outcome in alone(engine, requests)]
    released = []
    take_back = Engine._provide

    def provide(self: Engine, *args: object) -> bool:
        before = len(self._running)
        result = take_back(self, *args)  # type: ignore[arg-type]
        released.extend([None] * (before - len(self._running)))
        return result

    monkeypatch.setattr(Engine, "_provide", provide)
    with engine_of(models["gqa"], cache_memory=memory_for(GQA, 6)) as engine:
        outcomes = run(engine, requests)
    assert released, "memory was enough: the test tests nothing"
    assert [outcome.ids for outcome in outcomes] == expected
    assert all(outcome.last.usage.completion == 130 for outcome in outcomes)


def test_counts_of_a_request_that_gave_its_memory_back(models: dict[str, Transformer]) -> None:
    """Each request's prompt is counted once, and only what another left behind counts as found in the cache."""
    # The second has read a block when the first needs its page.
    requests = [ask(prompt(10), 100), ask(prompt(250), 5)]
    with engine_of(models["gqa"], cache_memory=memory_for(GQA, 5), prefill_tokens=2) as engine:
        outcomes = run(engine, requests)
        counted = engine.statistics()
    assert (counted.prompt_tokens, counted.completion_tokens, counted.cached_tokens) == (260, 105, 0)
    assert {outcome.last.usage.cached for outcome in outcomes} == {0}


def test_seeds_decide(models: dict[str, Transformer]) -> None:
    """Requests with equal seeds get equal texts in one batch, unequal seeds and none get others."""
    ids = prompt(10)
    with engine_of(models["gqa"]) as engine:
        same = run(engine, [ask(ids, 20, SAMPLED)] * 4)
        others = run(engine, [ask(ids, 20, Sampling(seed=seed)) for seed in (1, 2, None, None)])
    assert len({tuple(outcome.ids) for outcome in same}) == 1
    assert len({tuple(outcome.ids) for outcome in others}) == 4


def test_usage_adds_up(models: dict[str, Transformer]) -> None:
    """What was found in the cache is whole blocks, one token at least is computed, and salts keep users apart."""
    with engine_of(models["mla"]) as engine:
        for length in (63, 64, 65, 128, 129, 300):
            ids = prompt(length)
            first, second, salted = alone(engine, [ask(ids, 2), ask(ids, 2), ask(ids, 2, cache_salt=str(length))])
            assert first.last.usage.cached == salted.last.usage.cached == 0
            assert second.last.usage.cached == (length - 1) // PAGE * PAGE
            assert first.ids == second.ids == salted.ids
            assert second.last.usage.prompt == length
        shared = prompt(200)[:150] + prompt(60)
        alone(engine, [ask(prompt(200), 2)])
        (outcome,) = alone(engine, [ask(shared, 2)])
        assert outcome.last.usage.cached == 128


@every_kind
def test_cancelling_at_any_step_frees_all(name: str, models: dict[str, Transformer]) -> None:
    """Requests cancelled while waiting, reading and after each token end as `cancelled` and hold no page; the others
    get their texts."""
    draw = random.Random(0)
    with engine_of(models[name], cache_memory=memory_for(CONFIGS[name], 12, mtp_layers=1), prefill_tokens=64) as engine:
        (expected,) = alone(engine, [ask(prompt(70), 30)])
        for _ in range(4):
            outcomes = []
            for seed in range(8):
                outcome, stop_after = Outcome(), draw.randrange(6)

                def deliver(chunk: Chunk, outcome: Outcome = outcome, stop_after: int = stop_after) -> None:
                    outcome.take(chunk)
                    if len(outcome.ids) >= stop_after and outcome.ticket is not None:
                        outcome.ticket.cancel()

                outcome.ticket = engine.submit(ask(prompt(20 + 37 * seed, seed), 40), deliver)
                if draw.random() < 0.3:
                    outcome.ticket.cancel()
                    outcome.ticket.cancel()
                outcomes.append(outcome)
            kept = submit(engine, ask(prompt(70), 30))
            for outcome in outcomes:
                assert outcome.wait().last.finish_reason in ("cancelled", "length")
                assert sum(chunk.finish_reason is not None for chunk in outcome.chunks) == 1
            assert kept.wait().ids == expected.ids
            assert_idle(engine)


def test_the_queue_is_bounded(models: dict[str, Transformer]) -> None:
    """More than may wait is refused at once, and those who wait are served."""
    with engine_of(models["gqa"], max_running=1, queue=3) as engine:
        accepted, refused, writing = [], 0, threading.Event()
        first = Outcome()

        def deliver(chunk: Chunk) -> None:
            writing.set()
            first.take(chunk)

        first.ticket = engine.submit(ask(prompt(5), 400), deliver)
        assert writing.wait(60)
        for seed in range(8):
            try:
                accepted.append(submit(engine, ask(prompt(5, seed), 2)))
            except QueueFull:
                refused += 1
        assert (len(accepted), refused) == (3, 5)
        first.ticket.cancel()
        assert all(outcome.wait().last.finish_reason == "length" for outcome in accepted)


def test_a_listener_that_fails_is_let_go(models: dict[str, Transformer]) -> None:
    """An error in `deliver` ends that request alone."""
    calls = []

    def fail(chunk: Chunk) -> None:
        calls.append(chunk)
        raise RuntimeError("gone")

    with engine_of(models["gqa"]) as engine:
        engine.submit(ask(prompt(5), 400), fail)
        (outcome,) = run(engine, [ask(prompt(6), 20)])
        assert outcome.last.finish_reason == "length"
        assert_idle(engine)
    assert sum(chunk.finish_reason is not None for chunk in calls) == 1
    assert len(calls) < 10


@pytest.mark.parametrize("place", ["hidden_states", "logits", "mtp_hidden_states"])
def test_a_step_that_fails_ends_those_it_hits(
    place: str, models: dict[str, Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error inside a step is an `error` for those in it, and nobody's page is lost; later requests are served."""
    with engine_of(models["mla"]) as engine:
        model = engine._stepper._model
        original, calls = getattr(model, place), []

        def fail(*args: object, **kwargs: object) -> object:
            calls.append(None)
            while len(calls) == 1 and engine._unfinished < 3:
                time.sleep(0.001)  # all three are to be in the step that fails
            if len(calls) == 3:
                raise RuntimeError("secret detail")
            return original(*args, **kwargs)

        monkeypatch.setattr(model, place, fail)
        outcomes = run(engine, [ask(prompt(70, seed), 20) for seed in range(3)])
        assert {outcome.last.finish_reason for outcome in outcomes} == {"error"}
        assert all("secret" not in outcome.last.message and outcome.last.message for outcome in outcomes)
        assert_idle(engine)
        (after,) = run(engine, [ask(prompt(70), 5)])
        assert after.last.finish_reason == "length"


def test_an_engine_that_fails_between_steps_serves_on(
    models: dict[str, Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error outside a step ends all requests with `error`, none waits for ever, and later ones are served."""
    with engine_of(models["gqa"]) as engine:
        original, calls = engine._plan, []

        def fail() -> object:
            calls.append(None)
            if len(calls) == 3:
                raise RuntimeError("secret detail")
            return original()

        monkeypatch.setattr(engine, "_plan", fail)
        outcomes = run(engine, [ask(prompt(70, seed), 20) for seed in range(3)])
        assert {outcome.last.finish_reason for outcome in outcomes} <= {"error", "length"}
        assert any(outcome.last.finish_reason == "error" for outcome in outcomes)
        assert all("secret" not in outcome.last.message for outcome in outcomes)
        assert_idle(engine)
        (after,) = run(engine, [ask(prompt(70), 5)])
        assert after.last.finish_reason == "length"


def test_closing_lets_the_running_finish(models: dict[str, Transformer]) -> None:
    """With time to drain, what runs and waits ends as it would have; nothing new is taken in."""
    engine = Engine(models["gqa"], PLAIN, EngineSettings(cache_memory=2**22, max_running=2))
    outcomes = [submit(engine, ask(prompt(5, seed), 20)) for seed in range(5)]
    engine.close(drain_seconds=60)
    assert [outcome.last.finish_reason for outcome in outcomes] == ["length"] * 5
    with pytest.raises(QueueFull, match="shutting down"):
        submit(engine, ask(prompt(5)))
    engine.close()


def test_closing_at_once_tells_everybody(models: dict[str, Transformer]) -> None:
    """Without time to drain, whoever runs or waits is told `cancelled` before `close` returns, and pages are free."""
    engine = Engine(models["gqa"], PLAIN, EngineSettings(cache_memory=2**22, max_running=2))
    outcomes = [submit(engine, ask(prompt(5, seed), 500)) for seed in range(5)]
    while not outcomes[0].chunks:
        threading.Event().wait(0.01)
    engine.close()
    assert all(outcome.ended.is_set() for outcome in outcomes)
    assert {outcome.last.finish_reason for outcome in outcomes} == {"cancelled"}
    assert engine.statistics().cache_blocks_used == 0


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (ask([]), "no tokens"),
        (ask([1, 259]), "no token 259"),
        (ask([-1]), "no token -1"),
        (ask([1] * CONTEXT), "shorten it"),
        (ask([1], 0), "max_tokens"),
        (ask([1], -5), "max_tokens"),
        (ask([1.0]), "whole numbers"),  # type: ignore[list-item]
        (ask([1], 2.5), "max_tokens"),  # type: ignore[arg-type]
        (ask([1], logprobs=-3), "logprobs"),
        (ask([1], sampling=Sampling(logit_bias={259: 1.0})), "logit_bias"),
        (ask([1], stop=("",)), "stop"),
        (ask([1], thinking=Thinking(budget=1, minimum=2)), "minimum"),
        (ask([1], constraint=Constraint(kind="json_schema", text="{")), "JSON schema"),
    ],
)
def test_what_cannot_be_served_is_refused(request_: Request, said: str, models: dict[str, Transformer]) -> None:
    """A request that makes no sense is a sentence at once, and leaves nothing behind in the engine."""
    with engine_of(models["gqa"]) as engine:
        with pytest.raises(UserError, match=said):
            submit(engine, request_)
        assert engine._unfinished == 0
        assert run(engine, [ask([1], 3)])[0].last.usage.completion == 3


def test_a_grammar_that_gives_up_is_the_request_s_fault(models: dict[str, Transformer]) -> None:
    """An answer that can go no further ends with its grammar's sentence; the engine's own failures say otherwise."""
    pytest.importorskip("llguidance")
    stuck = Constraint(kind="grammar", text='start: "a" B\nB: /[^\\s\\S]/\n')
    with engine_of(models["gqa"]) as engine:
        last = run(engine, [ask([1], constraint=stuck)])[0].last
        assert (last.finish_reason, last.fault) == ("error", "request")
        assert last.message == "constraint: the answer cannot go on (no text fits it); simplify the grammar"
        engine._stepper = None  # type: ignore[assignment]
        assert run(engine, [ask([1])])[0].last.fault == "engine"


def test_bounds_on_thoughts_need_tags(models: dict[str, Transformer]) -> None:
    """A model without think tags refuses bounds on thoughts."""
    with engine_of(models["gqa"], PLAIN) as engine, pytest.raises(UserError, match="think tags"):
        submit(engine, ask([1], thinking=Thinking(budget=1)))


@pytest.mark.parametrize(
    "settings",
    [{"prefill_tokens": 0}, {"max_running": 0}, {"queue": 0}, {"context": 1}, {"context": -1}, {"prefill_tokens": -7}],
)
def test_settings_that_serve_nobody_are_refused(settings: dict[str, int]) -> None:
    """Bounds of nothing or less are a sentence, not an engine that dies on its first request."""
    with pytest.raises(UserError):
        EngineSettings.parse(settings, where="serve")


def test_memory_and_context_that_do_not_fit_are_refused(models: dict[str, Transformer]) -> None:
    """A cache of less than two pages and a context beyond the model's are a sentence."""
    with pytest.raises(UserError, match="cache_memory"):
        Engine(models["gqa"], PLAIN, EngineSettings(cache_memory=memory_for(GQA, 2) - 1))
    with pytest.raises(UserError, match="context"):
        Engine(models["gqa"], PLAIN, EngineSettings(context=CONTEXT + 1))


def test_texts_end_where_context_or_memory_end(models: dict[str, Transformer]) -> None:
    """An output is cut where the context is full, and where the whole cache is; longer prompts than it are refused."""
    with engine_of(models["gqa"]) as engine:
        (outcome,) = run(engine, [ask(prompt(CONTEXT - 3), 10)])
        assert len(outcome.ids) == 3
        assert outcome.last.finish_reason == "length"
    with engine_of(models["gqa"], cache_memory=memory_for(GQA, 2)) as engine:
        outcomes = run(engine, [ask(prompt(127), 10), ask(prompt(100), 100), ask(prompt(1), 200)])
        assert [len(outcome.ids) for outcome in outcomes] == [1, 28, 127]
        with pytest.raises(UserError, match="cache holds 128"):
            submit(engine, ask(prompt(128), 10))


def test_surrogates_in_a_salt_harm_nobody(models: dict[str, Transformer]) -> None:
    """A salt that is no valid Unicode is a salt like others."""
    with engine_of(models["gqa"]) as engine:
        outcomes = alone(engine, [ask(prompt(70), 2, cache_salt="\ud800")] * 2)
        assert [outcome.last.usage.cached for outcome in outcomes] == [0, 64]


def test_logprobs_are_those_of_the_model(models: dict[str, Transformer]) -> None:
    """With every token come its log-probability and the likeliest ones of a plain pass, in order; they sum to 1; a
    greedy token is the first of them."""
    ids = prompt(30)
    requests = [ask(ids, 12, logprobs=259), ask(ids, 12, Sampling(seed=1), logprobs=3), ask(ids, 12, logprobs=0)]
    with engine_of(models["gqa"]) as engine:
        greedy, drawn, bare = run(engine, [*requests])
        (none,) = run(engine, [ask(ids, 12)])
    for outcome in (greedy, drawn):
        with torch.no_grad():
            logits = models["gqa"](torch.tensor([ids + outcome.ids]))[0, 29:-1]
        exact = logits.log_softmax(-1)
        for found, token, row in zip(outcome.logprobs, outcome.ids, exact, strict=True):
            assert found.token_id == token
            assert found.logprob == pytest.approx(row[token].item(), abs=1e-3)
            values = [value for _, value in found.top]
            assert values == sorted(values, reverse=True)
            assert values == pytest.approx(row.topk(len(values)).values.tolist(), abs=1e-3)
    for found in greedy.logprobs:
        assert found.top[0][0] == found.token_id
        assert torch.tensor([value for _, value in found.top]).exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert {len(found.top) for found in drawn.logprobs} == {3}
    assert bare.ids == greedy.ids
    assert all(found.top == [] for found in bare.logprobs)
    assert all(chunk.logprobs is None for chunk in none.chunks)


@every_kind
def test_a_stop_string_ends_the_text_before_it(name: str, models: dict[str, Transformer]) -> None:
    """The text ends before the stop string, wherever token borders fall, and nothing of it is shown."""
    with engine_of(models[name], PLAIN) as engine:
        (free,) = run(engine, [ask(prompt(8), 60)])
        text = free.text()
        stop = text[20:23]
        (stopped,) = run(engine, [ask(prompt(8), 60, stop=("never this", stop))])
    assert stopped.last.finish_reason == "stop"
    assert stopped.text() == text[: text.index(stop)]


def test_end_of_text_ends_it(models: dict[str, Transformer]) -> None:
    """The model's end-of-text token ends the text unless that is to be ignored, and is counted."""
    bias = Sampling(temperature=0.0, logit_bias={256: 1e4})
    with engine_of(models["gqa"], PLAIN) as engine:
        ended, ignored = run(engine, [ask([1], 5, bias, ignore_eos=False), ask([1], 5, bias)])
    assert ended.ids == [256]
    assert ended.last.finish_reason == "stop"
    assert ended.last.usage.completion == 1
    assert ignored.ids == [256] * 5
    assert ignored.last.finish_reason == "length"


@every_kind
@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_thinking_budget_is_exact(name: str, budget: int, models: dict[str, Transformer]) -> None:
    """Thoughts that may not end early take exactly the budget, the engine closes them, and the answer goes on."""
    bounds = Thinking(budget=budget, minimum=budget)
    with engine_of(models[name]) as engine:
        requests = [
            ask(prompt(9), 30, sampling, thinking=bounds, starts_thinking=True)
            for sampling in (Sampling(temperature=0), Sampling(seed=3), Sampling(seed=4, logit_bias={OPEN: -1e4}))
        ]
        for outcome in run(engine, requests):
            assert outcome.ids[budget] == CLOSE
            assert CLOSE not in outcome.ids[:budget]
            assert len(outcome.ids) == 30
        # A model that would end its thoughts, or its text, at once.
        hasty = Sampling(temperature=0, logit_bias={CLOSE: 1e4, 256: 9e3})
        minimum = Thinking(minimum=budget)
        (early,) = run(engine, [ask(prompt(9), 12, hasty, thinking=minimum, starts_thinking=True)])
        assert early.ids.index(CLOSE) == budget
        assert early.last.usage.reasoning == budget + 1


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["kind", "count"],
        "additionalProperties": False,
    }
)


@every_kind
def test_a_constraint_is_kept(name: str, models: dict[str, Transformer]) -> None:
    """Random models write what a schema allows, behind free thoughts too, and end there."""
    pytest.importorskip("llguidance")
    constraint = Constraint(kind="json_schema", text=SCHEMA)
    dense = Sampling(logit_bias=dict.fromkeys(b" \n\r\t", -30.0))
    with engine_of(models[name]) as engine:
        requests = [
            Request(prompt(5, seed), 300, dense.replace(seed=seed, temperature=seed % 2), constraint=constraint)
            for seed in range(4)
        ] + [
            Request(
                prompt(5), 300, dense.replace(seed=9), constraint=constraint, thinking=Thinking(budget=6, minimum=6),
                starts_thinking=True,
            )
        ]  # fmt: skip
        outcomes = run(engine, requests)
    for outcome in outcomes:
        assert outcome.last.finish_reason == "stop", outcome.text()
        answer = json.loads(outcome.text())
        assert set(answer) == {"kind", "count"}
        assert answer["kind"] in "ab"
        assert 0 <= answer["count"] <= 99
    assert outcomes[-1].ids[6] == CLOSE


@pytest.mark.parametrize("name", CONFIGS)
def test_a_page_has_the_accounted_size(name: str, models: dict[str, Transformer]) -> None:
    """The engine's bytes per token are the accounting's, without the prediction module where it does not speculate."""
    with engine_of(models[name], speculate=False) as engine:
        assert engine.bytes_per_token == kv_bytes_per_token(CONFIGS[name], 4)
    if name == "mla":
        with engine_of(models[name]) as engine:
            layers = MLA.num_hidden_layers
            assert engine.bytes_per_token * layers == kv_bytes_per_token(MLA, 4) * (layers + 1)


@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_a_next_turn_is_answered_alike_whether_the_last_is_remembered(
    name: str, models: dict[str, Transformer]
) -> None:
    """A prompt that continues an answer has the same log-probabilities, bitwise, with and without its blocks."""
    prompt = [(7 * i + 3) % 250 for i in range(300)]
    with engine_of(models[name]) as engine:

        def ask(ids: list[int], count: int, salt: str) -> Outcome:
            request = Request(ids, count, Sampling(temperature=0), ignore_eos=True, logprobs=1, cache_salt=salt)
            return submit(engine, request).wait()

        turn = prompt + ask(prompt, 100, "a").ids + prompt[:30]
        remembered, fresh = ask(turn, 40, "a"), ask(turn, 40, "b")
    assert remembered.last.usage.cached >= 256
    assert fresh.last.usage.cached == 0
    assert [one.logprob for one in remembered.logprobs] == [one.logprob for one in fresh.logprobs]
