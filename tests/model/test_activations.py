"""What layers keep for the backward pass: counted by hooks on real passes, beside what the accounting says."""

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fathom.config.model import ModelConfig
from fathom.config.presets import preset
from fathom.model.accounting import activation_bytes
from fathom.model.fp8 import train_in_fp8
from fathom.model.transformer import Transformer
from fathom.precision.fp8 import FP8
from fathom.precision.recompute import Recompute

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


def kept_bytes(config: ModelConfig, precision: str, *, recompute: bool, sequences: int) -> int:
    """Bytes of all memory that autograd keeps of the layers' pass, each piece counted once."""
    model = Transformer(config)
    model.init_weights(1)
    model.compute_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if precision == "fp8":
        train_in_fp8(model, FP8())
    kept = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x

    def keeping() -> AbstractContextManager[object]:
        return Recompute(keep) if recompute else saved_tensors_hooks(keep, lambda x: x)

    model.keeping = keeping
    ids = torch.randint(0, 256, (sequences, TIME), generator=torch.Generator().manual_seed(0))
    model.hidden_states(ids)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_accounting_counts_what_is_kept(name: str, precision: str, recompute: bool) -> None:
    """What one more sequence adds to what autograd keeps is, to the byte, what the config alone says."""
    config = CONFIGS[name]
    counted = [kept_bytes(config, precision, recompute=recompute, sequences=n) for n in (2, 3)]
    said = sum(
        activation_bytes(config, index, tokens=TIME, sequences=1, precision=precision, recompute=recompute)
        for index in range(config.num_hidden_layers)
    )
    assert counted[1] - counted[0] == said
