"""Parameters, arithmetic and memory of a model, from its config alone.

The trainer's utilisation, the planner and the README ask here, so that a figure has one source. The counts are
checked against real models on the meta device and against the published sizes of DeepSeek-V3 in the tests.
"""

from dataclasses import dataclass

from fathom.config.model import ModelConfig
from fathom.config.recipe import Precision
from fathom.model.latents import packed_bytes
from fathom.precision.tiles import TILE


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, router biases included."""

    total: int
    """The main model: embedding, layers, final norm, head."""
    active: int
    """Those one token meets, embedding and head tables counted whole."""
    embedding: int
    """The input table."""
    head: int
    """The output table; 0 when it is the input table."""
    mtp: int
    """Multi-token-prediction modules, without the tables they share."""
    mtp_active: int
    """Those of the modules that one token meets."""

    @property
    def active_without_tables(self) -> int:
        """Active parameters without embedding and head."""
        return self.active - self.embedding - self.head


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters by kind."""
    table = config.vocab_size * config.hidden_size
    head = 0 if config.tie_word_embeddings else table
    layers = range(config.num_hidden_layers)
    modules = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    around = table + head + config.hidden_size
    module_extra = 2 * config.hidden_size**2 + 3 * config.hidden_size  # eh_proj; enorm, hnorm, norm
    return Parameters(
        total=around + sum(_layer(config, i, active=False) for i in layers),
        active=around + sum(_layer(config, i, active=True) for i in layers),
        embedding=table,
        head=head,
        mtp=sum(module_extra + _layer(config, i, active=False) for i in modules),
        mtp_active=sum(module_extra + _layer(config, i, active=True) for i in modules),
    )


def flops_per_token(config: ModelConfig, sequence_length: int, *, mtp: bool = True) -> float:
    """FLOPs to train on one token, forward and backward: 6 per active parameter, and causal attention.

    The input table is looked up, not multiplied; positions attend to half the sequence on average. `mtp` counts the
    multi-token-prediction modules, each with its own pass through the head. (The convention of DeepSeek's ISCA 2025
    paper, table 2, which leaves MTP out: 250 GFLOP for V3 at 4096.)
    """
    parameters = count_parameters(config)
    tables = config.vocab_size * config.hidden_size
    multiplied = parameters.active_without_tables + tables
    depth = config.num_hidden_layers
    if mtp:
        multiplied += parameters.mtp_active + config.num_nextn_predict_layers * tables
        depth += config.num_nextn_predict_layers
    return 6.0 * multiplied + 3.0 * depth * _attention_flops(config, sequence_length / 2)


def decode_flops_per_token(config: ModelConfig, context: int) -> float:
    """FLOPs to produce one token behind `context` remembered ones, forward only, without MTP.

    MLA decodes in the absorbed form (V2 App. C): per head and position, a score over latent and shared key and a mix of
    the latents. What it multiplies by W^UK and W^UV once per token is 2 per parameter, and counted with them.
    """
    parameters = count_parameters(config)
    multiplied = parameters.active_without_tables + config.vocab_size * config.hidden_size
    if config.kv_lora_rank is not None:
        per_position = 2.0 * config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
        attention = per_position * context
    else:
        attention = _attention_flops(config, context)
    return 2.0 * multiplied + config.num_hidden_layers * attention


def kv_elements_per_token(config: ModelConfig) -> int:
    """Numbers remembered per token: latent and shared key in MLA, keys and values in GQA; all layers, no MTP."""
    if config.kv_lora_rank is not None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        width = 2 * config.key_value_heads * config.dense_head_dim
    return config.num_hidden_layers * width


def kv_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes remembered per token (bfloat16 unless said)."""
    return kv_elements_per_token(config) * bytes_per_element


def fp8_kv_bytes_per_token(config: ModelConfig) -> int:
    """Bytes remembered per token where latents are kept in FP8; MLA with latents in multiples of 128 alone."""
    assert config.kv_lora_rank is not None, "latent attention alone"
    return config.num_hidden_layers * packed_bytes(config.kv_lora_rank, config.qk_rope_head_dim)


def activation_bytes(
    config: ModelConfig, index: int, *, tokens: int, sequences: int, precision: Precision, recompute: bool
) -> int:
    """Bytes that decoder layer `index` keeps for the backward pass of so many tokens in so many sequences.

    Of the layers as they are written, without compilation, on a CPU with kernels; weights in another dtype, which are
    kept too, are not activations and not counted. `precision` is `fp32`, `bf16` or `fp8`, `recompute` as in the recipe.
    """
    kept = _Kept(config, 4 if precision == "fp32" else 2, precision == "fp8", recompute)
    per_token, per_sequence = kept.attention(), 0
    if config.is_moe_layer(index):
        assert config.n_routed_experts is not None
        per_token += kept.mixture()
        per_sequence = 4 * config.n_routed_experts
    else:
        per_token += kept.feed_forward(config.intermediate_size)
    return tokens * per_token + sequences * per_sequence


@dataclass(frozen=True)
class _Kept:
    """Bytes per token of the parts of a layer, each with the norm before it and the residual stream that enters it."""

    config: ModelConfig
    number: int
    """Bytes of a number between layers."""
    fp8: bool
    recompute: bool

    def attention(self) -> int:
        c, heads = self.config, self.config.num_attention_heads
        total = self._stream_and_norm()
        if c.kv_lora_rank is None:
            width, groups = c.dense_head_dim, c.key_value_heads
            total += self.number * (heads + 2 * groups) * width
            if c.model_type == "qwen3":  # before the norms of heads
                total += self.number * (heads + groups) * width
            value = width
        else:
            value = c.v_head_dim
            total += self.number * ((c.q_lora_rank or 0) + c.kv_lora_rank + c.qk_rope_head_dim)
            if not self.recompute:
                latents = (c.q_lora_rank, c.kv_lora_rank)
                total += sum(self._input(width) for width in latents if width is not None)
                total += self.number * heads * (2 * c.qk_head_dim + c.qk_nope_head_dim + value)
        if self.number == 2:
            total += 4 * heads  # logarithms of softmax's sums
        width = heads * value
        return total + (width + -(-width // 2) + 4 * -(-width // TILE) if self.fp8 else self.number * width)

    def feed_forward(self, inner: int) -> int:
        return self._stream_and_norm() + self._gated(inner)

    def mixture(self) -> int:
        c = self.config
        assert c.n_routed_experts is not None
        chosen, inner = c.num_experts_per_tok, c.moe_intermediate_size
        total = self._stream_and_norm()
        if self.fp8 and not self.recompute:
            total += self.number * c.hidden_size  # the router's input is not rounded
        total += 4 * c.n_routed_experts + 4  # scores, and what turns them into shares
        total += 8 * chosen + (4 + 4 * chosen if c.norm_topk_prob else 0)  # the choice, its weights
        total += chosen * (self._tiles(2 * inner) if self.fp8 else self.number * 2 * inner)
        total += chosen * (4 + 4 + 8)  # weight and token of a row, and where a choice's row is
        return total + (self._gated(inner * c.n_shared_experts) if c.n_shared_experts else 0)

    def _stream_and_norm(self) -> int:
        width = self.config.hidden_size
        return self.number * width + (0 if self.recompute else self._input(width))

    def _gated(self, inner: int) -> int:
        """SwiGLU's inputs, and in FP8 not its result."""
        return 2 * self._tiles(inner) if self.fp8 else 3 * self.number * inner

    def _input(self, width: int) -> int:
        """A linear layer's input."""
        return self._tiles(width) if self.fp8 else self.number * width

    def _tiles(self, width: int) -> int:
        return width + 4 * -(-width // TILE)


def _layer(config: ModelConfig, index: int, *, active: bool) -> int:
    norms = 2 * config.hidden_size
    return norms + _attention(config) + _feed_forward(config, index, active=active)


def _attention(config: ModelConfig) -> int:
    width, heads = config.hidden_size, config.num_attention_heads
    if config.kv_lora_rank is None:
        q, kv = heads * config.dense_head_dim, config.key_value_heads * config.dense_head_dim
        matrices = width * (q + 2 * kv) + q * width
        biases = (q + 2 * kv) * config.qkv_bias + width * config.output_bias
        norms = 2 * config.dense_head_dim if config.model_type == "qwen3" else 0
        return matrices + biases + norms
    latent, rope, rank = config.kv_lora_rank, config.qk_rope_head_dim, config.q_lora_rank
    query = heads * config.qk_head_dim
    queries = width * query if rank is None else width * rank + rank + rank * query
    keys_values = width * (latent + rope) + latent + latent * heads * (config.qk_nope_head_dim + config.v_head_dim)
    output = heads * config.v_head_dim * width
    biases = (0 if rank is None else rank) + latent + rope + width if config.attention_bias else 0
    return queries + keys_values + output + biases


def _feed_forward(config: ModelConfig, index: int, *, active: bool) -> int:
    width = config.hidden_size
    if not config.is_moe_layer(index):
        biases = 2 * config.intermediate_size + width if config.mlp_bias else 0
        return 3 * width * config.intermediate_size + biases
    assert config.n_routed_experts is not None
    expert = 3 * width * config.moe_intermediate_size
    routed = config.num_experts_per_tok if active else config.n_routed_experts
    bias = config.n_routed_experts if config.topk_method == "noaux_tc" else 0
    router = config.n_routed_experts * width + bias
    return (routed + config.n_shared_experts) * expert + router


def _attention_flops(config: ModelConfig, context: float) -> float:
    """Forward FLOPs of q·k and p·v for one token and layer over `context` positions, in the expanded form."""
    value = config.v_head_dim if config.is_mla else config.dense_head_dim
    return 2.0 * config.num_attention_heads * (config.qk_head_dim + value) * context
