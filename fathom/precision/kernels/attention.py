"""Absorbed latent attention of single tokens over a paged cache: one key of width C + R that all heads share.

In the absorbed form (DeepSeek-V2 App. C) a token's H queries meet the remembered latents themselves, and what they mix
is the first C numbers of the same rows. So a block of latents is read once for BLOCK_H heads and for both products,
which makes decoding a matrix product of BLOCK_H rows instead of H products of one: with H = 128 heads about 2·128 FLOP
for every byte read, near the balance of a Hopper GPU. The softmax is computed on the way (arXiv 2307.08691): a running
maximum and sum, what was mixed so far being scaled when the maximum rises.

A long context and few tokens would leave most of a GPU idle; so the pages of a token are divided among SPLITS programs,
whose parts are joined by a second kernel through their maxima and sums (flash decoding).

Widths that are no powers of two are filled up with zeros inside of the program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.precision.kernels.codes import multiply, narrow
from fathom.precision.kernels.family import Family, family_of

PAGE = 64
"""Positions in a page, as in `fathom.kernels.ops`."""


@triton.jit
def latent_kernel(
    q, pages, tables, visible, mixed, statistics, heads, table_width, pages_each, scale,
    C: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    CHUNK: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, WIDE)
    r = tl.arange(0, NARROW)
    s = tl.arange(0, BLOCK_S)
    # Large distances are added to the address, small ones per number: 64 bits each would take twice the registers.
    rows = q + token * heads * (C + R) + h[:, None] * (C + R)
    if CHUNK == WIDE:
        q_latent = tl.load(rows + c[None, :], mask=(h < heads)[:, None] & (c < C)[None, :], other=0.0)
    q_rope = tl.load(rows + C + r[None, :], mask=(h < heads)[:, None] & (r < R)[None, :], other=0.0)
    seen = tl.load(visible + token)
    largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, WIDE), tl.float32)
    begin = part * pages_each * PAGE_SIZE
    end = tl.minimum(seen, begin + pages_each * PAGE_SIZE)
    for first in range(begin, end, BLOCK_S):
        page = tl.load(tables + token * table_width + first // PAGE_SIZE).to(tl.int64)
        inside = first + s < end
        places = pages + page * PAGE_SIZE * (C + R) + (first % PAGE_SIZE + s)[:, None] * (C + R)
        rope = tl.load(places + C + r[None, :], mask=inside[:, None] & (r < R)[None, :], other=0.0)
        scores = multiply(q_rope, tl.trans(rope))
        if CHUNK == WIDE:
            latent = tl.load(places + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
            scores += multiply(q_latent, tl.trans(latent))
        else:
            for chunk in range(WIDE // CHUNK):  # not unrolled: queries would all be kept in registers
                d = chunk * CHUNK + tl.arange(0, CHUNK)
                q_part = tl.load(rows + d[None, :], mask=(h < heads)[:, None] & (d < C)[None, :], other=0.0)
                part_of = tl.load(places + d[None, :], mask=inside[:, None] & (d < C)[None, :], other=0.0)
                scores += multiply(q_part, tl.trans(part_of))
        scores = tl.where(inside[None, :], scores * scale, float("-inf"))
        # As whole numbers would a maximum see what is none; here it may pass, and the sum then is none too.
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        chances = tl.exp(scores - higher[:, None])
        shrink = tl.exp(largest - higher)
        total = total * shrink + tl.sum(chances, axis=1)
        if CHUNK != WIDE:
            latent = tl.load(places + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        acc = acc * shrink[:, None] + multiply(narrow(chances, latent.dtype), latent)
        largest = higher
    line = (tl.program_id(2) * tl.num_programs(0) + token) * heads
    place = mixed + line * C + h[:, None] * C + c[None, :]
    tl.store(place, acc, mask=(h < heads)[:, None] & (c < C)[None, :])
    tl.store(statistics + line * 2 + h * 2, largest, mask=h < heads)
    tl.store(statistics + line * 2 + h * 2 + 1, total, mask=h < heads)


@triton.jit
def join_kernel(mixed, statistics, out, lines, C: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDE)
    largest = tl.load(statistics + line * 2)
    for part in range(1, SPLITS):
        largest = tl.maximum(largest, tl.load(statistics + (part * lines + line) * 2))
    acc = tl.zeros((WIDE,), tl.float32)
    total = 0.0
    for part in range(SPLITS):
        there = part * lines + line
        weight = tl.exp(tl.load(statistics + there * 2) - largest)
        total += weight * tl.load(statistics + there * 2 + 1)
        acc += weight * tl.load(mixed + there * C + c, mask=c < C, other=0.0)
    tl.store(out + line * C + c, narrow(acc / total, out.dtype.element_ty), mask=c < C)


def latent_decode(
    q: Tensor, pages: Tensor, tables: Tensor, visible: Tensor, value_width: int, scale: float, *, splits: int = 1
) -> Tensor:
    """Attention of single tokens over pages of latents.

    Args:
        q: [T, H, C + R], absorbed queries and rotated ones.
        pages: [P, 64, C + R] of the same dtype: latents and the rotated key that all heads share.
        tables: [T, width] int32, for every token the pages of its sequence in order.
        visible: [T] int32, how many positions each token sees, at least 1.
        value_width: C, the part of a row that is mixed.
        scale: factor on the scores.
        splits: programs among which a token's pages are divided.

    Returns:
        [T, H, C] in the dtype of `q`.
    """
    T, heads, width = q.shape
    C, R = value_width, width - value_width
    wide, narrow = max(16, triton.next_power_of_2(C)), max(16, triton.next_power_of_2(R))
    mixed = q.new_empty(splits, T, heads, C, dtype=torch.float32)
    statistics = q.new_empty(splits, T, heads, 2, dtype=torch.float32)
    cut = blocks(wide, family_of(q.device))
    out, table_width = q.new_empty(T, heads, C), tables.shape[1]
    latent_kernel[(T, triton.cdiv(heads, cut["BLOCK_H"]), splits)](
        q.contiguous(), pages.contiguous(), tables.contiguous(), visible, mixed, statistics, heads, table_width,
        triton.cdiv(table_width, splits), scale,
        C=C, R=R, WIDE=wide, NARROW=narrow, PAGE_SIZE=PAGE, **cut, **options(family_of(q.device)),
    )  # fmt: skip
    join_kernel[(T * heads,)](mixed, statistics, out, T * heads, C=C, WIDE=wide, SPLITS=splits)
    return out


def blocks(wide: int, family: Family) -> dict[str, int]:
    """Heads and positions of a program's block, and how much of a latent of width `wide` is scored at a time.

    Hopper's matrix units read the latents from shared memory and have registers for the queries all along. Where both
    come from registers, queries are read again from the cache, a piece at a time.
    """
    if family.reads_shared:
        return {"BLOCK_H": 16, "BLOCK_S": 64, "CHUNK": wide}
    return {"BLOCK_H": 16, "BLOCK_S": 32, "CHUNK": min(wide, 64)}


def options(family: Family) -> dict[str, int]:
    """How it is compiled: Hopper's shared memory has room for the next block while one is multiplied."""
    return {"num_warps": 8, "num_stages": 2 if family.reads_shared else 1}
