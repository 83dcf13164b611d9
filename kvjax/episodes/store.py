"""A memory on disk: written beside the old one, which counts until the new one is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

import kvjax
from kvjax.checkpoint import folder as disk
from kvjax.checkpoint.tree import mark
from kvjax.core.errors import InputError
from kvjax.episodes.conversation import Conversation, Question, Utterance
from kvjax.episodes.index import EpisodeIndex
from kvjax.episodes.memory import Memory, Reader
from kvjax.generate.evict import packed_shapes

VERSION = "1"
ARRAYS, FACTS = "arrays.safetensors", "memory.json"


def save(
    reader: Reader,
    memory: Memory,
    folder: str | os.PathLike,
    *,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a memory into a folder; a kill at any moment leaves the old one or the new one.

    Args:
      settings: plain data kept with it, such as what its reader is made from; see `peek`.
    Returns:
      The folder within it that now counts.
    Raises:
      InputError: a folder that cannot be written, a full disk.
    """
    root, new = Path(folder), None
    try:
        new = disk.new_folder(root)
        arrays = {name: np.asarray(a) for name, a in _leaves(memory.caches, memory.index).items()}
        save_file(arrays, new / ARRAYS)
        disk.sync(new / ARRAYS)
        facts = _facts(reader) | {
            "embedder": reader.embedding_mark,
            "settings": dict(settings or {}),
            "bytes": memory.bytes(),
            "bytes_per_token": int(reader.plan.config.kv_bytes_per_token(2)),
            "pending": memory.pending,
            "read": memory.read,
            "firsts": memory.firsts,
            "tail": _tail(memory),
            "sha256": disk.digest_of(new / ARRAYS),
            "conversation": dataclasses.asdict(memory.conversation),
        }
        disk.write(new / FACTS, json.dumps(facts, indent=1))
        disk.sync(new)
        disk.commit(root, [(new, disk.digest_of(new / FACTS))])
    except (OSError, SafetensorError) as error:
        if new is not None and not disk.counts(new):  # the room that it took
            shutil.rmtree(new, ignore_errors=True)
        raise disk.not_taken(f"memory in {root}", error) from error
    disk.tidy(root, [new], lambda path: path.name.startswith((ARRAYS, FACTS)))
    return new


def load(reader: Reader, folder: str | os.PathLike) -> Memory | None:
    """The memory in a folder, or None where there is none yet.

    Raises:
      InputError: one of another model, method, eviction, embedder or version; a file that is
        damaged.
    """
    root = Path(folder)
    found = _read_facts(root)
    if found is None:
        return None
    at, facts = found
    for name, value in _facts(reader).items():
        if facts.get(name) != value:
            raise _other(root, name, facts.get(name), value)
    made, own = facts["embedder"], reader.embedding_mark
    if len(made) != len(own) or not np.allclose(made, own, atol=0.01):
        raise _other(root, "vectors of an embedder", made[:3], f"those of this one, {own[:3]}")
    disk.check_digest(at / ARRAYS, facts["sha256"])
    try:
        arrays = load_file(at / ARRAYS)
    except (OSError, SafetensorError) as error:
        raise disk.damaged(at / ARRAYS, error) from error
    eviction, episodes = reader.settings.eviction, len(facts["pending"])
    shapes = packed_shapes(reader.plan, eviction, batch=episodes, tail=facts["tail"])
    caches = _filled(shapes, "caches", arrays, at)
    return _memory(facts, _index(arrays), caches)


def peek(folder: str | os.PathLike) -> tuple[Memory, dict[str, Any]] | None:
    """A memory without its caches, and what is written beside it; needs no model.

    Returns:
      None where there is no memory, else the memory with no caches and its facts. Of these
      "settings" is what `save` was given, "bytes" those of the caches, "bytes_per_token" those of
      a bf16 cache.
    Raises:
      InputError: a file that is damaged, or of another version.
    """
    found = _read_facts(Path(folder))
    if found is None:
        return None
    at, facts = found
    if facts.get("version") != VERSION:
        raise _other(Path(folder), "version", facts.get("version"), VERSION)
    try:
        with safe_open(at / ARRAYS, "numpy") as file:
            names = file.keys()
            arrays = {n: file.get_tensor(n) for n in names if n.startswith("index.")}
    except (OSError, SafetensorError) as error:
        raise disk.damaged(at / ARRAYS, error) from error
    return _memory(facts, _index(arrays), ()), facts


def alone(folder: str | os.PathLike) -> contextlib.AbstractContextManager[None]:
    """Nobody else who asks for it writes into the folder meanwhile, where there are file locks.

    Raises:
      InputError: somebody does.
    """
    return disk.alone(Path(folder), "conversation")


def _memory(facts: dict[str, Any], index: EpisodeIndex | None, caches: Any) -> Memory:
    said = dict(facts["conversation"])
    said["utterances"] = tuple(Utterance(**u) for u in said["utterances"])
    said["questions"] = tuple(
        Question(**(q | {"evidence": tuple(q["evidence"])})) for q in said["questions"]
    )
    said["starts"] = tuple(said["starts"])
    pending = tuple(map(tuple, facts["pending"]))
    firsts = tuple(facts["firsts"])
    return Memory(Conversation(**said), index, caches, pending, facts["read"], firsts)


def _facts(reader: Reader) -> dict[str, Any]:
    """What must agree for a memory to be read."""
    plan, eviction = reader.plan, reader.settings.eviction
    return {
        "version": VERSION,
        "kvjax": kvjax.__version__,
        "model": plan.config.name,
        "weights": reader.weights,
        "method": plan.methods[0].name,
        "layout": dataclasses.asdict(plan.methods[0].layout),
        "budget": list(eviction.budgets),
        "codec": mark(plan.methods),
        "eviction": mark(eviction),
    }


def _leaves(caches: Any, index: EpisodeIndex | None) -> dict[str, Any]:
    named = {f"caches{_name(path)}": a for path, a in jax.tree_util.tree_leaves_with_path(caches)}
    if index is not None:
        named |= {f"index.{f.name}": getattr(index, f.name) for f in dataclasses.fields(index)}
    return named


def _index(arrays: dict[str, np.ndarray]) -> EpisodeIndex | None:
    if "index.labels" not in arrays:
        return None
    names = [field.name for field in dataclasses.fields(EpisodeIndex)]
    return EpisodeIndex(**{name: jnp.asarray(arrays[f"index.{name}"]) for name in names})


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path)


def _filled(shapes: Any, prefix: str, arrays: dict[str, np.ndarray], at: Path) -> Any:
    def one(path, shape):
        name = prefix + _name(path)
        a = arrays.get(name, np.zeros(0, bool))
        # Pools of kept pages have the size that the history and its episodes gave them.
        fits = a.ndim == shape.ndim if ".kept." in name else a.shape == shape.shape
        if not fits or a.dtype != shape.dtype:
            raise InputError(
                f"{name} in {at / ARRAYS}",
                got=f"{a.dtype} {a.shape}" if name in arrays else "nothing",
                expected=f"{shape.dtype} {shape.shape}",
                fix="make the memory again",
            )
        return jnp.asarray(a)

    return jax.tree_util.tree_map_with_path(one, shapes)


def _tail(memory: Memory) -> int:
    """Page slots for new tokens, as `pack_options` counts them."""
    return next((c.page_starts.shape[-1] for c in memory.caches if c.kept is not None), 1)


def _read_facts(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder that counts and its facts, as they were written."""
    found = disk.current(root)
    if not found:
        return None
    at, digest = found[0]
    disk.check_digest(at / FACTS, digest)
    return at, json.loads((at / FACTS).read_text(encoding="utf-8"))


def _other(root: Path, what: str, got: Any, expected: Any) -> InputError:
    return InputError(
        f"memory in {root}",
        got=f"{what} {got}",
        expected=str(expected),
        fix="open it with what it was made with, or name another folder",
    )
