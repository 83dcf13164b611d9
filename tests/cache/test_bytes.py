"""True bytes: what `history_bits_per_value` says is what is allocated, for every method by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kvjax.cache import history_bits_per_value
from kvjax.methods import RECIPES
from kvjax.methods.describe import code_bits

D, H, PAGE, CAPACITY = 64, 2, 64, 400
LAYOUTS = {
    "contiguous": kvjax.Layout(sink=4, recent=64, page=PAGE),
    "pool": kvjax.Layout(sink=4, recent=64, page=PAGE, pool=7),
}


def allocate(method: kvjax.Method, **options) -> kvjax.Cache:
    options = {"capacity": CAPACITY, "batch": 2, "layers": 3, **options}
    return kvjax.init(method, kv_heads=H, head_dim=D, **options)


@pytest.mark.parametrize("name", RECIPES)
def test_history_counts_every_byte(name):
    method = kvjax.methods.get(name, D, layout=LAYOUTS["contiguous"])
    cache = allocate(method)
    pages = 3 * 2 * ((CAPACITY - 4 - 64) // PAGE)
    values = 2 * pages * PAGE * H * D  # of keys and values
    allocated = sum(a.nbytes for a in jax.tree.leaves((cache.key_pages, cache.value_pages)))
    allocated += cache.page_starts.nbytes
    assert history_bits_per_value(method, cache) * values == allocated * 8
    # And from the codecs alone: the mean of K and V, and 4 bytes of position a page.
    sides = (code_bits(codec, D, PAGE) for codec in (method.key, method.value))
    expected = sum(sides) / 2 + 32 / (2 * PAGE * H * D)
    assert history_bits_per_value(method, cache) == pytest.approx(expected, rel=1e-12)
    # Nothing need be allocated to know all that.
    shapes = jax.eval_shape(lambda: allocate(method))
    assert jax.tree.structure(shapes) == jax.tree.structure(cache)
    assert kvjax.cache_bytes(shapes) == sum(a.nbytes for a in jax.tree.leaves(cache))
    assert history_bits_per_value(method, shapes) == history_bits_per_value(method, cache)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(cache), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_a_pool_counts_its_table():
    layout = LAYOUTS["pool"]
    method = kvjax.methods.get("int4", D, layout=layout)
    cache = allocate(method)
    slots = (CAPACITY - 4 - 64) // PAGE
    values = 2 * 3 * 7 * PAGE * H * D
    bits = 3 * 7 * (2 * PAGE * H * (D * 4 + 2 * 16) + 32) + 3 * 2 * slots * 32
    assert history_bits_per_value(method, cache) * values == bits


def test_windows_cost_what_they_hold():
    method = kvjax.methods.get("bf16", D, layout=LAYOUTS["contiguous"])
    for dtype, size in ((jnp.bfloat16, 2), (jnp.float32, 4)):
        cache = allocate(method, dtype=dtype)
        slots = 4 + 64 + PAGE
        assert cache.window_key.nbytes == cache.window_value.nbytes == 3 * 2 * H * slots * D * size


def test_every_leaf_has_a_buffer_of_its_own():
    """Or the cache could not be donated."""
    cache = allocate(kvjax.methods.get("kivi-2", D, layout=LAYOUTS["pool"]))
    buffers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(cache)]
    assert len(set(buffers)) == len(buffers)


def test_names_say_their_bits():
    """Rough, so that no recipe is mixed up with another: side data are under one bit at d = 64."""
    for name in ("int8", "int3", "hadamard-int2", "kivi-4", "turboquant-1", "turboquant-2.5"):
        number = name.rsplit("-", 1)[-1].removeprefix("int")
        method = kvjax.methods.get(name, D, layout=LAYOUTS["contiguous"])
        for codec in (method.key, method.value):
            bits = code_bits(codec, D, PAGE)
            low = float(number) - (0.25 if "." in number else 0)  # 2.5 is 2.25 in codes
            assert low <= bits <= low + 1, (name, bits)
