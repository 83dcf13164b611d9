"""Keys before RoPE and subspaces of several heads, against float64 written from the equations."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Layout, Method
from kvjax.codecs import Dense, Rotary, Subspace, Uniform
from kvjax.codecs.subspace import most_group_heads
from kvjax.core.errors import InputError
from kvjax.generate import make_plan
from kvjax.generate.evict import start_working
from kvjax.models.config import known_configs
from kvjax.parallel import ShardingRules, make_mesh
from kvjax.policies import Eviction, Streaming

B, H, N, P, G, D = 1, 6, 2, 48, 2, 16
FREQUENCIES = 50.0 ** -np.linspace(0, 1, D // 2)
EXACT = Dense(jnp.float32)


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(700 + seed).normal(size=shape)


def turned(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """RoPE on complex numbers."""
    z = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * np.exp(1j * positions[..., None] * FREQUENCIES)
    return np.concatenate([z.real, z.imag], -1)


def basis(heads: int, rank: int) -> np.ndarray:
    """`[groups, heads D, rank]` of orthonormal columns."""
    return np.linalg.qr(draw(H // heads, heads * D, heads * D, seed=1))[0][..., :rank]


def subspace(heads: int, rank: int, inner=EXACT) -> Subspace:
    maps = jnp.asarray(basis(heads, rank).reshape(H, 1, D, rank), jnp.float32)
    return Subspace(maps, maps, inner, heads)


@functools.cache
def run():
    def all_of(codec, x, at, q, p):
        code = codec.encode(x, at)
        acc = jax.tree.map(lambda a: a.sum(2, keepdims=True), codec.accumulate(p, code))
        logits = codec.logits(codec.prepare(q), code)
        return code, codec.decode(code), logits, codec.restore(acc)

    return jax.jit(all_of)


def single(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def test_codes_are_of_keys_before_rope():
    """Each page at a place of its own, up to position 131071."""
    before = draw(B, H, N, P, D, seed=2)
    starts = np.array([37, 131072 - P])
    positions = (starts[:, None] + np.arange(P))[None, None]  # [1, 1, n, p]
    x = turned(before, positions)
    q, p = draw(B, H, 1, G, D, seed=3), draw(B, H, N, G, P, seed=4)
    codec = Rotary(jnp.asarray(FREQUENCIES, jnp.float32), EXACT)
    x32, q32, p32 = single(x, q, p)
    code, decoded, logits, out = run()(codec, x32, jnp.asarray(positions), q32, p32)
    assert code.start.dtype == jnp.int32
    assert (np.asarray(code.start) == starts).all()
    np.testing.assert_allclose(code.code[:, :, 0], before[:, :, 0], atol=1e-5)
    # Angles of 2^17 radians are rounded to 2^-7 in float32; what goes back the same way is not.
    np.testing.assert_allclose(code.code, before, atol=4 * 2**-6)
    np.testing.assert_allclose(decoded, x, atol=2e-5)
    want = np.einsum("bhgd,bhnpd->bhngp", q[:, :, 0], x)
    np.testing.assert_allclose(logits, want, atol=1e-4)
    want = np.einsum("bhngp,bhnpd->bhgd", p, x)[:, :, None]
    np.testing.assert_allclose(out, want, atol=1e-4)


@pytest.mark.parametrize(("heads", "rank"), [(1, 6), (3, 12)])
def test_heads_of_a_group_are_projected_together(heads, rank):
    """x_hat = B B^T x for the joint vector of each group."""
    x, q = draw(B, H, N, P, D, seed=5), draw(B, H, 1, G, D, seed=6)
    p = draw(B, H, N, G, P, seed=7)
    want = np.empty_like(x)
    for i, own in enumerate(basis(heads, rank)):
        group = slice(i * heads, (i + 1) * heads)
        joint = np.concatenate(list(x[0, group]), -1)  # [n, p, heads D]
        joint = joint @ own @ own.T
        want[0, group] = np.stack(np.split(joint, heads, -1))
    at = jnp.broadcast_to(jnp.arange(P), (1, 1, N, P))
    x32, q32, p32 = single(x, q, p)
    code, decoded, logits, out = run()(subspace(heads, rank), x32, at, q32, p32)
    assert code.shape == (B, H, N, P // heads, rank)
    np.testing.assert_allclose(decoded, want, atol=1e-5)
    np.testing.assert_allclose(logits, np.einsum("bhgd,bhnpd->bhngp", q[:, :, 0], want), atol=1e-4)
    out_want = np.einsum("bhngp,bhnpd->bhgd", p, want)[:, :, None]
    np.testing.assert_allclose(out, out_want, atol=1e-4)


def test_in_the_cache_at_true_bytes():
    """300 tokens through the cache against attention over the decoded pages; real bytes."""
    layout = kvjax.Layout(sink=4, recent=96, page=96)
    key = Rotary(jnp.asarray(FREQUENCIES, jnp.float32), subspace(3, 24, Uniform(4)))
    method = kvjax.Method(key, subspace(2, 8, Uniform(3)), layout=layout)
    q, k, v = single(*(draw(1, 300, H, D, seed=s) for s in (8, 9, 10)))
    make = lambda: kvjax.init(method, capacity=300, kv_heads=H, head_dim=D, dtype=jnp.float32)
    _, cache = jax.jit(lambda c: kvjax.prefill(method, c, k, v))(make())
    got = jax.jit(lambda c: kvjax.attend(method, c, q[:, -1][:, :, None]))(cache)[:, :, 0]
    at = (4 + jnp.arange(192)).reshape(1, 1, 2, 96)
    held = []
    for codec, given in ((method.key, k), (method.value, v)):
        x = np.array(given.transpose(0, 2, 1, 3), np.float64)
        inside = jnp.asarray(x[:, :, 4:196].reshape(1, H, 2, 96, D), jnp.float32)
        x[:, :, 4:196] = np.asarray(codec.decode(codec.encode(inside, at))).reshape(1, H, 192, D)
        held.append(x)
    scores = np.einsum("bhd,bhtd->bht", np.asarray(q[:, -1], np.float64), held[0]) / np.sqrt(D)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(got, np.einsum("bht,bhtd->bhd", weights, held[1]), atol=3e-5)
    # 24 coordinates of 4 bits for three heads, 8 of 3 for two, with float16 scale and zero; a page
    # of keys has its position once per head, and the cache one for all heads.
    bits = (24 * 4 + 32) / (3 * D), (8 * 3 + 32) / (2 * D)
    starts = 32 / (96 * D), 32 / (H * 96 * D)
    assert kvjax.cache.history_bits_per_value(method, cache) == pytest.approx(
        (sum(bits) + sum(starts)) / 2
    )
    from kvjax.methods.describe import method_bits

    assert method_bits(method, D) == pytest.approx((bits[0] + starts[0], bits[1]))


def test_mistakes_are_told():
    frequencies = jnp.asarray(FREQUENCIES, jnp.float32)
    with pytest.raises(InputError, match="8 frequencies; expected 16"):
        Rotary(frequencies, EXACT).check(32, P)
    with pytest.raises(InputError, match=r"two of \[..., 32, r\]"):
        Rotary(frequencies, subspace(1, 4)).inner.check(32, P)
    with pytest.raises(InputError, match="page: got 64 tokens for 3 heads"):
        subspace(3, 7).check(D, 64)
    with pytest.raises(InputError, match="whole 16-bit words"):
        subspace(3, 7, Uniform(4)).check(D, 9)
    wide = jnp.ones((H, 1, D, D + 1))
    with pytest.raises(InputError, match="rank: got 17 for 1 heads of 16"):
        Subspace(wide, wide, EXACT).check(D, P)
    with pytest.raises(InputError, match="group_heads: got 4 of 6"):
        Subspace(wide, wide, EXACT, 4).check(D, P)
    with pytest.raises(InputError, match="expected a divisor of the KV heads, and maps for each"):
        Subspace(wide[0, 0], wide[0, 0], EXACT, 2).check(D, P)
    for shape in ((4, P, D), (B, 3, N, P, D)):
        with pytest.raises(InputError, match=r"\[b, 6, n, t, d\]"):
            subspace(2, 4).encode(jnp.ones(shape))


def test_groups_stay_together():
    """On one device, and over the same tokens."""
    config = dataclasses.replace(known_configs()["smollm2-135m"], layers=2, windows=(), kv_heads=3)
    basis = jnp.zeros((3, 1, 64, 96))
    codec = Subspace(basis, basis, Uniform(4), group_heads=3)
    method = Method(codec, Rotary(jnp.ones(32), codec), Layout(sink=4, recent=48, page=48))
    assert most_group_heads(method.value) == 3
    ShardingRules(make_mesh(1, 1, 2)).check(config, (method,), 1)
    with pytest.raises(InputError, match="1 of them on a device"):
        ShardingRules(make_mesh(1, 3, 1)).check(config, (method,), 1)
    plan = make_plan(config, method)
    with pytest.raises(InputError, match="in which 3 heads share coordinates"):
        start_working(plan, Eviction(Streaming(), 128), batch=1)
