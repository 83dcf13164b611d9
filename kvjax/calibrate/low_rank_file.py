"""Low-rank methods on disk: the codecs of every layer, and where they come from."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from kvjax.calibrate.low_rank import ranks_of, subspace
from kvjax.calibrate.tensors_file import write_tensors, writing
from kvjax.codecs.serialize import dump, restore
from kvjax.core.codec import Codec
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Params
from kvjax.models.fingerprint import fingerprint

FORMAT, VERSION, FILE = "kvjax.calibrate.LowRank", "1", "lowrank.safetensors"
DAMAGED = (
    *(SafetensorError, OSError, LookupError, ArithmeticError),
    *(AttributeError, TypeError, ValueError),
)


@dataclasses.dataclass(frozen=True)
class LowRankFrom:
    """Where low-rank methods come from.

    Attributes:
      model: its name. weights: its `fingerprint`. text: its name and hash. kvjax: the version.
      tokens: whose moments were taken. context: tokens per window. gradients: tokens that the
        Fisher information saw, 0 for none.
      settings: the fields of `LowRankSettings`.
    """

    model: str
    weights: str
    text: str
    kvjax: str
    tokens: int
    context: int
    gradients: int
    settings: dict[str, Any]


def save_low_rank(
    methods: tuple[Method, ...], folder: str | os.PathLike, made: LowRankFrom
) -> Path:
    """Writes `lowrank.safetensors` into `folder`: whole or not at all, and without a date.

    Raises:
      InputError: a folder that cannot be written, or methods of another kind.
    """
    ranks_of(methods)
    specs, tensors = [], {}
    for layer, method in enumerate(methods):
        own = {}
        for side in ("key", "value"):
            own[side], arrays = dump(getattr(method, side))
            for place, a in arrays.items():
                tensors[f"{layer}.{side}.{place}"] = np.ascontiguousarray(a)
        specs.append(own)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "provenance": dataclasses.asdict(made),
        "layers": specs,
    }
    path = Path(folder).expanduser() / FILE
    with writing(path):
        write_tensors(path, tensors, facts)
    return path


def load_low_rank(
    path: str | os.PathLike, config: ModelConfig, params: Params | None = None
) -> tuple[tuple[Method, ...], LowRankFrom]:
    """What `save_low_rank` wrote; `path` is the file or its folder.

    Args:
      params: only what was fitted to these weights will do; None takes any of that name and size.
    Raises:
      InputError: no such file, a damaged one, another version, another model or other weights.
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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        made = LowRankFrom(**facts["provenance"])
        methods = tuple(_method(own, n, tensors) for n, own in enumerate(facts["layers"]))
        if not all(np.isfinite(a).all() for a in tensors.values() if a.dtype.kind == "f"):
            raise ValueError("numbers that are not finite")
        ranks_of(methods)
    except DAMAGED as error:
        raise InputError(
            str(path),
            got=" ".join(str(error).split())[:200] or type(error).__name__,
            expected="what `kvjax lowrank` wrote",
            fix="run it again",
        ) from error
    _check_origin(path, methods, made, config)
    if params is not None and made.weights != (own := fingerprint(params)):
        raise InputError(
            str(path),
            got=f"subspaces for the weights {made.weights}",
            expected=f"{own}, those of this {config.name}",
            fix="run `kvjax lowrank` on these weights",
        )
    return methods, made


def _method(own: dict[str, Any], layer: int, tensors: dict[str, np.ndarray]) -> Method:
    def codec(side: str) -> Codec:
        start = f"{layer}.{side}."
        mine = (name for name in tensors if name.startswith(start))
        return restore(own[side], {name.removeprefix(start): tensors[name] for name in mine})

    return Method(codec("key"), codec("value"))


def _check_origin(
    path: Path, methods: tuple[Method, ...], made: LowRankFrom, config: ModelConfig
) -> None:
    maps = [subspace(codec).down for m in methods for codec in (m.key, m.value)]
    found = {(len(methods), *(a.shape[0], a.shape[-2])) for a in maps if a.ndim == 4}
    want = (config.layers, config.kv_heads, config.head_dim)
    if made.model != config.name or found != {want}:
        raise InputError(
            str(path),
            got=f"subspaces for {made.model}, {sorted(found)}",
            expected=f"{config.name}, {want}: layers, KV heads and channels",
            fix=f"run `kvjax lowrank --model {config.name}`",
        )
