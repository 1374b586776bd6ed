"""FP8 factors in tiles: activations 1×128 along a row or 128×1 down a column, weights 128×128 (DeepSeek-V3 §3.3.2).

A tensor is stored as e4m3 codes beside one float32 scale per tile; a value is its code times its tile's scale. The
scale is made from the tile itself, at the moment of use: largest magnitude / 448, so that this becomes the largest e4m3
number. With `power_of_two` it is rounded up to the next power of two, which makes scaling itself exact.

* A tile of zeros has scale 1. A scale is never below 2⁻¹²⁶, the least normal float32: below, division would flush.
* A tile that holds no number, or an infinite one, has scale NaN and codes of NaN: all of it is poisoned, and nothing
  else.
* A number within a sixteenth of float32's largest may be rounded up to what reads back as infinite.
* Where a side is no multiple of 128 the last tile is shorter.

Codes lie as the matrix does, whatever its tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128
"""Numbers that share one scale."""

E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126


class Tiles(NamedTuple):
    """Codes [M, K] and their scales: [M, ⌈K/128⌉] along rows, [⌈M/128⌉, K] down columns, [⌈M/128⌉, ⌈K/128⌉] in
    blocks."""

    codes: Tensor
    """float8_e4m3fn."""
    scales: Tensor
    """float32."""


def quantise_rows(x: Tensor, *, power_of_two: bool = False) -> Tiles:
    """x [M, K], float32 or bfloat16, in 1×128 tiles: codes [M, K], scales [M, ⌈K/128⌉]."""
    tiles = _tiles(x)
    scales = tile_scales(tiles.abs().amax(dim=-1), power_of_two=power_of_two)
    return Tiles(_codes(tiles / scales[..., None])[:, : x.shape[1]].contiguous(), scales)


def quantise_columns(x: Tensor, *, power_of_two: bool = False) -> Tiles:
    """x [M, K], float32 or bfloat16, in 128×1 tiles: codes [M, K], scales [⌈M/128⌉, K]."""
    codes, scales = quantise_rows(x.T, power_of_two=power_of_two)
    return Tiles(codes.view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn), scales.T.contiguous())


def quantise_blocks(w: Tensor, *, power_of_two: bool = False) -> Tiles:
    """w [N, K], float32 or bfloat16, in 128×128 blocks: codes [N, K], scales [⌈N/128⌉, ⌈K/128⌉]."""
    rows, columns = w.shape
    padded = torch.nn.functional.pad(w.float(), (0, -columns % TILE, 0, -rows % TILE))
    blocks = padded.view(padded.shape[0] // TILE, TILE, padded.shape[1] // TILE, TILE)
    scales = tile_scales(blocks.abs().amax(dim=(1, 3)), power_of_two=power_of_two)
    codes = (blocks / scales[:, None, :, None]).reshape(padded.shape).to(torch.float8_e4m3fn)
    return Tiles(codes[:rows, :columns].contiguous(), scales)


def dequantise_rows(tiles: Tiles) -> Tensor:
    """What `quantise_rows` kept, [M, K] float32."""
    return tiles.codes.float() * spread(tiles.scales, tiles.codes.shape[1])


def dequantise_columns(tiles: Tiles) -> Tensor:
    """What `quantise_columns` kept, [M, K] float32."""
    return tiles.codes.float() * spread(tiles.scales.T, tiles.codes.shape[0]).T


def spread(scales: Tensor, width: int) -> Tensor:
    """Scales [M, ⌈width/128⌉], each repeated for the numbers of its tile: [M, width]."""
    return scales.repeat_interleave(TILE, dim=1)[:, :width]


def tile_scales(largest: Tensor, *, power_of_two: bool, largest_code: float = E4M3_MAX) -> Tensor:
    """Scales of tiles whose largest magnitudes are these, float32 of any shape; they become `largest_code` or less."""
    scales = (largest / largest_code).clamp_min(SMALLEST_SCALE)
    if power_of_two:
        fraction, exponent = torch.frexp(scales)  # fraction in [1/2, 1): 1/2 is a power of two already
        scales = torch.ldexp(torch.ones_like(scales), exponent - (fraction == 0.5).to(exponent.dtype))
    scales = torch.where(largest == 0, 1.0, scales)
    return torch.where(largest.isfinite(), scales, torch.nan)


def _tiles(x: Tensor) -> Tensor:
    """x [M, K] -> [M, ⌈K/128⌉, 128] float32, filled up with zeros."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % TILE))
    return padded.view(rows, padded.shape[1] // TILE, TILE)


def _codes(scaled: Tensor) -> Tensor:
    """[M, tiles, 128] in units of their scales -> codes [M, tiles · 128], rounded to nearest, ties to even."""
    return scaled.flatten(1).to(torch.float8_e4m3fn)
