"""OScaR and QuaRot: their integers against numpy in float64, and their true bits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.methods import get, oscar_canalized, quarot
from kvjax.methods.describe import code_bits

B, H, N, P, D = 1, 4, 2, 64, 128


@functools.cache
def compiled():
    return jax.jit(
        lambda codec, x: codec.decode(codec.encode(x)),
        compiler_options={"xla_backend_optimization_level": 0},
    )


def decoded(codec, x: np.ndarray) -> np.ndarray:
    return np.asarray(compiled()(codec, x), np.float64)


def sylvester(d: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < d:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(d)


def tokens(seed: int, sink: float = 1.0) -> np.ndarray:
    """Normal keys; the fourth token of each page is `sink` times as long."""
    x = np.random.default_rng(9400 + seed).normal(size=(B, H, N, P, D))
    x[:, :, :, 3] *= sink
    return x.astype(np.float32)


def rounded(y: np.ndarray, bits: int, clip: float = 1.0) -> np.ndarray:
    """Min/max integers over the last axis, the range shrunk about its middle."""
    low, high = y.min(-1, keepdims=True), y.max(-1, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2 * clip
    step = 2 * half / (2**bits - 1)
    return np.clip(np.rint((y - middle + half) / step), 0, 2**bits - 1) * step + middle - half


def off_by(got: np.ndarray, want: np.ndarray) -> float:
    """The 0.98 quantile of errors: 16-bit scales move codes that lie between two."""
    return float(np.quantile(np.abs(got - want), 0.98) / want.std())


def test_oscar_keys_are_rotated_divided_and_coded_per_channel():
    x = tokens(0, sink=30)
    length = np.sqrt((x.astype(np.float64) ** 2).sum((1, 4), keepdims=True))
    y = (x / length) @ sylvester(D)
    groups = y.reshape(B, H, N, P // 32, 32, D).swapaxes(-1, -2)
    want = rounded(groups, 2).swapaxes(-1, -2).reshape(y.shape)
    got = decoded(oscar_canalized(2, D).key, x) @ sylvester(D) / length
    assert off_by(got, want) < 0.01  # lengths in bf16 move a token by 0.004 at most


def test_oscar_values_are_rotated_and_coded_per_token():
    x = tokens(1)
    y = (x.astype(np.float64) @ sylvester(D)).reshape(B, H, N, P, D // 32, 32)
    want = rounded(y, 2).reshape(x.shape)
    assert off_by(decoded(oscar_canalized(2, D).value, x) @ sylvester(D), want) < 0.005


@pytest.mark.parametrize("sink", [0.02, 30.0])
def test_one_odd_token_costs_its_neighbours_nothing(sink):
    """What the method is for: KIVI's keys lose range to a long token, these do not."""

    def error(name: str, sink: float) -> float:
        x = tokens(2, sink)
        off = decoded(get(name, D).key, x) - x
        return float((np.delete(off, 3, axis=3) ** 2).mean())

    assert error("oscar-canalized-2", sink) < 1.1 * error("oscar-canalized-2", 1.0)
    if sink > 1:
        assert error("kivi-2", sink) > 3 * error("kivi-2", 1.0)


@pytest.mark.parametrize("side", ["key", "value"])
def test_quarot_is_clipped_integers_under_its_rotation(side):
    x = tokens(3)
    codec = getattr(quarot(4, D, rng=jax.random.key(7)), side)
    signs = np.asarray(codec.transform.signs, np.float64)
    assert 40 < (signs > 0).sum() < 88
    y = (x.astype(np.float64) * signs) @ sylvester(D)
    got = (decoded(codec, x) * signs) @ sylvester(D)
    assert off_by(got, rounded(y, 4, 0.95)) < 0.005
    assert off_by(got, rounded(y, 4)) > 0.05


def test_quarot_has_groups_of_128_where_they_fit():
    at = lambda d: get("quarot-4", d).key.inner.group
    assert (at(64), at(96), at(128), at(192), at(256)) == (None, None, 128, None, 128)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("oscar-canalized-2", 3 + 16 / D, 3),  # 16 bits of scale and of zero for 32, and lengths
        ("oscar-canalized-4", 5 + 16 / D, 5),
        ("quarot-4", 4.25, 4.25),
    ],
)
def test_true_bits(name, key, value):
    method = get(name, D)
    assert code_bits(method.key, D, P) == key
    assert code_bits(method.value, D, P) == value
    shapes = jax.eval_shape(method.key.encode, jax.ShapeDtypeStruct((B, H, N, P, D), jnp.float32))
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes))
    assert 8 * size == key * B * H * N * P * D
