"""E5M6: twelve bits for the input of the linear layer behind attention (DeepSeek-V3 §3.3.3).

One bit of sign, five of exponent, six of fraction: a half-precision number without its last four bits, subnormals
included. (The report names the format and not its layout.) Tiles are 1×128, with scales that are powers of two, so that
regrouping them by columns in the backward pass rounds nothing that scaling has touched.

Two numbers take three bytes: a row of K has its K high bytes first (sign, exponent, two bits of fraction), then ⌈K/2⌉
bytes with the low four bits of two neighbours each, the earlier one lower.
"""

import torch
from torch import Tensor

from fathom.precision.tiles import TILE, tile_scales

E5M6_MAX = 65024.0
"""Largest finite number: (2 − 2⁻⁶) · 2¹⁵."""
_LEAST = 2.0**-14
_STEP = 2.0**-20
"""Between neighbours below the least normal number."""


def pack_e5m6(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K], float32 or bfloat16 -> (uint8 [M, K + ⌈K/2⌉], float32 scales [M, ⌈K/128⌉])."""
    width = x.shape[1]
    tiles = torch.nn.functional.pad(x.float(), (0, -width % TILE)).unflatten(1, (-1, TILE))
    scales = tile_scales(tiles.abs().amax(dim=-1), largest_code=E5M6_MAX, power_of_two=True)
    codes = _encode((tiles / scales[..., None]).nan_to_num(nan=0.0)).flatten(1)[:, :width]
    pairs = torch.nn.functional.pad(codes, (0, width % 2)).unflatten(1, (-1, 2)) & 15
    packed = torch.cat((codes >> 4, pairs[..., 0] | pairs[..., 1] << 4), dim=1)
    return packed.to(torch.uint8), scales


def unpack_e5m6(packed: Tensor, scales: Tensor, width: int) -> Tensor:
    """What `pack_e5m6` kept of rows of this width: [M, width] float32, in which bfloat16 loses nothing."""
    high, low = packed[:, :width].int(), packed[:, width:].int()
    halves = torch.stack((low & 15, low >> 4), dim=-1).flatten(1)[:, :width]
    codes = high << 4 | halves
    fraction, exponent = (codes & 63).float(), codes >> 6 & 31
    normal = torch.ldexp(1 + fraction / 64, exponent - 15)
    size = torch.where(exponent > 0, normal, fraction * _STEP)
    return torch.where(codes >> 11 > 0, -size, size) * scales.repeat_interleave(TILE, dim=1)[:, :width]


def _encode(x: Tensor) -> Tensor:
    """Finite float32 up to `E5M6_MAX` -> int32 codes, to nearest, ties to even."""
    size, sign = x.abs(), torch.signbit(x).int() << 11
    bits = size.view(torch.int32)
    normal = (bits + (1 << 16) - 1 + (bits >> 17 & 1) >> 17) - (112 << 6)
    small = torch.round(size / _STEP).int()
    return torch.where(size < _LEAST, small, normal) | sign
