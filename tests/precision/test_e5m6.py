"""Twelve bits: the format, its packing, and kernels that equal the definition to the bit."""

import pytest
import torch

from fathom.kernels import tiles as kernels
from fathom.precision.e5m6 import E5M6_MAX, pack_e5m6, unpack_e5m6
from tests.precision.test_tiles import SHAPES, awkward, drawn


def all_numbers() -> torch.Tensor:
    """Every finite number of the format, from half precision's: those whose last four bits are zero."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    kept = halves[(halves.view(torch.int16) & 15) == 0].float()
    return kept[kept.isfinite()]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Bytes, scales and the way back (but that converting to bfloat16 flushes what is below float32's normal
    numbers)."""
    x = awkward(*shape).to(dtype)
    packed, scales, bad = kernels.pack12(x)
    expected, expected_scales = pack_e5m6(x)
    assert torch.equal(packed, expected)
    assert torch.equal(scales.nan_to_num(), expected_scales.nan_to_num())
    assert bad == expected_scales.isnan().sum() > 0
    back = kernels.unpack12(packed, scales, shape[1])
    meant = unpack_e5m6(expected, expected_scales, shape[1])
    flushed = torch.where(meant.abs() < 2.0**-126, 0.0, meant)
    assert ((back.float() == meant) | (back.float() == flushed) | meant.isnan()).all()
    assert torch.equal(back.isnan(), meant.isnan())


def test_every_number_of_the_format_is_kept() -> None:
    """All 3,968 finite numbers come back, subnormal ones too, at three bytes for two."""
    numbers = all_numbers()
    assert len(numbers) == 3968
    rows = torch.cat((torch.full((31, 1), E5M6_MAX), numbers[: 31 * 127].view(31, 127)), dim=1)
    packed, scales = pack_e5m6(rows)
    assert (scales == 1).all()
    assert packed.shape == (31, 192)
    assert torch.equal(unpack_e5m6(packed, scales, 128), rows)


def test_numbers_go_to_the_nearest() -> None:
    """No number of the format is nearer than the one chosen."""
    x = drawn(20, 127).clamp(-6e4, 6e4)
    x = torch.cat((torch.full((20, 1), E5M6_MAX), x), dim=1)
    back = unpack_e5m6(*pack_e5m6(x), 128)
    numbers = all_numbers().sort().values
    above = torch.searchsorted(numbers, x).clamp(1, len(numbers) - 1)
    nearest = torch.minimum((numbers[above] - x).abs(), (numbers[above - 1] - x).abs())
    assert torch.equal((back - x).abs(), nearest)


def test_regrouping_by_columns_rounds_nothing_that_scaling_touched() -> None:
    """Scales are powers of two: a kept number has at most seven significant bits, whatever its tile, and fits
    bfloat16."""
    x = drawn(64, 300)
    packed, scales = pack_e5m6(x)
    assert (torch.frexp(scales).mantissa == 0.5).all()
    back = unpack_e5m6(packed, scales, 300)
    assert torch.equal(back.to(torch.bfloat16).float(), back)
    assert ((back - x).abs() <= 2.0**-7 * x.abs() + scales.repeat_interleave(128, dim=1)[:, :300] * 2.0**-21).all()
