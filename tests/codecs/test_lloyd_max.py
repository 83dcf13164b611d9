"""Codebooks against published numbers and an independent solver; TurboQuant's measured distortion."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from kvjax.codecs import Codebook, Hadamard, Normalized, Orthogonal, distortion, lloyd_max, rotated
from kvjax.codecs.transforms import hadamard_transform
from kvjax.methods import turboquant

GOLDEN = Path(__file__).parent.parent / "golden"
LLOYD_MAX = json.loads((GOLDEN / "lloyd_max.json").read_text())["per_d"]
CONSTANTS = json.loads((GOLDEN / "distortion.json").read_text())


def dimension(name: str) -> int | None:
    return None if name == "gauss" else int(name)


@pytest.mark.parametrize("name", LLOYD_MAX)
def test_levels_and_distortion_are_the_published_ones(name):
    d, golden = dimension(name), LLOYD_MAX[name]
    for bits in range(1, 6):
        levels = np.array(lloyd_max(d, bits))
        assert len(levels) == 2**bits
        assert (np.diff(levels) > 0).all()
        np.testing.assert_array_equal(levels, -levels[::-1])
        # The golden grid is good to about 3 digits at d = 1536 and 4 or 5 bits, to 5 elsewhere.
        rtol = 1e-3 if bits > 3 else 2e-5
        np.testing.assert_allclose(distortion(d, bits), golden["D"][str(bits)], rtol=rtol)
        published = golden["centroids_pos_times_sqrt_d"].get(str(bits))
        if published is not None:
            half = levels[2 ** (bits - 1) :] * (d or 1) ** 0.5
            # Wider than the distortion's: the optimum is flat, and iterations on a grid (ours and
            # the published ones) stop when no edge moves a whole cell. An error of 3e-3 in a level
            # moves the distortion by 3e-6.
            np.testing.assert_allclose(half, published, rtol=4e-3)


@pytest.mark.parametrize(("d", "bits"), [(24, 2), (64, 1), (64, 4), (128, 3), (None, 3)])
def test_an_independent_solver_agrees(d, bits):
    levels, error = oracle.lloyd_max(d, bits)
    np.testing.assert_allclose(lloyd_max(d, bits), levels, rtol=2e-3)  # a flat optimum, as above
    np.testing.assert_allclose(distortion(d, bits), error, rtol=5e-6)


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_high_rates_follow_panter_and_dite(bits):
    """D -> (sqrt(3) pi / 2) 4^-b from below for a normal value."""
    limit = 3**0.5 * np.pi / 2 * 4.0**-bits
    assert 0.9 < distortion(None, bits) / limit < 1


def mean_error(codec, x) -> jax.Array:
    """Squared error of unit vectors."""
    return ((codec.decode(codec.encode(x)) - x) ** 2).sum(-1).mean()


errors = jax.jit(lambda codecs, x: jnp.stack([mean_error(c, x) for c in codecs]))


def turbo(kind: str, d: int, bits: int, seed: int = 0, book: int | None = None):
    inner = Normalized(Codebook.lloyd_max(book or d, bits))
    return rotated(kind, d, inner, rng=jax.random.fold_in(jax.random.key(3), seed))


def unit_vectors(n: int, d: int) -> np.ndarray:
    x = np.random.default_rng(d).normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("kind", ["haar", "hadamard"])
def test_turboquant_reaches_the_published_distortion(kind, d):
    """Within 1 %. A vector's error has a relative deviation of about 1.4 / sqrt(d), so that n
    vectors give 4 sigma = 5.6 / sqrt(d n): 0.8 % for half a million coordinates."""
    x = unit_vectors(2**19 // d, d)
    measured = errors([turbo(kind, d, b) for b in (1, 2, 3, 4)], x)
    golden = [LLOYD_MAX[str(d)]["D"][str(b)] for b in (1, 2, 3, 4)]
    np.testing.assert_allclose(measured, golden, rtol=0.01)


@pytest.mark.parametrize("case", ["d32_b3", "d32_b4", "d96_b2", "d96_b3"])
def test_the_book_belongs_to_its_dimension(case):
    """A sub-vector coded with the book of the whole head of 128: the trap, and what it costs."""
    d, bits = (int(part[1:]) for part in case.split("_"))
    golden = CONSTANTS["subvector_codebook_check"][case]
    codecs = [turbo("haar", d, bits), turbo("haar", d, bits, book=128)]
    right, wrong = errors(codecs, unit_vectors(8192, d))
    # Three digits are published, and 8192 sub-vectors give 4 sigma of about 1 %.
    np.testing.assert_allclose(right, golden["right"][0], rtol=0.02)
    # The published cost is that of the Gaussian book, a little wider than the one for 128.
    np.testing.assert_allclose(wrong, golden["over_sqrt128"][0], rtol=0.05)


def test_outlier_parts_have_the_books_of_their_dimensions():
    """At d = 128, 2.5 bits: 32 channels at 3 bits and 96 at 2, each with its own book."""
    codec = turboquant(2.5, 128, rng=jax.random.key(0)).key
    books = [part.inner.inner.levels for part in (codec.first, codec.second)]
    np.testing.assert_allclose(books[0], lloyd_max(32, 3), rtol=1e-6)
    np.testing.assert_allclose(books[1], lloyd_max(96, 2), rtol=1e-6)
    plain = turboquant(3, 128, rng=jax.random.key(0)).value.inner.inner
    np.testing.assert_allclose(plain.levels, lloyd_max(128, 3), rtol=1e-6)


def test_constant_vectors_reach_the_same_distortion():
    """Signs go before the transform: a DC input then meets random signs and becomes Gaussian-like.

    Mean over 96 rotations of one vector; 4 sigma is 4 * 1.4 / sqrt(96 * 256) = 3.6 %. At 3 and 4
    bits the sums of 256 signs, a lattice of step 2 / 16, are no longer fine against the levels.
    """
    d = 256
    x = jnp.full((16, d), d**-0.5)
    keys = jax.random.split(jax.random.key(11), 96)

    for bits in (1, 2):
        inner = Normalized(Codebook.lloyd_max(d, bits))

        def one(rng, inner=inner):
            return mean_error(rotated("hadamard", d, inner, rng=rng), x)

        measured = jax.jit(jax.vmap(one))(keys).mean()
        np.testing.assert_allclose(measured, LLOYD_MAX[str(d)]["D"][str(bits)], rtol=0.036)


def test_one_hot_vectors():
    """A dense rotation gives them the same distortion. One Hadamard transform makes them flat,
    |y| = 1 / sqrt(d) everywhere, whatever the signs: the error is then that of the level nearest to
    1 / sqrt(d), and not small at every width (0.255 instead of 0.116 at 2 bits)."""
    d = 128
    x = np.eye(d, dtype=np.float32)
    dense = errors([turbo("haar", d, b) for b in (1, 2, 3)], x)
    golden = [LLOYD_MAX[str(d)]["D"][str(b)] for b in (1, 2, 3)]
    np.testing.assert_allclose(dense, golden, rtol=0.05)  # 4 * 1.4 / sqrt(128 * 128) = 4.4 %
    flat = errors([turbo("hadamard", d, b) for b in (1, 2, 3)], x)
    books = [LLOYD_MAX[str(d)]["centroids_pos_times_sqrt_d"][str(b)] for b in (1, 2, 3)]
    nearest = [min((1 - level) ** 2 for level in book) for book in books]
    np.testing.assert_allclose(flat, nearest, rtol=0.01)


@pytest.mark.parametrize("d", [1, 16, 64, 80, 96, 128, 192, 256, 1536])
def test_hadamard_is_orthonormal_and_inverts(d):
    transform = Hadamard.random(d, rng=jax.random.key(d))
    forward = np.asarray(transform.forward(jnp.eye(d)))
    np.testing.assert_allclose(forward @ forward.T, np.eye(d), atol=2e-6)
    np.testing.assert_allclose(transform.inverse(forward), np.eye(d), atol=2e-6)
    np.testing.assert_array_equal(transform.dual(jnp.eye(d)), forward)  # orthogonal: its own dual
    assert abs(forward).max() < (2.9 if d % 3 == 0 or d % 5 == 0 else 1.01) / d**0.5  # DCT: sqrt(2)
    assert (transform.signs == -1).any() or d == 1


def test_hadamard_is_sylvesters_where_it_can_be():
    np.testing.assert_allclose(hadamard_transform(jnp.eye(64)), oracle.hadamard(64), atol=1e-6)
    np.testing.assert_allclose(hadamard_transform(jnp.eye(256)), oracle.hadamard(256), atol=1e-6)


def test_signs_come_first():
    """y = H (s * x): a constant spreads, and the all-signs input becomes one-hot."""
    transform = Hadamard.random(64, rng=jax.random.key(1))
    expected = oracle.hadamard(64) @ np.asarray(transform.signs, np.float64)
    np.testing.assert_allclose(transform.forward(jnp.ones(64)), expected, atol=1e-5)
    spike = np.asarray(transform.forward(transform.signs))
    assert spike[0] == pytest.approx(8)
    np.testing.assert_allclose(spike[1:], 0, atol=1e-5)


def test_haar_rotation_is_orthogonal_and_of_its_key():
    a, b = (Orthogonal.random(96, rng=jax.random.key(i)).matrix for i in (0, 1))
    np.testing.assert_allclose(a @ a.T, np.eye(96), atol=1e-5)
    assert float(abs(a - b).max()) > 0.1


def test_codes_are_nearest_levels():
    for bits in (2, 4, 6):
        book = Codebook.lloyd_max(None, bits)
        x = np.random.default_rng(bits).normal(size=(16, 8)).astype(np.float32) * 1.5
        levels = np.asarray(book.levels)
        nearest = levels[abs(x[..., None] - levels).argmin(-1)]
        round_trip = jax.jit(lambda book, x: book.decode(book.encode(x)))
        np.testing.assert_array_equal(round_trip(book, x), nearest)
