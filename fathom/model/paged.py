"""A cache in pages of 64 tokens, for many sequences at once.

Every layer has a pool of pages [pages, heads, PAGE, width]; a sequence owns a list of page numbers and nothing else, so
pages can be shared between sequences that begin alike and return to the pool one by one. For latent attention a
position is one row of width kv_lora_rank + rope, the values being its first part; for grouped-query attention keys and
values have a pool each. Where routes are recorded, the experts that were chosen for a position lie beside its keys, and
go wherever these go.

Latents can be kept in FP8 (`fathom.model.latents`), in pools of bytes [pages, PAGE, bytes]. They are rounded when they
are written, and whatever attends to them, the token itself included, sees what was stored.

One call of the model may mix single tokens (decoding, verification of drafts) and stretches (parts of prompts): tokens
of all sequences stand in one row, and a `PagedCall` says of each where it goes and what it sees.

Legend: T tokens of a call, P pages, G key/value heads, K experts per token.
"""

import functools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.config.model import ModelConfig
from fathom.kernels import latents as latent_kernels
from fathom.kernels import ops as kernels
from fathom.kernels.ops import PAGE
from fathom.model.attention_core import QUERY_BLOCK
from fathom.model.cache import Slots
from fathom.model.latents import pack_latents, packed_bytes, require_packable, unpack_latents


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of one sequence, rows start..stop of a call."""

    start: int
    stop: int
    pages: Tensor
    """[p] int64: the sequence's pages, up to the last token of the stretch."""
    past: int
    """Tokens of the sequence before the stretch."""

    @property
    def before(self) -> int:
        """Positions before the stretch down to the beginning of its first block of queries.

        Attention takes whole blocks, filled up with zeros: so a token's bits do not depend on where its stretch begins
        and where its text ends.
        """
        return self.past % QUERY_BLOCK

    @property
    def missing(self) -> int:
        """Positions behind the stretch up to the end of its last block of queries."""
        return -(self.past + self.stop - self.start) % QUERY_BLOCK

    def queries(self, q: Tensor) -> Tensor:
        """The stretch's own of q [T, H, D], filled up to whole blocks: [1, H, before + length + missing, D]."""
        rows = q[self.start : self.stop].transpose(0, 1).unsqueeze(0)
        return F.pad(rows, (0, 0, self.before, self.missing))

    def put(self, mixed: Tensor, heads: Tensor) -> None:
        """Write what attention made of `queries`, [1, H, before + length + missing, D], to its place in [T, H, D]."""
        length = self.stop - self.start
        heads[self.start : self.stop] = mixed[0, :, self.before : self.before + length].transpose(0, 1)


class PagedCache:
    """The pools of all layers, MTP modules' behind the others if asked for, and routes if they are recorded."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        pages: int,
        dtype: torch.dtype,
        mtp_layers: int = 0,
        routes: bool = False,
        fp8: bool = False,
    ) -> None:
        """`dtype` is the activations'; `fp8` keeps latents in FP8. Raises `UserError` where they cannot be."""
        if fp8:
            require_packable(config, dtype)

        def pool(heads: int, width: int) -> Tensor:
            return torch.zeros(pages, heads, PAGE, width, dtype=dtype)

        def pools() -> tuple[Tensor, Tensor | None]:
            if config.kv_lora_rank is not None and fp8:
                width = packed_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
                return torch.zeros(pages, PAGE, width, dtype=torch.uint8), None
            if config.kv_lora_rank is not None:
                return pool(1, config.kv_lora_rank + config.qk_rope_head_dim), None
            heads, width = config.key_value_heads, config.dense_head_dim
            return pool(heads, width), pool(heads, width)

        self.pages, self.fp8 = pages, fp8
        self.value_width = config.kv_lora_rank or config.dense_head_dim
        self.rope_width = config.qk_rope_head_dim
        self.pools = [pools() for _ in range(config.num_hidden_layers + mtp_layers)]
        mixtures = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
        shape = (mixtures, pages, PAGE, config.num_experts_per_tok)
        self.routes = torch.zeros(shape, dtype=torch.int16) if routes else None
        """[mixture-of-experts layers, pages, PAGE, K] int16, MTP modules' not among them; None where not recorded."""

    def nbytes(self) -> int:
        """Bytes of all pools."""
        keys_and_values = sum(t.nbytes for pair in self.pools for t in pair if t is not None)
        return keys_and_values + (0 if self.routes is None else self.routes.nbytes)

    def copy_page(self, source: int, target: int) -> None:
        """Make page `target` equal to page `source`, in all layers."""
        for pool in (pool for pair in self.pools for pool in pair if pool is not None):
            pool[target] = pool[source]
        if self.routes is not None:
            self.routes[:, target] = self.routes[:, source]

    def routes_of(self, pages: list[int], length: int) -> Tensor:
        """Routes of the first `length` tokens on `pages`: a new tensor int16 [length, mixture-of-experts layers, K]."""
        assert self.routes is not None, "made without routes"
        with torch.inference_mode(False):  # those who train on them may keep them for the backward pass
            found = self.routes[:, torch.tensor(pages)].flatten(1, 2)[:, :length]
            return found.transpose(0, 1).contiguous()


@dataclass(frozen=True)
class PagedCall:
    """Where the tokens of one call go in the pools, and what each of them sees; the same for every layer."""

    cache: PagedCache
    positions: Tensor
    """[T] int64."""
    places: Tensor
    """[T] int64: page · PAGE + offset."""
    singles: int
    """The first tokens of the call, which attend one by one."""
    tables: Tensor
    """[singles, width] int32: pages of each one's sequence."""
    visible: Tensor
    """[singles] int32: positions that each one sees, itself included."""
    stretches: list[Stretch] = field(default_factory=list)
    """What stands behind the single tokens."""

    def slots(self, time: int) -> Slots:
        """The positions in the form that the model asks caches for."""
        assert time == self.positions.shape[0], f"{time=} {self.positions.shape=}"
        return Slots(self.positions.unsqueeze(0), end=0, from_empty=False)

    def advance(self, lengths: Tensor | int) -> None:
        """Nothing: whoever owns the sequences counts their tokens."""

    def record(self, expert_ids: list[Tensor]) -> None:
        """Store the call's routes, [T, K] of every mixture-of-experts layer, if the cache keeps them."""
        if self.cache.routes is not None:
            self.cache.routes.flatten(1, 2)[:, self.places] = torch.stack(expert_ids).to(torch.int16)

    @functools.cached_property
    def layers(self) -> list["PagedLayer"]:
        """One view per layer."""
        kind = PackedLayer if self.cache.fp8 else PagedLayer
        return [kind(self, *pools) for pools in self.cache.pools]


@dataclass(frozen=True)
class PagedLayer:
    """One layer's pools during a call."""

    call: PagedCall
    keys: Tensor
    values: Tensor | None
    """None where values are the first part of the keys."""

    def write(self, *rows: Tensor) -> None:
        """Store the call's tokens: one tensor [T, G, width] per pool."""
        for pool, new in zip((self.keys, self.values), rows, strict=False):
            assert pool is not None
            if kernels.usable(new):
                kernels.write_pages(new, pool, self.call.places)
            else:
                pool[self.call.places // PAGE, :, self.call.places % PAGE] = new

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Attention of the call's single tokens: q [singles, H, Dk] -> [singles, H, Dv]."""
        values = self.keys[..., : self.call.cache.value_width] if self.values is None else self.values
        if kernels.attention_fits(q, q.shape[-1], values.shape[-1]):
            return kernels.paged_attention(q, self.keys, values, self.call.tables, self.call.visible, scale)
        return _attend(q, self.keys, values, self.call.tables, self.call.visible, scale)

    def read(self, stretch: Stretch) -> list[Tensor]:
        """All that a stretch's sequence has stored, the stretch included: [1, G, past + length + missing, width] per
        pool, the missing being zeros."""
        length = stretch.past + stretch.stop - stretch.start
        pools = [pool for pool in (self.keys, self.values) if pool is not None]
        stored = [pool[stretch.pages].transpose(0, 1).flatten(1, 2)[None, :, :length] for pool in pools]
        return [F.pad(rows, (0, 0, 0, stretch.missing)) for rows in stored]


class PackedLayer(PagedLayer):
    """One layer's pool of latents in FP8 during a call."""

    @property
    def latent(self) -> int:
        """Width of the latents."""
        return self.call.cache.value_width

    @property
    def rope(self) -> int:
        """Width of the shared key."""
        return self.call.cache.rope_width

    def write(self, *rows: Tensor) -> None:
        """Quantise and store the call's tokens: [T, 1, C + R]."""
        new = rows[0].squeeze(1)
        if latent_kernels.usable(self.keys):
            latent_kernels.write_latents(new, self.keys, self.call.places, self.latent)
        else:
            self.keys.flatten(0, 1)[self.call.places] = pack_latents(new, self.latent)

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """As `PagedLayer.attend`, over what was stored."""
        tables, visible = self.call.tables, self.call.visible
        if latent_kernels.usable(self.keys) and latent_kernels.attention_fits(self.rope):
            return latent_kernels.latent_attention(q, self.keys, tables, visible, self.latent, scale)
        pages, tables = tables.unique(return_inverse=True)
        stored = unpack_latents(self.keys[pages.long()], self.latent).unsqueeze(1)
        return _attend(q, stored, stored[..., : self.latent], tables, visible, scale)

    def read(self, stretch: Stretch) -> list[Tensor]:
        """As `PagedLayer.read`, what was stored in bfloat16: [1, 1, past + length + missing, C + R]."""
        length = stretch.past + stretch.stop - stretch.start
        if latent_kernels.usable(self.keys):
            stored = latent_kernels.read_latents(self.keys, stretch.pages, length, latent=self.latent, rope=self.rope)
        else:
            stored = unpack_latents(self.keys[stretch.pages].flatten(0, 1)[:length], self.latent)
        return [F.pad(stored, (0, 0, 0, stretch.missing))[None, None]]


def _attend(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, visible: Tensor, scale: float) -> Tensor:
    """`kernels.paged_attention` in PyTorch: pages are copied together for every token."""
    groups, share = keys.shape[1], q.shape[1] // keys.shape[1]
    k, v = (pool[tables.long()].transpose(1, 2).flatten(2, 3) for pool in (keys, values))  # [T, G, S, …]
    scores = (q.unflatten(1, (groups, share)) @ k.mT).float() * scale
    hidden = (torch.arange(k.shape[2], device=q.device) >= visible[:, None])[:, None, :, None]  # [T, 1, S, 1]
    weights = scores.masked_fill(hidden.mT, float("-inf")).softmax(dim=-1).to(q.dtype)
    # What a page held before may be no number, and 0 times that is none either.
    return (weights @ v.masked_fill(hidden, 0.0)).flatten(1, 2)
