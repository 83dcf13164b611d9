"""Pages to codes by one fused kernel, where the codec and the device allow it; else by the codec.

A codec that the kernel takes is a chain: a mean taken out, a transform of the channels, then codes
of a codebook with a length per token, or whole numbers on a grid per token. `why_not` names what
breaks the chain. Keys and values are judged each by itself.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.attention.packed_kernel import GPU_FAMILY
from kvjax.codecs import (
    Centered,
    Codebook,
    Hadamard,
    Linear,
    Matrix,
    Normalized,
    Orthogonal,
    Uniform,
)
from kvjax.codecs.normalized import NormalizedCode
from kvjax.codecs.uniform import UniformCode
from kvjax.core.codec import Array, Code, Codec
from kvjax.core.method import Method
from kvjax.core.storage import widen
from pallas_kernels import encode as kernel

SCALES = (jnp.bfloat16, jnp.float16, jnp.float32)


def encode_page(method: Method, codec: Codec, kept: Array, positions: Array) -> Code:
    """`codec.encode` of pages, by the kernel where `backend` says so.

    The kernel does the same arithmetic in another order: a code differs, by one, where a value lies
    within its rounding of a border, and a scale in its last bit.

    Args:
      method: whose key or value codec this is.
      kept: `[..., p, d]` as a cache keeps exact tokens (see `core.storage`).
      positions: `[..., p]`.
    """
    how = backend(method, codec, kept.shape[-1])
    if how is None:
        return codec.encode(widen(kept), positions)
    x = jax.lax.bitcast_convert_type(kept, jnp.bfloat16) if kept.dtype == jnp.uint16 else kept
    return _encode(codec, x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32), how)


def backend(method: Method, codec: Codec, head_dim: int) -> Literal["triton", "interpret"] | None:
    """What the kernel is to run as for one codec of a method, or None for the codec itself.

    A method that asks for a kernel by name means its decode steps: a codec that this kernel does
    not take encodes its pages itself.
    """
    if method.attention not in ("auto", "triton", "interpret"):
        return None
    if why_not(codec, head_dim, method.layout.page) is not None:
        return None
    if method.attention == "auto":
        return "triton" if jax.default_backend() in GPU_FAMILY else None
    return "interpret" if method.attention == "interpret" else "triton"


def why_not_encode(method: Method, head_dim: int) -> dict[str, str | None]:
    """Of "key" and of "value", why the kernel does not encode it, or None where it could.

    Example:
      >>> import kvjax
      >>> why_not_encode(kvjax.methods.get("kivi-2/turboquant-2", head_dim=64), 64)
      {'key': 'scales of channels', 'value': None}
    """
    sides = {"key": method.key, "value": method.value}
    return {name: why_not(codec, head_dim, method.layout.page) for name, codec in sides.items()}


def why_not(codec: Codec, head_dim: int, page: int) -> str | None:
    """Why the kernel does not encode pages of `page` vectors of `head_dim` with this codec, or
    None where it does."""
    chain = _chain(codec)
    if isinstance(chain, str):
        return chain
    x = jax.ShapeDtypeStruct((page, head_dim), jnp.float32)
    return kernel.why_not(x, chain.form, chain.transform)  # type: ignore[arg-type]


class Chain(NamedTuple):
    """A codec as the kernel knows it.

    Attributes:
      means: taken from the vectors one after the other, each as in `Centered`.
      transform, form: as `pallas_kernels.encode` has them.
      leaf: the codec that makes the codes.
    """

    means: tuple[Array, ...]
    transform: kernel.Dense | kernel.Walsh | None
    form: kernel.Levels | kernel.Grid
    leaf: Codec


def _chain(codec: Codec) -> Chain | str:
    """The chain, or what breaks it."""
    if isinstance(codec, Centered):
        inner = _chain(codec.inner)
        return inner if isinstance(inner, str) else inner._replace(means=(codec.mean, *inner.means))
    transform: Any = None
    if isinstance(codec, Linear):
        match codec.transform:
            case Hadamard():
                transform = kernel.Walsh(codec.transform.signs)
            case Orthogonal() | Matrix():
                transform = kernel.Dense(codec.transform.matrix)
            case other:
                return f"a transform by {type(other).__name__}"
        codec = codec.inner
    form = _form(codec)
    return form if isinstance(form, str) else Chain((), transform, form, codec)


def _form(codec: Codec) -> kernel.Levels | kernel.Grid | str:
    match codec:
        case Normalized(inner=Codebook() as book):
            if codec.search > 1:
                return f"a search over {codec.search} lengths"
            if codec.metric is not None:
                return "errors weighed by a metric"
            if codec.scale_dtype not in SCALES:
                return f"scales in {codec.scale_dtype}"
            return kernel.Levels(book.levels, book.bits, codec.gain, codec.scale_dtype.name)
        case Uniform():
            if codec.axis == "tokens":
                return "scales of channels"
            if codec.symmetric:
                return "a grid without a zero point"
            if codec.scale_dtype not in SCALES:
                return f"scales in {codec.scale_dtype}"
            return kernel.Grid(codec.bits, codec.group, codec.clip, codec.scale_dtype.name)
    return f"{type(codec).__name__} codes"


def _encode(codec: Codec, x: Array, how: Literal["triton", "interpret"]) -> Code:
    chain = _chain(codec)
    assert not isinstance(chain, str)
    for mean in chain.means:
        x = x.astype(jnp.float32) - mean
    leaf = chain.leaf.inner if isinstance(chain.leaf, Normalized) else chain.leaf
    assert isinstance(leaf, Codebook | Uniform)
    code = kernel.encode(x, chain.form, chain.transform, transposed=leaf.transposed, backend=how)
    if isinstance(leaf, Codebook):
        return NormalizedCode(code.words, code.scale)
    plain = lambda a: jax.lax.bitcast_convert_type(a, leaf.scale_dtype) if _bits(a) else a
    return UniformCode(code.words, plain(code.scale), plain(code.zero))


def _bits(a: Array | None) -> bool:
    """Whether these are the bits of bf16 numbers, which `Uniform` keeps as numbers."""
    return a is not None and a.dtype == jnp.uint16
