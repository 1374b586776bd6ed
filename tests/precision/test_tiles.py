"""Tiles: every number's rounding, every tile's scale, and kernels that equal the definition to the bit."""

import pytest
import torch
from torch import Tensor

from fathom.kernels import tiles as kernels
from fathom.precision.tiles import (
    TILE,
    Tiles,
    dequantise_columns,
    dequantise_rows,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
)

SHAPES = [(1, 1), (3, 128), (129, 127), (300, 300), (2, 1000)]


def drawn(rows: int, width: int, *, seed: int = 0) -> Tensor:
    """Numbers whose size changes by rows and by columns, over many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(rows, 1, generator=generator) * 3 + torch.randn(1, width, generator=generator) * 3
    return torch.randn(rows, width, generator=generator) * sizes.exp()


def awkward(rows: int, width: int) -> Tensor:
    """The same with a row of zeros, an infinity, a NaN, subnormal numbers, and one number alone in its row."""
    x = drawn(rows, width)
    x[rows // 2] = 0
    x[rows // 3, :] *= 1e-44
    x[rows // 4, :] = 0
    x[rows // 4, width // 2] = -3e38
    x[0, 0] = torch.nan
    x[-1, -1] = -torch.inf
    return x


def assert_same(found: Tiles, meant: Tiles) -> None:
    """Equal to the bit, but that there may be more scales than tiles; NaN equals NaN."""
    values, expected = found.codes.float(), meant.codes.float()
    scales = found.scales[: len(meant.scales)]
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())
    assert torch.equal(scales.isnan(), meant.scales.isnan())
    assert torch.equal(scales.nan_to_num(), meant.scales.nan_to_num())


def ends_of(*sizes: int) -> Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_definition(shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool) -> None:
    """Rows, columns, columns of what rows kept, and blocks: codes and scales, to the bit."""
    x = awkward(*shape).to(dtype)
    rows, bad = kernels.tile_rows(x, power_of_two=power_of_two)
    assert_same(rows, quantise_rows(x, power_of_two=power_of_two))
    assert bad == rows.scales.isnan().sum() > 0
    one = ends_of(shape[0])
    columns, _ = kernels.tile_columns(x, None, one, power_of_two=power_of_two)
    assert_same(columns, quantise_columns(x, power_of_two=power_of_two))
    again, _ = kernels.tile_columns(rows, None, one, power_of_two=power_of_two)
    assert_same(again, quantise_columns(dequantise_rows(rows), power_of_two=power_of_two))
    blocks, _ = kernels.tile_blocks(x[None])
    assert_same(Tiles(blocks.codes[0], blocks.scales[0]), quantise_blocks(x))


@pytest.mark.usefixtures("kernels")
def test_groups_of_rows_have_tiles_of_their_own() -> None:
    """Rows that an index finds, in groups of any size: each group is tiled as if it were alone."""
    x, sizes = drawn(500, 70), (130, 0, 1, 128, 300)
    at = torch.randint(0, 500, (sum(sizes),), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    for source in (x, quantise_rows(x)):
        found, _ = kernels.tile_columns(source, at, ends_of(*sizes), power_of_two=False)
        rows = (dequantise_rows(source) if isinstance(source, Tiles) else source)[at]
        alone = [quantise_columns(group) for group in rows.split(sizes)]
        assert_same(
            found, Tiles(torch.cat([tiles.codes.float() for tiles in alone]), torch.cat([t.scales for t in alone]))
        )


@pytest.mark.usefixtures("kernels")
def test_what_tiles_kept_comes_back_in_bfloat16() -> None:
    """Codes times scales, rounded once."""
    tiles = quantise_rows(drawn(37, 300))
    assert torch.equal(kernels.untile_rows(tiles), dequantise_rows(tiles).to(torch.bfloat16))


def test_every_number_goes_to_the_nearest_code() -> None:
    """Against all 253 numbers of e4m3: none is nearer than the one chosen; of two equally near it is the even one."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = codes.float().double()[codes.float().isfinite()].unique()
    between, generator = (numbers[1:] + numbers[:-1]) / 2, torch.Generator().manual_seed(0)
    shares = torch.rand(40, len(between), generator=generator, dtype=torch.float64)
    x = torch.cat((numbers, between, (numbers[:-1] + shares * numbers.diff()).flatten()))
    x = torch.nn.functional.pad(x, (0, -len(x) % (TILE - 1))).view(-1, TILE - 1)
    x = torch.cat((torch.full((len(x), 1), 448.0, dtype=torch.float64), x), dim=1).float()  # the scale is 1
    tiles = quantise_rows(x)
    assert (tiles.scales == 1).all()
    found, exact = tiles.codes.float().double(), x.double()
    distances = (exact.unsqueeze(-1) - numbers).abs()
    nearest = distances.amin(dim=-1)
    assert torch.equal((found - exact).abs(), nearest)
    ties = (distances == nearest.unsqueeze(-1)).sum(dim=-1) == 2
    assert ties.sum() > 200
    assert (tiles.codes.view(torch.uint8)[ties] % 2 == 0).all()


def test_every_code_is_kept() -> None:
    """What is a code already comes back as it was: subnormal ones and both zeros included."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = codes.float()[codes.float().isfinite()]
    for scale in (1.0, 2.0**-30, 2.0**20):
        tiles = Tiles(*quantise_rows(torch.cat((numbers[:127], numbers[-127:])).view(2, 127) * scale))
        assert torch.equal(dequantise_rows(tiles) / scale, torch.cat((numbers[:127], numbers[-127:])).view(2, 127))


def test_scales_are_those_of_their_tile_alone() -> None:
    """The largest of a tile becomes 448; a power of two is the least that lets it fit."""
    x = drawn(50, 300)
    exact, powers = quantise_rows(x), quantise_rows(x, power_of_two=True)
    for tile in range(3):
        part = slice(tile * TILE, (tile + 1) * TILE)
        assert (exact.codes[:, part].float().abs().amax(dim=1) == 448).all()
        largest = x[:, part].abs().amax(dim=1) / powers.scales[:, tile]
        assert ((largest > 224) & (largest <= 448)).all()
    assert (torch.frexp(powers.scales).mantissa == 0.5).all()
    assert ((powers.scales >= exact.scales) & (powers.scales < 2 * exact.scales)).all()


def test_what_is_no_number_poisons_its_tile_and_no_other() -> None:
    """A NaN or an infinity takes the 128 numbers of its tile with it: along rows, down columns, in blocks."""
    x = drawn(300, 300)
    x[130, 140] = torch.nan
    x[10, 299] = torch.inf
    rows, columns = dequantise_rows(quantise_rows(x)), dequantise_columns(quantise_columns(x))
    poisoned = torch.zeros(300, 300, dtype=torch.bool)
    poisoned[130, 128:256] = poisoned[10, 256:] = True
    assert torch.equal(rows.isnan(), poisoned)
    poisoned[:] = False
    poisoned[128:256, 140] = poisoned[:128, 299] = True
    assert torch.equal(columns.isnan(), poisoned)
    assert quantise_blocks(x).scales.isnan().sum() == 2


def test_outliers_stay_in_their_tile() -> None:
    """One large number in 4,096: tiles lose next to nothing by it, one scale for the whole tensor most of the
    others."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(2)) * 1e-3
    x.view(-1)[::4096] = 1e4
    plain = x.abs() < 1
    tiled = dequantise_rows(quantise_rows(x))
    scale = x.abs().max() / 448
    whole = (x / scale).to(torch.float8_e4m3fn).float() * scale
    error = [((kept - x)[plain].norm() / x[plain].norm()).item() for kept in (tiled, whole)]
    assert error[0] < 0.3
    assert error[1] > 0.9
