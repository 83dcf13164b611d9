"""Models with latent attention as folders in the manner of Hugging Face."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from kvjax.core.errors import InputError
from kvjax.models import hf_latent
from kvjax.models.hf import LAYER_NAMES, TOP_NAMES
from kvjax.models.hf_config import from_hf
from kvjax.models.load import Model


def save(model: Model, folder: str | os.PathLike) -> Path:
    """Writes a model with latent attention as a folder that `load` reads: weights, config.json,
    and the tokenizer if it has one.

    Raises:
      InputError: a model without a latent, or with what the folder could not say; a folder that has
        something in it.
    """
    path, config = Path(folder), model.config
    if config.latent is None:
        raise InputError(
            "model", got=config.arch, expected="one with latent attention", fix="convert it first"
        )
    described = hf_latent.config_json(config)
    read = from_hf(described, config.name)
    if lost := [n for n, a in vars(config).items() if a != getattr(read, n)]:
        raise InputError(
            f"model {config.name}",
            got=f"{', '.join(lost)} that its config.json cannot say",
            expected="latent attention in every layer, and nothing else",
            fix="keep it in memory, or convert a plain model",
        )
    check_new(path)
    path.mkdir(parents=True, exist_ok=True)
    names = LAYER_NAMES | hf_latent.names(config.latent)
    tensors: dict[str, np.ndarray] = {}
    number = 0
    for run in model.params.runs:
        leaves = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
        arrays = {n: np.asarray(a) for n, a in leaves.items() if a is not None}
        for i in range(len(arrays["attn_norm"])):
            own: dict[str, Any] = {n: a[i].T for n, a in arrays.items()}
            up = hf_latent.join_up(config, own.pop("w_uk", None), own.pop("wv"))
            own = {names[n]: a for n, a in own.items()} | {hf_latent.UP: up}
            tensors |= {f"model.layers.{number}.{n}": a for n, a in own.items()}
            number += 1
    for leaf, name in TOP_NAMES.items():
        if (array := getattr(model.params, leaf)) is not None:
            tensors[name] = np.asarray(array)
    tensors = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.backend.save(str(path / "tokenizer.json"))
        if model.tokenizer.chat_template:
            chat = json.dumps({"chat_template": model.tokenizer.chat_template})
            (path / "tokenizer_config.json").write_text(chat + "\n", encoding="utf-8")
    return path


def check_new(folder: str | os.PathLike) -> None:
    """Raises `InputError` for a file, what is under one, or a folder that has something in it."""
    path = Path(folder)
    if any(p.is_file() for p in (path, *path.parents)) or (path.exists() and any(path.iterdir())):
        raise InputError(
            str(path), got="what holds files already", expected="a new folder", fix="use another"
        )
