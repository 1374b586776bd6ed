"""Activations and weights to e4m3, each number read once.

All four kernels are bound by memory: two bytes in and one out per number. A program takes a block of 128 columns (or
rows) in registers, finds the largest magnitude of each tile by whole-number comparison, which no NaN escapes, and
writes codes and scales. `quantise_both` makes the tiles of the forward product and of the weight's gradient from one
reading of an activation gradient, where two kernels would read it twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.precision.kernels.codes import TILE, codes_of, magnitude_bits, scale_of
from fathom.precision.tiles import Tiles


@triton.jit
def rows_kernel(x, codes, scales, M, K, stride, POWER_OF_TWO: tl.constexpr, BLOCK_M: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    k = tile * TILE + tl.arange(0, TILE)
    inside = (m < M)[:, None] & (k < K)[None, :]
    row = m.to(tl.int64)[:, None]
    values = tl.load(x + row * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(magnitude_bits(values), axis=1), POWER_OF_TWO)
    each = tl.broadcast_to(scale[:, None], (BLOCK_M, TILE))
    tl.store(codes + row * K + k[None, :], codes_of(values, each), mask=inside)
    tl.store(scales + m.to(tl.int64) * tl.cdiv(K, TILE) + tile, scale, mask=m < M)


@triton.jit
def columns_kernel(
    x, at, begins, ends, codes, scales, K, stride,
    POWER_OF_TWO: tl.constexpr, GATHER: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    begin = tl.load(begins + tile)
    end = tl.load(ends + tile)
    m = begin + tl.arange(0, TILE)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (m < end)[:, None] & (k < K)[None, :]
    source = tl.load(at + m, mask=m < end, other=0) if GATHER else m
    address = source.to(tl.int64)[:, None] * stride + k[None, :]
    values = tl.load(x + address, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(magnitude_bits(values), axis=0), POWER_OF_TWO)
    each = tl.broadcast_to(scale[None, :], (TILE, BLOCK_K))
    tl.store(codes + m.to(tl.int64)[:, None] * K + k[None, :], codes_of(values, each), mask=inside)
    tl.store(scales + tile.to(tl.int64) * K + k, scale, mask=(k < K) & (begin + 0 * k < end))


@triton.jit
def both_kernel(x, row_codes, row_scales, column_codes, column_scales, M, K, stride, POWER_OF_TWO: tl.constexpr):
    tall = tl.program_id(0)
    wide = tl.program_id(1)
    m = tall * TILE + tl.arange(0, TILE)
    k = wide * TILE + tl.arange(0, TILE)
    inside = (m < M)[:, None] & (k < K)[None, :]
    row = m.to(tl.int64)[:, None]
    values = tl.load(x + row * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    bits = magnitude_bits(values)
    along = scale_of(tl.max(bits, axis=1), POWER_OF_TWO)
    down = scale_of(tl.max(bits, axis=0), POWER_OF_TWO)
    place = row * K + k[None, :]
    tl.store(row_codes + place, codes_of(values, tl.broadcast_to(along[:, None], (TILE, TILE))), mask=inside)
    tl.store(column_codes + place, codes_of(values, tl.broadcast_to(down[None, :], (TILE, TILE))), mask=inside)
    tl.store(row_scales + m.to(tl.int64) * tl.cdiv(K, TILE) + wide, along, mask=m < M)
    tl.store(column_scales + tall.to(tl.int64) * K + k, down, mask=k < K)


@triton.jit
def blocks_kernel(w, codes, scales, N, K, POWER_OF_TWO: tl.constexpr):
    stack = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (n < N)[:, None] & (k < K)[None, :]
    place = stack * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    values = tl.load(w + place, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(magnitude_bits(values), axis=1), axis=0), POWER_OF_TWO)
    tl.store(codes + place, codes_of(values, tl.full((TILE, TILE), 1.0, tl.float32) * scale), mask=inside)
    tl.store(scales + (stack * tl.cdiv(N, TILE) + tl.program_id(0)) * tl.cdiv(K, TILE) + tl.program_id(1), scale)


def quantise_rows(x: Tensor, *, power_of_two: bool = False) -> Tiles:
    """x [M, K], float32 or bfloat16, in 1×128 tiles: codes [M, K], scales [M, ⌈K/128⌉]."""
    x = _unit_stride(x)
    (M, K), block = x.shape, 16
    codes, scales = _codes(x), x.new_empty(M, triton.cdiv(K, 128), dtype=torch.float32)
    rows_kernel[(triton.cdiv(M, block), triton.cdiv(K, 128))](
        x, codes, scales, M, K, x.stride(0), POWER_OF_TWO=power_of_two, BLOCK_M=block
    )
    return Tiles(codes.view(torch.float8_e4m3fn), scales)


def quantise_columns(
    x: Tensor, at: Tensor | None = None, ends: Tensor | None = None, *, power_of_two: bool = False
) -> Tiles:
    """The rows x[at] of each group in 128×1 tiles of their own: codes [M, K], scales [tiles of all groups or more, K].

    Args:
        x: [rows, K], float32 or bfloat16.
        at: [M] int32, the row of `x` that each row is; None: the rows as they are.
        ends: [E] int32, the row before which each group ends; None: one group.
        power_of_two: of the scales.
    """
    x = _unit_stride(x)
    M, K, block = len(x) if at is None else len(at), x.shape[1], 32
    ends = torch.tensor([M], dtype=torch.int32, device=x.device) if ends is None else ends
    begins, stops, _ = group_tiles(ends, M, 128)
    codes = x.new_empty(M, K, dtype=torch.uint8)
    scales = x.new_zeros(len(begins), K, dtype=torch.float32)
    columns_kernel[(len(begins), triton.cdiv(K, block))](
        x, x if at is None else at, begins, stops, codes, scales, K, x.stride(0),
        POWER_OF_TWO=power_of_two, GATHER=at is not None, BLOCK_K=block,
    )  # fmt: skip
    return Tiles(codes.view(torch.float8_e4m3fn), scales)


def quantise_both(x: Tensor, *, power_of_two: bool = False) -> tuple[Tiles, Tiles]:
    """x [M, K] as `quantise_rows` and as `quantise_columns` of one group, read once."""
    x = _unit_stride(x)
    M, K = x.shape
    tall, wide = triton.cdiv(M, 128), triton.cdiv(K, 128)
    rows, columns = (_codes(x) for _ in range(2))
    along, down = x.new_empty(M, wide, dtype=torch.float32), x.new_empty(tall, K, dtype=torch.float32)
    both_kernel[(tall, wide)](x, rows, along, columns, down, M, K, x.stride(0), POWER_OF_TWO=power_of_two, num_warps=8)
    return Tiles(rows.view(torch.float8_e4m3fn), along), Tiles(columns.view(torch.float8_e4m3fn), down)


def quantise_blocks(w: Tensor, *, power_of_two: bool = False) -> Tiles:
    """w [E, N, K], float32 or bfloat16, in 128×128 blocks: codes [E, N, K], scales [E, ⌈N/128⌉, ⌈K/128⌉]."""
    w = w.contiguous()
    E, N, K = w.shape
    down, across = triton.cdiv(N, 128), triton.cdiv(K, 128)
    codes, scales = _codes(w), w.new_empty(E, down, across, dtype=torch.float32)
    blocks_kernel[(down, across, E)](w, codes, scales, N, K, POWER_OF_TWO=power_of_two, num_warps=16)
    return Tiles(codes.view(torch.float8_e4m3fn), scales)


def group_tiles(ends: Tensor, rows: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces of at most `height` rows that the groups fall into: where each begins and stops, and its group, int32.

    `ends` [E] int32 of the groups of `rows` rows. There are rows // height + E of them, whatever the groups are, so
    that nothing waits for the device; those that are not needed begin where they stop.
    """
    begins_of_groups = torch.cat((ends.new_zeros(1), ends[:-1]))
    pieces = (ends - begins_of_groups + height - 1) // height
    last = pieces.cumsum(0)
    number = torch.arange(rows // height + len(ends), device=ends.device)
    group = torch.searchsorted(last, number, right=True)
    used = group < len(ends)
    group = group.clamp(max=len(ends) - 1)
    begin = begins_of_groups[group] + (number - (last - pieces)[group]) * height
    stop = torch.minimum(begin + height, ends[group])
    begin, stop = (torch.where(used, t, 0).to(torch.int32) for t in (begin, stop))
    return begin, stop, group.to(torch.int32)


def _codes(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
