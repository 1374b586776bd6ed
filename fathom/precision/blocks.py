"""FP8 weights in blocks of 128×128, each with one float32 scale (DeepSeek-V3 §3.3.2, README_WEIGHTS).

A weight [out, in] is stored as float8_e4m3fn beside `weight_scale_inv` [⌈out/128⌉, ⌈in/128⌉] in float32.
The name says "inverse" because it undoes the quantiser's scaling: a value is the stored number *times* the
scale of its block. Where a side is no multiple of 128 the last block is ragged; its scale is that of the
block filled up with zeros, which is the largest magnitude of what is really there.

Quantising what was dequantised must give the same numbers again, or every copy of a copy would lose a little:

- A scale is the block's largest magnitude / 448, rounded to float32, never below 2⁻¹²⁶. The largest number that is then
  read, 448 times the scale, gives that very scale again: through float32, what was written here comes back bit for bit.
- DeepSeek's later models have scales that are powers of two (`scale_fmt` "ue8m0") and largest codes from 224 to 448. A
  block whose numbers are all e4m3 codes times such a power keeps its numbers.
- Scales of other makers: where the largest code is 448 too, codes come back and scales to float32's last bit; where it
  is smaller, numbers are rounded to e4m3 a second time.
- Through bfloat16, codes come back and scales within 2⁻⁸, bit for bit from then on. Powers of two are exact.
"""

import torch
from torch import Tensor

from fathom.precision.tiles import TILE, quantise_blocks

BLOCK = TILE
"""Rows and columns that share one scale."""


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of a weight [out, in]."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def dequantize_blocks(weight: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Block-quantised `weight` [out, in] times its `scale`, multiplied in float32 and rounded once to `dtype`.

    `scale` is [⌈out/128⌉, ⌈in/128⌉]; another shape raises `ValueError`.
    """
    expected = scale_shape(tuple(weight.shape))
    if tuple(scale.shape) != expected:
        raise ValueError(f"a weight of {list(weight.shape)} needs scales of {list(expected)}, got {list(scale.shape)}")
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    columns = _spread(scale.float(), weight.shape[1])
    # One strip of blocks at a time: the float32 product of a large matrix never exists as a whole.
    for strip in range(scale.shape[0]):
        rows = slice(strip * BLOCK, (strip + 1) * BLOCK)
        out[rows] = weight[rows].float() * columns[strip]
    return out


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [out, in] as (float8_e4m3fn of the same shape, float32 scales): inverse of `dequantize_blocks`.

    The definition of what an FP8 folder holds, and of the engine's fp8 weights. The largest magnitude of a block
    becomes 448, the largest e4m3 number, unless the block already is e4m3 codes times a power of two; a block of zeros
    has scale 1. A block that holds NaN or an infinite number has scale NaN and codes of NaN.
    """
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(scale_shape(tuple(weight.shape)), dtype=torch.float32, device=weight.device)
    for strip in range(scale.shape[0]):
        rows = slice(strip * BLOCK, (strip + 1) * BLOCK)
        codes[rows], scale[strip] = _quantise_strip(weight[rows].float())
    return codes, scale


def _quantise_strip(values: Tensor) -> tuple[Tensor, Tensor]:
    """One row of blocks [≤ 128, in] float32 as codes of the same shape and scales [⌈in/128⌉]."""
    codes, (scale,) = quantise_blocks(values)
    power_codes, (power,) = quantise_blocks(values, power_of_two=True)
    lost = (power_codes.float() * _spread(power, values.shape[1]) != values).any(dim=0)
    exact = ~torch.nn.functional.pad(lost, (0, -lost.numel() % BLOCK)).view(-1, BLOCK).any(dim=1)
    kept = torch.where(_spread(exact, values.shape[1]), power_codes.view(torch.uint8), codes.view(torch.uint8))
    return kept.view(torch.float8_e4m3fn), torch.where(exact, power, scale)


def _spread(of_blocks: Tensor, width: int) -> Tensor:
    """[…, ⌈width/128⌉] -> […, width], each repeated for the columns of its block."""
    return of_blocks.repeat_interleave(BLOCK, dim=-1)[..., :width]
