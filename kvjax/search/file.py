"""An index as one safetensors file: arrays by name, and the rest as JSON in the metadata."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvjax.codecs import serialize
from kvjax.core.errors import InputError
from kvjax.search import scan

if TYPE_CHECKING:
    from kvjax.search.index import Index

FORMAT, VERSION = "kvjax.search.Index", "1"
_FACTS = {"codec", "d", "metric", "page", "count"}


def write(index: Index, path: str | os.PathLike) -> None:
    """Saves `index`; the file appears under its name when it is complete."""
    spec, arrays = serialize.dump(index.codec)
    facts = {"codec": spec, **{name: getattr(index, name) for name in _FACTS - {"codec"}}}
    tensors = {f"codec.{name}": a for name, a in arrays.items()}
    tensors |= {name: serialize.to_bits(a) for name, a in _named(index.pages)}
    tensors["tail"] = np.asarray(index.tail)
    tensors = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()}
    metadata = {"format": FORMAT, "version": VERSION, "index": json.dumps(facts)}
    target = Path(path).expanduser()
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        save_file(tensors, temporary, metadata)
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(
            str(target),
            got=error.strerror or str(error),
            expected="a place where a file can be written",
            fix="check the folder and the space on its disk",
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def read(path: str | os.PathLike) -> Index:
    """The index in a file, everything checked against what its codec makes."""
    from kvjax.search.index import Index

    facts, tensors = _open(Path(path).expanduser())
    count, d, page = (_whole(path, facts, name) for name in ("count", "d", "page"))
    arrays = {
        name.removeprefix("codec."): tensors.pop(name)
        for name in list(tensors)
        if name.startswith("codec.")
    }
    try:
        codec = serialize.restore(facts["codec"], arrays)
        index = Index.create(codec, d, facts["metric"], page)
    except InputError as error:
        raise _bad(path, str(error), "an index that fits together") from error
    except Exception as error:  # a codec whose parts do not fit fails where it is first traced
        raise _bad(
            path, f"a codec that does not run ({type(error).__name__})", "one that does"
        ) from error
    slots = jax.eval_shape(lambda: scan.empty_pages(codec, d, page, index.metric, count // page))
    leaves = [_take(path, tensors, name, spec) for name, spec in _named(slots)]
    rest = jax.ShapeDtypeStruct((count % page, d), jnp.float32)
    tail = _take(path, tensors, "tail", rest)
    if tensors:
        raise _bad(path, f"tensors without a place ({', '.join(sorted(tensors))[:100]})", "none")
    pages = jax.tree.unflatten(jax.tree.structure(slots), leaves)
    return dataclasses.replace(index, pages=pages, tail=tail, count=count)


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return [(f"pages{jax.tree_util.keystr(path)}", leaf) for path, leaf in leaves]


def _open(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The facts and all tensors, of a whole file of this format and version."""
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_version(path, metadata)
            facts = json.loads(metadata["index"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except InputError:
        raise
    except (
        SafetensorError,
        OSError,
        KeyError,
        ValueError,
        RecursionError,
        AttributeError,
    ) as error:
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise _bad(path, f"a file that does not open ({detail})", "a whole index") from error
    if not isinstance(facts, dict) or set(facts) != _FACTS:
        raise _bad(path, "other facts than an index has", ", ".join(sorted(_FACTS)))
    return facts, tensors


def _check_version(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise _bad(path, f"format {serialize.shown(metadata.get('format'))}", FORMAT)
    if metadata.get("version") != VERSION:
        raise InputError(
            str(path),
            got=f"version {serialize.shown(metadata.get('version'))}",
            expected=f"version {VERSION!r}",
            fix="use the kvjax that saved it, or save the index again",
        )


def _whole(path: object, facts: dict[str, Any], name: str) -> int:
    value = facts[name]
    if type(value) is not int or not 0 <= value < 2**31:
        raise _bad(path, f"{name} {serialize.shown(value)}", "a whole number under 2^31")
    return value


def _take(path, tensors: dict[str, np.ndarray], name: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
    """The tensor of that name, if it has the shape and dtype that it should have."""
    dtype = np.dtype(spec.dtype)
    want = serialize.to_bits(np.zeros(0, dtype)).dtype
    kept = tensors.pop(name, None)
    if kept is None or kept.shape != spec.shape or kept.dtype != want:
        got = "nothing" if kept is None else f"{kept.dtype}{list(kept.shape)}"
        raise _bad(path, f"{got} for {name}", f"{want}{list(spec.shape)}")
    return jnp.asarray(serialize.from_bits(kept, dtype))


def _bad(path: object, got: str, expected: str) -> InputError:
    fix = "the file is damaged or no index: save it again with Index.save"
    return InputError(str(path), got=got, expected=expected, fix=fix)
