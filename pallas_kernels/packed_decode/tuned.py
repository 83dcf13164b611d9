"""Tuning that was measured on this kind of device: JSON that `bench --tune` writes."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.packed import Packed
from pallas_kernels.packed_decode.config import Config, heuristic, splits_of

FOLDER = Path(__file__).parents[1] / "tuned"


def choose(
    batch: int,
    heads: int,
    group: int,
    head_dim: int,
    slots: int,
    page: int,
    key: Packed,
    value: Packed,
    *,
    device: str | None = None,
    folder: Path | None = None,
) -> Config:
    """The tuning of the nearest launch that was measured for these codes, else the heuristic.

    Codes, page, group and head_dim must be the same. Of shapes the nearest counts, in factors of
    programs and of tokens; at another shape than the measured one the splits are what the heuristic
    says for the tuned warps and steps, times what tuning made of it there.

    Args:
      slots: page slots of a sequence. device: its kind, by default that of the first device.
    Raises:
      ValueError: a file that is damaged; names it.

    Example:
      >>> from pallas_kernels.arg_specs import spec
      >>> args = spec("lloyd-max-2", tokens=512, page=256).shapes()
      >>> choose(1, 8, 4, 128, 2, 256, args["key"], args["value"], device="none such").warps
      2
    """
    bits = narrowest(key, value)
    usual = heuristic(batch, heads, slots, page, unit_bits=bits)
    device = jax.devices()[0].device_kind if device is None else device
    entries = _entries(tuned_file(device, folder))
    wanted = {"key": signature(key), "value": signature(value), "page": page}
    here = {"group": group, "head_dim": head_dim}
    fits = [
        e
        for e in entries
        if all(e[k] == v for k, v in wanted.items())
        and all(e["shape"][k] == v for k, v in here.items())
    ]
    if not fits:
        return usual
    apart = lambda a, b: abs(math.log(a / b))
    programs = lambda e: e["shape"]["batch"] * e["shape"]["kv_heads"]
    entry = min(
        fits,
        key=lambda e: apart(programs(e), batch * heads) + apart(e["shape"]["tokens"], slots * page),
    )
    config = Config(**entry["config"])
    there = splits_of(config, programs(entry), -(-entry["shape"]["tokens"] // page), page)
    splits = splits_of(config, batch * heads, slots, page) * config.splits / there
    most = max(1, slots * page // config.tokens)
    return dataclasses.replace(config, splits=max(1, min(most, round(splits))))


def narrowest(key: Packed, value: Packed) -> int:
    """Bits of the narrowest plane of keys and values."""
    blocks = [block for part in (*key, *value) for block in part.blocks]
    return min(width for block in blocks for width in block.widths)


def signature(packed: Packed) -> list[list[Any]]:
    """What a kernel is compiled for, of one side: (bits, whether levels) of each block, by part.

    Example:
      >>> from pallas_kernels.arg_specs import spec
      >>> signature(spec("turboquant-prod-3", tokens=256).shapes()["key"])
      [[[2, True]], [[1, True]]]
    """
    return [[[b.bits, b.levels is not None] for b in part.blocks] for part in packed]


def tuned_file(device: str, folder: Path | None = None) -> Path:
    """Where the tuning for a kind of device is kept.

    Example:
      >>> tuned_file("NVIDIA H200").name
      'nvidia-h200.json'
    """
    return (folder or FOLDER) / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def _entries(path: Path) -> list[dict[str, Any]]:
    return _read(path, path.stat().st_mtime_ns) if path.is_file() else []


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> list[dict[str, Any]]:
    """Of a file as it was then."""
    del changed
    names = {field.name for field in dataclasses.fields(Config)}
    sizes = ("batch", "kv_heads", "group", "head_dim", "tokens")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        for entry in entries:
            whole = [entry["page"], *(entry["shape"][k] for k in sizes), *entry["config"].values()]
            if set(entry["config"]) != names or not all(type(n) is int and n > 0 for n in whole):
                raise ValueError("an entry without its sizes")
            entry["key"], entry["value"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"packed_decode: got {path} ({error}); expected what `python -m pallas_kernels.bench "
            "--tune` writes; delete it, or tune again"
        ) from error
    return entries
