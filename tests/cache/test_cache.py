"""The life of a cache: what each query sees, in any blocks, ragged, full, windowed, stacked."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import (
    LAYOUTS,
    G,
    H,
    T,
    assert_same,
    blockwise,
    empty,
    exact,
    extend,
    held,
    jit,
    lossy,
    lossy_pages,
    sequence,
    stepwise,
    tokens,
    windows,
)

import kvjax
from kvjax.core.codec import Codec
from kvjax.core.pytree import pytree, static


@pytest.mark.parametrize("name", ["usual", "no sink", "no recent"])
def test_exact_codecs_give_causal_attention(name):
    """At every step, up to a cache that is full to its last token."""
    layout = LAYOUTS[name]
    q, k, v = tokens(2)
    method = exact(layout)
    out, cache = stepwise(method, empty(method, 2), q, k, v)
    expected = np.stack([oracle.causal_attention(*(a[i] for a in (q, k, v))) for i in range(2)])
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert (np.asarray(cache.length) == T).all()
    packed = oracle.packed_tokens(T, **windows(layout))
    assert (np.asarray(cache.packed) * layout.page == packed).all()
    assert packed > 0


@pytest.mark.parametrize("name", ["no recent", "pool", "encode two"])
def test_coarse_codes_in_steps_and_in_blocks(name):
    """Each step reads exactly the tokens of the layout's definition in their packed form; blocks,
    shorter than a page and longer than the ring, give the same outputs and the same state."""
    layout = LAYOUTS[name]
    q, k, v = tokens(2, seed=1)
    method = lossy(layout)
    out, cache = stepwise(method, empty(method, 2), q, k, v)
    for i in range(2):
        expected = oracle.cache_attention(q[i], k[i], v[i], **windows(layout), **lossy_pages())
        np.testing.assert_allclose(out[i], expected, atol=1e-4)
    for block in (13, 39):
        out_2, cache_2 = blockwise(method, empty(method, 2), q, k, v, block)
        np.testing.assert_allclose(out_2, out, atol=1e-5)
        if name == "pool":  # blocks may hand pages out in another order: compare what is read
            assert_same(in_order(cache_2), in_order(cache))
        else:
            assert_same(cache_2, cache)


def in_order(cache: kvjax.Cache) -> kvjax.Cache:
    """The same cache with the pages of its pool in the order of the page table."""
    table = np.asarray(cache.page_table[0])
    used = table[table >= 0]
    pick = lambda a: a[:, used]
    return dataclasses.replace(
        cache,
        key_pages=jax.tree.map(pick, cache.key_pages),
        value_pages=jax.tree.map(pick, cache.value_pages),
        page_starts=pick(cache.page_starts),
        page_table=cache.page_table >= 0,
    )


@pytest.mark.parametrize(
    "name", ["qjl/turboquant-2.5", "turboquant-prod-2/kivi-2", "turboquant-2.5/bf16"]
)
def test_attention_over_codes_is_attention_over_decoded_pages(name):
    """Every kind of code, with bf16 windows, in one block of the whole prompt."""
    layout, d, t = kvjax.Layout(sink=4, recent=32, page=32), 32, 108
    method = kvjax.methods.get(name, d, layout=layout)
    q, k, v = tokens(1, t, d=d, seed=2)
    out, cache = extend(method, empty(method, 1, capacity=t, d=d, dtype=jnp.bfloat16), q, k, v)
    assert (np.asarray(cache.packed) == 2).all()
    decode = jit(lambda codec, x: codec.decode(codec.encode(x[None, :, None]))[0, :, 0])
    expected = oracle.cache_attention(
        *(a[0] for a in (q, k, v)),
        **windows(layout),
        key_page=lambda x: np.asarray(decode(method.key, jnp.asarray(x, jnp.float32))),
        value_page=lambda x: np.asarray(decode(method.value, jnp.asarray(x, jnp.float32))),
        exact=lambda x: x.astype(jnp.bfloat16).astype(np.float32),
    )
    np.testing.assert_allclose(out[0], expected, atol=1e-4)


# --- ragged batches ----------------------------------------------------------------------------
def test_ragged_blocks_equal_each_sequence_alone():
    """Blocks with a count per sequence, some of them empty; encoders run for whoever is due."""
    layout, block = LAYOUTS["encode two"], 24
    method = lossy(layout)
    counts = np.array([[24, 0, 5], [0, 0, 24], [24, 3, 17], [20, 24, 1], [0, 24, 24], [1, 0, 0]])
    q, k, v = tokens(3, counts.sum(0).max(), seed=3)
    cache, alone = empty(method, 3), [empty(method, 1) for _ in range(3)]
    done, seen = np.zeros(3, int), [[], [], []]
    for count in counts:
        part = [np.zeros((3, block, *a.shape[2:]), np.float32) + 9 for a in (q, k, v)]
        for i in range(3):
            for padded, a in zip(part, (q, k, v), strict=True):
                padded[i, : count[i]] = a[i, done[i] : done[i] + count[i]]
        done += count
        out, cache = extend(method, cache, *part, count=jnp.asarray(count, jnp.int32))
        due = [oracle.packed_tokens(n, **windows(layout)) // layout.page for n in done]
        np.testing.assert_array_equal(cache.packed[0], due)  # no page early, none late
        for i in range(3):
            seen[i].append(np.asarray(out[i, : count[i]]))
            one = [a[i : i + 1] for a in part]
            _, alone[i] = extend(
                method, alone[i], *one, count=jnp.asarray(count[i : i + 1], jnp.int32)
            )
    assert (np.asarray(cache.length[0]) == done).all()
    assert (done == [69, 51, 71]).all()
    for i in range(3):
        real = [a[i, : done[i]] for a in (q, k, v)]
        expected = oracle.cache_attention(*real, **windows(layout), **lossy_pages())
        np.testing.assert_allclose(np.concatenate(seen[i]), expected, atol=1e-4)
        assert_same(sequence(cache, i), sequence(alone[i], 0))


def test_inactive_sequences_stay_as_they_are():
    """Sequence 1 sleeps for a quarter of the steps, and wakes as if there had been none."""
    layout = LAYOUTS["usual"]
    method = lossy(layout)
    q, k, v = tokens(2, seed=4)
    rng = np.random.default_rng(0)
    active = np.stack([np.ones(T, bool), rng.random(T) < 0.75])
    out, cache = stepwise(method, empty(method, 2), q, k, v, active)
    awake = np.flatnonzero(active[1])
    expected = oracle.cache_attention(
        *(a[1, awake] for a in (q, k, v)), **windows(layout), **lossy_pages()
    )
    np.testing.assert_allclose(out[1, awake], expected, atol=1e-4)
    asleep = np.zeros((2, T), bool)
    _, later = stepwise(method, cache, q, k, v, asleep)
    assert_same(later, cache)


def test_empty_and_single():
    method = lossy(LAYOUTS["usual"])
    q, k, v = tokens(2, 1)
    active = np.array([[True], [False]])
    out, cache = stepwise(method, empty(method, 2), q, k, v, active)
    np.testing.assert_allclose(out[0, 0], np.repeat(v[0, 0][:, None], G, 1), atol=1e-6)
    assert (np.asarray(out[1]) == 0).all()  # this sequence holds nothing: zeros, not NaN
    _, after = extend(method, cache, q, k, v, count=jnp.zeros(2, jnp.int32))
    assert_same(held(after), held(cache))


def test_scale_dtype_and_a_last_short_block():
    method = exact(LAYOUTS["usual"])
    q, k, v = tokens(1, 12)

    @jit
    def run(cache):
        out, cache = kvjax.cache.prefill(method, cache, k, v, q=q, block=5, scale=0.7)
        half = jnp.asarray(q[:, -1], jnp.bfloat16)
        last = (kvjax.attend(method, cache, one, scale=0.7) for one in (q[:, -1], half))
        return out, *last

    out, last, half = run(empty(method, 1))
    expected = oracle.causal_attention(q[0], k[0], v[0], scale=0.7)
    np.testing.assert_allclose(out[0], expected, atol=1e-5)
    np.testing.assert_allclose(last[0], expected[-1], atol=1e-5)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32)[0], expected[-1], atol=0.05)


# --- full caches -------------------------------------------------------------------------------
def test_one_token_too_many_raises_outside_jit():
    method = exact(kvjax.Layout(sink=0, recent=0, page=16))
    q, k, v = tokens(1, 18)
    out, cache = extend(method, empty(method, 1, capacity=17), q[:, :17], k[:, :17], v[:, :17])
    assert np.isfinite(out).all()
    with pytest.raises(kvjax.InputError, match="at most 17 tokens; init it with a larger capacity"):
        kvjax.append(method, cache, k[:, 17], v[:, 17])
    with pytest.raises(kvjax.InputError, match="token 18"):
        kvjax.extend(method, cache, q[:, 17:], k[:, 17:], v[:, 17:])
    with pytest.raises(kvjax.InputError, match="token 35"):
        kvjax.prefill(method, cache, k, v)


def test_a_full_sequence_that_waits_stops_no_other():
    method = exact(kvjax.Layout(sink=0, recent=0, page=16))
    q, k, v = tokens(2, 18)
    cache = empty(method, 2, capacity=17)
    count = jnp.array([17, 3])
    _, cache = extend(method, cache, q[:, :17], k[:, :17], v[:, :17], count=count)
    cache = kvjax.append(method, cache, k[:, 17], v[:, 17], active=jnp.array([False, True]))
    _, cache = kvjax.extend(method, cache, q[:, 17:], k[:, 17:], v[:, 17:], count=jnp.array([0, 1]))
    np.testing.assert_array_equal(cache.length[0], [17, 5])


def test_prefill_checks_all_that_it_is_given():
    method = exact(kvjax.Layout(sink=0, recent=0, page=16))
    q, k, v = tokens(1, 16)
    cache = empty(method, 1)
    with pytest.raises(kvjax.InputError, match="v: got shape"):
        kvjax.prefill(method, cache, k, v[:, :15])
    with pytest.raises(kvjax.InputError, match="k: got shape"):
        kvjax.prefill(method, cache, k[0], v[0])
    bad = q.copy()
    bad[0, 3] = np.inf
    with pytest.raises(kvjax.InputError, match="q: got NaN or infinity"):
        kvjax.prefill(method, cache, k, v, q=bad)
    out, same = kvjax.prefill(method, cache, k[:, :0], v[:, :0])
    assert out is None
    assert same is cache


def test_what_is_not_finite_raises_outside_jit():
    method = exact(kvjax.Layout(sink=0, recent=0, page=16))
    q, k, v = tokens(2, 2)
    bad = v.copy()
    bad[1, 1, 0, 0] = np.nan
    cache = empty(method, 2)
    for call in (
        lambda: kvjax.append(method, cache, k[:, 1], bad[:, 1]),
        lambda: kvjax.extend(method, cache, q, k, bad),
        lambda: kvjax.prefill(method, cache, k, bad),
    ):
        with pytest.raises(kvjax.InputError, match="v: got NaN or infinity in sequence 1"):
            call()
    # What is not added may be anything.
    kvjax.append(method, cache, k[:, 1], bad[:, 1], active=jnp.array([True, False]))
    kvjax.extend(method, cache, q, k, bad, count=jnp.array([2, 1]))


def test_one_token_too_many_is_nan_under_jit():
    """From the step that outgrows the capacity, for that sequence alone, and for good."""
    layout, capacity = LAYOUTS["no sink"], 52
    method = lossy(layout)
    q, k, v = tokens(2)
    active = np.stack([np.ones(T, bool), np.arange(T) % 2 == 0])
    out, cache = stepwise(method, empty(method, 2, capacity=capacity), q, k, v, active)
    assert np.isnan(out[0, capacity:]).all()
    for i, fits in ((0, np.arange(capacity)), (1, np.flatnonzero(active[1]))):
        real = [a[i, fits] for a in (q, k, v)]
        expected = oracle.cache_attention(*real, **windows(layout), **lossy_pages())
        np.testing.assert_allclose(out[i, fits], expected, atol=1e-4)
    block, _ = extend(method, cache, q[:, :3], k[:, :3], v[:, :3])
    assert np.isnan(block[0]).all()
    assert np.isfinite(block[1]).all()


# --- sliding windows ---------------------------------------------------------------------------
@pytest.mark.parametrize("window", [5, 50])
def test_sliding_window(window):
    """Windowed causal attention, from slots that are used in turn: T is many times the window."""
    layout, t = kvjax.Layout(sink=0, recent=16, page=16), 144
    method = exact(layout)
    q, k, v = tokens(1, t, seed=5)
    start = empty(method, 1, capacity=t, window=window)
    slots = start.page_starts.shape[-1]
    assert slots <= max(1, -(-(window - 16) // 16) + 2) < layout.packed_pages(t)
    expected = oracle.causal_attention(q[0], k[0], v[0], window=window)
    out, cache = blockwise(method, start, q, k, v, 16)
    np.testing.assert_allclose(out[0], expected, atol=1e-5)
    assert int(cache.packed[0, 0]) == 8
    if window > layout.ring:
        out, other = stepwise(method, start, q, k, v)
        np.testing.assert_allclose(out[0], expected, atol=1e-5)
        assert_same(other, cache)


def test_sliding_window_over_codes():
    layout, t, window = kvjax.Layout(sink=2, recent=16, page=16), 120, 45
    method = lossy(layout)
    q, k, v = tokens(2, t, seed=6)
    active = np.stack([np.arange(t) % 3 > 0, np.ones(t, bool)])  # slots turn at different steps
    out, _ = stepwise(method, empty(method, 2, capacity=t, window=window), q, k, v, active)
    for i in range(2):
        real = [a[i, active[i]] for a in (q, k, v)]
        expected = oracle.cache_attention(*real, **windows(layout), **lossy_pages(), window=window)
        np.testing.assert_allclose(out[i, active[i]], expected, atol=1e-4)


def test_sliding_window_refuses_long_blocks():
    method = exact(LAYOUTS["usual"])
    q, k, v = tokens(1, 17)
    with pytest.raises(kvjax.InputError, match="at most a page of 16"):
        kvjax.extend(method, empty(method, 1, window=40), q, k, v)


# --- layers, compilations, memory --------------------------------------------------------------
def test_layers_do_not_touch_each_other():
    method = lossy(LAYOUTS["no recent"])
    q, k, v = tokens(2, 40)
    cache = empty(method, 2, layers=3)
    out, changed = extend(method, cache, q, k, v, layer=jnp.int32(1))
    alone_out, alone = extend(method, empty(method, 2), q, k, v)
    np.testing.assert_allclose(out, alone_out, atol=1e-6)
    for before, after, one in zip(*map(jax.tree.leaves, (cache, changed, alone)), strict=True):
        np.testing.assert_array_equal(after[0], before[0])
        np.testing.assert_array_equal(after[1], one[0])
        np.testing.assert_array_equal(after[2], before[2])

    def one_token(cache, layer):
        cache = kvjax.append(method, cache, k[:, 0], v[:, 0], layer=layer)
        return kvjax.attend(method, cache, q[:, 0], layer=layer), cache

    out, again = jit(one_token)(changed, jnp.int32(2))
    np.testing.assert_allclose(out, np.broadcast_to(v[:, 0, :, None], out.shape), atol=1e-6)
    for before, after in zip(jax.tree.leaves(changed), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(after[:2], before[:2])


def decode_step(method, cache, q, k, v):
    cache = kvjax.append(method, cache, k, v)
    return kvjax.attend(method, cache, q), cache


def test_one_compilation_for_a_generation():
    """256 steps, through sink, ring, pages and over the capacity: one program, and in place."""
    step = jax.jit(decode_step, donate_argnums=1)
    method = lossy(LAYOUTS["usual"])
    q, k, v = (a[:, 0] for a in tokens(2, 1))
    cache = empty(method, 2, capacity=250)
    where = cache.window_key.unsafe_buffer_pointer()
    for _ in range(256):
        _, cache = step(method, cache, q, k, v)
    assert step._cache_size() == 1
    assert int(cache.length[0, 0]) == 256
    assert int(cache.packed[0, 0]) == (256 - 4 - 32) // 16
    assert cache.window_key.unsafe_buffer_pointer() == where


CHUNK = 512  # tokens that the page scan unpacks at a time


@pytest.mark.parametrize(
    ("name", "dtype"), [("turboquant-2.5/kivi-2", "bfloat16"), ("bf16/int4", "float32")]
)
def test_steps_update_in_place_and_never_unpack_the_history(name, dtype):
    """All bytes of the cache are aliased; what a step needs besides is a chunk, not the context.

    The bound is four float32 chunks of K and V (codes, decoded, logits and slack): a sixteenth of
    the history unpacked, at a context of 64 chunks.
    """
    layout = kvjax.Layout(sink=4, recent=64, page=64)
    method = kvjax.methods.get(name, 32, layout=layout)
    shape = functools.partial(
        kvjax.init, method, capacity=64 * CHUNK, kv_heads=H, head_dim=32, dtype=dtype
    )
    cache = jax.eval_shape(shape)
    token = jax.ShapeDtypeStruct((1, H, 32), jnp.float32)
    q = jax.ShapeDtypeStruct((1, H, G, 32), jnp.float32)
    compiled = (
        jax.jit(decode_step, donate_argnums=1).lower(method, cache, q, token, token).compile()
    )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == kvjax.cache_bytes(cache)
    chunk = 2 * CHUNK * H * 32 * 4
    assert memory.temp_size_in_bytes < 4 * chunk


# --- each page once ----------------------------------------------------------------------------
@pytree
class Counting(Codec):
    """Tells `log` the positions of each page that it encodes, when it does."""

    inner: Codec
    log: list = static(default=None)

    def encode(self, x, positions=None):
        jax.debug.callback(
            lambda p: self.log.append(np.asarray(p).reshape(-1, p.shape[-1])), positions
        )
        return self.inner.encode(x, positions)

    def decode(self, code):
        return self.inner.decode(code)


class Log(list):
    """Static fields are compared and hashed by jit."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@pytest.mark.parametrize("fill", ["steps", "blocks"])
def test_each_page_is_encoded_once(fill):
    """With encode_batch 1 no page is encoded twice, or without need; ragged or not."""
    layout = LAYOUTS["usual"]
    log = Log()
    codecs = lossy(layout)
    method = dataclasses.replace(codecs, key=Counting(codecs.key, log))
    q, k, v = tokens(2, seed=7)
    if fill == "steps":
        active = np.stack([np.ones(T, bool), np.arange(T) < 60])
        _, cache = stepwise(method, empty(method, 2), q, k, v, active)
    else:
        _, cache = blockwise(method, empty(method, 2), q, k, v, 40)
    jax.effects_barrier()
    assert [len(pages) for pages in log] == [1] * len(log)
    starts = sorted(int(pages[0, 0]) for pages in log)
    expected = []
    for length in np.asarray(cache.length[0]):
        packed = oracle.packed_tokens(int(length), **windows(layout))
        expected += list(range(layout.sink, layout.sink + packed, layout.page))
    assert starts == sorted(expected)
    for pages in log:
        np.testing.assert_array_equal(pages[0], pages[0, 0] + np.arange(layout.page))
