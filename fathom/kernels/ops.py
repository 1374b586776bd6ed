"""The kernels of running a model, as functions of tensors on a CPU. Results are new tensors; nothing is differentiable.

Weights come packed in panels (`fathom.kernels.panels`).
"""

import ctypes
import functools
from ctypes import c_float, c_int, c_long, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.kernels.library import library
from fathom.kernels.panels import Packed

PAGE = 64
"""Tokens in a page of the cache."""
_DRAWN_TOGETHER = 64  # as in drawing.h

_ARGUMENTS = {
    "linear": [c_void_p, c_long, *[c_void_p] * 4, *[c_long] * 3],
    "linear_wide": [c_void_p, c_long, *[c_void_p] * 4, *[c_long] * 3],
    "swiglu": [c_void_p, c_long, *[c_void_p] * 3, *[c_long] * 3],
    "experts": [*[c_void_p] * 11, *[c_long] * 5],
    "heads_linear": [c_void_p, c_long, *[c_void_p] * 2, *[c_long] * 4],
    "paged_attention": [*[c_void_p] * 6, *[c_long] * 10, c_float],
    "rms_norm": [c_void_p, c_long, *[c_void_p] * 2, *[c_long] * 2, c_float],
    "write_pages": [c_void_p, c_long, *[c_void_p] * 2, *[c_long] * 3],
    "release_threads": [],
    "dense_layers": [*[c_void_p] * 7, *[c_long] * 8, c_float, c_float],
    "draw_rows": [*[c_void_p] * 5, c_long, c_long],
    "log_sum_exp": [*[c_void_p] * 4, c_long, c_long],
    "rms_norm_backward": [*[c_void_p] * 5, *[c_long] * 2, c_float],
    "gated": [*[c_void_p] * 3, c_long],
    "gated_backward": [*[c_void_p] * 5, c_long],
    "softmax_rows": [*[c_void_p] * 6, c_long, c_long, c_float],
    "softmax_gradients": [*[c_void_p] * 7, c_long, c_long],
    "rotate": [c_void_p, *[c_long] * 2, *[c_void_p] * 3, *[c_long] * 3, c_int],
    "grouped": [*[c_void_p] * 3, c_long, c_void_p, *[c_long] * 2, c_int, c_void_p],
    "weight_gradient": [*[c_void_p] * 5, c_long, c_void_p, *[c_long] * 2],
    "tile_rows": [c_void_p, *[c_long] * 3, c_int, *[c_void_p] * 3],
    "tile_columns": [*[c_void_p] * 2, c_long, *[c_void_p] * 2, *[c_long] * 2, c_int, *[c_void_p] * 3],
    "tile_blocks": [c_void_p, *[c_long] * 3, *[c_void_p] * 3],
    "pack12": [c_void_p, *[c_long] * 3, *[c_void_p] * 3],
    "unpack12": [*[c_void_p] * 2, *[c_long] * 2, c_void_p],
    "untile_rows": [*[c_void_p] * 2, *[c_long] * 2, c_void_p],
    "scaled_grouped": [*[c_void_p] * 4, c_long, *[c_void_p] * 2, *[c_long] * 2, c_int, c_void_p],
    "scaled_weight_gradient": [*[c_void_p] * 5, c_long, c_void_p, *[c_long] * 2],
    "write_latents": [c_void_p, c_long, *[c_void_p] * 2, *[c_long] * 3],
    "read_latents": [*[c_void_p] * 2, *[c_long] * 3, c_void_p],
    "latent_attention": [*[c_void_p] * 5, *[c_long] * 5, c_float],
    "causal_forward": [*[c_void_p] * 6, c_float],
    "causal_backward": [*[c_void_p] * 9, c_float],
}
_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32", torch.uint8: "int8", torch.float8_e4m3fn: "fp8"}


@functools.cache
def kernel(name: str, dtype: torch.dtype | None = None) -> ctypes._CFuncPtr:
    """The compiled function of this name, for panels or tensors of `dtype` where there is one for each."""
    built = library()
    assert built is not None, "kernels are called only where there are some"
    function = getattr(built, f"fathom_{name}" if dtype is None else f"fathom_{name}_{_NAMES[dtype]}")
    function.argtypes, function.restype = _ARGUMENTS[name], None
    return function


def release_threads() -> None:
    """End the calling thread's idle OpenMP threads, when another thread is to do the work from now on.

    Left alone they make every parallel loop of the program about 30 microseconds slower on a machine with few cores.
    """
    if library() is not None:
        kernel("release_threads")()


def usable(x: Tensor) -> bool:
    """Whether there are kernels for tensors like `x`."""
    return x.dtype in (torch.bfloat16, torch.float32) and x.device.type == "cpu" and library() is not None


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` [..., width] as rows one stride apart: (itself or a copy, the stride)."""
    if x.stride(-1) != 1 or not (x.is_contiguous() or x.dim() == 2):
        x = x.contiguous()
    # A contiguous tensor may have any stride where a dimension is 1.
    return x, x.shape[-1] if x.is_contiguous() else x.stride(-2)


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """x [..., K] -> [..., N] = x Wᵀ + bias, in the dtype of `x` or, if `wide`, unrounded in float32."""
    x, stride = _rows(x)
    y = torch.empty(*x.shape[:-1], weight.outputs, dtype=torch.float32 if wide else x.dtype)
    kernel("linear_wide" if wide else "linear", weight.panels.dtype)(
        x.data_ptr(), stride, *weight.pointers(), None if bias is None else bias.data_ptr(), y.data_ptr(),
        x.numel() // weight.inputs, weight.outputs, weight.inputs,
    )  # fmt: skip
    return y


def swiglu(x: Tensor, gate_up: Packed, inner: int) -> Tensor:
    """x [..., K] -> [..., I] = silu(gate x) · up x, for interleaved gate and up [I, K]."""
    x, stride = _rows(x)
    y = torch.empty(*x.shape[:-1], inner, dtype=x.dtype)
    kernel("swiglu", gate_up.panels.dtype)(
        x.data_ptr(), stride, *gate_up.pointers(), y.data_ptr(), x.numel() // gate_up.inputs, inner, gate_up.inputs
    )
    return y


def experts(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    """Weighted sum of the chosen experts as in `fathom.model.experts.routed_experts`; gate_up is interleaved."""
    (tokens, width), slots, count = x.shape, expert_ids.shape[1], down.panels.shape[0]
    sorted_ids, order = expert_ids.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(count), right=True).to(torch.int32)
    x, order, weights = x.contiguous(), order.to(torch.int32), weights.float().contiguous()
    hidden, parts = x.new_empty(tokens * slots, down.inputs), weights.new_empty(tokens * slots, width)
    y = torch.empty_like(x)
    kernel("experts", gate_up.panels.dtype)(
        x.data_ptr(), order.data_ptr(), ends.data_ptr(), weights.data_ptr(), *gate_up.pointers(), *down.pointers(),
        hidden.data_ptr(), parts.data_ptr(), y.data_ptr(), tokens, slots, count, width, down.inputs,
    )  # fmt: skip
    return y


def heads_linear(x: Tensor, weight: Packed) -> Tensor:
    """x [T, H, K] -> [T, H, N], each head by its own matrix of `weight` [H, …]."""
    x = x.contiguous()
    tokens, heads, width = x.shape
    y = torch.empty(tokens, heads, weight.outputs, dtype=x.dtype)
    kernel("heads_linear", x.dtype)(
        x.data_ptr(), width, weight.panels.data_ptr(), y.data_ptr(), tokens, heads, weight.outputs, width
    )
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension; weight float32."""
    (x, stride), weight = _rows(x), weight.contiguous()
    y, width = torch.empty(x.shape, dtype=x.dtype), x.shape[-1]
    kernel("rms_norm", x.dtype)(x.data_ptr(), stride, weight.data_ptr(), y.data_ptr(), x.numel() // width, width, eps)
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary embedding of x [T, heads, 2 h], any strides over tokens and heads, by cos, sin [T, h] float32."""
    y = torch.empty(x.shape, dtype=x.dtype)
    tokens, heads, width = x.shape
    kernel("rotate", x.dtype)(
        x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(), y.data_ptr(),
        tokens, heads, width // 2, interleaved,
    )  # fmt: skip
    return y


def write_pages(rows: Tensor, pages: Tensor, places: Tensor) -> None:
    """Copy rows [T, G, width] (heads and their numbers side by side) to `places` [T] int64, page · PAGE + offset, of
    pages [P, G, PAGE, width]."""
    tokens, groups, width = rows.shape
    if rows.stride()[1:] != (width, 1):
        rows = rows.contiguous()
    kernel("write_pages", rows.dtype)(
        rows.data_ptr(), rows.stride(0), pages.data_ptr(), places.data_ptr(), tokens, groups, width
    )


def attention_fits(q: Tensor, key_width: int, value_width: int) -> bool:
    """Whether `paged_attention` takes such queries and heads of these widths."""
    return usable(q) and key_width % 32 == 0 and value_width % 16 == 0


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention of single tokens over pages.

    Args:
        q: [T, H, Dk].
        keys: [pages, G, PAGE, Dk], H a multiple of G.
        values: [pages, G, PAGE, Dv]; for latent attention a view of the first part of the keys.
        tables: [T, width] int32: for every token, the pages of its sequence in order.
        visible: [T] int32: how many positions each token sees, at least 1.
        scale: factor on the scores.

    Returns:
        [T, H, Dv].
    """
    tokens, heads, key_width = q.shape
    q, out = q.contiguous(), torch.empty(tokens, heads, values.shape[-1], dtype=q.dtype)
    kernel("paged_attention", q.dtype)(
        q.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), tables.data_ptr(), visible.data_ptr(),
        tokens, heads, keys.shape[1], key_width, values.shape[-1], keys.stride(0), values.stride(0),
        keys.stride(2), values.stride(2), tables.shape[1], scale,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class DenseShape:
    """Sizes that all layers of a dense decoder share."""

    hidden: int
    heads: int
    groups: int
    head: int
    inner: int
    scale: float
    eps: float


def dense_layers(
    x: Tensor,
    layers: Tensor,
    weights: torch.dtype,
    shape: DenseShape,
    rope: tuple[Tensor, Tensor],
    places: Tensor,
    tables: Tensor,
    visible: Tensor,
) -> Tensor:
    """All layers of a dense decoder over single tokens.

    Args:
        x: [T, hidden].
        layers: int64 [L, 16], the addresses that `DenseLayer` in `layers.h` lists.
        weights: dtype of the panels.
        shape: what the layers share.
        rope: cos and sin [T, head / 2] float32.
        places, tables, visible: as in `write_pages` and `paged_attention`.

    Returns:
        [T, hidden], before the final norm.
    """
    x = x.clone(memory_format=torch.contiguous_format)
    cos, sin = (t.contiguous() for t in rope)
    kernel("dense_layers", weights)(
        x.data_ptr(), layers.data_ptr(), cos.data_ptr(), sin.data_ptr(), places.data_ptr(), tables.data_ptr(),
        visible.data_ptr(), x.shape[0], layers.shape[0], shape.hidden, shape.heads, shape.groups, shape.head,
        shape.inner, tables.shape[1], shape.scale, shape.eps,
    )  # fmt: skip
    return x


def draw_rows(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> Tensor:
    """logits [R, V] float32, temperatures [R] and uniforms [R] float64 in [0, 1) -> ids [R] int64.

    Each is drawn by its row's softmax at its temperature, by inverting the distribution function.
    """
    logits, sums = logits.contiguous(), _room_for_sums(logits)
    ids, inverse = torch.empty(len(logits), dtype=torch.int64), temperatures.reciprocal().float()
    kernel("draw_rows")(
        logits.data_ptr(), inverse.data_ptr(), uniforms.data_ptr(), sums.data_ptr(), ids.data_ptr(), *logits.shape
    )
    return ids


def log_sum_exp(logits: Tensor, inverse: Tensor) -> Tensor:
    """logits [R, V] and inverse [R] float32 -> log Σ e^(logits · inverse) [R] float64.

    In float64 because large logits must not cancel what is taken from them.
    """
    logits, sums = logits.contiguous(), _room_for_sums(logits)
    result = torch.empty(len(logits), dtype=torch.float64)
    kernel("log_sum_exp")(logits.data_ptr(), inverse.data_ptr(), sums.data_ptr(), result.data_ptr(), *logits.shape)
    return result


def _room_for_sums(logits: Tensor) -> Tensor:
    return torch.empty(len(logits), -(-logits.shape[1] // _DRAWN_TOGETHER))
