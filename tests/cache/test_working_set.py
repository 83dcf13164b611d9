"""Working sets: positions that close up behind what was dropped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import Layout, Method
from kvjax.cache import append, attend, fork, put, take
from kvjax.cache.pack_kept import pack, pages_for
from kvjax.cache.working_set import evict, init_working_set, take_in
from kvjax.codecs import Dense
from kvjax.core.errors import InputError
from kvjax.policies import H2O, Eviction, KeyNorm
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
        with pytest.raises(InputError, match=r"rows: got \[2\]; expected sequences 0 to 1"):
            take(cache, jnp.array([2]))
        with pytest.raises(InputError, match=r"rows: got \[-3\]"):
            put(cache, jnp.array([-3]), again)
        with pytest.raises(InputError, match="rows: got 2"):
            fork(cache, 0, 2)


def one_block(eviction, t):
    tokens = init_working_set(
        eviction, kv_heads=H, queries=G, head_dim=D, batch=B, dtype=jnp.float32
    )
    given = (jnp.asarray(a, jnp.float32) for a in data(t))
    return take_in(eviction, tokens, *given, frequencies=jnp.ones(D // 2))[1]


def test_blocks_that_are_too_long_are_refused():
    """They would be written over what was kept."""
    eviction = Eviction(KeyNorm(), budget=42, block=16)
    assert (one_block(eviction, 16).length == 16).all()
    with pytest.raises(InputError, match="block: got 17 tokens; expected at most 16"):
        one_block(eviction, 17)


def test_groups_of_layers_draw_each_for_itself():
    """Of two groups with the same tokens other values are handed on."""
    eviction = Eviction(H2O(), budget=8, block=32, merge="values", rng=jax.random.key(3))
    tokens = one_block(eviction, 32)
    a, b = evict(eviction, (tokens, tokens), None)
    np.testing.assert_array_equal(a.positions, b.positions)
    assert (np.asarray(a.value) != np.asarray(b.value)).any()


def with_verdict(tokens, stays, mass):
    """Tokens that a policy has scored 1 or 0, and noted `mass` of."""
    cast = lambda a: jnp.broadcast_to(jnp.asarray(a, jnp.float32), tokens.score.shape)
    return dataclasses.replace(tokens, score=cast(stays), mass=cast(mass))


def test_draws_go_on_when_the_longest_sequence_has_ended():
    """Luck is new for every block, also while only the shorter ones grow."""
    merging = {"merge": "values", "rng": jax.random.key(3), "sink": 0}
    eviction = Eviction(H2O(), budget=8, block=32, **merging)
    tokens = one_block(eviction, 32)
    tokens = with_verdict(tokens, tokens.positions % 4 == 3, np.linspace(0, 1, 40))
    lengths = (jnp.array([[40, n]], jnp.int32) for n in (32, 33))
    a, b = (evict(eviction, (dataclasses.replace(tokens, length=n),), None)[0] for n in lengths)
    np.testing.assert_array_equal(a.positions, b.positions)
    assert (np.asarray(a.value)[:, 1] != np.asarray(b.value)[:, 1]).any()


def test_one_value_is_handed_on_whole_or_lost():
    """Of nine tokens one leaves, with half the mass of the others: its heirs get equal shares half
    of the time, else nobody gets anything."""
    t, gone, outcomes = 9, 3, []
    tokens = one_block(Eviction(H2O(), budget=t, block=t), t)
    leaves = tokens.positions == gone
    tokens = with_verdict(tokens, ~leaves, jnp.where(leaves, 0.5, 1.0))
    tokens = dataclasses.replace(tokens, block=t + 1)
    drop, value = jax.jit(evict), np.asarray(tokens.value[0, :, :, t:])  # in order of position
    stay = [n for n in range(t) if n != gone]
    for seed in range(16):
        merging = {"merge": "values", "rng": jax.random.key(seed), "sink": 0}
        (left,) = drop(Eviction(H2O(), budget=t - 1, block=t + 1, **merging), (tokens,), None)
        assert (left.positions[0, :, :, : t - 1] == jnp.array(stay)).all()
        got = np.asarray(left.value[0, :, :, : t - 1]) - value[:, :, stay]
        np.testing.assert_array_equal(got[:, :, :gone], 0)
        merged = (got[:, :, gone:] != 0).any((2, 3))
        share = np.where(merged[..., None], value[:, :, gone] / (t - 1 - gone), 0)
        want = np.repeat(share[:, :, None], t - 1 - gone, 2)
        np.testing.assert_allclose(got[:, :, gone:], want, atol=1e-5)
        outcomes += merged.ravel().tolist()
    assert abs(np.mean(outcomes) - 0.5) < 4 * 0.5 / np.sqrt(len(outcomes))
