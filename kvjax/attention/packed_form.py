"""Codec trees as the plain arrays that kernels read: words, levels and scales.

A codec that kernels take is a chain: something done to the query (or to the output) once per step,
then leaves whose codes are whole numbers or levels of a codebook, with a scale per token or per
channel. `why_not` names what breaks the chain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp

from kvjax.codecs import (
    QJL,
    Centered,
    Codebook,
    Dense,
    Dropped,
    Linear,
    Normalized,
    Residual,
    Split,
    Tiers,
    TokenScale,
    Uniform,
    View,
)
from kvjax.core.codec import Array, Code, Codec
from pallas_kernels.packed import Block, Packed, Part

Side = Literal["key", "value"]


def why_not(codec: Codec, side: Side, page: int) -> str | None:
    """Why kernels do not read the codes of this codec in pages of `page` tokens, or None where they
    do."""
    match codec:
        case Linear() | Centered():
            return why_not(codec.inner, side, page)
        case Normalized() | TokenScale():
            if not _bare(codec.inner):
                return f"{_name(codec)} over scales of its own: two scales per token"
            return why_not(codec.inner, side, page)
        case Tiers():
            return next(filter(None, (why_not(c, side, page) for c in codec.codecs)), None)
        case Split() | Residual():
            return why_not(codec.first, side, page) or why_not(codec.second, side, page)
        case Codebook():
            if codec.bits <= 3:
                return None
            products = 2 ** (codec.bits - 1)
            return f"a codebook of {codec.bits} bits: {products} products per value, which spill"
        case Uniform():
            if codec.axis == "tokens" and side == "value":
                return "values with scales of channels"
            if codec.axis == "tokens" and codec.group not in (None, page):
                return f"scales of channels over {codec.group} tokens, pages of {page}"
            return None
        case Dense():
            return None if codec.dtype == jnp.bfloat16 else f"{codec.dtype} numbers"
        case QJL() | Dropped():
            return None
        case View():
            return "a view of the keys, which the kernel would read twice"
    return f"{_name(codec)} codes"


class KeyForm(NamedTuple):
    """What the logits of packed keys are made of: `q @ unpack(parts).T + shift`.

    Attributes:
      q: `[b, h, 1, g, d']`, channels of all parts one after the other.
      shift: `[b, h, 1, g]`, the same for all packed tokens.
    """

    q: Array
    parts: Packed
    shift: Array


def key_form(codec: Codec, code: Code, q: Array) -> KeyForm:
    """Keys and query in the kernels' form, for a codec that `why_not` has nothing against.

    Args:
      code: leaves `[l, b, h, n, ...]`, of all layers, or `[l, pool, h, ...]`.
      q: `[b, h, 1, g, d]` float32, scaled.
    """
    zero = jnp.zeros(q.shape[:-1])
    match codec:
        case Linear():
            return key_form(codec.inner, code, codec.transform.dual(q))
        case Centered():
            form = key_form(codec.inner, code, q)
            return form._replace(shift=form.shift + (q * codec.mean).sum(-1))
        case Normalized() | TokenScale():
            form = key_form(codec.inner, code.code, q)
            return form._replace(parts=(_scaled(form.parts, code.scale),))
        case Tiers():
            tiers = zip(codec.codecs, code, codec.parts(q), strict=True)
            return _together([key_form(*tier) for tier in tiers if not _dropped(tier[0])])
        case Split():
            sets = zip((codec.first, codec.second), code, codec.parts(q), strict=True)
            return _together([key_form(*one) for one in sets])
        case Residual():
            terms = zip((codec.first, codec.second), code, strict=True)
            return _together([key_form(inner, c, q) for inner, c in terms])
        case QJL():
            part = _scaled((Part((_signs(codec, code.signs),)),), code.norm)
            return KeyForm(codec.prepare(q), (part,), zero)
    return KeyForm(q, _leaf(codec, code), zero)


def value_form(codec: Codec, code: Code) -> tuple[Packed, Callable[[Array], Array]]:
    """Values in the kernels' form, and what turns `[b, h, 1, g, d']` sums into outputs."""
    match codec:
        case Linear():
            parts, restore = value_form(codec.inner, code)
            return parts, lambda out: codec.transform.inverse(restore(out))
        case Centered():
            parts, restore = value_form(codec.inner, code)
            return parts, lambda out: restore(out) + codec.mean
        case Normalized() | TokenScale():
            parts, restore = value_form(codec.inner, code.code)
            return (_scaled(parts, code.scale),), restore
        case Tiers():
            forms = [
                _nothing(c) if _dropped(inner) else value_form(inner, c)
                for inner, c in zip(codec.codecs, code, strict=True)
            ]
            return _joined(forms, lambda pieces: jnp.concatenate(pieces, -1))
        case Split():
            inner = (codec.first, codec.second)
            forms = [value_form(c, part) for c, part in zip(inner, code, strict=True)]
            return _joined(forms, lambda pieces: codec.join(*pieces))
        case Residual():
            inner = (codec.first, codec.second)
            forms = [value_form(c, part) for c, part in zip(inner, code, strict=True)]
            return _joined(forms, lambda pieces: pieces[0] + pieces[1])
        case QJL():
            part = _scaled((Part((_signs(codec, code.signs),)),), code.norm)
            return (part,), codec.restore
    return _leaf(codec, code), lambda out: out


def _leaf(codec: Codec, code: Code) -> Packed:
    if isinstance(codec, Dense):
        return (Part((Block((code,), None, 16, 0, code.shape[-1]),)),)
    if isinstance(codec, Codebook):
        return (Part((_block(code, codec.bits, codec.transposed, codec.levels),)),)
    assert isinstance(codec, Uniform)
    half = (2**codec.bits - 1) / 2 if codec.symmetric else 0.0
    whole = _block(code.words, codec.bits, codec.transposed, None, half)
    if codec.axis == "tokens":
        one = lambda a: None if a is None else a.reshape(*a.shape[:-2], a.shape[-1])
        return (Part((whole,), channel_scale=one(code.scale), channel_zero=one(code.zero)),)
    groups = code.scale.shape[-1]
    width = whole.size // groups
    return tuple(
        Part(
            (dataclasses.replace(whole, start=i * width, size=width),),
            token_scale=code.scale,
            token_zero=code.zero,
            column=i,
        )
        for i in range(groups)
    )


def _block(words, bits: int, transposed: bool, levels, offset: float = 0.0) -> Block:
    channels = words[0].shape[-2 if transposed else -1]
    return Block(words, levels, bits, 0, channels, offset, transposed)


def _signs(codec: QJL, words) -> Block:
    return _block(words, 1, codec.transposed, jnp.array([-1.0, 1.0]))


def _scaled(parts: Packed, scale: Array | None) -> Part:
    """Parts without scales as one, with a scale per token."""
    return Part(tuple(block for part in parts for block in part.blocks), token_scale=scale)


def _together(forms: list[KeyForm]) -> KeyForm:
    parts = tuple(part for form in forms for part in form.parts)
    if all(not _has_scales(part) for part in parts):
        parts = (_scaled(parts, None),)
    q = jnp.concatenate([form.q for form in forms], -1)
    return KeyForm(q, parts, sum((form.shift for form in forms), jnp.zeros(())))


def _joined(forms, join) -> tuple[Packed, Callable[[Array], Array]]:
    sizes = [sum(part.size for part in parts) for parts, _ in forms]
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    parts = tuple(part for own, _ in forms for part in own)
    if all(not _has_scales(part) for part in parts):
        parts = (_scaled(parts, None),)

    def restore(out: Array) -> Array:
        pieces = jnp.split(out, stops, axis=-1)
        return join([back(x) for (_, back), x in zip(forms, pieces, strict=True)])

    return parts, restore


def _nothing(code: Array) -> tuple[Packed, Callable[[Array], Array]]:
    """The form of `Dropped`: no channels read, zeros given back."""
    channels = code.shape[-2]
    return (), lambda out: jnp.zeros((*out.shape[:-1], channels))


def _has_scales(part: Part) -> bool:
    return any(
        a is not None
        for a in (part.token_scale, part.token_zero, part.channel_scale, part.channel_zero)
    )


def _dropped(codec: Codec) -> bool:
    return isinstance(codec, Dropped)


def _bare(codec: Codec) -> bool:
    """Whether codes have no scale of their own."""
    match codec:
        case Codebook() | Dropped():
            return True
        case Tiers():
            return all(map(_bare, codec.codecs))
        case Split():
            return _bare(codec.first) and _bare(codec.second)
        case Linear():
            return _bare(codec.inner)
    return False


def _name(codec: Codec) -> str:
    return type(codec).__name__
