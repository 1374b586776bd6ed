"""What layers multiply in when a model trains in FP8 (DeepSeek-V3 §3.3): quantise, multiply, and keep little.

A linear layer is three products, all of e4m3 factors with their sums promoted every 128 numbers (`products.py`):

    Fprop   y  = x Wᵀ      x in 1×128 tiles            W in 128×128 blocks
    Dgrad   dx = dy W      dy in 1×128 tiles           the same blocks, read down
    Wgrad   dW = dyᵀ x     dy in 128×1 tiles           x, as it was kept, tiled anew in 128×1

Kept for the backward pass are codes and scales of x (a byte per number and 4 per tile), not x. Two kinds of layer keep
something else: the one behind attention its input in twelve bits (`e5m6.py`), and the last of a gated feed-forward the
*inputs* of SwiGLU in FP8, from which SwiGLU is made again. Weight gradients are summed in float32; what is not a linear
layer inside the network (embedding, head, router, norms, attention itself) does not come here.

Neighbours share one quantisation: layers that are given the same tensor keep the same codes.

A tile that holds no number is counted (`FP8.take_bad_tiles`) and poisons what it meets; the trainer skips the step.

On a CPU the kernels of `fathom/kernels/tiles.h` do this, on a GPU those of `fathom/precision/kernels` (which have not
met one yet), elsewhere or without a compiler PyTorch.
"""

import importlib
import weakref
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.kernels import tiles as kernels
from fathom.kernels import training
from fathom.precision import kernels as gpu
from fathom.precision import plain, recompute
from fathom.precision.blocks import dequantize_blocks
from fathom.precision.tiles import Tiles, quantise_blocks


class FP8:
    """What all layers of a model in FP8 share."""

    def __init__(self, *, gradient_blocks: bool = False) -> None:
        """`gradient_blocks` rounds gradients of activations in 128×128 blocks first, which the paper found to diverge
        (App. B.2)."""
        self.gradient_blocks = gradient_blocks
        self._bad: int | Tensor = 0
        self._recent: tuple[weakref.ref[Tensor], int, bool, Tiles] | None = None

    def take_bad_tiles(self) -> int:
        """How many tiles held no number since this was asked last; only now does a device have to say."""
        found, self._bad = int(self._bad), 0
        return found

    def linear(
        self, x: Tensor, weight: Tensor, *, power_of_two: bool = False, behind_attention: bool = False
    ) -> Tensor:
        """x [..., K], weight [N, K] -> x Wᵀ [..., N] in the dtype of `x`.

        `power_of_two` is of the scales of `x`; `behind_attention` keeps it in twelve bits instead of eight, with scales
        that are powers of two wherever it is tiled.
        """
        tiles = self.tiles_of(x, power_of_two=power_of_two or behind_attention)
        return _Linear.apply(x, *tiles, weight, self, behind_attention)

    def gated_linear(self, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """gate, up [..., I], weight [N, I] -> (silu(gate) · up) Wᵀ [..., N]."""
        return _GatedLinear.apply(gate, up, weight, self)

    # What follows is not differentiable: the pieces of the above and of experts.

    @torch.no_grad()
    def tiles_of(self, x: Tensor, *, power_of_two: bool) -> Tiles:
        """`rows` of an activation [..., K]; the last one's tiles are remembered, for layers that share their input.

        What changes without autograd's knowledge (`x.data`, a NumPy view) keeps its old tiles.
        """
        if self._recent is not None:
            known, version, scaling, tiles = self._recent
            if known() is x and version == x._version and scaling == power_of_two:
                return tiles
        tiles = self._rows_of(x, power_of_two)
        if recompute.is_made(x):
            recompute.made(tiles, self._rows_of, x, power_of_two)
        if not x.is_inference():  # whose changes nobody counts
            self._recent = (weakref.ref(x, self._forget), x._version, power_of_two, tiles)
        return tiles

    def _forget(self, which: weakref.ref[Tensor]) -> None:
        """Let go of the tiles of a tensor that is gone."""
        if self._recent is not None and self._recent[0] is which:
            self._recent = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": None}

    def _rows_of(self, x: Tensor, power_of_two: bool) -> Tiles:
        return self.rows(x.reshape(-1, x.shape[-1]), power_of_two=power_of_two)

    def rows(self, x: Tensor, *, power_of_two: bool = False) -> Tiles:
        """x [M, K] in 1×128 tiles."""
        return self._counted(*_backend(x).tile_rows(x, power_of_two=power_of_two))

    def columns(self, x: Tensor | Tiles, at: Tensor | None, ends: Tensor, *, power_of_two: bool = False) -> Tiles:
        """The rows x[at] of each group in 128×1 tiles of their own: codes [M, K], scales [tiles of all groups, K].

        `x` [rows, K] may be tiles of rows; group e ends before row ends[e].
        """
        like = x.scales if isinstance(x, Tiles) else x
        return self._counted(*_backend(like).tile_columns(x, at, ends, power_of_two=power_of_two))

    def blocks(self, weight: Tensor) -> Tiles:
        """weight [E, N, K] in 128×128 blocks: codes [E, N, K], scales [E, ⌈N/128⌉, ⌈K/128⌉]."""
        weight = weight.detach()
        return self._counted(*_backend(weight).tile_blocks(weight))

    def product(self, x: Tiles, at: Tensor | None, ends: Tensor, weight: Tiles, *, columns: bool = False) -> Tensor:
        """The rows x[at] of each group times their matrix in blocks [E, N, K]: [M, N], or back to [M, K] if `columns`.

        In bfloat16; rows behind the last group are undefined. Raises `ValueError` for factors of different widths.
        """
        _, N, K = weight.codes.shape
        if x.codes.shape[1] != (N if columns else K):
            side = "rows" if columns else "columns"
            raise ValueError(f"{list(x.codes.shape)} does not fit the {side} of a weight {list(weight.codes.shape)}")
        return _backend(x.scales, *weight.codes.shape[1:]).grouped(x, at, ends, weight, columns=columns)

    def weight_gradient(self, dy: Tiles, x: Tiles, ends: Tensor) -> Tensor:
        """Sums over each group's rows of dy[m]ᵀ x[m], both in tiles of columns: [E, N, K] float32.

        Raises `ValueError` where they have not as many rows.
        """
        if len(dy.codes) != len(x.codes):
            raise ValueError(f"gradients {list(dy.codes.shape)} and inputs {list(x.codes.shape)} differ in rows")
        return _backend(x.scales, dy.codes.shape[1], x.codes.shape[1]).weight_gradient(dy, x, ends)

    def values(self, x: Tiles) -> Tensor:
        """What tiles of rows kept, [M, K] bfloat16."""
        return _backend(x.scales).untile_rows(x)

    def twelve_bits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, K] as `e5m6.pack_e5m6` packs it; its tiles were counted when they were made for the product."""
        packed, scales, _ = _backend(x).pack12(x)
        return packed, scales

    def from_twelve_bits(self, packed: Tensor, scales: Tensor, width: int) -> Tensor:
        """What `twelve_bits` kept, [M, width] bfloat16."""
        return _backend(scales).unpack12(packed, scales, width)

    def gradient(self, dy: Tensor) -> Tensor:
        """A gradient of activations as rows [M, N], as it enters products."""
        dy = dy.reshape(-1, dy.shape[-1])
        if not self.gradient_blocks:
            return dy
        # Powers of two, here and in the tiles made of it below, which then round no number of one block a second time.
        blocks = self._counted(*plain.counted(quantise_blocks(dy, power_of_two=True)))
        return dequantize_blocks(*blocks, dtype=dy.dtype)

    def gradient_rows(self, dy: Tensor) -> Tiles:
        """What `gradient` gave in 1×128 tiles."""
        return self.rows(dy, power_of_two=self.gradient_blocks)

    def gradient_columns(self, dy: Tensor, ends: Tensor) -> Tiles:
        """What `gradient` gave in 128×1 tiles of each group."""
        return self.columns(dy, None, ends, power_of_two=self.gradient_blocks)

    def _counted(self, tiles: Tiles, bad: int | Tensor) -> Tiles:
        if not recompute.making_again():  # counted when they were made first
            self._bad = self._bad + bad
        return tiles


def _backend(like: Tensor, *widths: int) -> ModuleType:
    """Who makes tiles of numbers like these, and products over these widths: a CPU's kernels, a GPU's, or PyTorch."""
    if kernels.fits(like) and (not widths or kernels.products_fit(*widths)):
        return kernels
    if gpu.available(like.device):
        return importlib.import_module("fathom.precision.kernels.training")
    return plain


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, weight: Tensor, fp8: FP8, behind_attention: bool
    ) -> Tensor:
        blocks = fp8.blocks(weight[None])
        y = fp8.product(Tiles(codes, scales), None, _one_group(codes), blocks)
        ctx.fp8, ctx.twelve, ctx.dtypes = fp8, behind_attention, (x.dtype, weight.dtype)
        kept = fp8.twelve_bits(x.reshape(-1, x.shape[-1])) if behind_attention else (codes, scales)
        ctx.save_for_backward(*kept, *blocks)
        return y.to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        fp8: FP8 = ctx.fp8
        x, scales, *blocks = ctx.saved_tensors
        rows, blocks = fp8.gradient(dy), Tiles(*blocks)
        ends, (dtype, weight_dtype) = _one_group(rows), ctx.dtypes
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            tiles = fp8.gradient_rows(rows)
            dx = fp8.product(tiles, None, ends, blocks, columns=True)
            dx = dx.to(dtype).view(*dy.shape[:-1], blocks.codes.shape[-1])
        if ctx.needs_input_grad[3]:
            kept = fp8.from_twelve_bits(x, scales, blocks.codes.shape[-1]) if ctx.twelve else Tiles(x, scales)
            x_tiles = fp8.columns(kept, None, ends, power_of_two=ctx.twelve)
            dy_tiles = fp8.gradient_columns(rows, ends)
            dweight = fp8.weight_gradient(dy_tiles, x_tiles, ends)[0].to(weight_dtype)
        return dx, None, None, dweight, None, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, fp8: FP8) -> Tensor:
        flat_gate, flat_up = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
        blocks = fp8.blocks(weight[None])
        y = fp8.product(fp8.rows(gated(flat_gate, flat_up)), None, _one_group(flat_gate), blocks)
        ctx.fp8, ctx.weight_dtype = fp8, weight.dtype
        ctx.save_for_backward(*fp8.rows(flat_gate), *fp8.rows(flat_up), *blocks)
        return y.to(gate.dtype).view(*gate.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        fp8: FP8 = ctx.fp8
        tensors = ctx.saved_tensors
        rows, blocks = fp8.gradient(dy), Tiles(*tensors[4:])
        gate, up = (fp8.values(Tiles(*pair)).to(dy.dtype) for pair in (tensors[:2], tensors[2:4]))
        ends = _one_group(rows)
        dy_tiles = fp8.gradient_rows(rows)
        dhidden = fp8.product(dy_tiles, None, ends, blocks, columns=True).to(dy.dtype)
        dweight = None
        if ctx.needs_input_grad[2]:
            hidden = fp8.columns(gated(gate, up), None, ends)
            dy_columns = fp8.gradient_columns(rows, ends)
            dweight = fp8.weight_gradient(dy_columns, hidden, ends)[0].to(ctx.weight_dtype)
        dgate, dup = (t.view(*dy.shape[:-1], gate.shape[1]) for t in gated_backward(dhidden, gate, up))
        return dgate, dup, dweight, None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, rounded once."""
    if kernels.fits(gate):
        return training.gated(gate, up)
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (dgate, dup) of `gated`."""
    if kernels.fits(gate):
        return training.gated_backward(dy, gate, up)
    dy, wide_gate = dy.float(), gate.float()
    dgate, dup = torch.ops.aten.silu_backward(dy * up.float(), wide_gate), dy * F.silu(wide_gate)
    return dgate.to(gate.dtype), dup.to(up.dtype)


def _one_group(rows: Tensor) -> Tensor:
    return torch.full((1,), len(rows), dtype=torch.int32, device=rows.device)
