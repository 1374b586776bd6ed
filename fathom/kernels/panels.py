"""Weights in panels, the form in which the kernels multiply by them (`kernels.cpp` has the layouts and the reasons).

Where a weight cannot be packed `pack` says so, and its layer stays as it is.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fathom.kernels.library import library
from fathom.precision import BLOCK, quantize_blocks

PANEL = 32
"""Outputs that are computed together."""
INT8_BLOCK = 64
"""Inputs that share an int8 weight's scale."""

Rounding = Literal["int8", "fp8"]
"""int8 in blocks of 64 inputs, or float8 e4m3 in DeepSeek's blocks of 128 × 128."""
DTYPES: dict[Rounding, torch.dtype] = {"int8": torch.uint8, "fp8": torch.float8_e4m3fn}
"""Of the panels of rounded weights."""


@dataclass(frozen=True)
class Packed:
    """A matrix [N, K], or several of one shape, in panels."""

    panels: Tensor
    """[…, N / PANEL, K / 2, PANEL, 2] bfloat16, [… K, PANEL] float32, [… K / 4, PANEL, 4] uint8 or
    [… K / 2, PANEL, 2] float8_e4m3fn with outputs crosswise."""
    scales: Tensor | None
    """[…, N / PANEL, K / 64, PANEL] bfloat16 for uint8, […, N / PANEL, ⌈K / 128⌉] float32 for float8, else None."""
    outputs: int
    inputs: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return torch.bfloat16 if self.scales is not None else self.panels.dtype

    def pointers(self) -> tuple[int, int | None]:
        """Addresses of panels and scales."""
        return self.panels.data_ptr(), None if self.scales is None else self.scales.data_ptr()


def pack(*parts: Tensor, rounding: Rounding | None = None, interleaved: bool = False) -> Packed | None:
    """One matrix made of `parts` in panels; None where the kernels cannot take it.

    Args:
        parts: […, N, K] each, bfloat16 or float32 on a CPU, K even for bfloat16.
        rounding: None keeps the numbers. Rounded parts must be bfloat16; int8 needs a K that is a multiple of 64.
        interleaved: parts of one shape take turns panel by panel, each filled up with zeros, as `ops.swiglu` wants gate
            and up; else they lie one below the other.

    Each part has its own fp8 blocks: those of a checkpoint, if it came from one in FP8. Parts that end within a panel
    are taken as one matrix instead.
    """
    if library() is None or not all(_fits(part, rounding) for part in parts):
        return None
    if not interleaved and any(part.shape[-2] % PANEL for part in parts[:-1]):
        parts = (torch.cat(parts, dim=-2),)
    join = _in_turns if interleaved else _one_below_the_other
    if rounding is None:
        values, scales = join([part.detach() for part in parts]), None
    else:
        quantise = quantise_int8 if rounding == "int8" else quantise_fp8
        rounded = [quantise(part) for part in parts]
        values, scales = join([values for values, _ in rounded]), join([scales for _, scales in rounded])
    outputs, inputs = values.shape[-2:]
    return Packed(_arranged(_in_panels(values)), _scales_of_panels(scales, rounding), outputs, inputs)


def _fits(weight: Tensor, rounding: Rounding | None) -> bool:
    if weight.device.type != "cpu":
        return False
    if weight.dtype is torch.bfloat16:
        return weight.shape[-1] % (INT8_BLOCK if rounding == "int8" else 2) == 0
    return weight.dtype is torch.float32 and rounding is None


def _arranged(panels: Tensor) -> Tensor:
    """[…, panels, PANEL, K] in the order of multiplication."""
    if panels.dtype is torch.float32:
        return panels.transpose(-2, -1).contiguous()
    groups = panels.unflatten(-1, (-1, 4 if panels.dtype is torch.uint8 else 2)).transpose(-3, -2)
    if panels.dtype is not torch.float8_e4m3fn:
        return groups.contiguous()
    # Both halves of a panel in turns, four outputs of each: how bytes are unpacked to pairs of them.
    crosswise = groups.view(torch.uint8).unflatten(-2, (2, 4, 4)).transpose(-4, -3)
    return crosswise.contiguous().view(torch.float8_e4m3fn).flatten(-4, -2)


def _scales_of_panels(scales: Tensor | None, rounding: Rounding | None) -> Tensor | None:
    """Scales of rows […, N, blocks] in the order of panels."""
    if scales is None:
        return None
    panels = _in_panels(scales)
    return panels[..., 0, :].contiguous() if rounding == "fp8" else panels.transpose(-2, -1).contiguous()


def _in_panels(matrix: Tensor) -> Tensor:
    """[…, N, K] -> […, panels, PANEL, K], filled up with zeros."""
    missing = -matrix.shape[-2] % PANEL
    if missing:
        matrix = torch.cat((matrix, matrix.new_zeros((*matrix.shape[:-2], missing, matrix.shape[-1]))), dim=-2)
    return matrix.unflatten(-2, (-1, PANEL))


def _one_below_the_other(matrices: list[Tensor]) -> Tensor:
    return torch.cat(matrices, dim=-2)


def _in_turns(matrices: list[Tensor]) -> Tensor:
    """[…, I, K] each -> […, I filled up to whole panels · matrices, K], a panel of each in turns."""
    return torch.stack([_in_panels(matrix) for matrix in matrices], dim=-3).flatten(-4, -2)


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight […, N, K] -> (values + 128 […, N, K] uint8, scales […, N, K / 64] bfloat16).

    A block of 64 inputs is rounded to 255 steps, its largest number to ±127 of its scale, which is rounded first.
    """
    blocks = weight.detach().float().unflatten(-1, (-1, INT8_BLOCK))
    scales = (blocks.abs().amax(dim=-1) / 127).to(torch.bfloat16)
    steps = scales.float().masked_fill(scales == 0, 1.0).unsqueeze(-1)
    values = (blocks / steps).round().clamp(-127, 127) + 128
    return values.to(torch.uint8).flatten(-2), scales


def dequantise_int8(values: Tensor, scales: Tensor) -> Tensor:
    """What `quantise_int8` kept, float32 […, N, K]."""
    blocks = (values.float() - 128).unflatten(-1, (-1, INT8_BLOCK))
    return (blocks * scales.float().unsqueeze(-1)).flatten(-2)


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight […, N, K] -> (values […, N, K] float8_e4m3fn, scales of rows […, N, ⌈K / 128⌉] float32).

    The numbers of `fathom.precision.quantize_blocks`, matrix by matrix; a block's scale is repeated for its rows.
    """
    rows, columns = weight.shape[-2:]
    rounded = [quantize_blocks(matrix) for matrix in weight.detach().reshape(-1, rows, columns)]
    values = torch.stack([values.view(torch.uint8) for values, _ in rounded]).view(torch.float8_e4m3fn)
    scales = torch.stack([scales for _, scales in rounded]).repeat_interleave(BLOCK, dim=1)[:, :rows]
    return values.view(weight.shape), scales.reshape(*weight.shape[:-1], -1)
