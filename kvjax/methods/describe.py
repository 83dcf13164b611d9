"""What a method is, in words and true bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kvjax.codecs import Transform
from kvjax.core.codec import Codec
from kvjax.core.method import Method


def describe(method: Method, head_dim: int) -> str:
    """The method's tree, its layout, what each part of a code costs, and how attention runs.

    Bits come from the shapes that `encode` gives (`jax.eval_shape`), all side information counted.

    Example:
      >>> import kvjax
      >>> print(describe(kvjax.methods.get("int4", head_dim=64), 64).splitlines()[0])
      int4: 4.50 bits per value (keys 4.50, values 4.50), head_dim 64
    """
    method.check(head_dim)
    layout = method.layout
    sides = {"keys": method.key, "values": method.value}
    bits = {name: code_bits(codec, head_dim, layout.page) for name, codec in sides.items()}
    lines = [
        f"{method.name}: {sum(bits.values()) / 2:.2f} bits per value "
        f"(keys {bits['keys']:.2f}, values {bits['values']:.2f}), head_dim {head_dim}",
        f"  exact: {layout.sink} sink and {layout.recent} to {layout.recent + layout.page - 1} "
        f"recent tokens; packed: pages of {layout.page} tokens, each encoded once"
        + (f", in a pool of {layout.pool} pages" if layout.pool is not None else ""),
    ]
    for name, codec in sides.items():
        lines += [f"  {name}", *(f"    {line}" for line in _tree(codec))]
        lines += [f"    = {part}" for part in _parts(codec, head_dim, layout.page)]
    lines.append(f"  attention: {attention_choice()}")
    return "\n".join(lines)


def code_bits(codec: Codec, head_dim: int, page: int) -> float:
    """True bits per value of a page's code."""
    leaves = jax.tree.leaves(_code_shape(codec, head_dim, page))
    return sum(map(_bits, leaves)) / (page * head_dim)


def attention_choice() -> str:
    """Which implementation reads the codes, and why no other."""
    return (
        "page scan in XLA, straight from the packed words, memory of one chunk of pages; "
        "no fused kernel, because this version has none"
    )


def _code_shape(codec: Codec, head_dim: int, page: int):
    x = jax.ShapeDtypeStruct((1, 1, 1, page, head_dim), jnp.float32)
    return jax.eval_shape(codec.encode, x, jax.ShapeDtypeStruct((1, 1, 1, page), jnp.int32))


def _bits(leaf: jax.ShapeDtypeStruct) -> int:
    """Of one head: codecs with arrays per head code as many heads as they have."""
    return math.prod(leaf.shape[3:]) * leaf.dtype.itemsize * 8


def _parts(codec: Codec, head_dim: int, page: int) -> Iterator[str]:
    leaves, _ = jax.tree.flatten_with_path(_code_shape(codec, head_dim, page))
    for path, a in leaves:
        cost = _bits(a) / (page * head_dim)
        name = jax.tree_util.keystr(path).lstrip(".") or "code"
        yield f"{cost:.3f} bits  {name}: {a.dtype}{list(a.shape[3:])}"


def _tree(node: Codec | Transform, label: str = "") -> Iterator[str]:
    words, inside = [], []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if isinstance(value, Codec | Transform):
            inside.append((field.name, value))
        elif isinstance(value, jax.Array):
            words.append(f"{field.name}: {value.dtype}{list(value.shape)}")
        elif isinstance(value, tuple) and value and isinstance(value[0], Codec):
            inside += [(f"{field.name}[{i}]", codec) for i, codec in enumerate(value)]
        elif isinstance(value, tuple) and value and isinstance(value[0], jax.Array):
            shapes = ", ".join(str(list(a.shape)) for a in value)
            words.append(f"{field.name}: {value[0].dtype} {shapes}")
        elif value is not None and value is not False:
            words.append(f"{field.name}={value}")
    yield f"{label}{type(node).__name__}({', '.join(words)})"
    for name, child in inside:
        yield from (f"  {line}" for line in _tree(child, f"{name}: "))
