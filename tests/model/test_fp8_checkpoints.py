"""Folders in DeepSeek's FP8 format: written as published, opened by others, the same when written again."""

import json
import math
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fathom.config import ModelConfig
from fathom.errors import UserError
from fathom.model import checkpoint
from fathom.model.checkpoint import load_model, save_model
from fathom.model.naming import published, scale_name
from fathom.model.transformer import Transformer
from fathom.precision import dequantize_blocks, quantize_blocks
from fathom.precision.tiles import quantise_blocks
from tests.model.configs import LLAMA, QWEN2, QWEN3, V3, build, tokens

FP8, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
# Every projection has sides that are multiples of 128 or at most 128: what transformers reads too.
WHOLE = {
    "v3": V3.replace(
        hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, q_lora_rank=128,
        kv_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, moe_intermediate_size=128,
    ),
    "llama": LLAMA.replace(hidden_size=256, intermediate_size=384, num_hidden_layers=2),
    "qwen2": QWEN2.replace(hidden_size=256, intermediate_size=384, num_hidden_layers=2),
    "qwen3": QWEN3.replace(hidden_size=256, intermediate_size=384, head_dim=64, num_hidden_layers=2),
}  # fmt: skip
RAGGED = V3.replace(hidden_size=160, intermediate_size=192, num_hidden_layers=2)
WEIGHT = "model.layers.0.self_attn.o_proj.weight"
SCALE = scale_name(WEIGHT)
pytestmark = pytest.mark.filterwarnings("ignore:.*no multiple of 128")


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def raw(folder: Path) -> dict[str, bytes]:
    """The bytes of a folder's weights, by file."""
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def codes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama with ragged blocks in one file."""
    folder = tmp_path / "fp8"
    save_model(build(LLAMA.replace(hidden_size=160, num_hidden_layers=1)), folder, dtype="fp8")
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of a single-file folder by what `change` makes of them."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    """Change `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path) -> str:
    """The one line, naming the folder, with which it is refused."""
    with pytest.raises(UserError) as error:
        load_model(folder, dtype="float32")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(folder))
    return message


# Writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RAGGED, WHOLE["qwen2"]], ids=["v3", "qwen2"])
def test_a_folder_is_what_deepseek_publishes(config: ModelConfig, tmp_path: Path) -> None:
    """Projections, experts' too, are FP8 beside float32 scales; the router's bias is float32, all else bfloat16."""
    model = build(config)
    save_model(model, tmp_path / "fp8", dtype="fp8")
    expected = {
        t.name: (t.shape, {"projection": FP8, "plain": BF16, "float32": F32}[t.kind])
        for t in published(config, fp8=True)
    }
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored(tmp_path / "fp8").items()} == expected
    values = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert values["torch_dtype"] == "bfloat16"
    assert values["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip


def test_numbers_are_those_of_the_blocks(tmp_path: Path) -> None:
    """Projections load as codes times scales of the float32 weights, the rest rounded to bfloat16, the bias exact."""
    model = build(RAGGED)
    save_model(model, tmp_path / "fp8", dtype="fp8")
    loaded, state = load_model(tmp_path / "fp8", dtype="float32").state_dict(), model.state_dict()
    for tensor in published(RAGGED):
        ours, found = state[tensor.ours][tensor.part], loaded[tensor.ours][tensor.part]
        if tensor.kind == "projection":
            assert torch.equal(found, dequantize_blocks(*quantize_blocks(ours))), tensor.name
        else:
            assert torch.equal(found, ours if tensor.kind == "float32" else ours.bfloat16().float()), tensor.name


def test_the_index_counts_scales_and_bytes(tmp_path: Path) -> None:
    """Shards keep to their size, the index places every tensor and scale, and total_size is the sum of their bytes."""
    save_model(build(RAGGED), tmp_path / "fp8", dtype="fp8", max_shard_bytes=60_000)
    index = json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == {t.name for t in published(RAGGED, fp8=True)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(tmp_path / "fp8").values())
    assert all(
        sum(t.nbytes for t in load_file(f).values()) <= 60_000 for f in (tmp_path / "fp8").glob("model-*.safetensors")
    )


def test_one_projection_is_quantised_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a projection is quantised, the codes of the one before have been written and let go; none is made twice."""
    alive: list[weakref.ref[Tensor]] = []

    def watched(weight: Tensor) -> tuple[Tensor, Tensor]:
        assert all(reference() is None for reference in alive)
        made, scale = quantize_blocks(weight)
        alive.append(weakref.ref(made))
        return made, scale

    monkeypatch.setattr(checkpoint, "quantize_blocks", watched)
    save_model(build(RAGGED), tmp_path / "fp8", dtype="fp8", max_shard_bytes=60_000)
    assert len(alive) == sum(t.kind == "projection" for t in published(RAGGED))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_by_name(number: float, tmp_path: Path) -> None:
    """A block has no scale for it, so the tensor is named and nothing is left behind; bfloat16 still writes it."""
    model = build(RAGGED)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[5, 20, 150] = number
    with pytest.raises(
        UserError, match=r"^model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight: holds NaN or an infinite"
    ):
        save_model(model, tmp_path / "fp8", dtype="fp8")
    assert list(tmp_path.iterdir()) == []
    save_model(model, tmp_path / "bf16", dtype="bfloat16")


def test_sides_that_other_programs_misread_are_said(tmp_path: Path) -> None:
    """One warning counts projections with a side over 128 that is no multiple of it; whole blocks pass in silence."""
    with pytest.warns(UserWarning, match=r"1[0-9]* of [0-9]+ projections .* no multiple of 128, first") as said:
        save_model(build(LLAMA.replace(hidden_size=160)), tmp_path / "ragged", dtype="fp8")
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_model(build(WHOLE["v3"]), tmp_path / "whole", dtype="fp8")


# Writing again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RAGGED, WHOLE["llama"]], ids=["v3 ragged", "llama"])
def test_through_float32_every_byte_comes_back(config: ModelConfig, tmp_path: Path) -> None:
    """Loaded in float32 and saved again, an FP8 folder is the same files, bit for bit."""
    save_model(build(config), tmp_path / "one", dtype="fp8")
    save_model(load_model(tmp_path / "one", dtype="float32"), tmp_path / "two", dtype="fp8")
    assert raw(tmp_path / "one") == raw(tmp_path / "two")


def test_through_bfloat16_codes_come_back(tmp_path: Path) -> None:
    """Loaded in bfloat16, codes are kept and scales within 2⁻⁸; the copy's copy is the copy, bit for bit."""
    save_model(build(RAGGED), tmp_path / "one", dtype="fp8")
    for source, target in (("one", "two"), ("two", "three")):
        save_model(load_model(tmp_path / source), tmp_path / target, dtype="fp8")
    first, second = stored(tmp_path / "one"), stored(tmp_path / "two")
    for name, tensor in first.items():
        if name.endswith("_scale_inv"):
            assert ((second[name] / tensor - 1).abs() <= 2**-8).all(), name
        else:
            assert torch.equal(second[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert raw(tmp_path / "two") == raw(tmp_path / "three")


@pytest.mark.parametrize("kept_as", [torch.float8_e8m0fnu, torch.float32], ids=["e8m0", "f32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_that_are_powers_of_two_are_kept(kept_as: torch.dtype, dtype: str, folder: Path) -> None:
    """A folder with `scale_fmt` ue8m0 loads as codes times powers, and saving finds powers that give these numbers."""
    weight = torch.randn(160, 160, generator=torch.Generator().manual_seed(1))
    made, powers = quantise_blocks(weight, power_of_two=True)
    rewrite(folder, lambda tensors: {**tensors, WEIGHT: made, SCALE: powers.to(kept_as)})
    configure(folder, scale_fmt="ue8m0")
    model = load_model(folder, dtype=dtype)
    assert torch.equal(model.state_dict()[WEIGHT].float(), dequantize_blocks(made, powers))
    save_model(model, folder.parent / "again", dtype="fp8")
    again = stored(folder.parent / "again")
    assert torch.equal(dequantize_blocks(again[WEIGHT], again[SCALE]), dequantize_blocks(made, powers))
    assert (torch.frexp(again[SCALE]).mantissa == 0.5).all()


# Other programs ------------------------------------------------------------------------------------------------


def opened_by_transformers(folder: Path) -> torch.nn.Module:
    """Dequantised, as transformers does without a GPU. What is not FP8 it leaves in the folder's bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.float().eval()


def assert_same_logits(ours: Transformer, theirs: torch.nn.Module) -> None:
    text = tokens(ours.config, 2, 24)
    with torch.no_grad():
        found, expected = ours(text), theirs(text).logits
    assert expected.std() > 0.1, "logits too flat to tell models apart"
    assert (found - expected).abs().max() <= 2e-4


@pytest.mark.parametrize("name", WHOLE)
def test_transformers_reads_our_numbers(name: str, tmp_path: Path) -> None:
    """An FP8 folder of ours gives transformers' model the logits that it gives ours: experts, MTP layer and biases."""
    save_model(build(WHOLE[name]), tmp_path / "fp8", dtype="fp8")
    assert_same_logits(load_model(tmp_path / "fp8", dtype="float32"), opened_by_transformers(tmp_path / "fp8"))


def test_what_transformers_writes_in_fp8_is_read_here(tmp_path: Path) -> None:
    """It quantises again what it dequantised: the folder opens with equal logits, and has the codes of ours."""
    save_model(build(WHOLE["llama"]), tmp_path / "ours", dtype="fp8")
    theirs = opened_by_transformers(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, written = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert written[WEIGHT].dtype == FP8
    assert torch.equal(codes(written[WEIGHT]), codes(ours[WEIGHT]))
    assert_same_logits(load_model(tmp_path / "theirs", dtype="float32"), theirs)


# Bad input -----------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def with_(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, name: tensor}


GATE = scale_name("model.layers.0.mlp.gate_proj.weight")  # of a weight [64, 160]
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(SCALE), f"tensor {WEIGHT} is FP8 but its scales {SCALE} are missing"),
        (with_(SCALE, torch.ones(1, 1)), f"tensor {SCALE} is F32 [1, 1]; blocks of 128×128 call for float32 [2, 2]"),
        (with_(SCALE, torch.ones(4)), f"tensor {SCALE} is F32 [4]; blocks of 128×128 call for float32 [2, 2]"),
        (with_(SCALE, torch.ones(2, 2).half()), f"tensor {SCALE} is F16 [2, 2]; blocks"),
        (with_(SCALE, torch.ones(2, 2).to(torch.uint8)), f"tensor {SCALE} is U8 [2, 2]; blocks"),
        (with_(GATE, torch.ones(2, 1)), f"{GATE} is F32 [2, 1]; blocks of 128×128 call for float32 [1, 2]; they lie"),
        (without(WEIGHT), f"1 tensor is missing for this config.json: {WEIGHT}"),
        (with_("model.adapter.weight_scale_inv", torch.ones(1, 1)), "unknown for this config.json: model.adapter.w"),
        (with_(WEIGHT, torch.ones(160, 160)), f"tensor {SCALE} has scales, but {WEIGHT} is not FP8: it is F32"),
        (with_(WEIGHT, torch.ones(160, 160).to(torch.float8_e5m2)), f"tensor {WEIGHT} is stored as F8_E5M2, which is"),
        (with_(NORM, torch.ones(160).to(FP8)), f"tensor {NORM} is FP8, which only matrices can be; it is [160]"),
    ],
)  # fmt: skip
def test_a_bad_tensor_is_named(change: Callable[..., Any], message: str, folder: Path) -> None:
    """Missing, misshapen, transposed or mistyped scales, scales of nothing, FP8 where none can be: one line each."""
    rewrite(folder, change)
    assert message in refused(folder)


@pytest.mark.parametrize("number", [math.nan, math.inf, -0.5, 0.0])
def test_a_scale_that_scales_nothing_is_named_with_its_place(number: float, folder: Path) -> None:
    """NaN, infinite, negative, or zero over numbers that are not: tensor, place and value are said."""
    scale = load_file(folder / "model.safetensors")[SCALE]
    scale[1, 0] = number
    rewrite(folder, with_(SCALE, scale))
    assert f"tensor {SCALE} has the scale {number} at [1, 0], which must be finite and above 0" in refused(folder)


def test_a_scale_of_zero_over_zeros_is_read(folder: Path) -> None:
    """Some programs write it for a block of zeros, where it changes nothing."""
    tensors = load_file(folder / "model.safetensors")
    tensors[SCALE][1, 0] = 0
    block = torch.zeros(32, 128).to(FP8)
    tensors[WEIGHT] = torch.cat((tensors[WEIGHT][:128], torch.cat((block, tensors[WEIGHT][128:, 128:]), dim=1)))
    rewrite(folder, lambda _: tensors)
    found = load_model(folder, dtype="float32").state_dict()[WEIGHT]
    assert not found[128:, :128].any()
    assert found[128:, 128:].any()


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight_block_size", [64, 64]), ("weight_block_size", None), ("fmt", "e5m2"), ("activation_scheme", "static")],
)
def test_another_format_is_refused(key: str, value: object, folder: Path) -> None:
    """Blocks of another size, a scale per tensor, another float or stored activation scales: key and value are said."""
    configure(folder, **{key: value})
    assert f"config.json: quantization_config: {key} {value!r} is not supported" in refused(folder)


def test_another_method_is_refused(folder: Path) -> None:
    """A quantisation that is not FP8 blocks is named, and what is supported."""
    configure(folder, quant_method="awq")
    assert "config.json: quant_method 'awq' is not supported; supported: fp8 blocks, or none" in refused(folder)
