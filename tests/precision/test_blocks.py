"""FP8 weights in 128×128 blocks."""

import pytest
import torch

from fathom.precision import BLOCK, dequantize_blocks, quantize_blocks, scale_shape


def test_each_block_is_multiplied_by_its_own_scale_up_to_the_ragged_edge():
    """Every element equals its stored number times the scale at (row // 128, column // 128)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 200, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, generator=generator) + 0.5
    values = dequantize_blocks(weight, scale)
    for row, column in [(0, 0), (127, 127), (128, 127), (127, 128), (256, 199), (299, 0), (299, 199)]:
        expected = weight[row, column].float() * scale[row // BLOCK, column // BLOCK]
        assert values[row, column] == expected, (row, column)


@pytest.mark.parametrize("shape", [(128, 128), (576, 384), (5, 300), (129, 1)])
def test_quantise_then_dequantise_is_within_half_a_step_of_e4m3(shape):
    """No element moves by more than 1/16 of itself, or by half the smallest subnormal of its block."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    stored, scale = quantize_blocks(weight)
    assert stored.dtype == torch.float8_e4m3fn
    assert tuple(scale.shape) == scale_shape(shape)
    back = dequantize_blocks(stored, scale)
    wide_scale = scale.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]
    allowed = torch.maximum(weight.abs() / 16, wide_scale * 2**-10) * (1 + 1e-5)
    assert ((back - weight).abs() <= allowed).all()


def test_the_largest_value_of_a_block_uses_the_whole_range_of_e4m3():
    """The largest magnitude is stored as ±448, so no range is wasted and nothing overflows to NaN."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(2)) * 1e-3
    stored, _ = quantize_blocks(weight)
    largest = stored.float().view(2, 128, 2, 128).abs().amax(dim=(1, 3))
    assert (largest == 448).all()


def test_an_outlier_costs_precision_in_its_own_block_only():
    """A value a million times larger elsewhere leaves another block's result untouched."""
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(3))
    spiked = weight.clone()
    spiked[0, 0] = 1e6
    plain, hit = (dequantize_blocks(*quantize_blocks(w)) for w in (weight, spiked))
    assert torch.equal(plain[128:], hit[128:])
    assert not torch.equal(plain[:128, 1:], hit[:128, 1:])


def test_zeros_stay_zeros():
    """A block of zeros neither divides by zero nor becomes NaN."""
    stored, scale = quantize_blocks(torch.zeros(130, 4))
    assert (scale == 1).all()
    assert torch.equal(dequantize_blocks(stored, scale), torch.zeros(130, 4))


def test_bfloat16_is_rounded_once_from_the_float32_product():
    """Dequantising to bfloat16 equals dequantising to float32 and rounding, not a bfloat16 product."""
    stored, scale = quantize_blocks(torch.randn(200, 200, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(
        dequantize_blocks(stored, scale, dtype=torch.bfloat16), dequantize_blocks(stored, scale).bfloat16()
    )


def test_scales_of_the_published_ragged_projection():
    """kv_a_proj_with_mqa of DeepSeek-V3, [576, 7168], has scales of [5, 56]."""
    assert scale_shape((576, 7168)) == (5, 56)


def test_misshapen_scales_are_refused():
    """Scales for another block size raise instead of being broadcast."""
    with pytest.raises(ValueError, match=r"needs scales of \[2, 1\], got \[1, 1\]"):
        dequantize_blocks(torch.zeros(129, 4).to(torch.float8_e4m3fn), torch.ones(1, 1))


@pytest.mark.parametrize("size", [1e-37, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_what_was_dequantised_gives_the_same_bits(size, dtype):
    """Codes and scales come back through float32, whatever the weight was, down to scales that are clamped."""
    weight = (torch.randn(520, 390, generator=torch.Generator().manual_seed(5)) * size).to(dtype)
    stored, scale = quantize_blocks(weight)
    again, its_scale = quantize_blocks(dequantize_blocks(stored, scale))
    assert torch.equal(again.view(torch.uint8), stored.view(torch.uint8))
    assert torch.equal(its_scale, scale)


def test_numbers_too_small_for_a_scale_become_zeros():
    """A block below what a normal float32 scale reaches is zeros, not NaN."""
    assert torch.equal(dequantize_blocks(*quantize_blocks(torch.full((3, 3), 1e-44))), torch.zeros(3, 3))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_poisons_its_block_and_no_other(number):
    """Scale and codes of the block are NaN, so that nobody reads it unwarned; its neighbours are untouched."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(6))
    plain, plain_scale = quantize_blocks(weight)
    weight[200, 3] = number
    stored, scale = quantize_blocks(weight)
    assert scale.isnan().tolist() == [[False, False], [True, False]]
    assert stored[128:, :128].float().isnan().all()
    assert torch.equal(stored[:128].float(), plain[:128].float())
    assert torch.equal(stored[128:, 128:].float(), plain[128:, 128:].float())
    assert torch.equal(scale[0], plain_scale[0])


def test_a_block_of_codes_times_a_power_of_two_is_kept_beside_one_that_is_not():
    """Numbers under scales that are powers of two come back unrounded; the block beside them uses all of e4m3."""
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(7))
    weight[:, :128] = (weight[:, :128] * 60).to(torch.float8_e4m3fn).float() * 2.0**-9
    stored, scale = quantize_blocks(weight)
    assert torch.equal(dequantize_blocks(stored, scale)[:, :128], weight[:, :128])
    assert (torch.frexp(scale).mantissa == 0.5).tolist() == [[True, False]]
    assert stored[:, 128:].float().abs().max() == 448
