"""The layout of latents in FP8, against FlashMLA's description of it."""

import math

import pytest
import torch
from torch import Tensor

from fathom.config import preset
from fathom.errors import UserError
from fathom.model.latents import pack_latents, packed_bytes, require_packable, unpack_latents
from tests.model.configs import FAMILIES


def draw(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Latents whose tiles differ much in magnitude."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-20, 20, (tokens, width // 32), generator=generator)).repeat_interleave(32, dim=1)
    return (torch.randn(tokens, width, generator=generator) * sizes).bfloat16()


def test_bytes_lie_where_flashmla_reads_them() -> None:
    """Of 656 bytes the first 512 are e4m3 codes, 16 hold four float32 scales, and 128 the key's bfloat16 as it was."""
    rows = draw(7, 576)
    rows[3, :128] = rows[3, :128].sign() * 2.0**-18  # one tile below the least scale
    packed = pack_latents(rows, 512)
    assert packed.dtype is torch.uint8
    assert packed.shape == (7, packed_bytes(512, 64)) == (7, 656)
    raw = bytes(packed[3].tolist())
    scales = torch.frombuffer(bytearray(raw[512:528]), dtype=torch.float32)
    codes = torch.frombuffer(bytearray(raw[:512]), dtype=torch.float8_e4m3fn).float()
    assert torch.equal(torch.frombuffer(bytearray(raw[528:]), dtype=torch.bfloat16), rows[3, 512:])
    for tile in range(4):
        part = slice(128 * tile, 128 * tile + 128)
        largest = float(rows[3, part].abs().max())
        assert scales[tile] == 2.0 ** math.ceil(math.log2(max(largest / 448, 1e-4)))
        assert torch.equal(codes[part], (rows[3, part].float() / scales[tile]).to(torch.float8_e4m3fn).float())


def test_reading_back_loses_nothing_more() -> None:
    """What was stored is within half a step of e4m3 of what was written, and comes back the same when stored again."""
    rows = draw(50, 416)
    stored = unpack_latents(pack_latents(rows, 384), 384)
    assert stored.dtype is torch.bfloat16
    assert torch.equal(stored[:, 384:], rows[:, 384:])
    tiles, kept = (t[:, :384].float().unflatten(1, (3, 128)) for t in (rows, stored))
    smallest_step = (tiles.abs().amax(dim=2, keepdim=True) / 448).clamp_min(1e-4) * 2 * 2.0**-9
    assert ((kept - tiles).abs() <= (tiles.abs() / 16).maximum(smallest_step)).all()
    assert torch.equal(unpack_latents(pack_latents(stored, 384), 384), stored)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_poisons_its_tile_alone(bad: float) -> None:
    """The 128 numbers beside it are no numbers either; those of other tiles, and other tokens, are what they were."""
    rows = draw(3, 288)
    expected = unpack_latents(pack_latents(rows, 256), 256)
    rows[1, 130] = bad
    got = unpack_latents(pack_latents(rows, 256), 256)
    assert got[1, 128:256].isnan().all()
    got[1, 128:256] = expected[1, 128:256]
    assert torch.equal(got, expected)


def test_zeros_and_large_numbers_are_kept() -> None:
    """A latent of zeros stays one; powers of two up to bfloat16's largest are exact."""
    rows = torch.zeros(3, 160).bfloat16()
    rows[1, :128] = 2.0**127
    rows[2, :128] = -(2.0**-10)
    assert torch.equal(unpack_latents(pack_latents(rows, 128), 128), rows)


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("v3", torch.bfloat16, "a multiple of 128 .* latents of 20"),
        ("qwen3", torch.bfloat16, "for latents, .* keys and values per head"),
        ("fathom-latent512", torch.float32, "needs a model in bfloat16, not float32; use --dtype bfloat16"),
    ],
)
def test_other_models_are_refused_in_a_sentence(name: str, dtype: torch.dtype, said: str) -> None:
    """Another latent, none at all, and float32 are named, with what is needed."""
    config = FAMILIES[name] if name in FAMILIES else preset(name)
    with pytest.raises(UserError, match=said) as refused:
        require_packable(config, dtype)
    assert "\n" not in str(refused.value)
