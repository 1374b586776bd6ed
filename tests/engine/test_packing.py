"""Which modules get a faster form, and what is refused."""

import pytest
import torch

from fathom.engine.packing import (
    KernelRMSNorm,
    PackedExperts,
    PackedFeedForward,
    PackedGQA,
    PackedLinear,
    PackedMLA,
    PackedRouter,
    packed,
)
from fathom.errors import UserError
from fathom.kernels import ops
from fathom.model.layers import Linear, RMSNorm
from fathom.model.moe import Experts
from fathom.model.transformer import Transformer
from tests.model.configs import FAMILIES, LLAMA, V3, build, tokens
from tests.model.test_paged import new_text, read

pytestmark = pytest.mark.usefixtures("kernels")
BLOCKS = V3.replace(
    hidden_size=64, intermediate_size=128, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=32,
    v_head_dim=64, moe_intermediate_size=64,
)  # fmt: skip


def kinds(model: Transformer) -> set[type]:
    return {type(module) for module in model.modules()}


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_that_can_be_packed_is_left(name: str) -> None:
    """Every linear map, norm and mixture of a family has its faster form, in float32 and in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        model = build(FAMILIES[name])
        model.compute_dtype = dtype
        found = kinds(packed(model))
        assert not found & {Linear, RMSNorm, Experts}
        assert {PackedLinear, PackedFeedForward, KernelRMSNorm} <= found
        assert PackedMLA in found if model.config.is_mla else PackedGQA in found
        if model.config.n_routed_experts:
            assert {PackedExperts, PackedRouter} <= found


@torch.inference_mode()
def test_biases_of_the_feed_forward_are_kept() -> None:
    """Where gate and up have biases, the layer is packed map by map and gives the model's numbers."""
    model = build(LLAMA.replace(mlp_bias=True, attention_bias=True))
    text = tokens(model.config, 1, 9)
    assert (_through(packed(model), text) - _through(model, text)).abs().max() <= 1e-4


@torch.inference_mode()
def test_odd_widths_stay_as_they_are() -> None:
    """Widths that bfloat16 kernels cannot take are computed by the model's own modules, beside packed ones."""
    model = build(LLAMA.replace(intermediate_size=65))
    model.compute_dtype = torch.bfloat16
    fast, text = packed(model), tokens(model.config, 1, 9)
    assert Linear in kinds(fast)
    got, plain = _through(fast, text), _through(model, text)
    assert (got - plain).abs().mean() <= 0.02 * plain.abs().mean() + 0.02


@torch.inference_mode()
def test_int8_is_near_the_model() -> None:
    """With int8 weights all products are int8 but the router's and the absorbed ones, and logits stay near."""
    model = build(BLOCKS)
    model.compute_dtype = torch.bfloat16
    fast, text = packed(model, "int8"), tokens(BLOCKS, 1, 30)
    panels = {m.weight.panels.dtype for m in fast.modules() if isinstance(m, PackedLinear)}
    panels |= {m.down.panels.dtype for m in fast.modules() if isinstance(m, PackedFeedForward | PackedExperts)}
    assert panels == {torch.uint8}
    got, plain = _through(fast, text), _through(model, text)
    similarity = torch.nn.functional.cosine_similarity(got.flatten(), plain.flatten(), dim=0)
    assert similarity > 0.98
    assert not torch.equal(got, plain)


def _through(model: Transformer, text: torch.Tensor) -> torch.Tensor:
    """Logits, of a model whose attention may know only pages."""
    return model.logits(read(new_text(model, text[0]), text.shape[1]))


def test_int8_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 model, and a machine without kernels, get a sentence instead of slower or other numbers."""
    with pytest.raises(UserError, match="bfloat16"):
        packed(build(V3), "int8")
    model = build(V3)
    model.compute_dtype = torch.bfloat16
    monkeypatch.setattr(ops, "library", lambda: None)
    with pytest.raises(UserError, match=r"g\+\+"):
        packed(model, "int8")
