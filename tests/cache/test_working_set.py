"""Working sets: positions that close up behind what was dropped."""

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import Layout, Method
from kvjax.cache import append, attend, put, take
from kvjax.cache.pack_kept import pack, pages_for
from kvjax.cache.working_set import evict, init_working_set, take_in
from kvjax.codecs import Dense
from kvjax.policies import Eviction, KeyNorm
from kvjax.policies.rerotate import turn

LAYOUT = Layout(sink=2, recent=8, page=8)
EXACT = Method(Dense(jnp.float32), Dense(jnp.float32), LAYOUT)
B, H, G, D = 2, 2, 3, 16
TURNS = 10.0 ** -np.linspace(0, 2, D // 2)


def data(t, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(B, t, H, *mid, D)) for mid in ((G,), (), ()))


def rotated(x, positions):
    """`x: [..., d]` at positions that broadcast to `[...]`, in float64."""
    angles = np.asarray(positions, np.float64)[..., None] * TURNS
    a, b = np.split(x, 2, -1)
    c, s = np.cos(angles), np.sin(angles)
    return np.concatenate([a * c - b * s, b * c + a * s], -1)


def test_turn_is_the_rotation_of_the_model():
    x = np.random.default_rng(1).normal(size=(5, D))
    angles = np.arange(5)[:, None] * TURNS
    got = turn(jnp.asarray(x), jnp.cos(angles), jnp.sin(angles))
    np.testing.assert_allclose(got, rotated(x, np.arange(5)), atol=1e-5)


def test_positions_within_the_cache():
    """StreamingLLM's positions: keys stand as if what was dropped had never been, in blocks and
    after packing, and turned once from where they were, so nothing drifts."""
    t, block, budget = 96, 16, 42
    q, k, v = data(t)
    at = np.arange(t)
    rotary = lambda x, extra: jnp.asarray(rotated(x, at.reshape(1, t, *[1] * extra)), jnp.float32)
    eviction = Eviction(KeyNorm(), budget=budget, block=block, positions="cache")
    tokens = init_working_set(
        eviction, kv_heads=H, queries=G, head_dim=D, batch=B, dtype=jnp.float32
    )
    step = jax.jit(take_in)
    turns = jnp.asarray(TURNS, jnp.float32)
    blocks = (rotary(q, 2), rotary(k, 1), jnp.asarray(v, jnp.float32))
    for first in range(0, t, block):
        held = np.asarray(tokens.positions[0])
        cut = (a[:, first : first + block] for a in blocks)
        out, tokens = step(eviction, tokens, *cut, frequencies=turns)
        (tokens,) = evict(eviction, (tokens,), LAYOUT)
    for b in range(B):
        for h in range(H):
            kept = np.sort(held[b, h][held[b, h] >= 0])
            want = oracle(q, k, v, b, h, kept, t - block, np.arange(t - block, t))
            np.testing.assert_allclose(out[b, :, h], want, atol=2e-5)

    # One more token, against what is packed.
    q1, k1, v1 = (a[:, 0] for a in data(1, seed=5))
    q, k, v = (np.concatenate([a, b[:, None]], 1) for a, b in ((q, q1), (k, k1), (v, v1)))
    cache = pack(
        EXACT,
        tokens,
        pages=pages_for(LAYOUT, budget),
        capacity=t + 8,
        tail=2,
        frequencies=turns,
    )
    cache = append(EXACT, cache, *(jnp.asarray(a, jnp.float32) for a in (rotated(k1, t), v1)))
    got = attend(EXACT, cache, jnp.asarray(rotated(q1, t), jnp.float32))
    held = np.asarray(tokens.positions[0])
    for b in range(B):
        for h in range(H):
            kept = np.sort(held[b, h][held[b, h] >= 0])
            want = oracle(q, k, v, b, h, kept, t, np.array([t]))
            np.testing.assert_allclose(got[b, h], want[0], atol=2e-5)


def oracle(q, k, v, b, h, kept, first, rows):
    """Attention `[rows, g, d]`: kept tokens stand just before `first`, the block is causal."""
    place = np.concatenate(
        [first - len(kept) + np.arange(len(kept)), np.arange(first, rows[-1] + 1)]
    )
    which = np.concatenate([kept, np.arange(first, rows[-1] + 1)])
    keys = rotated(k[b, which, h], place)
    out = []
    for row in rows:
        logits = rotated(q[b, row, h], row) @ keys.T / np.sqrt(D)  # [g, n]
        logits = np.where(place <= row, logits, -np.inf)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        out.append(p / p.sum(-1, keepdims=True) @ v[b, which, h])
    return np.stack(out)


def test_sequences_are_taken_out_and_put_back():
    """What was packed travels with its sequence, contiguous or from a pool."""
    q, k, v = data(80)
    for compete in ("head", "layer"):
        eviction = Eviction(KeyNorm(), budget=42, block=80, compete=compete)
        tokens = init_working_set(
            eviction, kv_heads=H, queries=G, head_dim=D, batch=B, dtype=jnp.float32
        )
        given = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
        _, tokens = take_in(eviction, tokens, *given, frequencies=jnp.ones(D // 2))
        (tokens,) = evict(eviction, (tokens,), LAYOUT)
        pages = pages_for(LAYOUT, eviction.slots)
        pool = None if compete == "head" else (H * pages_for(LAYOUT, 42),)
        cache = pack(EXACT, tokens, pages=pages, pool=pool, capacity=99, tail=2)
        ask = jnp.asarray(q[:, 0], jnp.float32)
        both = attend(EXACT, cache, ask)
        assert np.abs(both[0] - both[1]).max() > 0.1
        swapped = take(cache, jnp.array([1, 0]))
        np.testing.assert_allclose(attend(EXACT, swapped, ask[::-1]), both[::-1], atol=1e-6)
        again = put(cache, jnp.array([0]), take(cache, jnp.array([1])))
        one = attend(EXACT, again, ask[jnp.array([1, 1])])
        np.testing.assert_allclose(one, both[jnp.array([1, 1])], atol=1e-6)
