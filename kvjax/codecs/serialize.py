"""A codec as plain data, and back: a JSON tree of class names and choices, and named arrays.

What an index or a calibration artefact keeps beside its codes. Nothing is executed on reading: a
spec can name only kvjax's own codecs and transforms, and each of its values must have the type
that the class declares.
"""

from __future__ import annotations

import dataclasses
import functools
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kvjax.codecs.transforms import Transform
from kvjax.core.codec import Codec
from kvjax.core.errors import InputError, known

Spec = dict[str, Any]
Arrays = dict[str, np.ndarray]

_BIT_WIDTHS = {1: np.uint8, 2: np.uint16}  # how floats that numpy has not are kept, by itemsize
_DEEPEST = 32  # codecs within codecs; Python's own stack is the other limit
_LARGEST = 2**31  # static whole numbers are counts and widths


def dump(codec: Codec) -> tuple[Spec, Arrays]:
    """`codec` as a tree that JSON can hold, and its arrays by their path in it.

    Dtypes among the choices are kept by name. Arrays of bf16 or float8 come out as their bits, so
    that any array format can hold them; the spec has the true dtype.

    Args:
      codec: any value made of kvjax's codecs and transforms.
    Returns:
      `(spec, arrays)`; `restore` is the inverse.
    Raises:
      InputError: a class that is not kvjax's, or a value that is no number, name, dtype or array.

    Example:
      >>> from kvjax.codecs import Codebook, Normalized
      >>> spec, arrays = dump(Normalized(Codebook.lloyd_max(64, 2), "unbiased", "float16"))
      >>> spec["class"], spec["fields"]["scale_dtype"], {k: a.shape for k, a in arrays.items()}
      ('Normalized', {'dtype': 'float16'}, {'inner.levels': (4,)})
      >>> restore(spec, arrays).gain
      'unbiased'
    """
    arrays: Arrays = {}
    return _dump(codec, "", arrays), arrays


def restore(spec: object, arrays: Mapping[str, np.ndarray]) -> Codec:
    """The codec of `dump(codec)`, equal to it in structure, choices and arrays.

    Raises:
      InputError: a spec of another form, a class or dtype that is not known, a value of another
        type than its field, or an array that is missing, superfluous or misshapen.
    """
    left = dict(arrays)
    codec = _restore(spec, "", left, 0)
    if not isinstance(codec, Codec):
        raise _bad("codec", type(codec).__name__, "a codec")
    if left:
        raise _bad("codec", f"arrays without a place ({', '.join(sorted(left))})", "none left over")
    return codec


def to_bits(a: jax.Array | np.ndarray) -> np.ndarray:
    """`a` on the host, floats that numpy does not know (bf16, float8) as unsigned integers."""
    host = np.asarray(a)
    return host if host.dtype.isbuiltin == 1 else host.view(_BIT_WIDTHS[host.dtype.itemsize])


def from_bits(a: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The inverse of `to_bits` for an array that had `dtype`."""
    return a if dtype.isbuiltin == 1 else a.view(dtype)


def dtype_of(name: object) -> np.dtype:
    """The number dtype of that name, bf16 and float8 included.

    Raises:
      InputError: no such dtype.
    """
    try:
        dtype = np.dtype(getattr(ml_dtypes, name, name)) if isinstance(name, str) else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or not (jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_):
        raise _bad("dtype", shown(name), "the name of a number type")
    return dtype


@functools.cache
def known_classes() -> dict[str, type]:
    """What a spec may name: the codecs and transforms of `kvjax.codecs`, and the dataclasses of
    kvjax that their fields are declared to hold."""
    from kvjax import codecs  # here, so that the package may export this module

    waiting = [value for value in vars(codecs).values() if isinstance(value, type)]
    found: dict[str, type] = {}
    while waiting:
        cls = waiting.pop()
        ours = dataclasses.is_dataclass(cls) and cls.__module__.startswith("kvjax.")
        if not ours or cls in (Codec, Transform) or cls.__name__ in found:
            continue
        found[cls.__name__] = cls
        waiting += [t for hint in _hints(cls).values() for t in _classes_in(hint)]
    return found


def shown(value: object) -> str:
    """Something that was read, as a short line: however deep or long it is."""
    return " ".join(reprlib.repr(value).split())[:80]


def _dump(value: Any, path: str, arrays: Arrays) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_dump(v, _join(path, i), arrays) for i, v in enumerate(value)]}
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    if isinstance(value, jax.Array | np.ndarray) and not jax.dtypes.issubdtype(
        value.dtype, jax.dtypes.extended
    ):
        arrays[path] = to_bits(value)
        return {"array": path, "dtype": value.dtype.name, "shape": list(value.shape)}
    cls = type(value)
    if cls in known_classes().values():
        fields = {
            f.name: _dump(getattr(value, f.name), _join(path, f.name), arrays)
            for f in dataclasses.fields(cls)
        }
        return {"class": cls.__name__, "fields": fields}
    raise InputError(
        f"codec, {path or 'itself'}",
        got=cls.__name__,
        expected="a kvjax codec or transform, a number, a name, a dtype, a tuple or an array",
        fix="keep only such values in the fields of what is to be saved",
    )


def _restore(node: Any, path: str, left: dict[str, np.ndarray], depth: int) -> Any:
    if node is None or type(node) in (bool, float, str):
        return node
    if type(node) is int and abs(node) < _LARGEST:
        return node
    form = set(node) if isinstance(node, dict) else set()
    if depth < _DEEPEST:
        if form == {"tuple"} and isinstance(node["tuple"], list):
            parts = enumerate(node["tuple"])
            return tuple(_restore(v, _join(path, i), left, depth + 1) for i, v in parts)
        if form == {"dtype"}:
            return dtype_of(node["dtype"])
        if form == {"array", "dtype", "shape"}:
            return _array(node, path, left)
        if form == {"class", "fields"} and isinstance(node["fields"], dict):
            return _instance(node["class"], node["fields"], path, left, depth)
    raise _bad(path, shown(node), "a value as `dump` writes it")


def _array(node: Spec, path: str, left: dict[str, np.ndarray]) -> jax.Array | np.ndarray:
    """The array of that path, taken out of `left`; 64-bit ones stay numpy's, jax would cut them."""
    dtype = dtype_of(node["dtype"])
    if node["array"] != path or path not in left:
        raise _bad(path, f"no array {shown(node['array'])}", f"an array named {path!r}")
    kept = left.pop(path)
    want = dtype if dtype.isbuiltin == 1 else np.dtype(_BIT_WIDTHS[dtype.itemsize])
    if list(kept.shape) != node["shape"] or kept.dtype != want:
        raise _bad(path, f"{kept.dtype}{list(kept.shape)}", f"{want}{shown(node['shape'])}")
    value = from_bits(kept, dtype)
    return jnp.asarray(value) if jax.dtypes.canonicalize_dtype(dtype) == dtype else value


def _instance(name: Any, nodes: Spec, path: str, left: dict[str, np.ndarray], depth: int) -> Any:
    classes = known_classes()
    cls = classes.get(name) if isinstance(name, str) else None
    if cls is None:
        raise _bad(path, f"class {shown(name)}", known(sorted(classes)))
    hints = _hints(cls)
    if set(nodes) != set(hints):
        raise _bad(f"{path} ({name})", known(sorted(nodes))[:200], known(sorted(hints)))
    values = {k: _restore(v, _join(path, k), left, depth + 1) for k, v in nodes.items()}
    for field, value in values.items():
        if not _fits(value, hints[field]):
            got = "None" if value is None else type(value).__name__
            raise _bad(_join(path, field), got, f"what {name}.{field} holds, {hints[field]}")
    try:
        return cls(**values)
    except InputError:
        raise
    except Exception as error:  # whatever a constructor makes of values that no one meant
        raise _bad(f"{path} ({name})", f"{type(error).__name__} on making it", "a codec") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` has the declared type; numbers are strict, so that True is not 1."""
    if hint is Any:
        return True
    if hint is np.dtype or get_origin(hint) is np.dtype:
        return isinstance(value, np.dtype)
    if get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple or hint is tuple:
        parts = get_args(hint)
        if not isinstance(value, tuple) or not parts:
            return isinstance(value, tuple)
        if parts[-1] is Ellipsis:
            return all(_fits(v, parts[0]) for v in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is jax.Array:
        return isinstance(value, jax.Array | np.ndarray)
    if hint is float:
        return type(value) in (int, float)
    if hint in (bool, int, str, type(None)):
        return type(value) is hint
    return isinstance(value, hint) if isinstance(hint, type) else False


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Declared types of the fields of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _classes_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type):
        yield hint
    for part in get_args(hint):
        yield from _classes_in(part)


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _bad(where: str, got: str, expected: str) -> InputError:
    fix = "the data is damaged, or of another version of kvjax: save it again"
    where = where if where.startswith(("codec", "dtype")) else f"codec, {where or 'itself'}"
    return InputError(" ".join(where.split())[:200], got=got, expected=expected, fix=fix)
