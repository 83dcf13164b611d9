"""Hugging Face folders: config.json, and weights in one or many safetensors files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from kvjax.core.errors import InputError, known
from kvjax.models import hf_latent
from kvjax.models.config import ModelConfig
from kvjax.models.hf_config import from_hf

_DTYPES = ("F32", "F16", "BF16")

TOP_NAMES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "bq": "self_attn.q_proj.bias",
    "bk": "self_attn.k_proj.bias",
    "bv": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "w_gate": "mlp.gate_proj.weight",
    "w_up": "mlp.up_proj.weight",
    "w_down": "mlp.down_proj.weight",
}
_GEMMA_LAYER = {
    **LAYER_NAMES,
    "post_attn_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}


def layer_names(config: ModelConfig) -> dict[str, str]:
    """Tensor names, within a layer, of the decoder's leaves."""
    if config.latent is not None:
        return {**LAYER_NAMES, **hf_latent.names(config.latent)}
    return _GEMMA_LAYER if config.arch == "gemma3" else LAYER_NAMES


def norm_offset(config: ModelConfig) -> bool:
    """Whether stored norm weights lack the 1 that is added."""
    return config.arch == "gemma3"


class HFFolder:
    """A folder with config.json and safetensors; a weight source for `kvjax.models.load`.

    Raises:
      InputError: when a file is missing, cut off or damaged, naming it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        config_path = self.path / "config.json"
        data = read_json(config_path)
        self.config = from_hf(data, self.path.name, str(config_path))
        self.norm_offset = norm_offset(self.config)
        self._layer = layer_names(self.config)
        self._latent = self.config.latent
        if self._latent is not None:
            self._pairs = bool(data.get("rope_interleave", True))
        files = sorted(self.path.glob("*.safetensors"))
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            files = _shards(index)
        if not files:
            raise InputError(
                str(self.path),
                got="no *.safetensors",
                expected="config.json with the weights beside it",
                fix="save the model as safetensors (pickled .bin weights are not read)",
            )
        self._tensors = {}
        for file in files:
            handle = _open(file)
            for key in handle.keys():  # noqa: SIM118  a safe_open handle is no mapping
                self._tensors[_plain_name(key)] = (handle, key, file)

    def names(self) -> set[str]:
        skip = ("rotary_emb.inv_freq", "vision_tower.", "multi_modal_projector.")
        names = {n for n in self._tensors if not any(s in n for s in skip)}
        if self._latent is not None:
            names = {part for n in names for part in hf_latent.parts_of(self._latent, n)}
        return names - {TOP_NAMES["head"]} if self.config.tie_embeddings else names

    def name_of(self, leaf: str, layer: int | None = None) -> str:
        if layer is None:
            return TOP_NAMES[leaf]
        return f"model.layers.{layer}.{self._layer[leaf]}"

    def shape(self, name: str) -> tuple[int, ...]:
        handle, key, _ = self._tensors[hf_latent.tensor_of(name)]
        shape = tuple(handle.get_slice(key).get_shape())
        if self._latent is None:
            return shape
        return hf_latent.part_rows(self.config, name, shape[0]), *shape[1:]

    def leaf(self, config: ModelConfig, leaf: str, name: str) -> np.ndarray:
        """The tensor in its own dtype, matrices [out, in]."""
        handle, key, file = self._tensors[hf_latent.tensor_of(name)]
        dtype = handle.get_slice(key).get_dtype()
        if dtype not in _DTYPES:
            raise InputError(
                f"tensor {key} of {file}",
                got=dtype,
                expected=known(_DTYPES),
                fix="save the model unquantized",
            )
        tensor = handle.get_tensor(key)
        if self._latent is None:
            return tensor
        return hf_latent.read_part(config, leaf, name, tensor, self._pairs)


def _shards(index: Path) -> list[Path]:
    """The files that an index of sharded weights names, in its folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise InputError(
            str(index),
            got="no map from tensors to files",
            expected="`weight_map`",
            fix="save the model again",
        )
    return sorted({index.parent / name for name in names.values()})


def _plain_name(key: str) -> str:
    """Gemma 3's multimodal checkpoints nest the text model; its names without the nesting."""
    for prefix in ("model.language_model.", "language_model.model."):
        if key.startswith(prefix):
            return "model." + key.removeprefix(prefix)
    return key.removeprefix("language_model.")


def _open(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            str(file),
            got=f"a file that does not open ({detail[:200]})",
            expected="a complete safetensors file",
            fix="fetch or save the model again",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file, or an `InputError` that names it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            str(path), got="no such file", expected="a JSON file", fix="check the folder"
        ) from error
    except (ValueError, OSError) as error:
        raise InputError(
            str(path),
            got=f"a file that does not parse ({error})",
            expected="JSON",
            fix="fetch or save the model again",
        ) from error
    if not isinstance(data, dict):
        raise InputError(
            str(path), got=type(data).__name__, expected="a JSON object", fix="check the file"
        )
    return data
