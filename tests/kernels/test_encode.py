"""`encode` in interpret mode against the codecs' own words, and against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import Codebook, Hadamard, Linear, Normalized, Orthogonal, Uniform
from kvjax.core.storage import widen
from pallas_kernels import planes
from pallas_kernels.ahead.lowering import kernels, lower
from pallas_kernels.encode import (
    Config,
    Dense,
    Grid,
    Levels,
    Walsh,
    encode,
    encode_reference,
    why_not,
)
from pallas_kernels.encode.config import heuristic

LEAD, T, D = (2, 3), 32, 32
CONFIG = Config(rows=8, channels=16)  # two pieces of the channels, programs of several pages
HADAMARD = Hadamard.random(D, rng=jax.random.key(0))
HAAR = Orthogonal.random(D, rng=jax.random.key(1))


@functools.partial(jax.jit, static_argnames=("transposed",))
def run(x, form, transform=None, transposed=False):
    return encode(x, form, transform, transposed=transposed, config=CONFIG, backend="interpret")


def vectors(seed, lead=LEAD, t=T, d=D, dtype=jnp.float32):
    """Of lengths over several orders of magnitude."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(3 * rng.normal(size=(*lead, t, 1)))
    return jnp.asarray(rng.normal(size=(*lead, t, d)) * lengths, dtype)


def codes(words, bits, transposed):
    return np.asarray(planes.unpack(words, bits, transposed=transposed)).astype(int)


def check_codes(got, want, distance):
    """Few codes differ, by one, and where they do the value lies at a border.

    Args:
      distance: of each value from the border nearest to it, in units of a step.
    """
    differ = got != want
    assert differ.mean() < 1e-3
    assert np.abs(got - want).max() <= 1
    assert (distance[differ] < 1e-4).all()


CASES = {
    "1 bit, dense": (1, "none", HAAR, Dense(HAAR.matrix), False),
    "2 bits, signs": (2, "norm", HADAMARD, Walsh(HADAMARD.signs), True),
    "3 bits, two planes": (3, "unbiased", HADAMARD, Walsh(HADAMARD.signs), True),
    "4 bits": (4, "least_squares", HADAMARD, Walsh(HADAMARD.signs), False),
}


@pytest.mark.parametrize("case", CASES)
def test_levels_are_those_of_the_codec(case):
    bits, gain, transform, form, transposed = CASES[case]
    codec = Linear(transform, Normalized(Codebook.lloyd_max(D, bits), gain=gain))
    book = codec.inner.inner
    if transposed:
        codec = Linear(transform, Normalized(book.transpose_planes(), gain=gain))
    x = vectors(bits)
    got = run(x, Levels(book.levels, bits, gain), form, transposed)
    want = jax.jit(codec.encode)(x)

    y = np.asarray(transform.forward(x), np.float64)
    u = y / np.linalg.norm(y, axis=-1, keepdims=True)
    levels = np.asarray(book.levels, np.float64)
    edges = (levels[1:] + levels[:-1]) / 2
    step = np.diff(levels).min()
    distance = np.abs(u[..., None] - edges).min(-1) / step
    check_codes(codes(got.words, bits, transposed), codes(want.code, bits, transposed), distance)
    # Shapes are those of the codec, and so are scales, to the rounding of bf16.
    assert [w.shape for w in got.words] == [w.shape for w in want.code]
    assert got.scale.dtype == want.scale.dtype
    np.testing.assert_allclose(widen(got.scale), widen(want.scale), rtol=1e-2)
    assert got.zero is None


@pytest.mark.parametrize(
    ("bits", "group", "transposed"), [(2, None, True), (7, 16, False), (8, None, True)]
)
def test_grids_are_those_of_the_codec(bits, group, transposed):
    codec = Uniform(bits, group=group, clip=0.9, transposed=transposed)
    x = vectors(bits)
    got = run(x, Grid(bits, group, clip=0.9), None, transposed)
    want = jax.jit(codec.encode)(x)
    for mine, theirs in ((got.scale, want.scale), (got.zero, want.zero)):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=1e-6)
    wide = lambda a: np.repeat(np.asarray(a, np.float64), group or D, -1)
    steps = (np.asarray(x, np.float64) - wide(want.zero)) / wide(want.scale)
    distance = np.abs(steps - np.floor(steps) - 0.5)
    check_codes(codes(got.words, bits, transposed), codes(want.words, bits, transposed), distance)


def test_a_grid_after_a_transform_of_bf16():
    """The division by the square root of d is left to the scales."""
    codec = Linear(HADAMARD, Uniform(4))
    x = vectors(9, dtype=jnp.bfloat16)
    got, want = run(x, Grid(4), Walsh(HADAMARD.signs)), jax.jit(codec.encode)(x)
    np.testing.assert_allclose(got.scale, want.scale, rtol=2e-3, atol=1e-6)
    assert (codes(got.words, 4, False) != codes(want.words, 4, False)).mean() < 1e-3


def test_codes_stand_for_the_vectors():
    """Without any codec: 4-bit levels of unit vectors leave a hundredth of the energy."""
    book = Codebook.lloyd_max(D, 4).levels
    x = vectors(3)
    got = run(x, Levels(book, 4), Dense(HAAR.matrix))
    u = np.asarray(book, np.float64)[codes(got.words, 4, False)]
    y = u * np.asarray(widen(got.scale), np.float64)[..., None]
    x64 = np.asarray(x, np.float64)
    share = ((y @ np.asarray(HAAR.matrix, np.float64) - x64) ** 2).sum(-1) / (x64**2).sum(-1)
    assert 0.004 < share.mean() < 0.014


def test_odd_channels_and_pages():
    """48 channels are pieces of 16; 3 rows of words per page do not fill whole programs."""
    x = vectors(4, lead=(3,), t=48, d=48)
    matrix = Orthogonal.random(48, rng=jax.random.key(2)).matrix
    form = Levels(Codebook.lloyd_max(48, 1).levels, 1)
    got, want = run(x, form, Dense(matrix)), jax.jit(encode_reference)(x, form, Dense(matrix))
    assert (codes(got.words, 1, False) != codes(want.words, 1, False)).mean() < 1e-3
    np.testing.assert_allclose(widen(got.scale), widen(want.scale), rtol=1e-2)


def test_zeros_extremes_and_what_is_not_finite():
    """As the codec: zeros have scale 0; the ends of float32 keep their length; NaN stays alone."""
    x = np.array(vectors(5, lead=(), t=16))
    x[1], x[2, 3], x[3, 4] = 0, np.nan, np.inf
    x[4] *= 1e-30 / np.linalg.norm(x[4])
    x[5] *= 1e30 / np.linalg.norm(x[5])
    book = Codebook.lloyd_max(D, 2)
    for gain in ("none", "norm"):
        got = run(jnp.asarray(x), Levels(book.levels, 2, gain))
        want = jax.jit(Normalized(book, gain=gain).encode)(jnp.asarray(x))
        np.testing.assert_array_equal(codes(got.words, 2, False), codes(want.code, 2, False))
        np.testing.assert_allclose(widen(got.scale), widen(want.scale), rtol=1e-2)
    assert np.isnan(widen(got.scale)).nonzero()[0].tolist() == [2, 3]
    assert widen(got.scale)[1] == 0


def test_the_reference_is_the_codec():
    x = vectors(6)
    book = Codebook.lloyd_max(D, 3)
    form = Levels(book.levels, 3, "unbiased")
    got = jax.jit(encode_reference)(x, form, Walsh(HADAMARD.signs))
    want = jax.jit(Linear(HADAMARD, Normalized(book, gain="unbiased")).encode)(x)
    assert (codes(got.words, 3, False) != codes(want.code, 3, False)).mean() < 1e-3
    np.testing.assert_allclose(widen(got.scale), widen(want.scale), rtol=1e-2)


def test_no_pages():
    got = run(jnp.zeros((0, 16, 32)), Grid(3))
    assert [w.shape for w in got.words] == [(0, 2, 32), (0, 1, 32)]
    assert got.zero.shape == (0, 16, 1)


def levels(bits, gain="none"):
    return Levels(jax.ShapeDtypeStruct((2**bits,), jnp.float32), bits, gain)


def matrix(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("form", "transform", "dtype", "transposed"),
    [
        (levels(3, "unbiased"), Walsh(matrix(128)), jnp.bfloat16, True),
        (levels(4), Dense(matrix(128, 128)), jnp.float32, False),
        (Grid(7, group=32), None, jnp.bfloat16, False),
    ],
)
def test_lowers_for_cuda(form, transform, dtype, transposed):
    x = jax.ShapeDtypeStruct((2, 3, 256, 128), dtype)
    text = lower(functools.partial(encode, transposed=transposed), "cuda", x, form, transform)
    assert kernels(text, "cuda") == 1


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("d", [64, 128, 256])
def test_tuning_keeps_words_in_registers(bits, d):
    """At most 96 of a thread's 255 registers hold words that are not yet full."""
    config, widths = heuristic(bits, d), planes.PLANES[bits]
    words = d * sum(widths) // min(widths) * config.rows
    assert words <= 96 * 32 * config.warps or config.rows == 16


@pytest.mark.parametrize(
    ("shape", "form", "transform", "says"),
    [
        ((16, 40), Grid(4), None, "40 channels"),
        ((20, 32), Grid(2), None, "pages of 20"),
        ((16, 32), Grid(9), None, "9 bits"),
        ((16, 32), levels(5), None, "5 bits; expected 1 to 4"),
        ((16, 32), Levels(matrix(2, 4), 2), None, "one book"),
        ((16, 32), levels(2, "most"), None, "'most'"),
        ((16, 96), Grid(4, group=48), None, "groups of 48"),
        ((16, 32), Grid(4), Dense(matrix(4, 32, 32)), "one for all"),
        ((16, 96), Grid(4), Walsh(), "power of two"),
    ],
)
def test_what_it_does_not_take_is_said(shape, form, transform, says):
    x = jnp.zeros(shape)
    assert says in why_not(x, form, transform)
    with pytest.raises(ValueError, match=says):
        encode(x, form, transform, backend="interpret")
