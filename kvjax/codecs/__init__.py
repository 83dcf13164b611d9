"""Codecs: combinators that hold codecs, and the leaves that hold the bits."""

from kvjax.codecs.centered import Centered
from kvjax.codecs.codebook import Codebook
from kvjax.codecs.dense import Dense
from kvjax.codecs.linear import Linear, rotated
from kvjax.codecs.lloyd_max import distortion, lloyd_max
from kvjax.codecs.normalized import Normalized
from kvjax.codecs.qjl import QJL
from kvjax.codecs.residual import Residual
from kvjax.codecs.split import Outliers, Split
from kvjax.codecs.transforms import Hadamard, Matrix, Orthogonal, Transform
from kvjax.codecs.uniform import Uniform

__all__ = [
    "QJL",
    "Centered",
    "Codebook",
    "Dense",
    "Hadamard",
    "Linear",
    "Matrix",
    "Normalized",
    "Orthogonal",
    "Outliers",
    "Residual",
    "Split",
    "Transform",
    "Uniform",
    "distortion",
    "lloyd_max",
    "rotated",
]
