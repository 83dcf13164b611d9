"""Pages straight to words and scales: transform, normalize, quantize and pack in one pass."""

from pallas_kernels.encode.config import Config
from pallas_kernels.encode.forms import Dense, Encoded, Grid, Levels, Walsh
from pallas_kernels.encode.kernel import encode, why_not
from pallas_kernels.encode.reference import encode_reference

__all__ = [
    "Config",
    "Dense",
    "Encoded",
    "Grid",
    "Levels",
    "Walsh",
    "encode",
    "encode_reference",
    "why_not",
]
