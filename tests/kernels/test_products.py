"""Products over packed weights against torch's, and against themselves in other company."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.kernels import ops, panels
from fathom.model.experts import routed_experts

pytestmark = pytest.mark.usefixtures("kernels")
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
every_kind = pytest.mark.parametrize("kind", ["f32", "bf16", "int8", "fp8"])


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(*parts: Tensor, kind: str = "as it is", interleaved: bool = False) -> panels.Packed:
    rounding = kind if kind in panels.DTYPES else None
    result = panels.pack(*parts, rounding=rounding, interleaved=interleaved)
    assert result is not None
    return result


def close(got: Tensor, exact: Tensor, terms: Tensor) -> None:
    """`got` is `exact` up to summation in float32 of numbers whose magnitudes sum to `terms`, rounded to its dtype."""
    rounding = exact.abs() * (2**-7 if got.dtype is torch.bfloat16 else 0)
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= rounding + 1e-5 + 1e-6 * terms).all()


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    x, weight, bias = x.double(), weight.double(), bias.double()
    return F.linear(x, weight, bias), F.linear(x.abs(), weight.abs(), bias.abs())


@both_types
@pytest.mark.parametrize("rows", [*range(1, 21), 65])
def test_linear_equals_the_product(rows: int, dtype: torch.dtype) -> None:
    """Whatever the number of rows, tiles of rows and a ragged last panel cover every output once."""
    x, weight, bias = draw(rows, 70, dtype=dtype), draw(75, 70, dtype=dtype, seed=1), draw(75, dtype=dtype, seed=2)
    close(ops.linear(x, packed(weight)), *exact_linear(x, weight))
    close(ops.linear(x, packed(weight), bias), *exact_linear(x, weight, bias))


@both_types
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 2), (31, 2), (32, 64), (33, 6), (64, 130)])
def test_linear_takes_any_shape(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """The smallest input width, one output, and widths around a panel's give the product too."""
    x, weight = draw(3, inputs, dtype=dtype), draw(outputs, inputs, dtype=dtype, seed=1)
    close(ops.linear(x, packed(weight)), *exact_linear(x, weight))


def test_wide_results_are_not_rounded() -> None:
    """`wide` gives float32 sums of bfloat16 products, as exact as float32 sums are, bias included."""
    x, weight, bias = (
        draw(5, 64, dtype=torch.bfloat16),
        draw(40, 64, dtype=torch.bfloat16, seed=1),
        draw(40, dtype=torch.bfloat16),
    )
    got = ops.linear(x, packed(weight), bias, wide=True)
    assert got.dtype is torch.float32
    close(got, *exact_linear(x, weight, bias))


@both_types
def test_rows_may_be_anywhere(dtype: torch.dtype) -> None:
    """Strided, transposed, repeated, three-dimensional and single rows are read where they are."""
    weight = draw(33, 64, dtype=dtype, seed=1)
    wide = draw(6, 200, dtype=dtype)
    views = {
        "part of wider rows": wide[:, 30:94],
        "every other row": wide[::2, :64],
        "columns": draw(64, 6, dtype=dtype).T,
        "one row repeated": wide[:1, :64].expand(6, -1),
        "heads": draw(3, 5, 64, dtype=dtype),
        "transposed heads": draw(5, 3, 64, dtype=dtype).transpose(0, 1),
        "ones that are contiguous with an odd stride": draw(1, 5, 64, dtype=dtype).transpose(0, 1),
        "a vector": wide[0, :64],
        "none": wide[:0, :64],
    }
    for name, x in views.items():
        got = ops.linear(x, packed(weight))
        assert torch.equal(got, ops.linear(x.clone(memory_format=torch.contiguous_format), packed(weight))), name
        close(got, *exact_linear(x, weight))


@both_types
@pytest.mark.parametrize("inner", [16, 32, 48, 70])
def test_swiglu_equals_its_definition(inner: int, dtype: torch.dtype) -> None:
    """silu(gate x) · up x at every width, as wide as the matrices were, for large inputs too."""
    gate, up = draw(inner, 64, dtype=dtype), draw(inner, 64, dtype=dtype, seed=1)
    x = draw(11, 64, dtype=dtype, seed=2) * torch.tensor([1.0, 0.0, 30.0, *[0.1] * 8], dtype=dtype)[:, None]
    got = ops.swiglu(x, packed(gate, up, interleaved=True), inner)
    exact = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    assert got.shape == exact.shape
    assert torch.allclose(got.double(), exact, rtol=1e-4 if dtype is torch.float32 else 1e-2, atol=1e-4)


def experts_case(kind: str, tokens: int, choice: str) -> tuple[Tensor, ...]:
    """x, ids, weights and the matrices; int8 takes only widths of whole blocks."""
    dtype = torch.float32 if kind == "f32" else torch.bfloat16
    width, inner = (64, 64) if kind == "int8" else (40, 24)
    gate, up = draw(6, inner, width, dtype=dtype, seed=3) / 6, draw(6, inner, width, dtype=dtype, seed=4) / 6
    down, x = draw(6, width, inner, dtype=dtype, seed=5) / 5, draw(tokens, width, dtype=dtype, seed=6)
    ids = {
        "spread": torch.stack(
            [torch.randperm(6, generator=torch.Generator().manual_seed(i))[:3] for i in range(tokens)]
        ),
        "one takes all": torch.full((tokens, 1), 4),
        "twice the same": torch.tensor([[2, 2, 5]]).expand(tokens, 3),
    }[choice]
    return x, ids, draw(*ids.shape, seed=7).abs(), gate, up, down


@both_types
@pytest.mark.parametrize("choice", ["spread", "one takes all", "twice the same"])
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_experts_equal_the_definition(tokens: int, choice: str, dtype: torch.dtype) -> None:
    """Empty experts, one that takes all tokens and one chosen twice give the sum of `routed_experts`."""
    x, ids, weights, gate, up, down = experts_case("f32" if dtype is torch.float32 else "bf16", tokens, choice)
    got = ops.experts(x, ids, weights, packed(gate, up, interleaved=True), packed(down))
    exact = routed_experts(x.float(), ids, weights, torch.cat((gate, up), dim=1).float(), down.float())
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert torch.allclose(got.float(), exact, rtol=tolerance, atol=tolerance)


@both_types
@pytest.mark.parametrize("outputs", [8, 32, 50])
def test_every_head_has_a_matrix_of_its_own(outputs: int, dtype: torch.dtype) -> None:
    """`heads_linear` is a product per head, from heads that lie anywhere."""
    weight = draw(3, outputs, 20, dtype=dtype)
    for x in (draw(9, 3, 20, dtype=dtype, seed=1), draw(9, 3, 44, dtype=dtype, seed=1)[..., 7:27]):
        got = ops.heads_linear(x, packed(weight))
        exact = torch.einsum("thk,hnk->thn", x.double(), weight.double())
        terms = torch.einsum("thk,hnk->thn", x.double().abs(), weight.double().abs())
        close(got, exact, terms)


@pytest.mark.parametrize("outputs", [32, 45])
def test_int8_is_as_close_as_its_blocks(outputs: int) -> None:
    """A product with int8 weights is off by no more than half a step of each block's activations and weights."""
    weight = draw(outputs, 192, dtype=torch.bfloat16)
    x = draw(13, 192, dtype=torch.bfloat16, seed=1) * torch.logspace(-3, 3, 13, dtype=torch.bfloat16)[:, None]
    kept = panels.dequantise_int8(*panels.quantise_int8(weight)).double()
    step = x.double().unflatten(1, (-1, 64)).abs().amax(-1) / 127
    bound = (0.5 * step).repeat_interleave(64, dim=1) @ kept.abs().T
    got = ops.linear(x, packed(weight, kind="int8"), wide=True).double()
    exact = x.double() @ kept.T
    assert ((got - exact).abs() <= bound + 1e-5 * exact.abs() + 1e-5).all()
    assert ((kept - weight.double()).abs().unflatten(1, (-1, 64)) <= _half_steps(weight)).all()


def _half_steps(weight: Tensor) -> Tensor:
    """[N, blocks, 1]: what rounding a weight may cost, its scale's own rounding to bfloat16 included."""
    largest = weight.double().unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True)
    return largest / 127 * 0.51 + largest * 2**-8


def test_int8_of_whole_numbers_is_exact() -> None:
    """Where every block holds ±127 and whole numbers, values and activations are kept, so the product is exact."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (40, 128), generator=generator).to(torch.bfloat16)
    x = torch.randint(-127, 128, (9, 128), generator=generator).to(torch.bfloat16)
    weight[:, ::64], x[:, ::64] = 127, -127
    got = ops.linear(x, packed(weight, kind="int8"), wide=True)
    assert torch.equal(got.double(), x.double() @ weight.double().T)


def test_int8_of_zeros_is_zero() -> None:
    """Rows, blocks of activations and rows of weights that are all zero give zeros, not NaN."""
    weight, x = draw(40, 128, dtype=torch.bfloat16), draw(4, 128, dtype=torch.bfloat16, seed=1)
    weight[3], x[2], x[1, 64:] = 0, 0, 0
    got = ops.linear(x, packed(weight, kind="int8"))
    assert got.isfinite().all()
    assert (got[2] == 0).all()
    assert (got[:, 3] == 0).all()
    assert torch.equal(got[1], ops.linear(x[1], packed(weight, kind="int8")))


@every_kind
def test_a_row_does_not_depend_on_its_company(kind: str) -> None:
    """Each product gives a row the same bits alone, among 64, and among 200, at any place."""
    dtype = torch.float32 if kind == "f32" else torch.bfloat16
    x = draw(200, 192, dtype=dtype)
    weight = packed(draw(75, 192, dtype=dtype, seed=1), kind=kind)
    gate, up = draw(64, 192, dtype=dtype, seed=2), draw(64, 192, dtype=dtype, seed=3)
    gate_up = packed(gate, up, kind=kind, interleaved=True)
    bias = draw(75, dtype=dtype, seed=4)
    for product in (
        lambda rows: ops.linear(rows, weight, bias),
        lambda rows: ops.linear(rows, weight, wide=True),
        lambda rows: ops.swiglu(rows, gate_up, 64),
    ):
        whole = product(x)
        assert torch.equal(product(x[:64]), whole[:64])
        for row in (0, 1, 7, 8, 63, 64, 199):
            assert torch.equal(product(x[row : row + 1]), whole[row : row + 1]), row


@every_kind
def test_an_expert_s_token_does_not_depend_on_its_company(kind: str) -> None:
    """Routed experts give a token the same bits alone and among 200."""
    x, ids, weights, gate, up, down = experts_case(kind, 200, "spread")
    gate_up, down = packed(gate, up, kind=kind, interleaved=True), packed(down, kind=kind)
    whole = ops.experts(x, ids, weights, gate_up, down)
    assert torch.equal(ops.experts(x[:64], ids[:64], weights[:64], gate_up, down), whole[:64])
    for row in (0, 5, 63, 199):
        one = slice(row, row + 1)
        assert torch.equal(ops.experts(x[one], ids[one], weights[one], gate_up, down), whole[one]), row


@both_types
def test_a_head_s_row_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    """`heads_linear` gives a token the same bits alone and among 200."""
    x, weight = draw(200, 3, 20, dtype=dtype), packed(draw(3, 50, 20, dtype=dtype, seed=1))
    whole = ops.heads_linear(x, weight)
    assert torch.equal(ops.heads_linear(x[:64], weight), whole[:64])
    assert all(torch.equal(ops.heads_linear(x[row][None], weight)[0], whole[row]) for row in (0, 6, 64, 199))


def test_what_cannot_be_packed_is_said() -> None:
    """Odd bfloat16 widths, int8 without whole blocks or of float32, and other dtypes give None."""
    assert panels.pack(draw(4, 5, dtype=torch.bfloat16)) is None
    assert panels.pack(draw(4, 96, dtype=torch.bfloat16), rounding="int8") is None
    assert panels.pack(draw(4, 64), rounding="int8") is None
    assert panels.pack(draw(4, 64).double()) is None
    assert panels.pack(draw(4, 5)) is not None
