"""Joint lengths: against numpy in float64, and what is zero, huge, tiny or not finite."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import Dense, Hadamard, Linear, TokenScale, Uniform
from kvjax.core.errors import InputError

B, H, N, P, D = 2, 3, 2, 32, 16


def pages(seed: int = 0) -> np.ndarray:
    """Tokens of very different lengths."""
    rng = np.random.default_rng(6000 + seed)
    lengths = np.exp(2 * rng.normal(size=(B, 1, N, P, 1)))
    return (lengths * rng.normal(size=(B, H, N, P, D))).astype(np.float32)


@functools.cache
def compiled():
    def run(codec, x):
        code = codec.encode(x)
        return codec.decode(code), code.scale

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def run(codec: TokenScale, x) -> tuple[np.ndarray, np.ndarray]:
    """What comes back and the kept lengths `[..., t]`, in float64."""
    x_hat, scale = compiled()(codec, np.asarray(x, np.float32))
    if scale.dtype == jnp.uint16:  # bf16, as its bits
        scale = (np.asarray(scale, np.uint32) << 16).view(np.float32)
    return np.asarray(x_hat, np.float64), np.asarray(scale, np.float64)


def oracle(x: np.ndarray, bits: int, group: int, *, joint: bool) -> np.ndarray:
    """The codec of the paper, in float64 and with nothing rounded but the codes."""
    x = x.astype(np.float64)
    total = (x**2).sum(-1, keepdims=True)
    length = np.sqrt(total.sum(1, keepdims=True) if joint else total)
    d = x.shape[-1]
    matrix = np.ones((1, 1))
    while len(matrix) < d:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.sqrt(d)
    y = (x / length) @ matrix  # symmetric
    y = y.reshape(*x.shape[:-2], -1, group, d)
    low, high = y.min(-2, keepdims=True), y.max(-2, keepdims=True)
    step = (high - low) / (2**bits - 1)
    y = (np.rint((y - low) / step) * step + low).reshape(x.shape)
    return (y @ matrix) * length


@pytest.mark.parametrize("joint", [True, False])
def test_it_is_the_codec_of_the_paper(joint):
    """Up to a few coordinates that lie between two codes, and 16 bits of scales and zeros."""
    x = pages()
    inner = Uniform(2, axis="tokens", group=16, scale_dtype="float32")
    codec = TokenScale(Linear(Hadamard.plain(D), inner), joint, "float32")
    expected = oracle(x, 2, 16, joint=joint)
    length = np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    off = np.abs(run(codec, x)[0] - expected) / length
    assert np.quantile(off, 0.99) < 1e-5
    other = oracle(x, 2, 16, joint=not joint)
    assert np.quantile(np.abs(other - expected) / length, 0.5) > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_length_is_that_of_all_heads(dtype):
    x = pages(1)
    _, scale = run(TokenScale(Dense(jnp.float32), scale_dtype=dtype), x)
    expected = np.sqrt((x.astype(np.float64) ** 2).sum((1, 4)))  # [b, n, t]
    expected = np.broadcast_to(expected[:, None], scale.shape)
    rtol = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 1e-6}[dtype]
    np.testing.assert_allclose(scale, expected, rtol=rtol)
    _, scale = run(TokenScale(Dense(jnp.float32), joint_heads=False, scale_dtype=dtype), x)
    np.testing.assert_allclose(scale, np.linalg.norm(x.astype(np.float64), axis=-1), rtol=rtol)


def test_rounding_of_the_length_is_no_error():
    """bf16 lengths are off by 2^-9 at most; what comes back is not."""
    x = pages(2)
    x_hat, scale = run(TokenScale(Dense(jnp.float32)), x)
    exact = np.sqrt((x.astype(np.float64) ** 2).sum((1, 4)))[:, None]
    assert (abs(scale / exact - 1)).max() > 1e-3
    np.testing.assert_allclose(x_hat, x, rtol=1e-6)


@pytest.mark.parametrize("lead", [(), (H,)])
def test_fewer_axes_have_no_heads(lead):
    """`[t, d]` and `[n, t, d]`: the length of each vector, whatever `joint_heads` says."""
    x = pages(3)[0, :, 0] if lead else pages(3)[0, 0, 0]
    inner = Uniform(3, axis="tokens")
    joint, apart = run(TokenScale(inner), x), run(TokenScale(inner, joint_heads=False), x)
    for a, b in zip(joint, apart, strict=True):
        np.testing.assert_array_equal(a, b)
    norms = np.linalg.norm(x.astype(np.float64), axis=-1)
    np.testing.assert_allclose(joint[1], norms, rtol=2**-8)


def test_heads_may_be_the_first_of_four_axes():
    x = pages(4)
    inner = Uniform(3, axis="tokens")
    whole, first = run(TokenScale(inner), x), run(TokenScale(inner), x[0])
    for a, b in zip(whole, first, strict=True):
        np.testing.assert_array_equal(a[0], b)


def test_a_length_leaves_its_neighbours_alone():
    """Multiplying one token by a power of two changes that token, exactly so, and no other."""
    x = pages(5)
    longer = x.copy()
    longer[:, :, :, 7] *= 1024
    codec = TokenScale(Linear(Hadamard.plain(D), Uniform(2, axis="tokens", group=16)))
    before, after = run(codec, x)[0], run(codec, longer)[0]
    np.testing.assert_array_equal(np.delete(before, 7, 3), np.delete(after, 7, 3))
    np.testing.assert_array_equal(1024 * before[:, :, :, 7], after[:, :, :, 7])


def test_zero_vectors_come_back_as_zeros():
    x = pages(6)
    x[:, :, :, 3] = 0  # a token
    x[:, 1, :, 5] = 0  # one head of a token
    x[1, :, 1] = 0  # a page
    x_hat, scale = run(TokenScale(Linear(Hadamard.plain(D), Uniform(2, axis="tokens"))), x)
    assert (x_hat[:, :, :, 3] == 0).all()
    assert (x_hat[:, 1, :, 5] == 0).all()
    assert (x_hat[1, :, 1] == 0).all()
    assert (scale[:, 1, :, 5] == 0).all()
    assert (scale[0, 0, :, 5] > 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("joint", [True, False])
def test_what_is_not_finite_stays_in_its_token(bad, joint):
    """All heads of it where they share a length; the others as if it had been zero."""
    blank, broken = pages(7), pages(7)
    blank[0, :, 1, 9] = 0
    if not joint:
        blank[0, ::2, 1, 9] = broken[0, ::2, 1, 9]
    broken[0, 1, 1, 9, 4] = bad
    codec = TokenScale(Linear(Hadamard.plain(D), Uniform(2, axis="tokens")), joint)
    expected, x_hat = run(codec, blank)[0], run(codec, broken)[0]
    heads = slice(None) if joint else 1
    assert np.isnan(x_hat[0, heads, 1, 9]).all()
    x_hat[0, heads, 1, 9] = 0
    np.testing.assert_array_equal(x_hat, expected)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e36])
def test_lengths_reach_the_ends_of_float32(size):
    x = pages(8) / np.abs(pages(8)).max((1, 3, 4), keepdims=True)
    codec = TokenScale(Uniform(4, axis="tokens"))
    expected, scaled = run(codec, x)[0], run(codec, x * np.float32(size))[0]
    length = np.sqrt((expected**2).sum((1, 4)))[:, None, ..., None]
    # Another bf16 rounding of the length: other codes here and there, by one step.
    assert (np.abs(scaled / size - expected) / length).max() < 0.2
    assert np.mean(np.abs(scaled / size - expected) / length) < 0.01


def test_float16_lengths_overflow_to_nan():
    x = pages(9)
    x[0, 0, 0, 2] = 1e5
    x_hat, _ = run(TokenScale(Uniform(4, axis="tokens"), scale_dtype="float16"), x)
    assert np.isnan(x_hat[0, :, 0, 2]).all()
    assert np.isfinite(np.delete(x_hat, 2, 3)).all()


def test_bad_dtype():
    with pytest.raises(InputError, match="scale_dtype"):
        TokenScale(Dense(), scale_dtype="int8")
