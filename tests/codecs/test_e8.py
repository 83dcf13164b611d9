"""E8 codes against all 65536 points, and their distortion."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import E8, Residual
from kvjax.codecs.e8 import STEP, patterns
from kvjax.core.errors import InputError
from pallas_kernels import planes


@functools.cache
def every_point() -> np.ndarray:
    """`[65536, 8]` in lattice steps, from the definition: signs free but for an even sum."""
    signs = 1 - 2 * ((np.arange(256)[:, None] >> np.arange(8)) & 1)
    points = (patterns()[:, None].astype(np.float64) * signs).reshape(-1, 8)
    points = points[points.sum(-1) % 2 == 0]
    return np.concatenate([points + 0.25, points - 0.25])


@functools.cache
def compiled():
    return jax.jit(lambda codec, x: (codec.encode(x), codec.decode(codec.encode(x))))


def test_points_are_different_and_of_a_shifted_e8():
    points = every_point()
    assert len(np.unique(points, axis=0)) == 2**16
    # E8 + 1/4: doubled differences are integers of one parity, with a sum divisible by 4.
    moved = 2 * (points - 0.25)
    assert (moved == np.round(moved)).all()
    parity = moved % 2
    assert (parity == parity[:, :1]).all()
    assert (moved.sum(-1) % 4 == 0).all()
    assert len(np.unique(patterns(), axis=0)) == 256


def test_nearest_of_all_points_is_found():
    x = np.random.default_rng(3).normal(size=(16, 64)).astype(np.float32)
    x_hat = np.asarray(compiled()(E8(), x)[1], np.float64).reshape(-1, 8)
    groups = x.astype(np.float64).reshape(-1, 8)
    points = every_point() * STEP
    least = [((points - group) ** 2).sum(-1).min() for group in groups]
    np.testing.assert_allclose(((groups - x_hat) ** 2).sum(-1), least, rtol=1e-5)


def test_every_code_is_a_point_of_its_own():
    """Decoding reaches all 65536 points: no code is wasted, none lies elsewhere."""
    index = np.arange(2**16)
    codes = (index[:, None] >> (2 * np.arange(8))) & 3
    decoded = E8(std=1 / STEP).decode(planes.pack(jnp.asarray(codes.reshape(2**13, 64)), 2))
    decoded = np.asarray(decoded, np.float64).reshape(-1, 8)
    expected = every_point()
    order = lambda a: a[np.lexsort(a.T)]
    np.testing.assert_allclose(order(decoded.round(4)), order(expected), atol=1e-6)


def test_the_promise_at_two_bits():
    """At most 0.095 at exactly 2 bits of code on unit vectors of 128 channels."""
    x = np.random.default_rng(5).normal(size=(512, 128))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    words, x_hat = compiled()(E8(std=128**-0.5), x)
    assert sum(w.nbytes for w in words) * 8 == 2 * x.size
    assert float(((x - x_hat) ** 2).sum(-1).mean()) == pytest.approx(0.0894, rel=0.02)


def test_twice_for_four_bits():
    x = np.random.default_rng(6).normal(size=(512, 128)).astype(np.float32)
    codec = Residual(E8(), E8(0.3))
    error = float(((x - compiled()(codec, x)[1]) ** 2).mean())
    assert error < 0.0095  # scalar Lloyd-Max


def test_groups_of_eight_only():
    with pytest.raises(InputError, match="multiple of 8"):
        E8().check(20, 64)
    with pytest.raises(InputError, match="multiple of 8"):
        E8().encode(jnp.zeros((16, 1)))
