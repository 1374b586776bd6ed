"""An engine that is handed new weights, against one that is made for them."""

import gc
import weakref

import pytest
import torch

from fathom.engine.engine import Engine, EngineSettings
from fathom.engine.protocol import Chunk, Request, Sampling
from fathom.errors import UserError
from fathom.kernels import ops, panels, training
from fathom.model.transformer import Transformer
from tests.engine.running import CONFIGS, PLAIN, Outcome, ask, engine_of, run, submit
from tests.model.configs import build, tokens

every_kind = pytest.mark.parametrize("name", CONFIGS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def model_of(name: str, dtype: torch.dtype, seed: int) -> Transformer:
    """Float32 weights, and activations in `dtype`."""
    model = build(CONFIGS[name], seed)
    model.compute_dtype = dtype
    return model


def requests_of(name: str) -> list[Request]:
    return [
        ask(tokens(CONFIGS[name], length).tolist(), 20, Sampling(temperature=index % 2, seed=index), logprobs=2)
        for index, length in enumerate((1, 70, 130, 300))
    ]


def answers(outcomes: list[Outcome]) -> list[tuple]:
    return [(outcome.ids, outcome.logprobs) for outcome in outcomes]


@every_kind
@dtypes
@pytest.mark.usefixtures("kernels")
def test_new_weights_answer_as_a_new_engine(name: str, dtype: torch.dtype) -> None:
    """Tokens and log-probabilities after new weights are those of a new engine to the bit, prompts that the old ones
    had read included, and again after the first weights have come back."""
    first, second = model_of(name, dtype, 0), model_of(name, dtype, 1)
    requests = requests_of(name)
    with engine_of(first) as engine:
        old = run(engine, requests)
        engine.load_weights(second)
        new = run(engine, requests)
        engine.load_weights(first)
        back = run(engine, requests)
    with engine_of(second) as engine:
        expected = run(engine, requests)
    assert {outcome.last.usage.cached for outcome in new} == {0}
    assert answers(new) == answers(expected)
    assert answers(back) == answers(old) != answers(new)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.filterwarnings("ignore:int8")
@pytest.mark.usefixtures("kernels")
def test_new_weights_are_rounded_alike(weights: str) -> None:
    """An engine that rounds its weights rounds those that it is handed."""
    requests = requests_of("gqa")
    with engine_of(model_of("gqa", torch.bfloat16, 0), weights=weights) as engine:
        engine.load_weights(model_of("gqa", torch.bfloat16, 1))
        got = run(engine, requests)
    with engine_of(model_of("gqa", torch.bfloat16, 1), weights=weights) as engine:
        assert answers(got) == answers(run(engine, requests))


@every_kind
@dtypes
@pytest.mark.parametrize("has_kernels", [True, False], ids=["kernels", "torch"])
def test_a_trainer_may_move_its_weights_meanwhile(
    name: str, dtype: torch.dtype, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and biases that change in place while an engine writes, or before it does, change none of its answers."""
    if not has_kernels:
        for module in (ops, panels, training):
            monkeypatch.setattr(module, "library", lambda: None)
    request = ask(tokens(CONFIGS[name], 30).tolist(), 30, logprobs=2)
    with engine_of(model_of(name, dtype, 0)) as engine:
        expected = run(engine, [request])
    model = model_of(name, dtype, 0)
    with engine_of(model_of(name, dtype, 1)) as engine:
        engine.load_weights(model)
        outcome = Outcome()

        def deliver(chunk: Chunk) -> None:
            outcome.take(chunk)
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(float("nan"))

        engine.submit(request, deliver)
        outcome.wait()
        assert model.model.embed_tokens.weight.isnan().all()
        again = run(engine, [request])
    assert answers([outcome]) == answers(again) == answers(expected)


def test_weights_may_follow_the_last_chunk_at_once() -> None:
    """Whoever has seen the last chunks of all requests, cancelled ones too, may hand over weights without waiting."""
    models = [build(CONFIGS["gqa"], seed) for seed in range(2)]
    with engine_of(models[0]) as engine:
        for step in range(20):
            outcomes = [submit(engine, ask([1, step], 2 + step % 3)) for _ in range(3)]
            if step % 2 and outcomes[0].ticket is not None:
                outcomes[0].ticket.cancel()
            for outcome in outcomes:
                outcome.wait()
            engine.load_weights(models[step % 2])
            assert engine.statistics().running == engine.statistics().waiting == 0


def test_old_weights_are_let_go() -> None:
    """Nothing of the weights that were replaced stays in memory."""
    with engine_of(build(CONFIGS["mla"])) as engine:
        run(engine, requests_of("mla"))
        old = [weakref.ref(engine._stepper._model.model.layers[0]), weakref.ref(engine._stepper._model.lm_head)]
        engine.load_weights(build(CONFIGS["mla"], 1))
        gc.collect()
        assert [reference() for reference in old] == [None, None]


def test_weights_that_cannot_be_taken_are_refused() -> None:
    """Under way, another shape, another dtype and a closed engine are sentences, after which the old weights serve."""
    config = CONFIGS["gqa"]
    with engine_of(build(config)) as engine:
        expected = run(engine, [ask([1], 5)])[0].ids
        started = submit(engine, ask([1], 400))
        with pytest.raises(UserError, match="1 requests are unfinished"):
            engine.load_weights(build(config, 1))
        assert started.ticket is not None
        started.ticket.cancel()
        started.wait()
        with pytest.raises(UserError, match=r"another model \(in hidden_size, num_hidden_layers\)"):
            engine.load_weights(Transformer(config.replace(hidden_size=64, num_hidden_layers=3)))
        with pytest.raises(UserError, match=r"bfloat16 and the engine in torch\.float32"):
            engine.load_weights(model_of("gqa", torch.bfloat16, 1))
        assert run(engine, [ask([1], 5)])[0].ids == expected
    closed = Engine(build(config), PLAIN, EngineSettings(cache_memory=2**22))
    closed.close()
    with pytest.raises(UserError, match="closed"):
        closed.load_weights(build(config))
