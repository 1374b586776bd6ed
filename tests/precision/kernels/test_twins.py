"""Every kernel against the plain PyTorch that defines it, over odd sizes and numbers that are none."""

import math

import pytest
import torch
from torch import Tensor

from fathom.precision import tiles
from fathom.precision.kernels import available, twins
from fathom.precision.kernels.family import CDNA, HOPPER, RDNA, Family
from fathom.precision.products import scaled_product
from fathom.precision.tiles import Tiles
from tests.precision.kernels.conftest import triton
from tests.precision.test_tiles import SHAPES, assert_same, awkward, drawn, ends_of

assert triton
from fathom.precision.kernels import attention, fused, products, quantise  # noqa: E402 (they import Triton)

DTYPES = [torch.float32, torch.bfloat16]


def home(found: Tiles) -> Tiles:
    return Tiles(found.codes.cpu(), found.scales.cpu())


def to(given: Tiles, device: torch.device) -> Tiles:
    return Tiles(given.codes.to(device), given.scales.to(device))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantisers(shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool, device: torch.device) -> None:
    """Codes and scales to the bit: rows, columns, both from one reading, blocks."""
    x = awkward(*shape).to(dtype)
    there = x.to(device)
    rows, columns = (f(x, power_of_two=power_of_two) for f in (tiles.quantise_rows, tiles.quantise_columns))
    assert_same(home(quantise.quantise_rows(there, power_of_two=power_of_two)), rows)
    assert_same(home(quantise.quantise_columns(there, power_of_two=power_of_two)), columns)
    for found, meant in zip(quantise.quantise_both(there, power_of_two=power_of_two), (rows, columns), strict=True):
        assert_same(home(found), meant)
    blocks = home(quantise.quantise_blocks(there[None], power_of_two=power_of_two))
    meant = tiles.quantise_blocks(x, power_of_two=power_of_two)
    assert_same(Tiles(blocks.codes[0], blocks.scales[0]), meant)


def test_rows_that_lie_apart(device: torch.device) -> None:
    """A part of wider rows, and columns taken for rows, are read where they lie."""
    x = drawn(9, 400)
    for view in (x[:, 50:350], x.T[:, :7]):
        assert_same(home(quantise.quantise_rows(view.to(device))), tiles.quantise_rows(view))


def test_groups_have_tiles_of_their_own(device: torch.device) -> None:
    """Rows by an index, in groups of any size and none."""
    x, sizes = drawn(300, 70), (130, 0, 1, 128, 200)
    at = torch.randint(0, 300, (sum(sizes),), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    found = home(quantise.quantise_columns(x.to(device), at.to(device), ends_of(*sizes).to(device)))
    alone = [tiles.quantise_columns(group) for group in x[at].split(sizes)]
    assert_same(found, Tiles(torch.cat([t.codes.float() for t in alone]), torch.cat([t.scales for t in alone])))


def test_the_table_of_groups() -> None:
    """Its length follows from sizes alone; pieces cover every group once, in order, and none reaches into another."""
    for sizes in ((0,), (1,), (300, 0, 5), (0, 0, 128, 129), (64,) * 7):
        begins, stops, groups = quantise.group_tiles(ends_of(*sizes), sum(sizes), 64)
        assert len(begins) == sum(sizes) // 64 + len(sizes)
        pieces = [(b, s, g) for b, s, g in zip(begins.tolist(), stops.tolist(), groups.tolist(), strict=True) if b < s]
        rows = [(row, g) for b, s, g in pieces for row in range(b, s)]
        owners = [g for g, size in enumerate(sizes) for _ in range(size)]
        assert rows == list(enumerate(owners))


@pytest.mark.parametrize("family", [HOPPER, CDNA, RDNA])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 130, 300), (129, 60, 128), (70, 257, 129)])
def test_products(
    shape: tuple[int, int, int], family: Family, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in blocks and in tiles, for matrix units that take e4m3 and others: float32's rounding apart."""
    if device.type == "cpu":
        monkeypatch.setattr(products, "family_of", lambda _: family)
    M, N, K = shape
    a, w = tiles.quantise_rows(drawn(M, K)), drawn(N, K, seed=1)
    for in_blocks, factor in ((True, tiles.quantise_blocks(w)), (False, tiles.quantise_rows(w))):
        meant = scaled_product(a, factor)
        for dtype, bits in ((torch.float32, 20), (torch.bfloat16, 8)):
            found = products.scaled_product(to(a, device), to(factor, device), in_blocks=in_blocks, dtype=dtype).cpu()
            assert found.dtype == dtype
            size = tiles.dequantise_rows(a).abs() @ (factor.codes.float() * spread(factor)).abs().T
            assert ((found.float() - meant).abs() <= size * 2.0**-bits).all()


def spread(w: Tiles) -> Tensor:
    rows = w.scales if len(w.scales) == len(w.codes) else w.scales.repeat_interleave(128, dim=0)[: len(w.codes)]
    return tiles.spread(rows, w.codes.shape[1])


@pytest.mark.parametrize("family", [HOPPER, RDNA])
def test_one_hot_rows_read_weights_exactly(
    family: Family, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row with a single one picks a column of the weight: its code times its scale, rounded once."""
    if device.type == "cpu":
        monkeypatch.setattr(products, "family_of", lambda _: family)
    w = tiles.quantise_blocks(awkward(140, 200).nan_to_num(0, 0, 0))
    a = tiles.quantise_rows(torch.eye(200)[::7])
    found = products.scaled_product(to(a, device), to(w, device), in_blocks=True, dtype=torch.float32).cpu()
    numbers = (w.codes.float() * spread(w)).T[::7]
    assert torch.allclose(found, numbers, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("family", [HOPPER, CDNA])
def test_what_is_no_number_stays_in_its_row(
    family: Family, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poisoned tile of one row makes that row no number, and no other."""
    if device.type == "cpu":
        monkeypatch.setattr(products, "family_of", lambda _: family)
    x = drawn(9, 300)
    x[4, 290] = math.inf
    a, w = tiles.quantise_rows(x), tiles.quantise_blocks(drawn(20, 300, seed=1))
    found = products.scaled_product(to(a, device), to(w, device), in_blocks=True).cpu()
    assert torch.equal(found.isnan().all(dim=1), torch.arange(9) == 4)
    assert torch.equal(found.isnan().any(dim=1), torch.arange(9) == 4)


@pytest.mark.parametrize("indexed", [False, True])
def test_experts(indexed: bool, device: torch.device) -> None:
    """Groups of any size and none, rows where an index finds them."""
    sizes = (3, 0, 130, 1)
    at = torch.randint(0, 50, (134,), generator=torch.Generator().manual_seed(2)).to(torch.int32) if indexed else None
    a = tiles.quantise_rows(drawn(50 if indexed else 134, 130))
    blocks = [tiles.quantise_blocks(drawn(66, 130, seed=e)) for e in range(4)]
    codes = torch.stack([b.codes.view(torch.uint8) for b in blocks]).view(torch.float8_e4m3fn)
    w = Tiles(codes, torch.stack([b.scales for b in blocks]))
    index = None if at is None else at.to(device)
    found = products.grouped_product(
        to(a, device), index, ends_of(*sizes).to(device), to(w, device), dtype=torch.float32
    )
    meant = twins.grouped_product(a, at, ends_of(*sizes), w)
    assert (found.cpu() - meant).abs().max() <= 2.0**-20 * meant.abs().max()


def near(found: Tiles, meant: Tiles) -> None:
    """The same but for the last bit of an exponential or a sum: scales within float32's rounding, codes one apart."""
    assert torch.allclose(found.scales, meant.scales, rtol=1e-5, atol=0, equal_nan=True)
    values, expected = found.codes.float(), meant.codes.float()
    assert torch.equal(values.isnan(), expected.isnan())
    steps = (found.codes.view(torch.uint8).int() - meant.codes.view(torch.uint8).int()).abs()
    steps = torch.where(expected.isnan() | ((values == 0) & (expected == 0)), 0, steps)
    assert (steps <= 1).all()
    assert (steps > 0).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (7, 300), (2, 1000)])
def test_norm(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """RMSNorm and its tiles, with a row of zeros and rows that are no numbers."""
    x = drawn(*shape).to(dtype)
    x[-1] = 0
    if shape[0] > 2:
        x[1, 0] = math.inf
    weight = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
    for power_of_two in (False, True):
        found, inverse = fused.norm_quantise(x.to(device), weight.to(device), 1e-6, power_of_two=power_of_two)
        meant, expected = twins.norm_quantise(x, weight, 1e-6, power_of_two=power_of_two)
        near(home(found), meant)
        assert torch.allclose(inverse.cpu(), expected, rtol=1e-5, equal_nan=True)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (17, 130), (2, 500)])
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """SwiGLU and its tiles, with and without routing weights, over gates of any size; a NaN stays in its tile."""
    rows, inner = shape
    gate_up = drawn(rows, 2 * inner).to(dtype)
    gate_up[0, 0] = math.nan
    for weights in (None, torch.rand(rows, generator=torch.Generator().manual_seed(1))):
        there = None if weights is None else weights.to(device)
        near(home(fused.swiglu_quantise(gate_up.to(device), there)), twins.swiglu_quantise(gate_up, weights))


@pytest.mark.parametrize("family", [HOPPER, CDNA, RDNA])
@pytest.mark.parametrize(
    ("widths", "heads", "dtype"),
    [((512, 64), 3, torch.bfloat16), ((20, 8), 20, torch.float32), ((128, 32), 16, torch.float32)],
)
@pytest.mark.parametrize("splits", [1, 3])
def test_latent_decode(
    widths: tuple[int, int],
    heads: int,
    dtype: torch.dtype,
    splits: int,
    family: Family,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attention over pages in any order, from one position to all, however pages are divided; what no token sees may be
    no number."""
    if device.type == "cpu":
        monkeypatch.setattr(attention, "family_of", lambda _: family)
    (C, R), generator = widths, torch.Generator().manual_seed(3)
    pages = torch.randn(9, 64, C + R, generator=generator).to(dtype)
    q = torch.randn(3, heads, C + R, generator=generator).to(dtype)
    tables = torch.tensor([[8, 0, 0], [3, 1, 0], [5, 2, 7]], dtype=torch.int32)
    visible = torch.tensor([1, 100, 192], dtype=torch.int32)
    pages[8, 1:] = math.nan
    pages[1, 36:] = math.nan
    given = (t.to(device) for t in (q, pages, tables, visible))
    found = attention.latent_decode(*given, C, (C + R) ** -0.5, splits=splits).cpu()
    meant = twins.latent_decode(q, pages, tables, visible, C, (C + R) ** -0.5)
    assert (found.float() - meant.float()).abs().max() <= (2.0**-6 if dtype == torch.bfloat16 else 2.0**-18)


def test_available_only_on_a_gpu() -> None:
    """On a CPU the other kernels are used, whatever is installed."""
    assert not available(torch.device("cpu"))
