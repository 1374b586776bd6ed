"""The paged cache and packed weights against the plain model, and against themselves in other company."""

import itertools

import pytest
import torch
from torch import Tensor

from fathom.config import ModelConfig, preset
from fathom.engine.packing import packed
from fathom.kernels import ops
from fathom.kernels.ops import PAGE
from fathom.model import accounting
from fathom.model.attention import MLA
from fathom.model.latents import pack_latents, unpack_latents
from fathom.model.paged import PagedCache, PagedCall, Stretch
from fathom.model.transformer import Transformer
from tests.model.configs import FAMILIES, V3, build, tokens

# Widths that every kernel takes, none of them alike.
FITTING = {
    "mla": V3.replace(
        num_attention_heads=5, kv_lora_rank=48, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=20,
        moe_intermediate_size=24, intermediate_size=80, max_position_embeddings=512,
    ),
    "gqa": FAMILIES["qwen3"].replace(
        num_attention_heads=6, num_key_value_heads=2, head_dim=32, hidden_size=72, intermediate_size=100,
        max_position_embeddings=512,
    ),
}  # fmt: skip
PACKABLE = FITTING["mla"].replace(kv_lora_rank=256, qk_rope_head_dim=32)
"""Whose latents can be kept in FP8."""
every_family = pytest.mark.parametrize(
    "config",
    [*(c.replace(max_position_embeddings=512) for c in FAMILIES.values()), *FITTING.values()],
    ids=[*FAMILIES, "fitting mla", "fitting gqa"],
)
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


class Text:
    """A sequence on scattered pages of a cache, read and written by hand."""

    def __init__(self, model: Transformer, cache: PagedCache, ids: Tensor, pages: list[int]) -> None:
        self.model, self.cache, self.ids, self.pages = model, cache, ids, pages

    def part(self, start: int, stop: int) -> "Part":
        return Part(self, start, stop)


class Part:
    """Tokens start..stop of a text."""

    def __init__(self, text: Text, start: int, stop: int) -> None:
        self.text, self.start, self.stop = text, start, stop


@torch.inference_mode()
def compute(singles: list[Part], stretches: list[Part]) -> list[Tensor]:
    """One call of the model over these parts: hidden states of each."""
    parts = [*singles, *stretches]
    positions = torch.cat([torch.arange(p.start, p.stop) for p in parts])
    places = torch.cat([_places(p) for p in parts])
    rows = [p.text.pages for p in singles for _ in range(p.start, p.stop)]
    width = max(map(len, rows), default=0)
    tables = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)
    borders = list(itertools.accumulate((p.stop - p.start for p in parts), initial=0))
    whole = [
        Stretch(first, last, torch.tensor(p.text.pages[: -(-p.stop // PAGE)]), past=p.start)
        for p, (first, last) in zip(stretches, itertools.pairwise(borders[len(singles) :]), strict=True)
    ]
    count = len(rows)
    visible = (positions[:count] + 1).to(torch.int32)
    call = PagedCall(parts[0].text.cache, positions, places, count, tables, visible, whole)
    ids = torch.cat([p.text.ids[p.start : p.stop] for p in parts])
    hidden = parts[0].text.model.hidden_states(ids[None], cache=call)[0][0]
    return list(hidden.split([p.stop - p.start for p in parts]))


def _places(part: Part) -> Tensor:
    return torch.tensor([part.text.pages[i // PAGE] * PAGE + i % PAGE for i in range(part.start, part.stop)])


def new_text(model: Transformer, ids: Tensor, pages: list[int] | None = None, *, fp8: bool = False) -> Text:
    """A text with a cache of its own, whose pages held something that is no number before."""
    dtype = model.compute_dtype or model.model.embed_tokens.weight.dtype
    cache = PagedCache(model.config, pages=8, dtype=dtype, mtp_layers=model.config.num_nextn_predict_layers, fp8=fp8)
    for pool in itertools.chain(*cache.pools):
        if pool is not None:
            pool.fill_(255 if fp8 else float("nan"))  # bytes of which codes, scales and keys are no numbers
    return Text(model, cache, ids, pages or [5, 2, 7, 1, 3])


def read(text: Text, *borders: int) -> Tensor:
    """Hidden states of a text read in stretches that end at `borders`, the rest token by token."""
    got = [compute([], [text.part(start, stop)])[0] for start, stop in itertools.pairwise((0, *borders))]
    got += [compute([text.part(i, i + 1)], [])[0] for i in range(borders[-1], len(text.ids))]
    return torch.cat(got)


def in_dtype(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    model = build(config)
    model.compute_dtype = dtype
    return model


@every_family
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "plain"])
def test_pages_equal_no_cache(config: ModelConfig, is_packed: bool) -> None:
    """A text read in stretches and token by token through recycled pages gives the logits of one plain pass."""
    model, ids = build(config), tokens(config, 150)
    with torch.no_grad():
        expected = model(ids[None])[0]
    paged = packed(model) if is_packed else model
    got = paged.logits(read(new_text(paged, ids), 64, 100, 141))
    assert (got - expected).abs().max() <= 1e-4


@every_family
def test_master_weights_are_rounded_once(config: ModelConfig) -> None:
    """Float32 weights with bfloat16 activations give, packed, what the plain model gives, up to bfloat16's rounding."""
    model, ids = in_dtype(config, torch.bfloat16), tokens(config, 70)
    exact, got = build(config), packed(model)
    with torch.no_grad():
        expected, plain = exact(ids[None])[0], model(ids[None])[0]
    logits = got.logits(read(new_text(got, ids), 60))
    assert logits.dtype is torch.float32
    # As far from the exact logits as rounding takes the plain model, on average (single routes may differ).
    assert (logits - expected).abs().mean() <= 1.5 * (plain - expected).abs().mean() + 1e-3


@pytest.mark.parametrize("config", [V3, FITTING["mla"]], ids=["v3", "fitting"])
def test_mtp_through_pages_equals_no_cache(config: ModelConfig) -> None:
    """The prediction module, fed piece by piece through its own pages, gives the hidden states of one plain pass."""
    model, ids = build(config.replace(max_position_embeddings=512)), tokens(config, 90)
    with torch.no_grad():
        hidden, _ = model.hidden_states(ids[None, :-1])
        expected = model.mtp_hidden_states(0, hidden, ids[None, 1:])[0][0]
    fast = packed(model)
    text, got = new_text(fast, ids), []
    for start, stop in itertools.pairwise((0, 64, 80, 81, 82, 89)):
        positions, table = torch.arange(start, stop), torch.tensor([text.pages] * (stop - start), dtype=torch.int32)
        call = PagedCall(
            text.cache, positions, _places(text.part(start, stop)), stop - start, table, (positions + 1).int()
        )
        with torch.inference_mode():
            states, following = hidden[:, start:stop], ids[None, start + 1 : stop + 1]
            got.append(fast.mtp_hidden_states(0, states, following, cache=call)[0][0])
    assert (torch.cat(got) - expected).abs().max() <= 1e-4


@both_types
@pytest.mark.parametrize("name", FITTING)
@pytest.mark.usefixtures("kernels")
def test_a_decoded_token_does_not_depend_on_its_company(name: str, dtype: torch.dtype) -> None:
    """A token behind its text has the same bits alone, beside 40 others, and beside a prompt that is being read."""
    config = FITTING[name]
    model = packed(in_dtype(config, dtype))
    cache = PagedCache(config, pages=64, dtype=dtype)
    texts = [Text(model, cache, tokens(config, 20 + n, seed=n), [n]) for n in range(40)]
    prompt = Text(model, cache, tokens(config, 200, seed=99), [50, 51, 52, 53])
    for text in texts:
        compute([], [text.part(0, len(text.ids) - 1)])
    alone = [compute([text.part(len(text.ids) - 1, len(text.ids))], [])[0] for text in texts]
    last = [text.part(len(text.ids) - 1, len(text.ids)) for text in texts]
    for got in (compute(last, []), compute(last[::-1], [prompt.part(0, 200)])[39::-1], compute(last[:7], [])):
        for row, expected in zip(got, alone, strict=False):
            assert torch.equal(row, expected)


@both_types
@pytest.mark.parametrize("name", FITTING)
@pytest.mark.usefixtures("kernels")
def test_a_prompt_does_not_depend_on_what_was_remembered(name: str, dtype: torch.dtype) -> None:
    """Read from its start, behind any number of remembered blocks, or beside others, a prompt has the same bits."""
    config = FITTING[name]
    model, ids = packed(in_dtype(config, dtype)), tokens(config, 300)
    whole = read(new_text(model, ids), 256, 300)
    for borders in ((64, 256, 300), (128, 256, 300), (192, 256, 300), (64, 128, 192, 256, 300)):
        assert torch.equal(read(new_text(model, ids), *borders), whole), borders
    # Blocks that a shorter text has left behind.
    assert torch.equal(read(new_text(model, ids[:100]), 100), whole[:100])
    cache = PagedCache(config, pages=16, dtype=dtype)
    text, other = Text(model, cache, ids, [5, 2, 7, 1, 3]), Text(model, cache, ids.flip(0), [9, 8, 6, 4, 0])
    beside = compute([], [other.part(0, 150), text.part(0, 256)])[1]
    assert torch.equal(beside, whole[:256])


@both_types
@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("length", [258, 300, 383, 384, 385])
@pytest.mark.usefixtures("kernels")
def test_a_prompt_may_be_cut_anywhere(name: str, dtype: torch.dtype, length: int) -> None:
    """Stretches that begin or end beside the borders of attention's blocks give every token the bits of the whole."""
    config = FITTING[name]
    model, ids = packed(in_dtype(config, dtype)), tokens(config, length)
    pages = [5, 2, 7, 1, 3, 4, 6]
    whole = read(new_text(model, ids, pages), 256, length)
    assert torch.equal(read(new_text(model, ids, pages), 256, length - 1, length)[256:], whole[256:])


@pytest.mark.usefixtures("kernels")
def test_a_text_computed_again_is_the_same() -> None:
    """A text that gave its pages back and is computed anew, many of its tokens in one call, has the same bits."""
    config = FITTING["mla"]
    model, ids = packed(in_dtype(config, torch.bfloat16)), tokens(config, 130)
    first, again = new_text(model, ids), new_text(model, ids, [0, 4, 6])
    written = read(first, 100)
    read(again, 100)[:100]
    again = new_text(model, ids, [0, 4, 6])
    compute([], [again.part(0, 100)])
    assert torch.equal(compute([again.part(100, 130)], [])[0], written[100:])


@pytest.mark.parametrize("name", ["fathom-tiny", "fathom-59m", "deepseek-v3", "deepseek-v2-lite", "moonlight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_is_as_large_as_accounted_for_mla(name: str, dtype: torch.dtype) -> None:
    """What the allocator gives for a page of latents is 64 times the accounted bytes per token."""
    _assert_accounted(preset(name), dtype)


@pytest.mark.parametrize(("name", "row"), [("fathom-59m", 196), ("deepseek-v2-lite", 656), ("deepseek-v3", 656)])
def test_a_page_in_fp8_is_as_large_as_accounted(name: str, row: int) -> None:
    """A page is 64 times the accounted bytes per token: FlashMLA's 656 in every layer with a latent of 512 + 64."""
    config = preset(name)
    cache = PagedCache(config, pages=1, dtype=torch.bfloat16, fp8=True)
    assert cache.nbytes() == PAGE * accounting.fp8_kv_bytes_per_token(config) == PAGE * row * config.num_hidden_layers
    assert cache.nbytes() < 0.62 * PagedCache(config, pages=1, dtype=torch.bfloat16).nbytes()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_page_is_as_large_as_accounted_for_gqa(name: str) -> None:
    """What the allocator gives for a page of keys and values is 64 times the accounted bytes per token."""
    _assert_accounted(FAMILIES[name], torch.bfloat16)


def _assert_accounted(config: ModelConfig, dtype: torch.dtype) -> None:
    cache = PagedCache(config, pages=1, dtype=dtype)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for p in cache.pools for t in p if t is not None
    }
    assert sum(storages.values()) == cache.nbytes() == PAGE * accounting.kv_bytes_per_token(config, dtype.itemsize)


@pytest.mark.parametrize("name", [*FITTING, "fp8"])
def test_a_copied_page_is_whole(name: str) -> None:
    """After a copy the pools of all layers, those of prediction modules and the routes are equal on both pages, and no
    other page has changed."""
    config, dtype = (PACKABLE, torch.bfloat16) if name == "fp8" else (FITTING[name], torch.float32)
    cache = PagedCache(config, pages=4, dtype=dtype, mtp_layers=1, routes=config.is_mla, fp8=name == "fp8")
    pools = [pool for pair in cache.pools for pool in pair if pool is not None]
    pools += [] if cache.routes is None else [cache.routes.transpose(0, 1)]
    assert len(pools) == (config.num_hidden_layers + 1) * (1 if config.is_mla else 2) + config.is_mla
    for pool in pools:
        pool.random_(200)
    before = [pool.clone() for pool in pools]
    cache.copy_page(2, 1)
    assert all(torch.equal(pool, old[[0, 2, 2, 3]]) for pool, old in zip(pools, before, strict=True))


def test_without_kernels_pages_work_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing could be compiled, packing leaves the modules as they are and pages give the same logits."""
    monkeypatch.setattr(ops, "library", lambda: None)
    for config in FITTING.values():
        model, ids = build(config), tokens(config, 100)
        same = packed(model)
        assert [type(module) for module in same.modules()] == [type(module) for module in model.modules()]
        with torch.no_grad():
            expected = model(ids[None])[0]
        assert (same.logits(read(new_text(same, ids), 64, 80)) - expected).abs().max() <= 1e-4


def rounding_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on plain models attend to what an FP8 cache would have kept."""
    exact = MLA._latents

    def rounded(self: MLA, compressed: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        latent, k_rope = exact(self, compressed, rope)
        rows = torch.cat((latent, k_rope), dim=-1).squeeze(0)
        return unpack_latents(pack_latents(rows, self.latent_width), self.latent_width)[None].split(
            (self.latent_width, self.rope), dim=-1
        )

    monkeypatch.setattr(MLA, "_latents", rounded)


@pytest.mark.parametrize("has_kernels", [True, False], ids=["kernels", "twin"])
@pytest.mark.parametrize("config", [PACKABLE, PACKABLE.replace(qk_rope_head_dim=16)], ids=["fitting", "odd key"])
def test_fp8_pages_equal_a_model_that_rounds_its_latents(
    config: ModelConfig, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stretches and single tokens over recycled pages of bytes give the hidden states of one plain pass whose latents
    are rounded, as near as bfloat16 pages come to a plain pass without; and not those of the latter."""
    if not has_kernels:
        monkeypatch.setattr(ops, "library", lambda: None)
    model, ids = in_dtype(config, torch.bfloat16), tokens(config, 200)
    fast = packed(model)
    got, wide = read(new_text(fast, ids, fp8=True), 64, 100, 141), read(new_text(fast, ids), 64, 100, 141)
    with torch.no_grad():
        exact = model.hidden_states(ids[None])[0][0]
        rounding_latents(monkeypatch)
        expected = model.hidden_states(ids[None])[0][0]
    # Of tokens, because a route that turns over changes one of them much.
    error, noise, change = (
        (a - b).float().norm(dim=1).median() / a.float().norm(dim=1).median()
        for a, b in ((expected, got), (exact, wide), (exact, got))
    )
    assert error <= 1.5 * noise
    assert change > 2 * noise


@pytest.mark.usefixtures("kernels")
def test_a_token_over_fp8_pages_does_not_depend_on_its_company_or_on_cuts() -> None:
    """A text has the same bits alone, beside another, cut at other blocks, and with its last tokens in one call."""
    model, ids = packed(in_dtype(PACKABLE, torch.bfloat16)), tokens(PACKABLE, 300)
    whole = read(new_text(model, ids, fp8=True), 256, 290)
    assert torch.equal(read(new_text(model, ids, fp8=True), 64, 192, 256, 290), whole)
    again = new_text(model, ids, fp8=True)
    read(Text(model, again.cache, ids[:290], again.pages), 256, 290)
    assert torch.equal(compute([again.part(290, 300)], [])[0], whole[290:])
    cache = PagedCache(PACKABLE, pages=16, dtype=torch.bfloat16, fp8=True)
    text, other = Text(model, cache, ids, [5, 2, 7, 1, 3]), Text(model, cache, ids.flip(0), [9, 8, 6, 4, 0])
    assert torch.equal(compute([], [other.part(0, 150), text.part(0, 256)])[1], whole[:256])


@pytest.mark.usefixtures("kernels")
def test_kernels_and_twins_keep_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a text's first layer stores through kernels is to the bit what it stores through PyTorch."""
    model, ids = in_dtype(PACKABLE, torch.bfloat16), tokens(PACKABLE, 90)
    first, second = new_text(model, ids, fp8=True), new_text(model, ids, fp8=True)
    with_kernels = read(first, 70)
    monkeypatch.setattr(ops, "library", lambda: None)
    without = read(second, 70)
    assert torch.equal(first.cache.pools[0][0], second.cache.pools[0][0])
    errors = (with_kernels - without).float().norm(dim=1) / without.float().norm(dim=1)
    assert errors.median() <= 0.02


def test_packing_leaves_the_model_as_it_was() -> None:
    """Packing shares nothing that it changes: the model gives the same logits afterwards, and has the same modules."""
    for config in FITTING.values():
        model, ids = build(config), tokens(config, 1, 20)
        with torch.no_grad():
            before, names = model(ids), [name for name, _ in model.named_modules()]
            packed(model)
            assert torch.equal(model(ids), before)
        assert [name for name, _ in model.named_modules()] == names
