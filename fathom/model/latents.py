"""Remembered latents in FP8, as FlashMLA lays them out (github.com/deepseek-ai/FlashMLA: README, tests/quant.py).

A position of one layer is C + 4·C/128 + 2·R bytes, side by side:

    C e4m3 codes of the normalised latent │ C/128 float32 scales, one for each 128 codes │ R bfloat16 of the rotated key

V3's latent, 512 + 64, makes the 656 bytes that FlashMLA's kernels read; other widths are laid out alike. The shared key
is not rounded: it carries positions, and little memory.

Scales are what FlashMLA's own quantiser makes: largest magnitude / 448, at least 10⁻⁴, rounded up to the next power of
two. Hence a code times its scale is a bfloat16 number. What is stored comes back in the model's own type with nothing
lost, and single tokens and stretches of prompts attend to the same numbers. Where 128 numbers hold one that is none, or
an infinite one, their scale and codes are no numbers either: they are poisoned, and nothing else.

Legend: C latent width, R rotary width.
"""

import torch
from torch import Tensor

from fathom.config.model import ModelConfig
from fathom.errors import UserError
from fathom.precision.tiles import E4M3_MAX, TILE, tile_scales

LEAST_SCALE = 1e-4
"""FlashMLA's, before it is rounded up."""
_SCALE, _KEY = torch.float32.itemsize, torch.bfloat16.itemsize


def packed_bytes(latent: int, rope: int) -> int:
    """Bytes of one position in one layer; 656 for 512 + 64."""
    return _key_at(latent) + rope * _KEY


def require_packable(config: ModelConfig, dtype: torch.dtype) -> None:
    """Raises `UserError` for a model whose cache cannot be in FP8."""
    if config.kv_lora_rank is None or config.kv_lora_rank % TILE:
        found = "keys and values per head" if config.kv_lora_rank is None else f"latents of {config.kv_lora_rank}"
        raise UserError(
            f"kv_cache fp8 (--kv-cache) is for latents, their width a multiple of {TILE} (512 + 64 is FlashMLA's); "
            f"this model remembers {found}; leave it out"
        )
    if dtype is not torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"kv_cache fp8 (--kv-cache) needs a model in bfloat16, not {name}; use --dtype bfloat16")


def pack_latents(rows: Tensor, latent: int) -> Tensor:
    """rows [T, C + R] bfloat16 -> [T, bytes] uint8."""
    tiles = rows[:, :latent].float().unflatten(1, (-1, TILE))
    largest = tiles.abs().amax(dim=-1).clamp_min(LEAST_SCALE * E4M3_MAX)
    scales = tile_scales(largest, power_of_two=True)
    codes = (tiles / scales[..., None]).flatten(1).to(torch.float8_e4m3fn)
    parts = (codes, scales, rows[:, latent:].contiguous())
    return torch.cat([part.view(torch.uint8) for part in parts], dim=1)


def unpack_latents(packed: Tensor, latent: int) -> Tensor:
    """packed [..., bytes] uint8 -> [..., C + R] bfloat16."""
    key = _key_at(latent)
    codes = packed[..., :latent].view(torch.float8_e4m3fn).float().unflatten(-1, (-1, TILE))
    scales = packed[..., latent:key].view(torch.float32)
    latents = (codes * scales[..., None]).flatten(-2).to(torch.bfloat16)
    return torch.cat((latents, packed[..., key:].view(torch.bfloat16)), dim=-1)


def _key_at(latent: int) -> int:
    """Where the shared key begins."""
    return latent + latent // TILE * _SCALE
