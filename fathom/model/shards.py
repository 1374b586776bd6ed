"""Safetensors files: many tensors read lazily from a folder, or streamed into one.

Only safetensors are opened. A pickle (`pytorch_model.bin`, `*.pt`) can run code while it is being read, and a
folder that has nothing else is refused with that sentence.

The writer lays the file out itself (8 bytes of header length, JSON header, raw little-endian values:
https://github.com/huggingface/safetensors#format), because the library's own `save_file` wants every tensor of a
file at once, copied; here the memory needed is that of one tensor, however large the shard.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fathom.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_STORED_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}


class Shards:
    """The tensors of a folder by name. Headers are read at once, values when asked for."""

    def __init__(self, folder: Path, handles: Mapping[str, Any]) -> None:
        self._folder, self._handles = folder, handles

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """What a tensor is stored in, in the format's spelling: `BF16`, `F32`, `F8_E4M3`, …"""
        return self._handles[name].get_slice(name).get_dtype()

    def read(self, name: str) -> Tensor:
        """A tensor's values, mapped from the file: copy them before the shards are closed."""
        try:
            return self._handles[name].get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{self._folder}: cannot read tensor {name} ({error})") from None


@contextmanager
def open_shards(folder: Path) -> Iterator[Shards]:
    """All safetensors that belong to the model in `folder`. A damaged or missing file raises `UserError`."""
    places = _weight_map(folder)
    files = sorted(set(places.values())) if places else [SINGLE_FILE]
    with ExitStack() as stack:
        handles: dict[str, Any] = {}
        for file in files:
            handle = stack.enter_context(_open(folder / file))
            names = handle.keys()
            if places and (unlisted := [name for name in names if name not in places]):
                raise UserError(
                    f"{folder / INDEX_FILE}: does not list {min(unlisted)}, which {file} holds; "
                    "it belongs to other files, or is damaged"
                )
            handles |= {name: handle for name in names if places.get(name, file) == file}
        if absent := places.keys() - handles.keys():
            name = min(absent)
            raise UserError(f"{folder / INDEX_FILE}: lists {name} in {places[name]}, which does not hold it")
        yield Shards(folder, handles)


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name to file name, from the index; empty for a folder with a single file."""
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / SINGLE_FILE).exists():
            raise UserError(_no_weights(folder))
        return {}
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not a safetensors index ({error!r})") from None
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: weight_map lists no tensors")
    for file in places.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: {file!r} is not the name of a file beside it")
    for file in set(places.values()):
        if not (folder / file).exists():
            raise UserError(f"{index}: names {file}, which is not in the folder; is the download complete?")
    return places


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or truncated safetensors file ({error}); fetch it again") from None


def _no_weights(folder: Path) -> str:
    pickles = [f.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in sorted(folder.glob(pattern))]
    if pickles:
        return (
            f"{folder}: its weights are a pickle ({pickles[0]}), which can run code when it is opened; "
            "convert them to safetensors first (transformers: from_pretrained, then save_pretrained)"
        )
    return f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; is this a model folder?"


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    value: Callable[[str], Tensor],
    *,
    max_shard_bytes: float,
    stem_of: Callable[[str], str] = lambda _: "model",
) -> None:
    """Write `model.safetensors`, or numbered shards of at most `max_shard_bytes` and their index.

    `shapes` gives name -> (shape, dtype); in its order `value(name)` is asked, once per tensor, at the moment its bytes
    are due. A single tensor larger than the limit has a shard of its own. `stem_of(name)` says what
    a tensor's file is called; tensors of another stem than "model" lie in files of their own, in the same index.
    """
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    by_stem: dict[str, dict[str, int]] = {}
    for name, size in sizes.items():
        by_stem.setdefault(stem_of(name), {})[name] = size
    groups = {stem: _groups(names, max_shard_bytes) for stem, names in by_stem.items()}
    if list(groups) == ["model"] and len(groups["model"]) == 1:
        _write_file(folder / SINGLE_FILE, groups["model"][0], shapes, sizes, value)
        return
    weight_map = {}
    for stem, shards in groups.items():
        for number, names in enumerate(shards, start=1):
            file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_file(folder / file, names, shapes, sizes, value)
            weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _groups(sizes: Mapping[str, int], limit: float) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _write_file(
    file: Path,
    names: Sequence[str],
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    sizes: Mapping[str, int],
    value: Callable[[str], Tensor],
) -> None:
    # Wider numbers first, as the library does: every tensor then starts at a multiple of its own item size.
    ordered, starts = sorted(names, key=lambda name: -shapes[name][1].itemsize), {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in ordered:
        shape, dtype = shapes[name]
        starts[name], end = offset, offset + sizes[name]
        header[name] = {
            "dtype": _STORED_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        begin = stream.tell()
        for name in names:
            shape, dtype = shapes[name]
            stream.seek(begin + starts[name])
            tensor = value(name).detach().to(device="cpu", dtype=dtype).contiguous()
            assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)} != {shape}"
            stream.write(tensor.view(torch.uint8).numpy())
        stream.flush()
        os.fsync(stream.fileno())
