"""Polar codecs: published centroids and distortions, the transform itself, and pairs under RoPE."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_laws import check_laws, data, pages, queries, weights

from kvjax.codecs import rotated
from kvjax.codecs.polar import Polar, nearest, polar_angles
from kvjax.codecs.polar_pairs import PolarPairs
from kvjax.core.errors import InputError
from kvjax.methods.describe import code_bits

# 2-bit centroids of levels 2 to 4 and their mean squared error; spread of the angle by level.
CENTROIDS = {
    2: ((0.30979, 0.63403, 0.93687, 1.26107), 9.909e-3),
    3: ((0.42629, 0.67444, 0.89646, 1.14458), 6.162e-3),
    4: ((0.52426, 0.70596, 0.86494, 1.04662), 3.393e-3),
}
SPREADS = {2: 0.3418, 3: 0.2476, 4: 0.1763, 5: 0.1249, 6: 0.0884, 7: 0.0625}
# Bits of the levels: true bits per value and squared error of unit vectors of 128.
POINTS = {
    (4, 2, 2, 2): (3.875, 0.0321),
    (3, 2, 2, 2): (3.375, 0.0701),
    (4, 3, 3, 3): (4.3125, 0.0181),
    (4, 2, 2, 2, 2, 2, 2): (3.109375, 0.0352),
    (3, 1, 1, 1): (2.9375, 0.115),
}


def density(level: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of [0, pi / 2] and the probability at each."""
    psi = (np.arange(20_000) + 0.5) / 20_000 * math.pi / 2
    mass = np.sin(2 * psi) ** (2 ** (level - 1) - 1)
    return psi, mass / mass.sum()


@pytest.mark.parametrize("level", CENTROIDS)
def test_centroids_and_error_are_the_published_ones(level):
    centroids = np.array(polar_angles(level, 2))
    golden, error = CENTROIDS[level]
    np.testing.assert_allclose(centroids, golden, atol=1e-4)
    psi, mass = density(level)
    nearest = np.abs(psi[:, None] - centroids).min(-1)
    assert (mass * nearest**2).sum() == pytest.approx(error, rel=2e-3)
    np.testing.assert_allclose(centroids + centroids[::-1], math.pi / 2, rtol=1e-12)


@pytest.mark.parametrize("level", SPREADS)
def test_the_density_is_that_of_rotated_vectors(level):
    """Published spreads, and those of ratios of norms: 20000 samples have 4 sigma of 2 %."""
    psi, mass = density(level)
    spread = math.sqrt((mass * (psi - math.pi / 4) ** 2).sum())
    assert spread == pytest.approx(SPREADS[level], rel=2e-3)
    a, b = (np.sqrt(np.random.default_rng(i).chisquare(2 ** (level - 1), 20_000)) for i in (0, 1))
    assert np.arctan2(b, a).std() == pytest.approx(spread, rel=0.02)
    for bits in (1, 3, 5):  # each centroid is the mean of what is nearest to it
        centroids = np.array(polar_angles(level, bits))
        own = np.abs(psi[:, None] - centroids).argmin(-1)
        means = np.bincount(own, mass * psi) / np.bincount(own, mass)
        np.testing.assert_allclose(means, centroids, atol=1e-4)


def test_distortion_on_rotated_unit_vectors():
    """Two or three digits are published; the error of a vector has a spread of 14 %, so 4096 of
    them have 4 sigma of 0.9 %. 1.5 % is asked."""
    d, x = 128, np.random.default_rng(128).normal(size=(4096, 128))
    x = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    key = jax.random.key(31)
    codecs = [rotated("haar", d, Polar.lloyd_max(bits), rng=key) for bits in POINTS]
    error = lambda c, x: ((c.decode(c.encode(x)) - x) ** 2).sum(-1).mean()
    errors = jax.jit(lambda codecs, x: [error(c, x) for c in codecs])(codecs, x)
    np.testing.assert_allclose(errors, [mse for _, mse in POINTS.values()], rtol=0.015)
    assert [code_bits(c, d, 64) for c in codecs] == [bits for bits, _ in POINTS.values()]


def test_first_level_is_decoded_to_midpoints(quick_jit):
    """Error of the angle (2 pi / 16)^2 / 12 = .01285; the edges of cells would have 4 times that."""
    angle = np.random.default_rng(0).uniform(-math.pi, math.pi, size=(4096, 8))
    x = np.concatenate([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
    for codec in (PolarPairs(radius_bits=1, angle_bits=4), Polar.lloyd_max((4,))):
        back = np.asarray(quick_jit(lambda c, x: c.decode(c.encode(x)))(codec, x))
        error = np.arctan2(back[:, 8:], back[:, :8]) - angle
        error = (error + math.pi) % (2 * math.pi) - math.pi
        assert (error**2).mean() == pytest.approx(0.01285, rel=0.02)
        assert abs(error).max() < math.pi / 16 * 1.001


@pytest.mark.parametrize(("levels", "d"), [(1, 6), (2, 24), (4, 48), (6, 64)])
def test_fine_angles_give_the_vector_back(levels, d, quick_jit):
    """6 bits for every angle: the transform is inverted, up to cells of 2 pi / 64."""
    x = 100 * data(16, d, seed=levels)
    codec = Polar.lloyd_max((6,) * levels, radius_dtype="float32")
    codec.check(d, 16)
    back = quick_jit(lambda c, x: c.decode(c.encode(x)))(codec, x)
    length = np.linalg.norm(x, axis=-1)
    assert (np.linalg.norm(back - x, axis=-1) < 0.06 * length).all()
    np.testing.assert_allclose(np.linalg.norm(back, axis=-1), length, rtol=1e-5)


@pytest.mark.parametrize("bits", [1, 4, 5])
def test_the_nearest_centroid_is_found(bits, quick_jit):
    """By cross products up to 4 bits, by a search on the angle beyond."""
    angles = np.array(polar_angles(3, bits), np.float32)
    a, b = np.abs(data(2, 16, 64, seed=20))
    expected = np.abs(np.arctan2(b, a)[..., None] - angles).argmin(-1)
    np.testing.assert_array_equal(quick_jit(nearest)(a, b, angles), expected)


@pytest.mark.parametrize(
    "codec",
    [
        Polar.lloyd_max((4, 2, 2)),
        Polar.lloyd_max((3,)),
        Polar.lloyd_max((4, 2, 2)).transpose_planes(),
        PolarPairs(),
        PolarPairs(3, 2, "adjacent"),
        PolarPairs(4, 3).transpose_planes(),
    ],
    ids=["3 levels", "1 level", "transposed", "halves", "adjacent", "pairs transposed"],
)
def test_laws_and_zeros(codec, quick_jit):
    check_laws(codec, pages(), queries(), weights())
    x = pages()[0, 0].copy()
    x[0] = 0
    x[1, 3:5] = 0
    back = np.asarray(quick_jit(lambda c, x: c.decode(c.encode(x)))(codec, x))
    np.testing.assert_array_equal(back[(x == 0).all(-1)], 0)
    tiny = quick_jit(lambda c, x: c.decode(c.encode(x)))(codec, np.full_like(x, 1e-40))
    np.testing.assert_array_equal(tiny, 0)


def pairs_oracle(x: np.ndarray, codec: PolarPairs) -> np.ndarray:
    """One pair at a time, in float64, scales rounded as they are stored."""
    d, back = x.shape[-1], np.zeros(x.shape)
    for pair in range(d // 2):
        i, j = (pair, pair + d // 2) if codec.pairing == "halves" else (2 * pair, 2 * pair + 1)
        r, theta = np.hypot(x[:, i], x[:, j]), np.arctan2(x[:, j], x[:, i]) % (2 * math.pi)
        levels = 2**codec.radius_bits - 1
        scale, low = np.float16((r.max() - r.min()) / levels), np.float16(r.min())
        r = np.clip(np.round((r - float(low)) / float(scale)), 0, levels) * float(scale) + low
        step = 2 * math.pi / 2**codec.angle_bits
        theta = (np.floor(theta / step) + 0.5) * step
        back[:, i], back[:, j] = r * np.cos(theta), r * np.sin(theta)
    return back


@pytest.mark.parametrize("pairing", ["halves", "adjacent"])
@pytest.mark.parametrize("bits", [(4, 4), (3, 2), (1, 6)])
def test_pairs_are_the_oracles(pairing, bits, quick_jit):
    x = data(32, 16, seed=30) * np.exp(data(16, seed=31))
    codec = PolarPairs(*bits, pairing)
    back = quick_jit(lambda c, x: c.decode(c.encode(x)))(codec, x)
    np.testing.assert_allclose(back, pairs_oracle(x, codec), atol=1e-5 * abs(x).max())


def test_pairs_follow_rope(quick_jit):
    """One key at 64 positions: its pairs turn, their radii stay. With the pairing of RoPE what is
    left is the error of the angle, .01285 of the power at 4 bits; with another one radii vary."""
    d, t = 32, 64
    angle = np.arange(t)[:, None] * 10_000 ** (-np.arange(d // 2) / (d // 2))
    a, b = data(2, 1, d // 2, seed=32)
    turned = [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
    x = np.concatenate(turned, -1).astype(np.float32)

    def error(codec):
        back = quick_jit(lambda c, x: c.decode(c.encode(x)))(codec, x)
        return float(((back - x) ** 2).sum() / (x**2).sum())

    # Slow pairs hardly turn in 64 positions, so their angles are no fair sample of a cell.
    assert error(PolarPairs(1, 4, "halves")) == pytest.approx(0.01285, rel=0.5)
    assert error(PolarPairs(1, 4, "adjacent")) > 2 * error(PolarPairs(1, 4, "halves"))
    right = quick_jit(PolarPairs(1, 4, "halves").encode)(x)
    assert float(right.scale.max()) < 1e-5


def test_true_bits():
    assert code_bits(Polar.lloyd_max(), 64, 64) == 3.875
    assert code_bits(Polar.lloyd_max(radius_dtype="float32"), 64, 64) == 4.875
    assert code_bits(PolarPairs(4, 4), 128, 64) == 4 + 2 * 16 / (2 * 64)
    assert code_bits(PolarPairs(3, 3), 128, 64) == 3 + 2 * 16 / (2 * 64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Polar.lloyd_max(()),
        lambda: Polar.lloyd_max((9,)),
        lambda: Polar.lloyd_max((4, 0)),
        lambda: Polar.lloyd_max().check(24, 16),
        lambda: Polar.lloyd_max((4, 2)).check(1, 16),
        lambda: Polar.lloyd_max((4, 3)).check(64, 8),
        lambda: Polar((jnp.zeros(3),), (4, 2)).check(64, 16),
        lambda: Polar((), (4, 2)).check(64, 16),
        lambda: PolarPairs(0, 4),
        lambda: PolarPairs(4, 9),
        lambda: PolarPairs(pairing="random"),
        lambda: PolarPairs().check(9, 16),
        lambda: PolarPairs().check(1, 16),
        lambda: PolarPairs().check(8, 6),
        lambda: polar_angles(1, 4),
        lambda: polar_angles(2, 9),
    ],
)
def test_mistakes_are_told(make):
    with pytest.raises(InputError, match=r"got .*; expected .*; "):
        make()
