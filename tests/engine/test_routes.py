"""The record of which experts computed which token, against the router's choice in one plain pass."""

import pytest
import torch
from torch import Tensor

from fathom.engine.engine import Engine, EngineSettings
from fathom.engine.protocol import Request, Sampling
from fathom.errors import UserError
from fathom.model.paged import PagedCache
from fathom.model.transformer import Transformer
from tests.engine.running import CONFIGS, GREEDY, MLA, PLAIN, Outcome, alone, ask, at_once, engine_of, run, submit
from tests.engine.test_speculation import cyclic
from tests.model.configs import build, tokens

DEEP = MLA.replace(num_hidden_layers=4)
SAMPLED = Sampling(seed=3)


def chosen(model: Transformer, request: Request, outcome: Outcome) -> Tensor:
    """The router's choice for every token but the last, sorted: [tokens - 1, mixture-of-experts layers, K]."""
    ids = torch.tensor([request.prompt_ids + outcome.ids])[:, :-1]
    with torch.no_grad():
        reports = model.hidden_states(ids)[1]
    return torch.stack([report.expert_ids for report in reports], dim=1).sort(-1).values


def assert_recorded(model: Transformer, requests: list[Request], outcomes: list[Outcome]) -> None:
    """Every request has the routes of its text, with its last chunk alone."""
    for request, outcome in zip(requests, outcomes, strict=True):
        routes = outcome.last.routes
        assert routes is not None
        assert all(chunk.routes is None for chunk in outcome.chunks[:-1])
        assert (routes.dtype, routes.is_inference()) == (torch.int16, False)
        mixtures = DEEP.num_hidden_layers - DEEP.first_k_dense_replace
        assert routes.shape == (len(request.prompt_ids) + len(outcome.ids) - 1, mixtures, DEEP.num_experts_per_tok)
        assert torch.equal(routes.long().sort(-1).values, chosen(model, request, outcome))


def memory(pages: int) -> int:
    """For so many pages with routes, in float32."""
    return PagedCache(DEEP, pages=pages, dtype=torch.float32, mtp_layers=1, routes=True).nbytes()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(DEEP)


def prompts(*lengths: int) -> list[list[int]]:
    return [tokens(DEEP, length, seed=length).tolist() for length in lengths]


def test_routes_are_those_of_one_pass(model: Transformer) -> None:
    """Of prompts of all lengths and their answers, in company, whatever ends them; and the same tokens come out."""
    requests = [ask(ids, 30, SAMPLED) for ids in prompts(1, 2, 63, 64, 65, 130, 256, 257, 300)]
    requests += [ask([7], 1), ask([7], 40, SAMPLED, stop=("e",)), ask([7], 5, GREEDY.replace(logit_bias={256: 1e4}))]
    requests.append(ask([7], 5, GREEDY.replace(logit_bias={256: 1e4}), ignore_eos=False))
    with engine_of(model, PLAIN, record_routes=True) as engine:
        outcomes = run(engine, requests)
    assert_recorded(model, requests, outcomes)
    with engine_of(model, PLAIN) as engine:
        plain = run(engine, requests)
    assert [outcome.ids for outcome in outcomes] == [outcome.ids for outcome in plain]
    assert all(outcome.last.routes is None for outcome in plain)


def test_routes_of_remembered_blocks(model: Transformer) -> None:
    """A request that finds blocks of a prompt and of an answer in the cache has the routes of their tokens."""
    (ids,) = prompts(150)
    with engine_of(model, record_routes=True) as engine:
        first = run(engine, [ask(ids, 100, SAMPLED)])[0]
        requests = [ask(ids, 10, SAMPLED), ask(ids + first.ids, 10, SAMPLED), ask(ids[:70] + ids[:3], 10, SAMPLED)]
        outcomes = alone(engine, requests)
    assert [outcome.last.usage.cached for outcome in outcomes] == [128, 192, 64]
    assert_recorded(model, requests, outcomes)


@pytest.mark.parametrize("length", [10, 70, 300])
def test_routes_of_a_group(length: int, model: Transformer) -> None:
    """Samples that begin with a copy of what another has read have the routes of the prompt, and each its own."""
    (ids,) = prompts(length)
    requests = [ask(ids, 20, Sampling(seed=seed)) for seed in range(5)]
    with engine_of(model, record_routes=True) as engine:
        outcomes = at_once(engine, requests)
    assert outcomes[-1].last.usage.cached == length - 1
    assert_recorded(model, requests, outcomes)


def test_routes_after_memory_ran_short(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that gave their pages back and were computed again have the routes of their text."""
    requests = [ask(ids, 130, SAMPLED) for ids in prompts(20, 21, 22, 23)]
    started = []
    start = Engine._start

    def note(self: Engine, *args: object) -> bool:
        started.append(start(self, *args))  # type: ignore[arg-type]
        return started[-1]

    monkeypatch.setattr(Engine, "_start", note)
    with engine_of(model, record_routes=True, cache_memory=memory(6)) as engine:
        outcomes = run(engine, requests)
    assert sum(started) > len(requests), "memory was enough: the test tests nothing"
    assert_recorded(model, requests, outcomes)


def test_routes_of_confirmed_and_rejected_drafts() -> None:
    """With speculation, where most drafts are right and some are wrong, routes are those of the final text."""
    model = cyclic(build(DEEP))
    requests = [ask([start], 40 + start) for start in range(6)]
    with engine_of(model, record_routes=True) as engine:
        outcomes = run(engine, requests)
        counted = engine.statistics()
    assert 0.3 < counted.accepted_tokens / counted.drafted_tokens < 1
    assert_recorded(model, requests, outcomes)


@pytest.mark.usefixtures("kernels")
def test_replayed_in_training_they_are_the_engine_s_choice(model: Transformer) -> None:
    """The record of an engine in bfloat16 makes the trainer's pass in float32 take the engine's experts."""
    fast = build(DEEP)
    fast.compute_dtype = torch.bfloat16
    (ids,) = prompts(300)
    request = ask(ids, 100, SAMPLED)
    with engine_of(fast, record_routes=True) as engine:
        outcome = run(engine, [request])[0]
    routes = outcome.last.routes
    assert routes is not None
    assert not torch.equal(routes.long().sort(-1).values, chosen(model, request, outcome)), "no choice differs"
    text = torch.tensor([ids + outcome.ids])[:, :-1]
    hidden, reports = model.hidden_states(text, routes=routes.permute(1, 0, 2).long())
    assert torch.equal(torch.stack([report.expert_ids for report in reports], dim=1), routes.long())
    hidden.sum().backward()


def test_who_did_not_end_has_no_routes(model: Transformer) -> None:
    """A cancelled request has none."""
    with engine_of(model, record_routes=True) as engine:
        outcome = submit(engine, ask([1], 400))
        assert outcome.ticket is not None
        outcome.ticket.cancel()
        assert outcome.wait().last.routes is None


def test_a_model_without_experts_is_refused() -> None:
    """Routes of a dense model are a sentence."""
    with pytest.raises(UserError, match="record_routes: this model has no experts"):
        Engine(build(CONFIGS["gqa"]), PLAIN, EngineSettings(cache_memory=2**22, record_routes=True))
