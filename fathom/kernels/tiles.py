"""FP8 tiles on a CPU: making them, and the three products of training with them (`tiles.h`).

Definitions are those of `fathom.precision.tiles` and `fathom.precision.products`; every function that makes tiles
returns how many of them hold no number. What is read back below bfloat16's least normal number may be zero here: the
processor's conversion does not know smaller ones.
"""

import torch
from torch import Tensor

from fathom.kernels import training
from fathom.kernels.ops import kernel, usable
from fathom.precision.tiles import TILE, Tiles


def fits(x: Tensor) -> bool:
    """Whether tiles can be made here of numbers like `x`, float32 or bfloat16."""
    return usable(x)


def products_fit(*widths: int) -> bool:
    """Whether products over these widths can be made here: the processor multiplies bfloat16, and all are even."""
    return training.available() and all(width % 2 == 0 for width in widths)


def tile_rows(x: Tensor, *, power_of_two: bool) -> tuple[Tiles, int]:
    """x [M, K] -> codes [M, K], scales [M, ⌈K/128⌉]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    codes, scales, bad = _codes(x), torch.empty(rows, -(-width // TILE)), _count()
    kernel("tile_rows", x.dtype)(
        x.data_ptr(), x.stride(0), rows, width, power_of_two, codes.data_ptr(), scales.data_ptr(), bad.data_ptr()
    )
    return Tiles(codes, scales), int(bad)


def tile_columns(x: Tensor | Tiles, at: Tensor | None, ends: Tensor, *, power_of_two: bool) -> tuple[Tiles, int]:
    """Rows of each group in 128×1 tiles of their own.

    Args:
        x: [rows, K], float32 or bfloat16, or tiles of rows.
        at: [M] int32, the row of `x` that each row is; None: the rows as they are.
        ends: [E] int32, the row before which each group ends.
        power_of_two: of the scales.

    Returns:
        codes [M, K] and scales [tiles of all groups or more, K], group after group.
    """
    values, scales_in = (x.codes, x.scales) if isinstance(x, Tiles) else (x.contiguous(), None)
    rows, width = len(values) if at is None else len(at), values.shape[1]
    codes = values.new_empty(rows, width, dtype=torch.float8_e4m3fn)
    scales, bad = torch.empty(rows // TILE + len(ends), width), _count()
    kernel("tile_columns", values.dtype)(
        values.data_ptr(), _address(scales_in), width, _address(at), ends.data_ptr(), len(ends), width, power_of_two,
        codes.data_ptr(), scales.data_ptr(), bad.data_ptr(),
    )  # fmt: skip
    return Tiles(codes, scales), int(bad)


def tile_blocks(w: Tensor) -> tuple[Tiles, int]:
    """w [E, N, K] -> codes, scales [E, ⌈N/128⌉, ⌈K/128⌉]."""
    w = w.contiguous()
    stack, rows, width = w.shape
    codes, scales, bad = _codes(w), torch.empty(stack, -(-rows // TILE), -(-width // TILE)), _count()
    kernel("tile_blocks", w.dtype)(w.data_ptr(), *w.shape, codes.data_ptr(), scales.data_ptr(), bad.data_ptr())
    return Tiles(codes, scales), int(bad)


def untile_rows(x: Tiles) -> Tensor:
    """What tiles of rows kept, [M, K] bfloat16."""
    y = torch.empty(x.codes.shape, dtype=torch.bfloat16)
    kernel("untile_rows")(x.codes.data_ptr(), x.scales.data_ptr(), *y.shape, y.data_ptr())
    return y


def pack12(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """x [M, K] -> (e5m6 [M, K + ⌈K/2⌉] uint8, scales [M, ⌈K/128⌉], how many tiles hold no number)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    packed = x.new_empty(rows, width + -(-width // 2), dtype=torch.uint8)
    scales, bad = torch.empty(rows, -(-width // TILE)), _count()
    kernel("pack12", x.dtype)(
        x.data_ptr(), x.stride(0), rows, width, packed.data_ptr(), scales.data_ptr(), bad.data_ptr()
    )
    return packed, scales, int(bad)


def unpack12(packed: Tensor, scales: Tensor, width: int) -> Tensor:
    """What `pack12` kept of rows of this width, [M, width] bfloat16."""
    y = torch.empty(len(packed), width, dtype=torch.bfloat16)
    kernel("unpack12")(packed.data_ptr(), scales.data_ptr(), *y.shape, y.data_ptr())
    return y


def grouped(x: Tiles, at: Tensor | None, ends: Tensor, w: Tiles, *, columns: bool) -> Tensor:
    """Rows of each group times their matrix, as `training.grouped`: [M, N], or [M, K] if `columns`, bfloat16.

    `x` has tiles of rows, `w` [E, N, K] has blocks; N and K are even.
    """
    stack, N, K = w.codes.shape
    y = torch.empty(len(x.codes) if at is None else len(at), K if columns else N, dtype=torch.bfloat16)
    kernel("scaled_grouped")(
        x.codes.data_ptr(), x.scales.data_ptr(), _address(at), ends.data_ptr(), stack, w.codes.data_ptr(),
        w.scales.data_ptr(), N, K, columns, y.data_ptr(),
    )  # fmt: skip
    return y


def weight_gradient(dy: Tiles, x: Tiles, ends: Tensor) -> Tensor:
    """Sums over each group's rows of dy[m]ᵀ x[m]: tiles of columns of dy [M, N] and x [M, K] -> [E, N, K] float32."""
    dw = torch.empty(len(ends), dy.codes.shape[1], x.codes.shape[1])
    kernel("scaled_weight_gradient")(
        dy.codes.data_ptr(), dy.scales.data_ptr(), x.codes.data_ptr(), x.scales.data_ptr(), ends.data_ptr(),
        len(ends), dw.data_ptr(), *dw.shape[1:],
    )  # fmt: skip
    return dw


def _codes(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float8_e4m3fn)


def _count() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
