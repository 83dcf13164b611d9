"""Attention of one query per sequence over packed pages."""

from pallas_kernels.packed_decode.kernel import packed_decode
from pallas_kernels.packed_decode.reference import packed_decode_reference

__all__ = ["packed_decode", "packed_decode_reference"]
