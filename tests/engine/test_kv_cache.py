"""Engines that keep latents in FP8: the same text in any company, more pages for the memory, near the text without."""

import pytest
import torch

from fathom.config import preset
from fathom.engine.engine import Engine, EngineSettings
from fathom.engine.protocol import Sampling
from fathom.errors import UserError
from fathom.kernels.ops import PAGE
from fathom.model.accounting import fp8_kv_bytes_per_token, kv_bytes_per_token
from fathom.model.paged import PagedCache
from fathom.model.transformer import Transformer
from tests.engine.running import GQA, GREEDY, MLA, TAGGED, alone, ask, at_once, engine_of, run
from tests.model.configs import build, tokens
from tests.model.test_paged import new_text, read

PACKABLE = MLA.replace(kv_lora_rank=128, qk_rope_head_dim=32)
SAMPLED = Sampling(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = build(PACKABLE)
    model.compute_dtype = torch.bfloat16
    return model


def memory_for(pages: int, *, mtp_layers: int = 1, fp8: bool = True) -> int:
    return PagedCache(PACKABLE, pages=pages, dtype=torch.bfloat16, mtp_layers=mtp_layers, fp8=fp8).nbytes()


def test_a_text_is_the_same_in_any_company(model: Transformer) -> None:
    """Greedy and sampled, prompts read token by token and in stretches, with drafts and recorded routes: requests get
    alone what they get together, log-probabilities included, and something else than without FP8."""
    requests = [
        ask(tokens(PACKABLE, length, seed=length).tolist(), sampling=sampling, logprobs=0)
        for length in (1, 65, 130, 400)
        for sampling in (GREEDY, SAMPLED)
    ]
    with engine_of(model, kv_cache="fp8", record_routes=True) as engine:
        together = run(engine, requests)
        assert [outcome.ids for outcome in together] == [outcome.ids for outcome in alone(engine, requests)]
        assert engine.statistics().accepted_tokens
    with engine_of(model, kv_cache="fp8", record_routes=True) as engine:
        separate = alone(engine, requests)
        for one, other in zip(together, separate, strict=True):
            assert one.logprobs == other.logprobs
            assert one.last.routes is not None
            assert torch.equal(one.last.routes, other.last.routes)
    with engine_of(model) as engine:
        assert [outcome.logprobs for outcome in run(engine, requests)] != [outcome.logprobs for outcome in together]


def test_drafts_change_no_text(model: Transformer) -> None:
    """With and without the prediction module, whose pages are in FP8 too, greedy texts are equal."""
    requests = [ask(tokens(PACKABLE, length, seed=1).tolist()) for length in (5, 70, 300)]
    with engine_of(model, kv_cache="fp8") as engine, engine_of(model, kv_cache="fp8", speculate=False) as plain:
        assert [outcome.ids for outcome in run(engine, requests)] == [outcome.ids for outcome in run(plain, requests)]


def test_samples_of_one_prompt_share_its_pages(model: Transformer) -> None:
    """Requests with one prompt begin with copies of what the first has read, and with a remembered prefix later; each
    draws what it draws alone in an engine that remembers nothing."""
    prompt = tokens(PACKABLE, 150).tolist()
    requests = [ask(prompt, sampling=Sampling(temperature=1.0, seed=seed)) for seed in range(4)]
    with engine_of(model, kv_cache="fp8") as engine:
        together = at_once(engine, requests)
        assert engine.statistics().cached_tokens >= 3 * (len(prompt) - 1)
        again = alone(engine, requests)
    for request, one, other in zip(requests, together, again, strict=True):
        with engine_of(model, kv_cache="fp8") as engine:
            assert one.ids == other.ids == alone(engine, [request])[0].ids


def test_pages_given_back_are_read_again_alike(model: Transformer) -> None:
    """Where memory is too small for all texts, the youngest gives its pages back; all texts are what they are alone."""
    requests = [ask(tokens(PACKABLE, 60, seed=seed).tolist(), 100) for seed in range(3)]
    with engine_of(model, kv_cache="fp8", cache_memory=memory_for(6)) as engine:
        assert engine.statistics().cache_blocks == 6
        assert [outcome.ids for outcome in run(engine, requests)] == [
            outcome.ids for outcome in alone(engine, requests)
        ]


@pytest.mark.parametrize(("mtp_layers", "speculate"), [(0, False), (1, True)])
def test_the_same_memory_holds_more_pages(model: Transformer, mtp_layers: int, speculate: bool) -> None:
    """An engine reports the accounted bytes per token, and nearly two pages for each of bfloat16's."""
    layers = PACKABLE.num_hidden_layers + mtp_layers
    per_layer = fp8_kv_bytes_per_token(PACKABLE) // PACKABLE.num_hidden_layers
    memory = memory_for(10, mtp_layers=mtp_layers, fp8=False)
    with engine_of(model, cache_memory=memory, speculate=speculate) as engine:
        assert engine.statistics().cache_blocks == 10
        wide = engine.bytes_per_token
    with engine_of(model, cache_memory=memory, speculate=speculate, kv_cache="fp8") as engine:
        assert engine.bytes_per_token == layers * per_layer
        assert engine.statistics().cache_blocks == memory // (PAGE * engine.bytes_per_token) == 16
    assert wide * PACKABLE.num_hidden_layers == layers * kv_bytes_per_token(PACKABLE)
    assert per_layer == 128 + 4 + 2 * 32


@pytest.mark.parametrize(
    ("config", "dtype", "said"),
    [
        (MLA, torch.bfloat16, "latents of 16"),
        (GQA, torch.bfloat16, "keys and values per head"),
        (PACKABLE, None, "--dtype bfloat16"),
    ],
    ids=["narrow latent", "gqa", "float32"],
)
def test_what_cannot_be_is_refused_at_the_start(config, dtype: torch.dtype | None, said: str) -> None:
    """A model without such latents, or in float32, gets a sentence instead of an engine."""
    model = build(config)
    model.compute_dtype = dtype
    with pytest.raises(UserError, match=f"^kv_cache fp8 .*{said}"):
        Engine(model, TAGGED, EngineSettings(kv_cache="fp8"))


@torch.inference_mode()
def test_v3s_latent_changes_logits_little() -> None:
    """Of a random model with V3's latent, logits over a text move by less than a tenth of their size, and the likeliest
    token is another one at few places."""
    config = preset("fathom-latent512").replace(vocab_size=259, num_hidden_layers=2, max_position_embeddings=512)
    model = Transformer(config)
    model.init_weights(0)
    model.compute_dtype = torch.bfloat16
    ids = tokens(config, 120)
    wide, rounded = (model.logits(read(new_text(model, ids, fp8=fp8), 100)).float() for fp8 in (False, True))
    assert 0 < (rounded - wide).norm() < 0.1 * wide.norm()
    assert (rounded.argmax(dim=1) == wide.argmax(dim=1)).float().mean() >= 0.9
