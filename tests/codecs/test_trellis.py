"""Trellis codes against an independent decoder and an exhaustive search, and their distortion."""

from __future__ import annotations

import functools
import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import Trellis
from kvjax.core.errors import InputError
from pallas_kernels import planes

WIDTHS = (1, 2, 3, 4, 5)


def sphere(n: int, d: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(4000 + seed).normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@functools.cache
def compiled():
    return jax.jit(lambda codec, x: (codec.encode(x), codec.decode(codec.encode(x))))


def states(codes: np.ndarray, bits: int) -> np.ndarray:
    """The register at each channel, bit string by bit string, as the class's docstring says."""
    out = np.zeros_like(codes)
    for i, row in enumerate(codes):
        text = "".join(format(c, f"0{bits}b") for c in row)
        for j in range(len(row)):
            out[i, j] = int((text * 13)[: 12 * len(text) + (j + 1) * bits][-12:], 2)
    return out


@pytest.mark.parametrize("bits", WIDTHS)
def test_decodes_what_the_definition_says(bits):
    codec = Trellis(bits, std=0.5)
    codes = np.random.default_rng(bits).integers(0, 2**bits, size=(16, 20))
    decoded = codec.decode(planes.pack(jnp.asarray(codes), bits))
    expected = np.asarray(codec.levels(jnp.arange(4096, dtype=jnp.uint16)))[states(codes, bits)]
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_a_permutation_of_normal_quantiles(bits):
    """So that no state is wasted: 4096 different levels, close to the exact quantiles."""
    levels = np.sort(np.asarray(Trellis(bits).levels(jnp.arange(4096, dtype=jnp.uint16))))
    quantile = statistics.NormalDist().inv_cdf
    exact = np.array([quantile((i + 0.5) / 4096) for i in range(4096)])
    spread = levels.std() / exact.std()
    assert 0.85 < spread < 1.15
    np.testing.assert_allclose(levels / spread, exact, atol=0.14)  # the rational form's tails
    np.testing.assert_allclose((levels / spread)[40:-40], exact[40:-40], atol=0.02)
    assert len(np.unique(levels)) == 4096


@pytest.mark.parametrize(("bits", "d"), [(2, 6), (3, 4), (4, 3)])
def test_path_is_the_best_of_those_that_meet_where_it_does(bits, d):
    """All 4096 closed paths of so short a vector can be tried. Only the meeting point is a guess."""
    codes = np.array(list(itertools.product(range(2**bits), repeat=d)))
    every = states(codes, bits)
    levels = np.asarray(Trellis(bits).levels(jnp.arange(4096, dtype=jnp.uint16)), np.float64)
    x = np.random.default_rng(9).normal(size=(16, d)).astype(np.float32)
    words = compiled()(Trellis(bits), x)[0]
    found = states(np.asarray(planes.unpack(words, bits)).astype(int), bits)
    meeting = lambda s: s[:, -1] % (4096 >> bits)  # what the beginning sees of the end
    for vector, path in zip(x, found, strict=True):
        rivals = every[meeting(every) == meeting(path[None])]
        least = ((vector - levels[rivals]) ** 2).sum(-1).min()
        assert ((vector - levels[path]) ** 2).sum() == pytest.approx(least, rel=1e-5)


# Mean squared error of unit vectors of 128 channels; that of 256 has a standard error of 0.5 %.
DISTORTION = {1: 0.2772, 2: 0.0700, 3: 0.0177, 4: 0.0045, 5: 0.00114}


@pytest.mark.parametrize("bits", WIDTHS)
def test_distortion(bits):
    x = sphere(256, 128, seed=bits)
    x_hat = compiled()(Trellis(bits, std=128**-0.5), x)[1]
    error = float(((x - x_hat) ** 2).sum(-1).mean())
    assert error == pytest.approx(DISTORTION[bits], rel=0.02)
    assert error > 4.0**-bits  # Shannon


def test_the_promise_at_two_bits():
    """At most 0.075 at exactly 2 bits of code, where scalar Lloyd-Max has 0.116."""
    x = sphere(256, 128, seed=77)
    words, x_hat = compiled()(Trellis(2, std=128**-0.5), x)
    assert sum(w.nbytes for w in words) * 8 == 2 * x.size
    assert float(((x - x_hat) ** 2).sum(-1).mean()) < 0.075


@pytest.mark.parametrize(("d", "error"), [(13, 0.19), (24, 0.102), (96, 0.071)])
def test_any_dimension(d, error):
    """Short vectors meet their own beginning early, and have more error for it."""
    x = np.random.default_rng(d).normal(size=(16 * (2048 // d), d)).astype(np.float32)
    measured = float(((x - compiled()(Trellis(2), x)[1]) ** 2).mean())
    assert measured == pytest.approx(error, rel=0.04)


def test_too_few_channels_or_another_width():
    for bits, d in ((1, 11), (2, 5), (4, 2), (5, 1)):
        with pytest.raises(InputError, match="or more"):
            Trellis(bits).check(d, 64)
        with pytest.raises(InputError, match="or more"):
            Trellis(bits).encode(jnp.zeros((16, d)))
    for bits in (0, 6, 2.5):
        with pytest.raises(InputError, match="trellis bits"):
            Trellis(bits)
