"""Decoding a model whose layers choose and share, over packed caches."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.core.errors import InputError
from kvjax.generate import forward_block, init_caches, make_plan
from kvjax.models.config import known_configs
from kvjax.models.layer_map import pairs
from kvjax.models.load import load
from kvjax.select import Selection, forward_selected, init_indexer, init_selected
from kvjax.select.layers import layers_with_input

TINY = Path(__file__).parents[1] / "models" / "tiny"
LAYOUT = kvjax.Layout(sink=2, recent=8, page=8)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def model():
    return load(TINY / "llama")


def selection(model, pattern, k):
    full = pattern.count("F")
    indexers = init_indexer(
        model.config.d_model, layers=full, heads=2, width=8, rng=jax.random.key(1)
    )
    return Selection(indexers, pattern, k)


@pytest.fixture(scope="module")
def decode(model):
    """A prompt of 44 tokens in one block, then 8 tokens one by one: hidden states of these."""
    method = kvjax.methods.get("int4", head_dim=model.config.head_dim, layout=LAYOUT)
    plan = make_plan(model.config, method)
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (2, 52), np.int32)
    forward = jit(forward_selected)

    def run(pattern, k):
        chosen = selection(model, pattern, k)
        state = init_selected(plan, chosen, batch=2, capacity=56, dtype=jnp.float32)
        _, state = forward(plan, model.params, chosen, state, tokens[:, :44])
        found, states = [], []
        for t in range(44, 52):
            hidden, state = forward(plan, model.params, chosen, state, tokens[:, t : t + 1])
            found.append(hidden[:, 0])
            states.append(state)
        return np.stack(found, 1), states

    def plain():
        block = jit(forward_block)
        caches = init_caches(plan, batch=2, capacity=56, dtype=jnp.float32)
        _, caches, _ = block(plan, model.params, caches, tokens[:, :44])
        found = []
        for t in range(44, 52):
            hidden, caches, _ = block(plan, model.params, caches, tokens[:, t : t + 1])
            found.append(hidden[:, 0])
        return np.stack(found, 1)

    return run, plain, plan


def test_a_choice_of_everything_is_plain_decoding(decode):
    run, plain, _ = decode
    found, _ = run("FSD", 56)
    want = plain()
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


def test_few_tokens_are_shared_and_change_the_model(decode):
    run, plain, _ = decode
    found, states = run("FSF", 4)
    assert np.abs(found - plain()).max() > 1e-3
    for t, state in enumerate(states, 45):
        packed = LAYOUT.sink + LAYOUT.page * int(LAYOUT.packed_pages(t))
        chosen = np.asarray(state.chosen)
        assert chosen.shape == (2, 4)
        assert ((chosen >= LAYOUT.sink) & (chosen < packed)).all()  # not what is read anyway
        # Two indexers, and a key for each token and no more.
        scale = np.asarray(state.index.scale)
        assert scale.shape[:2] == (2, 2)
        assert (scale[:, :, :t] > 0).all()
        assert (scale[:, :, t:] == 0).all()


def test_a_pattern_of_other_layers_is_refused(decode, model):
    _, _, plan = decode
    with pytest.raises(InputError, match="pattern"):
        init_selected(plan, selection(model, "FS", 4), batch=1, capacity=56)
    with pytest.raises(InputError, match="pattern"):
        selection(model, "SF", 4)


def test_models_that_it_does_not_take():
    plain = known_configs()["smollm2-135m"]
    shared = dataclasses.replace(plain, layer_map=pairs(plain.layers))
    with pytest.raises(InputError, match="layers borrow keys and values"):
        layers_with_input(None, shared, jnp.zeros((1, 4), jnp.int32), None)
