"""A memory on disk: written beside the old one, which counts until the new one is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

import kvjax
from kvjax.core.errors import InputError
from kvjax.episodes.conversation import Conversation, Question, Utterance
from kvjax.episodes.index import EpisodeIndex
from kvjax.episodes.memory import Memory, Reader
from kvjax.generate.evict import packed_shapes

VERSION = "1"
CURRENT = "current"  # a file that names the folder that counts, and the checksum of its facts
ARRAYS, FACTS, LOCK = "arrays.safetensors", "memory.json", ".lock"


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
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name) for path in root.iterdir() if path.name.isdigit()]
        new = root / f"{1 + max(taken, default=0):06d}"
        new.mkdir()
        arrays = {name: np.asarray(a) for name, a in _leaves(memory.caches, memory.index).items()}
        save_file(arrays, new / ARRAYS)
        _sync(new / ARRAYS)
        facts = _facts(reader) | {
            "embedder": reader.embedding_mark,
            "settings": dict(settings or {}),
            "bytes": memory.bytes(),
            "bytes_per_token": int(reader.plan.config.kv_bytes_per_token(2)),
            "pending": memory.pending,
            "read": memory.read,
            "firsts": memory.firsts,
            "tail": _tail(memory),
            "sha256": _digest(new / ARRAYS),
            "conversation": dataclasses.asdict(memory.conversation),
        }
        _write(new / FACTS, json.dumps(facts, indent=1))
        _sync(new)
        _write(root / f"{CURRENT}.new", f"{new.name} {_digest(new / FACTS)}\n")
        os.replace(root / f"{CURRENT}.new", root / CURRENT)
        _sync(root)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"memory in {root}",
            got=f"a folder that does not take it ({_reason(error)})",
            expected="one that can be written, with room",
            fix="free some space or name another folder; what was saved before is as it was",
        ) from error
    for path in root.iterdir():
        if path != new and _ours(path):
            shutil.rmtree(path, ignore_errors=True)
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
    if _digest(at / ARRAYS) != facts["sha256"]:
        raise _damaged(at / ARRAYS, "its checksum is another")
    try:
        arrays = load_file(at / ARRAYS)
    except (OSError, SafetensorError) as error:
        raise _damaged(at / ARRAYS, error) from error
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
        raise _damaged(at / ARRAYS, error) from error
    return _memory(facts, _index(arrays), ()), facts


@contextlib.contextmanager
def alone(folder: str | os.PathLike) -> Iterator[None]:
    """Nobody else who asks for it writes into the folder meanwhile, where there are file locks.

    Raises:
      InputError: somebody does.
    """
    root = Path(folder)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / LOCK).open("w")
    except OSError as error:
        raise InputError(
            f"memory in {root}",
            got=_reason(error),
            expected="a folder that can be written",
            fix="name another folder",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"memory in {root}",
                got="another conversation with it under way",
                expected="one at a time",
                fix="end the other one, or name another folder",
            ) from error
        yield


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
        "codec": _hash_of(plan.methods),
        "eviction": _hash_of(eviction),
    }


def _hash_of(tree: Any) -> str:
    digest = hashlib.sha256(str(jax.tree.structure(tree)).encode())
    for leaf in jax.tree.leaves(tree):
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes())
    return digest.hexdigest()[:16]


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


def _ours(path: Path) -> bool:
    """Whether `save` made the folder: what else is there is left alone."""
    numbered = path.is_dir() and path.name.isdigit() and len(path.name) >= 6
    return numbered and all(file.name.startswith((ARRAYS, FACTS)) for file in path.iterdir())


def _read_facts(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder that counts and its facts, as they were written."""
    try:
        words = (root / CURRENT).read_text(encoding="utf-8").split()
    except (FileNotFoundError, NotADirectoryError):
        if root.exists() and not root.is_dir():
            raise _damaged(root, "it is no folder") from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(root / CURRENT, error) from error
    name, digest = (*words, "", "")[:2]
    if not name.isdigit() or not (root / name).is_dir():
        raise _damaged(root / CURRENT, f"it names {name!r}, which is not there")
    at = root / name
    if _digest(at / FACTS) != digest:
        raise _damaged(at / FACTS, "its checksum is another")
    return at, json.loads((at / FACTS).read_text(encoding="utf-8"))


def _other(root: Path, what: str, got: Any, expected: Any) -> InputError:
    return InputError(
        f"memory in {root}",
        got=f"{what} {got}",
        expected=str(expected),
        fix="open it with what it was made with, or name another folder",
    )


def _damaged(path: Path, why: Any) -> InputError:
    return InputError(
        str(path),
        got=f"a file that cannot be read ({_reason(why)})",
        expected="what `save` wrote",
        fix="restore it from a backup, or name another folder",
    )


def _reason(why: Any) -> str:
    return (why.strerror if isinstance(why, OSError) else None) or " ".join(str(why).split())[:200]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _damaged(path, error) from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """On the disk, not only on its way there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
