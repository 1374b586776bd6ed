"""Attention: Multi-head Latent Attention and grouped-query attention.

**MLA** (DeepSeek-V2 §2.1, V3 §2.1.1) projects a token to a small latent c = norm(W^DKV h) and to one rotated
key k_r that all heads share; per-head keys and values are linear maps of c. Only (c, k_r) is remembered. Two
forms give the same numbers:

* *expanded*: keys and values are computed from the latents, k = [W^UK c ; k_r], v = W^UV c, and attention is
  ordinary. The work per token is small, so training and prefill use it.
* *absorbed*: q·W^UK c = (W^UKᵀ q)·c, so W^UK moves into the query and W^UV behind the sum over positions:
  attention runs on the latents themselves, as one key/value head of width kv_lora_rank + rope. Nothing is
  expanded per remembered token, so decoding uses it (V2 App. C).

**GQA** (arXiv 2305.13245) shares each key/value head among a group of query heads; Llama, Qwen2 (biases) and
Qwen3 (RMSNorm on each query and key head) differ only in options.

Shapes: B batch, T new tokens, S remembered tokens (T included), H query heads, G key/value heads,
N nope width, R rotary width, V value width, C latent width.
"""

import torch
from torch import Tensor, nn

from fathom.config.model import ModelConfig
from fathom.model.attention_core import causal_attention
from fathom.model.cache import LayerCache, Slots
from fathom.model.forest import Forest
from fathom.model.layers import Linear, RMSNorm
from fathom.model.paged import PagedLayer
from fathom.model.rope import rotate, rotate_heads
from fathom.precision import recompute

Rope = tuple[Tensor, Tensor]
"""cos and sin, each [B or 1, T, rotary_dim / 2]."""

LATENT_NORM_EPS = 1e-6
"""The latents' own norms keep this value whatever rms_norm_eps says (DeepSeek's published modelling code)."""


class MLA(nn.Module):
    """Multi-head Latent Attention, expanded and absorbed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        self.heads, self.latent_width = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.interleaved, self.scale = config.rope_interleave, config.softmax_scale
        width, query_width = config.hidden_size, self.heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, query_width, bias=False)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = Linear(width, self.latent_width + self.rope, bias=config.attention_bias)
        self.kv_a_layernorm = RMSNorm(self.latent_width, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.latent_width, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = Linear(self.heads * self.value, width, bias=config.attention_bias)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        slots: Slots | None = None,
        cache: LayerCache | PagedLayer | None = None,
        absorbed: bool | None = None,
        forest: Forest | None = None,
    ) -> Tensor:
        """x [B, T, hidden] -> the same shape.

        Without a cache, or into an empty one, the T tokens attend causally among themselves, expanded. With one they
        are stored in `slots` and attend to all that is stored at or before their own; `absorbed` chooses the form,
        None takes the absorbed one for a single new token behind others, where it costs least. With pages, tokens of
        several sequences stand in one row (B = 1), and so do those of a forest, which attend as it says.
        """
        if isinstance(cache, PagedLayer):
            return self._paged(x.squeeze(0), rope, cache).unsqueeze(0)
        if cache is None:
            return self._output(self._uncached(x, rope, forest))
        assert slots is not None
        q_nope, q_rope = self._queries(self._query_input(x), rope)
        latent, k_rope = self._latents(self.kv_a_proj_with_mqa(x), rope)
        latent, k_rope = (t.to(x.dtype) for t in cache.write(slots, latent, k_rope))
        if slots.from_empty and not absorbed:
            return self._output(self._causal(q_nope, q_rope, latent, k_rope))
        visible = _visible(slots)
        absorb = x.shape[1] == 1 if absorbed is None else absorbed
        attend = self._absorbed if absorb else self._expanded
        return self._output(attend(q_nope, q_rope, latent, k_rope, visible))

    def _uncached(self, x: Tensor, rope: Rope, forest: Forest | None) -> Tensor:
        """-> heads [B, H, T, V]. Queries, keys and values can be made again from what is small (V3 §3.2.3)."""
        query_input, compressed = self._query_input(x), self.kv_a_proj_with_mqa(x)
        q = self._joined_queries(query_input, *rope)
        recompute.made(q, self._joined_queries, query_input, *rope)
        k, v = self._joined_keys(compressed, *rope)
        recompute.made((k, v), self._joined_keys, compressed, *rope)
        return (causal_attention if forest is None else forest.attend)(q, k, v, self.scale)

    def _joined_queries(self, query_input: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """-> [B, H, T, N + R]."""
        return torch.cat(self._queries(query_input, (cos, sin)), dim=-1)

    def _joined_keys(self, compressed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """-> k [B, H, T, N + R], v [B, H, T, V]."""
        return self._keys_and_values(*self._latents(compressed, (cos, sin)))

    def _queries(self, query_input: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """-> q_nope [B, H, T, N], q_rope [B, H, T, R]."""
        q_nope, q_rope = self._project_queries(query_input).transpose(1, 2).split((self.nope, self.rope), dim=-1)
        cos, sin = (t.unsqueeze(1) for t in rope)
        return q_nope, rotate(q_rope, cos, sin, interleaved=self.interleaved)

    def _query_input(self, x: Tensor) -> Tensor:
        """What queries are projected from: their latent before its norm, or `x` where there is none."""
        return x if hasattr(self, "q_proj") else self.q_a_proj(x)

    def _project_queries(self, query_input: Tensor) -> Tensor:
        """-> [..., H, N + R]."""
        if hasattr(self, "q_proj"):
            q = self.q_proj(query_input)
        else:
            q = self.q_b_proj(self.q_a_layernorm(query_input))
        return q.unflatten(-1, (self.heads, self.nope + self.rope))

    def _latents(self, compressed: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """compressed [B, T, C + R] -> latent [B, T, C], normalised; shared key [B, T, R], rotated."""
        latent, k_rope = compressed.split((self.latent_width, self.rope), dim=-1)
        return self.kv_a_layernorm(latent), rotate(k_rope, *rope, interleaved=self.interleaved)

    def _expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """latent [B, S, C] -> k_nope [B, H, S, N], v [B, H, S, V]."""
        kv = self.kv_b_proj(latent).unflatten(-1, (self.heads, self.nope + self.value)).transpose(1, 2)
        k_nope, v = kv.split((self.nope, self.value), dim=-1)
        return k_nope, v

    def _keys_and_values(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """-> k [B, H, S, N + R], v [B, H, S, V]."""
        k_nope, v = self._expand(latent)
        k_shared = k_rope.unsqueeze(1).expand(-1, self.heads, -1, -1)
        return torch.cat((k_nope, k_shared), dim=-1), v

    def _causal(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        q = torch.cat((q_nope, q_rope), dim=-1)
        return causal_attention(q, *self._keys_and_values(latent, k_rope), self.scale)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, visible: Tensor) -> Tensor:
        k_nope, v = self._expand(latent)
        scores = q_nope @ k_nope.mT + q_rope @ k_rope.unsqueeze(1).mT
        return _softmax(scores * self.scale, visible) @ v

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, visible: Tensor) -> Tensor:
        up_key, up_value = (weight.to(latent.dtype) for weight in self.up_projections())
        queries = q_nope @ up_key  # [B, H, T, C]
        scores = queries @ latent.unsqueeze(1).mT + q_rope @ k_rope.unsqueeze(1).mT
        mixed = _softmax(scores * self.scale, visible) @ latent.unsqueeze(1)  # [B, H, T, C]
        return mixed @ up_value.mT

    def _paged(self, x: Tensor, rope: Rope, cache: PagedLayer) -> Tensor:
        """x [T, hidden] -> the same shape: single tokens absorbed, stretches of a prompt expanded."""
        cos, sin = (t.squeeze(0) for t in rope)
        queries = self._project_queries(self._query_input(x))
        q_nope, q_rope = queries.split((self.nope, self.rope), dim=-1)  # [T, H, …]
        q_rope = rotate_heads(q_rope, cos, sin, interleaved=self.interleaved)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent_width, self.rope), dim=-1)
        k_rope = rotate_heads(k_rope.unsqueeze(1), cos, sin, interleaved=self.interleaved)
        cache.write(torch.cat((self.kv_a_layernorm(latent).unsqueeze(1), k_rope), dim=-1))
        heads = x.new_empty(x.shape[0], self.heads, self.value)
        if singles := cache.call.singles:
            queries = torch.cat((self.absorb_queries(q_nope[:singles]), q_rope[:singles]), dim=-1)
            heads[:singles] = self.expand_values(cache.attend(queries, self.scale))
        for stretch in cache.call.stretches:
            latent, k_rope = cache.read(stretch)[0].squeeze(1).split((self.latent_width, self.rope), dim=-1)
            q = (stretch.queries(part) for part in (q_nope, q_rope))
            stretch.put(self._causal(*q, latent, k_rope), heads)
        return self.o_proj(heads.flatten(1))

    def absorb_queries(self, q_nope: Tensor) -> Tensor:
        """q [T, H, N] -> W^UKᵀ q [T, H, C], what meets the latents themselves."""
        return torch.einsum("thn,hnc->thc", q_nope, self.up_projections()[0].to(q_nope.dtype))

    def expand_values(self, mixed: Tensor) -> Tensor:
        """Mixed latents [T, H, C] -> values W^UV c [T, H, V]."""
        return torch.einsum("thc,hvc->thv", mixed, self.up_projections()[1].to(mixed.dtype))

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """W^UK [H, N, C] and W^UV [H, V, C], views of `kv_b_proj`."""
        weight = self.kv_b_proj.weight.unflatten(0, (self.heads, self.nope + self.value))
        return weight.split((self.nope, self.value), dim=1)

    def _output(self, heads: Tensor) -> Tensor:
        return self.o_proj(heads.transpose(1, 2).flatten(2))


class GQA(nn.Module):
    """Grouped-query attention of Llama, Qwen2 and Qwen3."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.key_value_heads
        self.head_dim, self.scale = config.dense_head_dim, config.softmax_scale
        width, bias = config.hidden_size, config.qkv_bias
        self.q_proj = Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = Linear(width, self.groups * self.head_dim, bias=bias)
        self.v_proj = Linear(width, self.groups * self.head_dim, bias=bias)
        self.o_proj = Linear(self.heads * self.head_dim, width, bias=config.output_bias)
        has_head_norms = config.model_type == "qwen3"
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if has_head_norms else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if has_head_norms else None

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        slots: Slots | None = None,
        cache: LayerCache | PagedLayer | None = None,
        forest: Forest | None = None,
    ) -> Tensor:
        """x [B, T, hidden] -> the same shape; cache, slots and forest as in `MLA.forward`."""
        if isinstance(cache, PagedLayer):
            return self._paged(x.squeeze(0), rope, cache).unsqueeze(0)
        q, k = (
            self._rotated(self.q_proj(x), self.q_norm, rope),
            self._rotated(self.k_proj(x), self.k_norm, rope),
        )
        v = self.v_proj(x).unflatten(-1, (self.groups, self.head_dim))
        if cache is not None:
            assert slots is not None
            k, v = (t.to(x.dtype) for t in cache.write(slots, k, v))
        if slots is None or slots.from_empty:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            heads = (causal_attention if forest is None else forest.attend)(q, k, v, self.scale)
        else:
            heads = self._cached(q, k, v, _visible(slots))
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def _paged(self, x: Tensor, rope: Rope, cache: PagedLayer) -> Tensor:
        """x [T, hidden] -> the same shape."""
        cos, sin = (t.squeeze(0) for t in rope)

        q, k, v = self.project(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate_heads(heads, cos, sin, interleaved=False) for heads in (q, k))
        cache.write(k, v)
        heads = torch.empty_like(q)
        if singles := cache.call.singles:
            heads[:singles] = cache.attend(q[:singles], self.scale)
        for stretch in cache.call.stretches:
            stretch.put(causal_attention(stretch.queries(q), *cache.read(stretch), self.scale), heads)
        return self.o_proj(heads.flatten(1))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden] -> q [T, H, D], k and v [T, G, D], neither normalised nor rotated."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def _rotated(self, projected: Tensor, norm: RMSNorm | None, rope: Rope) -> Tensor:
        """[B, T, heads · D] -> [B, T, heads, D], normalised where the family does, and rotated."""
        heads = projected.unflatten(-1, (-1, self.head_dim))
        cos, sin = (t.unsqueeze(2) for t in rope)
        return rotate(heads if norm is None else norm(heads), cos, sin, interleaved=False)

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """q [B, T, H, D], k and v [B, S, G, D], visible [B, 1, T, S] -> [B, H, T, D]."""
        batch, time = q.shape[:2]
        share = self.heads // self.groups
        # A group's query heads attend to the same keys: fold them into one longer query.
        q = q.unflatten(2, (self.groups, share)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, share·T, D]
        scores = (q @ k.permute(0, 2, 3, 1)) * self.scale
        weights = _softmax(scores.unflatten(2, (share, time)), visible.unsqueeze(2)).flatten(2, 3)
        return (weights @ v.transpose(1, 2)).unflatten(2, (share, time)).reshape(batch, self.heads, time, -1)


def _visible(slots: Slots) -> Tensor:
    """Mask [B, 1, T, S]: what is stored at or before a token's own position."""
    stored = torch.arange(slots.end, device=slots.positions.device)
    return (stored <= slots.positions[..., None]).unsqueeze(1)


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over visible positions with float32 statistics, returned in the dtype of `scores`."""
    return scores.float().masked_fill(~visible, float("-inf")).softmax(dim=-1).to(scores.dtype)
