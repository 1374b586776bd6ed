"""What layers keep for the backward pass: counted by hooks on real passes, beside what the accounting says."""

from typing import Any

import pytest

from fathom.config.presets import preset
from fathom.model.accounting import activation_bytes
from fathom.model.kept import kept_bytes

pytestmark = pytest.mark.usefixtures("kernels")

TIME = 96

CONFIGS = {
    "mixture": preset("fathom-59m").replace(num_hidden_layers=2, n_routed_experts=8),
    "softmax gate, no query latent, no shared expert": preset("deepseek-v2-lite").replace(
        vocab_size=300, hidden_size=96, intermediate_size=130, num_hidden_layers=2, num_attention_heads=2,
        kv_lora_rank=160, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24, n_routed_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=72, n_shared_experts=0,
    ),
    "dense": preset("llama-nano").replace(num_hidden_layers=2),
    "norms of heads": preset("llama-nano").replace(model_type="qwen3", num_hidden_layers=2, head_dim=32),
}  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_accounting_counts_what_is_kept(name: str, precision: Any, recompute: bool) -> None:
    """What one more sequence adds to what autograd keeps is, to the byte, what the config alone says."""
    config = CONFIGS[name]
    counted = [kept_bytes(config, precision, recompute=recompute, sequences=n, time=TIME) for n in (2, 3)]
    said = sum(
        activation_bytes(config, index, tokens=TIME, sequences=1, precision=precision, recompute=recompute)
        for index in range(config.num_hidden_layers)
    )
    assert counted[1] - counted[0] == said
