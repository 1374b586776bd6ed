"""`config.json` in and out: every spelling that is in use on the one side, V3's original keys on the other.

Reading accepts both forms of rotary settings that `transformers` has written (`rope_scaling` beside
`rope_theta`; `rope_parameters` around both), `type` and `rope_type`, and the defaults that a family's
published files leave out. Writing gives the keys that other engines look for, `topk_method` and
`scoring_func` among them, which `transformers` itself drops.
"""

import json
from pathlib import Path
from typing import Any, get_args

from fathom.config.model import DEEPSEEK_TYPES, ModelConfig, ModelType
from fathom.errors import UserError, nearest

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What a family means by a key that its file leaves out (its published configuration class).
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
}
FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
"""`quantization_config` of a folder in DeepSeek's FP8 format: the one quantisation that is read or written."""
_ROPE_KEYS = set(ModelConfig.model_fields["rope_scaling"].annotation.__args__[0].model_fields)


def read_config(path: Path) -> ModelConfig:
    """The `config.json` in a model folder, or a JSON file itself. Raises `UserError`."""
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no config.json there; is this a model folder?") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return from_hf(values, where=str(file))


def from_hf(values: dict[str, Any], *, where: str) -> ModelConfig:
    """A `ModelConfig` from the dictionary of a `config.json`. Keys of no consequence are passed over."""
    model_type = values.get("model_type")
    supported = get_args(ModelType)
    if model_type not in supported:
        hint = nearest(str(model_type), supported)
        raise UserError(f"{where}: unsupported model_type {model_type!r}{hint}; supported: {', '.join(supported)}")
    _refuse_what_would_be_ignored(values, where)
    known = {k: v for k, v in values.items() if k in ModelConfig.model_fields and v is not None}
    known.pop("rope_scaling", None)
    known |= _rotary(values, where)
    known.setdefault("initializer_range", 0.02)
    if model_type in DEEPSEEK_TYPES:
        known.pop("num_key_value_heads", None)
        known.pop("head_dim", None)
    else:
        dense_only = {"num_nextn_predict_layers", "q_lora_rank", "kv_lora_rank", "n_routed_experts"}
        known = {k: v for k, v in known.items() if k not in dense_only}
    return ModelConfig.parse(_FAMILY_DEFAULTS[model_type] | known, where=where)


def to_hf(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """The dictionary to write as `config.json`, in V3's original keys and order of meaning.

    `dtype` is `float32`, `bfloat16`, or `fp8` for projections in FP8 blocks and bfloat16 around them.
    """
    values = config.model_dump(exclude={"rope_scaling"})
    deepseek = config.model_type in DEEPSEEK_TYPES
    if deepseek:
        for key in ("head_dim", "mlp_bias"):
            del values[key]
        values["num_key_value_heads"] = config.num_attention_heads
        values |= {"ep_size": 1, "aux_loss_alpha": 0.001, "seq_aux": True}
    else:
        values = {k: v for k, v in values.items() if k not in _DEEPSEEK_KEYS}
        values |= {"head_dim": config.dense_head_dim, "num_key_value_heads": config.key_value_heads}
    if config.model_type == "qwen2":
        values |= {"use_sliding_window": False}
    if config.rope_scaling is None:
        values["rope_scaling"] = None
    else:
        scaling = config.rope_scaling.model_dump(exclude_none=True, exclude=_foreign_rope_keys(config))
        values["rope_scaling"] = {"type": scaling["rope_type"], **scaling}
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        **values,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": "bfloat16" if dtype == "fp8" else dtype,
        **({"quantization_config": FP8_BLOCKS} if dtype == "fp8" else {}),
    }


_DEEPSEEK_KEYS = {
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "first_k_dense_replace", "moe_layer_freq", "n_group", "topk_group", "scoring_func", "topk_method",
    "norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers",
}  # fmt: skip


def _foreign_rope_keys(config: ModelConfig) -> set[str]:
    """Fields of `RopeScaling` that the chosen type does not have."""
    llama3 = {"low_freq_factor", "high_freq_factor"}
    yarn = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"}
    assert config.rope_scaling is not None
    return {"yarn": llama3, "llama3": yarn, "linear": llama3 | yarn}[config.rope_scaling.rope_type]


def _rotary(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from either spelling."""
    rope = _object(values, "rope_parameters", where) or _object(values, "rope_scaling", where)
    found: dict[str, Any] = {}
    theta = rope.pop("rope_theta", None) or values.get("rope_theta")
    if theta is not None:
        found["rope_theta"] = theta
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UserError(f"{where}: partial_rotary_factor is not supported")
    if kind == "default":
        return found
    if kind not in ("linear", "yarn", "llama3"):
        raise UserError(f"{where}: rope scaling {kind!r} is not supported; supported: linear, yarn, llama3")
    settings = {k: v for k, v in rope.items() if k in _ROPE_KEYS and v is not None}
    if kind == "yarn" and "original_max_position_embeddings" not in settings:
        settings["original_max_position_embeddings"] = values.get("max_position_embeddings")
    return found | {"rope_scaling": {"rope_type": kind, **settings}}


def _object(values: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """A copy of the object under `key`; empty where the key is absent or null."""
    value = values.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: '{key}' = {value!r}: must be an object")
    return dict(value)


def _refuse_what_would_be_ignored(values: dict[str, Any], where: str) -> None:
    """A key that changes the arithmetic and that we do not have must stop the load, not pass unseen."""
    if values.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {values['hidden_act']!r} is not supported; supported: silu")
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list):
        raise UserError(f"{where}: 'layer_types' = {kinds!r}: must be a list")
    sliding = values.get("use_sliding_window") or "sliding_attention" in kinds
    if sliding and values.get("model_type") in ("qwen2", "qwen3"):
        raise UserError(f"{where}: sliding-window attention is not supported; set use_sliding_window to false")
    quantization = _object(values, "quantization_config", where)
    method = quantization.get("quant_method", "fp8")
    if method != "fp8":
        raise UserError(f"{where}: quant_method {method!r} is not supported; supported: fp8 blocks, or none")
    for key, supported in FP8_BLOCKS.items():
        found = quantization.get(key, supported)
        if found != supported:
            raise UserError(f"{where}: quantization_config: {key} {found!r} is not supported; supported: {supported!r}")
