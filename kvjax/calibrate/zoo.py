"""OSCAR's RotationZoo: the rotations that its authors calibrated, read without torch."""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from kvjax.calibrate.oscar import defect, transform
from kvjax.calibrate.torch_file import Tensor, TorchFile
from kvjax.codecs import Orthogonal
from kvjax.codecs.serialize import shown
from kvjax.core.errors import InputError

_META, _META_PER_LAYER = 2**20, 2**13  # bytes of a file beside its numbers: program, directory


@dataclasses.dataclass(frozen=True)
class RotationZoo:
    """Rotations of one side (keys or values), in row convention: `k' = k R`.

    Attributes:
      rotations: `[l, d, d]` (version 1), or `[l, h, d, d]`, one per KV head (version 2); float64.
      eigenvalues: `[l, d]` or `[l, h, d]` of the moments, ascending as fitted; None without.
      version: 1 or 2.
      objective: what was fitted, as "qqt_r_h_pbr" for keys or "sst_r_h_pbr" for values.
      grouping: what the heads share, as "layer" or "per_kv_head".
    """

    rotations: np.ndarray
    eigenvalues: np.ndarray | None
    version: int
    objective: str
    grouping: str

    def transforms(self) -> tuple[Orthogonal, ...]:
        """One transform per layer, for `methods.oscar`."""
        return tuple(transform(rotation) for rotation in self.rotations)


def read_zoo(
    path: str | os.PathLike,
    *,
    layers: int,
    kv_heads: int,
    head_dim: int,
    tolerance: float = 5e-3,
) -> RotationZoo:
    """Reads `{k_rotation_qqt,v_rotation_sst}_r_h_pbr.pt`, of format version 1 or 2.

    Args:
      path: the file; nothing in it is executed (see `TorchFile`).
      layers, kv_heads, head_dim: of the model that it is for. Version 1 does not tell heads.
      tolerance: how far `R^T R` may be off the identity; bf16 matrices are off by 0.001.
    Raises:
      InputError: what `TorchFile` refuses, another format, other sizes than asked for, or a matrix
        that is not orthogonal.

    Example:
      >>> keys = read_zoo("k_rotation_qqt_r_h_pbr.pt",
      ...     layers=36, kv_heads=8, head_dim=128)  # doctest: +SKIP
      >>> values = read_zoo("v_rotation_sst_r_h_pbr.pt",
      ...     layers=36, kv_heads=8, head_dim=128)  # doctest: +SKIP
      >>> sides = zip(keys.transforms(), values.transforms())  # doctest: +SKIP
      >>> plan = make_plan(config, [oscar(k, v) for k, v in sides])  # doctest: +SKIP

    Source: the files `Zhongzhu/OSCAR-RotationZoo` on Hugging Face, of arXiv 2605.17757.
    """
    matrices = kv_heads * (head_dim + 1) * head_dim * 8  # of float64, with eigenvalues
    file = TorchFile(path, largest=_META + layers * (matrices + _META_PER_LAYER))
    root = file.root
    if isinstance(root, Tensor):
        raise file.bad(
            f"a bare tensor {root.shape}",
            "a dict with format_version",
            "save it in the zoo's format: three axes may be layers or heads",
        )
    table = root.get("layers") if isinstance(root, dict) else None
    version = root.get("format_version") if isinstance(root, dict) else None
    if type(version) is not int or version not in (1, 2) or not isinstance(table, dict):
        raise file.bad(f"format version {shown(version)}", "version 1 or 2 with layers")
    by_id = {_whole(file, key): entry for key, entry in table.items()}
    if sorted(by_id) != list(range(layers)) or len(by_id) != len(table):
        ids = ", ".join(map(str, sorted(by_id)[:8]))
        raise file.bad(
            f"{len(table)} layers ({ids}...)", f"layers 0 to {layers - 1}", "check the model"
        )
    lead = (kv_heads,) if version == 2 else ()
    entries = [_entry(file, i, by_id[i]) for i in range(layers)]
    rotations = np.stack(
        [
            _array(file, i, entry, "rotation", (*lead, head_dim, head_dim))
            for i, entry in enumerate(entries)
        ]
    )
    eigenvalues = None
    if all("eigenvalues" in entry for entry in entries):
        shape = (*lead, head_dim)
        eigenvalues = np.stack(
            [_array(file, i, entry, "eigenvalues", shape) for i, entry in enumerate(entries)]
        )
    _check_orthogonal(file, rotations, tolerance)
    text = lambda name: str(root[name])[:80] if isinstance(root.get(name), str) else ""
    return RotationZoo(rotations, eigenvalues, version, text("objective"), text("source_grouping"))


def _whole(file: TorchFile, key: int | str) -> int:
    """A layer's number, which files have as int or as str."""
    if isinstance(key, str) and not (key.isdecimal() and key.isascii() and len(key) < 6):
        raise file.bad(f"layer {key[:20]!r}", "the number of a layer")
    return int(key)


def _entry(file: TorchFile, layer: int, entry: object) -> dict:
    if not isinstance(entry, dict) or entry.get("layer_id", layer) != layer:
        raise file.bad(f"another entry for layer {layer}", "its rotation and its own layer_id")
    return entry


def _array(
    file: TorchFile, layer: int, entry: dict, name: str, shape: tuple[int, ...]
) -> np.ndarray:
    tensor = entry.get(name)
    if not isinstance(tensor, Tensor) or tensor.shape != shape:
        got = f"shape {tensor.shape}" if isinstance(tensor, Tensor) else "no tensor"
        raise file.bad(
            f"{name} of layer {layer}: {got}", f"shape {shape}", "check model and side, head_dim"
        )
    return file.array(tensor).astype(np.float64)


def _check_orthogonal(file: TorchFile, rotations: np.ndarray, tolerance: float) -> None:
    for layer, rotation in enumerate(rotations):
        off = defect(rotation)
        if not off <= tolerance:  # NaN too
            raise InputError(
                f"file {file.path}, layer {layer}",
                got=f"R^T R off the identity by {off:.2g}",
                expected=f"at most {tolerance:g}",
                fix="this is no rotation: calibrate again, or use Matrix for other maps",
            )
