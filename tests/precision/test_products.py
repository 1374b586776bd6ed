"""Products of FP8 factors: exact over the whole table, held to integers, and what fourteen bits lose."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fathom.kernels import tiles as kernels
from fathom.precision.products import rows_of_blocks, scaled_product
from fathom.precision.tiles import (
    TILE,
    Tiles,
    dequantise_rows,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
)
from tests.precision.test_tiles import drawn, ends_of

FINITE = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 < 127].view(torch.float8_e4m3fn)
"""The 254 codes that are numbers."""


def one_scale(codes: Tensor) -> Tiles:
    return Tiles(codes, torch.ones(len(codes), -(-codes.shape[1] // TILE)))


def turned(tiles: Tiles) -> Tiles:
    """Rows for columns, and blocks turned with them."""
    codes = tiles.codes.view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)
    return Tiles(codes, tiles.scales.T.contiguous())


def by_integers(a: Tiles, w: Tiles) -> Tensor:
    """The definition once more without a floating-point sum: codes are whole multiples of 2⁻⁹."""
    left, right = ((tiles.codes.double() * 512).long() for tiles in (a, w))
    scales, y = rows_of_blocks(w), torch.zeros(len(left), len(right))
    for tile, begin in enumerate(range(0, left.shape[1], TILE)):
        part = slice(begin, begin + TILE)
        sums = (left[:, None, part] * right[None, :, part]).sum(dim=-1)  # exact: below 2⁴³
        inner = torch.from_numpy((sums.double() / 2**18).numpy().astype(np.float32))
        y = y + inner * (a.scales[:, tile, None] * scales[:, tile])
    return y


def chained(a: Tiles, w: Tiles) -> Tensor:
    """As the processor's instruction sums: a chain of float32 additions, of every pair the second number first."""
    left, right = a.codes.double().numpy(), w.codes.double().numpy()
    scales, y = rows_of_blocks(w).numpy(), np.zeros((len(left), len(right)), dtype=np.float32)
    for tile, begin in enumerate(range(0, left.shape[1], TILE)):
        inner = np.zeros_like(y)
        for k in range(begin, min(begin + TILE, left.shape[1]), 2):
            for one in (k + 1, k):
                if one < left.shape[1]:
                    inner = (inner + left[:, one, None] * right[None, :, one]).astype(np.float32)
        y = y + inner * (a.scales[:, tile, None].numpy() * scales[None, :, tile])
    return torch.from_numpy(y)


def test_the_whole_table_is_multiplied_exactly() -> None:
    """All 64,516 products of two finite codes, against float64."""
    column = FINITE.view(-1, 1)
    meant = column.double() * column.double().T
    assert torch.equal(scaled_product(one_scale(column), one_scale(column)).double(), meant)


@pytest.mark.usefixtures("kernels")
def test_the_kernel_multiplies_the_whole_table_exactly() -> None:
    """The same by the kernels, forward, back and summed over rows; no product has more bits than bfloat16."""
    if not kernels.products_fit(2):
        pytest.skip("this processor does not multiply bfloat16")
    meant = FINITE.double()[:, None] * FINITE.double()
    empty = torch.zeros(254, 1).to(torch.float8_e4m3fn)
    pairs = torch.cat([t.view(torch.uint8) for t in (FINITE.view(-1, 1), empty)], dim=1).view(torch.float8_e4m3fn)
    x, w = one_scale(pairs), Tiles(pairs[None], torch.ones(1, 2, 1))
    assert torch.equal(kernels.grouped(x, None, ends_of(254), w, columns=False).double(), meant)
    down = Tiles(turned(one_scale(pairs)).codes[None], torch.ones(1, 1, 2))
    assert torch.equal(kernels.grouped(x, None, ends_of(254), down, columns=True).double(), meant)
    row = FINITE.view(1, -1)
    sums = kernels.weight_gradient(*[Tiles(row, torch.ones(1, 254))] * 2, ends_of(1))
    assert torch.equal(sums[0].double(), meant)


@pytest.mark.parametrize("width", [1, 127, 128, 129, 300, 512])
def test_the_definition_is_that_of_whole_numbers(width: int) -> None:
    """Element by element: inner sums without error, rounded once; then float32 in the order of tiles."""
    a, w = quantise_rows(drawn(9, width)), drawn(140, width, seed=1)
    for factor in (quantise_rows(w), quantise_blocks(w)):
        assert torch.equal(scaled_product(a, factor), by_integers(a, factor))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(1, 2, 2), (9, 140, 300), (270, 34, 128), (5, 30, 1000)])
def test_kernels_are_held_to_the_definition(shape: tuple[int, int, int]) -> None:
    """Fprop and Dgrad round the definition's result to bfloat16, Wgrad equals a chain of float32 additions to the
    bit."""
    rows, outputs, inputs = shape
    if not kernels.products_fit(2):
        pytest.skip("this processor does not multiply bfloat16")
    x, w, dy = drawn(rows, inputs), drawn(outputs, inputs, seed=1), drawn(rows, outputs, seed=2)
    x_tiles, dy_tiles, blocks = quantise_rows(x), quantise_rows(dy), quantise_blocks(w)
    stack, ends = Tiles(blocks.codes[None], blocks.scales[None]), ends_of(rows)
    for given, factor, columns in ((x_tiles, blocks, False), (dy_tiles, turned(blocks), True)):
        found = kernels.grouped(given, None, ends, stack, columns=columns)
        assert torch.equal(found, chained(given, factor).to(torch.bfloat16))
        size = dequantise_rows(given).abs() @ (factor.codes.float() * spread_rows(factor)).abs().T
        assert ((found.float() - scaled_product(given, factor)).abs() <= size * 2.0**-8).all()
    dy_columns, x_columns = quantise_columns(dy), quantise_columns(dequantise_rows(x_tiles))
    found = kernels.weight_gradient(dy_columns, x_columns, ends)[0]
    assert torch.equal(found, chained(turned(dy_columns), turned(x_columns)))
    close = scaled_product(turned(dy_columns), turned(x_columns))
    assert torch.allclose(found, close, rtol=0, atol=float(close.abs().max()) * 2.0**-18)


def spread_rows(w: Tiles) -> Tensor:
    return rows_of_blocks(w).repeat_interleave(TILE, dim=1)[:, : w.codes.shape[1]]


@pytest.mark.usefixtures("kernels")
def test_groups_meet_their_own_matrices() -> None:
    """Rows that an index finds, groups of any size, also none: each group's product is what it is alone."""
    if not kernels.products_fit(2):
        pytest.skip("this processor does not multiply bfloat16")
    sizes, generator = (3, 0, 130, 1100), torch.Generator().manual_seed(3)
    x = quantise_rows(drawn(200, 130))
    at = torch.randint(0, 200, (sum(sizes),), generator=generator).to(torch.int32)
    blocks = [quantise_blocks(drawn(66, 130, seed=10 + e)) for e in range(4)]
    stack = Tiles(
        torch.stack([b.codes.view(torch.uint8) for b in blocks]).view(torch.float8_e4m3fn),
        torch.stack([b.scales for b in blocks]),
    )
    found = kernels.grouped(x, at, ends_of(*sizes), stack, columns=False).split(sizes)
    for rows, block, got in zip(at.split(sizes), blocks, found, strict=True):
        own = Tiles(x.codes.view(torch.uint8)[rows].view(torch.float8_e4m3fn), x.scales[rows])
        alone = Tiles(block.codes[None], block.scales[None])
        assert torch.equal(got, kernels.grouped(own, None, ends_of(len(rows)), alone, columns=False))
    dy, rows = drawn(sum(sizes), 66, seed=4), drawn(sum(sizes), 130, seed=5)
    tiles = [kernels.tile_columns(t, None, ends_of(*sizes), power_of_two=False)[0] for t in (dy, rows)]
    sums = kernels.weight_gradient(*tiles, ends_of(*sizes))
    assert (sums[1] == 0).all()
    for e, (own_dy, own_x) in enumerate(zip(dy.split(sizes), rows.split(sizes), strict=True)):
        if len(own_dy):
            alone = [quantise_columns(t) for t in (own_dy, own_x)]
            assert torch.equal(sums[e], kernels.weight_gradient(*alone, ends_of(len(own_dy)))[0])


def matrices(kind: str, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn if kind == "normal" else torch.rand
    a, w = draw(64, width, generator=generator), draw(64, width, generator=generator)
    return a, w


def with_one_scale(x: Tensor) -> Tiles:
    scale = float(x.abs().max()) / 448
    return Tiles((x / scale).to(torch.float8_e4m3fn), torch.full((len(x), x.shape[1] // TILE), scale))


def test_fourteen_bits_lose_percents_and_promotion_repairs_it() -> None:
    """K = 4096, normal factors: the largest error is above 0.5 % of what outputs measure, and below 0.2 % promoted."""
    a, w = map(with_one_scale, matrices("normal", 4096))
    exact = dequantise_rows(a).double() @ dequantise_rows(w).double().T
    size = exact.pow(2).mean().sqrt()
    worst = {
        every: ((scaled_product(a, w, accumulator="hopper", promote_every=every) - exact).abs().max() / size).item()
        for every in (TILE, None)
    }
    assert 5e-3 < worst[None] < 5e-2
    assert worst[TILE] < 2e-3


def test_fourteen_bits_are_enough_for_what_has_no_more() -> None:
    """Equal products lose nothing until their sum outgrows fourteen bits; from then on shifting rounds down."""
    ones = one_scale(torch.ones(1, 128).to(torch.float8_e4m3fn))
    assert scaled_product(ones, ones, accumulator="hopper") == 128
    wide = torch.full((1, 128), 0.5).to(torch.float8_e4m3fn)
    wide[0, 0] = 256
    small = torch.ones(1, 128).to(torch.float8_e4m3fn)
    small[0, 0] = 256
    assert scaled_product(one_scale(wide), one_scale(small)) == 65536 + 127 / 2
    # Next to 65536 the last of fourteen bits is worth 8, which no ½ and no sum of 31 or 32 of them but 15.5 → 8, 16
    # fills.
    assert scaled_product(one_scale(wide), one_scale(small), accumulator="hopper") == 65536 + 3 * 16


def test_what_does_not_fit_is_refused() -> None:
    """Factors of other widths, and one sum over tiles of other scales."""
    a, w = quantise_rows(drawn(2, 256)), quantise_rows(drawn(3, 256))
    with pytest.raises(ValueError, match="do not fit"):
        scaled_product(a, quantise_rows(drawn(3, 128)))
    with pytest.raises(ValueError, match="scales change along K"):
        scaled_product(a, w, promote_every=None)


def test_promotion_in_the_middle_of_a_tile_is_refused() -> None:
    """Its scale would be another's; blocks of the wrong number are named too, and tiles without a number pass."""
    a, w = (quantise_rows(torch.randn(2, 256)) for _ in range(2))
    with pytest.raises(ValueError, match="100, which is no multiple of 128"):
        scaled_product(a, w, promote_every=100)
    with pytest.raises(ValueError, match="do not fit"):
        scaled_product(a, Tiles(torch.zeros(300, 256).to(torch.float8_e4m3fn), torch.ones(2, 2)))
    lost = quantise_rows(torch.full((2, 256), torch.nan))
    assert scaled_product(lost, lost, promote_every=None).isnan().all()
    assert scaled_product(*[quantise_rows(torch.ones(2, 0))] * 2, promote_every=None).shape == (2, 2)
