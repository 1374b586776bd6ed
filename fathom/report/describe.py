"""What a model is, in a table's worth of lines, from its config alone."""

from fathom.config import ModelConfig
from fathom.data.tokenizer import Tokenizer
from fathom.model.accounting import (
    count_parameters,
    decode_flops_per_token,
    flops_per_token,
    fp8_kv_bytes_per_token,
    kv_bytes_per_token,
)
from fathom.precision.tiles import TILE
from fathom.report.tables import count, plural, quantity


def describe(config: ModelConfig, tokenizer: Tokenizer | None) -> list[tuple[str, str]]:
    """Rows for `print_rows`: architecture, parameters, arithmetic, memory per token, tokenizer."""
    parameters = count_parameters(config)
    rows = [
        ("architecture", f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}"),
        ("attention", _attention(config)),
        ("feed-forward", _feed_forward(config)),
        (
            "parameters",
            f"{parameters.total:,} ({count(parameters.total)}), {count(parameters.active)} active per token",
        ),
    ]
    if config.num_nextn_predict_layers:
        modules = plural(config.num_nextn_predict_layers, "MTP module")
        rows.append(("multi-token", f"{modules}, {parameters.mtp:,} parameters"))
    context = config.max_position_embeddings
    length = min(4096, context)
    rows += [
        ("context", f"{context:,} tokens"),
        ("cache", f"{kv_bytes_per_token(config):,} bytes per token in bfloat16{_in_fp8(config)}"),
        ("arithmetic", f"{quantity(flops_per_token(config, length), 'FLOP')} to train on a token of a sequence of "
                       f"{length:,}, {quantity(decode_flops_per_token(config, length), 'FLOP')} to write one behind "
                       f"{length:,}"),
        ("tokenizer", "none in the folder" if tokenizer is None else f"{tokenizer.vocab_size:,} tokens"),
    ]  # fmt: skip
    return rows


def _in_fp8(config: ModelConfig) -> str:
    if config.kv_lora_rank is None or config.kv_lora_rank % TILE:
        return ""
    return f", {fp8_kv_bytes_per_token(config):,} in FP8"


def _attention(config: ModelConfig) -> str:
    heads = config.num_attention_heads
    if config.is_mla:
        return f"latent (MLA), {heads} heads, latent {config.kv_lora_rank} + rotary {config.qk_rope_head_dim}"
    return f"grouped-query, {heads} heads over {config.key_value_heads} key/value heads of {config.dense_head_dim}"


def _feed_forward(config: ModelConfig) -> str:
    if config.n_routed_experts is None:
        return f"dense, width {config.intermediate_size}"
    return (
        f"{config.n_routed_experts} experts of width {config.moe_intermediate_size}, {config.num_experts_per_tok} per "
        f"token + {config.n_shared_experts} shared; first {plural(config.first_k_dense_replace, 'layer')} dense"
    )
