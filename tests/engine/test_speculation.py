"""Speculation against the same engine without: the same text where greedy, the same distribution where drawn."""

import random
import secrets
from collections import Counter

import pytest
import torch

from fathom.engine.protocol import Request, Sampling, Thinking
from fathom.model.transformer import Transformer
from tests.engine.running import CLOSE, GREEDY, MLA, TAGGED, Outcome, ask, engine_of, memory_for, run
from tests.model.configs import build

NOISY = Sampling(seed=5, temperature=0.8)
SMALL = MLA.replace(num_hidden_layers=1, hidden_size=16, intermediate_size=16, moe_intermediate_size=8)


def cyclic(model: Transformer, period: int = 11) -> Transformer:
    """`model`, its weights changed so that layers add little, and the token behind t is t + 1, around a circle of
    `period`; its prediction module knows the same circle but for one place, where it always errs."""
    width, vocab = model.config.hidden_size, model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    codes = torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:period] * width**0.5
    following = torch.arange(1, period + 1) % period
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                parameter.mul_(0.02)
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
        model.model.embed_tokens.weight.zero_()[:period] = codes
        head = model.lm_head.weight.zero_()
        head[following] = codes / width * 4.0
        # The module sees the embedding of the next token, so that its place on the circle decides.
        for module in model.mtp:
            join = torch.eye(width)
            wrong = codes[3] / codes[3].norm()
            module.eh_proj.weight.zero_()[:, :width] = join - 2 * torch.outer(wrong, wrong)
    assert vocab > period
    return model


@pytest.fixture(scope="module")
def good() -> Transformer:
    return cyclic(build(MLA))


def both(model: Transformer, requests: list[Request], **settings: object) -> tuple[list[Outcome], list[Outcome], float]:
    """(with, without, the share of drafts that were accepted)"""
    with engine_of(model, TAGGED, speculate=True, **settings) as engine:
        fast = run(engine, requests)
        counts = engine.statistics()
    with engine_of(model, TAGGED, speculate=False, **settings) as engine:
        plain = run(engine, requests)
        assert engine.statistics().drafted_tokens == 0
    return fast, plain, counts.accepted_tokens / max(1, counts.drafted_tokens)


def texts(outcomes: list[Outcome]) -> list[tuple]:
    return [(o.ids, o.text(), o.text("thinking"), o.last.finish_reason, o.last.usage.completion) for o in outcomes]


@pytest.mark.parametrize("seed", range(4))
def test_greedy_text_is_the_same_over_random_models(seed: int) -> None:
    """Drafts that are almost never right change no token, whatever the prompt's length."""
    draw = torch.Generator().manual_seed(seed)
    requests = [
        ask(torch.randint(256, (length,), generator=draw).tolist(), 50) for length in (1, 2, 40, 63, 64, 65, 150, 257)
    ]
    fast, plain, _ = both(build(MLA, seed), requests)
    assert texts(fast) == texts(plain)


def test_greedy_text_is_the_same_when_drafts_are_right(good: Transformer) -> None:
    """Where most drafts are right and some wrong, the text is the same, and fewer steps made it."""
    requests = [ask([start], 60 + start) for start in range(8)] + [ask([1, 2, 3] * 40, n) for n in (1, 2, 3, 4)]
    fast, plain, accepted = both(good, requests)
    assert texts(fast) == texts(plain)
    assert 0.6 < accepted < 1


def test_bounds_and_tools_change_nothing(good: Transformer) -> None:
    """Stop strings, one or two tokens, bounds on thoughts, penalties, biases and the end of text: the text, the reason
    for its end and the counts are the same."""
    stop = {"stop": ("\x05\x06", "\x09")}
    requests = [
        ask([1], 40, **stop),
        ask([2], 1),
        ask([3], 2),
        ask([3], 3, ignore_eos=False),
        ask([4], 30, thinking=Thinking(budget=7), starts_thinking=True),
        ask([4], 30, thinking=Thinking(budget=0), starts_thinking=True),
        ask([4], 30, thinking=Thinking(budget=9, minimum=9), starts_thinking=True),
        ask(
            [4],
            30,
            GREEDY.replace(logit_bias={CLOSE: 3.0}),
            thinking=Thinking(minimum=5),
            starts_thinking=True,
        ),
        ask([5], 40, GREEDY.replace(presence_penalty=1.5, frequency_penalty=0.5)),
        ask([6], 40, GREEDY.replace(repetition_penalty=1.8)),
        ask([7], 40, GREEDY.replace(logit_bias={8: 3.0, 0: -2.0})),
        ask([8], 40, GREEDY.replace(presence_penalty=1.0, logit_bias={256: 3.0}), ignore_eos=False),
    ]
    fast, plain, accepted = both(good, requests)
    assert texts(fast) == texts(plain)
    assert accepted > 0.3


def test_logprobs_are_the_same(good: Transformer) -> None:
    """Every token of a greedy text has the log-probability and alternatives that it has without speculation, to the bit
    where there are kernels."""
    requests = [ask([start], 40, logprobs=4) for start in range(6)]
    fast, plain, accepted = both(good, requests)
    assert accepted > 0.6
    for one, other in zip(fast, plain, strict=True):
        assert [(f.token_id, [t for t, _ in f.top]) for f in one.logprobs] == [
            (f.token_id, [t for t, _ in f.top]) for f in other.logprobs
        ]
        assert [f.logprob for f in one.logprobs] == pytest.approx([f.logprob for f in other.logprobs], abs=1e-4)


def test_little_memory_changes_nothing(good: Transformer) -> None:
    """Sequences that give their pages back, drafts under way, end with the same greedy text."""
    requests = [ask([start] * 30, 150) for start in range(5)]
    fast, plain, _ = both(good, requests, cache_memory=memory_for(MLA, 6, mtp_layers=1))
    assert texts(fast) == texts(plain)


def test_texts_are_the_same_in_any_company(good: Transformer) -> None:
    """Greedy texts with speculation are the same alone and in a batch, and behind remembered blocks."""
    requests = [ask([start, *range(100)], 40) for start in range(6)]
    with engine_of(good, TAGGED) as engine:
        together = run(engine, requests)
        again = [run(engine, [request])[0] for request in requests]
        assert engine.statistics().cached_tokens == 6 * 64
    assert texts(together) == texts(again)


def test_a_seed_decides_with_and_without(good: Transformer) -> None:
    """Sampled texts of given seeds are the same with speculation and without, in a batch and alone."""
    requests = [ask([start], 40, NOISY.replace(seed=start, top_k=40 * (start % 2))) for start in range(6)]
    fast, plain, accepted = both(good, requests)
    assert texts(fast) == texts(plain)
    assert accepted > 0.2
    with engine_of(good, TAGGED) as engine:
        assert texts([run(engine, [request])[0] for request in requests]) == texts(fast)


def test_a_seed_decides_with_little_memory(good: Transformer) -> None:
    """Sampled texts with speculation are the same where memory was short, for the same seeds."""
    requests = [ask([start] * 30, 150, NOISY.replace(seed=start)) for start in range(5)]
    with engine_of(good, TAGGED) as engine:
        roomy = run(engine, requests)
    with engine_of(good, TAGGED, cache_memory=memory_for(MLA, 6, mtp_layers=1)) as engine:
        short = run(engine, requests)
    assert texts(roomy) == texts(short)


def test_a_seed_decides_behind_remembered_blocks() -> None:
    """Sampled texts with speculation are the same where another text has left the prompt's first block behind."""
    model = build(MLA)
    shared = list(range(64))
    requests = [ask([*shared, 9, last], 40, Sampling(seed=last)) for last in range(8)]
    with engine_of(model, TAGGED) as engine:
        fresh = run(engine, requests)
    with engine_of(model, TAGGED) as engine:
        run(engine, [ask([*shared, 200, 201], 2)])
        behind = run(engine, requests)
        assert engine.statistics().cached_tokens == 8 * 64
    assert texts(fresh) == texts(behind)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=1.6, top_k=4),
        Sampling(temperature=0.9, top_p=0.8, presence_penalty=1.0, repetition_penalty=1.3),
    ],
    ids=["plain", "top-k", "top-p and penalties"],
)
def test_drawn_texts_have_the_same_distribution(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many short texts, the second, third and fourth tokens and their pairs are distributed as without (χ²)."""
    model = cyclic(build(SMALL), period=7)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)
        noise = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
        model.mtp[0].eh_proj.weight[:, :16] += 0.15 * noise
    bias = dict.fromkeys(range(7, SMALL.vocab_size), -1e4)
    count, seeds = 1000, random.Random(0)
    monkeypatch.setattr(secrets, "randbits", seeds.getrandbits)

    def drawn(speculate: bool) -> tuple[list[tuple[int, ...]], float]:
        requests = [ask([2, 3], 4, sampling.replace(logit_bias=bias))] * count
        with engine_of(model, TAGGED, speculate=speculate, queue=count, max_running=500, cache_memory=2**25) as engine:
            outcomes = run(engine, requests)
            found = engine.statistics()
        return [tuple(o.ids) for o in outcomes], found.accepted_tokens / max(1, found.drafted_tokens)

    fast, accepted = drawn(True)
    plain, _ = drawn(False)
    assert 0.2 < accepted < 0.98
    for part in (slice(1, 2), slice(2, 3), slice(3, 4), slice(1, 3), slice(2, 4)):
        assert_alike(Counter(text[part] for text in fast), Counter(text[part] for text in plain))


def assert_alike(first: Counter, second: Counter) -> None:
    """Two samples of one size, by the χ² test of homogeneity; rare outcomes are put together."""
    outcomes = set(first) | set(second)
    common = [o for o in outcomes if first[o] + second[o] >= 20]
    pairs = [(first[o], second[o]) for o in common]
    rest = (sum(first.values()) - sum(a for a, _ in pairs), sum(second.values()) - sum(b for _, b in pairs))
    pairs += [rest] if sum(rest) else []
    statistic = sum((a - b) ** 2 / (a + b) for a, b in pairs)
    freedom = max(1, len(pairs) - 1)
    # Wilson and Hilferty: the cube root of χ² / freedom is nearly normal. Beyond 4 deviations: one in 30 000.
    deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert deviation < 4, f"{statistic=} {freedom=} {pairs=}"
