"""GRPO's losses against values worked out by hand, against their equations, and against TRL's numbers."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fathom.config.policy import PolicyLoss, cispo, dapo, dr_grpo, gspo, r1
from fathom.errors import UserError
from fathom.train.grpo import (
    PolicyBatch,
    PolicyReport,
    completion_weights,
    group_advantages,
    informative_groups,
    k3,
    policy_loss,
)

PRESETS = [r1, dapo, dr_grpo, gspo, cispo]
VARIANTS = {preset.__name__: preset() for preset in PRESETS} | {
    "truncate": r1().replace(sampler_correction="truncate", sampler_cap=1.2),
    "mask": gspo().replace(sampler_correction="mask", sampler_cap=1.2, kl=0.3),
    "drop": dapo().replace(drop_truncated=True),
    "cispo sequence": cispo().replace(ratio="sequence", normalisation="response"),
}
ALL_VARIANTS = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _two_completions(*ratios: float) -> tuple[Tensor, PolicyBatch]:
    """Tokens of probability 1/2 under the old policy and `ratios` times that now: two of completion 0, the rest of 1.

    Advantages are 2 and −1, all weights 1: losses are plain sums.
    """
    old = torch.full((len(ratios),), math.log(0.5), dtype=torch.float64)
    owner = torch.tensor([0, 0] + [1] * (len(ratios) - 2))
    logprobs = (old + _tensor(*ratios).log()).requires_grad_()
    return logprobs, PolicyBatch(owner, _tensor(2.0, -1.0)[owner], torch.ones(2), old)


def _random_batch(settings: PolicyLoss, seed: int = 0) -> tuple[Tensor, PolicyBatch]:
    """Five completions of 1 to 6 tokens between tokens outside the loss; the fourth is truncated."""
    source = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 6, 1, 4, 2])
    owner = torch.cat([torch.tensor([-1, -1] + [i] * n) for i, n in enumerate(lengths.tolist())])

    def near(logprobs: Tensor, scale: float) -> Tensor:
        return logprobs + scale * torch.randn(len(owner), generator=source, dtype=torch.float64)

    old = near(_tensor(-2.0).expand(len(owner)), 0.5)
    truncated = torch.tensor([False, False, False, True, False])
    weights = completion_weights(lengths, settings, max_tokens=8, truncated=truncated)
    advantages = _tensor(1.0, -0.5, 0.3, -1.2, 0.7)[owner]
    batch = PolicyBatch(owner, advantages, weights, old, near(old, 0.3), near(old, 0.2), -old)
    return near(old, 0.2).requires_grad_(), batch


def _loss_and_gradient(logprobs: Tensor, batch: PolicyBatch, settings: PolicyLoss) -> tuple[Tensor, Tensor]:
    loss, _ = policy_loss(logprobs, batch, settings)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


def _means(logprobs: Tensor, batch: PolicyBatch, settings: PolicyLoss) -> dict[str, float]:
    return policy_loss(logprobs, batch, settings)[1].means()


# --- each choice by hand ----------------------------------------------------------------------------------------------


def test_symmetric_clip_by_hand() -> None:
    """min(ρA, clip(ρ)A): a ratio is held at 1.2 where A > 0 and at 0.8 where A < 0, and has no gradient there."""
    loss, gradient = _loss_and_gradient(*_two_completions(1.5, 0.5, 1.5, 0.5, 1.0), PolicyLoss())
    #                        A = 2: min(3, 2.4), min(1, 1.6)    A = −1: min(−1.5, −1.2), min(−0.5, −0.8), −1
    assert loss.item() == pytest.approx(-(2.4 + 1.0 - 1.5 - 0.8 - 1.0))
    torch.testing.assert_close(gradient, -_tensor(0.0, 1.0, -1.5, 0.0, -1.0))


def test_clip_higher_by_hand() -> None:
    """clip_high moves the upper limit alone."""
    loss, gradient = _loss_and_gradient(*_two_completions(1.25, 1.5, 0.5), PolicyLoss(clip_high=0.28))
    assert loss.item() == pytest.approx(-(2 * 1.25 + 2 * 1.28 - 0.8))
    torch.testing.assert_close(gradient, -_tensor(2.5, 0.0, 0.0))


def test_r1_clip_leaves_all_but_runaway_ratios() -> None:
    """ε = 10 has no lower limit and an upper one of 11."""
    loss, gradient = _loss_and_gradient(*_two_completions(10.0, 12.0, 0.001), PolicyLoss(clip_low=10.0, clip_high=10.0))
    assert loss.item() == pytest.approx(-(20 + 22 - 0.001))
    torch.testing.assert_close(gradient, -_tensor(20.0, 0.0, -0.001))


def test_sequence_ratio_by_hand() -> None:
    """s = √(2 · 1/2) = 1 and ∛(8 · 1 · 1) = 2 for all tokens of their completions; each token has 1/|o| of ∇s."""
    wide = PolicyLoss(ratio="sequence", clip_low=1.0, clip_high=2.0)
    loss, gradient = _loss_and_gradient(*_two_completions(2.0, 0.5, 8.0, 1.0, 1.0), wide)
    assert loss.item() == pytest.approx(-(2 * 2.0 - 3 * 2.0))
    torch.testing.assert_close(gradient, -_tensor(2.0, 2.0, -2.0, -2.0, -2.0))


def test_sequence_clip_takes_whole_completions() -> None:
    """A completion whose s left the range gives no gradient at any token, however its tokens' own ratios lie."""
    loss, gradient = _loss_and_gradient(*_two_completions(4.0, 1.0, 1.0), PolicyLoss(ratio="sequence"))
    assert loss.item() == pytest.approx(-(2 * 2 * 1.2 - 1.0))
    torch.testing.assert_close(gradient, -_tensor(0.0, 0.0, -1.0))


def test_cispo_by_hand() -> None:
    """−sg(clip(ρ)) A log π: the gradient is −clip(ρ)A at every token, clipped or not."""
    logprobs, batch = _two_completions(1.5, 0.1, 1.5, 0.5)
    loss, gradient = _loss_and_gradient(logprobs, batch, cispo())
    coefficients = _tensor(2 * 1.2, 2 * 0.1, -1.2, -0.5)
    assert loss.item() == pytest.approx(-(coefficients * logprobs.detach()).sum().item())
    torch.testing.assert_close(gradient, -coefficients)


def test_kl_by_hand() -> None:
    """β (π_ref/π − log(π_ref/π) − 1) is added per token: for π_ref/π = 2 and 1/2 these are 1 − ln 2 and ln 2 − 1/2."""
    logprobs, batch = _two_completions(1.0, 1.0)
    batch = replace(batch, reference_logprobs=logprobs.detach() + _tensor(2.0, 0.5).log())
    loss, gradient = _loss_and_gradient(logprobs, batch, PolicyLoss(kl=0.1))
    assert loss.item() == pytest.approx(-4 + 0.1 * ((1 - math.log(2)) + (math.log(2) - 0.5)))
    torch.testing.assert_close(gradient, _tensor(-2.0 + 0.1 * (1 - 2), -2.0 + 0.1 * (1 - 0.5)))


def test_sampler_corrections_by_hand() -> None:
    """π_old/μ = 3 weighs 2 when truncated and 0 when masked, 1/2 stays; the KL term is not weighed."""
    logprobs, batch = _two_completions(1.0, 1.0)
    sampler = batch.old_logprobs - _tensor(3.0, 0.5).log()
    batch = replace(batch, sampler_logprobs=sampler, reference_logprobs=logprobs.detach() + math.log(2))
    kl = 0.1 * 2 * (1 - math.log(2))
    for correction, weights in (("none", (1.0, 1.0)), ("truncate", (2.0, 0.5)), ("mask", (0.0, 0.5))):
        settings = PolicyLoss(kl=0.1, sampler_correction=correction)
        loss, gradient = _loss_and_gradient(logprobs, batch, settings)
        assert loss.item() == pytest.approx(-2 * sum(weights) + kl)
        torch.testing.assert_close(gradient, -2 * _tensor(*weights) - 0.1)


def test_completion_weights_by_hand() -> None:
    """Lengths 1, 3, 4 of at most 5: 1/(3·length), 1/8, 1/15; dropping the last leaves 1/4 where tokens are counted."""
    lengths, truncated = torch.tensor([1, 3, 4]), torch.tensor([False, False, True])
    kept = {"response": [1 / 3, 1 / 9, 1 / 12], "token": [1 / 8] * 3, "constant": [1 / 15] * 3}
    dropped = {"response": [1 / 3, 1 / 9, 0], "token": [1 / 4, 1 / 4, 0], "constant": [1 / 15, 1 / 15, 0]}
    for normalisation in kept:
        settings = PolicyLoss(normalisation=normalisation)
        weights = completion_weights(lengths, settings, max_tokens=5, truncated=truncated)
        assert weights.tolist() == pytest.approx(kept[normalisation])
        weights = completion_weights(lengths, settings.replace(drop_truncated=True), max_tokens=5, truncated=truncated)
        assert weights.tolist() == pytest.approx(dropped[normalisation])


def test_advantages_by_hand() -> None:
    """Groups of different sizes in any order: r − mean, and that over the sample deviation √(1/3), √(1/2) plus 1e-4."""
    rewards, group = _tensor(1.0, 1.0, 0.0, 0.0, 0.0, 0.0), torch.tensor([0, 1, 0, 1, 0, 0])
    centred = _tensor(0.75, 0.5, -0.25, -0.5, -0.25, -0.25)
    deviation = (_tensor(0.75**2 + 3 * 0.25**2, 0.5).div(_tensor(3, 1)).sqrt() + 1e-4)[group]
    torch.testing.assert_close(group_advantages(rewards, group, dr_grpo()), centred)
    torch.testing.assert_close(group_advantages(rewards, group, r1()), centred / deviation)


# --- groups that say nothing, and bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [r1, dr_grpo])
def test_equal_rewards_give_exactly_no_advantage(preset) -> None:
    """Whatever the reward and the size of the group, one included: 0, not a rounding of the mean and not NaN."""
    sizes = range(1, 40)
    group = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    for reward in (0.0, 0.1, 0.7, -1 / 3, 1e6 / 7):
        advantages = group_advantages(torch.full(group.shape, reward), group, preset())
        assert torch.equal(advantages, torch.zeros(group.shape))


def test_informative_groups_are_those_whose_rewards_differ() -> None:
    """All right, all wrong and single completions are not informative; a mixed group is, in whatever order."""
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.5])
    group = torch.tensor([0, 1, 0, 1, 2, 2, 3])
    assert informative_groups(rewards, group).tolist() == [False, False, True, False]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_rewards_that_are_no_numbers_are_refused(wrong: float) -> None:
    """One line says which completion and what to look at; nothing is trained on a NaN."""
    with pytest.raises(UserError, match=f"reward of completion 2 is {wrong}.*task's check"):
        group_advantages(torch.tensor([0.0, 1.0, wrong]), torch.tensor([0, 0, 0]), r1())


@ALL_VARIANTS
def test_a_batch_without_tokens_is_zero_not_nan(settings: PolicyLoss) -> None:
    """All dropped or empty: loss, gradient and every figure of the report are 0."""
    logprobs, batch = _random_batch(settings)
    empty = torch.zeros(5, dtype=torch.int64)
    for weights in (torch.zeros(5), completion_weights(empty, settings, max_tokens=8, truncated=empty.bool())):
        loss, gradient = _loss_and_gradient(logprobs, replace(batch, weights=weights), settings)
        assert (loss.item(), gradient.count_nonzero()) == (0, 0)
        assert not any(_means(logprobs, replace(batch, weights=weights), settings).values())


@ALL_VARIANTS
def test_extreme_log_ratios_keep_loss_and_gradient_finite(settings: PolicyLoss) -> None:
    """Tokens that one policy finds e^200 times likelier than another overflow nothing, in float32 too."""
    logprobs, batch = _random_batch(settings)
    signs = torch.tensor([1.0, -1.0]).repeat(len(logprobs))
    extreme = replace(
        batch,
        old_logprobs=batch.old_logprobs + 200 * signs[: len(logprobs)],
        reference_logprobs=batch.reference_logprobs - 200 * signs[1 : len(logprobs) + 1],
        sampler_logprobs=batch.sampler_logprobs - 200 * signs[: len(logprobs)],
    )
    loss, gradient = _loss_and_gradient(logprobs.detach().float().requires_grad_(), extreme, settings)
    assert loss.isfinite()
    assert gradient.isfinite().all()


# --- equations --------------------------------------------------------------------------------------------------------


@ALL_VARIANTS
def test_first_step_is_plain_policy_gradient(settings: PolicyLoss) -> None:
    """Where π = π_old = μ = π_ref the gradient is −w A at every token, though the policy's own values are passed."""
    logprobs, batch = _random_batch(settings)
    same = replace(batch, old_logprobs=logprobs, reference_logprobs=logprobs, sampler_logprobs=logprobs)
    _, gradient = _loss_and_gradient(logprobs, same, settings)
    expected = torch.where(batch.owner >= 0, -batch.weights[batch.owner] * batch.advantages, 0.0)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "cispo" not in name])
def test_gradient_is_that_of_the_loss(name: str) -> None:
    """Finite differences in float64 (CISPO's weights are held constant, so its gradient is not its loss's)."""
    settings = VARIANTS[name]
    logprobs, batch = _random_batch(settings)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, batch, settings)[0], logprobs)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_cispo_gradient_is_the_limited_ratio_times_advantage(ratio: str) -> None:
    """∇ = −w clip(ρ) A at every token, for both kinds of ratio."""
    settings = cispo().replace(ratio=ratio)
    logprobs, batch = _random_batch(settings)
    _, gradient = _loss_and_gradient(logprobs, batch, settings)
    for token, owner in enumerate(batch.owner.tolist()):
        mates = batch.owner == owner if ratio == "sequence" else torch.arange(len(batch.owner)) == token
        weight = (logprobs.detach() - batch.old_logprobs)[mates].mean().exp().clamp(max=1.2)
        expected = -batch.weights[owner] * weight * batch.advantages[token] if owner >= 0 else 0.0
        assert gradient[token].item() == pytest.approx(float(expected))


def test_gspo_equals_its_formula() -> None:
    """1/G Σ min(s A, clip(s) A) with s the root of the ratio of whole completions' probabilities."""
    settings = gspo().replace(clip_low=0.1, clip_high=0.1)
    logprobs, batch = _random_batch(settings)
    total = 0.0
    for i in range(5):
        tokens = batch.owner == i
        advantage = batch.advantages[tokens][0]
        new, old = logprobs[tokens].exp().prod(), batch.old_logprobs[tokens].exp().prod()
        s = (new / old) ** (1 / tokens.sum())
        total = total - torch.minimum(s * advantage, s.clamp(0.9, 1.1) * advantage) / 5
    loss, gradient = _loss_and_gradient(logprobs, batch, settings)
    torch.testing.assert_close(loss, total.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, logprobs)[0], rtol=1e-6, atol=1e-9)


def test_k3_is_unbiased_and_never_negative() -> None:
    """Over all of a small vocabulary Σ q k3(log p/q) = Σ q log q/p exactly, and no term is below 0."""
    source = torch.Generator().manual_seed(1)
    p, q = torch.randn(2, 7, generator=source, dtype=torch.float64).log_softmax(1)
    estimates = k3(p - q)
    assert (estimates >= 0).all()
    assert (q.exp() * estimates).sum().item() == pytest.approx((q.exp() * (q - p)).sum().item(), rel=1e-12)
    assert (k3(torch.linspace(-1e-3, 1e-3, 101)) >= 0).all()


# --- layout -----------------------------------------------------------------------------------------------------------


def _sum_of_parts(
    logprobs: Tensor, batch: PolicyBatch, settings: PolicyLoss, parts: list[list[int]]
) -> tuple[Tensor, PolicyReport]:
    """Loss and report of the mini-batch as micro-batches of the named completions."""
    results = []
    for completions in parts:
        rows = torch.isin(batch.owner, torch.tensor(completions)).nonzero().squeeze(1)
        results.append(policy_loss(logprobs[rows], batch.take(rows), settings))
    losses, reports = zip(*results, strict=True)
    return sum(losses), sum(reports[1:], start=reports[0])


@ALL_VARIANTS
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3, 4]], [[4], [1], [0], [2], [3]], [[3, 0], [2, 4, 1]]])
def test_micro_batches_add_up(settings: PolicyLoss, parts: list[list[int]]) -> None:
    """However completions are spread: losses, gradients and reports add up to those of the whole mini-batch."""
    logprobs, batch = _random_batch(settings)
    loss, gradient = _loss_and_gradient(logprobs, batch, settings)
    split, report = _sum_of_parts(logprobs, batch, settings, parts)
    torch.testing.assert_close(split.detach(), loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(split, logprobs)[0], gradient, rtol=1e-12, atol=1e-12)
    assert report.means() == pytest.approx(_means(logprobs, batch, settings))


@ALL_VARIANTS
def test_what_is_outside_the_loss_never_enters(settings: PolicyLoss) -> None:
    """NaN in place of prompts and of dropped completions changes neither loss, gradient nor report."""
    logprobs, batch = _random_batch(settings)
    inside = (batch.owner >= 0) & (batch.weights > 0)[batch.owner]
    names = ("old_logprobs", "reference_logprobs", "sampler_logprobs", "entropy")
    poisoned = replace(batch, **{name: torch.where(inside, getattr(batch, name), math.nan) for name in names})
    loss, gradient = _loss_and_gradient(logprobs, batch, settings)
    leaf = torch.where(inside, logprobs.detach(), math.nan).requires_grad_()
    other_loss, other_gradient = _loss_and_gradient(leaf, poisoned, settings)
    assert torch.equal(loss, other_loss)
    assert torch.equal(gradient, other_gradient)
    assert not gradient[~inside].any()
    assert _means(logprobs, batch, settings) == _means(leaf, poisoned, settings)
    assert settings.drop_truncated == (not inside[batch.owner == 3].any())


@ALL_VARIANTS
def test_order_of_tokens_does_not_matter(settings: PolicyLoss) -> None:
    """Tokens belong to their completion by `owner` alone: any order gives the same loss."""
    logprobs, batch = _random_batch(settings)
    loss, _ = policy_loss(logprobs, batch, settings)
    order = torch.randperm(len(logprobs), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy_loss(logprobs[order], batch.take(order), settings)[0], loss)


def test_narrow_inputs_are_computed_in_float32() -> None:
    """bfloat16 log-probabilities give exactly the loss and report of the same numbers in float32."""
    settings = VARIANTS["truncate"]
    logprobs, batch = _random_batch(settings)
    names = ("advantages", "weights", "old_logprobs", "reference_logprobs", "sampler_logprobs", "entropy")
    narrow = replace(batch, **{name: getattr(batch, name).bfloat16() for name in names})
    same = replace(batch, **{name: getattr(narrow, name).float() for name in names})
    loss, report = policy_loss(logprobs.bfloat16(), narrow, settings)
    expected, wanted = policy_loss(logprobs.bfloat16().float(), same, settings)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert report.means() == wanted.means()


# --- report -----------------------------------------------------------------------------------------------------------


def test_report_by_hand() -> None:
    """Every figure of a batch of four tokens, as its description says."""
    logprobs, batch = _two_completions(1.5, 0.5, 1.5, 0.5)
    batch = replace(
        batch,
        reference_logprobs=logprobs.detach() + math.log(2),
        sampler_logprobs=batch.old_logprobs - _tensor(3.0, 0.25, 1.0, 1.0).log(),
        entropy=_tensor(1.0, 2.0, 3.0, 4.0),
    )
    ln2, ln3, ln15 = math.log(2), math.log(3), math.log(1.5)
    assert _means(logprobs, batch, PolicyLoss(sampler_correction="truncate")) == pytest.approx(
        {
            "clip_low": 1 / 4,
            "clip_high": 1 / 4,
            "ratio": 1.0,
            "kl_old": (2 * (0.5 - ln15) + 2 * (-0.5 + ln2)) / 4,
            "entropy": 2.5,
            "kl_reference": 1 - ln2,
            "kl_sampler": ((2 - ln3) + (-0.75 + 2 * ln2)) / 4,
            "sampler_weight": (2 + 0.25 + 1 + 1) / 4,
            "sampler_limited": 1 / 4,
            "sampler_gap_max": 2 * ln2,
        }
    )


def test_report_names_only_what_it_saw() -> None:
    """Without reference and sampler nothing is said of them; CISPO's limits count whatever the advantage's sign."""
    logprobs, batch = _two_completions(1.5, 0.5, 1.5, 0.5)
    means = _means(logprobs, batch, cispo())
    assert set(means) == {"clip_low", "clip_high", "ratio", "kl_old"}
    assert (means["clip_low"], means["clip_high"]) == (0, 0.5)


# --- TRL --------------------------------------------------------------------------------------------------------------

RECORDED = json.loads((Path(__file__).parent / "data" / "trl_losses.json").read_text())
# The settings here that mean what TRL's case is called. Its CISPO takes the limit itself, 1.2, not what exceeds 1.
LIKE_TRL = {
    "grpo": PolicyLoss(),
    "grpo, R1's clip, KL": r1(),
    "grpo, clip-higher": PolicyLoss(clip_high=0.28),
    "grpo, large KL": PolicyLoss(kl=0.5),
    "grpo, truncated masked": PolicyLoss(drop_truncated=True),
    "bnpo": PolicyLoss(normalisation="token"),
    "dapo": dapo(),
    "dapo, truncated masked": dapo().replace(drop_truncated=True),
    "dr_grpo": dr_grpo(),
    "gspo": gspo(),
    "gspo, wide": gspo().replace(clip_low=0.1, clip_high=0.15),
    "cispo": cispo(),
    "token_truncate": PolicyLoss(sampler_correction="truncate", sampler_cap=1.3, kl=0.1),
    "token_mask": PolicyLoss(sampler_correction="mask", sampler_cap=1.3, normalisation="token"),
}
TRL_METRICS = {"kl": "kl_reference", "clip_ratio/low_mean": "clip_low", "clip_ratio/high_mean": "clip_high"}


def _recorded_batch(settings: PolicyLoss) -> tuple[Tensor, PolicyBatch]:
    lengths = torch.tensor(RECORDED["lengths"])
    completions = torch.arange(len(lengths))
    advantages = group_advantages(_tensor(*RECORDED["rewards"]), completions // RECORDED["group_size"], settings)
    truncated = torch.isin(completions, torch.tensor([0, 4]))
    weights = completion_weights(lengths, settings, max_tokens=RECORDED["max_tokens"], truncated=truncated)
    names = ("old_logprobs", "reference_logprobs", "sampler_logprobs")
    owner = completions.repeat_interleave(lengths)
    batch = PolicyBatch(owner, advantages[owner], weights, *(_tensor(*RECORDED[name]) for name in names))
    return _tensor(*RECORDED["logprobs"]).requires_grad_(), batch


@pytest.mark.parametrize("name", RECORDED["cases"])
def test_loss_and_gradient_equal_trls(name: str) -> None:
    """One batch of unequal lengths: advantages, loss, gradient and clip figures are TRL's, to 1e-6.

    The figures are of TRL 1.16.0: `GRPOTrainer._compute_loss`, unbound, on a stand-in for the trainer that returns the
    recorded log-probabilities, in float64, as one batch without accumulation. Its advantages (`scale_rewards` "group",
    for dr_grpo "none") and vLLM weights (`vllm_importance_sampling_mode`) were made as in
    `_generate_and_score_completions`; "truncated masked" has the completion masks of completions 0 and 4 cleared, as
    `mask_truncated_completions` does. Where TRL departs from the papers or from here:

    * `bnpo` divides by the tokens of each micro-batch, so its loss depends on the split; one batch is our `token`.
    * `grpo` and `dr_grpo` average over micro-batches, which is right only while all hold equally many completions.
    * `cispo` takes the upper limit itself (epsilon_high = 1.2) and has no lower one; its figure counts A > 0 alone.
    * With sequence ratios its clip figures are per completion, ours per token: these are not compared.
    * A token ratio is never limited (ours at e^20); `delta`, a second limit for A < 0, has no counterpart here.
    * A completion whose rewards are all NaN gets advantage 0 and leaves its group's mean; here NaN is refused.
    """
    recorded, settings = RECORDED["cases"][name], LIKE_TRL[name]
    logprobs, batch = _recorded_batch(settings)
    loss, gradient = _loss_and_gradient(logprobs, batch, settings)
    assert batch.advantages.tolist() == pytest.approx([recorded["advantages"][i] for i in batch.owner], abs=1e-6)
    assert loss.item() == pytest.approx(recorded["loss"], abs=1e-6)
    assert gradient.tolist() == pytest.approx(recorded["gradient"], abs=1e-6)
    if settings.ratio == "token":
        means = _means(logprobs, batch, settings)
        theirs = {ours: recorded["metrics"][name] for name, ours in TRL_METRICS.items() if name in recorded["metrics"]}
        assert {name: means[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)


def test_every_recorded_case_differs() -> None:
    """The recorded batch tells all settings apart: no two cases that mean different things have the same gradient."""
    gradients = {name: torch.tensor(case["gradient"]) for name, case in RECORDED["cases"].items()}
    for one, other in itertools.combinations(gradients, 2):
        assert (gradients[one] - gradients[other]).abs().max() > 1e-4, (one, other)
