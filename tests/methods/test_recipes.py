"""What holds for every published name: it traces, has no host in the loop, and has gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kvjax.codecs import straight_through
from kvjax.codecs.serialize import dump, restore
from kvjax.core.pytree import same
from kvjax.methods import RECIPES

PAGE, D = 256, 128


@pytest.mark.parametrize("name", RECIPES)
def test_a_page_is_encoded_under_jit_without_the_host(name):
    method = kvjax.methods.get(name, D, layout=kvjax.Layout(recent=PAGE, page=PAGE))
    x = jax.ShapeDtypeStruct((PAGE, D), jnp.float32)
    positions = jax.ShapeDtypeStruct((PAGE,), jnp.int32)
    for codec in (method.key, method.value):
        program = str(jax.make_jaxpr(codec.encode)(x, positions))
        assert "callback" not in program
        assert "f64" not in program


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_pass_through(name):
    """Through the code as the identity, and through `decode` to whatever floats a codec holds."""
    method = kvjax.methods.get(name, D)
    x = jax.ShapeDtypeStruct((64, D), jnp.float32)
    for codec in (method.key, method.value):
        loss = lambda x, codec=codec: (straight_through(codec, x) ** 2).sum()
        assert jax.eval_shape(jax.grad(loss), x).shape == (64, D)

        def by_codec(codec, x):
            return (straight_through(codec, x) ** 2).sum()

        grads = jax.eval_shape(jax.grad(by_codec, allow_int=True), codec, x)
        assert jax.tree.structure(grads) == jax.tree.structure(codec)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_plain_data(name):
    method = kvjax.methods.get(name, D)
    for codec in (method.key, method.value):
        assert same(restore(*dump(codec)), codec)
