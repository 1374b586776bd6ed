"""Causal attention for training on a CPU: softmax(scale * q k^T) v, forward and backward.

Theory
------
`scaled_dot_product_attention` on a CPU is slow for MLA shapes (query/key width 96, value width 64): the fused
kernel does not take unequal widths, and even with padded values it takes about twice as long as plain batched
matrix products over the full square. So this is flash attention (arXiv 2307.08691), in two forms.

In bfloat16 on a CPU whose vectors multiply it, a kernel of ours (`kernels/causal.h`): scores stay in registers and
the first-level cache, forward keeps one number per query, and backward makes the probabilities again from it.

Elsewhere it is spelt in `bmm` calls, about a third faster than the full square:

    for each block of QUERY_BLOCK queries i..e             keys 0..e only: nothing above the diagonal is made
        S = scale q[i:e] k[:e]^T                           one bmm
        P = softmax(S + triangle on the last block)        float32 statistics, P in the input type
        o[i:e] = P v[:e]                                   one bmm
    backward, per block, after S and P again
        dv[:e] += P^T do;   dP = do v[:e]^T;   dS = P (dP - rowsum(P dP))
        dq[i:e] = scale dS k[:e];   dk[:e] += scale dS^T q[i:e]

* Small pieces. Blocks are taken for about 24 (batch, head) pairs at a time, so that a block of scores stays
  in cache and far below 32 MB. Beyond that size glibc maps fresh pages for every tensor and returns them at
  once; touching them costs more than the arithmetic (a float32 softmax of [48, 512, 512] takes several times
  as long as a bfloat16 one).
* One opaque operator. Under `torch.compile` there is no graph break and nothing to unroll. Inductor's own
  version of these blocks was measured: not faster, as its softmax takes exp twice, and slow to compile. Which form
  it is, is an argument, so that what was compiled for one is never run with the other.
* Grouped-query attention (fewer key heads than query heads) folds the group into the query rows: keys are never
  repeated, and the sum over the group in dk and dv happens inside the product.

In no case does a [T, T] tensor exist. Covered: self-attention over whole sequences, and over the last part of one
whose first part is remembered (more keys than queries). Blocks begin at multiples of QUERY_BLOCK from the sequence's
start, so that a part is computed as in the whole. Not covered: padding masks, dropout, double
backward, forward-mode differentiation.
"""

import itertools

import torch
from torch import Tensor

from fathom.kernels import training

QUERY_BLOCK = 128
HEADS_TIMES_ROWS = 24 * 128


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention: the last query sees all keys, the one before all but the last, and so on.

    Args:
        q: [B, H, T, Dqk].
        k: [B, Hkv, S, Dqk], S >= T, with H a multiple of Hkv; query head h reads key head h // (H // Hkv).
        v: [B, Hkv, S, Dv].
        scale: factor on the scores, usually Dqk ** -0.5.

    Returns:
        [B, H, T, Dv] in q's type.

    Raises:
        ValueError: if the shapes do not fit together, or the types differ.
    """
    heads_fit = k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    keys_fit = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and 0 < q.shape[2] <= k.shape[2]
    if not heads_fit or not keys_fit or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"causal_attention: shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"causal_attention: types differ: q {q.dtype}, k {k.dtype}, v {v.dtype}")
    return attention_forward(q, k, v, scale, training.attention_fits(q, v))[0]


@torch.library.custom_op("fathom::causal_attention", mutates_args=())
def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, kernels: bool) -> tuple[Tensor, Tensor]:
    """Returns (o [B, H, T, Dv], log(sum(exp(scores))) [B, H, T] float32; the latter empty without kernels)."""
    if kernels:
        return training.causal_forward(q, k, v, scale)
    B, H, T, _ = q.shape
    q_rows, k_rows, v_rows = _fold(q, k.shape[1]), k.flatten(0, 1), v.flatten(0, 1)
    o = q.new_empty(*q_rows.shape[:3], v.shape[-1])
    triangle = _triangle(q)
    for heads, rows, keys in _blocks(q_rows, k.shape[2]):
        q_block = (q_rows[heads, :, rows] * scale).flatten(1, 2)
        p = _probabilities(q_block, k_rows[heads, keys], triangle, rows.stop - rows.start)
        o[heads, :, rows] = torch.bmm(p, v_rows[heads, keys]).unflatten(1, (o.shape[1], -1))
    return o.view(B, H, T, -1), q.new_empty(0, dtype=torch.float32)


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, kernels: bool) -> tuple[Tensor, Tensor]:
    if kernels:
        return training.tokens_outermost(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("fathom::causal_attention_backward", mutates_args=())
def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor, scale: float, kernels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) in the shapes of q, k, v."""
    if kernels:
        return training.causal_backward(do, q, k, v, log_sums, scale)
    q_rows, do_rows = _fold(q, k.shape[1]), _fold(do, k.shape[1])
    k_rows, v_rows = k.flatten(0, 1), v.flatten(0, 1)
    dq, dk, dv = (rows.new_zeros(rows.shape) for rows in (q_rows, k_rows, v_rows))
    triangle = _triangle(q)
    for heads, rows, keys in _blocks(q_rows, k.shape[2]):
        q_block = (q_rows[heads, :, rows] * scale).flatten(1, 2)
        do_block = do_rows[heads, :, rows].flatten(1, 2)
        p = _probabilities(q_block, k_rows[heads, keys], triangle, rows.stop - rows.start)
        dv[heads, keys] += torch.bmm(p.transpose(1, 2), do_block)
        dp = torch.bmm(do_block, v_rows[heads, keys].transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        dq_block = torch.bmm(ds, k_rows[heads, keys]).unflatten(1, (dq.shape[1], -1))
        torch.mul(dq_block, scale, out=dq[heads, :, rows])
        dk[heads, keys] += torch.bmm(ds.transpose(1, 2), q_block)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


@attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor, scale: float, kernels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if kernels:
        return tuple(training.tokens_outermost(x, x.shape[-1]) for x in (q, k, v))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    q, k, v, ctx.scale, ctx.kernels = inputs
    ctx.save_for_backward(q, k, v, output[1])


def _call_backward(ctx, do: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *attention_backward(do, *ctx.saved_tensors, ctx.scale, ctx.kernels), None, None


attention_forward.register_autograd(_call_backward, setup_context=_save_for_backward)


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H, T, D] -> [B * Hkv, H // Hkv, T, D]: query heads that share a key head become rows of it."""
    return x.reshape(x.shape[0] * kv_heads, x.shape[1] // kv_heads, *x.shape[2:])


def _blocks(q_rows: Tensor, keys: int) -> list[tuple[slice, slice, slice]]:
    """The (heads, query rows, keys) slices that cover all that is visible, in both passes' order."""
    folded_heads, group, T, _ = q_rows.shape
    past = keys - T
    step = max(1, HEADS_TIMES_ROWS // (group * min(QUERY_BLOCK, T)))
    borders = [0, *range(QUERY_BLOCK - past % QUERY_BLOCK, T, QUERY_BLOCK), T]
    return [
        (slice(h, min(h + step, folded_heads)), slice(start, stop), slice(0, past + stop))
        for h in range(0, folded_heads, step)
        for start, stop in itertools.pairwise(borders)
    ]


def _triangle(q: Tensor) -> Tensor:
    """[QUERY_BLOCK, QUERY_BLOCK], minus infinity above the diagonal."""
    return torch.full((QUERY_BLOCK, QUERY_BLOCK), float("-inf"), dtype=q.dtype, device=q.device).triu(1)


def _probabilities(q_block: Tensor, k_block: Tensor, triangle: Tensor, width: int) -> Tensor:
    """softmax(q_block k_block^T), the `width` queries of each group aligned with the last keys."""
    scores = torch.bmm(q_block, k_block.transpose(1, 2))
    keys = k_block.shape[1]
    diagonal = scores[:, :, keys - width :].unflatten(1, (-1, width))
    diagonal += triangle[:width, :width]
    return torch.softmax(scores, -1)
