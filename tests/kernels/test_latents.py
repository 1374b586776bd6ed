"""Kernels over latents in FP8 against their twins in PyTorch, and against themselves in other company."""

import pytest
import torch
from torch import Tensor

from fathom.kernels import latents, ops
from fathom.kernels.ops import PAGE
from fathom.model.latents import pack_latents, packed_bytes, unpack_latents
from tests.kernels.test_attention import assert_close
from tests.kernels.test_products import draw

pytestmark = pytest.mark.usefixtures("kernels")
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 200]
WIDTHS = pytest.mark.parametrize(("latent", "rope"), [(512, 64), (128, 32), (384, 96)])
NOTHING = 255
"""A byte that makes codes, scales and keys that are no numbers."""


def case(heads: int, latent: int, rope: int, lengths: list[int] = LENGTHS) -> dict:
    """Sequences of these lengths on scattered pages; what no sequence has written is no number."""
    pages = sum(-(-length // PAGE) for length in lengths)
    pool = torch.full((pages + 1, PAGE, packed_bytes(latent, rope)), NOTHING, dtype=torch.uint8)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).tolist()
    tables = torch.full((len(lengths), max(-(-length // PAGE) for length in lengths)), pages, dtype=torch.int32)
    stored = []
    for row, length in enumerate(lengths):
        owned = [order.pop() for _ in range(-(-length // PAGE))]
        tables[row, : len(owned)] = torch.tensor(owned)
        rows = draw(length, latent + rope, dtype=torch.bfloat16, seed=row)
        places = torch.tensor([owned[i // PAGE] * PAGE + i % PAGE for i in range(length)])
        latents.write_latents(rows, pool, places, latent)
        stored.append(unpack_latents(pack_latents(rows, latent), latent))
    q = draw(len(lengths), heads, latent + rope, dtype=torch.bfloat16, seed=99)
    visible = torch.tensor(lengths, dtype=torch.int32)
    return {"q": q, "pool": pool, "tables": tables, "visible": visible, "latent": latent, "stored": stored}


def attention(parts: dict, rows: slice = slice(None)) -> Tensor:
    tables = parts["tables"][rows].contiguous()
    return latents.latent_attention(
        parts["q"][rows], parts["pool"], tables, parts["visible"][rows], parts["latent"], 0.1
    )


@WIDTHS
def test_rows_are_written_to_their_places_alone(latent: int, rope: int) -> None:
    """Rows, strided or not, of any magnitude, zeros and no numbers among them, lie as the twin packs them, and every
    other byte is as it was."""
    rows = draw(6, 4, latent + rope, dtype=torch.bfloat16)[:, 1]
    rows[0], rows[1, 130 % latent], rows[2, 5] = 0, float("nan"), -float("inf")
    rows[3] *= 1e-6
    rows[4, :latent] = 3e38
    rows[5, :64] *= 1e-3
    places = torch.tensor([0, 63, 64, 255, 130, 1])
    for given in (rows, rows.T.contiguous().T):
        written = torch.full((4, PAGE, packed_bytes(latent, rope)), 7, dtype=torch.uint8)
        expected = written.clone()
        latents.write_latents(given, written, places, latent)
        expected.flatten(0, 1)[places] = pack_latents(rows, latent)
        numbers = expected.flatten(0, 1)[places][:, :latent].view(torch.float8_e4m3fn).float().isnan()
        assert numbers.any()
        got, wanted = (t.flatten(0, 1)[places][:, :latent] for t in (written, expected))
        assert torch.equal(got[~numbers], wanted[~numbers])
        assert got[numbers].view(torch.float8_e4m3fn).float().isnan().all()
        for pool in (written, expected):  # which of its bit patterns no number has is nobody's concern
            pool.flatten(0, 1)[places[:3]] = 0
        assert torch.equal(written, expected)


@WIDTHS
@pytest.mark.parametrize("count", [1, 63, 64, 65, 190])
def test_reading_back_equals_the_twin(latent: int, rope: int, count: int) -> None:
    """The first positions on scattered pages come back in order, to the bit."""
    rows = draw(3 * PAGE, latent + rope, dtype=torch.bfloat16)
    pool = pack_latents(rows, latent).view(3, PAGE, -1)
    owned = torch.tensor([2, 0, 1])
    got = latents.read_latents(pool, owned, count, latent=latent, rope=rope)
    assert torch.equal(got, unpack_latents(pool[owned].flatten(0, 1)[:count], latent))


@WIDTHS
@pytest.mark.parametrize("heads", [1, 3, 8, 9, 20])
def test_attention_equals_the_definition(latent: int, rope: int, heads: int) -> None:
    """Any number of heads, at lengths around a page's, gives softmax attention over what was stored, whatever unwritten
    pages hold."""
    parts = case(heads, latent, rope)
    rows = []
    for q, stored in zip(parts["q"].double(), parts["stored"], strict=True):
        weights = (q @ stored.double().T * 0.1).softmax(dim=-1)
        rows.append(weights @ stored[:, :latent].double())
    assert_close(attention(parts), torch.stack(rows))


@WIDTHS
def test_attention_equals_that_over_widened_pages(latent: int, rope: int) -> None:
    """What `paged_attention` makes of the same numbers in bfloat16 has the same bits."""
    parts = case(9, latent, rope)
    keys = unpack_latents(parts["pool"], latent).unsqueeze(1)
    wide = ops.paged_attention(parts["q"], keys, keys[..., :latent], parts["tables"], parts["visible"], 0.1)
    assert torch.equal(attention(parts), wide)


def test_a_token_does_not_depend_on_its_company() -> None:
    """A token's attention has the same bits alone and among 64 and 200, and with more threads than it has heads."""
    parts = case(9, 128, 32, lengths=[1 + 7 * n % 130 for n in range(200)])
    whole = attention(parts)
    assert torch.equal(attention(parts, slice(64)), whole[:64])
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            for row in (0, 1, 63, 64, 199):
                assert torch.equal(attention(parts, slice(row, row + 1))[0], whole[row]), (row, count)
        finally:
            torch.set_num_threads(threads)


def test_no_number_in_a_latent_reaches_only_those_who_see_it() -> None:
    """Of tokens that see a growing part of one text, those before the poisoned position are untouched, all others are
    poisoned in the 128 numbers of its tile at least."""
    lengths = [60, 64, 65, 66, 90]
    parts = case(5, 256, 32, lengths=lengths)
    rows = draw(90, 288, dtype=torch.bfloat16, seed=5)
    pool, places = torch.full((2, PAGE, packed_bytes(256, 32)), NOTHING, dtype=torch.uint8), torch.arange(90)
    parts |= {"pool": pool, "tables": torch.tensor([[0, 1]] * 5, dtype=torch.int32)}
    latents.write_latents(rows, pool, places, 256)
    clean = attention(parts)
    rows[65, 3] = float("nan")
    latents.write_latents(rows, pool, places, 256)
    poisoned = attention(parts)
    assert torch.equal(poisoned[:3], clean[:3])
    assert poisoned[3:, :, :128].isnan().all()
    assert clean.isfinite().all()
