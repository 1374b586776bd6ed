"""Accounting against published sizes and against real parameters."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fathom.config import PRESETS, ModelConfig, preset
from fathom.model.accounting import (
    count_parameters,
    decode_flops_per_token,
    flops_per_token,
    fp8_kv_bytes_per_token,
    kv_bytes_per_token,
    kv_elements_per_token,
)
from fathom.model.cache import KVCache
from fathom.model.transformer import Transformer

DENSE = ModelConfig(
    model_type="qwen3", vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=24, attention_bias=True,
)  # fmt: skip


def test_deepseek_v3_has_its_published_size() -> None:
    """The count of DeepSeek-V3 equals the sum over its published checkpoint, to the last parameter."""
    count = count_parameters(preset("deepseek-v3"))
    assert count.total == 671_026_419_200
    assert count.mtp == 11_610_068_224
    assert count.active == 37_552_297_472
    assert count.active_without_tables == 35_698_939_392


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-v2-lite", 15_706_484_224, 2_241_719_808),
        ("deepseek-v2", 235_741_434_880, None),
        ("moonlight", 15_960_110_208, 2_243_687_552),
    ],
)
def test_related_models_have_their_published_sizes(name: str, total: int, active: int | None) -> None:
    """V2, V2-Lite and Moonlight count to their published totals."""
    count = count_parameters(preset(name))
    assert count.total == total
    assert active is None or count.active_without_tables == active


@pytest.mark.parametrize("config", [*(f() for f in PRESETS.values()), DENSE, DENSE.replace(model_type="qwen2")])
def test_count_equals_the_real_model(config: ModelConfig) -> None:
    """The count from the config equals the parameters and router biases of the model itself."""
    with torch.device("meta"):
        model = Transformer(config)
    tensors = [*model.parameters(), *model.buffers()]
    count = count_parameters(config)
    assert count.total + count.mtp == sum(t.numel() for t in tensors)


@pytest.mark.parametrize(("name", "gigaflops"), [("deepseek-v3", 250.46), ("deepseek-v2", 155)])
def test_training_flops_equal_the_published_ones(name: str, gigaflops: float) -> None:
    """GFLOP per trained token at 4096 equal table 2 of DeepSeek's ISCA 2025 paper."""
    assert flops_per_token(preset(name), 4096, mtp=False) / 1e9 == pytest.approx(gigaflops, rel=0.005)


def test_decode_flops_equal_a_count_by_hand() -> None:
    """V3 behind 4096 tokens: 2 per multiplied parameter, and 61 layers of 128 heads over latent + rope and latent."""
    multiplied = 35_698_939_392 + 129280 * 7168
    attention = 61 * 4096 * 128 * 2 * ((512 + 64) + 512)
    assert decode_flops_per_token(preset("deepseek-v3"), 4096) == 2 * multiplied + attention


LATENT = preset("fathom-tiny").replace(
    n_routed_experts=None, num_nextn_predict_layers=0, num_hidden_layers=2, vocab_size=100, kv_lora_rank=40
)


@pytest.mark.parametrize("config", [LATENT, LATENT.replace(q_lora_rank=None), DENSE])
def test_decode_flops_equal_those_of_a_real_step(config: ModelConfig) -> None:
    """The products that PyTorch counts in one decoded token are the accounted ones, but for vectors' 2 per element."""
    model = Transformer(config)
    model.init_weights(0)
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    for context in (9, 30):
        cache = KVCache(config, batch=1, length=context, dtype=torch.float32)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, context - 1, dtype=torch.int64), cache=cache)
            before = counter.get_total_flops()
            model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
        step = counter.get_total_flops() - before
        assert step == decode_flops_per_token(config, context) - 2 * vectors


def test_cache_sizes_equal_the_published_ones() -> None:
    """KV bytes per token equal the published table (V3 70,272 in bfloat16, 656 a layer in FP8), and V2's elements."""
    assert kv_bytes_per_token(preset("deepseek-v3")) == 70_272
    assert fp8_kv_bytes_per_token(preset("deepseek-v3")) == 61 * 656
    assert kv_elements_per_token(preset("deepseek-v2")) == 34_560
    assert kv_elements_per_token(preset("deepseek-v2-lite")) == 15_552


@pytest.mark.parametrize("config", [preset("fathom-tiny"), DENSE])
def test_cache_holds_what_accounting_says(config: ModelConfig) -> None:
    """The bytes a real cache allocates per token equal the accounted ones."""
    cache = KVCache(config, batch=3, length=5, dtype=torch.bfloat16)
    assert cache.nbytes_per_token() == kv_bytes_per_token(config)
