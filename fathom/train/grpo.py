"""Losses of group-relative policy optimisation (GRPO) and its successors: tensors in, (loss, report) out.

Theory
------
A policy π answers one question G times: a group. Rule-checked rewards r_1…r_G say how good each answer is, and the
group's own mean is the baseline, so no value network is needed (DeepSeekMath, arXiv 2402.03300 §4.1):

    A_i = (r_i − mean r) / std r                    all tokens of completion o_i share A_i
    ρ_it = π(o_it) / π_old(o_it)                    1 at the first update after sampling; π_old drew the tokens
    L = − Σ_i w_i Σ_t [ min(ρ_it A_i, clip(ρ_it, 1 − ε_low, 1 + ε_high) A_i) − β k3_it ]

While ρ = 1 this is plain policy gradient: ∇L = − Σ w_i A_i ∇log π. Every choice that follows alters one symbol.

* Clip. A token gives no gradient once its ratio has left [1 − ε_low, 1 + ε_high] in the direction A pushes. Raising
  ε_high alone (clip-higher, DAPO) lets unlikely tokens grow: at ε = 0.2 one of 1 % reaches 1.2 % and stops. R1's
  ε = 10 leaves only a guard against runaway ratios.
* Ratio. A reward belongs to a completion, not to a token, and single-token ratios are noisy weights. GSPO takes
  s_i = (π(o_i) / π_old(o_i))^(1/|o_i|) for all tokens of o_i: it is clipped whole. ∇s_i = s_i · mean_t ∇log π.
* CISPO. Clipping silences exactly the rare tokens that turn a thought ("wait"). Instead −sg(clip(ρ)) A log π: ρ only
  weighs, limited, and no token loses its gradient.
* Weight w_i, the same for all tokens of o_i. `response`, 1 / (N |o_i|): every completion counts the same, so a token
  of a long wrong answer is punished less, and wrong answers grow. `token`, 1 / Σ|o|: every token counts the same.
  `constant`, 1 / (N · limit): the unbiased policy gradient; its scale depends on the token limit.
* Deviation. Dividing by it lifts questions that are nearly always or nearly never solved; Dr. GRPO does without.
* KL. k3 = π_ref/π − log(π_ref/π) − 1 estimates KL(π ‖ π_ref) without bias from π's samples and is never negative.
* Sampler. The engine that samples rounds and schedules otherwise than the trainer, so the tokens come from a third
  policy μ. Weights min(π_old/μ, C), held constant, correct the gradient of the first term (truncated importance
  sampling, Yao et al. 2025); the masking form drops tokens above C instead of limiting them.
* A group whose rewards are all equal says nothing: its advantages are 0, and dynamic sampling (DAPO) draws others in
  its place. A truncated completion was never judged fairly: overlong filtering leaves it out.
* Teacher. In the place of rewards another model p may judge every token: A_it = log p(o_it) − log π_old(o_it). As
  E_π ∇log π = 0, this is on average the gradient of the reverse divergence KL(π ‖ p) at each place, over the beginnings
  that π itself writes, held fixed: on-policy distillation (GKD, arXiv 2306.13649 §3, λ = 1). A token answers for
  its own place alone, not for what becomes likelier after it (a discount of 0).

| preset    | ratio    | objective | ε_low, ε_high | β     | weight   | deviation |
|-----------|----------|-----------|---------------|-------|----------|-----------|
| `r1`      | token    | clip      | 10, 10        | 0.001 | response | yes       |
| `dapo`    | token    | clip      | 0.2, 0.28     | 0     | token    | yes       |
| `dr_grpo` | token    | clip      | 0.2, 0.2      | 0     | constant | no        |
| `gspo`    | sequence | clip      | 3e-4, 4e-4    | 0     | response | yes       |
| `cispo`   | token    | cispo     | 10, 0.2       | 0     | token    | yes       |

R1 prints ρ per sequence (eq. 1) without the length's root; DeepSeekMath's per-token form is what is trained in
practice, and what `r1` means here.

Layout
------
S tokens of N completions lie end to end, without padding; `owner` [S] names each token's completion, −1 for those
outside the loss (prompts, tool output, alignment). Values there are never read. All that couples completions, w and
the A of rewards, is computed once for the whole mini-batch ([N]), so that losses, gradients and reports of
micro-batches add up to those of the mini-batch, however it is split between completions (and between ranks, whose
gradients are then to be summed, not averaged). A completion must not be split: s_i needs all its tokens.
Computation is in float32, or float64 where the log-probabilities are.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fathom.config.policy import PolicyLoss
from fathom.errors import UserError

# Added to the deviation: rewards that differ by rounding alone must not become advantages of 1 (TRL's value).
_DEVIATION_EPSILON = 1e-4
# No ratio is taken beyond e^20: it would say nothing more, and inf · 0 in a gradient is NaN.
_LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyBatch:
    """All but the policy's own log-probabilities: S tokens of N completions. Log-probabilities are in nats."""

    owner: Tensor
    """[S] int64: the token's row in `weights`, −1 outside the loss."""
    advantages: Tensor
    """[S]: its completion's (`group_advantages`), or the token's own (`teacher_advantages`)."""
    weights: Tensor
    """[N], of `completion_weights` over the whole mini-batch; completions of weight 0 do not enter."""
    old_logprobs: Tensor
    """[S]: the trainer's before the first update with these samples; the policy's own where there is but one update."""
    reference_logprobs: Tensor | None = None
    """[S]; needed where `kl` > 0, else only reported."""
    sampler_logprobs: Tensor | None = None
    """[S]: the sampler's own, at the same temperature; needed for `sampler_correction`, else only reported."""
    entropy: Tensor | None = None
    """[S] of the policy's distributions; only reported."""
    teacher_logprobs: Tensor | None = None
    """[S]; only reported: advantages say already what follows from them."""

    def take(self, rows: Tensor) -> Self:
        """The tokens at `rows` [R] int64 of the same completions: constants, float32 where they are not float64."""
        names = ("advantages", "old_logprobs", "reference_logprobs", "sampler_logprobs", "entropy", "teacher_logprobs")
        given = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        return replace(self, owner=self.owner[rows], **{name: _wide(value.detach()[rows]) for name, value in given})


@dataclass(frozen=True)
class PolicyReport:
    """What a loss saw. Reports of micro-batches add up (`+`); `means` says them per token. All tensors are detached.

    clip_low, clip_high: share of tokens that the lower, the upper limit holds back (`cispo`: whose weight it limits)
    ratio: ρ (or s) · kl_old: KL(π_old ‖ π), how far this update has gone · entropy: in nats
    kl_reference: KL(π ‖ π_ref) · kl_sampler: KL(μ ‖ π_old), the gap between engine and trainer
    sampler_weight: importance weight as used · sampler_limited: share of tokens above the cap
    sampler_gap_max: largest |log π_old − log μ| of any token
    teacher_kl: mean of log π_old − log p over π_old's own tokens, an unbiased estimate of KL(π_old ‖ p)
    """

    tokens: Tensor
    """Scalar int64: tokens in the loss."""
    sums: dict[str, Tensor]
    """Each name of the above that this loss has inputs for, but sampler_gap_max: its sum over the tokens."""
    sampler_gap_max: Tensor | None

    def __add__(self, other: "PolicyReport") -> "PolicyReport":
        assert self.sums.keys() == other.sums.keys(), f"{list(self.sums)} {list(other.sums)}"
        gap = self.sampler_gap_max
        if gap is not None:
            gap = torch.maximum(gap, other.sampler_gap_max)
        sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        return PolicyReport(self.tokens + other.tokens, sums, gap)

    def means(self) -> dict[str, float]:
        """Every figure by name; 0 where there was no token."""
        tokens = max(1, int(self.tokens))
        means = {name: float(value) / tokens for name, value in self.sums.items()}
        return means if self.sampler_gap_max is None else means | {"sampler_gap_max": float(self.sampler_gap_max)}


def informative_groups(rewards: Tensor, group: Tensor) -> Tensor:
    """Which groups can teach something: rewards [N], group [N] int64 from 0 -> [groups] bool, rewards not all equal.

    Dynamic sampling (DAPO, arXiv 2503.14476 §3.2, eq. 11) keeps these and draws others until the batch is full. The
    paper asks whether some but not all answers are right: give the accuracies as rewards for just that.

    Raises `UserError` for a reward that is no finite number.
    """
    _refuse_non_numbers(rewards)
    extremes = [
        rewards.new_zeros(int(group.max()) + 1).scatter_reduce(0, group, rewards, kind, include_self=False)
        for kind in ("amin", "amax")
    ]
    return extremes[0] < extremes[1]


def group_advantages(rewards: Tensor, group: Tensor, settings: PolicyLoss) -> Tensor:
    """A_i = r_i − mean, or that over std + 1e-4: rewards [N], group [N] int64 from 0 -> [N] float32.

    DeepSeekMath (arXiv 2402.03300 §4.1.2) and Dr. GRPO (arXiv 2503.20783 §3.2). The deviation is that of a sample
    (G − 1), which the papers leave open and the common trainers use. Groups may differ in size. Where all rewards of a
    group are equal, and in a group of one, advantages are exactly 0.

    Raises `UserError` for a reward that is no finite number.
    """
    informative = informative_groups(rewards, group)
    rewards = _wide(rewards)
    size = torch.bincount(group)
    centred = rewards - (_per_group(rewards, group) / size)[group]
    if settings.divide_by_deviation:
        deviation = (_per_group(centred.square(), group) / (size - 1).clamp(min=1)).sqrt()
        centred = centred / (deviation[group] + _DEVIATION_EPSILON)
    # In floating point the mean of equal rewards may differ from them by a rounding, which a small deviation magnifies.
    return torch.where(informative[group], centred, 0.0)


def teacher_advantages(teacher_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """A_it = log p(o_it) − log π_old(o_it): both [S] in nats, at one temperature -> [S], a constant.

    On-policy distillation (GKD, arXiv 2306.13649): weighed with these, the policy gradient over π_old's own samples is
    that of KL(π ‖ p), summed over the places of the texts, whose beginnings are held fixed.
    """
    return (teacher_logprobs - old_logprobs).detach()


def completion_weights(
    lengths: Tensor, settings: PolicyLoss, *, max_tokens: int, truncated: Tensor | None = None
) -> Tensor:
    """w_i, what the loss of each token of completion i is multiplied by: [N] float32.

    Args:
        lengths: [N] int64, tokens in the loss of every completion of the mini-batch, over all micro-batches and ranks.
        settings: `response` gives 1 / (N |o_i|) (GRPO, GSPO), `token` 1 / Σ|o| (DAPO eq. 8, CISPO eq. 4), `constant`
            1 / (N · max_tokens) (Dr. GRPO).
        max_tokens: the most tokens a completion may have.
        truncated: [N] bool, who ran into that limit; needed where `drop_truncated`. A dropped completion has weight 0
            and no tokens in Σ|o|, but stays among the N, as one that is empty does: others count no more for it.
    """
    if settings.drop_truncated:
        assert truncated is not None, "drop_truncated needs to know which completions are truncated"
        lengths = lengths.masked_fill(truncated, 0)
    if settings.normalisation == "response":
        divisor = len(lengths) * lengths
    elif settings.normalisation == "token":
        divisor = lengths.sum().expand_as(lengths)
    else:
        divisor = torch.full_like(lengths, len(lengths) * max_tokens)
    return torch.where(lengths > 0, 1.0 / divisor, 0.0)


def policy_loss(logprobs: Tensor, batch: PolicyBatch, settings: PolicyLoss) -> tuple[Tensor, PolicyReport]:
    """The loss of the module's docstring, with the choices of `settings`.

    clip: PPO's surrogate (DeepSeekMath eq. 3, DAPO eq. 8; with sequence ratios GSPO, arXiv 2507.18071 eq. 5).
    cispo: −sg(clip(ρ)) A log π (MiniMax-M1, arXiv 2506.13585 eqs 4–5).
    The sampler's weights multiply these and leave the KL term alone.

    Args:
        logprobs: [S], the policy's, differentiable.
        batch: the rest; whole completions of one mini-batch.
        settings: the choices.

    Returns:
        (scalar loss, a sum over tokens: those of micro-batches add up; the report).
    """
    rows = ((batch.owner >= 0) & (batch.weights > 0)[batch.owner]).nonzero().squeeze(1)
    batch, logprobs = batch.take(rows), _wide(logprobs[rows])
    advantages, weights = batch.advantages.to(logprobs.dtype), batch.weights.to(logprobs.dtype)[batch.owner]
    log_ratio = logprobs - batch.old_logprobs
    ratio = _safe_exp(_mean_of_completion(log_ratio, batch) if settings.ratio == "sequence" else log_ratio)
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    if settings.objective == "clip":
        losses = -torch.minimum(ratio * advantages, clipped * advantages)
    else:
        losses = -clipped.detach() * advantages * logprobs
    if settings.sampler_correction != "none":
        losses = losses * _sampler_weights(batch, settings)
    if settings.kl > 0:
        assert batch.reference_logprobs is not None, "kl > 0 needs reference log-probabilities"
        losses = losses + settings.kl * k3(batch.reference_logprobs - logprobs)
    return (weights * losses).sum(), _report(logprobs.detach(), ratio.detach(), advantages, batch, settings)


def k3(log_ratio: Tensor) -> Tensor:
    """e^x − x − 1 ≥ 0 for x = log(p/q): averaged over samples of q it estimates KL(q ‖ p) without bias.

    Schulman, "Approximating KL divergence" (2020); DeepSeekMath eq. 4. x is limited to 20 from above.
    """
    x = log_ratio.clamp(max=_LARGEST_LOG_RATIO)
    return torch.expm1(x) - x


def _sampler_weights(batch: PolicyBatch, settings: PolicyLoss) -> Tensor:
    """min(π_old/μ, C), or 0 above C where masked: [S], without gradient."""
    assert batch.sampler_logprobs is not None, "sampler_correction needs the sampler's log-probabilities"
    weight = _safe_exp(batch.old_logprobs - batch.sampler_logprobs)
    if settings.sampler_correction == "truncate":
        return weight.clamp(max=settings.sampler_cap)
    return torch.where(weight > settings.sampler_cap, 0.0, weight)


@torch.no_grad()
def _report(
    logprobs: Tensor, ratio: Tensor, advantages: Tensor, batch: PolicyBatch, settings: PolicyLoss
) -> PolicyReport:
    """All arguments hold only the tokens in the loss."""
    low, high = ratio < 1 - settings.clip_low, ratio > 1 + settings.clip_high
    if settings.objective == "clip":
        low, high = low & (advantages < 0), high & (advantages > 0)
    seen = {"clip_low": low, "clip_high": high, "ratio": ratio, "kl_old": k3(logprobs - batch.old_logprobs)}
    if batch.entropy is not None:
        seen["entropy"] = batch.entropy
    if batch.reference_logprobs is not None:
        seen["kl_reference"] = k3(batch.reference_logprobs - logprobs)
    if batch.teacher_logprobs is not None:
        seen["teacher_kl"] = batch.old_logprobs - batch.teacher_logprobs
    gap = None
    if batch.sampler_logprobs is not None:
        difference = batch.old_logprobs - batch.sampler_logprobs
        gap = torch.cat((difference.abs(), difference.new_zeros(1))).amax()
        seen["kl_sampler"] = k3(difference)
        if settings.sampler_correction != "none":
            seen["sampler_weight"] = _sampler_weights(batch, settings)
            seen["sampler_limited"] = _safe_exp(difference) > settings.sampler_cap
    sums = {name: value.sum(dtype=logprobs.dtype) for name, value in seen.items()}
    return PolicyReport(torch.tensor(len(logprobs), device=logprobs.device), sums, gap)


def _mean_of_completion(values: Tensor, batch: PolicyBatch) -> Tensor:
    """values [S] -> [S], the mean over all tokens of the same completion."""
    completions = len(batch.weights)
    total = values.new_zeros(completions).index_add(0, batch.owner, values)
    length = torch.bincount(batch.owner, minlength=completions)
    return total[batch.owner] / length[batch.owner]


def _per_group(values: Tensor, group: Tensor) -> Tensor:
    """values [N] -> [groups], their sums."""
    return values.new_zeros(int(group.max()) + 1).index_add(0, group, values)


def _refuse_non_numbers(rewards: Tensor) -> None:
    wrong = (~rewards.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise UserError(
            f"the reward of completion {wrong[0]} is {float(rewards[wrong[0]])}: rewards must be finite numbers; "
            "look at the task's check and the reward weights"
        )


def _safe_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=_LARGEST_LOG_RATIO).exp()


def _wide(values: Tensor) -> Tensor:
    """float32, or float64 where it is that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
