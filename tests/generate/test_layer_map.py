"""Layers that borrow keys and values: one cache per owner, and the model that the map describes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Layout, Method
from kvjax.calibrate.fold import fold_values
from kvjax.codecs import Dense, Orthogonal
from kvjax.core.errors import InputError
from kvjax.evals.memory import footprint
from kvjax.generate import forward_block, generate, init_caches, make_plan
from kvjax.generate.evict import Keep, start_working
from kvjax.models.causal import forward
from kvjax.models.config import ModelConfig, layer_runs, periodic_windows
from kvjax.models.decoder import Layers, Params, logits
from kvjax.models.hf_config import from_hf
from kvjax.models.layer_map import last_shared, lending_slots, pairs
from kvjax.parallel import ShardingRules, make_mesh, place_params
from kvjax.policies import H2O, Eviction, KeyNorm, SnapKV, Streaming, Tova, Weighted
from kvjax.train.quantized import quantized_hidden

LAYOUT = Layout(sink=2, recent=16, page=16)
EXACT = Method(Dense(jnp.float32), Dense(jnp.float32), LAYOUT)
PLAIN = ModelConfig(
    name="random",
    arch="llama",
    vocab_size=32,
    layers=4,
    d_model=32,
    d_ff=48,
    q_heads=4,
    kv_heads=2,
    head_dim=32,
    max_positions=16_384,
    attention_scale=32**-0.5,
)
MAPS = {
    # One run, in which owners and borrowers take turns.
    "pairs": dataclasses.replace(PLAIN, layer_map=pairs(4)),
    # A run for each layer; the last borrows over the one between.
    "kinds": dataclasses.replace(PLAIN, layers=3, windows=(20, None, 20), layer_map=(0, 1, 0)),
}
CAPACITY, T = 16_000, 58
STEPS = [(1, (1, 1))] * T
BLOCKS = [(16, (16, 16)), (16, (16, 16)), (16, (16, 5)), *[(1, (1, 1))] * 10]
run_block = jax.jit(forward_block, donate_argnames="caches")


@functools.cache
def weights(config):
    """Random; those that would make a borrower's keys and values are NaN."""
    draw = np.random.default_rng(0)
    random = lambda *shape: np.asarray(draw.normal(size=shape), np.float32) * shape[0] ** -0.5
    width, mlp, d = config.d_model, config.d_ff, config.head_dim
    stacks = []
    for run in layer_runs(config):
        of = []
        for n in range(run.start, run.stop):
            own = 1 if config.owners[n] == n else np.nan
            layer: dict[str, Any] = {
                name: np.ones(width, np.float32) for name in ("attn_norm", "mlp_norm")
            }
            layer |= {"wq": 2 * random(width, config.q_heads * d)}
            layer |= {name: random(width, config.kv_heads * d) * own for name in ("wk", "wv")}
            layer |= {"wo": random(config.q_heads * d, width), "w_down": random(mlp, width)}
            layer |= {name: random(width, mlp) for name in ("w_gate", "w_up")}
            of.append(Layers(**layer))
        stacks.append(jax.tree.map(lambda *a: jnp.asarray(np.stack(a), jnp.float32), *of))
    table = jnp.asarray(random(width, config.vocab_size).T)
    return Params(table, tuple(stacks), jnp.ones(width), table)


def tokens_for(config, *shape):
    return np.random.default_rng(5).integers(0, config.vocab_size, shape).astype(np.int32)


def naive(config, params, tokens):
    """The model in float64: logits `[b, t, V]`; by layer, attention `[b, h, g, t, t]` and the keys
    that it reads, `[b, t, h, d]`."""
    f64 = lambda a: np.asarray(a, np.float64)
    stacks = [jax.tree.map(f64, layers) for layers in params.runs]
    layers = [jax.tree.map(lambda a, n=n: a[n], s) for s in stacks for n in range(len(s.wq))]
    b, t = tokens.shape
    h, g, d = config.kv_heads, config.q_heads // config.kv_heads, config.head_dim
    norm = lambda x, w: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * w
    angle = np.arange(t)[:, None] * config.rope_theta ** (-np.arange(0, d, 2) / d)

    def rotate(x):  # [b, t, heads, d]
        turn = np.exp(1j * angle)[:, None]
        pair = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * turn
        return np.concatenate([pair.real, pair.imag], -1)

    x, kept, seen = f64(params.embed)[tokens], {}, []
    distance = np.arange(t)[:, None] - np.arange(t)
    for n, w in enumerate(layers):
        y = norm(x, w.attn_norm)
        owner = config.layer_map[n] if config.layer_map else n
        if owner == n:
            split = lambda a: a.reshape(b, t, h, d)
            kept[n] = rotate(split(y @ w.wk)), split(y @ w.wv)
        k, v = kept[owner]
        q = rotate((y @ w.wq).reshape(b, t, h * g, d)).reshape(b, t, h, g, d)
        scores = np.einsum("bshgd,bthd->bhgst", q, k) * config.attention_scale
        visible = distance >= 0
        if config.windows[n] is not None:
            visible &= distance < config.windows[n]
        scores = np.where(visible, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        seen.append((p, k))
        x = x + np.einsum("bhgst,bthd->bshgd", p, v).reshape(b, t, -1) @ w.wo
        y = norm(x, w.mlp_norm)
        gate = y @ w.w_gate
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w.w_up)) @ w.w_down
    head = params.embed if params.head is None else params.head
    return norm(x, f64(params.final_norm)) @ f64(head).T, seen


def through_caches(config, params, method, tokens, schedule, rules=None):
    """Logits `[n, V]` of each sequence, fed as in `schedule` (width, real tokens); and caches."""
    plan = make_plan(config, method, rules=rules)
    caches = init_caches(plan, batch=2, capacity=CAPACITY, dtype=jnp.float32)
    found: tuple[list, list] = ([], [])
    at = np.zeros(2, int)
    for width, count in schedule:
        piece = np.stack(
            [np.resize(row[i : i + n], width) for row, i, n in zip(tokens, at, count, strict=True)]
        )
        hidden, caches, ok = run_block(plan, params, caches, piece, np.array(count, np.int32))
        assert ok.all()
        for rows, n, out in zip(found, count, logits(params, config, hidden), strict=True):
            rows.append(out[:n])
        at += count
    return [np.concatenate(rows) for rows in found], caches


@pytest.mark.parametrize("name", MAPS)
def test_is_the_model_of_the_map(name):
    """Without a cache, and with one, block by block and token by token; borrowers' own projections
    are NaN, so nothing is made with them."""
    config = MAPS[name]
    params, tokens = weights(config), tokens_for(config, 2, T)
    expected, _ = naive(config, params, tokens)
    np.testing.assert_allclose(forward(params, config, tokens), expected, atol=1e-5)
    got, caches = through_caches(config, params, EXACT, tokens, BLOCKS)
    for rows, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(rows, wanted[: len(rows)], atol=1e-5)
    assert sum(cache.length.shape[0] for cache in caches) == 2
    plain = dataclasses.replace(config, layer_map=())
    own, _ = naive(plain, weights(plain), tokens)
    assert np.abs(own - expected).max() > 0.1  # not what layers of their own give


@pytest.mark.parametrize("name", MAPS)
def test_lossy_blocks_equal_appends(name):
    """What a borrower sees packed is what its owner has packed at that token; in a ragged batch."""
    config = MAPS[name]
    params, tokens = weights(config), tokens_for(config, 2, T)
    method = kvjax.methods.get("turboquant-3", config.head_dim, layout=LAYOUT)
    steps, one = through_caches(config, params, method, tokens, STEPS)
    blocks, two = through_caches(config, params, method, tokens, BLOCKS)
    for some, every in zip(blocks, steps, strict=True):
        np.testing.assert_allclose(some, every[: len(some)], atol=2e-5)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.packed[:, 0], b.packed[:, 0])
        assert int(a.packed.min()) > 0
    exact, _ = naive(config, params, tokens)
    assert np.abs(exact - steps).max() > 1e-3  # something was packed


@pytest.mark.parametrize("name", MAPS)
def test_caches_are_those_of_owners_and_stay_in_place(name):
    config, plain = MAPS[name], dataclasses.replace(MAPS[name], layer_map=())
    method = kvjax.methods.get("turboquant-3", config.head_dim, layout=LAYOUT)
    total = lambda c: sum(
        map(kvjax.cache_bytes, init_caches(make_plan(c, method), batch=1, capacity=1000))
    )
    borrowed = dataclasses.replace(config, layers=1, windows=config.windows[-1:], layer_map=())
    owners = len(set(config.owners))
    assert total(config) == total(plain) - (config.layers - owners) * total(borrowed)
    assert config.kv_bytes_per_token() == owners * 2 * 2 * 32 * 2
    plan = make_plan(config, method)
    caches = init_caches(plan, batch=2, capacity=CAPACITY, dtype=jnp.float32)
    held, count = sum(map(kvjax.cache_bytes, caches)), np.ones(2, np.int32)
    for width in (1, 16):
        given = plan, weights(config), caches, np.ones((2, width), np.int32), count
        memory: Any = run_block.lower(*given).compile().memory_analysis()
        assert memory.alias_size_in_bytes == held
        assert memory.temp_size_in_bytes < held, (width, memory.temp_size_in_bytes, held)


def test_methods_by_layer_are_those_of_owners():
    """In whatever structure; a borrower's is never looked at."""
    config = MAPS["pairs"]
    params, tokens = weights(config), tokens_for(config, 2, T)
    get = lambda name, seed: kvjax.methods.get(name, config.head_dim, layout=LAYOUT, seed=seed)
    through = lambda *methods: np.stack(
        through_caches(config, params, methods, tokens, [(16, (16, 16))] * 3)[0]
    )
    first, second, other = get("turboquant-3", 0), get("int4", 1), get("int8", 2)
    plan = make_plan(config, [first, other, second, other])
    assert [group.layers for group in plan.groups] == [(0,), (2,)]
    got = through(first, other, second, other)
    np.testing.assert_array_equal(got, through(first, first, second, second))
    assert np.abs(got - through(get("turboquant-3", 5), other, second, other)).max() > 1e-4


def test_policies_judge_by_all_layers_that_read():
    """Notes and verdicts are sums over owner and borrower; without queries they are the owner's."""
    config = MAPS["pairs"]
    params, tokens = weights(config), tokens_for(config, 2, 24)
    _, seen = naive(config, params, tokens)
    both = np.stack([seen[0][0] + seen[1][0], seen[2][0] + seen[3][0]])  # [l, b, h, g, t, t]
    plan, count = make_plan(config, EXACT), np.array([24, 24], np.int32)

    def judged(policy):
        eviction = Eviction(policy, budget=40, block=32)
        caches = start_working(plan, eviction, batch=2, dtype=jnp.float32)
        _, (held,), _ = run_block(plan, params, caches, tokens, count, eviction=eviction)
        assert (np.asarray(held.positions)[..., 40:64] == np.arange(24)).all()
        assert (np.asarray(held.length) == 24).all()
        return np.asarray(held.mass)[..., 40:64], np.asarray(held.score)[..., 40:64]

    mass, score = judged(H2O())
    np.testing.assert_allclose(mass, both.mean(3).sum(3), atol=1e-5)
    np.testing.assert_array_equal(score, mass)
    _, score = judged(Tova())
    newest = both[..., -1, :].mean((2, 3))[:, :, None]  # [l, b, 1, s], the mean over all heads
    np.testing.assert_allclose(score, np.broadcast_to(newest, score.shape), atol=1e-5)
    _, score = judged(KeyNorm())
    norms = np.stack([np.linalg.norm(seen[n][1], axis=-1).swapaxes(1, 2) for n in (0, 2)])
    np.testing.assert_allclose(score, -norms, atol=1e-5)


@pytest.mark.parametrize(("name", "pack"), [("kinds", True), ("pairs", False)])
def test_a_budget_that_holds_all_is_the_model(name, pack):
    """Blocks into working sets, then steps over them or over what is packed: nothing is dropped."""
    config = MAPS[name]
    params, tokens = weights(config), tokens_for(config, 1, 50)
    keep = Keep(Eviction(SnapKV(window=4), budget=80, block=16), pack=pack)
    plan = make_plan(config, EXACT)
    found, state = generate(plan, params, tokens.tolist(), max_new=4, keep=keep)
    assert state.finite.all()
    whole = np.concatenate([tokens, found], 1)
    expected, _ = naive(config, params, whole)
    for n, token in enumerate(np.asarray(found[0]), start=49):
        assert expected[0, n].max() - expected[0, n, token] < 1e-3


def test_on_a_mesh():
    config = MAPS["pairs"]
    params, tokens = weights(config), tokens_for(config, 2, T)
    method = kvjax.methods.get("turboquant-3", config.head_dim, layout=LAYOUT)
    expected, _ = through_caches(config, params, method, tokens, BLOCKS)
    rules = ShardingRules(make_mesh(2, 2, 2))
    placed = place_params(rules, params, config)
    got, _ = through_caches(config, placed, method, tokens, BLOCKS, rules)
    for rows, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(rows, wanted, atol=2e-5)


def test_maps_of_published_models():
    """Gemma 3n E4B and E2B, as google-deepmind/gemma has them: 20 layers own, locals read 18,
    globals 19. Gemma 4 E2B: 35 layers of which 20 borrow."""
    for layers, shared in ((35, 15), (30, 10)):
        windows = periodic_windows(layers, 1024, 5)
        found = last_shared(windows, shared)
        assert found[:20] == tuple(range(20))
        assert {found[n] for n in range(20, layers) if windows[n]} == {18}
        assert {found[n] for n in range(20, layers) if not windows[n]} == {19}
        assert lending_slots(found) == 2
    assert len(set(last_shared(periodic_windows(35, 512, 5), 20))) == 15
    assert pairs(6) == (0, 0, 2, 2, 4, 4)
    assert lending_slots(pairs(6)) == 1
    assert lending_slots(()) == 0
    data = {"model_type": "qwen3", "num_hidden_layers": 3, "hidden_size": 32, "vocab_size": 8}
    data |= {"num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 64}
    assert from_hf(data | {"num_kv_shared_layers": 1}).layer_map == (0, 1, 1)
    assert from_hf(data).layer_map == ()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"layer_map": (0, 0, 2)}, "got 3 entries; expected one for each of the 4 layers"),
        ({"layer_map": (0, 2, 1, 3)}, "got layer 1 that borrows from layer 2; expected itself or"),
        ({"layer_map": (0, 0, 1, 3)}, "from layer 1, itself a borrower; expected an owner; let"),
        ({"layer_map": (0, 1, 2, 4)}, "got layer 3 that borrows from layer 4"),
        ({"layer_map": (0, 1, 2, -1)}, "got layer 3 that borrows from layer -1"),
        (
            {"layer_map": (0, 0, 2, 3), "windows": (8, None, 8, None)},
            r"got layer 1 \(full attention\) that borrows from layer 0 \(a window of 8\)",
        ),
    ],
)
def test_maps_that_make_no_sense(fields, told):
    with pytest.raises(InputError, match=told) as error:
        dataclasses.replace(PLAIN, **fields)
    assert str(error.value).startswith("layer_map of random: ")
    assert "\n" not in str(error.value)


def test_what_layers_cannot_share():
    with pytest.raises(InputError, match="layer 2: got full attention, which no layer before"):
        last_shared((8, 8, None), 1)
    with pytest.raises(InputError, match="shared layers: got 3 of 3"):
        last_shared((None,) * 3, 3)
    with pytest.raises(InputError, match="pairs: got layers 2 to 5 of 4"):
        pairs(4, 2, 5)
    config = MAPS["kinds"]
    plan, params = make_plan(config, EXACT), weights(config)
    caches = init_caches(plan, batch=1, capacity=80, dtype=jnp.float32)
    with pytest.raises(InputError, match="block: got 17 tokens; expected at most a page of 16"):
        forward_block(plan, params, caches, tokens_for(config, 1, 17))
    parts = Weighted(((H2O(), 1.0), (SnapKV(window=4), 1.0)))
    with pytest.raises(InputError, match="policy: got H2O and SnapKV, of which one keeps notes"):
        start_working(plan, Eviction(parts, budget=80, block=16), batch=1)
    fine = Weighted(((H2O(), 1.0), (Streaming(), 1.0)))
    assert len(start_working(plan, Eviction(fine, budget=80, block=16), batch=1)) == 2


def test_transforms_of_values_fold_where_the_owner_has_them():
    """Different in every layer: what a borrower undoes is what its owner has done."""
    config = MAPS["pairs"]
    params = weights(config)
    clean = jax.tree.map(lambda a: jnp.nan_to_num(a), params)
    draw = np.random.default_rng(3)
    turns = [
        Orthogonal(jnp.asarray(np.linalg.qr(draw.normal(size=(32, 32)))[0], jnp.float32))
        for _ in range(config.layers)
    ]
    tokens = tokens_for(config, 1, 12)
    want = forward(clean, config, tokens)
    got = forward(fold_values(clean, config, turns), config, tokens)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_sizes_are_those_of_owners():
    """A method per layer: those of borrowers are not used, and not counted."""
    config = MAPS["pairs"]
    int4, int8 = (kvjax.methods.get(name, 32, layout=LAYOUT) for name in ("int4", "int8"))
    found = footprint(config, (int4, int8, int8, int4), context=512)
    alone = [footprint(PLAIN, one, context=512).bits_per_value for one in (int4, int8)]
    assert found.bits_by_layer == (alone[0], alone[0], alone[1], alone[1])
    assert found.bits_per_value == sum(alone) / 2
    plan = make_plan(config, (int4,) * config.layers)
    with pytest.raises(InputError, match="of which some borrow"):
        quantized_hidden(plan, weights(config), jnp.zeros((1, 16), jnp.int32))
