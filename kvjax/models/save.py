"""Models as folders in the manner of Hugging Face."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from kvjax.core.errors import InputError
from kvjax.models import hf_latent
from kvjax.models.config import ModelConfig
from kvjax.models.hf import TOP_NAMES, layer_names, norm_offset
from kvjax.models.hf_config import from_hf
from kvjax.models.hf_json import config_json
from kvjax.models.load import NORMS, Model


def save(model: Model, folder: str | os.PathLike) -> Path:
    """Writes a model as a folder that `load` reads: weights, config.json, and the tokenizer if it
    has one. Those of the families of Hugging Face's library are read there too.

    Weights keep their dtype; norms are float32.

    Raises:
      InputError: a model that is what config.json cannot say; a folder that has something in it.

    Example:
      >>> from kvjax.train import adapt
      >>> tuned = dataclasses.replace(model, params=adapt(adapter, model.params))  # doctest: +SKIP
      >>> save(tuned, "smollm2-for-2-bits")  # doctest: +SKIP
    """
    path, config = Path(folder), model.config
    described = config_json(config)
    read = from_hf(described, config.name)
    if lost := [n for n, a in vars(config).items() if a != getattr(read, n)]:
        raise InputError(
            f"model {config.name}",
            got=f"{', '.join(lost)} that its config.json cannot say",
            expected="a model as `load` gives, or one of latent attention in every layer",
            fix="keep it in memory, or save what it was made from",
        )
    check_new(path)
    path.mkdir(parents=True, exist_ok=True)
    described["dtype"] = str(model.params.embed.dtype)
    tensors: dict[str, np.ndarray] = {}
    number = 0
    for run in model.params.runs:
        leaves = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
        arrays = {n: np.asarray(a) for n, a in leaves.items() if a is not None}
        for i in range(len(arrays["attn_norm"])):
            layer = _layer(config, {n: a[i].T for n, a in arrays.items()})
            tensors |= {f"model.layers.{number}.{n}": a for n, a in layer.items()}
            number += 1
    for leaf, name in TOP_NAMES.items():
        if (array := getattr(model.params, leaf)) is not None:
            tensors[name] = np.asarray(array) - (norm_offset(config) if leaf == "final_norm" else 0)
    tensors = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.backend.save(str(path / "tokenizer.json"))
        if model.tokenizer.chat_template:
            chat = json.dumps({"chat_template": model.tokenizer.chat_template})
            (path / "tokenizer_config.json").write_text(chat + "\n", encoding="utf-8")
    return path


def _layer(config: ModelConfig, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of one layer by their names within it, from leaves `[out, in]`."""
    names = layer_names(config)
    up = {}
    if config.latent is not None:
        keys, values = leaves.pop("w_uk", None), leaves.pop("wv")
        up = {hf_latent.UP: hf_latent.join_up(config, keys, values)}
    plain = {names[n]: a - norm_offset(config) if n in NORMS else a for n, a in leaves.items()}
    return plain | up


def check_new(folder: str | os.PathLike) -> None:
    """Raises `InputError` for a file, what is under one, or a folder that has something in it."""
    path = Path(folder)
    if any(p.is_file() for p in (path, *path.parents)) or (path.exists() and any(path.iterdir())):
        raise InputError(
            str(path), got="what holds files already", expected="a new folder", fix="use another"
        )
