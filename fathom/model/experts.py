"""Routed experts for training on a CPU: each token through its K experts, forward and backward, none dropped.

    y[n] = sum_k weights[n, k] * down_e( silu(gate_e x[n]) * up_e x[n] ),   e = expert_ids[n, k]

Theory
------
The N*K (token, slot) pairs are sorted by expert. Rows of one expert are then neighbours, and one grouped
product (rows ends[e-1]..ends[e] times matrix e, empty groups allowed) does all experts at once, in the
forward pass and for both products of each backward pass. No token is dropped.

In bfloat16 on a CPU whose vectors multiply it, the grouped products are kernels of ours (`kernels/training.h`): they
read rows where an index finds them, take groups of any size, round float32 weights on the way in and give float32
gradients. Elsewhere they are PyTorch's. There a group's rows begin at a multiple of ROW_ALIGNMENT: a product is
compiled for its exact shape and remembered, and groups of arbitrary size would be compiled anew every time, which
costs as much as the product itself (measured: 21 ms against 15 for one pass at 512 rows per group). The rows that fill
a group up carry weight 0, which makes their every contribution 0 as long as token 0, which they name, is finite.

What is left is to move rows cheaply; done in the obvious way, eager, this costs half as much as the arithmetic:

* Both directions only gather. autograd's backward of `x[token]` scatters with additions, slow on a CPU and,
  with atomics, different from run to run. But both sums have exactly K terms per token, found at the inverse
  permutation: y[n] = sum_k rows[position[n, k]]. So a hand-written backward uses gathers alone, and forward
  and backward are bitwise repeatable. `embedding_bag` gathers and sums (in float32) in one pass: about 8
  times faster than `index_select` and `sum`.
* The routing weight is applied between the two products, where rows are I wide (192), not d (384): w down(h)
  = down(w h). It costs next to nothing there, its gradient is a row sum of what is at hand, and the output of
  `down` need not be kept.
* Kept for backward: x, the routing, the output of gate_up, and the weights themselves. The activation and the
  gathered rows are made again; each is about a percent of the products.

Weights have nn.Linear's layout, stacked: gate_up [E, 2I, d] (gate rows first), down [E, d, I]. They may be float32
masters beside bfloat16 activations: the cast is inside, and the gradient comes back in the master's type.

Under `torch.compile` everything but the grouped products is traced (no graph break, no recompilation for other
group sizes) and the element-wise parts are fused: about a tenth faster than eager. (Compiled, the obvious
form is as fast as this one; it is neither repeatable nor frugal.)

Legend: N tokens, K experts per token, M >= N*K sorted rows, E experts, d model width, I expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.kernels import training

ROW_ALIGNMENT = 32
"""Sizes of groups are rounded up to this many rows: about 3 % more work at 512 rows per group."""


def routed_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> Tensor:
    """Weighted sum of the chosen experts' SwiGLU outputs for each token.

    Args:
        x: [N, d] activations, bfloat16 or float32.
        expert_ids: [N, K] int64, in 0..E-1, which is not looked at; any number of tokens may choose an expert.
        expert_weights: [N, K] float32.
        gate_up: [E, 2I, d], gate rows first, in any floating type (cast to x's).
        down: [E, d, I], likewise.

    Returns:
        [N, d] in x's type.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    E, two_I, d = gate_up.shape
    choices_fit = expert_ids.shape == expert_weights.shape and expert_ids.shape[0] == x.shape[0]
    if x.shape[1] != d or down.shape != (E, d, two_I // 2) or not choices_fit:
        raise ValueError(
            f"routed_experts: shapes do not fit: x {x.shape}, expert_ids {expert_ids.shape}, "
            f"expert_weights {expert_weights.shape}, gate_up {gate_up.shape}, down {down.shape}"
        )
    return _RoutedExperts.apply(x, expert_ids, expert_weights, gate_up, down)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
    ) -> Tensor:
        kernels = training.groups_fit(x, gate_up) and training.groups_fit(x, down)
        token_M, position_NK, ends_E = sort_by_expert(expert_ids, gate_up.shape[0], 1 if kernels else ROW_ALIGNMENT)
        weight_M = expert_weights.new_zeros(token_M.shape)
        weight_M.scatter_(0, position_NK.flatten(), expert_weights.flatten())
        gate_up_M2I = _product(x, token_M, ends_E, gate_up)
        hidden_MI = swiglu(gate_up_M2I, weight_M)
        y_Md = _product(hidden_MI, None, ends_E, down)
        ctx.save_for_backward(x, gate_up, down, gate_up_M2I, weight_M, token_M, position_NK, ends_E)
        return sum_over_experts(y_Md, position_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, gate_up_M2I, weight_M, token_M, position_NK, ends_E = ctx.saved_tensors
        dhidden_MI = _product(dy, token_M, ends_E, down, columns=True)
        hidden_MI, dgate_up_M2I, dweight_M = swiglu_backward(gate_up_M2I, weight_M, dhidden_MI)
        ddown = _gradient(dy, token_M, hidden_MI, None, ends_E, down)
        dx_Md = _product(dgate_up_M2I, None, ends_E, gate_up, columns=True)
        dgate_up = _gradient(dgate_up_M2I, None, x, token_M, ends_E, gate_up)
        dweight_NK = dweight_M.index_select(0, position_NK.flatten()).view_as(position_NK)
        dx = sum_over_experts(dx_Md, position_NK)
        return dx, None, dweight_NK, dgate_up, ddown


@torch.library.custom_op("fathom::grouped_product", mutates_args=())
def _product(x: Tensor, at_M: Tensor | None, ends_E: Tensor, weight: Tensor, columns: bool = False) -> Tensor:
    """The rows x[at] of group e times matrix e of [E, p, q] (cast to x's type): [M, q] -> [M, p], or back if `columns`.

    Group e ends before row ends[e]; rows behind the last group are undefined.
    """
    if training.groups_fit(x, weight):
        return training.grouped(x, at_M, ends_E, weight, columns=columns)
    rows, matrices = _gathered(x, at_M), weight.to(x.dtype)
    return _grouped_mm(rows, matrices if columns else matrices.transpose(1, 2), ends_E)


@_product.register_fake
def _(x: Tensor, at_M: Tensor | None, ends_E: Tensor, weight: Tensor, columns: bool = False) -> Tensor:
    return x.new_empty((x if at_M is None else at_M).shape[0], weight.shape[2 if columns else 1])


@torch.library.custom_op("fathom::grouped_gradient", mutates_args=())
def _gradient(
    dy: Tensor, dy_at_M: Tensor | None, x: Tensor, x_at_M: Tensor | None, ends_E: Tensor, weight: Tensor
) -> Tensor:
    """For each group the product dy[dy_at]^T x[x_at] over its rows, in the shape and type of `weight` [E, p, q]."""
    if training.groups_fit(x, weight):
        return training.weight_gradient(dy, dy_at_M, x, x_at_M, ends_E).to(weight.dtype)
    return _grouped_mm(_gathered(dy, dy_at_M).t(), _gathered(x, x_at_M), ends_E).to(weight.dtype)


@_gradient.register_fake
def _(dy: Tensor, dy_at_M: Tensor | None, x: Tensor, x_at_M: Tensor | None, ends_E: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _gathered(rows: Tensor, at_M: Tensor | None) -> Tensor:
    return rows if at_M is None else rows.index_select(0, at_M)


def _grouped_mm(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """One product per group of rows, without kernels of ours.

    a [M, p], b [E, p, q] -> [M, q]: the rows of group e times matrix e.
    a [p, M], b [M, q] -> [E, p, q]: for each group the product over its rows.
    """
    aligned = all(stride * x.element_size() % 16 == 0 for x in (a, b) for stride in sorted(x.stride())[1:])
    if a.dtype == torch.bfloat16 and aligned:
        return torch._grouped_mm(a, b, offs=ends_E)
    ends = ends_E.tolist()
    groups = list(zip([0, *ends[:-1]], ends, strict=True))
    if b.dim() == 2:
        return torch.stack([a[:, start:end] @ b[start:end] for start, end in groups])
    out = a.new_empty(a.shape[0], b.shape[-1])
    for (start, end), matrix in zip(groups, b, strict=True):
        out[start:end] = a[start:end] @ matrix
    return out


def sort_by_expert(expert_ids: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the token of each row [M] int32, the row of each choice [N, K], and the groups' ends [E] int32.

    M depends on shapes alone. Rows that no choice has name token 0, to be weighed with 0.
    """
    choices, device = expert_ids.numel(), expert_ids.device
    # With few choices a group is smaller than what would fill it up.
    alignment = alignment if choices >= alignment * num_experts else 1
    sorted_ids, order = expert_ids.flatten().sort(stable=True)
    experts = torch.arange(num_experts, device=device)
    ends = torch.searchsorted(sorted_ids, experts, right=True)
    sizes = ends.diff(prepend=ends.new_zeros(1))
    aligned_sizes = (sizes + alignment - 1) // alignment * alignment
    aligned_ends = aligned_sizes.cumsum(0)
    shift = (aligned_ends - aligned_sizes) - (ends - sizes)
    rows = torch.arange(choices, device=device) + shift[sorted_ids]
    position = torch.empty_like(order).scatter_(0, order, rows)
    tokens = torch.arange(choices, device=device, dtype=torch.int32) // expert_ids.shape[1]
    token = tokens.new_zeros(choices + num_experts * (alignment - 1)).scatter_(0, position, tokens)
    return token, position.view_as(expert_ids), aligned_ends.to(torch.int32)


def swiglu(gate_up_M2I: Tensor, weight_M: Tensor) -> Tensor:
    """weight * silu(gate) * up, [M, I]."""
    gate, up = gate_up_M2I.chunk(2, dim=1)
    return F.silu(gate) * up * weight_M.to(up.dtype)[:, None]


def swiglu_backward(
    gate_up_M2I: Tensor,
    weight_M: Tensor,
    dhidden_MI: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weighted hidden rows again, and the gradients of gate_up_M2I and of weight_M."""
    gate, up = gate_up_M2I.chunk(2, dim=1)
    weight = weight_M.to(up.dtype)[:, None]
    silu = F.silu(gate)
    hidden = silu * up
    dweight = (hidden * dhidden_MI).sum(1, dtype=torch.float32)
    dhidden = dhidden_MI * weight
    dgate = torch.ops.aten.silu_backward(dhidden * up, gate)
    return hidden * weight, torch.cat([dgate, dhidden * silu], dim=1), dweight


def sum_over_experts(rows_Md: Tensor, position_NK: Tensor) -> Tensor:
    """sum_k rows[position[n, k]], [N, d]: gather and float32 sum in one operator."""
    return F.embedding_bag(position_NK, rows_Md, mode="sum")
