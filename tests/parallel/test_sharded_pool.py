"""A shared pool of pages in parts, each on its device: the same answers, and pages given back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from test_sharded import CONFIG, weights

import kvjax
from kvjax import Layout
from kvjax.cache import fork, invariants, reset
from kvjax.core.errors import InputError
from kvjax.generate import forward_block, init_caches, make_plan
from kvjax.models.decoder import logits
from kvjax.parallel import ShardingRules, make_mesh, place_params
from kvjax.parallel.place import make_cache
from kvjax.parallel.rules import cache_specs

# --- through a model ---------------------------------------------------------------------------

LAYOUT = Layout(sink=4, recent=16, page=16)
COUNT = np.array([90, 57, 90, 33, 72, 5, 85, 64], np.int32)


def run(params, rules, pool):
    """Logits of the last of a ragged prefill and of steps after it, `[1 + steps, b, V]`."""
    layout = dataclasses.replace(LAYOUT, pool=pool)
    method = kvjax.methods.get("turboquant-3", head_dim=32, layout=layout)
    plan = make_plan(CONFIG, method, rules=rules)
    if rules is not None:
        params = place_params(rules, params, CONFIG)
    parts, shards = (1, 1) if rules is None else (rules.data, rules.sequence)
    sizes = {"capacity": 110, "kv_heads": plan.config.kv_heads, "head_dim": 32, "batch": 8}
    split = {"parts": parts, "shards": shards, "axis": "sequence" if shards > 1 else None}
    options = {"layers": CONFIG.layers, "dtype": jnp.float32} | sizes | split
    caches = (make_cache(rules, kvjax.init, plan.methods[0], **options),)
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (8, 93), dtype=np.int32)
    step = jax.jit(forward_block, donate_argnames="caches")
    hidden, caches, finite = step(plan, params, caches, tokens[:, :90], COUNT)
    assert finite.all()
    found = [jnp.take_along_axis(hidden, jnp.asarray(COUNT - 1)[:, None, None], 1)[:, 0]]
    for t in range(90, 93):
        hidden, caches, _ = step(plan, params, caches, tokens[:, t : t + 1])
        found.append(hidden[:, 0])
    assert invariants(method, caches[0]) == []
    return np.stack([np.asarray(logits(params, CONFIG, h)) for h in found]), caches[0]


@pytest.fixture(scope="module")
def expected():
    params = weights(CONFIG)
    plain, _ = run(params, None, None)
    pooled, _ = run(params, None, 25)
    np.testing.assert_array_equal(pooled, plain)
    return params, plain


@pytest.mark.parametrize("mesh", [(2, 2, 2), (8, 1, 1), (1, 1, 8)])
def test_logits_are_those_of_one_device(mesh, expected):
    params, want = expected
    pool = {(2, 2, 2): 28, (8, 1, 1): 40, (1, 1, 8): 64}[mesh]
    got, cache = run(params, ShardingRules(make_mesh(*mesh)), pool)
    np.testing.assert_allclose(got, want, atol=1e-5)
    data, heads, sequence = mesh
    pages = jax.tree.leaves(cache.key_pages)[0].addressable_shards[0].data
    assert pages.shape[1:3] == (pool // (data * sequence), CONFIG.kv_heads // heads)
    assert cache.page_table.addressable_shards[0].data.shape[1] == 8 // data
    assert int((cache.page_readers > 0).sum()) == int(cache.packed.sum()) > 2 * 8


def test_pools_that_do_not_divide():
    rules = ShardingRules(make_mesh(2, 1, 2))
    get = lambda pool: kvjax.methods.get("int4", head_dim=32, layout=Layout(pool=pool))
    with pytest.raises(InputError, match="pool of 6 pages over 2 x 2 devices"):
        make_plan(CONFIG, get(6), rules=rules)
    sizes = {"capacity": 9, "kv_heads": 1, "head_dim": 32}
    with pytest.raises(InputError, match="pool of 9 pages over 2 x 1 devices"):
        kvjax.init(get(9), parts=2, batch=2, **sizes)
    with pytest.raises(InputError, match="3 sequences in 2 parts"):
        kvjax.init(get(8), parts=2, batch=3, **sizes)
    cache = kvjax.init(get(8), parts=2, batch=2, **sizes)
    with pytest.raises(InputError, match="8 pages in parts of 4; expected the part of one device"):
        kvjax.append(get(8), cache, jnp.ones((2, 1, 32)), jnp.ones((2, 1, 32)))


def test_dealt_pages_outside_of_their_mesh():
    method = kvjax.methods.get("int4", head_dim=32)
    sizes = {"capacity": 9, "kv_heads": 1, "head_dim": 32}
    cache = kvjax.init(method, shards=2, axis="sequence", **sizes)
    q = jnp.ones((1, 1, 1, 32))
    with pytest.raises(InputError, match="dealt to 2 devices, and no such axis around the call"):
        kvjax.attend(method, cache, q)
    mesh, spec = make_mesh(1, 1, 4), PartitionSpec()
    one = functools.partial(kvjax.attend, method)
    inside = jax.shard_map(one, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    with pytest.raises(InputError, match="dealt to 2 devices, and 4 on the axis sequence"):
        inside(cache, q)


def test_a_model_on_one_axis_needs_nothing_else():
    """What `init_caches` makes can be stepped: it knows in how many parts the pool is."""
    rules = ShardingRules(make_mesh(2, 1, 2))
    method = kvjax.methods.get("int4", head_dim=32, layout=Layout(pool=8))
    plan = make_plan(CONFIG, method, rules=rules)
    cache = jax.eval_shape(lambda: init_caches(plan, batch=4, capacity=200))[0]
    assert cache.pool_part == 2


# --- the life of a cache -----------------------------------------------------------------------

B, D, T = 4, 16, 44
SMALL = Layout(sink=1, recent=4, page=4)
PLAIN = kvjax.methods.get("bf16", head_dim=D, layout=SMALL)


def pooled(pool):
    return PLAIN.with_layout(dataclasses.replace(SMALL, pool=pool))


def start(rules, method):
    options = {"capacity": T, "kv_heads": 1, "head_dim": D, "batch": B, "dtype": jnp.float32}
    if rules is None:
        return kvjax.init(method, **options)
    split = {"shards": rules.sequence, "axis": "sequence" if rules.sequence > 1 else None}
    return make_cache(rules, kvjax.init, method, parts=rules.data, **options, **split)


def local(method, cache, *tokens):
    """Appends tokens, and attends after each."""

    def step(cache, token):
        q, k, v, active = token
        cache = kvjax.append(method, cache, k, v, active=active)
        return cache, kvjax.attend(method, cache, q)

    cache, out = jax.lax.scan(step, cache, [jnp.moveaxis(a, 1, 0) for a in tokens])
    return jnp.moveaxis(out, 0, 1), cache


alone = jax.jit(local)


def steps(rules, method):
    """`local` on every device."""

    def run(cache, *tokens):
        on, rows = cache_specs(cache), PartitionSpec("data")
        return jax.shard_map(
            functools.partial(local, method),
            mesh=rules.mesh,
            in_specs=(on, rows, rows, rows, rows),
            out_specs=(rows, on),
            check_vma=False,
        )(cache, *tokens)

    return jax.jit(run, donate_argnums=0)


def drawn(t, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, t, *s, D)).astype(np.float32) for s in ((1, 2), (1,), (1,)))
    return q, k, v, rng.random((B, t)) < 0.9


def placed(cache):
    return [a.sharding for a in jax.tree.leaves(cache)]


def used(cache):
    return int((cache.page_readers > 0).sum())


reset_jit = jax.jit(reset, donate_argnums=0)
LIFE = (
    lambda c: fork(c, 0, 1),
    lambda c: reset(c, 3),
    lambda c: reset_jit(c, np.array([False, True, False, False])),
    lambda c: fork(c, 2, 3),
    lambda c: reset_jit(c, np.array([True, False, True, False])),
)


@pytest.fixture(scope="module")
def life():
    """On one device: tokens, outputs and pages in use after each change."""
    cache, found = start(None, pooled(48)), []
    for seed, change in enumerate(LIFE):
        tokens = drawn(T // len(LIFE), seed)
        out, cache = alone(pooled(48), cache, *tokens)
        cache = change(cache)
        found.append((tokens, np.asarray(out), used(cache)))
    return found


@pytest.mark.parametrize("mesh", [(2, 1, 2), (1, 1, 2)])
def test_fork_and_reset_on_a_mesh(mesh, life):
    """As on one device, in turn with steps; every leaf stays where it was, and is donated."""
    rules, method = ShardingRules(make_mesh(*mesh)), pooled(48)
    run, cache = steps(rules, method), start(rules, method)
    where = placed(cache)
    for change, (tokens, want, pages) in zip(LIFE, life, strict=True):
        got, cache = run(cache, *tokens)
        np.testing.assert_allclose(got, want, atol=1e-5)
        cache = change(cache)
        assert invariants(method, cache) == []
        assert used(cache) == pages
        assert placed(cache) == where
    assert run._cache_size() == 1
    held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(cache))
    memory = reset_jit.lower(cache, np.ones(B, bool)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == held
    assert used(reset_jit(cache, np.ones(B, bool))) == 0


def test_fork_across_parts_is_refused():
    rules = ShardingRules(make_mesh(2, 1, 1))
    cache = start(rules, pooled(8))
    with pytest.raises(InputError, match=r"fork: got sequences 0 and 2; .* 2 parts of 2"):
        fork(cache, 0, 2)
    with pytest.raises(InputError, match="not known under jit"):
        jax.jit(fork)(cache, 0, 1)
    assert invariants(pooled(8), fork(cache, -1, 2)) == []


@pytest.mark.parametrize("mesh", [(1, 1, 2), (2, 1, 1)])
def test_a_part_without_a_free_page(mesh):
    """Only who wanted it reads as NaN, on all devices alike, and is well again after a reset."""
    rules, method = ShardingRules(make_mesh(*mesh)), pooled(6)  # three pages on each device
    run = steps(rules, method)
    lengths = np.array([9, 9, 12, 24])
    packed = SMALL.packed_pages(lengths)
    # First pages are all on the first device; or the last two sequences share three pages.
    wanted = {(1, 1, 2): 1, (2, 1, 1): 3}[mesh]
    dies = SMALL.sink + SMALL.recent + SMALL.page * wanted - 1
    q, k, v, _ = drawn(24, 1)
    active = np.arange(24) < lengths[:, None]
    out, cache = run(start(rules, method), q, k, v, active)
    want, _ = alone(PLAIN, start(None, PLAIN), q, k, v, active)
    want = np.array(want)
    want[3, dies:] = np.nan
    np.testing.assert_allclose(out, want, atol=1e-5)
    assert cache.packed[0].tolist() == packed.tolist() == [1, 1, 1, 4]
    assert invariants(method, cache) == []
    cache = reset(cache, 3)
    active = np.arange(24) < np.array([0, 0, 0, 5])[:, None]
    out, cache = run(cache, q, k, v, active)
    np.testing.assert_allclose(out[3, :5], want[3, :5], atol=1e-5)
    for row, length in enumerate(lengths[:3]):
        np.testing.assert_array_equal(cache.length[0, row], length)
    assert np.isfinite(out).all()


def test_what_one_shard_lost_all_of_them_know():
    """Forks share their first page, on the first device; their second ones are on the other."""
    rules, method = ShardingRules(make_mesh(1, 1, 2)), pooled(6)
    run, (q, k, v, _) = steps(rules, method), drawn(9, 1)
    _, cache = run(start(rules, method), q, k, v, np.arange(B)[:, None] == np.zeros(9))
    for row in 1, 2, 3:
        cache = fork(cache, 0, row)
    assert used(cache) == 1
    out, cache = run(cache, q, k, v, np.broadcast_to(np.arange(9) < 4, (B, 9)))
    assert cache.page_table[0, 3].tolist().count(-2) == 1
    assert used(cache) == 4
    for device in out.addressable_shards:
        assert np.isfinite(device.data[:, :3]).all()
        assert np.isfinite(device.data[:3]).all()
        assert np.isnan(device.data[3, 3:]).all()
