"""Paged attention, pages, norms and rotation against their definitions, and against themselves in other company."""

import pytest
import torch
from torch import Tensor

from fathom.kernels import ops
from fathom.kernels.ops import PAGE
from fathom.model.layers import RMSNorm
from fathom.model.rope import rotate
from tests.kernels.test_products import both_types, draw

pytestmark = pytest.mark.usefixtures("kernels")
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 200]


def case(
    heads: int,
    groups: int,
    dtype: torch.dtype,
    *,
    latent: bool = False,
    stale: float = float("nan"),
    lengths: list[int] = LENGTHS,
) -> dict:
    """Sequences of these lengths on scattered pages; what no sequence has written is `stale`."""
    key_width, value_width = (96, 64) if latent else (64, 64)
    tokens, pages = len(lengths), sum(-(-length // PAGE) for length in lengths)
    keys = torch.full((pages + 1, groups, PAGE, key_width), stale, dtype=dtype)
    values = keys[..., :value_width] if latent else torch.full_like(keys, stale)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).tolist()
    tables = torch.full((tokens, max(-(-length // PAGE) for length in lengths)), pages, dtype=torch.int32)
    stored = []
    for row, length in enumerate(lengths):
        k, v = draw(groups, length, key_width, dtype=dtype, seed=row), draw(groups, length, value_width, dtype=dtype)
        for place in range(-(-length // PAGE)):
            page, part = order.pop(), slice(place * PAGE, min(length, place * PAGE + PAGE))
            tables[row, place] = page
            keys[page, :, : part.stop - part.start] = k[:, part]
            if not latent:
                values[page, :, : part.stop - part.start] = v[:, part]
        stored.append((k, k[..., :value_width] if latent else v))
    visible = torch.tensor(lengths, dtype=torch.int32)
    q = draw(tokens, heads, key_width, dtype=dtype, seed=99)
    return {"q": q, "keys": keys, "values": values, "tables": tables, "visible": visible, "stored": stored}


def attention(parts: dict, scale: float, rows: slice = slice(None)) -> Tensor:
    names = ("q", "keys", "values", "tables", "visible")
    q, keys, values, tables, visible = (parts[name] for name in names)
    return ops.paged_attention(q[rows], keys, values, tables[rows].contiguous(), visible[rows], scale)


def exact(parts: dict, scale: float) -> Tensor:
    """Softmax attention in float64, a token at a time."""
    rows = []
    for q, (k, v) in zip(parts["q"], parts["stored"], strict=True):
        share = q.shape[0] // k.shape[0]
        k, v = (t.double().repeat_interleave(share, dim=0) for t in (k, v))
        weights = (torch.einsum("hd,hsd->hs", q.double(), k) * scale).softmax(dim=-1)
        rows.append(torch.einsum("hs,hsd->hd", weights, v))
    return torch.stack(rows)


def assert_close(got: Tensor, expected: Tensor) -> None:
    tolerance = 1e-5 if got.dtype is torch.float32 else 2**-7
    assert torch.allclose(got.double(), expected, rtol=tolerance, atol=tolerance)


@both_types
@pytest.mark.parametrize("share", [1, 3, 8, 9, 16])
def test_grouped_heads_equal_the_definition(share: int, dtype: torch.dtype) -> None:
    """Any number of query heads per key head, at lengths around a page's, gives softmax attention."""
    parts = case(2 * share, 2, dtype)
    assert_close(attention(parts, 0.3), exact(parts, 0.3))


@both_types
@pytest.mark.parametrize("stale", [float("nan"), float("inf"), -float("inf"), 1e3, -1e3])
@pytest.mark.parametrize("latent", [True, False])
def test_nothing_leaks_from_recycled_pages(latent: bool, stale: float, dtype: torch.dtype) -> None:
    """Whatever a page held before, behind a sequence's end it has no weight."""
    parts = case(3, 1, dtype, latent=latent, stale=stale)
    assert_close(attention(parts, 0.3), exact(parts, 0.3))


@both_types
@pytest.mark.parametrize("heads", [1, 3, 16])
def test_latent_form_equals_the_definition(heads: int, dtype: torch.dtype) -> None:
    """Values that are the first part of the keys are read from there."""
    parts = case(heads, 1, dtype, latent=True)
    assert_close(attention(parts, 0.2), exact(parts, 0.2))


@both_types
@pytest.mark.parametrize("scale", [0.0, 1e-6, 50.0, -50.0, 1e4])
def test_scores_of_any_magnitude(scale: float, dtype: torch.dtype) -> None:
    """Weights that are all alike, or one and nothing else, are found without overflow."""
    parts = case(3, 1, dtype)
    parts["q"] = (parts["q"] * 8).round() / 8
    parts["keys"].copy_((parts["keys"] * 8).round() / 8)
    parts["stored"] = [((k * 8).round() / 8, v) for k, v in parts["stored"]]
    got = attention(parts, scale)
    if abs(scale) < 1e4:  # beyond, the rounding of scores decides between neighbours
        assert torch.allclose(got.double(), exact(parts, scale), rtol=1e-2, atol=1e-2)
    assert got.isfinite().all()


@both_types
def test_a_token_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    """A token's attention has the same bits alone and among 64 and 200, whatever the width of the table."""
    lengths = [1 + 7 * n % 130 for n in range(200)]
    parts = case(9, 1, dtype, lengths=lengths)
    whole = attention(parts, 0.3)
    assert torch.equal(attention(parts, 0.3, slice(64)), whole[:64])
    for row in (0, 1, 63, 64, 199):
        narrow = dict(parts, tables=parts["tables"][:, : -(-lengths[row] // PAGE)])
        assert torch.equal(attention(narrow, 0.3, slice(row, row + 1))[0], whole[row]), row


@both_types
def test_rows_are_written_to_their_places_alone(dtype: torch.dtype) -> None:
    """`write_pages` stores every row, strided or not, where it belongs and leaves everything else as it was."""
    pages = draw(4, 3, PAGE, 10, dtype=dtype)
    rows, places = draw(6, 4, 10, dtype=dtype, seed=1)[:, 1:], torch.tensor([0, 63, 64, 255, 130, 1])
    for given in (rows, rows.transpose(0, 1).contiguous().transpose(0, 1)):
        written, expected = pages.clone(), pages.clone()
        ops.write_pages(given, written, places)
        expected[places // PAGE, :, places % PAGE] = rows
        assert torch.equal(written, expected)


@both_types
@pytest.mark.parametrize("width", [1, 15, 16, 40, 64, 100])
def test_norm_equals_the_module(width: int, dtype: torch.dtype) -> None:
    """Every width, strided rows, zeros and large numbers are normalised as by `RMSNorm`."""
    norm = RMSNorm(width, 1e-6)
    norm.weight.data = draw(width)
    rows = (
        draw(7, width + 3, dtype=dtype, seed=1)[:, :width] * torch.tensor([1, 0, 1e-4, 1e4, 1, 1, 1]).to(dtype)[:, None]
    )
    for x in (rows, draw(3, 5, width, dtype=dtype), draw(5, 3, width, dtype=dtype).transpose(0, 1)):
        assert_close(ops.rms_norm(x, norm.weight.detach(), 1e-6), norm(x).detach().double())


@both_types
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("half", [1, 4, 16, 20, 32])
def test_rotation_equals_the_definition(half: int, interleaved: bool, dtype: torch.dtype) -> None:
    """Both layouts, at any width and any strides over tokens and heads, turn as `rope.rotate` says."""
    angles = draw(5, half, seed=3) * 100
    for x in (draw(5, 3, 2 * half, dtype=dtype), draw(5, 3, 2 * half + 9, dtype=dtype)[..., 4 : 4 + 2 * half]):
        got = ops.rotate(x, angles.cos(), angles.sin(), interleaved=interleaved)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        assert_close(got, rotate(x, cos, sin, interleaved=interleaved).double())


@both_types
def test_norm_and_rotation_do_not_depend_on_company(dtype: torch.dtype) -> None:
    """A row has the same bits alone and among 200, also where the work is shared among threads."""
    x, weight = draw(200, 40, dtype=dtype), draw(40, seed=1)
    whole = ops.rms_norm(x, weight, 1e-6)
    heads, angles = draw(200, 3, 40, dtype=dtype, seed=2), draw(200, 20, seed=3)
    turned = ops.rotate(heads, angles.cos(), angles.sin(), interleaved=False)
    for row in (0, 63, 199):
        one = slice(row, row + 1)
        assert torch.equal(ops.rms_norm(x[one], weight, 1e-6), whole[one])
        assert torch.equal(ops.rotate(heads[one], angles[one].cos(), angles[one].sin(), interleaved=False), turned[one])
