"""What a method is, in words and true bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from kvjax.attention.encode_kernel import why_not_encode
from kvjax.attention.packed_kernel import GPU_FAMILY, why_not
from kvjax.codecs import Transform, View
from kvjax.core.codec import Codec
from kvjax.core.method import Attention, Method


def describe(method: Method | Sequence[Method], head_dim: int) -> str:
    """The method's tree, its layout, what each part of a code costs, and how attention runs.

    Bits come from the shapes that `encode` gives (`jax.eval_shape`), all side information counted.
    Of methods by layer it is the bits of each kind of layer, their mean, and every kind once.

    Example:
      >>> import kvjax
      >>> print(describe(kvjax.methods.get("int4", head_dim=64), 64).splitlines()[0])
      int4: 4.50 bits per value (keys 4.50, values 4.50), head_dim 64
    """
    if not isinstance(method, Method):
        return _describe_layers(layer_kinds(method), head_dim)
    method.check(head_dim)
    layout = method.layout
    sides = {"keys": method.key}
    keys, values = method_bits(method, head_dim)
    if isinstance(method.value, View):
        of = f"{keys:.2f} bits per value (values are {method.value.width} channels of the keys)"
    else:
        sides["values"] = method.value
        of = f"{(keys + values) / 2:.2f} bits per value (keys {keys:.2f}, values {values:.2f})"
    lines = [
        f"{method.name}: {of}, head_dim {head_dim}",
        f"  exact: {layout.sink} sink and {layout.recent} to {layout.recent + layout.page - 1} "
        f"recent tokens; packed: pages of {layout.page} tokens, each encoded once"
        + (f", in a pool of {layout.pool} pages" if layout.pool is not None else ""),
    ]
    for name, codec in sides.items():
        lines += [f"  {name}", *(f"    {line}" for line in _tree(codec))]
        lines += [f"    = {part}" for part in _parts(codec, head_dim, layout.page)]
    lines += [f"  {line}" for line in implementations(method, head_dim)]
    return "\n".join(lines)


def layer_kinds(methods: Sequence[Method]) -> dict[tuple[int, ...], Method]:
    """Layers whose methods differ in the numbers of their arrays only, and the first of each kind.

    Example:
      >>> import kvjax
      >>> a, b = (kvjax.methods.get(name, head_dim=64) for name in ("int4", "int2"))
      >>> list(layer_kinds((a, b, b, a)))
      [(0, 3), (1, 2)]
    """
    members: dict[object, list[int]] = {}
    for layer, method in enumerate(methods):
        shapes = tuple((a.shape, a.dtype) for a in jax.tree.leaves(method))
        members.setdefault((jax.tree.structure(method), shapes), []).append(layer)
    return {tuple(layers): methods[layers[0]] for layers in members.values()}


def _describe_layers(kinds: dict[tuple[int, ...], Method], head_dim: int) -> str:
    bits = {layers: method_bits(method, head_dim) for layers, method in kinds.items()}
    count = sum(map(len, kinds))
    keys, values = (sum(len(own) * b[side] for own, b in bits.items()) / count for side in (0, 1))
    first = next(iter(kinds.values()))
    lines = [
        f"{first.name}: {(keys + values) / 2:.2f} bits per value (keys {keys:.2f}, values "
        f"{values:.2f}), the mean of {count} layers of {len(kinds)} "
        + ("kinds" if len(kinds) > 1 else "kind, each with arrays of its own"),
        "    bits    keys  values  layers",
        *(
            f"  {(k + v) / 2:6.2f}  {k:6.2f}  {v:6.2f}  {ranges(own)}"
            for own, (k, v) in bits.items()
        ),
    ]
    for layers, method in kinds.items():
        named = dataclasses.replace(method, name=f"layers {ranges(layers)}")
        lines += ["", describe(named, head_dim)]
    return "\n".join(lines)


def ranges(layers: Sequence[int]) -> str:
    """Rising numbers, in short.

    Example:
      >>> ranges((0, 2, 3, 4, 7, 8))
      '0, 2-4, 7-8'
    """
    runs: list[list[int]] = []
    for n in layers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def method_bits(method: Method, head_dim: int) -> tuple[float, float]:
    """True bits per value of keys and of values; 0 for values that are a `View` of their keys."""
    page = method.layout.page
    if isinstance(method.value, View):
        return code_bits(method.key, head_dim, page), 0.0
    return code_bits(method.key, head_dim, page), code_bits(method.value, head_dim, page)


def code_bits(codec: Codec, head_dim: int, page: int) -> float:
    """True bits per value of a page's code."""
    leaves = jax.tree.leaves(_code_shape(codec, head_dim, page))
    return sum(map(_bits, leaves)) / (page * head_dim)


def implementations(method: Method, head_dim: int) -> Iterator[str]:
    """What runs here and on a GPU, and why nothing else does: in a decode step, where pages are
    encoded, and for policies that evict by attention.

    Example:
      >>> import kvjax
      >>> method = kvjax.methods.get("bf16/int4", head_dim=64).with_attention("triton")
      >>> for line in list(implementations(method, 64))[:2]:
      ...     print(line)
      attention: packed_decode as 'triton'; asked for
      encoding of keys: the codec in XLA; no fused kernel on a GPU: Dense codes
    """
    scan = "page scan in XLA, straight from the packed words, memory of one chunk of pages"
    asked, reason = method.attention, why_not(method)
    if reason and asked not in ("auto", "page_scan"):
        yield f"attention: none, {asked!r} is asked for: {reason}"
    else:
        yield f"attention: {_choice(asked, 'packed_decode', scan, reason)}"
    reasons = why_not_encode(method, head_dim)
    if isinstance(method.value, View):
        del reasons["value"]
    sides = {f"encoding of {side}s": reason for side, reason in reasons.items()}
    if len(set(reasons.values())) == 1:
        sides = {"encoding": reasons["key"]}
    for name, reason in sides.items():
        how = _choice(asked, "encode", "the codec in XLA", reason)
        if asked in ("tpu", "jax_triton"):
            how = f"the codec in XLA; {asked!r} is for decode steps alone"
        yield f"{name}: {how}"
    yield f"eviction scores: {_choice('auto', 'probe_scores', 'XLA, queries by blocks', None)}"


def _choice(asked: Attention, kernel: str, other: str, reason: str | None) -> str:
    if asked == "page_scan":
        return f"{other}; asked for"
    if reason:
        return f"{other}; no fused kernel on a GPU: {reason}"
    if asked != "auto":
        return f"{kernel} as {asked!r}; asked for"
    device = jax.default_backend()
    if device in GPU_FAMILY:
        return f"{kernel}, a fused kernel, on this GPU; elsewhere {other}"
    return f"{kernel}, a fused kernel, on a GPU; here, on {device}, {other}"


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
