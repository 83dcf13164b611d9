"""Plans for many devices against what is really allocated on eight, and against hand-made sums."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kvjax import Layout
from kvjax.core.errors import InputError
from kvjax.evals.devices import DEVICES, Device, get_device
from kvjax.evals.memory import weight_shapes
from kvjax.evals.planner import all_reduce_seconds, link_seconds, meshes, plan_layouts, why
from kvjax.generate import init_caches, make_plan
from kvjax.models.config import ModelConfig, known_configs
from kvjax.models.load import load
from kvjax.parallel import ShardingRules, make_mesh, place_params

LAYOUT = Layout(sink=4, recent=32, page=32)
CONFIG = ModelConfig(
    name="random",
    arch="llama",
    vocab_size=64,
    layers=2,
    d_model=48,
    d_ff=64,
    q_heads=8,
    kv_heads=4,
    head_dim=32,
    max_positions=4096,
    attention_scale=32**-0.5,
    qkv_bias=True,
    windows=(None, 64),
)
TOY = Device("toy", 300_000, 1e9, 1e8, 4, 1e7)
LLAMA, H200 = known_configs()["llama-3.1-70b"], get_device("h200")


def get(name, head_dim=32, layout=LAYOUT):
    return kvjax.methods.get(name, head_dim=head_dim, layout=layout)


def by_mesh(rows):
    found = {row.mesh: row for row in rows}
    assert len(found) == len(rows)
    return found


def midway(rows):
    """A device on which half of these fit."""
    sizes = sorted(row.weights + row.cache for row in rows)
    return dataclasses.replace(TOY, memory=sizes[len(sizes) // 2])


def on_each_device(tree):
    """Bytes by device, of the buffers that are there."""
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


@pytest.mark.parametrize("layers", [False, True])
def test_bytes_are_those_of_real_buffers(layers):
    """On every mesh of eight devices, one of which has more devices than KV heads."""
    method = get("kivi-2/turboquant-prod-3")
    if layers:
        method = (get("int4"), get("int2"))
    rows = by_mesh(plan_layouts(CONFIG, method, TOY, 8, context=333, batch=8))
    assert len(rows) == 10 + 6  # 1x8x1 to 8x1x1; of these six have heads, and may split the rest
    params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), weight_shapes(CONFIG))
    for mesh, row in rows.items():
        rules = ShardingRules(make_mesh(row.data, row.heads, row.sequence), mlp=row.mlp)
        assert {row.weights} == on_each_device(place_params(rules, params, CONFIG)), mesh
        if row.mlp is None:
            plan = make_plan(CONFIG, method, rules=rules)
            caches = init_caches(plan, batch=8, capacity=333)
            assert {row.cache} == on_each_device(caches), mesh
        else:
            assert row.cache == rows[mesh.removesuffix("+mlp")].cache


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen2"])
def test_weights_are_those_of_a_checkpoint(name):
    model = load(Path(__file__).parents[1] / "models" / "tiny" / name, dtype="bfloat16")
    shape = lambda tree: jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)
    assert shape(weight_shapes(model.config)) == shape(model.params)


def test_a_step_by_hand():
    """Llama-3.1-70B, two sequences of 100,000 tokens at 4 bits, on 8 nodes of 8 devices."""
    method = get("int4", 128, Layout(sink=4, recent=64, page=64))
    row = by_mesh(plan_layouts(LLAMA, method, H200, 64, context=100_000, batch=2))["1x8x8+mlp"]
    table = 128_256 * 8192 * 2
    norms = (2 * 80 + 1) * 8192 * 4
    matrices = 80 * 2 * (2 * 8192 * 128 * (64 + 8) + 3 * 8192 * 28_672)
    assert row.weights == 2 * table + norms + matrices // 8
    pages = -(-((100_000 - 68) // 64) // 8)  # of 1561, on the device that has most
    page = 2 * 64 * 128 * 4.25 / 8 + 4  # keys and values of a head, and where it starts
    window = 132 * (2 * 128 * 2 + 4)
    assert row.cache == 80 * 2 * (pages * page + window + 8)
    assert row.read_weights == pytest.approx((row.weights - table) / 4.8e12)
    assert row.read_cache == pytest.approx(row.cache / 4.8e12)
    # Eight query heads here: maxima, then outputs with their weights, within a node; then the
    # activations of attention and feed-forward over a network, since heads lie 8 devices apart.
    ring = 2 * 7 / 8
    merge = ring * (2 * 8 * 4) / 450e9 + ring * (2 * 8 * 129 * 4) / 450e9 + 2 * 10e-6
    add = 2 * (ring * (2 * 8192 * 2) / 50e9 + 10e-6)
    assert row.links == pytest.approx(80 * (merge + add))
    assert row.step == row.read_weights + row.read_cache + row.links


def test_axes_of_one_device_are_silent():
    seconds = {
        rules.mesh.shape_tuple: link_seconds(CONFIG, rules, TOY, 8, latency=1.0)
        for rules in meshes(CONFIG, 2)
        if rules.mlp is None
    }
    shape = lambda *n: tuple(zip(("data", "heads", "sequence"), n, strict=True))
    assert seconds[shape(2, 1, 1)] == 0
    assert seconds[shape(1, 2, 1)] == pytest.approx(2 * (1 + 8 * 48 * 2 / 1e8))
    assert seconds[shape(1, 1, 2)] == pytest.approx(2 * (2 + 8 * 8 * 34 * 4 / 1e8))
    assert all_reduce_seconds(1000, 4, 1e3, latency=0.5) == 2.0


@pytest.mark.parametrize("devices", [1, 8])
def test_what_fits_is_the_most_that_fits(devices):
    method = get("turboquant-3")
    half = midway(plan_layouts(CONFIG, method, TOY, devices, context=333, batch=8))
    plan = lambda **at: by_mesh(plan_layouts(CONFIG, method, half, devices, usable=1.0, **at))
    rows = plan(context=333, batch=8)
    for row in rows.values():
        assert row.room == half.memory
        assert row.fits == (row.largest_batch >= 8) == (row.largest_context >= 333)
    mesh, row = next(iter(rows.items()))
    assert row.fits
    assert plan(context=333, batch=row.largest_batch)[mesh].fits
    assert not plan(context=333, batch=row.largest_batch + row.data)[mesh].fits
    assert plan(context=row.largest_context, batch=8)[mesh].fits
    assert not plan(context=row.largest_context + 1, batch=8)[mesh].fits
    windows = dataclasses.replace(CONFIG, windows=(64,) * 2)
    (row, *_) = plan_layouts(windows, method, H200, 1, context=333)
    assert row.largest_context is None


def test_the_cheapest_comes_first():
    method = get("turboquant-3")
    half = midway(plan_layouts(CONFIG, method, TOY, 8, context=333, batch=8))
    rows = plan_layouts(CONFIG, method, half, 8, context=333, batch=8, usable=1.0)
    fitting = [row for row in rows if row.fits]
    assert 1 < len(fitting) < len(rows)
    assert rows[: len(fitting)] == fitting
    assert [row.step for row in fitting] == sorted(row.step for row in fitting)
    assert f"next {fitting[1].mesh}" in why(rows)
    small = dataclasses.replace(TOY, memory=1000)
    rows = plan_layouts(CONFIG, method, small, 8, context=333, batch=8)
    assert not any(row.fits or row.largest_batch or row.largest_context for row in rows)
    assert rows[0].weights + rows[0].cache == min(row.weights + row.cache for row in rows)
    assert "too many" in why(rows)


def test_more_devices_than_heads():
    """A second device for a KV head saves weights and no cache; one for its pages does the rest."""
    method = get("int2", 128, Layout())
    at = {"context": 100_000, "batch": 1}
    one = by_mesh(plan_layouts(LLAMA, method, H200, 8, **at))["1x8x1+mlp"]
    two = by_mesh(plan_layouts(LLAMA, method, H200, 16, **at))
    assert two["1x16x1+mlp"].cache == one.cache
    halved = 80 * 2 * (2 * 8192 * 8192 + 3 * 8192 * 28_672)  # all matrices but those of K and V
    assert one.weights - two["1x16x1+mlp"].weights == halved // 8 - halved // 16
    assert two["1x8x2+mlp"].cache == pytest.approx(one.cache / 2, rel=0.02)
    assert two["1x8x2+mlp"].weights == one.weights


def test_meshes_that_are_refused():
    method = get("int4")
    names = lambda *args, **at: set(by_mesh(plan_layouts(*args, **at)))
    assert names(CONFIG, method, TOY, 7, context=64) == {"1x1x7"}  # any number of shards of pages
    assert names(CONFIG, method, TOY, 3, context=64, batch=3) == {"1x1x3", "3x1x1"}
    together = get("oscar-canalized-4")  # lengths over all heads
    assert names(CONFIG, together, TOY, 2, context=64, batch=2) == {"1x1x2", "2x1x1"}
    pool = method.with_layout(dataclasses.replace(LAYOUT, pool=9))
    with pytest.raises(InputError, match="shared pool"):
        plan_layouts(CONFIG, pool, TOY, 2, context=64)
    with pytest.raises(InputError, match="0 devices"):
        plan_layouts(CONFIG, method, TOY, 0, context=64)
    with pytest.raises(InputError, match="at most the 4096 positions"):
        plan_layouts(CONFIG, method, TOY, 8, context=4097)
    plan = functools.partial(plan_layouts, CONFIG, method, TOY, 8, context=64)
    for usable in (0.0, 1.1, math.nan):
        with pytest.raises(InputError, match=f"usable {usable}"):
            plan(usable=usable)
    with pytest.raises(InputError, match="latency -1"):
        plan(latency=-1.0)


def test_kinds_of_devices():
    with pytest.raises(InputError, match=r"h100.*h200.*tpu-v6e"):
        get_device("b200")
    assert get_device("TPU-v5e").memory == 16e9
    for device in DEVICES:
        assert get_device(device.kind) is device
        assert device.network < device.link < device.bandwidth
        many = 3 * device.domain
        assert device.speed(device.domain, many) == device.link
        assert device.speed(device.domain + 1, many) == device.network


def test_rings_across_the_end_of_a_node():
    """12 devices in nodes of 8: of the spans of 6 the second is devices 6 to 11, in two nodes."""
    assert H200.speed(4, 12) == H200.speed(6, 6) == H200.link
    assert H200.speed(6, 12) == H200.speed(3, 12) == H200.network
    links = {
        rules.mesh.shape_tuple: link_seconds(CONFIG, rules, TOY, 6, latency=0.0)
        for rules in meshes(CONFIG, 6)  # in nodes of 4
        if rules.heads == 1
    }
    shape = lambda *n: tuple(zip(("data", "heads", "sequence"), n, strict=True))
    merge = lambda b, n, link: 2 * 2 * (n - 1) / n * b * 8 * 34 * 4 / link  # two layers
    assert links[shape(2, 1, 3)] == pytest.approx(merge(3, 3, 1e7))
    assert links[shape(3, 1, 2)] == pytest.approx(merge(2, 2, 1e8))
    assert links[shape(1, 1, 6)] == pytest.approx(merge(6, 6, 1e7))
