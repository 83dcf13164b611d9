"""Every family over every kind of code that docs/families.md claims: real tokens, real bytes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Layout, Method
from kvjax.cache import history_bits_per_value
from kvjax.codecs import LowRank, Residual, Rotary, Sparse, Subspace, Uniform
from kvjax.codecs import latent as latent_codecs
from kvjax.generate import forward_block, init_caches, make_plan
from kvjax.generate.evict import feed, pack_all, start_working
from kvjax.methods.describe import code_bits, method_bits
from kvjax.models.config import layer_runs
from kvjax.models.decoder import logits, rope_frequencies
from kvjax.models.layer_map import pairs
from kvjax.models.load import load
from kvjax.models.to_mla import joint_moments, to_mla
from kvjax.policies import Eviction, SnapKV
from kvjax.select import Selection, forward_selected, init_indexer, init_selected
from kvjax.train.distill import distillation_loss, init_adapter

TINY = Path(__file__).parent / "models" / "tiny" / "llama"
LAYOUT = Layout(sink=2, recent=32, page=32)
T, STEPS, CAPACITY = 162, 2, 192
# A grid per token, one per channel, levels after a rotation, paths of a trellis; bf16 to compare.
CODES = ("int8", "channels-2", "turboquant-2", "trellis-2")
RANK = 16  # of the 32 channels of both heads
run_block = jax.jit(forward_block)


@functools.cache
def llama():
    model = load(TINY, dtype="float32")
    config = dataclasses.replace(model.config, max_positions=4096)
    return dataclasses.replace(model, config=config)


def tokens(count: int) -> np.ndarray:
    draw = np.random.default_rng(5)
    return draw.integers(3, llama().config.vocab_size, (1, T + STEPS), np.int32)[:, :count]


def named(code: str, channels: int = 16) -> Method:
    if code == "channels-2":  # as KIVI's, whose groups are wider than these heads
        return Method(Uniform(2, axis="tokens"), Uniform(2), LAYOUT)
    return kvjax.methods.get(code, channels, layout=LAYOUT)


def decoded(plan, params):
    """Logits `[STEPS, V]` of steps after a prompt, and the caches."""
    caches = init_caches(plan, batch=1, capacity=CAPACITY, dtype=jnp.float32)
    _, caches, _ = run_block(plan, params, caches, tokens(T))
    return stepped(plan, params, caches)


def stepped(plan, params, caches):
    found = []
    for t in range(T, T + STEPS):
        hidden, caches, finite = run_block(plan, params, caches, tokens(t + 1)[:, t:])
        assert bool(finite.all())
        found.append(logits(params, plan.config, hidden)[0, 0])
    return np.stack(found), caches


def residual(code: str):
    """GEAR: outliers and a thin product beside the code."""
    plain, d = named(code), llama().config.head_dim
    thin = LowRank.random(d, 2, rng=jax.random.key(0))
    sides = ((plain.key, "tokens"), (plain.value, "channels"))
    key, value = (Sparse(Residual(codec, thin), 2, axis) for codec, axis in sides)
    found, caches = decoded(make_plan(llama().config, Method(key, value, LAYOUT)), llama().params)
    bits = history_bits_per_value(Method(key, value, LAYOUT), caches[0])
    return found, bits, np.mean(method_bits(Method(key, value, LAYOUT), d)) + starts(2)


def low_rank(code: str):
    """Palu: coordinates of both heads together, of keys before RoPE."""
    config = llama().config
    inner = named(code, RANK)
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (32, 32)))[0][:, :RANK]
    group = basis.reshape(2, 1, 16, RANK)
    turns = jnp.asarray(rope_frequencies(layer_runs(config)[0], 16), jnp.float32)
    key = Rotary(turns, Subspace(group, group, inner.key, 2))
    method = Method(key, Subspace(group, group, inner.value, 2), LAYOUT)
    found, caches = decoded(make_plan(config, method), llama().params)
    # RANK numbers stand for the 32 of a token, and each head keeps those of half the page's tokens;
    # a page has its position in the keys of each head.
    own = np.mean([code_bits(side, RANK, 16) for side in (inner.key, inner.value)]) * RANK / 32
    return found, history_bits_per_value(method, caches[0]), own + starts(2) + starts(1)


def latent(code: str):
    """Latent attention of full rank, all heads rotary: the rotary part is coded, too."""
    model = llama()
    moments = joint_moments(model.params, model.config, jnp.asarray(tokens(T)))
    made = to_mla(model, moments, rank=32, rope_heads=2)
    rank, width = made.config.latent.rank, made.config.head_dim
    parts = named(code, rank).key, rank, width, named(code, width - rank).key
    method = Method(*latent_codecs(*parts), LAYOUT)
    found, caches = decoded(make_plan(made.config, method), made.params)
    own = code_bits(method.key, width, 32) + starts(1, width)
    return found, history_bits_per_value(method, caches[0]), own


def fewer_layers(code: str):
    """Two of the three layers own a cache."""
    config = dataclasses.replace(llama().config, layer_map=pairs(3))
    method = named(code)
    found, caches = decoded(make_plan(config, method), llama().params)
    assert sum(cache.length.shape[0] for cache in caches) == 2
    bits = history_bits_per_value(method, caches[0])
    return found, bits, np.mean(method_bits(method, 16)) + starts(2)


def fewer_tokens(code: str):
    """SnapKV over both heads alike: what stays is packed."""
    method, eviction = named(code), Eviction(SnapKV(window=8), budget=98, block=54)
    plan = make_plan(llama().config, method)
    caches = start_working(plan, eviction, batch=1, dtype=jnp.float32)
    for first in range(0, T, 54):
        block = tokens(first + 54)[:, first:]
        _, caches, _ = feed(plan, llama().params, eviction, caches, block, np.array([54], np.int32))
    caches = pack_all(plan, eviction, caches, room=STEPS)
    found, caches = stepped(plan, llama().params, caches)
    kept = caches[0].kept
    assert 0 < int((kept.positions >= 0).sum()) < 3 * 2 * T * 0.6  # layers, heads, tokens
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((kept.key, kept.value)))
    return found, size * 8 / (2 * kept.positions.size * 16), np.mean(method_bits(method, 16))


def fewer_reads(code: str):
    """Each layer reads what an indexer chooses, here all that is packed."""
    model, method = llama(), named(code)
    plan = make_plan(model.config, method)
    indexers = init_indexer(model.config.d_model, layers=3, heads=2, width=8, rng=jax.random.key(1))
    chosen = Selection(indexers, "FFF", 128)
    state = init_selected(plan, chosen, batch=1, capacity=CAPACITY, dtype=jnp.float32)
    forward = jax.jit(forward_selected)
    _, state = forward(plan, model.params, chosen, state, tokens(T))
    found = []
    for t in range(T, T + STEPS):
        hidden, state = forward(plan, model.params, chosen, state, tokens(t + 1)[:, t:])
        found.append(logits(model.params, model.config, hidden)[0, 0])
    np.testing.assert_allclose(found, decoded(plan, model.params)[0], atol=2e-4)
    bits = history_bits_per_value(method, state.caches[0])
    return np.stack(found), bits, np.mean(method_bits(method, 16)) + starts(2)


def starts(heads: int, channels: int = 32) -> float:
    """Bits of a page's position, int32, over the values of that many heads of a token pair."""
    return 32 / (32 * heads * channels)


FAMILIES = {
    f.__name__: f for f in (residual, low_rank, latent, fewer_layers, fewer_tokens, fewer_reads)
}


@functools.cache
def in_bf16(family: str) -> np.ndarray:
    return FAMILIES[family]("bf16")[0]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pair(family, code):
    found, bits, expected = FAMILIES[family](code)
    assert bits == pytest.approx(expected, rel=1e-6)
    want = in_bf16(family)
    off = np.abs(found - want).mean() / np.abs(want - want.mean(-1, keepdims=True)).mean()
    assert off < 0.02 if code == "int8" else 1e-4 < off < 0.8


@pytest.mark.parametrize("code", CODES[1:])
def test_training_through(code):
    plan = make_plan(llama().config, named(code))
    adapter = init_adapter(plan, llama().params, rank=2, rng=jax.random.key(0))
    ids = jnp.asarray(np.random.default_rng(6).integers(3, 64, 128, np.int32))
    value, slope = jax.jit(
        jax.value_and_grad(lambda a: distillation_loss(plan, llama().params, a, ids))
    )(adapter)
    assert float(value) > 1e-5
    sizes = [float(jnp.abs(a).max()) for a in jax.tree.leaves(slope)]
    assert np.isfinite(sizes).all()
    assert max(sizes) > 0
