"""Codecs and methods are values: equal by content, traced by structure, stackable."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import methods
from kvjax.codecs import Codebook, Dense, Hadamard, Linear, Normalized, Orthogonal, Uniform
from kvjax.core.pytree import same
from kvjax.core.rng import fold

D, PAGE = 16, 16
LAYOUT = kvjax.Layout(sink=0, recent=16, page=PAGE)


def turbo(seed: int, bits: int = 2) -> kvjax.Method:
    return methods.get(f"turboquant-{bits}", D, layout=LAYOUT, seed=seed)


def page(seed: int, *lead: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1000 + seed), (*lead, PAGE, D))


def test_equal_by_value():
    assert Uniform(4, group=8) == Uniform(4, group=8)
    assert Uniform(4, group=8) != Uniform(4)
    assert Uniform(4) != Dense()
    assert turbo(0) == turbo(0)
    assert turbo(0) != turbo(1)
    assert turbo(0) != turbo(0, bits=3)
    assert turbo(0) != turbo(0).with_layout(kvjax.Layout(sink=0, recent=32, page=PAGE))
    assert Orthogonal(jnp.eye(4)) != Orthogonal(jnp.eye(4).at[0, 0].set(-1))
    assert Dense("bfloat16") == Dense(jnp.bfloat16)
    assert same({"a": jnp.ones(2)}, {"a": jnp.ones(2)})
    assert not same({"a": jnp.ones(2)}, {"b": jnp.ones(2)})


@pytest.mark.parametrize(
    "value", [Uniform(4), Hadamard.plain(4), turbo(0)], ids=lambda v: type(v).__name__
)
def test_unhashable(value):
    with pytest.raises(TypeError, match="unhashable"):
        hash(value)


def test_frozen():
    with pytest.raises(AttributeError):
        Uniform(4).bits = 2


def test_seeds_share_a_compilation_and_widths_do_not():
    encode = jax.jit(lambda method, x: method.key.encode(x))
    codes = [encode(turbo(seed), page(0)) for seed in (0, 1, 2)]
    assert encode._cache_size() == 1
    assert not same(codes[0], codes[1])  # the seed is traced, not baked in
    encode(turbo(0, bits=3), page(0))
    assert encode._cache_size() == 2


def test_arrays_are_leaves_and_settings_are_not():
    codec = Linear(Hadamard.plain(D), Normalized(Codebook.lloyd_max(D, 2)))
    assert sorted(leaf.shape for leaf in jax.tree.leaves(codec)) == [(4,), (D,)]
    assert jax.tree.leaves(Uniform(4)) == []


def test_methods_stack_over_layers():
    """Two seeds in one value with a leading layer axis: each slice acts as its own method."""
    each = [turbo(0), turbo(1)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *each)
    x = page(1, 2)  # [l, t, d]

    def round_trip(method, x):
        return method.value.decode(method.value.encode(x))

    together = jax.jit(jax.vmap(round_trip))(stacked, x)
    alone = jax.jit(round_trip)
    for i in range(2):
        np.testing.assert_allclose(together[i], alone(each[i], x[i]), atol=1e-5)
        assert jax.tree.map(lambda a, i=i: a[i], stacked) == each[i]
    assert abs(alone(each[0], x[0]) - alone(each[1], x[0])).max() > 0.05


def test_fold_goes_by_name():
    rng = jax.random.key(3)
    names = [("a",), ("b",), ("a", "b"), ("b", "a"), ("a", 0), ("a", 1), ("ab",), ()]
    keys = {tuple(np.asarray(jax.random.key_data(fold(rng, *n)))) for n in names}
    assert len(keys) == len(names)
    assert (fold(rng, "a", "b") == fold(fold(rng, "a"), "b")).all()
    traced = jax.jit(lambda layer: fold(rng, "rotation", layer))(jnp.int32(5))
    assert (traced == fold(rng, "rotation", 5)).all()


def test_sides_have_rotations_of_their_own():
    method = turbo(0)
    assert method.key != method.value
    mixed = methods.get("turboquant-2/turboquant-2", D, layout=LAYOUT)
    assert mixed.key == turbo(0).key
    assert mixed.value == turbo(0).value
