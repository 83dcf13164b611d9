"""`hadamard` in interpret mode against the matrix in float64, and what it lowers to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs.transforms import Hadamard
from pallas_kernels.ahead.lowering import kernels, lower
from pallas_kernels.hadamard import hadamard, hadamard_reference, why_not

run = jax.jit(functools.partial(hadamard, rows=16, backend="interpret"))


def oracle(x, signs):
    """`[i, j]` is -1 to the number of bits that i and j share."""
    d = x.shape[-1]
    matrix = [[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)]
    return (np.asarray(x, np.float64) * signs) @ np.array(matrix) / np.sqrt(d)


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_is_the_transform(d):
    rng = np.random.default_rng(d)
    x = rng.normal(size=(3, 7, d)).astype(np.float32)  # 21 rows: no multiple of a program's
    signs = rng.choice([-1.0, 1.0], d)
    got = run(jnp.asarray(x), jnp.asarray(signs, jnp.float32))
    assert got.shape == x.shape
    assert got.dtype == jnp.float32
    assert error(got, oracle(x, signs)) < 3e-6  # 17 bits of each number


def test_bf16_vectors_lose_nothing_and_few_rows_do():
    """As precise as float32 sums are; 3 rows are fewer than a program takes."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.bfloat16)
    assert error(run(x), oracle(np.asarray(x, np.float64), 1.0)) < 2e-7


def test_same_convention_as_the_codecs():
    x = jax.random.normal(jax.random.key(0), (5, 32))
    transform = Hadamard.random(32, rng=jax.random.key(1))
    want = np.asarray(transform.forward(x), np.float64)
    assert error(run(x, transform.signs), want) < 3e-6
    assert error(hadamard_reference(x, transform.signs), want) < 1e-6


def test_a_row_that_is_not_finite_stays_alone():
    x = jnp.ones((4, 16)).at[2, 3].set(jnp.nan)
    got = np.isnan(run(x))
    assert got[2].all()
    assert not got[[0, 1, 3]].any()


def test_no_rows():
    assert run(jnp.zeros((0, 64))).shape == (0, 64)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowers_for_cuda(dtype):
    x = jax.ShapeDtypeStruct((1000, 256), dtype)
    signs = jax.ShapeDtypeStruct((256,), jnp.float32)
    assert kernels(lower(hadamard, "cuda", x, signs), "cuda") == 1


@pytest.mark.parametrize(
    ("d", "signs", "dtype", "says"),
    [
        (96, None, jnp.float32, "96 channels; expected a power of two"),
        (8, None, jnp.float32, "8 channels"),
        (64, jnp.ones((1, 64)), jnp.float32, "signs"),
        (64, None, jnp.float16, "float16"),
    ],
)
def test_what_it_does_not_take_is_said(d, signs, dtype, says):
    x = jnp.zeros((4, d), dtype)
    assert says in why_not(x, signs)
    with pytest.raises(ValueError, match=says):
        hadamard(x, signs, backend="interpret")
