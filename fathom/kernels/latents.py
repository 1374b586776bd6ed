"""The kernels of remembered latents in FP8 (`fathom.model.latents` says how these lie)."""

import torch
from torch import Tensor

from fathom.kernels import ops
from fathom.kernels.ops import PAGE, kernel


def usable(pages: Tensor) -> bool:
    """Whether there are kernels for such pages."""
    return pages.device.type == "cpu" and ops.library() is not None


def write_latents(rows: Tensor, pages: Tensor, places: Tensor, latent: int) -> None:
    """Quantise rows [T, latent + rope] bfloat16 to `places` [T] int64, as in `ops.write_pages`, of pages of bytes."""
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    kernel("write_latents")(
        rows.data_ptr(), rows.stride(0), pages.data_ptr(), places.data_ptr(), rows.shape[0], latent,
        rows.shape[1] - latent,
    )  # fmt: skip


def read_latents(pages: Tensor, owned: Tensor, count: int, *, latent: int, rope: int) -> Tensor:
    """The first `count` positions on the pages `owned` [p] int64, in order: [count, latent + rope] bfloat16."""
    owned, out = owned.contiguous(), torch.empty(count, latent + rope, dtype=torch.bfloat16)
    kernel("read_latents")(pages.data_ptr(), owned.data_ptr(), count, latent, rope, out.data_ptr())
    return out


def attention_fits(rope: int) -> bool:
    """Whether `latent_attention` takes shared keys of this width."""
    return rope % 32 == 0


def latent_attention(q: Tensor, pages: Tensor, tables: Tensor, visible: Tensor, latent: int, scale: float) -> Tensor:
    """Absorbed attention of single tokens over pages of bytes.

    Args:
        q: [T, H, latent + rope] bfloat16.
        pages: [P, PAGE, bytes] uint8.
        tables, visible: as in `ops.paged_attention`.
        latent: width of the latents, which are the values too.
        scale: factor on the scores.

    Returns:
        [T, H, latent] bfloat16.
    """
    tokens, heads, width = q.shape
    assert pages.shape[1] == PAGE, f"{pages.shape=}"
    q, out = q.contiguous(), torch.empty(tokens, heads, latent, dtype=q.dtype)
    kernel("latent_attention")(
        q.data_ptr(), pages.data_ptr(), out.data_ptr(), tables.data_ptr(), visible.data_ptr(),
        tokens, heads, latent, width - latent, tables.shape[1], scale,
    )  # fmt: skip
    return out
