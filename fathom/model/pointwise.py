"""Norms, gates and rotations with gradients, by the kernels: a pass over memory each, where tensor operations make ten.

For training that runs layer by layer; under `torch.compile` the plain forms are fused just as well.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.kernels import ops, training


def fits(x: Tensor, weight: Tensor | None = None) -> bool:
    """Whether these take activations like `x`, and a weight that is float32."""
    wide = weight is None or weight.dtype is torch.float32
    return not torch.compiler.is_compiling() and wide and ops.usable(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension: x [..., D], weight [D] -> like x."""
    return _Norm.apply(x, weight, eps)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of one shape."""
    return _Gated.apply(gate, up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, d], whose pairs are two halves, by cos, sin [T, d/2] of their tokens."""
    return _Rotated.apply(x, cos.contiguous(), sin.contiguous())


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return ops.rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *training.rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return training.gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return training.gated_backward(dy, *ctx.saved_tensors)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return ops.rotate(x, cos, sin, interleaved=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        return ops.rotate(dy, cos, -sin, interleaved=False), None, None
