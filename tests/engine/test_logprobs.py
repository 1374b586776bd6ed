"""Log-probabilities of a temperature, as a trainer compares them with its own."""

import pytest
import torch

from fathom.engine.protocol import Sampling
from fathom.kernels import ops
from tests.engine.running import CONFIGS, ask, engine_of, run
from tests.model.configs import build

PROMPT = list(range(3, 33))


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_tempered_logprobs_are_of_the_temperature_drawn_at(
    name: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What asks for them gets log_softmax(logits / T) of every token and alternative, whatever filters cut; others in
    the same batch get temperature 1 as ever; with 0 the likeliest token has all of the probability."""
    if not kernels:
        monkeypatch.setattr(ops, "library", lambda: None)
    model = build(CONFIGS[name])
    cases = [(0.7, True, 0), (1.8, True, 10), (0.7, False, 0), (1.0, True, 0)]
    requests = [
        ask(PROMPT, 12, Sampling(temperature=t, top_k=k, seed=seed), logprobs=4, tempered_logprobs=tempered)
        for seed, (t, tempered, k) in enumerate(cases)
    ]
    with engine_of(model) as engine:
        *drawn, greedy = run(engine, [*requests, ask(PROMPT, 4, logprobs=0, tempered_logprobs=True)])
    for outcome, (temperature, tempered, _) in zip(drawn, cases, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([PROMPT + outcome.ids]))[0, len(PROMPT) - 1 : -1]
        exact = (logits.double() / (temperature if tempered else 1.0)).log_softmax(-1)
        for found, token, row in zip(outcome.logprobs, outcome.ids, exact, strict=True):
            assert found.logprob == pytest.approx(row[token].item(), abs=1e-5)
            assert [value for _, value in found.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-5)
    assert [found.logprob for found in greedy.logprobs] == pytest.approx([0.0] * 4, abs=1e-5)


def test_asking_for_temperature_1_changes_no_bit() -> None:
    """At temperature 1 both kinds are the same numbers to the bit."""
    requests = [
        ask(PROMPT, 12, Sampling(seed=5), logprobs=4, tempered_logprobs=tempered, cache_salt=str(tempered))
        for tempered in (False, True)
    ]
    with engine_of(build(CONFIGS["mla"])) as engine:
        plain, tempered = run(engine, requests)
    assert plain.logprobs == tempered.logprobs
