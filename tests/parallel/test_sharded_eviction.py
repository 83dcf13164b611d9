"""Policies on eight devices: what stays is what stays on one, and decoding goes on from there."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharded import CONFIG, check_close, weights

import kvjax
from kvjax import Layout
from kvjax.cache.working_set import WorkingSet
from kvjax.core.errors import InputError
from kvjax.generate import forward_block, make_plan, start
from kvjax.generate.evict import Keep, drop, start_working
from kvjax.models.config import layer_runs
from kvjax.models.decoder import logits, regroup
from kvjax.parallel import ShardingRules, make_mesh, place_params
from kvjax.policies import H2O, Eviction, Random, SnapKV, Tova

LAYOUT = Layout(sink=4, recent=16, page=16)
WINDOWED = dataclasses.replace(CONFIG, windows=(40, None))
LONG = pytest.mark.skipif("KVJAX_LONG_CHECKS" not in os.environ, reason="KVJAX_LONG_CHECKS: long")
CASES = {
    # TOVA looks at all heads of a layer, and so at all devices of the axis.
    "tova": (CONFIG, (2, 2, 2), Keep(Eviction(Tova(), budget=64, block=32))),
    "layer": (CONFIG, (2, 4, 1), Keep(Eviction(H2O(), budget=80, block=32, compete="layer"))),
    # Luck by sequence and head; exact tokens at every step; a layer with a sliding window.
    "random": (
        WINDOWED,
        (2, 2, 2),
        Keep(Eviction(Random(jax.random.key(1)), budget=56, block=32), pack=False),
    ),
    "model": (
        CONFIG,
        (1, 4, 2),
        Keep(Eviction(SnapKV(window=16, kernel=3), budget=80, block=32, compete="model")),
    ),
    "values": (
        CONFIG,
        (4, 2, 1),
        Keep(Eviction(H2O(), budget=64, block=32, merge="values", rng=jax.random.key(2))),
    ),
}


@pytest.mark.parametrize(
    "name", ["tova", "layer", "random", *(pytest.param(n, marks=LONG) for n in ("model", "values"))]
)
def test_what_stays_is_what_stays_on_one_device(name):
    config, mesh, keep = CASES[name]
    method = kvjax.methods.get("turboquant-3", head_dim=32, layout=LAYOUT)
    params, draw = regroup(weights(config), layer_runs(config)), np.random.default_rng(4)
    prompts = [draw.integers(0, 64, n).tolist() for n in (150, 97, 128, 70)]
    feed = draw.integers(0, 64, (4, 4)).astype(np.int32)
    eviction = None if keep.pack else keep.eviction

    @jax.jit
    def step(plan, params, caches, token):
        hidden, caches, _ = forward_block(plan, params, caches, token[:, None], eviction=eviction)
        caches = caches if keep.pack else drop(plan, eviction, caches)
        return logits(params, config, hidden[:, 0]), caches

    found = []
    for rules in None, ShardingRules(make_mesh(*mesh)):
        plan = make_plan(config, method, rules=rules)
        placed = params if rules is None else place_params(rules, params, config)
        caches = start(plan, placed, prompts, max_new=8, keep=keep).caches
        scores = []
        for token in feed:
            score, caches = step(plan, placed, caches, token)
            scores.append(np.asarray(score))
        found.append((np.stack(scores), caches))
    (want, single), (got, shared) = found
    check_close(got, want, name)
    for one, other in zip(single, shared, strict=True):
        for ours, theirs in zip(stayed(one), stayed(other), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        exact = other.key if isinstance(other, WorkingSet) else other.window_key
        split = exact.sharding.shard_shape(exact.shape)
        assert (split[1] * mesh[0], split[2] * mesh[1]) == (4, 4)


def stayed(cache):
    if isinstance(cache, WorkingSet):
        return [np.asarray(cache.positions)]
    if cache.kept is None:
        return [np.asarray(cache.window_positions)]
    return [np.asarray(a) for a in (cache.kept.positions, cache.kept.used, cache.window_positions)]


def test_mistakes_are_told_before_anything_is_read(monkeypatch):
    method = kvjax.methods.get("int4", head_dim=32, layout=dataclasses.replace(LAYOUT, pool=64))
    plan = make_plan(dataclasses.replace(CONFIG, max_positions=100), method)
    params, keep = jax.eval_shape(lambda: weights(CONFIG)), Keep(Eviction(Tova(), budget=64))
    monkeypatch.setattr("kvjax.generate.loop.take_history", None)
    with pytest.raises(InputError, match="layout: got a shared pool of 64 pages"):
        start(plan, params, [[1, 2]], max_new=8, keep=keep)
    # Each prompt goes on where its own sequence ends.
    read = kvjax.init(method, capacity=100, kv_heads=4, head_dim=32, batch=2, layers=2)
    read = dataclasses.replace(read, length=jnp.array([[90, 0]] * 2, jnp.int32))
    with pytest.raises(InputError, match="got 99 tokens and 5 new ones"):
        start(plan, params, [[1] * 9, [1] * 50], max_new=5, caches=(read,))
    with pytest.raises(InputError, match="caches: got 2 sequences; expected batch 1"):
        start(plan, params, [[1] * 9], max_new=5, caches=(read,))


def test_one_device_for_each_kv_head():
    method = kvjax.methods.get("int4", head_dim=32, layout=LAYOUT)
    plan = make_plan(CONFIG, method, rules=ShardingRules(make_mesh(1, 8, 1)))
    with pytest.raises(InputError, match="2 devices for each KV head; expected one"):
        start_working(plan, Eviction(Tova(), budget=64), batch=1, dtype=jnp.float32)
