"""Small floats for keys and values: what hardware has, as storage."""

from __future__ import annotations

from typing import Literal

from kvjax.codecs.floats import Float4, Float8
from kvjax.core.method import Method


def nvfp4() -> Method:
    """NVFP4: 4-bit floats with an FP8 scale per 16 channels; 4.5 true bits per value.

    Source: NVIDIA's NVFP4 key-value cache.
    Differs from the source: see `Float4`; and numbers are read in float32, not through FP8.

    Example:
      >>> nvfp4().name
      'nvfp4'
    """
    return Method(Float4("nvfp4"), Float4("nvfp4"), name="nvfp4")


def mxfp4() -> Method:
    """MXFP4: 4-bit floats with a power-of-two scale per 32 channels; 4.25 true bits per value.

    Source: OCP Microscaling Formats (MX) v1.0.

    Example:
      >>> mxfp4().name
      'mxfp4'
    """
    return Method(Float4("mxfp4"), Float4("mxfp4"), name="mxfp4")


def fp8(kind: Literal["e4m3", "e5m2"] = "e4m3", *, scaled: bool = True) -> Method:
    """FP8 with a float32 scale per token and head, or a plain cast.

    Args:
      kind: "e4m3" (3 bits of mantissa, to 448) or "e5m2" (2 bits, to 57344).
      scaled: False is serving engines' default, a scale of 1 for everything; numbers over the
        range are then NaN (e4m3) or infinite (e5m2), where engines saturate.

    Source: vLLM's `fp8_per_token_head` and `fp8` cache types.

    Example:
      >>> fp8("e5m2").name
      'fp8-e5m2'
    """
    codec = Float8(kind, scaled=scaled)
    return Method(codec, codec, name=f"fp8-{kind}" + ("" if scaled else "-cast"))
