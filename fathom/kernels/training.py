"""The kernels of training, as functions of tensors on a CPU: products of groups of rows, causal attention,
softmaxes, norms and gates.

Products and attention take bfloat16 and are for processors whose vectors multiply it. Where tiles do it (AMX) PyTorch's
are faster.
"""

import ctypes

import torch
from torch import Tensor

from fathom.kernels.library import library
from fathom.kernels.ops import kernel


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether this machine has these kernels."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16") and library() is not None


def groups_fit(x: Tensor, weight: Tensor) -> bool:
    """Whether `grouped` and `weight_gradient` take activations like `x` and a stack [E, N, K] like `weight`."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.shape[1] % 2 == 0
        and weight.shape[2] % 2 == 0
        and available()
    )


def grouped(x: Tensor, at: Tensor | None, ends: Tensor, weight: Tensor, *, columns: bool) -> Tensor:
    """Rows of each group times their matrix: y[m] = W_e x[at[m]], or W_eᵀ x[at[m]] if `columns`.

    Args:
        x: [rows, K], [rows, N] if `columns`.
        at: [M] int32, the row of `x` that each row reads; None: the rows as they are.
        ends: [E] int32, the row before which each group ends.
        weight: [E, N, K] float32 or bfloat16.
        columns: see above.

    Returns:
        [M, N], [M, K] if `columns`; rows behind the last group are undefined.
    """
    x, weight = x.contiguous(), weight.contiguous()
    stack, N, K = weight.shape
    y = x.new_empty(x.shape[0] if at is None else at.shape[0], K if columns else N)
    kernel("grouped", weight.dtype)(
        x.data_ptr(), _address(at), ends.data_ptr(), stack, weight.data_ptr(), N, K, columns, y.data_ptr()
    )
    return y


def weight_gradient(dy: Tensor, dy_at: Tensor | None, x: Tensor, x_at: Tensor | None, ends: Tensor) -> Tensor:
    """Sum over each group's rows of dy[m]ᵀ x[m]: dy [rows, N], x [rows, K] -> [E, N, K] float32; else as `grouped`."""
    dy, x = dy.contiguous(), x.contiguous()
    dw = torch.empty(ends.shape[0], dy.shape[1], x.shape[1])
    kernel("weight_gradient")(
        dy.data_ptr(), _address(dy_at), x.data_ptr(), _address(x_at), ends.data_ptr(), *dw.shape[:1], dw.data_ptr(),
        *dw.shape[1:],
    )  # fmt: skip
    return dw


def attention_fits(q: Tensor, v: Tensor) -> bool:
    """Whether `causal_forward` takes queries and values like these: bfloat16, of even widths."""
    even = q.shape[-1] % 2 == 0 and v.shape[-1] % 2 == 0
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and even and available()


def causal_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, T, D] over k [B, G, S, D], v [B, G, S, V]; query t sees keys up to S - T + t.

    Returns:
        o [B, H, T, V], laid out as [B, T, H, V], and log(sum(exp(scores))) [B, H, T] float32.
    """
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    o = tokens_outermost(q, v.shape[-1])
    log_sums = torch.empty(q.shape[:3])
    kernel("causal_forward")(*map(_heads, (q, k, v, o)), log_sums.data_ptr(), _causal_shape(q, k, v), scale)
    return o, log_sums


def causal_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for the gradient d_o of what `causal_forward` gave, each with tokens outermost."""
    d_o, q, k, v = (_unit_stride(x) for x in (d_o, q, k, v))
    gradients = tuple(tokens_outermost(x, x.shape[-1]) for x in (q, k, v))
    kernel("causal_backward")(
        *map(_heads, (d_o, q, k, v)), log_sums.data_ptr(), *map(_heads, gradients), _causal_shape(q, k, v), scale
    )
    return gradients


def softmax_rows(
    logits: Tensor, targets: Tensor, temperature: float, chances: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each row's target, the row's entropy, and the sum of its `chances`: each [R] float32.

    Args:
        logits: [R, V] float32.
        targets: [R] int64.
        temperature: of the softmax.
        chances: [R, V] bfloat16, contiguous, filled with e^((logit - the row's largest) / temperature); None: not kept.
    """
    logits, targets = logits.contiguous(), targets.contiguous()
    logprobs, entropies, totals = torch.empty(3, len(logits)).unbind()
    kernel("softmax_rows")(
        logits.data_ptr(), targets.data_ptr(), logprobs.data_ptr(), entropies.data_ptr(), totals.data_ptr(),
        _address(chances), *logits.shape, 1 / temperature,
    )  # fmt: skip
    return logprobs, entropies, totals


def softmax_gradients(
    chances: Tensor, rows: Tensor, targets: Tensor, totals: Tensor, logprobs: Tensor, factors: Tensor
) -> Tensor:
    """factors · (onehot(targets) - softmax) for the `rows` [N] int64 of `chances` [R, V] -> [N, V] bfloat16.

    The others are [N] and of those rows: targets int64; totals and logprobs, as `softmax_rows` gave them, and factors
    float32.
    """
    gradients = chances.new_empty(len(rows), chances.shape[1])
    given = [x.contiguous() for x in (rows, targets, totals, logprobs, factors)]
    kernel("softmax_gradients")(
        chances.data_ptr(), *(x.data_ptr() for x in given), gradients.data_ptr(), *gradients.shape
    )
    return gradients


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of `ops.rms_norm`: dy, x [..., D], weight [D] float32 -> dx like x, dweight [D] float32."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    kernel("rms_norm_backward", x.dtype)(
        dy.data_ptr(), x.data_ptr(), weight.data_ptr(), dx.data_ptr(), dweight.data_ptr(),
        x.numel() // len(weight), len(weight), eps,
    )  # fmt: skip
    return dx, dweight


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, rounded once: two tensors of one shape and dtype -> the same."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    kernel("gated", gate.dtype)(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel())
    return y


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (dgate, dup) of `gated`."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    kernel("gated_backward", gate.dtype)(
        dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr(), gate.numel()
    )
    return dgate, dup


def tokens_outermost(like: Tensor, width: int) -> Tensor:
    """An empty [B, heads, T, width] for `like` [B, heads, T, …], laid out as [B, T, heads, width]."""
    batch, heads, time = like.shape[:3]
    return like.new_empty(batch, time, heads, width).transpose(1, 2)


def _address(index: Tensor | None) -> int | None:
    return None if index is None else index.data_ptr()


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> ctypes.Array:
    return (ctypes.c_long * 4)(x.data_ptr(), *x.stride()[:3])


def _causal_shape(q: Tensor, k: Tensor, v: Tensor) -> ctypes.Array:
    (batch, heads, time, width), (_, groups, keys, _) = q.shape, k.shape
    return (ctypes.c_long * 7)(batch, heads, groups, time, keys, width, v.shape[-1])
