"""Products of FP8 factors as tensor cores make them, and what promotion repairs (DeepSeek-V3 §3.3.2, §3.5.2).

    y[m, n] = Σ over blocks b of K:  a_scale[m, b] · w_scale[n, b] · Σ over the 128 k of b:  a[m, k] · w[n, k]

The inner sum runs over codes, in the multiplier's own accumulator; the outer one over float32 registers outside of it,
where scales are multiplied in. Taking the inner sum out every 128 numbers is *promotion*.

Two accumulators are told apart here:

* `exact`: the inner sum has no error and is rounded to float32 once. Products of two e4m3 numbers are multiples of 2⁻¹⁸
  below 2¹⁸, so that float64 holds the sum of millions of them; this is the definition that every kernel is held to.
* `hopper`: 14 bits. An instruction takes 32 products, shifts them to the largest exponent among them, drops what falls
  off below the 14th bit and adds; the sum is added to the register in the same way. Over K = 4096 without promotion
  what falls off adds up to percents.

Both factors may have their scales in tiles, or the second in 128×128 blocks as weights do.
"""

from typing import Literal

import torch
from torch import Tensor

from fathom.precision.tiles import TILE, Tiles

Accumulator = Literal["exact", "hopper"]

INSTRUCTION = 32
"""Products that one instruction of Hopper's FP8 multipliers adds up."""
HOPPER_BITS = 14


def scaled_product(
    a: Tiles, w: Tiles, *, accumulator: Accumulator = "exact", promote_every: int | None = TILE
) -> Tensor:
    """a [M, K] times wᵀ: [M, N] float32.

    Args:
        a: codes [M, K], scales [M, ⌈K/128⌉].
        w: codes [N, K], scales [N, ⌈K/128⌉] in tiles, or [⌈N/128⌉, ⌈K/128⌉] in blocks.
        accumulator: see above.
        promote_every: how many of K the accumulator takes, a multiple of 128; None is all of them, which needs scales
            that do not change along K.

    Raises:
        ValueError: if shapes do not fit together, `promote_every` is no multiple of 128, or scales change where there
            is no promotion.
    """
    width = a.codes.shape[1]
    w_scales = rows_of_blocks(w)
    if w.codes.shape[1] != width or a.scales.shape[1] != w_scales.shape[1] or len(w_scales) != len(w.codes):
        raise ValueError(f"scaled_product: shapes do not fit: {_shapes(a)} and {_shapes(w)}")
    step = max(width, 1) if promote_every is None else promote_every
    if promote_every is not None and (step < TILE or step % TILE):
        raise ValueError(f"scaled_product: promote_every is {step}, which is no multiple of {TILE}")
    if step > TILE and not (_constant(a.scales) and _constant(w_scales)):
        raise ValueError(f"scaled_product: scales change along K, which sums of {step} numbers cannot heed")
    left, right = a.codes.double(), w.codes.double()
    y = torch.zeros(left.shape[0], right.shape[0], device=left.device)
    for begin in range(0, width, step):
        block, tile = slice(begin, begin + step), begin // TILE
        inner = _INNER[accumulator](left[:, block], right[:, block])
        y += inner * (a.scales[:, tile, None] * w_scales[None, :, tile])
    return y


def rows_of_blocks(w: Tiles) -> Tensor:
    """Scales of every row of `w` [N, ⌈K/128⌉], be they in tiles or in blocks."""
    rows = w.codes.shape[0]
    return w.scales if w.scales.shape[0] == rows else w.scales.repeat_interleave(TILE, dim=0)[:rows]


def _exact(a: Tensor, w: Tensor) -> Tensor:
    """Codes [M, k] and [N, k] float64 -> sums of products [M, N], rounded once to float32."""
    return (a @ w.T).float()


def _hopper(a: Tensor, w: Tensor) -> Tensor:
    """As `_exact`, in 14 bits."""
    total = a.new_zeros(a.shape[0], w.shape[0])
    for begin in range(0, a.shape[1], INSTRUCTION):
        some = slice(begin, begin + INSTRUCTION)
        added = _add_aligned(a[:, None, some] * w[None, :, some])
        total = _add_aligned(torch.stack((total, added), dim=-1))
    return total.float()


def _add_aligned(terms: Tensor) -> Tensor:
    """[…, n] -> their sum […]: each in 14 bits below the largest's highest, and the sum too."""
    unit = _unit(terms.abs().amax(dim=-1, keepdim=True))
    total = (terms / unit).floor_().sum(dim=-1) * unit.squeeze(-1)  # shifting right rounds down, signs included
    unit = _unit(total.abs())
    return (total / unit).floor_() * unit


def _unit(largest: Tensor) -> Tensor:
    """What the lowest of 14 bits is worth where the highest is that of `largest`; 1 for zero and for no number."""
    exponent = torch.frexp(largest).exponent
    unit = torch.ldexp(torch.ones_like(largest), exponent - HOPPER_BITS)
    return torch.where((largest > 0) & largest.isfinite(), unit, 1.0)


_INNER = {"exact": _exact, "hopper": _hopper}


def _constant(scales: Tensor) -> bool:
    return bool(((scales == scales[:, :1]) | (scales.isnan() & scales[:, :1].isnan())).all())


def _shapes(factor: Tiles) -> str:
    return f"{list(factor.codes.shape)} with scales {list(factor.scales.shape)}"
