"""A model made ready to train in FP8: the same modules over the same parameters, multiplying as `fathom.precision.fp8`
says.

`train_in_fp8` walks a model and puts, in the place of every module that holds what FP8 checkpoints store in blocks, one
that multiplies it in FP8. Embedding, head, router, norms, `eh_proj` and attention itself stay as they are. Parameters
keep their names, their dtype (the float32 master weights) and their identity, so that optimizers, checkpoints and the
engine see the model they know.

Activations that enter a mixture of experts have scales that are powers of two, and so have the gradients that enter its
way back: in the paper both are sent between nodes in FP8 (§3.3.3). The stack of a layer's experts holds gate above up;
where their height is no multiple of 128 one block holds rows of both.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fathom.model.experts import sort_by_expert, sum_over_experts, swiglu, swiglu_backward
from fathom.model.layers import FeedForward, Linear
from fathom.model.moe import Experts, MoE, Routing
from fathom.model.transformer import Transformer
from fathom.precision.fp8 import FP8
from fathom.precision.tiles import Tiles

BEHIND_ATTENTION = "o_proj"


class FP8Linear(Linear):
    """`Linear` whose three products are of FP8 factors."""

    def __init__(self, linear: Linear, fp8: FP8, *, power_of_two: bool = False, behind_attention: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._fp8, self._power_of_two, self._behind_attention = fp8, power_of_two, behind_attention

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of `x`."""
        y = self._fp8.linear(x, self.weight, power_of_two=self._power_of_two, behind_attention=self._behind_attention)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FP8FeedForward(FeedForward):
    """`FeedForward` that keeps the inputs of SwiGLU in FP8, and its input once for both of its readers."""

    def __init__(self, layer: FeedForward, fp8: FP8, *, power_of_two: bool) -> None:
        nn.Module.__init__(self)
        self.gate_proj = FP8Linear(layer.gate_proj, fp8, power_of_two=power_of_two)
        self.up_proj = FP8Linear(layer.up_proj, fp8, power_of_two=power_of_two)
        self.down_proj = layer.down_proj
        self._fp8 = fp8

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape."""
        y = self._fp8.gated_linear(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)
        return y if self.down_proj.bias is None else y + self.down_proj.bias.to(y.dtype)


class FP8Experts(Experts):
    """`Experts` whose grouped products are of FP8 factors."""

    def __init__(self, experts: Experts, fp8: FP8) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj, self._fp8 = experts.gate_up_proj, experts.down_proj, fp8

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [N, hidden] -> Σ_k weight_k · expert_k(x) [N, hidden]."""
        tiles = self._fp8.tiles_of(x, power_of_two=True)
        return _RoutedExperts.apply(
            x, *tiles, routing.expert_ids, routing.weights, self.gate_up_proj, self.down_proj, self._fp8
        )


def train_in_fp8(model: Transformer, fp8: FP8) -> None:
    """Let `model` multiply in FP8 from now on, all its layers sharing `fp8`."""
    for block in (*model.model.layers, *(module.block for module in model.mtp)):
        _change(block, fp8, in_mixture=False)


def _change(module: nn.Module, fp8: FP8, *, in_mixture: bool) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, FeedForward):
            setattr(module, name, FP8FeedForward(child, fp8, power_of_two=in_mixture))
        elif isinstance(child, Experts):
            setattr(module, name, FP8Experts(child, fp8))
        elif isinstance(child, Linear):
            setattr(module, name, FP8Linear(child, fp8, behind_attention=name == BEHIND_ATTENTION))
        else:
            _change(child, fp8, in_mixture=isinstance(child, MoE))


class _RoutedExperts(torch.autograd.Function):
    """`fathom.model.experts.routed_experts` with FP8 factors; the legend is there."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        fp8: FP8,
    ) -> Tensor:
        token_M, position_NK, ends_E = sort_by_expert(expert_ids, gate_up.shape[0], 1)
        weight_M = expert_weights.new_zeros(token_M.shape)
        weight_M.scatter_(0, position_NK.flatten(), expert_weights.flatten())
        up_blocks, down_blocks = fp8.blocks(gate_up), fp8.blocks(down)
        gate_up_M2I = fp8.product(Tiles(codes, scales), token_M, ends_E, up_blocks).to(x.dtype)
        hidden_MI = swiglu(gate_up_M2I, weight_M)
        y_Md = fp8.product(fp8.rows(hidden_MI), None, ends_E, down_blocks).to(x.dtype)
        ctx.fp8, ctx.dtypes = fp8, (gate_up.dtype, down.dtype)
        ctx.save_for_backward(
            codes, scales, *fp8.rows(gate_up_M2I), *up_blocks, *down_blocks, weight_M, token_M, position_NK, ends_E
        )
        return sum_over_experts(y_Md, position_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        fp8: FP8 = ctx.fp8
        *tensors, weight_M, token_M, position_NK, ends_E = ctx.saved_tensors
        x, gate_up, up_blocks, down_blocks = (Tiles(*tensors[i : i + 2]) for i in range(0, 8, 2))
        dy_tiles = fp8.rows(fp8.gradient(dy), power_of_two=True)
        dhidden_MI = fp8.product(dy_tiles, token_M, ends_E, down_blocks, columns=True).to(dy.dtype)
        gate_up_M2I = fp8.values(gate_up).to(dy.dtype)
        hidden_MI, dgate_up_M2I, dweight_M = swiglu_backward(gate_up_M2I, weight_M, dhidden_MI)
        dgate_up_M2I = fp8.gradient(dgate_up_M2I)
        dx_Md = fp8.product(fp8.gradient_rows(dgate_up_M2I), None, ends_E, up_blocks, columns=True).to(dy.dtype)
        ddown = dgate_up = None
        if ctx.needs_input_grad[6]:
            hidden, sent = fp8.columns(hidden_MI, None, ends_E), fp8.columns(dy_tiles, token_M, ends_E)
            ddown = fp8.weight_gradient(sent, hidden, ends_E).to(ctx.dtypes[1])
        if ctx.needs_input_grad[5]:
            received, back = fp8.columns(x, token_M, ends_E), fp8.gradient_columns(dgate_up_M2I, ends_E)
            dgate_up = fp8.weight_gradient(back, received, ends_E).to(ctx.dtypes[0])
        dweight_NK = dweight_M.index_select(0, position_NK.flatten()).view_as(position_NK)
        dx = sum_over_experts(dx_Md, position_NK)
        return dx, None, None, None, dweight_NK, dgate_up, ddown, None
