"""Models over compressed caches: exact where the cache is, one program, ragged batches."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Layout, Method
from kvjax.codecs import Dense, Tiers
from kvjax.core.errors import InputError
from kvjax.generate import (
    advance,
    check_finite,
    forward_block,
    generate,
    init_caches,
    make_plan,
    start,
    step,
)
from kvjax.models.causal import forward
from kvjax.models.decoder import logits
from kvjax.models.load import load

TINY = Path(__file__).parents[1] / "models" / "tiny"
LAYOUT = Layout(sink=2, recent=16, page=16)
EXACT = Method(Dense(jnp.float32), Dense(jnp.float32), LAYOUT)


def roomy(model):
    """With positions enough for these tests."""
    return dataclasses.replace(model, config=dataclasses.replace(model.config, max_positions=2048))


@pytest.fixture(scope="module")
def llama():
    return roomy(load(TINY / "llama"))


@pytest.fixture(scope="module")
def gemma():
    return roomy(load(TINY / "gemma3"))


def tokens_for(model, *shape):
    return jax.random.randint(jax.random.key(7), shape, 3, model.config.vocab_size)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_exact_cache_is_the_model(arch, llama, gemma):
    """Prefill in blocks, then single steps; Gemma has local layers with a window of their own."""
    model = llama if arch == "llama" else gemma
    tokens = tokens_for(model, 2, 100)
    plan = make_plan(model.config, EXACT)
    caches = init_caches(plan, batch=2, capacity=100, dtype=jnp.float32)
    run = jax.jit(forward_block)
    got = []
    for begin, end in [
        *((i, i + 16) for i in range(0, 80, 16)),
        *((i, i + 1) for i in range(80, 100)),
    ]:
        hidden, caches, finite = run(plan, model.params, caches, tokens[:, begin:end])
        got.append(logits(model.params, model.config, hidden))
        assert finite.all()
    expected = forward(model.params, model.config, tokens)
    np.testing.assert_allclose(jnp.concatenate(got, 1), expected, atol=2e-5)


def test_whole_generation_equals_single_steps(llama):
    method = kvjax.methods.get("turboquant-3", llama.config.head_dim, layout=LAYOUT)
    plan = make_plan(llama.config, method)
    prompts = [tokens_for(llama, 60).tolist(), tokens_for(llama, 37).tolist()]
    whole, _ = generate(plan, llama.params, prompts, max_new=24)
    state = start(plan, llama.params, prompts, max_new=24)
    single = [np.asarray(state.token)]
    for _ in range(23):
        state = step(plan, llama.params, state)
        single.append(np.asarray(state.token))
    np.testing.assert_array_equal(whole, np.stack(single, 1))


def test_ragged_batch_equals_each_alone(llama):
    method = kvjax.methods.get("turboquant-prod-3", llama.config.head_dim, layout=LAYOUT)
    plan = make_plan(llama.config, method)
    prompts = [tokens_for(llama, n).tolist() for n in (90, 41, 5)]
    together, _ = generate(plan, llama.params, prompts, max_new=16)
    for row, prompt in zip(together, prompts, strict=True):
        alone, _ = generate(plan, llama.params, [prompt], max_new=16)
        np.testing.assert_array_equal(row, alone[0])


def test_a_generation_compiles_the_step_once(llama):
    plan = make_plan(llama.config, kvjax.methods.get("int4", llama.config.head_dim, layout=LAYOUT))
    state = start(plan, llama.params, [tokens_for(llama, 5).tolist()], max_new=200)
    before = step._cache_size()
    for _ in range(199):
        state = step(plan, llama.params, state)
    assert step._cache_size() - before == 1
    assert int(state.caches[0].packed.max()) == LAYOUT.packed_pages(204)


def test_step_keeps_the_caches_in_place(llama):
    plan = make_plan(llama.config, kvjax.methods.get("int2", llama.config.head_dim, layout=LAYOUT))
    state = start(plan, llama.params, [tokens_for(llama, 5).tolist()], max_new=1000)
    compiled = jax.jit(advance, donate_argnums=2).lower(plan, llama.params, state).compile()
    held = sum(kvjax.cache_bytes(cache) for cache in state.caches)
    assert compiled.memory_analysis().alias_size_in_bytes >= held


def test_sampling_follows_its_key(llama):
    plan = make_plan(llama.config, kvjax.methods.get("int8", llama.config.head_dim, layout=LAYOUT))
    prompt = [tokens_for(llama, 9).tolist()]
    draw = lambda seed: np.asarray(
        generate(plan, llama.params, prompt, max_new=20, rng=jax.random.key(seed), temperature=2.0)[
            0
        ]
    )
    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()


def test_one_method_per_layer(llama):
    names = ["int8", "turboquant-2", "turboquant-2"][: llama.config.layers]
    names += ["turboquant-2"] * (llama.config.layers - len(names))
    methods = [
        kvjax.methods.get(name, llama.config.head_dim, layout=LAYOUT, seed=i)
        for i, name in enumerate(names)
    ]
    plan = make_plan(llama.config, methods)
    assert [len(group.layers) for group in plan.groups] == [1, llama.config.layers - 1]
    tokens, _ = generate(plan, llama.params, [tokens_for(llama, 50).tolist()], max_new=4)
    assert tokens.shape == (1, 4)
    with pytest.raises(InputError, match=r"methods: got 1 of them; expected one for each"):
        make_plan(llama.config, methods[:1])


def test_layers_of_two_kinds_share_a_loop(llama):
    """Layers 0 and 2 alike, 1 of another structure: the same numbers as one structure for all."""
    config, d = llama.config, llama.config.head_dim
    plain = [kvjax.methods.get("int4", d, layout=LAYOUT)] * config.layers
    other = Method(Tiers((plain[1].key,), (d,)), plain[1].value, LAYOUT)
    mixed = make_plan(config, [plain[0], other, plain[2]])
    assert [group.layers for group in mixed.groups] == [(0, 2), (1,)]
    prompt = [tokens_for(llama, 70).tolist()]
    states = [
        start(plan, llama.params, prompt, max_new=600) for plan in (make_plan(config, plain), mixed)
    ]
    for _ in range(40):
        states = [
            step(plan, llama.params, state)
            for plan, state in zip((make_plan(config, plain), mixed), states, strict=True)
        ]
    one, two = (state.caches for state in states)
    for layer, cache, slot in ((0, two[0], 0), (1, two[1], 0), (2, two[0], 1)):
        np.testing.assert_array_equal(one[0].window_key[layer], cache.window_key[slot])
        np.testing.assert_array_equal(one[0].packed[layer], cache.packed[slot])
    words = lambda cache, n: [
        np.asarray(a[n]) for a in jax.tree.leaves((cache.key_pages, cache.value_pages))
    ]
    for layer, cache, slot in ((1, two[1], 0), (2, two[0], 1)):
        for a, b in zip(words(one[0], layer), words(cache, slot), strict=True):
            np.testing.assert_array_equal(a, b)
    # The branch not taken moves no cache.
    compiled = jax.jit(advance, donate_argnums=2).lower(mixed, llama.params, states[1]).compile()
    memory = compiled.memory_analysis()
    held = sum(kvjax.cache_bytes(cache) for cache in two)
    assert memory.alias_size_in_bytes >= held
    plain_step = jax.jit(advance, donate_argnums=2).lower(
        make_plan(config, plain), llama.params, states[0]
    )
    extra = memory.temp_size_in_bytes - plain_step.compile().memory_analysis().temp_size_in_bytes
    assert extra < 0.1 * held, (extra, held)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_two_kinds_in_every_dtype(dtype):
    model = roomy(load(TINY / "gemma3", dtype=dtype))
    plain = kvjax.methods.get("int4", model.config.head_dim, layout=LAYOUT)
    other = Method(Tiers((plain.key,), (model.config.head_dim,)), plain.value, LAYOUT)
    prompts = [tokens_for(model, 57).tolist(), tokens_for(model, 15).tolist()]
    tokens = [
        generate(make_plan(model.config, methods), model.params, prompts, max_new=20)[0]
        for methods in ([plain] * 3, [plain, other, plain])
    ]
    np.testing.assert_array_equal(*tokens)


def test_nan_names_its_layer(llama):
    last = llama.config.layers - 1
    broken = llama.params.runs[0].replace(wv=llama.params.runs[0].wv.at[last].set(jnp.nan))
    params = llama.params.replace(runs=(broken,))
    plan = make_plan(llama.config, kvjax.methods.get("int8", llama.config.head_dim, layout=LAYOUT))
    state = start(plan, params, [[5, 6, 7]], max_new=4)
    with pytest.raises(InputError, match=rf"layer {last}: got NaN or infinity in its values"):
        check_finite(state.finite)


def test_prompts_that_do_not_fit(llama):
    plan = make_plan(llama.config, kvjax.methods.get("int8", llama.config.head_dim, layout=LAYOUT))
    with pytest.raises(InputError, match="prompt: got no tokens"):
        start(plan, llama.params, [[]], max_new=4)
    long = [3] * llama.config.max_positions
    with pytest.raises(InputError, match="the model's positions; shorten the prompt"):
        start(plan, llama.params, [long], max_new=4)
    vocab = llama.config.vocab_size
    for prompts, told in (
        ([], "prompt: got no tokens"),
        ([5, 6], "a list of token ids for each sequence"),
        ([[5.0, 6.0]], "got float64 of shape"),
        ([[5], [6, vocab]], f"got token {vocab} in sequence 1; expected 0 to {vocab - 1}"),
        ([[-1]], "got token -1 in sequence 0"),
    ):
        with pytest.raises(InputError, match=told):
            start(plan, llama.params, prompts, max_new=4)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_new": 0}, "max_new: got 0; expected 1 token or more"),
        ({"block": 0}, "block: got 0"),
        ({"temperature": -1.0}, "temperature: got -1.0; expected 0 or more"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": 1.0}, "rng: got none; expected a key"),
    ],
)
def test_numbers_that_make_no_sense(llama, wrong, told):
    plan = make_plan(llama.config, EXACT)
    with pytest.raises(InputError, match=told):
        generate(plan, llama.params, [[5]], **{"max_new": 4, **wrong})
