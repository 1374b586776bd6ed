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
from fathom.engine.protocol import Sampling
from fathom.errors import UserError
from fathom.kernels import ops
from fathom.kernels.panels import DTYPES, Packed, Rounding
from fathom.model.layers import Linear, RMSNorm
from fathom.model.moe import Experts
from fathom.model.transformer import Transformer
from fathom.precision import dequantize_blocks, quantize_blocks
from tests.engine.running import CONFIGS, GREEDY, alone, ask, engine_of, run
from tests.model.configs import FAMILIES, LLAMA, QWEN2, V3, build, tokens
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


def _storages(model: Transformer) -> set[int]:
    """Of all numbers that any module holds, in whatever form."""
    held = [value for module in model.modules() for value in (*vars(module).values(), *module._parameters.values())]
    held += [value for module in model.modules() for value in module._buffers.values()]
    held += [part for value in held if isinstance(value, Packed) for part in (value.panels, value.scales)]
    return {value.untyped_storage().data_ptr() for value in held if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_nothing_is_shared(name: str, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed model holds no tensor of the one it was made of, with kernels or without."""
    model = build(FAMILIES[name].replace(intermediate_size=65, attention_bias=True)).to(stored)
    assert not _storages(packed(model)) & _storages(model)
    monkeypatch.setattr(ops, "library", lambda: None)
    assert not _storages(packed(model)) & _storages(model)


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
@pytest.mark.parametrize("rounding", ["int8", "fp8"])
def test_rounded_weights_are_near_the_model(rounding: Rounding, recwarn: pytest.WarningsRecorder) -> None:
    """All products are rounded but the router's and the absorbed ones, and with fp8 those that checkpoints leave alone;
    nothing is warned of, and logits stay near."""
    model = build(BLOCKS)
    model.compute_dtype = torch.bfloat16
    fast, text = packed(model, rounding), tokens(BLOCKS, 1, 30)
    linear = {name: m.weight.panels.dtype for name, m in fast.named_modules() if isinstance(m, PackedLinear)}
    left = {name.rpartition(".")[2] for name, dtype in linear.items() if dtype == torch.bfloat16}
    assert left == ({"lm_head", "eh_proj"} if rounding == "fp8" else set())
    found = {dtype for name, dtype in linear.items() if not name.endswith(("lm_head", "eh_proj"))}
    found |= {m.down.panels.dtype for m in fast.modules() if isinstance(m, PackedFeedForward | PackedExperts)}
    assert found == {DTYPES[rounding]}
    assert not recwarn.list
    got, plain = _through(fast, text), _through(model, text)
    similarity = torch.nn.functional.cosine_similarity(got.flatten(), plain.flatten(), dim=0)
    assert similarity > {"int8": 0.98, "fp8": 0.96}[rounding]  # steps of 1/127 of a block's largest; of 1/16 of each
    assert not torch.equal(got, plain)


@torch.inference_mode()
def test_fp8_changes_nothing_but_the_weights() -> None:
    """Logits are those of the model in bfloat16 with its matrices rounded beforehand, as near as bfloat16 is."""
    model = build(QWEN2.replace(hidden_size=64))
    model.compute_dtype = torch.bfloat16
    text = tokens(model.config, 1, 30)
    got, plain = _through(packed(model, "fp8"), text), _through(packed(model), text)
    for module in model.modules():
        if isinstance(module, Linear) and module is not model.lm_head:
            module.weight.copy_(dequantize_blocks(*quantize_blocks(module.weight.bfloat16())))
    rounded = _through(packed(model), text)
    assert (got - rounded).norm() <= 0.02 * rounded.norm()
    assert (got - plain).norm() > 0.04 * plain.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_engine_with_fp8_weights_writes_the_same_text_in_any_company(name: str) -> None:
    """Greedy and sampled, short prompts and long: requests get the tokens that they get alone, every time."""
    model = build(CONFIGS[name])
    model.compute_dtype = torch.bfloat16
    sampled = Sampling(temperature=1.0, seed=3)
    requests = [
        ask(tokens(model.config, length).tolist(), sampling=sampling)
        for length in (1, 7, 65, 130)
        for sampling in (GREEDY, sampled)
    ]
    with engine_of(model, weights="fp8") as engine:
        together = [outcome.ids for outcome in run(engine, requests)]
        assert together == [outcome.ids for outcome in alone(engine, requests)]
    with engine_of(model) as engine:
        assert together != [outcome.ids for outcome in run(engine, requests)]


def _through(model: Transformer, text: torch.Tensor) -> torch.Tensor:
    """Logits, of a model whose attention may know only pages."""
    return model.logits(read(new_text(model, text[0]), text.shape[1]))


@torch.inference_mode()
def test_what_cannot_be_rounded_is_counted_once() -> None:
    """Of a layer whose inner width is no multiple of 64 only the down product stays, and one warning says so."""
    model = build(LLAMA.replace(hidden_size=64, intermediate_size=96))
    model.compute_dtype = torch.bfloat16
    # Of each layer: the joined projection, its output, gate, up, down; and the head.
    with pytest.warns(UserWarning, match=r"^int8: 3 of 16 matrices stay in bfloat16, .* multiple of 64") as said:
        packed(model, "int8")
    assert len(said) == 1
    model = build(LLAMA.replace(intermediate_size=65))
    model.compute_dtype = torch.bfloat16
    with pytest.warns(UserWarning, match=r"^fp8: 3 of 15 matrices stay in bfloat16, .* odd"):
        packed(model, "fp8")


@torch.inference_mode()
def test_experts_that_cannot_be_rounded_keep_their_kernel() -> None:
    """Where one of an expert's widths is no multiple of 64 all of its products run in bfloat16, as without int8."""
    model = build(BLOCKS.replace(moe_intermediate_size=48, n_shared_experts=0))
    model.compute_dtype = torch.bfloat16
    with pytest.warns(UserWarning, match="matrices stay in bfloat16"):
        fast = packed(model, "int8")
    found = [module for module in fast.modules() if isinstance(module, PackedExperts)]
    assert found
    assert all(module.gate_up.panels.dtype is module.down.panels.dtype is torch.bfloat16 for module in found)


@pytest.mark.parametrize("rounding", ["int8", "fp8"])
def test_rounding_is_refused_where_it_cannot_be(rounding: Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 model, and a machine without kernels, get a sentence instead of slower or other numbers."""
    with pytest.raises(UserError, match=f"{rounding} weights need .* bfloat16"):
        packed(build(V3), rounding)
    model = build(V3)
    model.compute_dtype = torch.bfloat16
    monkeypatch.setattr(ops, "library", lambda: None)
    with pytest.raises(UserError, match=r"g\+\+"):
        packed(model, rounding)
