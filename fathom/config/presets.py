"""Published and house models by name. A preset is a function that returns a config."""

from fathom.config.model import ModelConfig, RopeScaling
from fathom.errors import UserError, nearest


def deepseek_v3() -> ModelConfig:
    """DeepSeek-V3, R1 and R1-Zero: 671 B parameters, 37 B active."""
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=128,
        max_position_embeddings=163840,
        rope_scaling=_yarn(mscale=1.0),
        q_lora_rank=1536,
        kv_lora_rank=512,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        bos_token_id=0,
        eos_token_id=1,
    )


def deepseek_v2() -> ModelConfig:
    """DeepSeek-V2: 236 B parameters, 21 B active."""
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=5120,
        intermediate_size=12288,
        num_hidden_layers=60,
        num_attention_heads=128,
        max_position_embeddings=163840,
        rope_scaling=_yarn(mscale=1.0),
        q_lora_rank=1536,
        kv_lora_rank=512,
        n_routed_experts=160,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1536,
        first_k_dense_replace=1,
        n_group=8,
        topk_group=3,
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        bos_token_id=100000,
        eos_token_id=100001,
    )


def deepseek_v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite: 15.7 B parameters, 2.4 B active; no query latent, greedy softmax gate."""
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=27,
        num_attention_heads=16,
        max_position_embeddings=163840,
        rope_scaling=_yarn(mscale=0.707),
        kv_lora_rank=512,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        bos_token_id=100000,
        eos_token_id=100001,
    )


def moonlight() -> ModelConfig:
    """Moonlight-16B-A3B: V3's architecture at V2-Lite's size."""
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=163840,
        hidden_size=2048,
        intermediate_size=11264,
        num_hidden_layers=27,
        num_attention_heads=16,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        kv_lora_rank=512,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        routed_scaling_factor=2.446,
        bos_token_id=163584,
        eos_token_id=163586,
    )


def fathom_59m() -> ModelConfig:
    """59 M parameters, 16 M active: the model that training speed is measured on."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        max_position_embeddings=4096,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=192,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.0,
    )


def fathom_tiny() -> ModelConfig:
    """The model of recipes/stdlib.toml: every part of V3, small enough to learn from text in minutes on two cores."""
    return fathom_59m().replace(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=2048,
        q_lora_rank=128,
        kv_lora_rank=64,
        n_routed_experts=16,
        moe_intermediate_size=128,
        n_group=4,
        topk_group=2,
        num_nextn_predict_layers=1,
    )


def fathom_latent512() -> ModelConfig:
    """A small model with V3's own latent (512 + 64), the size that other engines' MLA kernels accept."""
    return fathom_tiny().replace(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def fathom_nano() -> ModelConfig:
    """Every part of V3 at the size of one small skill, over bytes."""
    return fathom_tiny().replace(
        vocab_size=266,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        max_position_embeddings=512,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        n_group=1,
        topk_group=1,
    )


def llama_nano() -> ModelConfig:
    """A dense student for fathom-nano: its vocabulary and context, and fewer parameters than a token meets there."""
    nano = fathom_nano()
    return ModelConfig(
        model_type="llama",
        vocab_size=nano.vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=nano.max_position_embeddings,
        # Small matrices drawn from V3's N(0, 0.006²) learn to copy hundreds of steps later.
        initializer_range=0.15,
    )


def smollm2_135m() -> ModelConfig:
    """SmolLM2-135M: a dense Llama with tied embeddings."""
    return ModelConfig(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        initializer_range=0.041666666666666664,
        bos_token_id=1,
        eos_token_id=2,
    )


def _yarn(mscale: float) -> RopeScaling:
    return RopeScaling(
        rope_type="yarn",
        factor=40.0,
        original_max_position_embeddings=4096,
        mscale=mscale,
        mscale_all_dim=mscale,
    )


PRESETS = {
    "deepseek-v3": deepseek_v3,
    "deepseek-v2": deepseek_v2,
    "deepseek-v2-lite": deepseek_v2_lite,
    "moonlight": moonlight,
    "fathom-59m": fathom_59m,
    "fathom-tiny": fathom_tiny,
    "fathom-latent512": fathom_latent512,
    "fathom-nano": fathom_nano,
    "llama-nano": llama_nano,
    "smollm2-135m": smollm2_135m,
}


def preset(name: str) -> ModelConfig:
    """The named config; an unknown name, or what is no name at all, raises `UserError` with the nearest one."""
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"unknown preset '{name}'{nearest(str(name), PRESETS)}; presets: {', '.join(PRESETS)}")
    return PRESETS[name]()
