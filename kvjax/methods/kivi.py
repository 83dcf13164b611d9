"""KIVI: keys per channel, values per token."""

from __future__ import annotations

from kvjax.codecs import Uniform
from kvjax.core.method import Method


def kivi(bits: int, *, group: int = 32) -> Method:
    """Min/max integers: each key channel has a scale and zero per `group` tokens, each value
    token per `group` channels.

    With 16-bit scales and zeros and groups of 32 that is `bits + 1` true bits per value.

    Source: KIVI, arXiv 2402.02750.
    Differs from the paper: keys and values share one window schedule (the layout's), so the exact
    key window never empties, and values are packed a page at a time, not one token per step.

    Example:
      >>> kivi(2).key.axis, kivi(2).value.axis
      ('tokens', 'channels')
    """
    key = Uniform(bits, axis="tokens", group=group)
    return Method(key, Uniform(bits, axis="channels", group=group), name=f"kivi-{bits}")
