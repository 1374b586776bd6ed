"""The decoder: embedding, pre-norm blocks, head, and multi-token-prediction modules behind them.

Parameter names are the published ones, so that a checkpoint and a state dict speak the same language; the
two exceptions (stacked experts, MTP modules under `mtp`) are undone in `naming.py`.

Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

import functools
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.compiler.config
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.config.model import ModelConfig
from fathom.model.attention import GQA, MLA, Rope
from fathom.model.cache import KVCache, LayerCache, Slots
from fathom.model.forest import Forest
from fathom.model.layers import Embedding, FeedForward, Linear, RMSNorm
from fathom.model.moe import MoE, Router, RouterReport
from fathom.model.mtp import MTPModule
from fathom.model.paged import PagedCall, PagedLayer
from fathom.model.rope import rope_frequencies, rope_tables


class DecoderLayer(nn.Module):
    """x + attention(norm x), then + feed-forward(norm x): dense or a mixture of experts."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config) if config.is_mla else GQA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.is_moe_layer(index):
            self.mlp: MoE | FeedForward = MoE(config)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        slots: Slots | None = None,
        cache: LayerCache | PagedLayer | None = None,
        forest: Forest | None = None,
        expert_ids: Tensor | None = None,
    ) -> tuple[Tensor, RouterReport | None]:
        """x [B, T, D] -> (the same shape, the router's report or None for a dense layer).

        `expert_ids` [B·T, K] int64 replaces the choice of a mixture's router.
        """
        x = x + self.self_attn(self.input_layernorm(x), rope, slots, cache, forest=forest)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            y, report = self.mlp(normed, expert_ids)
            return x + y, report
        return x + self.mlp(normed), None


class Decoder(nn.Module):
    """Embedding, layers and final norm: what published names call `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A causal language model described by a `ModelConfig`. Weights are uninitialised until drawn or loaded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        last = config.num_hidden_layers
        self.mtp = nn.ModuleList(
            MTPModule(config, DecoderLayer(config, last + k)) for k in range(config.num_nextn_predict_layers)
        )
        self.compute_dtype: torch.dtype | None = None
        """Dtype of the activations; None follows the weights."""
        self.keeping: Callable[[], AbstractContextManager[object]] = nullcontext
        """Makes what surrounds the decoder layers of a cache-free pass: `Recompute`, where less is to be kept."""
        self._rope = rope_frequencies(config)
        self._run_layer: Callable[..., tuple[Tensor, RouterReport | None]] = DecoderLayer.__call__

    def forward(self, token_ids: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """token_ids [B, T] int64 -> logits [B, T, V] float32."""
        hidden, _ = self.hidden_states(token_ids, cache=cache)
        return self.logits(hidden)

    def hidden_states(
        self,
        token_ids: Tensor,
        *,
        cache: KVCache | PagedCall | None = None,
        lengths: Tensor | None = None,
        routes: Tensor | None = None,
    ) -> tuple[Tensor, list[RouterReport]]:
        """What the head sees, [B, T, D], and one report per mixture-of-experts layer.

        With a cache the tokens continue what it holds; `lengths` [B] says how many of the T tokens of each row are
        real (the rest is padding on the right), None means all. `routes` [mixture-of-experts layers, B·T, K] int64
        replaces what each layer's router would choose for each token (see `fathom.model.moe`).
        """
        x = self.embed(token_ids)
        slots = None if cache is None else cache.slots(token_ids.shape[1])
        rope = self._rope_at(token_ids, None if slots is None else slots.positions)
        chosen = {} if routes is None else self._by_layer(routes)
        reports = []
        with self.keeping():
            for index, layer in enumerate(self.model.layers):
                if cache is None:
                    x, report = self._run_layer(layer, x, rope, expert_ids=chosen.get(index))
                else:
                    x, report = layer(x, rope, slots, cache.layers[index], expert_ids=chosen.get(index))
                if report is not None:
                    reports.append(report)
        if cache is not None:
            cache.advance(token_ids.shape[1] if lengths is None else lengths)
        return self.model.norm(x), reports

    def forest_states(self, forest: Forest, *, routes: Tensor | None = None) -> tuple[Tensor, list[RouterReport]]:
        """What the head sees of every row of `forest`, [S, D], and one report per mixture-of-experts layer.

        `routes` [mixture-of-experts layers, S, K] as in `hidden_states`.
        """
        x = self.embed(forest.token_ids[None])
        rope = self._rope_at(forest.token_ids[None], forest.positions[None])
        chosen = {} if routes is None else self._by_layer(routes)
        reports = []
        for index, layer in enumerate(self.model.layers):
            x, report = layer(x, rope, forest=forest, expert_ids=chosen.get(index))
            if report is not None:
                reports.append(report)
        return self.model.norm(x)[0], reports

    def mtp_hidden_states(
        self, depth: int, hidden: Tensor, token_ids: Tensor, *, cache: PagedCall | None = None
    ) -> tuple[Tensor, RouterReport | None]:
        """Hidden states of MTP module `depth` (0 predicts the token after next), [B, T, D].

        `hidden` [B, T, D] is what the previous depth (or `hidden_states`) returned, `token_ids` [B, T] the token that
        follows what that depth had read: t[i + depth + 1] at position i. With a cache, positions are those of its call.
        """
        module: MTPModule = self.mtp[depth]
        x = module.join(self.embed(token_ids), hidden)
        if cache is None:
            with self.keeping():
                x, report = self._run_layer(module.block, x, self._rope_at(token_ids, None))
        else:
            slots = cache.slots(token_ids.shape[1])
            layer = cache.layers[self.config.num_hidden_layers + depth]
            x, report = module.block(x, self._rope_at(token_ids, slots.positions), slots, layer)
        return module.norm(x), report

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [B, T] -> embeddings [B, T, D] in the dtype of the activations."""
        weight = self.model.embed_tokens.weight
        return F.embedding(token_ids, weight).to(self.compute_dtype or weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> [..., V] float32, by the head that all depths share."""
        return self.lm_head(hidden).float()

    def compile_blocks(self) -> None:
        """Compile the decoder layer's cache-free forward: once per kind of layer, not once per layer."""
        # What is compiled is kept on disk under a key that knows operators by name alone: a graph that calls one of
        # ours as it used to be would be taken for one of today.
        torch.compiler.config.cache_key_tag = f"fathom {_digest_of_operators()}"
        self._run_layer = torch.compile(DecoderLayer.forward, dynamic=False)

    @property
    def routers(self) -> list[Router]:
        """Routers in the order of the reports: layers first, then MTP modules."""
        blocks = [*self.model.layers, *(m.block for m in self.mtp)]
        return [b.mlp.gate for b in blocks if isinstance(b.mlp, MoE)]

    def update_router_bias(self, load: Tensor, rate: float) -> None:
        """Move every router's bias by `rate` against its load [routers, E] of the whole batch."""
        for router, counts in zip(self.routers, load, strict=True):
            if router.method == "noaux_tc":
                router.update_bias(counts, rate)

    def without_mtp(self) -> "Transformer":
        """The same model, sharing its weights, without the multi-token-prediction modules."""
        with torch.device("meta"):
            bare = Transformer(self.config.replace(num_nextn_predict_layers=0))
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("mtp.")}
        bare.load_state_dict(state, assign=True)
        bare.compute_dtype = self.compute_dtype
        return bare

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw matrices and embeddings from N(0, initializer_range²); norms become 1, biases 0 (V3 §4.2)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    def _by_layer(self, routes: Tensor) -> dict[int, Tensor]:
        """`routes` [mixtures, N, K] by the index of their layer."""
        mixtures = [index for index, layer in enumerate(self.model.layers) if isinstance(layer.mlp, MoE)]
        assert len(routes) == len(mixtures), f"{routes.shape=} {mixtures=}"
        return dict(zip(mixtures, routes, strict=True))

    def _rope_at(self, token_ids: Tensor, positions: Tensor | None) -> Rope:
        if positions is None:
            positions = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
        frequencies, factor = self._rope
        return rope_tables(positions, frequencies.to(positions.device), factor)


@functools.cache
def _digest_of_operators() -> str:
    """Changes with the source of what compiled graphs may call."""
    package = Path(__file__).parents[1]
    files = [file for room in ("model", "kernels") for file in sorted((package / room).glob("*.py"))]
    return hashlib.sha256(b"\n".join(file.read_bytes() for file in files)).hexdigest()[:16]
