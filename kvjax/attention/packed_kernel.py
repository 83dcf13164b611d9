"""Attention over packed pages by one fused kernel, where the codecs and the device allow it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.attention.packed_form import key_form, value_form
from kvjax.attention.packed_form import why_not as why_not_codec
from kvjax.core.codec import Array, Code
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.partial import EMPTY_LSE, Partial
from pallas_kernels.packed_decode import packed_decode, triton_backend

GPU_FAMILY = ("gpu", "cuda")


def why_not(method: Method, *, group: int = 1) -> str | None:
    """Why decode steps of this method do not go through `packed_decode`, or None if they could.

    Args:
      group: query heads per KV head.
    """
    for side, codec in (("key", method.key), ("value", method.value)):
        reason = why_not_codec(codec, side, method.layout.page)  # type: ignore[arg-type]
        if reason:
            return f"{side}s: {reason}"
    if method.layout.page % 16:
        return f"pages of {method.layout.page} tokens, not of a multiple of 16"
    if group > 16:
        return f"{group} query heads per KV head, beyond 16"
    return None


def backend(method: Method, *, group: int = 1) -> str | None:
    """What `packed_decode` is to run as, or None for the page scan.

    Raises:
      InputError: the method asks for a kernel by name, and no kernel takes it, or its compiler is
        not installed.
    """
    if method.attention == "page_scan":
        return None
    reason = why_not(method, group=group)
    if method.attention == "auto":
        return "triton" if reason is None and jax.default_backend() in GPU_FAMILY else None
    if reason:
        raise InputError(
            "attention",
            got=f"{method.attention!r} for {method.name}: {reason}",
            expected="a method that the kernel reads",
            fix="use attention='auto' or 'page_scan', or another codec",
        )
    absent = triton_backend.why_absent() if method.attention == "jax_triton" else None
    if absent:
        raise InputError(
            "attention",
            got=f"'jax_triton' with {absent}",
            expected="triton and jax_triton",
            fix=triton_backend.INSTALL,
        )
    return method.attention


def attend_pages(
    method: Method,
    pages: tuple[Code, Code],
    q: Array,
    lengths: Array,
    *,
    layer: Array | int,
    backend: str,
    table: Array | None = None,
    starts: Array | None = None,
    position: Array | None = None,
    window: int | None = None,
) -> Partial:
    """Attention of one position per sequence over packed pages of one layer.

    Args:
      pages: codes of keys and values, leaves `[l, b, h, n, ...]`, or `[l, pool, h, ...]`.
      q: `[b, h, g, d]` float32, scaled.
      lengths: `[b]` int32, tokens in the slots. The rest as `packed_decode`.
    """
    if table is not None:  # slots without a page are read with weights of 0, which do not hide NaN:
        table = jnp.where(table < 0, table[:, :1], table)  # as pages of the sequence's own
    key = key_form(method.key, pages[0], q[:, :, None])
    parts, restore = value_form(method.value, pages[1])
    out, lse = packed_decode(
        key.q[:, :, 0],
        key.parts,
        parts,
        lengths,
        page=method.layout.page,
        layer=layer,
        table=table,
        starts=starts,
        position=position,
        window=window,
        backend=backend,  # type: ignore[arg-type]
    )
    seen = lse > EMPTY_LSE / 2
    shift = jnp.broadcast_to(key.shift, (*q.shape[:2], 1, q.shape[2]))[:, :, 0]
    out = jnp.where(seen[..., None], restore(out[:, :, None])[:, :, 0], 0.0)
    return Partial(out, jnp.where(seen, lse + shift, EMPTY_LSE))
