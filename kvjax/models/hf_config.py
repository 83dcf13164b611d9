"""The model config that a Hugging Face config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvjax.core.errors import InputError, known
from kvjax.models import hf_latent
from kvjax.models.config import ModelConfig, RopeScaling, periodic_windows
from kvjax.models.layer_map import last_shared

_MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
    "deepseek_v2": "mla",
    "deepseek_v3": "mla",
    "kvjax_mla": "mla",
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# What Gemma 3's published configs leave to the library's defaults.
_GEMMA_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


class _Section:
    """A config.json as a mapping with one-line errors."""

    def __init__(self, data: Mapping[str, Any], what: str):
        self.data, self.what = data, what

    def get(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key)
        return default if value is None else value

    def number(self, key: str, default: Any = None) -> Any:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise self.error(key, "nothing" if value is None else repr(value), "a positive number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not isinstance(value, int):
            raise self.error(key, repr(value), "a positive integer")
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, repr(value), "a JSON object")
        return value

    def error(self, key: str, got: Any, expected: str) -> InputError:
        return InputError(
            f"{key} in {self.what}", got=got, expected=expected, fix="use a model that has this"
        )


def from_hf(data: Mapping[str, Any], name: str = "", what: str = "config.json") -> ModelConfig:
    """The config that a Hugging Face `config.json` describes.

    Args:
      data: the parsed file; of a multimodal Gemma 3 the text part is read.
      name: what to call the model.
      what: what to call the file in errors.

    Raises:
      InputError: naming the key that is missing or asks for what the decoder does not have.
    """
    if not isinstance(data, Mapping):
        raise InputError(what, got=type(data).__name__, expected="a JSON object", fix="check it")
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in _MODEL_TYPES:
        raise InputError(
            f"model_type in {what}",
            got=repr(kind),
            expected=known(_MODEL_TYPES),
            fix="use a model of one of these families",
        )
    gemma = _MODEL_TYPES[kind] == "gemma3"
    data = data if "text_config" not in data else _Section(data, what).section("text_config")
    c = _Section({**_GEMMA_DEFAULTS, **data} if gemma else data, what)
    _reject_unsupported(c)
    layers, width, heads = (
        c.integer(k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    latent = hf_latent.read_config(c) if _MODEL_TYPES[kind] == "mla" else None
    head_dim = c.integer("head_dim", width // heads) if latent is None else latent.width
    theta, theta_local, scaling = _rope(c, gemma)
    scale = (c.number("query_pre_attn_scalar") if gemma else head_dim) ** -0.5
    if latent is not None:
        scale = c.number("attention_scale", hf_latent.default_scale(c, latent))
    eos = c.get("eos_token_id", ())
    windows = _windows(c, kind, layers)
    shared = c.integer("num_kv_shared_layers") if c.get("num_kv_shared_layers") else 0
    return ModelConfig(
        name=name or f"{kind} {layers} layers",
        arch=_MODEL_TYPES[kind],
        vocab_size=c.integer("vocab_size"),
        layers=layers,
        d_model=width,
        d_ff=c.integer("intermediate_size"),
        q_heads=heads,
        kv_heads=c.integer("num_key_value_heads", heads) if latent is None else 1,
        head_dim=head_dim,
        attention_scale=scale,
        norm_eps=c.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_theta_local=theta_local,
        rope_scaling=scaling,
        max_positions=c.integer("max_position_embeddings"),
        tie_embeddings=bool(c.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2",
        qk_norm=gemma or kind == "qwen3",
        activation=_activation(c, gemma),
        embed_scale=width**0.5 if gemma else 1.0,
        post_norms=gemma,
        windows=windows,
        latent=latent,
        layer_map=last_shared(windows or (None,) * layers, shared) if shared else (),
        bos_id=c.get("bos_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
    )


def _reject_unsupported(c: _Section) -> None:
    unset = ("final_logit_softcapping", "attn_logit_softcapping", "mlp_bias", "attention_bias")
    for key in (*unset, "use_bidirectional_attention", "quantization_config"):
        if c.get(key):
            raise c.error(key, repr(c.get(key)), "it unset: kvjax's decoder has no such thing")
    if c.get("partial_rotary_factor", 1) != 1:
        raise c.error("partial_rotary_factor", c.get("partial_rotary_factor"), "1")


def _activation(c: _Section, gemma: bool) -> str:
    name = c.get("hidden_activation") or c.get("hidden_act")
    name = name or ("gelu_pytorch_tanh" if gemma else "silu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise c.error("hidden_act", repr(name), known(_ACTIVATIONS))
    return _ACTIVATIONS[name]


def _rope(c: _Section, gemma: bool) -> tuple[float, float | None, RopeScaling | None]:
    """theta, the local layers' theta and the scaling, from the old keys or `rope_parameters`."""
    parameters = c.section("rope_parameters")
    if not parameters:
        theta = float(c.number("rope_theta", 1e4))
        local = float(c.number("rope_local_base_freq")) if gemma else None
        return theta, local, _scaling(c, c.section("rope_scaling"))
    nested = _Section(parameters, f"rope_parameters of {c.what}")
    full = nested.section("full_attention") or parameters
    theta = float(_Section(full, nested.what).number("rope_theta", c.get("rope_theta", 1e4)))
    sliding = nested.section("sliding_attention")
    if _scaling(c, sliding) is not None:
        raise c.error("rope_parameters", "scaling in sliding layers", "scaling in full layers only")
    if not gemma:
        return theta, None, _scaling(c, full)
    local = _Section(sliding, nested.what).number("rope_theta", c.get("rope_local_base_freq"))
    return theta, float(local), _scaling(c, full)


def _scaling(c: _Section, data: Mapping[str, Any]) -> RopeScaling | None:
    kind = data.get("rope_type", data.get("type", "default"))
    if kind == "default":
        return None
    s = _Section(data, f"rope scaling of {c.what}")
    if kind == "linear":
        return RopeScaling("linear", factor=float(s.number("factor")))
    if kind == "table":
        return RopeScaling("table", table=tuple(s.get("table", ())))
    if kind == "yarn" and "kv_lora_rank" in c.data:
        return hf_latent.yarn(c, s)
    if kind != "llama3":
        raise c.error("rope_type", repr(kind), "default, linear or llama3")
    return RopeScaling(
        "llama3",
        factor=float(s.number("factor")),
        low_freq_factor=float(s.number("low_freq_factor")),
        high_freq_factor=float(s.number("high_freq_factor")),
        original_positions=s.integer("original_max_position_embeddings"),
    )


def _windows(c: _Section, kind: str, layers: int) -> tuple[int | None, ...]:
    gemma = kind.startswith("gemma3")
    if not gemma and not c.get("use_sliding_window", False):
        return ()
    window = c.integer("sliding_window")
    types = c.get("layer_types")
    if types is not None:
        if not isinstance(types, list):
            raise c.error("layer_types", repr(types), "a list with one entry per layer")
        return tuple(window if t == "sliding_attention" else None for t in types)
    if gemma:
        return periodic_windows(layers, window, c.integer("sliding_window_pattern", 6))
    first = c.get("max_window_layers", layers)  # may be 0
    return tuple(window if i >= first else None for i in range(layers))
