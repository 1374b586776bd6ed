"""Models as Hugging Face folders: what others publish is opened, what is written others open.

A folder holds `config.json`, `*.safetensors` with the published names, `generation_config.json` and, where there
is a tokenizer, its files. Loading compares every name and shape with what the config calls for *before* the first
value is read, so a wrong folder fails at once and by name. Each parameter is then allocated once, in its final
dtype and place, and filled; block-quantised FP8 weights are dequantised on the way. Saving quantises them, one at a
time: projections, experts' included, become FP8 beside their scales, as DeepSeek publishes them.

Not covered: other quantisations (refused), sliding-window attention (refused), adapters.
"""

import importlib.util
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig, read_config, to_hf
from fathom.data.tokenizer import Tokenizer, check_vocabulary
from fathom.errors import UserError, nearest
from fathom.model.naming import EMBEDDING, HEAD, Published, mtp_prefix, published, scale_name
from fathom.model.shards import Shards, open_shards, write_shards
from fathom.model.transformer import Transformer
from fathom.precision import BLOCK, dequantize_blocks, quantize_blocks, scale_shape
from fathom.scratch import neighbour, sweep, sync

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What weights can be held and written in."""
FP8 = "fp8"
"""What they can also be written in: projections in FP8 blocks, all else in bfloat16."""

_PLAIN = {"F64", "F32", "F16", "BF16"}
_FP8 = "F8_E4M3"
_SCALES = {"F32", "BF16", "F8_E8M0"}


def load(
    path: str | Path, dtype: str | torch.dtype = "bfloat16", device: str | torch.device = "cpu"
) -> tuple[Transformer, Tokenizer | None]:
    """A model and its tokenizer (None where there is none) from a folder, a `.gguf` file or a hub name.

    `dtype` is what the weights are held in: `bfloat16` or `float32`, by name or torch's own. Raises `UserError`.
    """
    source = resolve(path)
    if source.suffix == ".gguf":
        return _load_gguf(source, dtype, device)
    tokenizer = Tokenizer.from_folder(source)
    if tokenizer is not None:
        check_vocabulary(tokenizer, read_config(source))
    return load_model(source, dtype=dtype, device=device), tokenizer


def load_model(
    path: str | Path, *, dtype: str | torch.dtype = "bfloat16", device: str | torch.device = "cpu"
) -> Transformer:
    """The model alone; arguments and errors as in `load`."""
    source = resolve(path)
    if source.suffix == ".gguf":
        return _load_gguf(source, dtype, device)[0]
    config, target = read_config(source), torch_dtype(dtype)
    with open_shards(source) as shards:
        announced, config = config.num_nextn_predict_layers, _without_absent_mtp(config, shards)
        duplicates = _check_tensors(config, shards, source)
        if announced > config.num_nextn_predict_layers:
            warnings.warn(
                f"{source}: config.json announces {announced} MTP module(s) whose tensors are not there; "
                "loading without them",
                stacklevel=2,
            )
        model = assemble(config, lambda t: _values(shards, t, target, source), dtype=target, device=device)
        _compare_duplicates(model, duplicates, shards, source)
    return model


def save_model(
    model: Transformer,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a model folder that appears whole or not at all. An existing folder with content is refused.

    `dtype` (`float32`, `bfloat16` or `fp8`) is what weights are rounded to; the router's bias stays float32. Raises
    `UserError`: when the disk is full, and in FP8 for a projection with a number that is not finite.
    """
    with new_folder(Path(folder)) as scratch:
        write_model(
            scratch,
            model.config,
            model.state_dict(),
            tokenizer=tokenizer,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )
    if dtype == FP8:
        _say_what_others_misread(model.config, folder)


def write_model(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
) -> None:
    """The files of a model into an existing `folder`, for callers that have their own way to make it appear whole.

    `state` is a `Transformer.state_dict()`, or a copy of one; only one tensor at a time is converted.
    """
    if tokenizer is not None:
        check_vocabulary(tokenizer, config)
        config = _with_token_ids(config, tokenizer)
    fp8 = dtype == FP8
    target = torch.bfloat16 if fp8 else torch_dtype(dtype)
    stored = {"float32": torch.float32, "plain": target, "projection": torch.float8_e4m3fn if fp8 else target}
    records = {tensor.name: tensor for tensor in published(config, fp8=fp8)}
    scales: dict[str, Tensor] = {}

    def value(name: str) -> Tensor:
        tensor = records[name]
        if tensor.ours is None:
            return scales.pop(name)  # its projection has just been written
        part = state[tensor.ours][tensor.part]
        if not fp8 or tensor.kind != "projection":
            return part
        codes, scales[scale_name(name)] = quantize_blocks(part)
        if not scales[scale_name(name)].isfinite().all():
            raise UserError(
                f"{name}: holds NaN or an infinite number, for which FP8 blocks have no scale: all numbers around it "
                "would be lost; repair the weights, or save in bfloat16"
            )
        return codes

    shapes = {name: (tensor.shape, stored[tensor.kind]) for name, tensor in records.items()}
    # mlx-lm reads model*.safetensors and stops at tensors it does not know; other programs follow the index.
    modules = tuple(mtp_prefix(config, k) for k in range(config.num_nextn_predict_layers))

    def stem_of(name: str) -> str:
        return "mtp" if name.startswith(modules) else "model"

    write_shards(folder, shapes, value, max_shard_bytes=max_shard_bytes, stem_of=stem_of)
    _write_json(folder / "config.json", to_hf(config, dtype=dtype))
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    if tokenizer is not None:
        tokenizer.save(folder)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder beside `folder` that takes its name when the block ends well and vanishes when it does not.

    A kill at any moment leaves either no `folder` or a whole one, and perhaps the scratch folder (`.NAME.partial-PID`),
    which the next attempt at the same `folder` removes. Raises `UserError` for a `folder` that already has content and
    for what the disk refuses.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists; choose another place or remove it first")
    scratch = neighbour(folder, "partial")
    try:
        sweep(folder, "partial")
        scratch.mkdir(parents=True)
        yield scratch
        os.rename(scratch, folder)
        sync(folder.parent)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); nothing was left there") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def assemble(
    config: ModelConfig,
    values: Callable[[Published], Tensor],
    *,
    dtype: torch.dtype,
    device: str | torch.device,
) -> Transformer:
    """A model whose every parameter is allocated once and filled with `values(published tensor)`, cast to `dtype`."""
    with torch.device("meta"):
        model = Transformer(config)
    parameters = dict(model.named_parameters())
    state: dict[str, Tensor] = {}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in published(config):
            if tensor.duplicate:
                continue
            name = tensor.ours
            assert name is not None
            if name not in state:
                kept = torch.float32 if tensor.kind == "float32" else dtype
                empty = torch.empty(shapes[name], dtype=kept, device=device)
                state[name] = nn.Parameter(empty) if name in parameters else empty
            state[name][tensor.part].copy_(values(tensor))
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    return model


def resolve(path: str | Path) -> Path:
    """The local folder or `.gguf` file that `path` means; a hub name (`owner/model`) is fetched first.

    What begins with `.`, `/` or `~`, has two separators, or lies in a folder that exists is a path, never a hub name.
    `package:NAME` is the one `.gguf` file that an installed Python package carries.
    """
    if str(path).startswith("package:"):
        return _in_package(str(path).removeprefix("package:"))
    local = Path(os.path.expanduser(path))
    if local.is_dir() or (local.is_file() and local.suffix == ".gguf"):
        return local
    if local.is_file():
        raise UserError(f"{local}: expected a model folder or a .gguf file")
    if local.parent.is_dir() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)):
        siblings = {p.name: str(p) for p in local.parent.iterdir()} if local.parent.is_dir() else {}
        raise UserError(f"{path}: no such model folder{nearest(local.name, siblings, shown=siblings)}")
    return _fetch(str(path))


def _in_package(name: str) -> Path:
    """The `.gguf` file in an installed package, which is not imported."""
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None:
        raise UserError(f"package:{name}: no such Python package is installed; install the one that carries the model")
    files = sorted(file for folder in found.submodule_search_locations or () for file in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"package:{name}: has {len(files)} .gguf files; name the one that you mean by its path")
    return files[0]


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`float32` or `bfloat16`, a name or a `torch.dtype`, as the latter; anything else raises `UserError`."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not supported{nearest(name, DTYPES)}; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def _load_gguf(file: Path, dtype: str | torch.dtype, device: str | torch.device) -> tuple[Transformer, Tokenizer]:
    # Imported here: only this path needs the gguf package, and it needs `assemble` from this module.
    from fathom.model.gguf import read_gguf

    model, tokenizer = read_gguf(file, dtype=torch_dtype(dtype), device=device)
    check_vocabulary(tokenizer, model.config)
    return model, tokenizer


def _fetch(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise UserError(
            f"{name}: no such folder, and fetching it from the hub needs huggingface_hub; pip install 'fathom-lm[hub]'"
        ) from None
    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the client raises errors of several libraries, each a paragraph long
        if isinstance(error, RepositoryNotFoundError):
            reason = "has no such model, or not without a login"
        elif isinstance(error, (LocalEntryNotFoundError, ConnectionError)):
            reason = "cannot be reached"
        else:
            reason = f"did not give it ({getattr(error, 'strerror', None) or type(error).__name__})"
        raise UserError(f"{name}: no such folder here, and the hub {reason}") from None


def _without_absent_mtp(config: ModelConfig, shards: Shards) -> ModelConfig:
    """Drop MTP modules that the config announces but the folder wholly lacks."""
    depths = config.num_nextn_predict_layers
    prefixes = tuple(mtp_prefix(config, depth) for depth in range(depths))
    if not depths or any(name.startswith(prefixes) for name in shards):
        return config
    return config.replace(num_nextn_predict_layers=0)


def _check_tensors(config: ModelConfig, shards: Shards, folder: Path) -> list[Published]:
    """Compare names, shapes and dtypes with the config; return the duplicates that are there."""
    expected = {tensor.name: tensor for tensor in published(config)}
    if config.tie_word_embeddings:
        table = (config.vocab_size, config.hidden_size)
        expected[HEAD] = Published(HEAD, table, "plain", EMBEDDING, duplicate=True)
    _refuse(folder, "missing", [n for n, t in expected.items() if n not in shards and not t.duplicate])
    present = [tensor for tensor in expected.values() if tensor.name in shards]
    scales = {scale_name(t.name) for t in present}
    # Old Llama files carry their rotary frequencies; they follow from the config.
    known = expected.keys() | scales
    _refuse(folder, "unknown", [n for n in shards if n not in known and not n.endswith("rotary_emb.inv_freq")])
    for tensor in present:
        _check_tensor(tensor, shards, folder)
    return [tensor for tensor in present if tensor.duplicate]


def _check_tensor(tensor: Published, shards: Shards, folder: Path) -> None:
    found, stored = shards.shape(tensor.name), shards.dtype(tensor.name)
    if found != tensor.shape:
        raise UserError(
            f"{folder}: tensor {tensor.name} has shape {list(found)}, config.json calls for {list(tensor.shape)}"
        )
    scales = scale_name(tensor.name)
    if stored in _PLAIN:
        if scales in shards:
            raise UserError(f"{folder}: tensor {scales} has scales, but {tensor.name} is not FP8: it is {stored}")
        return
    if stored != _FP8:
        raise UserError(f"{folder}: tensor {tensor.name} is stored as {stored}, which is not supported")
    if len(found) != 2:
        raise UserError(f"{folder}: tensor {tensor.name} is FP8, which only matrices can be; it is {list(found)}")
    if scales not in shards:
        raise UserError(f"{folder}: tensor {tensor.name} is FP8 but its scales {scales} are missing")
    shape, expected = shards.shape(scales), scale_shape(found)
    if shape != expected or shards.dtype(scales) not in _SCALES:
        transposed = "; they lie transposed" if shape == expected[::-1] != expected else ""
        raise UserError(
            f"{folder}: tensor {scales} is {shards.dtype(scales)} {list(shape)}; blocks of 128×128 "
            f"call for float32 {list(expected)}{transposed}"
        )


def _refuse(folder: Path, what: str, names: list[str]) -> None:
    """Raise for tensors that are `missing` or `unknown`: the first three and the count."""
    if names:
        first = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        tensors = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
        raise UserError(f"{folder}: {tensors} {what} for this config.json: {first}")


def _values(shards: Shards, tensor: Published, dtype: torch.dtype, folder: Path) -> Tensor:
    raw = shards.read(tensor.name)
    if raw.dtype != torch.float8_e4m3fn:
        return raw
    scale = shards.read(scale_name(tensor.name)).float()
    for row, column in (~((scale > 0) & scale.isfinite())).nonzero().tolist():
        found = float(scale[row, column])
        block = raw[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
        # Some programs give a block of zeros the scale 0, which changes none of its numbers.
        if found != 0 or block.float().any():
            raise UserError(
                f"{folder}: tensor {scale_name(tensor.name)} has the scale {found} at [{row}, {column}], which must be "
                "finite and above 0; fetch or export it again"
            )
    return dequantize_blocks(raw, scale, dtype=dtype)


def _compare_duplicates(model: Transformer, duplicates: list[Published], shards: Shards, folder: Path) -> None:
    """Second copies are dropped; where one is no copy, the numbers are not the file's, and that is said."""
    state = model.state_dict()
    for tensor in duplicates:
        assert tensor.ours is not None
        kept = state[tensor.ours]
        if not torch.equal(_values(shards, tensor, kept.dtype, folder).to(kept), kept):
            warnings.warn(f"{folder}: {tensor.name} differs from {tensor.ours}, which is used instead", stacklevel=3)


def _say_what_others_misread(config: ModelConfig, folder: str | Path) -> None:
    """One warning with the number of projections whose last blocks are ragged, and the first of them."""
    projections = [tensor for tensor in published(config) if tensor.kind == "projection"]
    ragged = [tensor for tensor in projections if any(side > BLOCK and side % BLOCK for side in tensor.shape)]
    if ragged:
        warnings.warn(
            f"{folder}: {len(ragged)} of {len(projections)} projections have a side over {BLOCK} that is no multiple "
            f"of {BLOCK}, first {ragged[0].name} {list(ragged[0].shape)}; Fathom reads them, other programs may not, "
            "or wrongly (docs/guides/other-engines.md)",
            stacklevel=3,
        )


def _with_token_ids(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Special tokens that the config leaves open, from the tokenizer: other engines stop by them."""
    eos = list(tokenizer.eos_token_ids)
    found = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return config.replace(**{key: value for key, value in found.items() if getattr(config, key) is None})


def _write_json(file: Path, values: dict[str, object]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
