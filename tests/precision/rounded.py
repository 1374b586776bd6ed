"""What tiles of a matrix kept, as float32: the roundings of `fathom.precision.tiles` there and back."""

import torch
from torch import Tensor

from fathom.precision.tiles import (
    dequantise_columns,
    dequantise_rows,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
    spread,
)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows(x: Tensor, *, power_of_two: bool = False) -> Tensor:
    return dequantise_rows(quantise_rows(x, power_of_two=power_of_two))


def columns(x: Tensor, *, power_of_two: bool = False) -> Tensor:
    return dequantise_columns(quantise_columns(x, power_of_two=power_of_two))


def blocks(w: Tensor, *, power_of_two: bool = False) -> Tensor:
    tiles = quantise_blocks(w, power_of_two=power_of_two)
    return tiles.codes.float() * spread(tiles.scales.repeat_interleave(128, dim=0)[: len(w)], w.shape[1])


def distance(found: Tensor | None, meant: Tensor) -> float:
    """Length of the difference in lengths of what was meant."""
    assert found is not None
    return ((found.float() - meant.float()).norm() / meant.float().norm()).item()
