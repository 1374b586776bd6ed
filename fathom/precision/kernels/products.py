"""Products of FP8 factors with promotion: y = Σ over blocks of 128 of K, a_scale · w_scale · (codes · codes).

One program makes BLOCK_M × BLOCK_N outputs. Every 128 of K it starts a fresh sum in the matrix units (on Hopper four
instructions of 32, which keep 14 bits) and adds it, times both scales, to float32 registers: the promotion of
DeepSeek-V3 §3.3.2. A program lies in one column of weight blocks.

Where the matrix units take e4m3 (Hopper, Blackwell) codes go in as they are. gfx942 takes an e4m3 with another bias,
whose largest number is 240, and gfx1100 takes none: there codes become half precision, which holds all of them, at half
of the FP8 rate and twice the memory inside. The sums are float32 on all of them.

A stack of experts is the same kernel: rows come sorted by expert, a table says where each program's rows begin and end
and which matrix they meet (`group_tiles`), and an index may say where each row is read. Programs are numbered so that
neighbours share columns of weights, which then stay in the second-level cache (as in Triton's matrix product tutorial).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.precision.kernels.codes import TILE, half_of, narrow
from fathom.precision.kernels.family import Family, family_of
from fathom.precision.kernels.quantise import group_tiles
from fathom.precision.tiles import Tiles

NEIGHBOURS = 8
"""Programs along M that share their columns of weights one after another."""


@triton.jit
def product_kernel(
    a, a_scales, w, w_scales, at, begins, stops, groups, y, M, N, K,
    GROUPED: tl.constexpr, GATHER: tl.constexpr, IN_BLOCKS: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    # Which of the outputs: TOGETHER neighbours along M, then the next along N.
    down = tl.num_programs(0)
    across = tl.num_programs(1)
    number = tl.program_id(0) + tl.program_id(1) * down
    first = number // (TOGETHER * across) * TOGETHER
    height = tl.minimum(down - first, TOGETHER)
    piece = first + number % (TOGETHER * across) % height
    column = number % (TOGETHER * across) // height

    begin = piece * BLOCK_M
    stop = M
    if GROUPED:
        begin = tl.load(begins + piece)
        stop = tl.load(stops + piece)
        group = tl.load(groups + piece).to(tl.int64)
        w += group * N * K
        w_scales += group * tl.cdiv(N, TILE) * tl.cdiv(K, TILE)
    if begin < stop:
        tiles = tl.cdiv(K, TILE)
        m = begin + tl.arange(0, BLOCK_M)
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        line = n.to(tl.int64)
        row = tl.load(at + m, mask=m < stop, other=0).to(tl.int64) if GATHER else m.to(tl.int64)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for tile in range(tiles):
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for part in tl.static_range(TILE // STEP):
                k = tile * TILE + part * STEP + tl.arange(0, STEP)
                inside = k < K
                a_codes = tl.load(
                    a + row[:, None] * K + k[None, :], mask=(m < stop)[:, None] & inside[None, :], other=0
                )
                w_codes = tl.load(w + line[None, :] * K + k[:, None], mask=(n < N)[None, :] & inside[:, None], other=0)
                if NATIVE:
                    a_codes = a_codes.to(tl.float8e4nv, bitcast=True)
                    sums = tl.dot(a_codes, w_codes.to(tl.float8e4nv, bitcast=True), sums)
                else:
                    sums = tl.dot(half_of(a_codes), half_of(w_codes), sums)
            a_scale = tl.load(a_scales + row * tiles + tile, mask=m < stop, other=0.0)
            if IN_BLOCKS:
                w_scale = tl.load(w_scales + n // TILE * tiles + tile, mask=n < N, other=0.0)
            else:
                w_scale = tl.load(w_scales + n * tiles + tile, mask=n < N, other=0.0)
            total += sums * (a_scale[:, None] * w_scale[None, :])
        place = y + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(place, narrow(total, y.dtype.element_ty), mask=(m < stop)[:, None] & (n < N)[None, :])


def scaled_product(a: Tiles, w: Tiles, *, in_blocks: bool, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a [M, K] in tiles of rows times wᵀ: [M, N] in `dtype`.

    `w` [N, K] has its scales `in_blocks` [⌈N/128⌉, ⌈K/128⌉], or in tiles of rows [N, ⌈K/128⌉] as the gradient of a
    weight needs.
    """
    return _launch(a, w, None, None, dtype, in_blocks=in_blocks)


def grouped_product(
    a: Tiles, at: Tensor | None, ends: Tensor, w: Tiles, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The rows a[at] of each group times their expert's matrix: [M, N] in `dtype`; behind the last group undefined.

    Args:
        a: codes [rows, K] in tiles of rows.
        at: [M] int32; None: the rows as they are.
        ends: [E] int32, the row before which each group ends; groups may be empty.
        w: codes [E, N, K], scales [E, ⌈N/128⌉, ⌈K/128⌉].
        dtype: of the result.
    """
    return _launch(a, w, at, ends, dtype, in_blocks=True)


class Launch(NamedTuple):
    """How a product is cut and compiled."""

    constants: dict[str, int]
    options: dict[str, int]


def launch_options(family: Family, *, in_blocks: bool, grouped: bool, rows: int) -> Launch:
    """For `rows` rows, weights being `in_blocks` or in tiles.

    Experts' groups end anywhere, so that shorter pieces of them waste less. Scales of tiles, and codes that are
    widened, take registers of their own: larger blocks would not fit (`targets.py` says what is left).
    """
    native = family.multiplies_e4m3
    roomy = native and in_blocks and not grouped and rows > 64
    constants = {"BLOCK_M": 128 if roomy else 64, "BLOCK_N": 128 if native else 64, "STEP": 128 if native else 32}
    return Launch(constants | {"TOGETHER": NEIGHBOURS}, {"num_warps": 8, "num_stages": 3 if native else 1})


def _launch(
    a: Tiles, w: Tiles, at: Tensor | None, ends: Tensor | None, dtype: torch.dtype, *, in_blocks: bool
) -> Tensor:
    codes, device = a.codes.view(torch.uint8), a.codes.device
    M, (N, K) = len(codes) if at is None else len(at), w.codes.shape[-2:]
    y = torch.empty(M, N, dtype=dtype, device=device)
    family = family_of(device)
    launched = launch_options(family, in_blocks=in_blocks, grouped=ends is not None, rows=M)
    block_m = launched.constants["BLOCK_M"]
    if ends is None:
        pieces, table = triton.cdiv(M, block_m), (codes, codes, codes)
    else:
        table = group_tiles(ends, M, block_m)
        pieces = len(table[0])
    product_kernel[(pieces, triton.cdiv(N, launched.constants["BLOCK_N"]))](
        codes, a.scales, w.codes.view(torch.uint8), w.scales, codes if at is None else at, *table, y, M, N, K,
        GROUPED=ends is not None, GATHER=at is not None, IN_BLOCKS=in_blocks, NATIVE=family.multiplies_e4m3,
        **launched.constants, **launched.options,
    )  # fmt: skip
    return y
