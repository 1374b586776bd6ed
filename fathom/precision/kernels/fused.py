"""Results that are quantised before they are written: an activation leaves the chip once, in one byte a number.

RMSNorm and SwiGLU are bound by memory. Followed by a quantiser, a row of K numbers is written and read again in two
bytes each: six bytes of traffic a number where three suffice. What is rounded is the same: the result goes through the
dtype of its input on its way to the codes, so that fused and separate kernels give the same codes (but for
exponentials, in which processors differ in the last bit, and the order in which a row's squares are added up).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.precision.kernels.codes import TILE, codes_of, magnitude_bits, narrow, scale_of
from fathom.precision.tiles import Tiles


@triton.jit
def norm_kernel(x, weight, codes, scales, inverse, M, K, stride, eps, POWER_OF_TWO: tl.constexpr, TILES: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    k = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = k < K
    loaded = tl.load(x + m * stride + k, mask=inside, other=0.0)
    values = loaded.to(tl.float32)
    root = tl.rsqrt(tl.sum(tl.sum(values * values, axis=1), axis=0) / K + eps)
    normed = values * root * tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    rounded = narrow(normed, loaded.dtype).to(tl.float32)
    scale = scale_of(tl.max(magnitude_bits(rounded), axis=1), POWER_OF_TWO)
    tl.store(codes + m * K + k, codes_of(rounded, tl.broadcast_to(scale[:, None], (TILES, TILE))), mask=inside)
    tiles = tl.cdiv(K, TILE)
    tl.store(scales + m * tiles + tile, scale, mask=tile < tiles)
    tl.store(inverse + m, root)


@triton.jit
def swiglu_kernel(
    gate_up, weights, codes, scales, M, inner, stride,
    WEIGHTED: tl.constexpr, POWER_OF_TWO: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    k = tile * TILE + tl.arange(0, TILE)
    inside = (m < M)[:, None] & (k < inner)[None, :]
    row = m.to(tl.int64)[:, None]
    loaded = tl.load(gate_up + row * stride + k[None, :], mask=inside, other=0.0)
    gate = loaded.to(tl.float32)
    up = tl.load(gate_up + row * stride + inner + k[None, :], mask=inside, other=0.0).to(tl.float32)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        hidden *= tl.load(weights + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
    rounded = tl.where(inside, narrow(hidden, loaded.dtype).to(tl.float32), 0.0)
    scale = scale_of(tl.max(magnitude_bits(rounded), axis=1), POWER_OF_TWO)
    each = tl.broadcast_to(scale[:, None], (BLOCK_M, TILE))
    tl.store(codes + row * inner + k[None, :], codes_of(rounded, each), mask=inside)
    tl.store(scales + m.to(tl.int64) * tl.cdiv(inner, TILE) + tile, scale, mask=m < M)


def norm_quantise(x: Tensor, weight: Tensor, eps: float, *, power_of_two: bool = False) -> tuple[Tiles, Tensor]:
    """x [M, K] / rms(x) · weight [K] in 1×128 tiles; and 1 / rms of every row [M] float32, for the backward pass."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    M, K = x.shape
    codes = torch.empty(M, K, dtype=torch.uint8, device=x.device)
    scales, inverse = x.new_empty(M, triton.cdiv(K, 128), dtype=torch.float32), x.new_empty(M, dtype=torch.float32)
    tiles = triton.next_power_of_2(triton.cdiv(K, 128))
    norm_kernel[(M,)](
        x, weight, codes, scales, inverse, M, K, x.stride(0), eps, POWER_OF_TWO=power_of_two, TILES=tiles,
        num_warps=min(16, max(4, tiles // 4)),
    )  # fmt: skip
    return Tiles(codes.view(torch.float8_e4m3fn), scales), inverse


def swiglu_quantise(gate_up: Tensor, weights: Tensor | None = None, *, power_of_two: bool = False) -> Tiles:
    """gate_up [M, 2I], gate first -> silu(gate) · up (· weights [M]) in 1×128 tiles: codes [M, I]."""
    gate_up = gate_up if gate_up.stride(-1) == 1 else gate_up.contiguous()
    (M, both), block = gate_up.shape, 16
    inner = both // 2
    codes = torch.empty(M, inner, dtype=torch.uint8, device=gate_up.device)
    scales = gate_up.new_empty(M, triton.cdiv(inner, 128), dtype=torch.float32)
    swiglu_kernel[(triton.cdiv(M, block), triton.cdiv(inner, 128))](
        gate_up, gate_up if weights is None else weights, codes, scales, M, inner, gate_up.stride(0),
        WEIGHTED=weights is not None, POWER_OF_TWO=power_of_two, BLOCK_M=block,
    )  # fmt: skip
    return Tiles(codes.view(torch.float8_e4m3fn), scales)
