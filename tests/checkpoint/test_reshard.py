"""Pages dealt to other numbers of devices: each is where its index says, and logits go on equal."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvjax
from kvjax import Layout
from kvjax.checkpoint import reshard, restore, save
from kvjax.checkpoint.reshard import repeat_heads
from kvjax.core.errors import InputError
from kvjax.generate import forward_block, init_caches, make_plan
from kvjax.generate.resume_state import place_caches
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Layers, Params, logits
from kvjax.parallel import ShardingRules, make_mesh, place_params

PAGE, SINK, RECENT = 8, 2, 8
LAYOUT = Layout(sink=SINK, recent=RECENT, page=PAGE)
METHOD = kvjax.methods.get("int4", head_dim=8, layout=LAYOUT)


@functools.cache
def empty(capacity, window, shards, batch=2):
    return jax.tree.map(
        np.asarray,
        kvjax.init(
            METHOD,
            capacity=capacity,
            window=window,
            kv_heads=2,
            head_dim=8,
            batch=batch,
            layers=2,
            shards=shards,
            axis="sequence" if shards > 1 else None,
        ),
    )


def stamped(capacity, window, shards, packed):
    """A cache whose page i is full of i + 1, written where the attributes of `Cache` say."""
    cache = jax.tree.map(np.copy, empty(capacity, window, shards))
    slots = cache.page_starts.shape[-1]
    for layer in range(2):
        for row, count in enumerate(packed):
            for page in range(count):
                at = page % shards * (slots // shards) + page // shards % (slots // shards)
                cache.page_starts[layer, row, at] = SINK + PAGE * page
                for leaf in jax.tree.leaves((cache.key_pages, cache.value_pages)):
                    leaf[layer, row, :, at] = (page + 1) * (layer + 1)
    length = np.array([SINK + RECENT + PAGE * n + n % PAGE for n in packed], np.int32)
    return dataclasses.replace(
        cache,
        packed=np.broadcast_to(np.array(packed, np.int32), (2, 2)),
        length=np.broadcast_to(length, (2, 2)),
    )


@given(
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([None, 40]),
    st.lists(st.integers(0, 11), min_size=2, max_size=2),
)
def test_every_page_is_where_its_index_says(before, after, window, packed):
    """Also in sliding windows, whose slots are used in turn."""
    got = reshard(
        stamped(120, window, before, packed),
        after,
        slots=empty(120, window, after).page_starts.shape[-1],
    )
    want = stamped(120, window, after, packed)
    fewer = min(stamped(120, window, n, packed).page_starts.shape[-1] for n in (before, after))
    for layer in range(2):
        for row, count in enumerate(packed):
            # Pages that both rings have are at their place; all other slots are empty.
            shared = {SINK + PAGE * page for page in range(max(0, count - fewer), count)}
            have = got.page_starts[layer, row]
            assert shared <= set(have.tolist())
            for at in np.flatnonzero(have >= 0):
                assert have[at] == want.page_starts[layer, row, at]
                leaves = jax.tree.leaves((got.key_pages, got.value_pages))
                for leaf, other in zip(
                    leaves, jax.tree.leaves((want.key_pages, want.value_pages)), strict=True
                ):
                    np.testing.assert_array_equal(leaf[layer, row, :, at], other[layer, row, :, at])
    assert jax.tree.structure(got) == jax.tree.structure(empty(120, window, after))


def test_what_does_not_fit_is_refused():
    full = stamped(120, None, 4, [9, 3])
    with pytest.raises(InputError, match="8 page slots; expected at least the 9 pages"):
        reshard(full, 8, slots=8)
    with pytest.raises(InputError, match="got 10 slots over 4 devices"):
        reshard(full, 4, slots=10)
    with pytest.raises(InputError, match="over 0 devices"):
        reshard(full, 0)
    sliding = stamped(120, 40, 8, [11, 3])
    assert sliding.page_starts.shape[-1] == 8
    assert reshard(sliding, 2, slots=6).page_starts.shape[-1] == 6
    with pytest.raises(InputError, match="2 page slots"):
        reshard(sliding, 2, slots=2)
    pooled = kvjax.init(
        kvjax.methods.get("int4", head_dim=8, layout=dataclasses.replace(LAYOUT, pool=8)),
        capacity=64,
        kv_heads=2,
        head_dim=8,
    )
    with pytest.raises(InputError, match="a shared pool"):
        reshard(pooled, 1)


def test_a_pool_comes_back_to_as_many_devices_only(tmp_path):
    layout = dataclasses.replace(LAYOUT, pool=8)
    method = kvjax.methods.get("int4", head_dim=8, layout=layout)
    sizes = {"capacity": 64, "kv_heads": 2, "head_dim": 8, "batch": 2}
    cache = kvjax.init(method, **sizes)
    save(tmp_path, cache)
    assert restore(tmp_path, cache)[0] == cache
    other = jax.eval_shape(lambda: kvjax.init(method, **sizes, shards=2, axis="sequence"))
    with pytest.raises(
        InputError, match=r"got 8 pages of a pool on each device of 1 shards; .* 4 on"
    ):
        restore(tmp_path, other)


def test_heads_that_are_repeated():
    cache = stamped(64, None, 1, [3, 1])
    draw = np.random.default_rng(0)
    cache = jax.tree.map(lambda a: draw.integers(0, 9, a.shape).astype(a.dtype), cache)
    four, eight = repeat_heads(cache, 4, 2), repeat_heads(cache, 8, 2)
    np.testing.assert_array_equal(four.window_key[:, :, 1], cache.window_key[:, :, 0])
    np.testing.assert_array_equal(four.window_key[:, :, 2], cache.window_key[:, :, 1])
    for got, want in ((repeat_heads(eight, 4, 2), four), (repeat_heads(four, 2, 2), cache)):
        assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(want)))
    with pytest.raises(InputError, match="2 KV heads of a model that has 2, for 3"):
        repeat_heads(cache, 3, 2)


CONFIG = ModelConfig(
    name="random",
    arch="llama",
    vocab_size=32,
    layers=1,
    d_model=32,
    d_ff=32,
    q_heads=8,
    kv_heads=2,
    head_dim=16,
    max_positions=1024,
    attention_scale=0.25,
)


def weights():
    draw = np.random.default_rng(0)
    random = lambda *shape: jnp.asarray(draw.normal(size=shape) / shape[-2] ** 0.5, jnp.float32)
    width, d = CONFIG.d_model, CONFIG.head_dim
    layers = Layers(
        attn_norm=jnp.ones((1, width)),
        wq=random(1, width, 8 * d) * 2,
        wk=random(1, width, 2 * d) * 2,
        wv=random(1, width, 2 * d),
        wo=random(1, 8 * d, width),
        mlp_norm=jnp.ones((1, width)),
        w_gate=random(1, width, 32),
        w_up=random(1, width, 32),
        w_down=random(1, 32, width),
    )
    return Params(embed=random(32, width), runs=(layers,), final_norm=jnp.ones(width))


@pytest.mark.usefixtures("keep_no_programs")
def test_logits_go_on_equal_on_another_mesh(tmp_path):
    """A ragged prompt on eight devices, two of them for each KV head, saved; then tokens on eight
    others, and on one."""
    method = kvjax.methods.get(
        "turboquant-3", head_dim=16, layout=Layout(sink=4, recent=16, page=16)
    )
    tokens = np.random.default_rng(1).integers(0, 32, (4, 180), dtype=np.int32)
    count = np.array([176, 97, 20, 140], np.int32)
    step = jax.jit(forward_block, donate_argnames="caches")

    def placed(mesh):
        rules = None if mesh is None else ShardingRules(make_mesh(*mesh))
        plan = make_plan(CONFIG, method, rules=rules)
        return plan, weights() if rules is None else place_params(rules, weights(), CONFIG)

    def go_on(plan, params, caches):
        out = []
        for t in range(176, 180):
            hidden, caches, _ = step(plan, params, caches, tokens[:, t : t + 1])
            out.append(np.asarray(logits(params, CONFIG, hidden[:, 0])))
        return np.stack(out)

    make = lambda plan: init_caches(plan, batch=4, capacity=184, dtype=jnp.float32)
    plan, params = placed((1, 4, 2))
    _, caches, _ = step(plan, params, make(plan), tokens[:, :176], count)
    save(tmp_path, caches)
    want = go_on(plan, params, caches)
    for mesh in (2, 1, 4), None:
        plan, params = placed(mesh)
        like = place_caches(plan, jax.eval_shape(functools.partial(make, plan)))
        with pytest.raises(InputError, match=r"a cache of 4 KV heads; expected .*kv_heads"):
            restore(tmp_path, like)
        caches, _ = restore(tmp_path, like, kv_heads=2)
        if mesh is not None:
            for array, shape in zip(jax.tree.leaves(caches), jax.tree.leaves(like), strict=True):
                assert array.sharding == shape.sharding
        np.testing.assert_allclose(go_on(plan, params, caches), want, atol=2e-5)
