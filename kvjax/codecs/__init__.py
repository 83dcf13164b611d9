"""Codecs: combinators that hold codecs, and the leaves that hold the bits."""

from kvjax.codecs.centered import Centered
from kvjax.codecs.clipped_uniform import ClippedUniform
from kvjax.codecs.codebook import Codebook
from kvjax.codecs.dense import Dense
from kvjax.codecs.e8 import E8
from kvjax.codecs.floats import Float4, Float8
from kvjax.codecs.linear import Linear, rotated
from kvjax.codecs.lloyd_max import distortion, lloyd_max
from kvjax.codecs.low_rank import LowRank
from kvjax.codecs.normalized import Normalized
from kvjax.codecs.polar import Polar
from kvjax.codecs.polar_pairs import PolarPairs
from kvjax.codecs.qjl import QJL
from kvjax.codecs.residual import Residual
from kvjax.codecs.rotary import Rotary
from kvjax.codecs.rotary_mean import RotaryMean
from kvjax.codecs.sparse import Sparse
from kvjax.codecs.split import Outliers, Split
from kvjax.codecs.straight_through import straight_through
from kvjax.codecs.subspace import Subspace
from kvjax.codecs.tiers import Dropped, Tiers
from kvjax.codecs.token_scale import TokenScale
from kvjax.codecs.transforms import Hadamard, Matrix, Orthogonal, Transform
from kvjax.codecs.trellis import Trellis
from kvjax.codecs.uniform import Uniform
from kvjax.codecs.view import View, latent

__all__ = [
    "E8",
    "QJL",
    "Centered",
    "ClippedUniform",
    "Codebook",
    "Dense",
    "Dropped",
    "Float4",
    "Float8",
    "Hadamard",
    "Linear",
    "LowRank",
    "Matrix",
    "Normalized",
    "Orthogonal",
    "Outliers",
    "Polar",
    "PolarPairs",
    "Residual",
    "Rotary",
    "RotaryMean",
    "Sparse",
    "Split",
    "Subspace",
    "Tiers",
    "TokenScale",
    "Transform",
    "Trellis",
    "Uniform",
    "View",
    "distortion",
    "latent",
    "lloyd_max",
    "rotated",
    "straight_through",
]
