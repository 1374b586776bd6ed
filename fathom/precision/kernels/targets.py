"""Every kernel, compiled for every target without a GPU, and what the binary takes of one.

    python -m fathom.precision.kernels.targets [KERNEL …] [--json]

Compiled is what a launcher would compile at the widths of DeepSeek-V3: Triton learns from a launch which widths and
addresses are multiples of 16, and then reads 16 bytes at a time. What a program takes is read from the binary itself:
of a cubin by NVIDIA's `cuobjdump`, which Triton brings along, of AMD's code object from the note in its ELF file.
Registers of an AMD target are vector registers of a lane.
"""

import argparse
import importlib.util
import json
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fathom.precision.kernels.family import CDNA, HOPPER, RDNA

TARGETS = {
    "cuda:90": ("cuda", 90, 32),
    "cuda:100": ("cuda", 100, 32),
    "hip:gfx942": ("hip", "gfx942", 64),
    "hip:gfx1100": ("hip", "gfx1100", 32),
}
"""Hopper, Blackwell, MI300 and RDNA 3: backend, architecture, lanes of a warp."""
FAMILIES = {"cuda:90": HOPPER, "cuda:100": HOPPER, "hip:gfx942": CDNA, "hip:gfx1100": RDNA}
SHARED_LIMIT = {"cuda:90": 232448, "cuda:100": 232448, "hip:gfx942": 65536, "hip:gfx1100": 65536}
"""Bytes of shared memory that a program may take."""

BF16, F32, U8, I32 = "*bf16", "*fp32", "*u8", "*i32"


@dataclass(frozen=True)
class Usage:
    """What one program of a kernel takes."""

    registers: int
    """Of a thread."""
    shared: int
    """Bytes of shared memory."""
    spills: int
    """Registers or bytes that had to be kept in memory."""


@dataclass(frozen=True)
class Build:
    """A kernel as it is compiled."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


def builds(target: str) -> dict[str, Build]:
    """What is compiled for `target`, by name."""
    from fathom.precision.kernels import attention, fused, products, quantise

    family = FAMILIES[target]
    numbers = dict.fromkeys(("M", "N", "K", "stride", "inner"), "i32")
    found = {
        "quantise_rows": Build(
            quantise.rows_kernel, {"x": BF16, "codes": U8, "scales": F32}, {"POWER_OF_TWO": False, "BLOCK_M": 16}, {}
        ),
        "quantise_columns": Build(
            quantise.columns_kernel,
            {"x": BF16, "at": I32, "begins": I32, "ends": I32, "codes": U8, "scales": F32},
            {"POWER_OF_TWO": False, "GATHER": True, "BLOCK_K": 32}, {},
        ),
        "quantise_both": Build(
            quantise.both_kernel,
            {"x": BF16, "row_codes": U8, "row_scales": F32, "column_codes": U8, "column_scales": F32},
            {"POWER_OF_TWO": True}, {"num_warps": 8},
        ),
        "quantise_blocks": Build(
            quantise.blocks_kernel, {"w": F32, "codes": U8, "scales": F32}, {"POWER_OF_TWO": False}, {"num_warps": 16}
        ),
        "norm_quantise": Build(
            fused.norm_kernel, {"x": BF16, "weight": F32, "codes": U8, "scales": F32, "inverse": F32, "eps": "fp32"},
            {"POWER_OF_TWO": False, "TILES": 64}, {"num_warps": 16},
        ),
        "swiglu_quantise": Build(
            fused.swiglu_kernel, {"gate_up": BF16, "weights": F32, "codes": U8, "scales": F32},
            {"WEIGHTED": True, "POWER_OF_TWO": False, "BLOCK_M": 16}, {},
        ),
        "latent_decode": Build(
            attention.latent_kernel,
            {"q": BF16, "pages": BF16, "tables": I32, "visible": I32, "mixed": F32, "statistics": F32,
             "heads": "i32", "table_width": "i32", "pages_each": "i32", "scale": "fp32"},
            {"C": 512, "R": 64, "WIDE": 512, "NARROW": 64, "PAGE_SIZE": 64} | attention.blocks(512, family),
            attention.options(family),
        ),
        "latent_join": Build(
            attention.join_kernel, {"mixed": F32, "statistics": F32, "out": BF16, "lines": "i32"},
            {"C": 512, "WIDE": 512, "SPLITS": 8}, {},
        ),
    }  # fmt: skip
    pointers = {
        "a": U8, "a_scales": F32, "w": U8, "w_scales": F32, "at": I32, "begins": I32, "stops": I32, "groups": I32,
    }  # fmt: skip
    kinds = {
        "scaled_product": ({"GROUPED": False, "GATHER": False, "IN_BLOCKS": True}, BF16),
        "weight_gradient": ({"GROUPED": False, "GATHER": False, "IN_BLOCKS": False}, F32),
        "grouped_product": ({"GROUPED": True, "GATHER": True, "IN_BLOCKS": True}, BF16),
    }
    for name, (kind, out) in kinds.items():
        launched = products.launch_options(family, in_blocks=kind["IN_BLOCKS"], grouped=kind["GROUPED"], rows=4096)
        found[name] = Build(
            products.product_kernel, pointers | {"y": out},
            kind | {"NATIVE": family.multiplies_e4m3} | launched.constants, launched.options,
        )  # fmt: skip
    return {
        name: Build(b.kernel, _ordered(b.kernel, numbers | b.signature, b.constants), b.constants, b.options)
        for name, b in found.items()
    }


def _ordered(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    return {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}


def measure(name: str, target: str) -> Usage:
    """Compile kernel `name` for `target` and read what its binary takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    build = builds(target)[name]
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (argument, kind) in enumerate(build.signature.items())
        if kind[0] == "*" or argument in ("N", "K", "stride", "inner")
    }
    source = ASTSource(build.kernel, build.signature, build.constants, aligned)
    compiled = triton.compile(
        source, target=GPUTarget(*TARGETS[target]), options=build.options | {"enable_fp_fusion": True}
    )
    read: Callable[[bytes], Usage] = _of_cubin if target.startswith("cuda") else _of_code_object
    usage = read(compiled.asm["cubin" if target.startswith("cuda") else "hsaco"])
    # Shared memory whose size a launch decides is not in the binary.
    return Usage(usage.registers, max(usage.shared, compiled.metadata.shared), usage.spills)


def _of_cubin(binary: bytes) -> Usage:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    line = next(line for line in told.stdout.splitlines() if "REG:" in line)
    numbers = {key: int(value) for key, _, value in (word.partition(":") for word in line.split()) if value.isdigit()}
    return Usage(numbers["REG"], numbers["SHARED"], numbers["STACK"] + numbers["LOCAL"])


def _of_code_object(binary: bytes) -> Usage:
    (kernel,) = _notes(binary)["amdhsa.kernels"]
    spills = kernel[".vgpr_spill_count"] + kernel[".sgpr_spill_count"]
    return Usage(kernel[".vgpr_count"], kernel[".group_segment_fixed_size"], spills)


def _notes(elf: bytes) -> dict[str, Any]:
    """The metadata that AMD's compiler leaves in a note of a 64-bit little-endian ELF file, in MessagePack."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    for index in range(count):
        _, kind, _, _, offset, length = struct.unpack_from("<IIQQQQ", elf, table + index * size)
        end = offset + length
        while kind == 7 and offset < end:  # a section of notes
            name_size, text_size, _ = struct.unpack_from("<III", elf, offset)
            name = elf[offset + 12 : offset + 12 + name_size].rstrip(b"\0")
            begin = offset + 12 + -(-name_size // 4) * 4
            if name == b"AMDGPU":
                return next(_unpacked(elf, begin))[0]
            offset = begin + -(-text_size // 4) * 4
    raise ValueError("no AMDGPU note in this file")


def _unpacked(data: bytes, at: int) -> Iterator[tuple[Any, int]]:
    """The MessagePack values one after another from `at` on, each with the place behind it."""
    fixed = {0xC0: None, 0xC2: False, 0xC3: True}
    sizes = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
    lengths = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}
    while True:
        kind, at, length = data[at], at + 1, 0
        if kind in lengths:
            (length,) = struct.unpack_from(lengths[kind], data, at)
            at += struct.calcsize(lengths[kind])
        elif 0x80 <= kind <= 0xBF:
            length = kind & (0x1F if kind >= 0xA0 else 0x0F)
        if kind in (0xD9, 0xDA, 0xDB) or 0xA0 <= kind <= 0xBF:
            value, at = data[at : at + length].decode(), at + length
        elif kind in (0xDC, 0xDD) or 0x90 <= kind <= 0x9F:
            value = []
            for _ in range(length):
                item, at = next(_unpacked(data, at))
                value.append(item)
        elif kind in (0xDE, 0xDF) or 0x80 <= kind <= 0x8F:
            value = {}
            for _ in range(length):
                key, at = next(_unpacked(data, at))
                value[key], at = next(_unpacked(data, at))
        elif kind in sizes:
            (value,) = struct.unpack_from(sizes[kind], data, at)
            at += struct.calcsize(sizes[kind])
        elif kind in fixed:
            value = fixed[kind]
        elif kind <= 0x7F or kind >= 0xE0:
            value = kind if kind <= 0x7F else kind - 256
        else:
            raise ValueError(f"MessagePack kind {kind:#x} is not read here")
        yield value, at


def main() -> None:
    """Compile, and print a line for each kernel and target, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kernels", nargs="*", help="names; none is all")
    parser.add_argument("--json", action="store_true", help="one JSON object: kernel, target, what it takes")
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        parser.error("needs Triton, but no GPU: pip install 'fathom-lm[gpu]'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    usage: dict[str, dict[str, Any]] = {}
    for name in options.kernels or builds("cuda:90"):
        for target in TARGETS:
            usage.setdefault(name, {})[target] = asdict(measure(name, target))
            if not options.json:
                line = usage[name][target]
                print(f"{name:18} {target:12}", *(f"{key} {value:6}" for key, value in line.items()), flush=True)
    if options.json:
        print(json.dumps(usage, indent=1))


if __name__ == "__main__":
    main()
