"""Calibration on disk: one safetensors file with the moments and where they come from."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvjax.calibrate.moments import Moments
from kvjax.core.errors import InputError
from kvjax.models.config import ModelConfig

FORMAT, VERSION = "kvjax.calibrate.Moments", "1"
FILE = "moments.safetensors"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where moments come from.

    Attributes:
      model: its name. text: its name and hash. kvjax: the version.
      tokens: that were counted. context: tokens per window.
    """

    model: str
    text: str
    kvjax: str
    tokens: int
    context: int


def save_moments(moments: Moments, folder: str | os.PathLike, provenance: Provenance) -> Path:
    """Writes `moments.safetensors` into `folder`, whole or not at all; float32.

    The same moments and provenance give the same bytes: it has no date.
    """
    names = [f.name for f in dataclasses.fields(Moments) if f.name != "tokens"]
    tensors = {name: np.asarray(getattr(moments, name), np.float32) for name in names}
    facts = {"format": FORMAT, "version": VERSION, "provenance": dataclasses.asdict(provenance)}
    # One key: the order of several would differ from run to run.
    about = {"kvjax": json.dumps(facts, sort_keys=True)}
    path = Path(folder).expanduser() / FILE
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, about)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            str(path),
            got=error.strerror or str(error),
            expected="a folder to write",
            fix="choose another",
        ) from error
    return path


def load_moments(
    folder: str | os.PathLike, config: ModelConfig | None = None
) -> tuple[Moments, Provenance]:
    """What `save_moments` wrote; with a config, only for a model of that name and those sizes.

    Args:
      folder: the folder, or the file in it.
    Raises:
      InputError: no such file, a damaged one, another version, or another model.
    """
    path = Path(folder).expanduser()
    path = path / FILE if path.is_dir() else path
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {})["kvjax"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (facts["format"], facts["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {facts['format']}, version {facts['version']}")
        provenance = Provenance(**facts["provenance"])
        arrays = {name: np.asarray(a, np.float64) for name, a in tensors.items()}
        moments = Moments(tokens=provenance.tokens, **arrays)
        _check_shapes(moments)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            str(path),
            got=" ".join(str(error).split())[:200] or type(error).__name__,
            expected="moments that `kvjax calibrate` wrote",
            fix="calibrate again",
        ) from error
    if config is not None:
        _check_model(path, moments, provenance, config)
    return moments, provenance


def _check_shapes(moments: Moments) -> None:
    layers, heads, d = moments.shape
    for field in dataclasses.fields(Moments):
        a = getattr(moments, field.name)
        want: tuple[Any, ...] = (layers, heads, d) if field.name.endswith(("mean", "pre")) else ()
        want = (layers, heads, d, d) if "cov" in field.name or not want else want
        want = (layers, d // 2) if field.name == "frequencies" else want
        if field.name == "tokens":
            continue
        if a.shape != want or not np.isfinite(a).all():
            raise ValueError(f"{field.name} {list(a.shape)}, not finite numbers {list(want)}")


def _check_model(path: Path, moments: Moments, made: Provenance, config: ModelConfig) -> None:
    shape = (config.layers, config.kv_heads, config.head_dim)
    if made.model != config.name or moments.shape != shape:
        name = lambda model, sizes: "{}: {} layers, {} KV heads of {}".format(model, *sizes)
        raise InputError(
            str(path),
            got=f"moments of {name(made.model, moments.shape)}",
            expected=name(config.name, shape),
            fix=f"run `kvjax calibrate --model {config.name}`",
        )
