"""Calibration on disk: the moments and where they come from, in safetensors or orbax."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from safetensors import SafetensorError, safe_open

from kvjax.calibrate import orbax_file
from kvjax.calibrate.drift import SCALES
from kvjax.calibrate.moments import Moments
from kvjax.calibrate.tensors_file import write_tensors, writing
from kvjax.core.errors import InputError
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Params
from kvjax.models.fingerprint import fingerprint

Format = Literal["safetensors", "orbax"]

FORMAT, VERSION = "kvjax.calibrate.Moments", "2"
FILE, CHECKPOINT = "moments.safetensors", "moments.orbax"

_BUCKETS = ("bucket_edges", "key_bucket_mean", "key_bucket_var")  # all of them or none


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where moments come from.

    Attributes:
      model: its name. text: its name and hash. kvjax: the version.
      tokens: that were counted. context: tokens per window.
      positions: of the longest context that moments are averaged over (see `served`); None: those
        of the windows.
      weights: the model's `fingerprint`; None in files of version 1, which had none.
    """

    model: str
    text: str
    kvjax: str
    tokens: int
    context: int
    weights: str | None = None
    positions: int | None = None

    @property
    def reach(self) -> int:
        """Positions up to which methods are calibrated."""
        return max(self.context, self.positions or 0)


def save_moments(
    moments: Moments,
    folder: str | os.PathLike,
    provenance: Provenance,
    format: Format = "safetensors",
) -> Path:
    """Writes `moments.safetensors` or `moments.orbax` into `folder`; float32.

    The safetensors file replaces an older one whole or not at all, and the same moments and
    provenance give the same bytes: it has no date. An orbax checkpoint is a folder, is dated, and
    an older one is deleted before it is written.

    Raises:
      InputError: an unknown format, a folder that cannot be written, or a provenance without the
        fingerprint of the weights.
    """
    if format not in get_args(Format):
        raise InputError(
            "format", got=repr(format), expected=f"one of {get_args(Format)}", fix="name one"
        )
    if not provenance.weights:
        raise InputError(
            "provenance",
            got="no fingerprint of the weights",
            expected="that of the model that was measured",
            fix="set weights=fingerprint(params)",
        )
    given = {f.name: getattr(moments, f.name) for f in dataclasses.fields(Moments)}
    tensors = {
        name: np.asarray(a, np.float32)
        for name, a in given.items()
        if name != "tokens" and a is not None
    }
    facts = {"format": FORMAT, "version": VERSION, "provenance": dataclasses.asdict(provenance)}
    path = Path(folder).expanduser() / (FILE if format == "safetensors" else CHECKPOINT)
    with writing(path):
        if format == "orbax":
            orbax_file.write(path, tensors, facts)
        else:
            write_tensors(path, tensors, facts)
    return path


def load_moments(
    folder: str | os.PathLike, config: ModelConfig | None = None, params: Params | None = None
) -> tuple[Moments, Provenance]:
    """What `save_moments` wrote, in either format.

    Args:
      folder: the folder, or the file or checkpoint in it.
      config: only moments of a model of that name and those sizes will do.
      params: only moments of those weights will do; files of version 1 cannot tell, and pass.
    Raises:
      InputError: no such file, a damaged one, another version, another model or other weights, or a
        folder with both formats.
    """
    path = _find(Path(folder).expanduser())
    try:
        if path.is_dir():
            tensors, facts = orbax_file.read(path)
        else:
            tensors, facts = _read_safetensors(path)
        if facts["format"] != FORMAT or facts["version"] not in ("1", VERSION):
            raise ValueError(f"format {facts['format']}, version {facts['version']}")
        provenance = Provenance(**facts["provenance"])
        if facts["version"] != "1" and not isinstance(provenance.weights, str):
            raise ValueError("no fingerprint of the weights")
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
    if params is not None and provenance.weights is not None:
        _check_weights(path, provenance, fingerprint(params))
    return moments, provenance


def _find(path: Path) -> Path:
    """The file or checkpoint that `path` is or holds."""
    if not path.is_dir() or orbax_file.is_checkpoint(path):
        return path
    found = [path / name for name in (FILE, CHECKPOINT) if (path / name).exists()]
    if len(found) > 1:
        raise InputError(
            str(path),
            got=f"both {FILE} and {CHECKPOINT}",
            expected="one calibration",
            fix="name the one to use, or delete the other",
        )
    return found[0] if found else path / FILE


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError("no such file")
    with safe_open(path, framework="numpy") as file:
        facts = json.loads((file.metadata() or {})["kvjax"])
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118


def _check_shapes(moments: Moments) -> None:
    layers, heads, d = moments.shape
    absent = {name for name in _BUCKETS if getattr(moments, name) is None}
    if absent and len(absent) < len(_BUCKETS):
        raise ValueError(f"buckets of positions without {', '.join(sorted(absent))}")
    edges = moments.bucket_edges
    buckets = 0 if edges is None else edges.size - 1
    if edges is not None and not (buckets > 0 and (np.diff(edges) > 0).all()):
        raise ValueError("bucket_edges that do not rise")
    means = ("key_mean", "key_mean_pre", "value_mean")
    of_head: dict[str, tuple[int, ...]] = dict.fromkeys(means, (d,))
    of_head |= {"key_scales": (len(SCALES), 2), "value_scales": (len(SCALES), 2)}
    of_head |= {"key_bucket_mean": (buckets, d), "key_bucket_var": (buckets,)}
    others = {"frequencies": (layers, d // 2), "bucket_edges": (buckets + 1,)}
    for field in dataclasses.fields(Moments):
        a = getattr(moments, field.name)
        if field.name == "tokens" or a is None:
            continue
        want = others.get(field.name, (layers, heads, *of_head.get(field.name, (d, d))))
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


def _check_weights(path: Path, made: Provenance, weights: str) -> None:
    if made.weights != weights:
        raise InputError(
            str(path),
            got=f"moments of {made.model} with the weights {made.weights}",
            expected=f"the weights {weights}, those of the model that was loaded",
            fix=f"run `kvjax calibrate --model` with the same checkpoint of {made.model}",
        )
