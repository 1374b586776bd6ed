"""Log-probabilities of single tokens and entropies, without holding the logits.

Theory
------
Reinforcement learning weights each token by what its own log-probability turns out to be, so no gradient can be made
on the way forward as for a cross entropy (`fathom.model.cross_entropy`). What it needs later is the softmax:

    d logprob / d logits = (onehot(target) - p) / temperature

* Where there are kernels, p is kept from forward to backward, unnormalised and in bfloat16, as long as that takes no
  more than `KEPT_BYTES`: 100 MB for 1,024 tokens of 49,152 words. The target's own part, 1 - p, is made from its
  log-probability, because it may be all but 0. Beyond that, and elsewhere, the logits are made again: four products
  instead of three.
* Backward does nothing for tokens that no gradient reaches: prompts, groups of equal rewards and clipped tokens.
* The logits are sums in float32 (of products that have hidden's precision): rounding a logit of 20 to bfloat16 moves
  the log-probability by up to 0.06, which is more than the gap between sampler and trainer that the ratio should show
  (MiniMax-M1, arXiv 2506.13585 §3.2, found the same and keeps its head in float32).
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.kernels import ops, training
from fathom.kernels.panels import Packed, pack
from fathom.model.transformer import Transformer

CHUNK = 256
KEPT_BYTES = 1 << 28


@dataclass(frozen=True)
class Head:
    """A head's weight, made ready for many products. It must not change as long as this is in use."""

    weight: Tensor
    """[V, d], what gradients are for."""
    rounded: Tensor
    """[V, d] in the dtype of the hidden states."""
    packed: Packed | None
    """The same for the engine's own product, where there are kernels."""

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> Self:
        """For hidden states of `dtype`."""
        rounded = weight.detach().to(dtype)
        packed = pack(rounded) if dtype is torch.bfloat16 and ops.usable(rounded) else None
        return cls(weight, rounded, packed)

    @classmethod
    def of_model(cls, model: Transformer) -> Self:
        """That of `model`, in the precision that it computes in."""
        weight = model.lm_head.weight
        return cls.of(weight, model.compute_dtype or weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, d] -> [N, V], products of hidden's precision whose sums are not rounded."""
        if self.packed is not None:
            return ops.linear(hidden, self.packed, wide=True)
        wide = _wide_dtype(hidden)
        return hidden.to(wide) @ self.rounded.to(wide).t()


def logprobs_and_entropy(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float = 1.0, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Log-probability of every target under softmax(hidden weight^T / temperature), and that distribution's entropy.

    Args:
        hidden: [S, d], bfloat16, float32 or float64.
        head: of hidden's dtype; its weight [V, d] may have any floating type, in which the gradient comes back.
        targets: [S] int64, in 0..V-1.
        temperature: that of the distribution asked about, > 0.
        chunk: tokens per chunk of logits; with `KEPT_BYTES` it bounds the memory.

    Returns:
        (log-probabilities [S], differentiable, each with a gradient of its own; entropies [S] in nats, detached).
        Both float32 (float64 for float64 inputs).

    Raises:
        ValueError: if the shapes do not fit together, a target is no word, or the temperature is not positive.
    """
    weight = head.weight
    if hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"logprobs_and_entropy: shapes do not fit: hidden {hidden.shape}, weight {weight.shape}, "
            f"targets {targets.shape}"
        )
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        raise ValueError(
            f"logprobs_and_entropy: targets must be in 0..{len(weight) - 1}, not {int(targets.min())} to "
            f"{int(targets.max())}"
        )
    if not temperature > 0:
        raise ValueError(f"logprobs_and_entropy: the temperature must be positive, not {temperature}")
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, head, targets, temperature, chunk)
    return logprobs, entropies


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, head: Head, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        count, words = len(targets), len(weight)
        chances = None
        if head.packed is not None and any(ctx.needs_input_grad) and 2 * count * words <= KEPT_BYTES:
            chances = hidden.new_empty(count, words)
        results = torch.empty(3, count, dtype=_wide_dtype(hidden), device=hidden.device)
        for first in range(0, count, chunk):
            part = slice(first, first + chunk)
            logits = head.logits(hidden[part])
            own = None if chances is None else chances[part]
            make = _statistics if head.packed is None else training.softmax_rows
            for result, values in zip(results, make(logits, targets[part], temperature, own), strict=True):
                result[part] = values
        logprobs, entropies, totals = (result.clone() for result in results)
        ctx.head, ctx.temperature, ctx.chunk = head, temperature, chunk
        ctx.save_for_backward(hidden, targets, logprobs, totals, chances)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *_ = ctx.saved_tensors
        head, (need_dhidden, need_dweight) = ctx.head, ctx.needs_input_grad[:2]
        dhidden = torch.zeros_like(hidden) if need_dhidden else None
        dweight: Tensor | None = None
        for rows in dlogprobs.nonzero().squeeze(1).split(ctx.chunk):
            dlogits = _logit_gradients(ctx, rows, dlogprobs[rows] / ctx.temperature)
            if dhidden is not None:
                dhidden[rows] = dlogits @ head.rounded
            if need_dweight:
                part = (dlogits.t() @ hidden[rows]).to(_wide_dtype(hidden))
                dweight = part if dweight is None else dweight.add_(part)
        if need_dweight:
            dweight = torch.zeros_like(head.weight) if dweight is None else dweight.to(head.weight.dtype)
        return dhidden, dweight, *(None,) * 4


def _logit_gradients(ctx: Any, rows: Tensor, factors: Tensor) -> Tensor:
    """factors · (onehot - p) [N, V] for `rows` [N], in the dtype of the hidden states."""
    hidden, targets, logprobs, totals, chances = ctx.saved_tensors
    head, targets = ctx.head, targets[rows]
    if chances is not None:
        return training.softmax_gradients(chances, rows, targets, totals[rows], logprobs[rows], factors)
    logits = head.logits(hidden[rows])
    if head.packed is not None:
        chances = hidden.new_empty(logits.shape)
        training.softmax_rows(logits, targets, ctx.temperature, chances)
        all_rows = torch.arange(len(rows))
        return training.softmax_gradients(chances, all_rows, targets, totals[rows], logprobs[rows], factors)
    minus_p = torch.softmax(logits.div_(ctx.temperature), dim=1).neg_()
    onehot_minus_p = minus_p.scatter_add_(1, targets[:, None], minus_p.new_ones(len(rows), 1))
    return onehot_minus_p.mul_(factors[:, None]).to(hidden.dtype)


def _statistics(logits: Tensor, targets: Tensor, temperature: float, _: None) -> tuple[Tensor, Tensor, Tensor]:
    """`training.softmax_rows` for tensors without kernels, on any device."""
    below_best = logits.div_(temperature)
    below_best = below_best.sub_(below_best.amax(1, keepdim=True))
    chances = below_best.exp()
    totals = chances.sum(1)
    logprobs = below_best.gather(1, targets[:, None]).squeeze(1) - totals.log()
    # -sum(p log p) as a sum of terms that are none of them negative: a small entropy keeps its digits.
    return logprobs, totals.log() - chances.mul_(below_best).sum(1) / totals, totals


def _wide_dtype(hidden: Tensor) -> torch.dtype:
    """float32, or float64 beside float64."""
    return torch.promote_types(hidden.dtype, torch.float32)
