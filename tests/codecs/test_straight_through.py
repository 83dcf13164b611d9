"""Gradients: the identity for vectors, the true derivative of decoding for what a codec holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import Codebook, Hadamard, Linear, Normalized, Trellis, straight_through


def vectors() -> np.ndarray:
    return np.random.default_rng(60).normal(size=(16, 24)).astype(np.float32)


CODECS = {
    "book": lambda: Codebook.lloyd_max(None, 2),
    "turboquant": lambda: Linear(Hadamard.plain(24), Normalized(Codebook.lloyd_max(24, 2))),
    "trellis": lambda: Normalized(Trellis(2, std=24**-0.5), gain="unbiased"),
}


@pytest.mark.parametrize("name", CODECS)
def test_value_is_the_reconstruction_and_gradient_the_identity(name):
    codec, x = CODECS[name](), vectors()
    weight = np.random.default_rng(61).normal(size=x.shape).astype(np.float32)
    value = jax.jit(straight_through)(codec, x)
    np.testing.assert_allclose(value, codec.decode(codec.encode(x)), rtol=1e-4, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: (straight_through(codec, x) * weight).sum()))(x)
    np.testing.assert_array_equal(gradient, weight)


def test_levels_learn_to_be_centroids():
    """The gradient of the squared error by a level is zero where it is the mean of its cell; the
    levels are symmetric, and the positive half stands for both."""
    x = vectors()
    book = Codebook(jnp.array([-1.4, -0.5, 0.5, 1.4]), 2)
    loss = lambda book: ((straight_through(book, x) - x) ** 2).sum()
    gradient = np.asarray(jax.grad(loss)(book).levels)
    nearest = np.abs(np.abs(x)[..., None] - np.array([0.5, 1.4])).argmin(-1)
    for i, level in enumerate((0.5, 1.4)):
        expected = 2 * (level - np.abs(x)[nearest == i]).sum()
        assert gradient[2 + i] == pytest.approx(expected, rel=1e-4)
    np.testing.assert_array_equal(gradient[:2], 0)
