"""The pieces of FP8 training in plain PyTorch, for devices without kernels: the functions of `fathom.kernels.tiles`.

Products are float32 products of codes, tile by tile; fast enough to study, and what the kernels are compared with.
"""

import itertools

import torch
from torch import Tensor

from fathom.precision import e5m6
from fathom.precision.tiles import TILE, Tiles, dequantise_rows, quantise_blocks, quantise_columns, quantise_rows


def tile_rows(x: Tensor, *, power_of_two: bool) -> tuple[Tiles, Tensor]:
    """As `fathom.kernels.tiles.tile_rows`."""
    return counted(quantise_rows(x, power_of_two=power_of_two))


def tile_columns(x: Tensor | Tiles, at: Tensor | None, ends: Tensor, *, power_of_two: bool) -> tuple[Tiles, Tensor]:
    """As `fathom.kernels.tiles.tile_columns`."""
    wide = dequantise_rows(x) if isinstance(x, Tiles) else x
    wide = wide if at is None else wide[at]
    codes, scales = zip(*(quantise_columns(wide[p], power_of_two=power_of_two) for p in parts(ends)), strict=True)
    return counted(Tiles(_cat_codes(codes), torch.cat(scales)))


def tile_blocks(w: Tensor) -> tuple[Tiles, Tensor]:
    """As `fathom.kernels.tiles.tile_blocks`."""
    codes, scales = zip(*map(quantise_blocks, w), strict=True)
    return counted(Tiles(_cat_codes(codes).view_as(w), torch.stack(scales)))


def untile_rows(x: Tiles) -> Tensor:
    """As `fathom.kernels.tiles.untile_rows`."""
    return dequantise_rows(x).to(torch.bfloat16)


def pack12(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `fathom.kernels.tiles.pack12`."""
    packed, scales = e5m6.pack_e5m6(x)
    return packed, scales, scales.isnan().sum()


def unpack12(packed: Tensor, scales: Tensor, width: int) -> Tensor:
    """As `fathom.kernels.tiles.unpack12`."""
    return e5m6.unpack_e5m6(packed, scales, width).to(torch.bfloat16)


def grouped(x: Tiles, at: Tensor | None, ends: Tensor, w: Tiles, *, columns: bool) -> Tensor:
    """As `fathom.kernels.tiles.grouped`; sides of any size."""
    _, N, K = w.codes.shape
    codes, scales = (x.codes, x.scales) if at is None else (x.codes.view(torch.uint8)[at], x.scales[at])
    wide, y = codes.view(torch.float8_e4m3fn).float(), scales.new_zeros(len(codes), K if columns else N)
    for part, matrix, of_blocks in zip(parts(ends), w.codes, w.scales, strict=True):
        weights, blocks = (matrix.float().T, of_blocks.T) if columns else (matrix.float(), of_blocks)
        rows = blocks.repeat_interleave(TILE, dim=0)[: len(weights)]
        for tile, begin in enumerate(range(0, weights.shape[1], TILE)):
            inner = wide[part, begin : begin + TILE] @ weights[:, begin : begin + TILE].T
            y[part] += inner * (scales[part, tile, None] * rows[:, tile])
    return y.to(torch.bfloat16)


def weight_gradient(dy: Tiles, x: Tiles, ends: Tensor) -> Tensor:
    """As `fathom.kernels.tiles.weight_gradient`."""
    wide_dy, wide_x, tile, sums = dy.codes.float(), x.codes.float(), 0, []
    for part in parts(ends):
        total = dy.scales.new_zeros(wide_dy.shape[1], wide_x.shape[1])
        for begin in range(part.start, part.stop, TILE):
            rows = slice(begin, min(begin + TILE, part.stop))
            total += wide_dy[rows].T @ wide_x[rows] * (dy.scales[tile, :, None] * x.scales[tile])
            tile += 1
        sums.append(total)
    return torch.stack(sums)


def parts(ends: Tensor) -> list[slice]:
    """The rows of each group."""
    return [slice(begin, end) for begin, end in itertools.pairwise([0, *ends.tolist()])]


def counted(tiles: Tiles) -> tuple[Tiles, Tensor]:
    """With the number of tiles that hold no number."""
    return tiles, tiles.scales.isnan().sum()


def _cat_codes(codes: tuple[Tensor, ...]) -> Tensor:
    """Joined along the first dimension, which PyTorch does for bytes and not for every device's float8."""
    return torch.cat([c.view(torch.uint8) for c in codes]).view(torch.float8_e4m3fn)
