"""The config.json of a model: what `hf_config.from_hf` reads, written."""

from __future__ import annotations

from typing import Any

from kvjax.models.config import ModelConfig, RopeScaling

_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}  # as config.json names ours
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def config_json(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model; of one with latent attention, in kvjax's own keys.

    Not all that a `ModelConfig` can be has a key: compare with what `from_hf` makes of it.
    """
    own = _latent(config) if config.latent is not None else _plain(config)
    return own | {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.q_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling(config.rope_scaling),
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
    }


def _plain(config: ModelConfig) -> dict[str, Any]:
    gemma = config.arch == "gemma3"
    kind = "gemma3_text" if gemma else config.arch
    said: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_CLASSES[kind]] if kind in _CLASSES else [],
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_activation" if gemma else "hidden_act": _ACTIVATIONS[config.activation],
    }
    if gemma:
        said |= {
            "query_pre_attn_scalar": _whole(config.attention_scale**-2),
            "rope_local_base_freq": config.rope_theta_local,
        }
    if config.windows:
        some = {window for window in config.windows if window is not None}
        kinds = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
        said |= {"layer_types": kinds, "sliding_window": min(some, default=config.max_positions)}
        said |= {} if gemma else {"use_sliding_window": True}
    return said


def _latent(config: ModelConfig) -> dict[str, Any]:
    latent = config.latent
    assert latent is not None
    return {
        "model_type": "kvjax_mla",
        "kv_lora_rank": latent.rank,
        "q_lora_rank": latent.q_rank,
        "qk_rope_head_dim": latent.rotary_dim,
        "qk_rope_heads": latent.rotary_heads,
        "qk_nope_head_dim": latent.nope_dim,
        "v_head_dim": latent.value_dim,
        "latent_norm": latent.norm,
        "rope_interleave": False,
        "attention_scale": config.attention_scale,
        "hidden_act": _ACTIVATIONS[config.activation],
    }


def _scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    said: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind == "table":
        return said | {"table": list(scaling.table)}
    said["factor"] = scaling.factor
    if scaling.kind == "llama3":
        said |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    return said


def _whole(number: float) -> int | float:
    """A number that rounding has moved off a whole one, put back."""
    return round(number) if abs(number - round(number)) < 1e-9 * number else number
