"""Drawing tokens: distributions by chi-square, filters against plain definitions, rows apart to the bit."""

import pytest
import torch
from torch import Tensor

from fathom.engine.protocol import Sampling
from fathom.engine.sampling import SamplerState, draw, probabilities, sample, speculate, token_logprobs, uniform
from fathom.errors import UserError
from fathom.kernels import ops

VOCAB = 5000  # more than the candidates that are looked at first, and no multiple of a block


def states(count: int, vocab: int = VOCAB, prompt: tuple[int, ...] = (1, 2), **settings) -> list[SamplerState]:
    """One state for each of `count` seeds."""
    return [SamplerState.start(Sampling(**settings, seed=seed), prompt, vocab) for seed in range(count)]


def random_logits(rows: int, vocab: int = VOCAB, spread: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def uniforms(count: int, purpose: str) -> Tensor:
    return torch.tensor([uniform(seed, 0, purpose) for seed in range(count)], dtype=torch.float64)


def chi_square(drawn: Tensor, expected: Tensor) -> float:
    """Pearson's statistic of drawn ids against probabilities; an impossible token counts as infinite."""
    observed = torch.bincount(drawn, minlength=len(expected)).double()
    assert not observed[expected == 0].any()
    wanted = expected.double()[expected > 0] * len(drawn)
    return float(((observed[expected > 0] - wanted) ** 2 / wanted).sum())


def by_definition(logits: Tensor, sampling: Sampling) -> Tensor:
    """One row's probabilities after the filters, written down without any thought of speed."""
    p = (logits.double() / sampling.temperature).softmax(-1)
    order = p.argsort(descending=True, stable=True).tolist()
    order = order[: sampling.top_k or len(order)]
    mass, reached, nucleus = sum(p[i] for i in order), 0.0, []
    for i in order:
        if reached < sampling.top_p * mass or sampling.top_p == 1:
            nucleus.append(i)
            reached += p[i]
    kept = [i for i in nucleus if p[i] >= sampling.min_p * p[order[0]]]
    result = torch.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 1},
        {"top_k": 40, "temperature": 1.5},
        {"top_k": 100, "top_p": 0.5},
        {"top_k": 600, "min_p": 0.01, "top_p": 0.9},
        {"top_p": 0.9},
        {"top_p": 0.9, "temperature": 4.0},
        {"top_p": 0.9999, "temperature": 20.0},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"min_p": 1e-4, "temperature": 3.0},
        {"min_p": 1.0},
        {"top_k": 10**9, "top_p": 0.3},
    ],
)
def test_filters_are_as_defined(settings: dict) -> None:
    """Every combination keeps the tokens that its plain definition keeps, whether few candidates suffice or not."""
    logits = random_logits(4)
    got = probabilities(logits, states(4, **settings))
    for row in range(4):
        expected = by_definition(logits[row], Sampling(**settings))
        assert torch.equal(got[row] > 0, expected > 0)
        torch.testing.assert_close(got[row].double(), expected, rtol=1e-4, atol=1e-9)


def test_samples_follow_the_softmax() -> None:
    """Frequencies of 40,000 requests fit softmax(logits / temperature) by a chi-square test far in its tail."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    drawn = sample(logits.expand(40_000, -1), states(40_000, 5, temperature=0.8))
    assert chi_square(drawn, (logits / 0.8).softmax(0)) < 23.5  # 4 degrees of freedom: p = 1e-4


def test_filtered_samples_follow_their_probabilities() -> None:
    """Draws from the candidates fit `probabilities`, and no token outside the filters is ever drawn."""
    logits = random_logits(1, 300, 1.0)
    settings = {"top_k": 12, "top_p": 0.9, "temperature": 1.3}
    expected = probabilities(logits, states(1, 300, **settings))[0]
    drawn = sample(logits.expand(20_000, -1), states(20_000, 300, **settings))
    assert int((expected > 0).sum()) in range(8, 13)
    assert chi_square(drawn, expected) < 37.4  # at most 11 degrees of freedom: p = 1e-4


def test_blocks_of_the_vocabulary_are_hit_as_often_as_they_weigh() -> None:
    """Over a vocabulary of many blocks, draws in each block and in each place of a block fit their sums."""
    p = random_logits(1, VOCAB, 1.0).softmax(-1)
    drawn = draw(p.expand(20_000, -1), uniforms(20_000, "token"))
    for group in (torch.arange(VOCAB) // 64, torch.arange(VOCAB) % 64):
        weights = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, p[0].double())
        assert chi_square(group[drawn], weights) < 138.4  # at most 78 degrees of freedom: p < 1e-4


@pytest.mark.parametrize("vocab", [1, 5, 64, 65, 4096, 5000])
def test_a_token_of_probability_zero_is_never_drawn(vocab: int) -> None:
    """Not at the first or last uniform number, not where sums round, not before, between or behind the others."""
    generator = torch.Generator().manual_seed(vocab)
    extremes = torch.tensor([0.0, 2.0**-1074, 1e-300, 2.0**-53, 0.5, 1 - 2**-24, 1 - 2**-53], dtype=torch.float64)
    for density in (0.0005, 0.05, 0.5):
        for scale in (1e-38, 1e-6, 1.0, 3.0):
            p = torch.rand(len(extremes), vocab, generator=generator)
            p *= (torch.rand(p.shape, generator=generator) < density) * scale
            p[torch.arange(len(p)), torch.randint(vocab, (len(p),), generator=generator)] = scale
            assert (p.gather(1, draw(p, extremes)[:, None]) > 0).all()


def test_a_row_is_drawn_the_same_in_any_company() -> None:
    """Token and probabilities of a row are bit for bit those of the row alone, whatever the others ask for."""
    kinds = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.6, "top_p": 0.95},
        {"top_k": 50},
        {"top_k": 700, "temperature": 2.0},
        {"top_p": 0.999, "temperature": 9.0},
        {"min_p": 0.05},
        {"presence_penalty": 1.0, "repetition_penalty": 1.3, "logit_bias": {3: 9.0}},
    ]
    vocab = 49_152
    company = [SamplerState.start(Sampling(**k, seed=n), (1, 2), vocab) for n, k in enumerate(kinds)]
    logits = random_logits(len(kinds), vocab)
    logits[:, ::7] = logits[:, 1::7]  # ties
    together, ids = probabilities(logits, company), sample(logits, company)
    for row, state in enumerate(company):
        alone = logits[row : row + 1]
        assert torch.equal(probabilities(alone, [state])[0], together[row])
        assert sample(alone, [state])[0] == ids[row]


def test_uniforms_depend_on_seed_position_and_purpose_alone() -> None:
    """Each of the three changes the number, nothing else does, and the values are fixed for ever."""
    assert uniform(1, 2, "token") == uniform(1, 2, "token")
    assert len({uniform(s, n, p) for s in (0, 1) for n in (0, 1) for p in ("token", "accept")}) == 8
    values = [uniform(5, n, "token") for n in range(2000)]
    assert 0 <= min(values) < 0.01
    assert 0.99 < max(values) < 1
    assert uniform(0, 0, "token") == pytest.approx(0.4986700059738588, abs=0)


def test_greedy_is_argmax_and_the_first_of_equals() -> None:
    """Temperature 0 takes the largest logit, after bias and masks, and the lowest id among equals."""
    logits = random_logits(3)
    assert torch.equal(sample(logits, states(3, temperature=0.0)), logits.argmax(-1))
    logits[:, 70], logits[:, 4990] = 50.0, 50.0
    assert sample(logits, states(3, temperature=0.0)).tolist() == [70] * 3
    assert sample(logits, states(3, temperature=0.0, logit_bias={4990: 0.5})).tolist() == [4990] * 3
    mask = torch.ones(VOCAB, dtype=torch.bool)
    mask[70] = False
    assert sample(logits, states(3, temperature=0.0), [None, mask, None]).tolist() == [70, 4990, 70]


def test_a_mask_leaves_only_what_it_allows() -> None:
    """A forbidden token has probability 0 with and without filters, and the allowed ones share all of it."""
    logits, mask = random_logits(2), torch.zeros(VOCAB, dtype=torch.bool)
    mask[[7, 8, 4999]] = True
    for settings in ({}, {"top_p": 0.9999999}, {"top_k": 200}):
        p = probabilities(logits, states(2, **settings), [mask, mask])
        assert (p[:, ~mask] == 0).all()
        assert p.sum(-1).tolist() == pytest.approx([1, 1])
        assert mask[sample(logits, states(2, **settings), [mask, mask])].all()


def test_penalties_are_as_defined() -> None:
    """Presence and frequency count the output only, repetition the prompt too, and each changes its tokens alone."""
    logits = torch.tensor([[1.0, -1.0, 2.0, -2.0, 0.5]])
    (state,) = states(1, 5, prompt=(0, 1), presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    for token in (1, 2, 2):
        state.advance(token)
    expected = torch.tensor([[1 / 2, -1 * 2 - 0.75, 2 / 2 - 1.0, -2.0, 0.5]]).softmax(-1)
    torch.testing.assert_close(probabilities(logits, [state]), expected)
    assert logits.tolist() == [[1.0, -1.0, 2.0, -2.0, 0.5]]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1e-300, "temperature": 1e-4},
        {"logit_bias": {1: 1e308, 2: -1e308}, "temperature": 1e-5},
        {"temperature": 1e-300},
        {"temperature": 100.0, "top_p": 1e-300},
        {"min_p": 1e-300},
    ],
)
def test_extreme_settings_still_give_a_distribution(settings: dict) -> None:
    """Settings at the ends of their ranges make no NaN and no impossible token."""
    logits = random_logits(2, 100)
    p = probabilities(logits, states(2, 100, **settings))
    assert p.sum(-1).tolist() == pytest.approx([1, 1])
    assert (p.gather(1, sample(logits, states(2, 100, **settings))[:, None]) > 0).all()


def test_a_bias_on_no_token_is_refused() -> None:
    """A biased id outside the vocabulary is a sentence."""
    for token in (-1, 5):
        with pytest.raises(UserError, match=f"no token {token}; ids go from 0 to 4"):
            states(1, 5, logit_bias={token: 1.0})


@pytest.mark.parametrize("closeness", [0.0, 0.5, 1.0])
def test_speculation_keeps_the_distribution(closeness: float) -> None:
    """Whatever the draft, accepted and replaced tokens together are distributed as the target (chi-square)."""
    count, target = 40_000, torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    draft = closeness * target + (1 - closeness) * torch.tensor([0.05, 0.05, 0.1, 0.4, 0.4])
    p, q = target.expand(count, -1), draft.expand(count, -1)
    drafted = draw(q, uniforms(count, "draft"))
    accepted, ids = speculate(p, q, drafted, uniforms(count, "accept"), uniforms(count, "residual"))
    assert chi_square(ids, target) < 21.1  # 3 degrees of freedom: p = 1e-4
    assert float(accepted.double().mean()) == pytest.approx(float(torch.minimum(target, draft).sum()), abs=0.01)
    assert torch.equal(ids[accepted], drafted[accepted])


def test_greedy_speculation_is_argmax() -> None:
    """With a one-hot target every id is its argmax, accepted exactly where it had been drafted."""
    logits = random_logits(200, 50)
    greedy, free = states(200, 50, temperature=0.0), states(200, 50, temperature=2.0)
    p, q = probabilities(logits, greedy), probabilities(logits, free)
    drafted = sample(logits, free)
    accepted, ids = speculate(p, q, drafted, uniforms(200, "accept"), uniforms(200, "residual"))
    assert torch.equal(ids, logits.argmax(-1))
    assert torch.equal(accepted, drafted == ids)
    assert 0 < int(accepted.sum()) < 200


def test_logprobs_are_the_models_own() -> None:
    """Log-softmax of the logits as they came, with alternatives in order, the token among them where it belongs."""
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    first, second = token_logprobs(logits, torch.tensor([2, 0]), 2, [1.0, 1.0])
    expected = logits.log_softmax(-1)
    assert (first.token_id, first.logprob) == (2, pytest.approx(float(expected[0, 2])))
    assert [token for token, _ in first.top] == [1, 2]
    assert second.top[0] == (0, pytest.approx(float(expected[1, 0])))
    assert token_logprobs(logits, torch.tensor([2, 0]), 0, [1.0, 1.0])[0].top == []
    assert len(token_logprobs(logits, torch.tensor([2, 0]), 20, [1.0, 1.0])[0].top) == 3


@pytest.mark.parametrize("kernels", [True, False])
def test_each_row_has_the_logprobs_of_its_own_temperature(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row log_softmax(logits / T), for large logits and extreme temperatures too; none is above 0."""
    if not kernels:
        monkeypatch.setattr(ops, "library", lambda: None)
    temperatures = [0.7, 1.0, 1.7, 20.0, 1e-3, 1e-300]
    logits, ids = random_logits(6, spread=30.0), torch.arange(6) * 700
    exact = (logits.double() / torch.tensor(temperatures, dtype=torch.float64).clamp(min=1e-5)[:, None]).log_softmax(-1)
    for found, token, row in zip(token_logprobs(logits, ids, 3, temperatures), ids, exact, strict=True):
        assert found.logprob == pytest.approx(row[token].item(), rel=2e-7, abs=1e-5)
        assert [value for _, value in found.top] == pytest.approx(row.topk(3).values.tolist(), rel=2e-7, abs=1e-5)
        assert all(value <= 1e-6 for _, value in found.top)
