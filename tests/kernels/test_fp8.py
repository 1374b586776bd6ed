"""Products over weights in float8 blocks: every number, every edge, and whose blocks they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.kernels import ops, panels
from fathom.model.experts import routed_experts
from fathom.precision import dequantize_blocks, quantize_blocks, scale_shape
from tests.kernels.test_products import close, draw, exact_linear, experts_case, packed

pytestmark = pytest.mark.usefixtures("kernels")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, dtype=torch.bfloat16, seed=seed)


def kept(weight: Tensor) -> Tensor:
    """The numbers that are left of a matrix, float32."""
    return dequantize_blocks(*quantize_blocks(weight))


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_all_codes_are_widened_exactly(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the 256 codes is multiplied as the number it stands for: subnormal, zero, or no number at all."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    # Quantising would poison a whole block for its one NaN.
    monkeypatch.setattr(panels, "quantize_blocks", lambda w: (w.to(codes.dtype), torch.ones(scale_shape(w.shape))))
    weight = torch.stack((codes, torch.zeros(256).to(codes.dtype))).float().T.to(torch.bfloat16)
    got = ops.linear(torch.ones(rows, 2, dtype=torch.bfloat16), packed(weight, kind="fp8"), wide=True)
    numbers = codes.float().expand(rows, -1)
    assert torch.equal(got.isnan(), numbers.isnan())
    assert torch.equal(got.nan_to_num(), numbers.nan_to_num())
    assert len(codes.float().unique()) == 253 + 2  # ±0 are one number, the two NaN are not


@pytest.mark.parametrize("inputs", [2, 6, 126, 128, 130, 384])
@pytest.mark.parametrize("outputs", [1, 31, 33, 128, 150])
def test_every_block_has_its_scale(outputs: int, inputs: int) -> None:
    """Ragged last blocks and panels included, the product is that of the numbers which DeepSeek's blocks keep."""
    # Blocks of very different size: another block's scale would show.
    weight = drawn(outputs, inputs, seed=1) * torch.logspace(-6, 6, inputs, dtype=torch.bfloat16)
    weight *= torch.logspace(3, -3, outputs, dtype=torch.bfloat16)[:, None]
    bias = drawn(outputs, seed=2)
    for rows in (1, 7, 8, 20):
        x = drawn(rows, inputs)
        close(ops.linear(x, packed(weight, kind="fp8"), bias), *exact_linear(x, kept(weight), bias))
        close(ops.linear(x, packed(weight, kind="fp8"), wide=True), *exact_linear(x, kept(weight)))


def test_stored_numbers_are_kept() -> None:
    """A matrix that came from FP8 blocks gets its codes back, though bfloat16 rounded its numbers in between."""
    values, scales = quantize_blocks(draw(300, 258) * 0.02)
    again = packed(dequantize_blocks(values, scales, dtype=torch.bfloat16), kind="fp8")
    from_float = panels.quantise_fp8(dequantize_blocks(values, scales))
    stored = panels.quantise_fp8(dequantize_blocks(values, scales, dtype=torch.bfloat16))
    assert torch.equal(from_float[0].float(), values.float())
    assert torch.equal(stored[0].float(), values.float())
    assert again.scales is not None
    by_panel = scales.repeat_interleave(4, dim=0)[:10]
    assert ((again.scales - by_panel).abs() <= by_panel * 2**-8).all()


def test_parts_have_their_own_blocks() -> None:
    """Matrices that are packed as one give the bits that each gives alone, whatever the size of its numbers."""
    parts = [drawn(96, 192, seed=1), drawn(160, 192, seed=2) * 1000, drawn(45, 192, seed=3) / 1000]
    x = drawn(9, 192)
    whole = ops.linear(x, packed(*parts, kind="fp8"))
    assert torch.equal(whole, torch.cat([ops.linear(x, packed(part, kind="fp8")) for part in parts], dim=1))


def test_parts_that_end_within_a_panel_are_one_matrix() -> None:
    """Where a panel would need two scales the product is that of the joined matrix."""
    parts, x = [drawn(20, 64, seed=1), drawn(50, 64, seed=2)], drawn(3, 64)
    close(ops.linear(x, packed(*parts, kind="fp8")), *exact_linear(x, kept(torch.cat(parts))))


@pytest.mark.parametrize("inner", [16, 70, 160])
@pytest.mark.parametrize("rows", [1, 11])
def test_swiglu_equals_its_definition(rows: int, inner: int) -> None:
    """Gate and up, which differ in size a thousandfold, are read with the scales of their own blocks."""
    gate, up, x = drawn(inner, 192) / 8, drawn(inner, 192, seed=1) * 100, drawn(rows, 192, seed=2)
    got = ops.swiglu(x, packed(gate, up, kind="fp8", interleaved=True), inner)
    exact = F.silu(x.double() @ kept(gate).double().T) * (x.double() @ kept(up).double().T)
    assert got.shape == exact.shape
    assert torch.allclose(got.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("choice", ["spread", "one takes all"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_experts_equal_the_definition(tokens: int, choice: str) -> None:
    """Each expert is multiplied by its own codes and scales, with few tokens of its own and with many."""
    x, ids, weights, gate, up, down = experts_case("fp8", tokens, choice)
    sizes = torch.logspace(-2, 0, 6, dtype=torch.bfloat16)[:, None, None]
    gate, up, down = gate * sizes, up * sizes, down / sizes
    got = ops.experts(x, ids, weights, packed(gate, up, kind="fp8", interleaved=True), packed(down, kind="fp8"))
    gate, up, down = (torch.stack([kept(matrix) for matrix in stack]) for stack in (gate, up, down))
    exact = routed_experts(x.float(), ids, weights, torch.cat((gate, up), dim=1), down)
    assert torch.allclose(got.float(), exact, rtol=2e-2, atol=2e-2)


def test_zeros_are_zero() -> None:
    """Rows and blocks of weights that are all zero give zeros, not NaN."""
    weight = drawn(40, 256)
    weight[3], weight[:, :128] = 0, 0
    got = ops.linear(drawn(4, 256, seed=1), packed(weight, kind="fp8"))
    assert got.isfinite().all()
    assert (got[:, 3] == 0).all()


def test_what_cannot_be_rounded_is_said() -> None:
    """Odd widths and float32 give None."""
    assert panels.pack(drawn(4, 5), rounding="fp8") is None
    assert panels.pack(draw(4, 64), rounding="fp8") is None
