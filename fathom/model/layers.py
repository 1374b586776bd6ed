"""The pieces every decoder is made of: linear maps, RMSNorm, the gated feed-forward.

Weights may be stored wider than activations: a float32 master weight meets bfloat16 activations and is cast
to them at the moment of use, so gradients arrive in float32 and the same module trains and serves.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.model import pointwise
from fathom.precision import recompute


class Linear(nn.Linear):
    """y = x Wᵀ (+ b), multiplied in the dtype of `x` whatever the weight is stored in."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def reset_parameters(self) -> None:
        """Nothing: weights are drawn once by `Transformer.init_weights`, or loaded."""


class Embedding(nn.Embedding):
    """A table whose rows are looked up by token id."""

    def reset_parameters(self) -> None:
        """Nothing: as in `Linear`."""


class RMSNorm(nn.Module):
    """x / rms(x) · weight (arXiv 1910.07467), computed in float32, returned in the dtype of `x`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape."""
        y = self._normed(x)
        recompute.made(y, self._normed, x)
        return y

    def _normed(self, x: Tensor) -> Tensor:
        if pointwise.fits(x, self.weight):
            return pointwise.rms_norm(x, self.weight, self.eps)
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.float()).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate x) · up x). Dense layers and shared experts are this."""

    def __init__(self, width: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(pointwise.gated(gate, up) if pointwise.fits(gate) else F.silu(gate) * up)
