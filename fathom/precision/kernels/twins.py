"""What the fused and grouped kernels compute, in plain PyTorch: definitions, built on those of tiles and products."""

import torch
from torch import Tensor

from fathom.precision.products import scaled_product
from fathom.precision.tiles import Tiles, quantise_rows


def grouped_product(a: Tiles, at: Tensor | None, ends: Tensor, w: Tiles) -> Tensor:
    """The rows a[at] of each group times their matrix in blocks [E, N, K]: [M, N] float32."""
    codes, scales = a.codes.view(torch.uint8), a.scales
    if at is not None:
        codes, scales = codes[at], scales[at]
    y, begin = torch.zeros(len(codes), w.codes.shape[1]), 0
    for end, matrix, blocks in zip(ends.tolist(), w.codes, w.scales, strict=True):
        rows = Tiles(codes[begin:end].view(torch.float8_e4m3fn), scales[begin:end])
        if begin < end:
            y[begin:end] = scaled_product(rows, Tiles(matrix, blocks))
        begin = end
    return y


def norm_quantise(x: Tensor, weight: Tensor, eps: float, *, power_of_two: bool = False) -> tuple[Tiles, Tensor]:
    """RMSNorm in float32, its result rounded to the dtype of `x` [M, K], then in tiles; and 1 / rms of every row."""
    inverse = torch.rsqrt(x.float().pow(2).mean(dim=-1) + eps)
    normed = (x.float() * inverse[:, None] * weight.float()).to(x.dtype)
    return quantise_rows(normed, power_of_two=power_of_two), inverse


def swiglu_quantise(gate_up: Tensor, weights: Tensor | None = None, *, power_of_two: bool = False) -> Tiles:
    """silu(gate) · up (· weights) in float32, rounded to the dtype of `gate_up` [M, 2I], then in tiles."""
    gate, up = gate_up.float().chunk(2, dim=1)
    hidden = gate / (1 + torch.exp(-gate)) * up
    if weights is not None:
        hidden = hidden * weights.float()[:, None]
    return quantise_rows(hidden.to(gate_up.dtype), power_of_two=power_of_two)


def latent_decode(q: Tensor, pages: Tensor, tables: Tensor, visible: Tensor, value_width: int, scale: float) -> Tensor:
    """Softmax over the first `visible` positions of every token's pages, in float32: [T, H, C] in the dtype of `q`."""
    out = q.new_empty(*q.shape[:2], value_width)
    for token, seen in enumerate(visible.tolist()):
        keys = pages[tables[token].long()].flatten(0, 1)[:seen].float()
        chances = (q[token].float() @ keys.T * scale).softmax(dim=-1)
        out[token] = (chances @ keys[:, :value_width]).to(q.dtype)
    return out
