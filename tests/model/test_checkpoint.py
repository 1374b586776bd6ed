"""Model folders: written whole, read by name, refused in one line."""

import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from torch import Tensor

import fathom
from fathom.config import read_config, to_hf
from fathom.data.tokenizer import Tokenizer
from fathom.errors import UserError
from fathom.model.checkpoint import load_model, save_model, write_model
from fathom.model.naming import published, scale_name
from fathom.model.shards import write_shards
from fathom.model.transformer import Transformer
from fathom.precision import dequantize_blocks, quantize_blocks
from tests.model.configs import FAMILIES, LLAMA, V3, build, tokens

V3_DEEP = V3.replace(num_nextn_predict_layers=2)
TIED_V3 = V3.replace(tie_word_embeddings=True, attention_bias=True)
ROUND_TRIPS = FAMILIES | {"v3 two MTP modules": V3_DEEP, "v3 tied and biased": TIED_V3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A V3 model with an MTP module, all tensors in one file as others publish small models."""
    folder = tmp_path / "model"
    save_model(build(V3), folder)
    join_files(folder)
    return folder


def join_files(folder: Path) -> None:
    """Put all tensors of a folder into one `model.safetensors`."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of a single-file folder by what `change` makes of them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def refused(folder: Path) -> str:
    """The one line with which `load_model` refuses a folder."""
    with pytest.raises(UserError) as error:
        load_model(folder, dtype="float32")
    message = str(error.value)
    assert "\n" not in message
    return message


def same_state(one: Transformer, other: Transformer) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in mine.items())


def small_tokenizer(size: int) -> Tokenizer:
    backend = Backend(BPE(vocab={f"t{i}": i for i in range(size)}, merges=[]))
    return Tokenizer(backend, bos_token_id=0, eos_token_ids=(1,), pad_token_id=2, chat_template=None)


def test_mtp_modules_lie_in_a_file_of_their_own(tmp_path):
    """Programs that read model*.safetensors alone find the main model alone; the index names every tensor."""
    save_model(build(V3_DEEP), tmp_path / "model")
    main = load_file(tmp_path / "model" / "model-00001-of-00001.safetensors")
    modules = load_file(tmp_path / "model" / "mtp-00001-of-00001.safetensors")
    prefixes = tuple(f"model.layers.{V3_DEEP.num_hidden_layers + k}." for k in range(2))
    assert not [name for name in main if name.startswith(prefixes)]
    assert all(name.startswith(prefixes) for name in modules)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == main.keys() | modules.keys()


@pytest.mark.parametrize("config", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
@pytest.mark.parametrize("max_shard_bytes", [5e9, 20_000])
def test_float32_round_trip_is_bitwise(config, max_shard_bytes, tmp_path):
    """Saving and loading in float32 returns every tensor and the config, from one file or from many."""
    model = build(config)
    save_model(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    loaded = load_model(tmp_path / "model", dtype="float32")
    assert to_hf(loaded.config, dtype="float32") == to_hf(config, dtype="float32")
    assert same_state(loaded, model)


def test_one_file_when_one_is_enough(tmp_path):
    """A small model is a single model.safetensors without an index, in the format transformers expects."""
    folder = tmp_path / "model"
    save_model(build(LLAMA), folder)
    files = {f.name for f in folder.iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
    assert b'{"__metadata__":{"format":"pt"}' in (folder / "model.safetensors").read_bytes()[:64]


def test_shards_keep_to_their_size_and_the_index_to_the_shards(tmp_path):
    """No shard exceeds the limit, names are numbered, and the index places every published tensor."""
    save_model(build(V3).without_mtp(), tmp_path / "model", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    total, places = 0, {}
    for file in files:
        tensors = load_file(file)
        size = sum(t.nbytes for t in tensors.values())
        assert size <= 50_000
        total += size
        places |= dict.fromkeys(tensors, file.name)
    assert places == index["weight_map"]
    assert places.keys() == {t.name for t in published(V3.replace(num_nextn_predict_layers=0))}
    assert total == index["metadata"]["total_size"]


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    """When a tensor is asked for, the one before it has already been let go."""
    shapes = {f"t{i}": ((4, 5), torch.bfloat16) for i in range(6)}
    alive: list[weakref.ref[Tensor]] = []

    def value(name: str) -> Tensor:
        assert all(reference() is None for reference in alive[:-1])
        tensor = torch.full((4, 5), float(name[1:]))
        alive.append(weakref.ref(tensor))
        return tensor

    write_shards(tmp_path, shapes, value, max_shard_bytes=100)
    assert len(alive) == 6
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path):
    """An odd number of bfloat16 values before a float32 tensor does not leave it misaligned in the file."""
    shapes = {"a": ((3,), torch.bfloat16), "b": ((2,), torch.float32), "c": ((4,), torch.bfloat16)}
    write_shards(tmp_path, shapes, lambda name: torch.ones(shapes[name][0]), max_shard_bytes=5e9)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, (_, dtype) in shapes.items():
        assert (8 + length + header[name]["data_offsets"][0]) % dtype.itemsize == 0, name


def test_bfloat16_folder_keeps_the_router_bias_in_float32(tmp_path):
    """Written and held in bfloat16, weights are rounded once and the balancing bias not at all."""
    model = build(V3)
    save_model(model, tmp_path / "model", dtype="bfloat16")
    loaded = load_model(tmp_path / "model")
    for name, tensor in loaded.state_dict().items():
        expected = model.state_dict()[name]
        exact = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
        assert torch.equal(tensor, expected if exact else expected.bfloat16()), name
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_loaded_parameters_are_real_separate_and_trainable(folder):
    """Nothing is left on the meta device, nothing still points into the file, everything takes a gradient."""
    model = load_model(folder, dtype="float32")
    before = model(tokens(V3, 1, 5))
    shutil.rmtree(folder)
    assert torch.equal(model(tokens(V3, 1, 5)), before)
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


def test_tied_head_is_one_parameter_after_loading(tmp_path):
    """With tied embeddings head and table stay the same object, and no head is written."""
    save_model(build(LLAMA), tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    model = load_model(tmp_path / "model", dtype="float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_mtp_copies_are_on_disk_and_not_in_memory(folder):
    """The MTP layer's embedding and head are written as copies of the model's own; loading adds no parameter."""
    tensors = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{V3.num_hidden_layers}."
    assert torch.equal(tensors[f"{prefix}embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[f"{prefix}shared_head.head.weight"], tensors["lm_head.weight"])
    loaded = load_model(folder, dtype="float32")
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in build(V3).parameters())


def test_an_mtp_copy_that_is_no_copy_is_reported(folder):
    """A second head with other numbers is not what runs, and the load says so."""
    name = f"model.layers.{V3.num_hidden_layers}.shared_head.head.weight"
    rewrite(folder, lambda tensors: {**tensors, name: tensors[name] + 1.0})
    with pytest.warns(UserWarning, match=r"shared_head\.head\.weight differs from lm_head\.weight"):
        load_model(folder, dtype="float32")


def test_mtp_copies_may_be_left_out(folder):
    """They repeat what is there, so a folder without them is whole."""
    copies = {t.name for t in published(V3) if t.duplicate}
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n not in copies})
    assert same_state(load_model(folder, dtype="float32"), build(V3))


def test_mtp_absent_as_a_whole_is_a_warning_in_part_an_error(folder):
    """All MTP tensors gone: load without, and say so. Some gone: name one of them."""
    prefix = f"model.layers.{V3.num_hidden_layers}."
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != f"{prefix}eh_proj.weight"})
    assert f"1 tensor is missing for this config.json: {prefix}eh_proj.weight" in refused(folder)
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(prefix)})
    with pytest.warns(UserWarning, match="announces 1 MTP"):
        assert load_model(folder, dtype="float32").config.num_nextn_predict_layers == 0
    rewrite(folder, lambda tensors: {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "tensors are missing for this config.json: model.layers.0.input_layernorm.weight" in refused(folder)


def test_missing_tensors_are_counted_and_named(folder):
    """The first three missing tensors are named, in the model's order, with their number."""
    gone = [t.name for t in published(V3) if ".experts." in t.name][:5]
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n not in gone})
    assert f"5 tensors are missing for this config.json: {', '.join(gone[:3])}, …" in refused(folder)


def test_unknown_tensors_are_counted_and_named(folder):
    """A tensor the config has no place for stops the load instead of being passed over."""
    rewrite(folder, lambda tensors: {**tensors, "model.layers.0.adapter.weight": torch.zeros(2)})
    assert "1 tensor is unknown for this config.json: model.layers.0.adapter.weight" in refused(folder)


def test_a_wrong_shape_names_the_tensor_and_both_shapes(folder):
    """An expert of another width is refused by name before anything is loaded."""
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    rewrite(folder, lambda tensors: {**tensors, name: torch.zeros(48, 8)})
    assert f"tensor {name} has shape [48, 8], config.json calls for [48, 16]" in refused(folder)


def test_old_rotary_frequencies_and_a_repeated_tied_head_are_passed_over(tmp_path):
    """Llama folders of old carry inv_freq, and some a copy of the tied head: neither changes the model."""
    model = build(LLAMA)
    save_model(model, tmp_path / "model")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    head = model.lm_head.weight.detach().clone()
    rewrite(tmp_path / "model", lambda tensors: {**tensors, **extra, "lm_head.weight": head})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_state(load_model(tmp_path / "model", dtype="float32"), model)


def test_integer_weights_are_refused_by_name(folder):
    """A tensor in a type that is no plain float is an unknown quantisation, not a number to cast."""
    name = "model.norm.weight"
    rewrite(folder, lambda tensors: {**tensors, name: torch.ones(48, dtype=torch.int8)})
    assert f"tensor {name} is stored as I8" in refused(folder)


# FP8 -----------------------------------------------------------------------------------------------------------

WIDE = V3.replace(hidden_size=160, intermediate_size=192, num_hidden_layers=2)


@pytest.fixture
def fp8_folder(tmp_path: Path) -> tuple[Path, Transformer]:
    """A folder as DeepSeek publishes it, blocks ragged, and the model its numbers stand for."""
    model = build(WIDE)
    folder = tmp_path / "fp8"
    save_model(model, folder)
    join_files(folder)
    tensors, meant = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        kind = next(t.kind for t in published(WIDE) if t.name == name)
        if kind == "projection":
            tensors[name], tensors[scale_name(name)] = quantize_blocks(tensor)
            meant[name] = dequantize_blocks(tensors[name], tensors[scale_name(name)])
        else:
            tensors[name] = meant[name] = tensor
    save_file(meant, folder / "model.safetensors")
    expected = load_model(folder, dtype="float32")
    save_file(tensors, folder / "model.safetensors")
    return folder, expected


def test_fp8_blocks_are_dequantised_on_load(fp8_folder):
    """A folder of FP8 projections and scales loads as the products, experts and MTP layer included."""
    folder, expected = fp8_folder
    assert same_state(load_model(folder, dtype="float32"), expected)
    rounded = load_model(folder).state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(rounded[name], tensor.to(rounded[name].dtype)), name


def test_fp8_without_or_with_wrong_scales_is_refused_by_name(fp8_folder):
    """Missing or misshapen scales, and scales of what is no FP8 tensor, are each named."""
    folder, _ = fp8_folder
    weight = "model.layers.0.self_attn.q_a_proj.weight"
    whole = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in whole.items() if n != scale_name(weight)}, folder / "model.safetensors")
    assert f"tensor {weight} is FP8 but its scales {scale_name(weight)} are missing" in refused(folder)
    save_file({**whole, scale_name(weight): torch.ones(1, 1)}, folder / "model.safetensors")
    assert f"tensor {scale_name(weight)} is F32 [1, 1]" in refused(folder)
    save_file({**whole, weight: whole[weight].float()}, folder / "model.safetensors")
    assert f"tensor {scale_name(weight)} has scales, but {weight} is not FP8: it is F32" in refused(folder)


# Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(folder, size):
    """Cut anywhere, empty or one byte short, the file is named as damaged."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert f"{file}: damaged or truncated safetensors file" in refused(folder)


def test_a_corrupt_header_is_refused(folder):
    """A shard whose header is not what it was is named as damaged."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(bytes(data))
    assert "damaged or truncated safetensors file" in refused(folder)


def test_an_absent_shard_is_named(tmp_path):
    """An index that names a file which is not there says which."""
    save_model(build(V3), tmp_path / "model", max_shard_bytes=100_000)
    shard = sorted((tmp_path / "model").glob("model-00002-*"))[0]
    shard.unlink()
    assert f"names {shard.name}, which is not in the folder" in refused(tmp_path / "model")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a safetensors index"),
        ("[]", "not a safetensors index"),
        ('{"weight_map": {}}', "lists no tensors"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "is not the name of a file beside it"),
        ('{"weight_map": {"a": 3}}', "is not the name of a file beside it"),
        ('{"weight_map": {"a": ["x"]}}', "is not the name of a file beside it"),
        ('{"weight_map": {"model.norm.weight": "model.safetensors"}}', "does not list lm_head.weight, which"),
    ],
)
def test_a_broken_index_is_refused(folder, index, message):
    """An index that is no JSON, lists nothing or points out of the folder is refused."""
    (folder / "model.safetensors.index.json").write_text(index)
    assert message in refused(folder)


def test_an_index_of_one_tensor_is_no_model_without_mtp(tmp_path):
    """An index that lists a single tensor is refused, though its file holds the whole main model, without a warning."""
    save_model(build(V3), tmp_path / "model")
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "index.json: does not list lm_head.weight, which model-0" in refused(tmp_path / "model")


def test_an_index_that_lists_more_than_its_files_hold_is_refused(folder):
    """MTP tensors that the index promises and the file lacks are damage, not a model without MTP."""
    names, prefix = list(load_file(folder / "model.safetensors")), f"model.layers.{V3.num_hidden_layers}."
    index = json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")})
    (folder / "model.safetensors.index.json").write_text(index)
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(prefix)})
    assert f"lists {prefix}eh_proj.weight in model.safetensors, which does not hold it" in refused(folder)


def test_a_pickle_is_refused_with_the_reason(folder):
    """A folder that has only pytorch_model.bin is refused because a pickle can run code."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin), which can run code" in refused(folder)


def test_a_folder_without_weights_or_config_is_refused(folder):
    """What is missing is said: the weights, or config.json."""
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)


def test_an_unknown_dtype_is_refused(folder):
    """A dtype that is not offered names those that are."""
    with pytest.raises(UserError, match=r"dtype 'bfloat' is not supported.*bfloat16"):
        load_model(folder, dtype="bfloat")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_both_ways(tmp_path):
    """Neither written (nothing is left behind) nor loaded."""
    model, tokenizer = build(LLAMA), small_tokenizer(LLAMA.vocab_size + 1)
    with pytest.raises(UserError, match="vocab_size is 97"):
        save_model(model, tmp_path / "model", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
    save_model(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    with pytest.raises(UserError, match="vocab_size is 97"):
        fathom.load(tmp_path / "model")


def test_the_tokenizer_comes_back_and_fills_in_special_tokens(tmp_path):
    """load returns the tokenizer that was saved; ids that the config left open are written for other engines."""
    save_model(build(LLAMA), tmp_path / "model", tokenizer=small_tokenizer(90))
    _, tokenizer = fathom.load(tmp_path / "model")
    assert tokenizer is not None
    assert tokenizer.vocab_size == 90
    expected = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == expected
    config = read_config(tmp_path / "model")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)


# Whole or not at all -------------------------------------------------------------------------------------------


def test_an_existing_folder_is_not_overwritten(folder):
    """Saving onto a folder with content is refused and leaves it as it was; an empty one is taken."""
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(UserError, match="already exists"):
        save_model(build(LLAMA), folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    (folder.parent / "empty").mkdir()
    save_model(build(LLAMA), folder.parent / "empty")
    assert (folder.parent / "empty" / "model.safetensors").exists()


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path):
    """When the system refuses to write more, the error is one line and no folder or scratch remains."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match="cannot be written") as error:
            save_model(build(V3), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C between the weights and the rest leaves neither a half folder nor scratch."""

    def interrupt(self: Tokenizer, folder: Path) -> None:
        assert not (tmp_path / "model").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(build(LLAMA), tmp_path / "model", tokenizer=small_tokenizer(9))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    """The scratch folder of a dead process for the same target goes; one of a running process stays."""
    over = subprocess.Popen([sys.executable, "-c", ""])
    over.wait()
    for number in (over.pid, os.getppid()):
        (tmp_path / f".model.partial-{number}").mkdir()
    save_model(build(LLAMA), tmp_path / "model")
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", f".model.partial-{os.getppid()}"}


def test_a_state_dict_copy_can_be_written_after_the_model_has_moved_on(tmp_path):
    """write_model writes the numbers it is given, not those of the live model."""
    model = build(V3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.model.norm.weight.zero_()
    write_model(tmp_path, model.config, state)
    assert same_state(load_model(tmp_path, dtype="float32"), build(V3))


def test_import_fathom_does_not_import_torch():
    """`import fathom` stays quick: torch comes with the first use of load or Transformer."""
    code = "import sys, fathom; assert 'torch' not in sys.modules; assert 'load' in fathom.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_several_end_tokens_survive(tmp_path):
    """A list of end-of-text ids is written to both files that other engines read, and comes back."""
    save_model(build(V3.replace(eos_token_id=[1, 5])), tmp_path / "model")
    assert load_model(tmp_path / "model").config.eos_token_ids == (1, 5)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == [1, 5]
