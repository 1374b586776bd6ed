"""A packed dense decoder (Llama, Qwen) that runs all of its layers in one call.

Decoding one token of a small model is four hundred kernel calls of a few microseconds each, and as much time again for
Python between them. `DenseDecoder` hands the kernels a table of addresses instead. It calls the same functions in the
same order as the modules do, so its numbers are theirs to the bit.
"""

import torch
from torch import Tensor, nn

from fathom.kernels import ops
from fathom.kernels.panels import Packed
from fathom.model.attention import GQA
from fathom.model.cache import KVCache
from fathom.model.moe import RouterReport
from fathom.model.paged import PagedCache, PagedCall
from fathom.model.transformer import DecoderLayer, Transformer


class DenseDecoder(Transformer):
    """A packed `Transformer`; use `dense_decoder`."""

    def __init__(self, model: Transformer, layers: list[list[Tensor | None]], weights: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.__dict__ |= model.__dict__
        config = model.config
        attention = model.model.layers[0].self_attn
        self._weights = weights
        self._parts = layers
        self._tables: tuple[PagedCache, Tensor] | None = None
        self._shape = ops.DenseShape(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            groups=config.key_value_heads,
            head=config.dense_head_dim,
            inner=config.intermediate_size,
            scale=attention.scale,
            eps=config.rms_norm_eps,
        )

    def hidden_states(
        self, token_ids: Tensor, *, cache: KVCache | PagedCall | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, list[RouterReport]]:
        """As `Transformer.hidden_states`; single tokens over pages in one call, everything else by the modules."""
        if not isinstance(cache, PagedCall) or cache.stretches:
            return super().hidden_states(token_ids, cache=cache, lengths=lengths)
        cos, sin = self._rope_at(token_ids, cache.positions[None])
        x = ops.dense_layers(
            self.embed(token_ids)[0], self._addresses(cache.cache), self._weights, self._shape, (cos[0], sin[0]),
            cache.places, cache.tables, cache.visible,
        )  # fmt: skip
        return self.model.norm(x[None]), []

    def _addresses(self, cache: PagedCache) -> Tensor:
        """int64 [L, 16] for this cache."""
        if self._tables is None or self._tables[0] is not cache:
            rows = [
                [0 if part is None else part.data_ptr() for part in (*parts[:6], *pools, *parts[6:])]
                for parts, pools in zip(self._parts, cache.pools, strict=False)
            ]
            self._tables = (cache, torch.tensor(rows, dtype=torch.int64))
        return self._tables[1]


def dense_decoder(model: Transformer) -> Transformer:
    """The packed `model` as a `DenseDecoder` where all of its layers allow it, else itself."""
    parts = [_parts(layer) for layer in model.model.layers]
    kinds = {kind for found in parts if found is not None for kind in found[1]}
    width = model.config.dense_head_dim
    if any(found is None for found in parts) or len(kinds) != 1 or width % 32:
        return model
    return DenseDecoder(model, [found[0] for found in parts if found is not None], kinds.pop())


def _parts(layer: DecoderLayer) -> tuple[list[Tensor | None], set[torch.dtype]] | None:
    """What `DenseLayer` in `layers.h` points at, without the pools, and the dtypes of its panels."""
    attention, mlp = layer.self_attn, layer.mlp
    projection, gate_up = getattr(attention, "projection", None), getattr(mlp, "gate_up", None)
    output = getattr(attention.o_proj, "weight", None)
    if not isinstance(attention, GQA) or projection is None or gate_up is None or not isinstance(output, Packed):
        return None
    if hasattr(mlp, "experts"):
        return None
    norms = [None if norm is None else norm.weight for norm in (attention.q_norm, attention.k_norm)]
    weight = projection.weight
    parts = [
        layer.input_layernorm.weight, weight.panels, weight.scales, projection.bias, *norms,
        output.panels, output.scales, attention.o_proj.bias, layer.post_attention_layernorm.weight,
        gate_up.panels, gate_up.scales, mlp.down.panels, mlp.down.scales,
    ]  # fmt: skip
    return parts, {packed.panels.dtype for packed in (weight, output, gate_up, mlp.down)}
