"""Dense decoders whose layers run in one call."""

import pytest
import torch

from fathom.config.presets import preset
from fathom.engine.dense import DenseDecoder, dense_decoder
from fathom.engine.packing import packed
from fathom.kernels.ops import PAGE
from fathom.model.paged import PagedCache, PagedCall
from fathom.model.transformer import Transformer
from tests.model.configs import FAMILIES, build

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("weights", ["as loaded", "int8", "fp8"])
def test_dense_layers_in_one_call_equal_the_modules_to_the_bit(weights: str) -> None:
    """Hidden states and cache are the same whether layers run in one call or as modules."""
    torch.manual_seed(0)
    config = preset("smollm2-135m").replace(num_hidden_layers=3)
    model = Transformer(config)
    model.init_weights(0)
    one_by_one = packed(model.to(torch.bfloat16), weights)
    at_once = dense_decoder(one_by_one)
    assert isinstance(at_once, DenseDecoder)
    tokens, width = 70, 2
    tables = torch.arange(tokens * width, dtype=torch.int32).view(tokens, width)
    positions = torch.arange(tokens) % PAGE + PAGE
    ids = torch.randint(config.vocab_size, (1, tokens))
    results = []
    with torch.inference_mode():
        for form in (one_by_one, at_once):
            cache = PagedCache(config, pages=tokens * width, dtype=torch.bfloat16)
            torch.manual_seed(1)
            for pool in (pool for pair in cache.pools for pool in pair):
                pool.normal_()
            places = tables[:, 1].long() * PAGE + positions % PAGE
            call = PagedCall(cache, positions, places, tokens, tables, (positions + 1).to(torch.int32))
            hidden, _ = form.hidden_states(ids, cache=call)
            results.append([hidden, *(pool for pair in cache.pools for pool in pair)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_prompt_divided_among_threads_is_read_as_by_one(threads: int) -> None:
    """Tokens of one sequence that different threads take see each other's keys, in every layer."""
    torch.manual_seed(0)
    config = preset("smollm2-135m").replace(num_hidden_layers=3)
    model = Transformer(config)
    model.init_weights(0)
    decoder = dense_decoder(packed(model.to(torch.bfloat16)))
    assert isinstance(decoder, DenseDecoder)
    tokens = 190
    ids, pages = torch.randint(config.vocab_size, (tokens,)), torch.arange(3, dtype=torch.int32)

    def hidden(parts: list[int]) -> torch.Tensor:
        cache, rows, start = PagedCache(config, pages=3, dtype=torch.bfloat16), [], 0
        for count in parts:
            positions = torch.arange(start, start + count)
            call = PagedCall(
                cache, positions, positions, count, pages.repeat(count, 1), (positions + 1).to(torch.int32)
            )
            rows.append(decoder.hidden_states(ids[None, start : start + count], cache=call)[0][0])
            start += count
        return torch.cat(rows)

    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            one_by_one = hidden([1] * tokens)
            torch.set_num_threads(threads)
            assert all(torch.equal(one_by_one, hidden([tokens])) for _ in range(5))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_dense_decoders_are_run_in_one_call(name: str) -> None:
    """Models with latent attention or experts stay as they are; heads of a width that kernels do not take, too."""
    model = packed(build(FAMILIES[name]))
    config = model.config
    expected = config.kv_lora_rank is None and config.dense_head_dim % 32 == 0
    assert isinstance(dense_decoder(model), DenseDecoder) == expected
