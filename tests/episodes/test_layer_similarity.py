"""Keys read block by block, against the model with that mask written out."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.core.errors import InputError
from kvjax.episodes import layer_budgets
from kvjax.episodes.sensitivity import keys_by_block, layer_similarity
from kvjax.models.causal import keys_and_values
from kvjax.models.load import load

TINY = Path(__file__).parents[1] / "models" / "tiny"


@pytest.fixture(scope="module")
def model():
    return load(TINY / "gemma3")


def test_what_is_hidden_is_what_the_mask_says(model):
    """Nothing hidden: the same keys. And tokens whose own reach is whole have the keys of a model
    that read nothing else: the second block without sink and overlap is a text of its own."""
    tokens = np.random.default_rng(0).integers(3, 90, 48)
    keys = functools.partial(
        keys_by_block, model.params, model.config, jnp.asarray(tokens, jnp.int32), block=24
    )
    whole = jax.jit(keys_and_values, static_argnums=1)
    plain = lambda tokens: whole(model.params, model.config, jnp.asarray(tokens)[None])[1]
    np.testing.assert_allclose(keys(sink=48, reach=0), plain(tokens), rtol=1e-4, atol=1e-4)
    read = lambda **how: layer_similarity(model.params, model.config, tokens, block=24, **how)
    np.testing.assert_allclose(read(sink=0, before=1.0), 1.0, atol=1e-5)
    apart = read(sink=0, before=0.0)
    assert apart[0] == pytest.approx(1.0, abs=1e-6)  # keys of layer 0 see nobody
    assert (apart[1:] < 0.9999).all()
    # The second block alone at positions of its own: keys are turned, and as long as these.
    norms = lambda keys: np.linalg.norm(np.asarray(keys), axis=-1)
    hidden = norms(keys(sink=0, reach=0)[..., 24:, :])
    np.testing.assert_allclose(hidden, norms(plain(tokens[24:])), rtol=1e-5)
    assert keys_by_block._cache_size() == 1
    partly = read(sink=4, before=0.5)
    assert (partly[1:] > apart[1:]).all()
    budgets = layer_budgets(list(apart), 64, 1.0)
    assert sum(budgets) == 64 * model.config.layers
    assert budgets[0] == min(budgets)


def test_too_little_text(model):
    with pytest.raises(InputError, match="more tokens than a block"):
        layer_similarity(model.params, model.config, np.arange(3, 20), block=32)
