"""OScaR: keys rotated, every token divided by its length over all heads, then KIVI's integers."""

from __future__ import annotations

from kvjax.codecs import Hadamard, Linear, TokenScale, Uniform
from kvjax.core.method import Method


def oscar_canalized(bits: int, head_dim: int, *, group: int = 32) -> Method:
    """Canalized rotation and omni-token scaling, under min/max integers as in KIVI.

        keys:    n_t = |k_t| over all KV heads;  H k_t / n_t;  per channel, over `group` tokens
        values:  H v_t;  per token, over `group` channels

    H is the plain normalized Hadamard matrix, without random signs. KIVI's scales of keys span
    tokens, and a token much longer or shorter than the rest (a sink, an image patch) sets or wastes
    the range of its whole group; no rotation of channels mends that, dividing by lengths does.

    With 16-bit scales and zeros and groups of 32 that is `bits + 1` true bits per value, and for
    keys `16 / head_dim` more: one bf16 length per token and KV head.

    Args:
      bits: 1 to 8; 2 in the paper.
      head_dim: dimension of a key or value, a multiple of `group`.
      group: tokens (keys) or channels (values) that share a scale.

    Source: OScaR, arXiv 2605.19660. Another method is OSCAR (arXiv 2605.17757).
    Differs from the paper: the length is kept once per KV head (see `TokenScale`), which is
    `16 (h - 1)` bits per token and layer more than one bf16 number; zero points are kept as they
    are, in 16 bits, where the released code rounds them to whole codes; values are rotated back
    once per step, not in the weights (`calibrate.fold` does that); exact tokens are the layout's,
    sinks among them, where the released code has no sinks and empties its buffer a block at a time.

    Example:
      >>> method = oscar_canalized(2, 64)
      >>> method.name, type(method.key).__name__, method.value.inner.axis
      ('oscar-canalized-2', 'TokenScale', 'channels')
    """
    hadamard = Hadamard.plain(head_dim)
    key = TokenScale(Linear(hadamard, Uniform(bits, axis="tokens", group=group)))
    value = Linear(hadamard, Uniform(bits, axis="channels", group=group))
    return Method(key, value, name=f"oscar-canalized-{bits}")
