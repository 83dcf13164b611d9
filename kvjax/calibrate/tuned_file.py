"""Tuned key transforms on disk, beside the calibration they were tuned from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from kvjax.calibrate.moments import Moments
from kvjax.calibrate.tensors_file import write_tensors, writing
from kvjax.codecs import Linear, Matrix, RotaryMean
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.models.config import ModelConfig

FORMAT, VERSION, FILE = "kvjax.calibrate.Tuned", "1", "tuned.safetensors"


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What takes the place of the closed form in the keys of every layer, float32.

    Attributes:
      forward, inverse: `[l, h, d, d]`, of `Linear`; after tuning with gains they are inverse to
        each other only up to these.
      mean: `[l, h, d]`, before RoPE.
    """

    forward: np.ndarray
    inverse: np.ndarray
    mean: np.ndarray


@dataclasses.dataclass(frozen=True)
class TunedFrom:
    """Where tuned transforms come from.

    Attributes:
      model: its name. method: the calibrated method that was tuned. text: its name and hash.
      kvjax: the version. tokens, steps: of tuning. moments: `moments_hash` of the calibration.
    """

    model: str
    method: str
    text: str
    kvjax: str
    tokens: int
    steps: int
    moments: str


def with_tuned(methods: tuple[Method, ...], tuned: Tuned) -> tuple[Method, ...]:
    """The methods with tuned means and transforms in their keys, and nothing else changed."""
    made = []
    for i, method in enumerate(methods):
        key, linear = key_parts(method)
        matrix = Matrix(
            jnp.asarray(tuned.forward[i][:, None]), jnp.asarray(tuned.inverse[i][:, None])
        )
        linear = dataclasses.replace(linear, transform=matrix)
        mean = jnp.asarray(tuned.mean[i][:, None, None])
        made.append(
            dataclasses.replace(method, key=dataclasses.replace(key, mean=mean, inner=linear))
        )
    return tuple(made)


def key_parts(method: Method) -> tuple[RotaryMean, Linear]:
    """What `tune` changes in a method: the mean of its keys, and their transform."""
    key = method.key
    if (
        isinstance(key, RotaryMean)
        and isinstance(key.inner, Linear)
        and isinstance(key.inner.transform, Matrix)
    ):
        return key, key.inner
    raise InputError(
        f"method {method.name}",
        got=f"keys of {type(key).__name__}",
        expected="keys of klt(..., metric='predictions'), their mean taken out before RoPE",
        fix="tune klt-fisher-2, -3 or -4",
    )


def moments_hash(moments: Moments) -> str:
    """SHA-256, 16 hex digits, over all statistics in float32, as `save_moments` keeps them.

    Example:
      >>> moments_hash(load_moments("runs/calibration/smollm2-135m")[0])  # doctest: +SKIP
      '3f0c5a...'
    """
    digest = hashlib.sha256(str(moments.tokens).encode())
    for field in dataclasses.fields(Moments):
        a = getattr(moments, field.name)
        if field.name == "tokens" or a is None:
            continue
        digest.update(f"{field.name} {a.shape};".encode())
        digest.update(np.ascontiguousarray(a, "<f4").tobytes())
    return digest.hexdigest()[:16]


def save_tuned(tuned: Tuned, folder: str | os.PathLike, made: TunedFrom) -> Path:
    """Writes `tuned.safetensors` into `folder`: whole or not at all, and without a date.

    Raises:
      InputError: a folder that cannot be written.
    """
    tensors = {f.name: np.asarray(getattr(tuned, f.name)) for f in dataclasses.fields(Tuned)}
    facts = {"format": FORMAT, "version": VERSION, "provenance": dataclasses.asdict(made)}
    path = Path(folder).expanduser() / FILE
    with writing(path):
        write_tensors(path, tensors, facts)
    return path


def load_tuned(
    path: str | os.PathLike, config: ModelConfig, moments: Moments
) -> tuple[Tuned, TunedFrom]:
    """What `save_tuned` wrote; `path` is the file or its folder.

    Raises:
      InputError: no such file, a damaged one, another version, another model, or other moments than
        those it was tuned from.
    """
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {})["kvjax"])
            if facts["format"] != FORMAT or facts["version"] != VERSION:
                raise ValueError(f"format {facts['format']}, version {facts['version']}")
            tuned = Tuned(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            made = TunedFrom(**facts["provenance"])
        _check_finite(tuned)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            str(path),
            got=" ".join(str(error).split())[:200] or type(error).__name__,
            expected="what `kvjax tune` wrote",
            fix="tune again",
        ) from error
    _check_origin(path, tuned, made, config, moments)
    return tuned, made


def _check_finite(tuned: Tuned) -> None:
    layers, heads, d = tuned.mean.shape
    want = {"forward": (layers, heads, d, d), "inverse": (layers, heads, d, d)}
    for field in dataclasses.fields(Tuned):
        a, shape = getattr(tuned, field.name), want.get(field.name, (layers, heads, d))
        if a.shape != shape or a.dtype != np.float32 or not np.isfinite(a).all():
            raise ValueError(f"{field.name} {list(a.shape)}, not finite float32 {list(shape)}")


def _check_origin(
    path: Path, tuned: Tuned, made: TunedFrom, config: ModelConfig, moments: Moments
) -> None:
    shape = (config.layers, config.kv_heads, config.head_dim)
    if made.model != config.name or tuned.mean.shape != shape:
        raise InputError(
            str(path),
            got=f"keys tuned for {made.model}, {tuned.mean.shape}",
            expected=f"{config.name}, {shape}: layers, KV heads and channels",
            fix=f"run `kvjax tune --model {config.name}`",
        )
    own = moments_hash(moments)
    if made.moments != own:
        raise InputError(
            str(path),
            got=f"keys tuned from the moments {made.moments}",
            expected=f"the moments {own}, those of --calibration",
            fix="name the calibration it was tuned from, or tune again",
        )
