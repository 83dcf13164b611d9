"""The model config that a GGUF file's metadata and tensor list imply."""

from __future__ import annotations

from typing import Any

from kvjax.core.errors import InputError, known
from kvjax.models.config import ARCHS, ModelConfig, RopeScaling, periodic_windows
from kvjax.models.gguf_file import GGUFFile


def from_gguf(file: GGUFFile) -> ModelConfig:
    """The config that a GGUF file's metadata and tensor list imply.

    Raises:
      InputError: naming the key that is missing, or the feature that the decoder does not have.
    """
    arch = file.fields.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHS:
        raise InputError(
            f"general.architecture of {file.path}",
            got=repr(arch),
            expected=known(ARCHS),
            fix="use a model of one of these families",
        )
    get = _Fields(file, arch)
    heads, width = get.integer("attention.head_count"), get.integer("embedding_length")
    layers, head_dim = _layers(get), get.integer("attention.key_length", width // heads)
    _reject_unsupported(get, head_dim)
    gemma = arch == "gemma3"
    # Gemma 3 27B is the one that scales by the width of a query head and not by head_dim.
    scale_dim = width // heads if gemma and layers == 62 else head_dim
    return ModelConfig(
        name=str(file.fields.get("general.name", file.path.stem)),
        arch=arch,
        vocab_size=get.integer("vocab_size", _embedding_rows(file)),
        layers=layers,
        d_model=width,
        d_ff=get.integer("feed_forward_length"),
        q_heads=heads,
        kv_heads=get.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        attention_scale=scale_dim**-0.5,
        norm_eps=get.real("attention.layer_norm_rms_epsilon"),
        rope_theta=get.real("rope.freq_base", 1e6 if gemma else 1e4),
        rope_theta_local=1e4 if gemma else None,
        rope_scaling=_rope_scaling(get, head_dim),
        max_positions=get.integer("context_length"),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        activation="gelu_tanh" if gemma else "silu",
        embed_scale=width**0.5 if gemma else 1.0,
        post_norms=gemma,
        windows=_windows(get, layers) if gemma else (),
        bos_id=file.fields.get("tokenizer.ggml.bos_token_id"),
        eos_ids=eos_ids(file),
    )


def eos_ids(file: GGUFFile) -> tuple[int, ...]:
    """Ids that end an answer: end of text, and end of turn where the file names one."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return tuple(file.fields[key] for key in keys if key in file.fields)


class _Fields:
    """Metadata of one architecture by short key, with a clear error for what does not fit."""

    def __init__(self, file: GGUFFile, arch: str):
        self.file, self.arch = file, arch

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or value <= 0:
            raise self.error(key, value, "one positive integer")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or not value > 0:
            raise self.error(key, value, "one positive number")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "text")
        return value

    def unset(self, key: str) -> None:
        value = self._get(key, 0)
        if not isinstance(value, (int, float)) or value != 0:
            raise self.error(key, value, "it unset: kvjax's decoder has no such thing")

    def error(self, key: str, value: Any, expected: str) -> InputError:
        return InputError(
            f"{self.arch}.{key} of {self.file.path}",
            got="nothing" if value is None else f"{value!r:.80}",
            expected=expected,
            fix="use another file or model",
        )

    def _get(self, key: str, default: Any) -> Any:
        return self.file.fields.get(f"{self.arch}.{key}", default)


def _layers(get: _Fields) -> int:
    layers = get.integer("block_count")
    if layers > len(get.file.tensors):
        raise get.error("block_count", layers, f"fewer than its {len(get.file.tensors)} tensors")
    return layers


def _embedding_rows(file: GGUFFile) -> int | None:
    info = file.tensors.get("token_embd.weight")
    return info.shape[0] if info and info.shape else None


def _windows(get: _Fields, layers: int) -> tuple[int | None, ...]:
    window = get.integer("attention.sliding_window")
    return periodic_windows(layers, window, get.integer("attention.sliding_window_pattern", 6))


def _reject_unsupported(get: _Fields, head_dim: int) -> None:
    rotated = get.integer("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise get.error("rope.dimension_count", rotated, f"{head_dim}, all of a head")
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "expert_count"):
        get.unset(key)


def _rope_scaling(get: _Fields, head_dim: int) -> RopeScaling | None:
    info = get.file.tensors.get("rope_freqs.weight")
    if info is not None:
        if info.shape != (head_dim // 2,):
            raise get.error("rope_freqs.weight", info.shape, f"({head_dim // 2},)")
        return RopeScaling("table", table=tuple(get.file.read("rope_freqs.weight").tolist()))
    kind = get.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise get.error("rope.scaling.type", kind, "none or linear")
    return RopeScaling("linear", factor=get.real("rope.scaling.factor"))
