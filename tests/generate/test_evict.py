"""Histories into a budget: what stays is what a mask would leave, at real bytes."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Layout, Method
from kvjax.cache import attend, cache_bytes
from kvjax.cache.pack_kept import pack, pages_for
from kvjax.cache.working_set import WorkingSet, evict, init_working_set, take_in, with_block
from kvjax.codecs import Dense
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.generate import forward_block, generate, make_plan, start, step
from kvjax.generate.evict import (
    Keep,
    ProbePrompt,
    feed,
    full_layers,
    pack_all,
    start_working,
    take_history,
)
from kvjax.models.config import layer_runs
from kvjax.models.decoder import decode_layers, logits
from kvjax.models.load import load
from kvjax.policies import (
    H2O,
    Chunked,
    Eviction,
    KeyNorm,
    Policy,
    Probe,
    SnapKV,
    Streaming,
    Tova,
)

TINY = Path(__file__).parents[1] / "models" / "tiny"
LAYOUT = Layout(sink=2, recent=8, page=8)
EXACT = Method(Dense(jnp.float32), Dense(jnp.float32), LAYOUT)


def read(name):
    model = load(TINY / name)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, max_positions=4096))


@pytest.fixture(scope="module")
def models():
    return {name: read(name) for name in ("llama", "gemma3")}


def histories(model, *lengths):
    rng = np.random.default_rng(3)
    return [list(map(int, rng.integers(3, model.config.vocab_size, n))) for n in lengths]


def masked_logits(model, tokens, seen):
    """The model over `tokens [b, t]`; seen[layer] is bool [b, h, t, t]: which keys a query sees."""
    config = model.config
    runs = layer_runs(config)
    b, t = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    distance = positions[:, :, None] - positions[:, None]

    def look(run, layer, cache, q, k, v, extra):
        window = runs[run].window
        mask = distance >= 0
        if window is not None:
            mask &= distance < window
        mask = mask[:, None] & jnp.asarray(extra)  # [b, h, t, t]
        scores = jnp.einsum("bshgd,bthd->bhgst", q, k)
        weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, -jnp.inf))
        return jnp.einsum("bhgst,bthd->bshgd", weights, v), cache

    xs = [jnp.stack([jnp.asarray(seen[n]) for n in range(r.start, r.stop)]) for r in runs]
    hidden, _, _ = decode_layers(
        model.params, config, tokens, positions, look, (None,) * len(runs), xs=xs
    )
    return logits(model.params, config, hidden)


@pytest.mark.parametrize(
    ("arch", "compete"), [("llama", "head"), ("llama", "layer"), ("gemma3", "model")]
)
def test_equals_a_masked_full_cache(arch, compete, models):
    """Prefill in blocks and decoding over what was packed, against a mask on the whole history."""
    model = models[arch]
    plan = make_plan(model.config, EXACT)
    eviction = Eviction(H2O(), budget=40, block=32, compete=compete)
    # Ragged: the second ends within a block, the first at the end of one.
    prompts, steps = histories(model, 128, 101), 20
    new = np.array(histories(model, steps, steps))
    longest, heads = 128 + steps, model.config.kv_heads
    tokens = np.zeros((2, longest), np.int32)
    for row, prompt, rest in zip(tokens, prompts, new, strict=True):
        row[: len(prompt) + steps] = [*prompt, *rest]
    ends = np.array([128, 101])

    layers = full_layers(plan)
    seen = {n: np.ones((2, heads, longest, longest), bool) for n in range(model.config.layers)}
    caches = start_working(plan, eviction, batch=2, dtype=jnp.float32)
    for first in range(0, 128, 32):
        block = tokens[:, first : first + 32]
        count = np.clip(ends - first, 0, 32).astype(np.int32)
        _, caches, _ = feed(plan, model.params, eviction, caches, block, count)
        sets = [c for c in caches if isinstance(c, WorkingSet)]
        held = np.concatenate([np.asarray(one.positions) for one in sets])  # [l, b, h, s]
        for layer, positions in zip(layers, held, strict=True):
            for b in range(2):
                stop = min(first + 32, ends[b])
                for h in range(heads):
                    stays = np.isin(np.arange(stop), positions[b, h])
                    if stop > first:
                        seen[layer][b, h, stop:, :stop] &= stays
    total = sum(np.isin(seen[n][:, :, -1], False).sum() for n in layers)
    assert total > 100  # something was dropped

    caches = pack_all(plan, eviction, caches, room=steps)
    step = jax.jit(forward_block)
    got = []
    for t in range(steps):
        hidden, caches, _ = step(plan, model.params, caches, new[:, t : t + 1])
        got.append(logits(model.params, model.config, hidden)[:, 0])
    if compete != "head":
        # Whole pages: a head may drop what is over at the end. What the pools hold is what counts.
        for layer, positions in packed_positions(plan, caches):
            for b in range(2):
                history = np.arange(ends[b])
                exact = (history < LAYOUT.sink) | (history >= boundary(ends[b]))
                for h in range(heads):
                    stays = np.isin(history, positions[b][h]) | exact
                    seen[layer][b, h, ends[b] :, : ends[b]] &= stays
    want = masked_logits(model, jnp.asarray(tokens), seen)
    for b in range(2):
        wanted = want[b, ends[b] : ends[b] + steps]
        np.testing.assert_allclose(jnp.stack(got)[:, b], wanted, atol=2e-5)


def boundary(length):
    return LAYOUT.sink + LAYOUT.page * LAYOUT.packed_pages(int(length))


def packed_positions(plan, caches):
    """(layer, positions[b][h]) of all kept pages."""
    for group, cache in zip(plan.groups, caches, strict=True):
        if cache.kept is None:
            continue
        kept = cache.kept
        for i, layer in enumerate(group.layers):
            table = np.asarray(kept.table[i])
            pages = np.asarray(kept.positions)
            yield layer, [[pages[row[row >= 0]].ravel() for row in of] for of in table]


def test_evicting_what_nobody_attends_to_changes_nothing():
    rng = np.random.default_rng(0)
    b, h, g, d, t = 2, 2, 2, 16, 96
    eviction = Eviction(H2O(), budget=64, block=32)
    q = rng.normal(size=(b, t, h, g, d)).astype(np.float32)
    k = rng.normal(size=(b, t, h, d)).astype(np.float32)
    v = rng.normal(size=(b, t, h, d)).astype(np.float32)
    q[..., 0], k[..., 0] = 20.0, 0.0
    k[:, 5:45, :, 0] = -30.0  # a logit of -150: 40 of 96 tokens that nobody looks at
    freq = jnp.ones(d // 2)
    tokens = init_working_set(
        eviction, kv_heads=h, queries=g, head_dim=d, batch=b, dtype=jnp.float32
    )
    for first in range(0, t, 32):
        cut = lambda a, i=first: jnp.asarray(a[:, i : i + 32])
        _, tokens = take_in(eviction, tokens, cut(q), cut(k), cut(v), frequencies=freq)
        (tokens,) = evict(eviction, (tokens,), LAYOUT)
    held = np.asarray(tokens.positions[0])
    assert (held >= 0).sum(-1).tolist() == [[64] * h] * b
    cache = pack(EXACT, tokens, pages=pages_for(LAYOUT, 64), capacity=t + 8, tail=2)
    full = kvjax.init(EXACT, capacity=t + 8, kv_heads=h, head_dim=d, batch=b, dtype=jnp.float32)
    _, full = kvjax.prefill(EXACT, full, jnp.asarray(k), jnp.asarray(v))
    ask = jnp.asarray(q[:, -1])
    np.testing.assert_allclose(
        attend(EXACT, cache, ask), attend(EXACT, full, ask), atol=1e-5, rtol=0
    )


def test_one_program_for_histories_of_any_length(models):
    model = models["llama"]
    plan = make_plan(model.config, EXACT)
    eviction = Eviction(KeyNorm(), budget=32, block=16)
    feed.clear_cache()
    for prompt in histories(model, 16, 100, 333):
        take_history(plan, model.params, [prompt], eviction, dtype=jnp.float32)
    assert feed._cache_size() == 1


def test_peak_is_budget_and_block(models):
    """What the compiled step takes does not depend on the history; what it updates is in place."""
    model = models["llama"]
    plan = make_plan(model.config, EXACT)
    eviction = Eviction(H2O(), budget=32, block=16)
    caches = start_working(plan, eviction, batch=1)
    slots = model.config.layers * model.config.kv_heads * 48
    exact = 2 * 2 * slots * model.config.head_dim  # K and V, bf16
    notes = slots * 12 + model.config.layers * 4
    assert sum(a.nbytes for a in jax.tree.leaves(caches)) == exact + notes
    block, count = jnp.zeros((1, 16), jnp.int32), jnp.array([16])
    memory = feed.lower(plan, model.params, eviction, caches, block, count).compile()
    assert memory.memory_analysis().alias_size_in_bytes == exact + notes


@pytree
class FirstHead(Policy):
    """One head has more to say than the others."""

    def score(self, seen):
        head = jnp.arange(seen.positions.shape[1])[:, None]
        return jnp.where(head == 0, 0.5, 0.0) + jnp.sin(seen.positions * 1.7)


def test_adaptive_budgets_take_the_bytes_of_even_ones(models):
    """Ada-KV: heads hold different numbers, the pages together are those of the budget."""
    model = models["llama"]
    method = kvjax.methods.get("turboquant-2", head_dim=model.config.head_dim, layout=LAYOUT)
    plan = make_plan(model.config, method)
    (prompt,) = histories(model, 200)
    sizes = {}
    for compete in ("head", "layer", "model"):
        eviction = Eviction(FirstHead(), budget=58, block=32, compete=compete)
        _, sets, _ = take_history(plan, model.params, [prompt], eviction)
        (cache,) = pack_all(plan, eviction, sets, room=10)
        kept = cache.kept
        sizes[compete] = cache_bytes(cache) - (0 if kept.table is None else kept.table.nbytes)
        if compete != "head":
            # 58 tokens less 2 sink and 8 recent ones are 6 pages for each of 2 heads of 3 layers.
            assert kept.positions.shape == (36, 8)
            held = (np.asarray(kept.table) >= 0).sum(-1)
            assert held.std() > 0
            assert held.sum() <= 36
            assert (np.asarray(kept.positions) >= 0).sum() > 30 * 8
    assert len(set(sizes.values())) == 1


def test_budgets_by_layer(models):
    model = models["llama"]
    plan = make_plan(model.config, EXACT)
    (prompt,) = histories(model, 150)
    eviction = Eviction(KeyNorm(), budget=(26, 42, 34), block=32)
    _, sets, _ = take_history(plan, model.params, [prompt], eviction, dtype=jnp.float32)
    assert (np.asarray(sets[0].positions) >= 0).sum(-1)[:, 0].tolist() == [
        [26] * 2,
        [42] * 2,
        [34] * 2,
    ]
    (cache,) = pack_all(plan, eviction, sets, room=4)
    assert cache.kept.positions.shape == (2 * (2 + 4 + 3), 8)


def test_evicting_at_every_step_keeps_the_budget(models):
    """Streaming at decode: sink and the newest tokens, whatever was generated."""
    model = models["gemma3"]
    plan = make_plan(model.config, EXACT)
    prompts = histories(model, 50, 37)
    eviction = Eviction(Streaming(), budget=24, block=16)
    tokens, state = generate(
        plan, model.params, prompts, max_new=30, keep=Keep(eviction, pack=False)
    )
    sets = [c for c in state.caches if isinstance(c, WorkingSet)]
    assert tokens.shape == (2, 30)
    assert len(sets) == 1
    assert sets[0].positions.shape[-1] == 25
    for b, prompt in enumerate(prompts):
        fed = len(prompt) + 29
        want = [0, 1, 2, 3, *range(fed - 20, fed)]
        for head in np.asarray(sets[0].positions[0, b]):
            assert sorted(head[head >= 0].tolist()) == want


def test_steps_equal_blocks_of_one(models):
    """The quick way to evict one token keeps what the general one keeps."""
    model = models["llama"]
    plan = make_plan(model.config, EXACT)
    prompts = histories(model, 40, 33)
    eviction = Eviction(H2O(), budget=24, block=16)
    _, sets, _ = take_history(plan, model.params, prompts, eviction, dtype=jnp.float32)
    copy = jax.tree.map(jnp.copy, sets[0])
    quick, slow = (with_block(sets[0], 1),), (with_block(copy, 2),)
    one = jnp.ones(2, jnp.int32)
    for token in histories(model, 12)[0]:
        ids = jnp.full((2, 1), token)
        _, quick, _ = feed(plan, model.params, eviction, quick, ids, one)
        pair = jnp.concatenate([ids, ids], 1)
        _, slow, _ = feed(plan, model.params, eviction, slow, pair, one)
    tidy = lambda sets: np.sort(np.asarray(sets[0].positions)[..., :24])
    np.testing.assert_array_equal(tidy(quick), tidy(slow))


def test_a_probe_judges_and_leaves_nothing(models):
    """Positions, lengths and tokens are those of the history; the verdict is the probe's."""
    model = models["gemma3"]
    plan = make_plan(model.config, EXACT)
    prompts = histories(model, 70, 64)
    eviction = Eviction(Probe(), budget=24, block=32)
    kept = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        asks = [list(map(int, rng.integers(3, 90, n))) for n in (21, 9)]
        _, caches, _ = take_history(
            plan, model.params, prompts, eviction, probe=ProbePrompt(asks), dtype=jnp.float32
        )
        tokens = next(c for c in caches if isinstance(c, WorkingSet))
        assert np.asarray(tokens.length).tolist() == [[70, 64]]
        kept.append(np.asarray(tokens.positions))
        others = [c for c in caches if not isinstance(c, WorkingSet)]
        assert all(np.asarray(c.length).tolist()[0] == [70, 64] for c in others)
    assert (kept[0] < 70).all()
    assert (kept[0] != kept[1]).any()


def test_a_probe_of_one_token_leaves_nothing_either(models):
    """Layers with a sliding window have another way to take in a single token."""
    model = models["gemma3"]
    plan = make_plan(model.config, EXACT)
    eviction = Eviction(Probe(), budget=24, block=32)
    caches = start_working(plan, eviction, batch=1)
    ask = jnp.array([[5]])
    _, after, _ = jax.jit(forward_block, static_argnames="probe")(
        plan, model.params, caches, ask, jnp.array([1]), eviction=eviction, probe=True
    )
    assert [type(c) for c in after] == [type(c) for c in caches]
    assert any(not isinstance(c, WorkingSet) for c in after)
    for cache in after:
        assert (cache.length == 0).all()
        held = cache.positions if isinstance(cache, WorkingSet) else cache.window_positions
        assert (held == -1).all()


def test_a_sequence_that_ended_is_not_judged_again():
    ask = lambda blocks, before: [[7, *block] for block in blocks]
    rows, lengths = ProbePrompt(ask, longest=4).padded([[5, 6], []], [[1, 2], [3]])
    assert rows[0].tolist() == [7, 5, 6, 0]
    assert lengths.tolist() == [3, 0]


def test_a_ragged_batch_packs_what_each_alone_would(models):
    """Where heads share pages the last verdict trims them: that of the last block with tokens."""
    model = models["llama"]
    plan = make_plan(model.config, EXACT)
    prompts = histories(model, 150, 82)
    eviction = Eviction(SnapKV(window=8), budget=42, block=32, compete="layer")

    def packed(some, row):
        _, sets, _ = take_history(plan, model.params, some, eviction, dtype=jnp.float32)
        caches = pack_all(plan, eviction, sets, room=8)
        return [[sorted(p[p >= 0]) for p in of[row]] for _, of in packed_positions(plan, caches)]

    together, alone = packed(prompts, 1), packed(prompts[1:], 0)
    assert len(alone) == model.config.layers
    assert together == alone


def test_merged_runs_leave_windows_alone():
    """A budget of just the windows has no run for all the rest: it would take a recent token."""
    layout, length = Layout(sink=4, recent=8, page=8), 67
    tight, roomy = (Eviction(H2O(), budget=n, block=length, merge="runs") for n in (19, 20))
    with pytest.raises(InputError, match=r"at least the 20 that .* 15 recent, a run of all others"):
        tight.check(1, layout)
    roomy.check(1, layout)
    tokens = init_working_set(roomy, kv_heads=1, queries=1, head_dim=8, dtype=jnp.float32)
    k = jnp.asarray(np.random.default_rng(0).normal(size=(1, length, 1, 8)), jnp.float32)
    _, tokens = take_in(roomy, tokens, k[:, :, :, None], k, k, frequencies=jnp.ones(4))
    (tokens,) = evict(roomy, (tokens,), layout)
    single = np.asarray(tokens.positions)[np.asarray(tokens.weight) == 1]
    assert {0, 1, 2, 3, *range(52, 67)} <= set(single.tolist())


def test_merged_runs_hold_the_budget_and_all_tokens(models):
    """Weights count every token of the history; without any to spare, merging changes nothing."""
    model = models["llama"]
    plan = make_plan(model.config, EXACT)
    (prompt,) = histories(model, 90)
    eviction = Eviction(H2O(), budget=40, block=32, merge="runs")
    _, sets, _ = take_history(plan, model.params, [prompt], eviction, dtype=jnp.float32)
    held = np.asarray(sets[0].positions[:, 0, :, :40])
    assert (held >= 0).all()
    np.testing.assert_allclose(np.asarray(sets[0].weight[:, 0, :, :40]).sum(-1), 90)
    single = np.isin(held, [0, 1, *range(boundary(90), 90)])
    assert (np.asarray(sets[0].weight[:, 0, :, :40])[single] == 1).all()
    (cache,) = pack_all(plan, eviction, sets, room=8)
    bias = np.where(np.asarray(cache.kept.positions) >= 0, np.exp(np.asarray(cache.kept.bias)), 0)
    window = (np.asarray(cache.window_positions[0, 0]) >= 0).sum()
    np.testing.assert_allclose(bias.sum((1, 3, 4)) + window, 90, rtol=2e-3)

    roomy = Eviction(H2O(), budget=96, block=32, merge="runs")
    hidden, _, _ = take_history(plan, model.params, [prompt], roomy, dtype=jnp.float32)
    plain = dataclasses.replace(roomy, merge="none")
    want, _, _ = take_history(plan, model.params, [prompt], plain, dtype=jnp.float32)
    np.testing.assert_allclose(hidden, want, atol=1e-5)


def test_values_that_leave_are_handed_on(models):
    model = models["llama"]
    plan = make_plan(model.config, EXACT)
    prompts = histories(model, 70)
    found = []
    for merge in ("none", "values"):
        eviction = Eviction(H2O(), budget=32, block=32, merge=merge, rng=jax.random.key(0))
        _, sets, _ = take_history(plan, model.params, prompts, eviction, dtype=jnp.float32)
        found.append(sets[0])
    first = lambda one: np.asarray(one.key[0, ..., :32, :])  # layer 0: keys do not depend on values
    np.testing.assert_array_equal(first(found[0]), first(found[1]))
    assert (np.asarray(found[0].value[0]) != np.asarray(found[1].value[0])).any()


def test_outgrowing_the_pages_reads_as_nan_and_raises_outside_jit(models):
    model = models["llama"]
    plan = make_plan(model.config, EXACT)
    eviction = Eviction(KeyNorm(), budget=32, block=16)
    _, sets, _ = take_history(plan, model.params, histories(model, 40), eviction)
    (cache,) = pack_all(plan, eviction, sets, room=8)
    most = int(cache.most_tokens(0)[0])
    assert most >= 48
    full = dataclasses.replace(cache, length=jnp.full_like(cache.length, most))
    zero = jnp.zeros((1, 2, model.config.head_dim))
    with pytest.raises(InputError, match=f"got token {most + 1}; expected at most {most} tokens"):
        kvjax.append(EXACT, full, zero, zero)
    grown = jax.jit(lambda c: kvjax.append(EXACT, c, zero, zero))(full)
    assert np.isnan(attend(EXACT, grown, zero[:, :, None])).all()


def test_bad_evictions(models):
    model = models["llama"]
    plan = make_plan(model.config, EXACT)
    with pytest.raises(InputError, match="at least the 19 that always stay"):
        start_working(plan, Eviction(KeyNorm(), budget=10), batch=1)
    with pytest.raises(InputError, match="one for each of the 3 layers"):
        start_working(plan, Eviction(KeyNorm(), budget=(40, 40)), batch=1)
    with pytest.raises(InputError, match="budget and block of 1 or more"):
        Eviction(KeyNorm(), budget=0)
    with pytest.raises(InputError, match="head, layer or model"):
        Eviction(KeyNorm(), budget=64, compete="all")
    with pytest.raises(InputError, match="floor of 0 to 1"):
        Eviction(KeyNorm(), budget=64, spread=0.5)
    for budget in (0.5, 64.0, True, None, "64", (), (64, 0.5, 64)):
        with pytest.raises(InputError, match="whole numbers"):
            Eviction(KeyNorm(), budget=budget)
    assert Eviction(KeyNorm(), budget=np.int64(64)).slots == 64
    with pytest.raises(InputError, match="policy: got 'snapkv'"):
        Eviction("snapkv", budget=64)
    for compete in ("layer", "model"):
        with pytest.raises(InputError, match=f"got '{compete}' with Tova; expected head"):
            Eviction(Tova(), budget=64, compete=compete)
    with pytest.raises(InputError, match="hold equally many runs"):
        Eviction(H2O(), budget=64, merge="runs", compete="layer")
    with pytest.raises(InputError, match="got values with KeyNorm and no key"):
        Eviction(KeyNorm(), budget=64, merge="values")
    for policy in (Chunked(KeyNorm()), Probe(remember=True)):  # they note no attention
        with pytest.raises(InputError, match="a policy that gathers attention"):
            Eviction(policy, budget=64, merge="values", rng=jax.random.key(0))
    Eviction(Chunked(H2O()), budget=64, merge="values", rng=jax.random.key(0))
    with pytest.raises(InputError, match="without a probe"):
        take_history(plan, model.params, histories(model, 9), Eviction(Probe(), budget=64))
    with pytest.raises(InputError, match="history: got no tokens"):
        take_history(plan, model.params, [[]], Eviction(KeyNorm(), budget=64))
    with pytest.raises(InputError, match="got 5000 tokens; expected at most the 4096 positions"):
        take_history(plan, model.params, [[5] * 5000], Eviction(KeyNorm(), budget=64))
    made, other = (Eviction(KeyNorm(), budget=64, block=n) for n in (32, 48))
    for prompts, eviction in (([[5] * 70], other), ([[5]] * 2, made)):
        caches = start_working(plan, made, batch=1)
        with pytest.raises(InputError, match="caches: got batch 1, 64 slots and blocks of 32"):
            take_history(plan, model.params, prompts, eviction, caches=caches)
    wide = dataclasses.replace(EXACT, layout=Layout(sink=2, recent=16, page=8))
    with pytest.raises(InputError, match="one layout for all"):
        start_working(make_plan(model.config, [EXACT, wide, EXACT]), made, batch=1)
    state = start(plan, model.params, [[5] * 9], max_new=2, keep=Keep(made, pack=False))
    with pytest.raises(InputError, match="eviction: got none, with working sets"):
        step(plan, model.params, state)
