"""The pieces of FP8 training on a GPU: the functions of `fathom.kernels.tiles`, by the Triton kernels of this room.

What has no kernel yet is said by the function: packing of twelve bits is plain PyTorch, rows that were kept in tiles
are widened before they are tiled by columns, weights are turned before the product that reads them down, and the
gradients of a stack of experts are made one expert after the other.
"""

import torch
from torch import Tensor

from fathom.precision.kernels import products, quantise
from fathom.precision.plain import counted, pack12, parts, unpack12, untile_rows
from fathom.precision.tiles import TILE, Tiles, dequantise_rows

__all__ = [
    "grouped", "pack12", "tile_blocks", "tile_columns", "tile_rows", "unpack12", "untile_rows", "weight_gradient",
]  # fmt: skip


def tile_rows(x: Tensor, *, power_of_two: bool) -> tuple[Tiles, Tensor]:
    """As `fathom.kernels.tiles.tile_rows`."""
    return counted(quantise.quantise_rows(x, power_of_two=power_of_two))


def tile_columns(x: Tensor | Tiles, at: Tensor | None, ends: Tensor, *, power_of_two: bool) -> tuple[Tiles, Tensor]:
    """As `fathom.kernels.tiles.tile_columns`."""
    wide = dequantise_rows(x) if isinstance(x, Tiles) else x
    return counted(quantise.quantise_columns(wide, at, ends, power_of_two=power_of_two))


def tile_blocks(w: Tensor) -> tuple[Tiles, Tensor]:
    """As `fathom.kernels.tiles.tile_blocks`."""
    return counted(quantise.quantise_blocks(w))


def grouped(x: Tiles, at: Tensor | None, ends: Tensor, w: Tiles, *, columns: bool) -> Tensor:
    """As `fathom.kernels.tiles.grouped`; sides of any size."""
    matrices = Tiles(*(_turned(t) for t in w)) if columns else w
    return products.grouped_product(x, at, ends, matrices)


def weight_gradient(dy: Tiles, x: Tiles, ends: Tensor) -> Tensor:
    """As `fathom.kernels.tiles.weight_gradient`. Asks the device where groups end."""
    sums, tile = [], 0
    for part in parts(ends):
        tiles = slice(tile, tile + -(-(part.stop - part.start) // TILE))
        tile = tiles.stop
        down_dy, down_x = (Tiles(_turned(t.codes[part]), _turned(t.scales[tiles])) for t in (dy, x))
        if part.start == part.stop:
            sums.append(dy.scales.new_zeros(len(down_dy.codes), len(down_x.codes)))
        else:
            sums.append(products.scaled_product(down_dy, down_x, dtype=torch.float32, in_blocks=False))
    return torch.stack(sums)


def _turned(matrices: Tensor) -> Tensor:
    """The last two dimensions exchanged, in memory too; codes as bytes, which every device can copy."""
    if matrices.dtype != torch.float8_e4m3fn:
        return matrices.transpose(-2, -1).contiguous()
    return matrices.view(torch.uint8).transpose(-2, -1).contiguous().view(torch.float8_e4m3fn)
