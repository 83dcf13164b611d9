"""A cache whose page table is broken: attention stays inside the pool, and `checkify` is told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import kvjax

B, H, D, T, POOL = 2, 1, 16, 50, 5
LAYOUT = kvjax.Layout(sink=0, recent=16, page=16, pool=POOL)


@pytest.fixture(scope="module")
def attend():
    """The error and the outputs of one query."""
    method = kvjax.methods.get("int4", head_dim=D, layout=LAYOUT).with_attention("interpret")
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, H, D)), jnp.float32) for _ in range(3))
    cache = kvjax.init(method, capacity=T, kv_heads=H, head_dim=D, batch=B)
    cache = jax.jit(lambda c: kvjax.prefill(method, c, k, v)[1])(cache)
    step = lambda cache: kvjax.attend(method, cache, q[:, -1, :, None])
    run = jax.jit(checkify.checkify(step))
    return lambda table: run(dataclasses.replace(cache, page_table=jnp.asarray(table))), cache


def test_a_page_id_beyond_the_pool(attend):
    run, cache = attend
    table = np.array(cache.page_table)
    assert (table[0, :, :2] >= 0).all()
    error, out = run(table)
    assert error.get() is None
    table[0, 1, 1] = POOL + 7
    wrong, got = run(table)
    assert (
        f"packed_decode: got page {POOL + 7} in sequence 1; expected 0 to {POOL - 1}" in wrong.get()
    )
    np.testing.assert_array_equal(got[0], out[0])
    assert np.isfinite(got).all()
    assert np.abs(got[1] - out[1]).max() > 0  # of another page: it is flagged for a reason
