"""FP8 weights in blocks of 128×128, each with one float32 scale (DeepSeek-V3 §3.3.2, README_WEIGHTS).

A weight [out, in] is stored as float8_e4m3fn beside `weight_scale_inv` [⌈out/128⌉, ⌈in/128⌉] in float32.
The name says "inverse" because it undoes the quantiser's scaling: a value is the stored number *times* the
scale of its block. Where a side is no multiple of 128 the last block is ragged; its scale is that of the
block filled up with zeros, which is the largest magnitude of what is really there.
"""

import torch
from torch import Tensor

BLOCK = 128
"""Rows and columns that share one scale."""

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
"""Largest finite e4m3 number: 448."""


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
    columns = scale.float().repeat_interleave(BLOCK, dim=1)[:, : weight.shape[1]]
    # One strip of blocks at a time: the float32 product of a large matrix never exists as a whole.
    for strip in range(scale.shape[0]):
        rows = slice(strip * BLOCK, (strip + 1) * BLOCK)
        out[rows] = weight[rows].float() * columns[strip]
    return out


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [out, in] as (float8_e4m3fn of the same shape, float32 scales): inverse of `dequantize_blocks`.

    The definition of what an FP8 folder holds, and of the engine's fp8 weights; saving writes float32 and bfloat16.
    The largest magnitude of a block becomes 448, the largest e4m3 number; a block of zeros has scale 1.
    """
    rows, columns = weight.shape
    block_rows, block_columns = scale_shape((rows, columns))
    padded = weight.new_zeros((block_rows * BLOCK, block_columns * BLOCK), dtype=torch.float32)
    padded[:rows, :columns] = weight
    blocks = padded.view(block_rows, BLOCK, block_columns, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    scale = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    scaled = blocks / scale[:, None, :, None]
    return scaled.reshape(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale
