"""Drawn layers, caches filled with them, and needles: against plain float64 and `prefill`."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.calibrate.moments import Moments
from kvjax.calibrate.names import get_for_model
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.evals.drawn_cache import (
    empty_cache,
    fill,
    history_length,
    one_device,
    read_cache,
)
from kvjax.evals.drawn_layer import draw_queries, draw_tokens, drawn_layer, shaped_like
from kvjax.evals.needles import (
    Margin,
    apart,
    mean_and_error,
    needle_finds,
    needle_pages,
    plain_finds,
)
from kvjax.evals.query_moments import QueryMoments, measure_queries
from kvjax.models.config import ModelConfig, RopeScaling
from kvjax.parallel import ShardingRules, make_mesh

LAYOUT = Layout(sink=2, recent=16, page=8)
CONTEXT, LENGTH = 128, 2 + 128 + 16
MARGINS = (0.0, 2.0)
CONFIG = ModelConfig(
    name="drawn", arch="llama", vocab_size=8, layers=2, d_model=8, d_ff=8, q_heads=4, kv_heads=2,
    head_dim=16, attention_scale=0.25, rope_theta=500.0, max_positions=4096,
)  # fmt: skip
WIDE = dataclasses.replace(
    CONFIG, name="wide", layers=1, q_heads=2, kv_heads=1, head_dim=64, attention_scale=1 / 8,
    windows=(), rope_scaling=RopeScaling("linear", factor=2.0),
)  # fmt: skip


def spread(rng: np.random.Generator, *lead: int, d: int = 16) -> np.ndarray:
    """Covariances `[..., d, d]` of full rank, some directions much longer than others."""
    a = rng.normal(size=(*lead, d, d)) * np.geomspace(2, 0.2, d)
    return a @ a.swapaxes(-1, -2) / d


@pytest.fixture(scope="module")
def moments() -> tuple[Moments, QueryMoments]:
    rng = np.random.default_rng(0)
    square = lambda: spread(rng, 2, 2)
    mean = lambda scale: scale * rng.normal(size=(2, 2, 16))
    frequencies = 500.0 ** (-np.arange(8) / 8)
    found = Moments(
        tokens=4096, query_gram=square(), key_mean=mean(1), key_mean_pre=mean(1.0),
        key_cov=square(), key_cov_pre=square(), value_mean=mean(0.5), value_cov=square(),
        output_gram=square(), value_proxy=square(), out_gram=square(),
        frequencies=np.stack([frequencies] * 2),
    )  # fmt: skip
    queries = QueryMoments(0.3 * rng.normal(size=(2, 2, 2, 16)), spread(rng, 2, 2, 2))
    return found, queries


@pytest.fixture(scope="module")
def layer(moments):
    return drawn_layer(*moments, layer=1)


@functools.cache
def drawn_for(seed: int = 0):
    return jax.random.key(seed)


def method_of(name: str, moments) -> kvjax.Method:
    made = get_for_model(name, CONFIG, moments[0], layout=LAYOUT)
    return made[1] if isinstance(made, tuple) else made


def filled(method, layer, rules=None):
    """A cache, what is in it, and what queries find."""
    rules = one_device() if rules is None else rules
    rng = drawn_for()
    q = draw_queries(layer, rng, 3, LENGTH)
    pages = needle_pages((0.1, 0.8), CONTEXT, LAYOUT)
    cache = empty_cache(method, layer, CONTEXT, rules)
    given = {"rng": rng, "context": CONTEXT, "apart": pages, "rules": rules}
    cache, tally = fill(method, cache, layer, q, **given)
    read = read_cache(method, cache, q, apart=pages, rules=rules)
    return cache, q, pages, jax.device_get(tally), jax.device_get(read)


@pytest.fixture(scope="module", params=["turboquant-2", "centred-2"])
def case(request, layer, moments):
    method = method_of(request.param, moments)
    return method, *filled(method, layer)


def history(layer) -> tuple[jax.Array, jax.Array]:
    """All keys and values `[h, LENGTH, d]`, by the numbers of their pages."""
    sink = draw_tokens(layer, drawn_for(), jnp.array([2**30]), jnp.arange(8)[None])
    numbers = jnp.arange((CONTEXT + LAYOUT.recent) // 8)
    at = 2 + 8 * numbers[:, None] + jnp.arange(8)
    rest = draw_tokens(layer, drawn_for(), numbers, at)
    return tuple(
        jnp.concatenate([a[:, 0, :2], b.reshape(2, -1, 16)], 1)
        for a, b in zip(sink, rest, strict=True)
    )


def prefilled(method, k, v):
    cache = kvjax.init(method, capacity=LENGTH, kv_heads=2, head_dim=16)
    k, v = (a.swapaxes(0, 1)[None] for a in (k, v))
    return jax.jit(kvjax.prefill)(method, cache, k, v)[1]


def decoded(method, cache) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values `[h, LENGTH, d]` as the cache has them."""
    found = []
    for codec, code, window in (
        (method.key, cache.key_pages, cache.window_key),
        (method.value, cache.value_pages, cache.window_value),
    ):
        pages = codec.decode(jax.tree.map(lambda a: a[0], code))  # [1, h, n, p, d]
        exact = np.asarray(jax.lax.bitcast_convert_type(window[0, 0], jnp.bfloat16), np.float64)
        at = np.asarray(cache.window_positions[0, 0])
        whole = np.zeros((2, LENGTH, 16))
        whole[:, at] = exact
        whole[:, 2 : 2 + CONTEXT] = np.asarray(pages[0], np.float64).reshape(2, -1, 16)
        found.append(whole)
    return found[0], found[1]


def rotation(angles: np.ndarray) -> np.ndarray:
    """`[d, d]`, the turn of pairs (i, i + d / 2)."""
    cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    return np.block([[cos, -sin], [sin, cos]])


def softmax(q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, their log-sum and shares in float64, for one query `[d]`."""
    logits = k @ q
    lse = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
    return logits, lse, np.exp(logits - lse)


def test_the_cache_is_that_of_prefill(case, layer):
    method, cache, *_ = case
    want = prefilled(method, *history(layer))
    for got, right in zip(jax.tree.leaves(cache), jax.tree.leaves(want), strict=True):
        assert got.shape == right.shape
        if jnp.issubdtype(got.dtype, jnp.floating):
            np.testing.assert_allclose(got, right, rtol=2e-2)  # a scale on the border of two bf16
        else:  # codes on a border of two, by sums in another order
            assert np.mean(np.asarray(got) != np.asarray(right)) < 2e-3
    assert int(cache.packed[0, 0]) == CONTEXT // 8
    assert int(cache.length[0, 0]) == LENGTH == history_length(LAYOUT, CONTEXT)


def test_attention_without_a_needle(case, layer):
    method, cache, q, pages, tally, read = case
    part = apart(method, layer, q, drawn_for(), pages)
    whole, error = plain_finds(tally, read, part)
    k, v = (np.asarray(a, np.float64) for a in history(layer))
    rk, rv = decoded(method, cache)
    for h in range(2):
        for r in range(3):
            one = np.asarray(q[h, r], np.float64)
            logits, lse, p = softmax(one, k[h])
            coded, coded_lse, coded_p = softmax(one, rk[h])
            assert whole.exact.lse[h, r] == pytest.approx(lse, abs=1e-4)
            assert whole.read_lse[h, r] == pytest.approx(coded_lse, abs=1e-4)
            assert whole.top[h, r] == pytest.approx(logits.max(), abs=1e-4)
            assert whole.read_top[h, r] == pytest.approx(coded.max(), abs=1e-4)
            out, coded_out = p @ v[h], coded_p @ rv[h]
            np.testing.assert_allclose(whole.exact.out[h, r, :-1], out, atol=1e-4)
            kl = (p * (logits - lse - coded + coded_lse)).sum()
            assert whole.kl[h, r] == pytest.approx(kl, abs=2e-4)
            off = np.linalg.norm(coded_out - out) / np.linalg.norm(out)
            assert error[h, r] == pytest.approx(off, rel=2e-3)
    attended = kvjax.attend(method, cache, q[None], scale=1.0)[0]
    np.testing.assert_allclose(
        jnp.linalg.norm(attended - whole.exact.out[..., :-1], axis=-1)
        / jnp.linalg.norm(whole.exact.out[..., :-1], axis=-1),
        error,
        rtol=2e-3,
    )


@pytest.mark.parametrize("direction", ["query", "likely"])
def test_needles_are_found_as_if_they_had_been_there(direction, case, layer, moments):
    """Every needle by hand: its key put into the history, all of it prefilled and read again."""
    method, _, q, pages, tally, read = case
    part = apart(method, layer, q, drawn_for(), pages)
    options = {"rng": drawn_for(), "margins": np.array(MARGINS, np.float32)}
    finds = needle_finds(method, layer, q, tally, read, part, direction=direction, **options)
    k, v = (np.asarray(a, np.float64) for a in history(layer))
    places = jax.random.randint(kvjax.core.rng.fold(drawn_for(), "needles"), (2, 2, 3), 0, 8)
    for m, n, r in ((0, 0, 0), (1, 1, 2)):
        keys = k.copy()
        for h in range(2):
            one = np.asarray(q[h, r], np.float64)
            at = 2 + 8 * int(pages[n]) + int(places[n, h, r])
            logits, _, _ = softmax(one, k[h])
            rest = np.log(np.exp(np.delete(logits, at)).sum())
            to = one
            if direction == "likely":
                turn = rotation(at * moments[0].frequencies[1])
                to = turn @ moments[0].key_cov_pre[1, h] @ turn.T @ one
            keys[h, at] += (rest + MARGINS[m] - logits[at]) * to / (to @ one)
        cache = prefilled(method, jnp.asarray(keys, jnp.float32), jnp.asarray(v, jnp.float32))
        rk, rv = decoded(method, cache)
        attended = kvjax.attend(method, cache, q[None, :, r : r + 1], scale=1.0)[0, :, 0]
        for h in range(2):
            one = np.asarray(q[h, r], np.float64)
            at = 2 + 8 * int(pages[n]) + int(places[n, h, r])
            logits, lse, p = softmax(one, keys[h])
            coded, coded_lse, coded_p = softmax(one, rk[h])
            of = lambda name, h=h, m=m, n=n, r=r: float(getattr(finds, name)[m, n, h, r])
            assert p[at] == pytest.approx(1 / (1 + np.exp(-MARGINS[m])), rel=1e-6)
            assert of("share") == pytest.approx(p[at], rel=1e-3)
            assert of("read_share") == pytest.approx(coded_p[at], rel=1e-2)
            assert bool(of("top")) == (coded.argmax() == at)
            kl = (p * (logits - lse - coded + coded_lse)).sum()
            assert of("kl") == pytest.approx(kl, rel=1e-2, abs=1e-3)
            out = p @ v[h]
            for found in (coded_p @ rv[h], np.asarray(attended[h], np.float64)):
                off = np.linalg.norm(found - out) / np.linalg.norm(out)
                assert of("error") == pytest.approx(off, rel=1e-2)
            usual = np.sqrt((k[h, 2 + 8 * int(pages[n]) :][:8] ** 2).sum(-1).mean())
            assert of("length") == pytest.approx(np.linalg.norm(keys[h, at]) / usual, rel=1e-3)


def test_exact_codes_find_every_needle(layer, moments):
    method = method_of("bf16", moments)
    _, q, pages, tally, read = filled(method, layer)
    part = apart(method, layer, q, drawn_for(), pages)
    options = {"rng": drawn_for(), "margins": np.array(MARGINS, np.float32)}
    finds = needle_finds(method, layer, q, tally, read, part, **options)
    assert finds.top.all()
    np.testing.assert_allclose(finds.share, finds.read_share, rtol=0.02)
    np.testing.assert_allclose(finds.share[0], 0.5, rtol=1e-4)
    assert float(finds.error.max()) < 0.02
    assert float(jnp.abs(finds.kl).max()) < 1e-3


@pytest.mark.parametrize("mesh", [(1, 8), (2, 2)])
def test_a_mesh_finds_what_one_device_does(mesh, case, layer, keep_no_programs):
    method, one, _, _, tally, read = case
    heads, sequence = mesh
    rules = ShardingRules(make_mesh(1, heads, sequence))
    cache, _, _, shared_tally, shared_read = filled(method, layer, rules)
    for got, want in ((shared_tally, tally), (shared_read, read)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    code = jax.tree.leaves(cache.key_pages)[0]
    assert code.addressable_shards[0].data.shape[2:4] == (2 // heads, 16 // sequence)
    starts = np.asarray(cache.page_starts)[0, 0].reshape(sequence, -1)
    assert starts[:, 0].tolist() == [2 + 8 * n for n in range(sequence)]  # dealt in turn
    assert sorted(starts.ravel().tolist()) == sorted(np.asarray(one.page_starts).ravel().tolist())


def test_tokens_have_the_moments_they_are_drawn_from(moments, layer):
    numbers = jnp.arange(64)
    at = 100 + 64 * numbers[:, None] + jnp.arange(64)
    k, v = (np.asarray(a, np.float64) for a in draw_tokens(layer, drawn_for(), numbers, at))
    angles = np.asarray(at)[..., None] * moments[0].frequencies[1]
    cos, sin = np.cos(angles), np.sin(angles)
    low, high = k[..., :8], k[..., 8:]
    before = np.concatenate([low * cos + high * sin, high * cos - low * sin], -1)
    q = np.asarray(draw_queries(layer, drawn_for(), 4096, 0), np.float64)
    found = moments[0]
    for h in range(2):
        for x, mean, cov in (
            (before[h], found.key_mean_pre[1, h], found.key_cov_pre[1, h]),
            (v[h], found.value_mean[1, h], found.value_cov[1, h]),
            (q[h, 0::2], moments[1].mean[1, h, 0], moments[1].cov[1, h, 0]),
            (q[h, 1::2], moments[1].mean[1, h, 1], moments[1].cov[1, h, 1]),
        ):
            x = x.reshape(-1, 16)
            deviation = np.sqrt(np.diag(cov))
            assert (np.abs(x.mean(0) - mean) < 5 * deviation / np.sqrt(len(x))).all()
            scale = np.outer(deviation, deviation)
            assert (np.abs(np.cov(x.T) - cov) / scale < 6 / np.sqrt(len(x))).all()


def test_pages_and_heads_share_no_random_numbers(layer):
    at = jnp.zeros((2, 8), jnp.int32)
    k, _ = draw_tokens(layer, drawn_for(), jnp.array([3, 4]), at)
    again, _ = draw_tokens(layer, drawn_for(), jnp.array([4]), at[:1])
    np.testing.assert_array_equal(k[:, 1], again[:, 0])  # whatever is drawn beside it
    same = dataclasses.replace(layer, key_root=jnp.stack([layer.key_root[0]] * 2),
                               key_mean=jnp.zeros_like(layer.key_mean))  # fmt: skip
    k, _ = draw_tokens(same, drawn_for(), jnp.array([3, 4]), at)
    flat = np.asarray(k).reshape(4, -1)
    apart = np.abs(np.corrcoef(flat) - np.eye(4)).max()
    assert apart < 0.6
    assert not np.array_equal(k[0], k[1])


def test_queries_turn_with_their_position(layer):
    near, far = (np.asarray(draw_queries(layer, drawn_for(), 4, at)) for at in (0, 1000))
    assert not np.allclose(near, far)
    np.testing.assert_allclose(np.linalg.norm(near, axis=-1), np.linalg.norm(far, axis=-1), 1e-4)


def test_a_layer_of_the_same_shape_is_that_layer(moments):
    found, queries = shaped_like(*moments, CONFIG, 1)
    np.testing.assert_array_equal(found.key_cov_pre[0], moments[0].key_cov_pre[1])
    np.testing.assert_array_equal(queries.mean[0], moments[1].mean[1])
    assert found.shape == (1, 2, 16)
    assert found.tokens == moments[0].tokens


def test_wider_heads_are_blocks(moments):
    """Logits of a head of four blocks are the sum of theirs, over the root of four."""
    found, queries = shaped_like(*moments, WIDE, 0)
    assert found.shape == (1, 1, 64)
    assert queries.mean.shape == (1, 1, 2, 64)
    heads = moments[0].key_mean_pre.reshape(4, 16)
    asked = moments[1].mean.reshape(4, 2, 16)
    for g in range(2):
        want = (heads * asked[:, g]).sum() / 2
        assert queries.mean[0, 0, g] @ found.key_mean_pre[0, 0] == pytest.approx(want)
    # E (q k)^2 = tr(cov_q cov_k): blocks add up, and nothing comes in between them
    cov_q, cov_k = (
        moments[1].cov.reshape(4, 2, 16, 16)[:, 0],
        moments[0].key_cov_pre.reshape(4, 16, 16),
    )
    want = np.einsum("bde,bed->", cov_q, cov_k) / 4
    got = np.trace(queries.cov[0, 0, 0] @ found.key_cov_pre[0, 0])
    assert got == pytest.approx(want)
    # The fastest pair of each block is among the four fastest, and turns as one pair.
    first = np.flatnonzero(found.key_mean_pre[0, 0] == heads[2, 0])
    second = np.flatnonzero(found.key_mean_pre[0, 0] == heads[2, 8])
    assert first.tolist() == [2]
    assert second.tolist() == [2 + 32]
    assert found.frequencies[0, 0] == pytest.approx(0.5)  # of WIDE: scaled by two
    at = np.arange(4, 2048)[:, None] * found.frequencies[0]
    low, high = found.key_mean_pre[0, 0, :32], found.key_mean_pre[0, 0, 32:]
    turned = np.concatenate(
        [low * np.cos(at) - high * np.sin(at), high * np.cos(at) + low * np.sin(at)], -1
    )
    np.testing.assert_allclose(found.key_mean[0, 0], turned.mean(0), atol=1e-9)
    assert np.linalg.eigvalsh(found.key_cov[0, 0]).min() > 0
    total = np.trace(found.key_cov[0, 0]) + (found.key_mean[0, 0] ** 2).sum()
    right = np.trace(found.key_cov_pre[0, 0]) + (found.key_mean_pre[0, 0] ** 2).sum()
    assert total == pytest.approx(right)


@pytest.mark.parametrize("change", [{"head_dim": 24}, {"kv_heads": 2}])
def test_shapes_that_cannot_be_made(moments, change):
    with pytest.raises(InputError, match="moments for wide"):
        shaped_like(*moments, dataclasses.replace(WIDE, **change), 1)


def test_queries_are_measured_before_rope():
    """Against q = norm(x) W_q of the first layer, which no RoPE has touched."""
    from kvjax.evals.text import load_readable

    model = load_readable("tests/models/tiny/llama")
    config, params = model.config, model.params
    rng = np.random.default_rng(0)
    windows = list(rng.integers(0, config.vocab_size, (2, 20)).astype(np.int32))
    found = measure_queries(params, config, windows)
    first = params.runs[0]
    wide = lambda a: np.asarray(a, np.float64)
    x = wide(params.embed)[np.concatenate([w[4:] for w in windows])] * config.embed_scale
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * wide(first.attn_norm[0])
    q = (x @ wide(first.wq[0])).reshape(-1, config.kv_heads, config.q_per_kv, config.head_dim)
    q = q * config.attention_scale
    np.testing.assert_allclose(found.mean[0], q.mean(0), atol=1e-5)
    want = np.cov(q[:, 1, 0].T, bias=True)
    np.testing.assert_allclose(found.cov[0, 1, 0], want, atol=1e-5)


def test_margins_fade_with_the_log_of_the_context():
    assert Margin(1.5).at(10**6) == 1.5
    assert Margin(1.5, base=1000).at(1000) == 1.5
    # the share of e^1.5 among 1, and among 8
    share = 1 / (1 + np.exp(-Margin(1.5, base=1000).at(8000)))
    assert share == pytest.approx(np.exp(1.5) / (np.exp(1.5) + 8))


@pytest.mark.parametrize("depths", [(0.5, 0.5), (0.5, 0.1), (1.2,), (-0.1,)])
def test_depths_that_cannot_be(depths):
    with pytest.raises(InputError, match="depths"):
        needle_pages(depths, 1024, LAYOUT)


@pytest.mark.parametrize("context", [0, 100, 4])
def test_contexts_that_pages_do_not_divide(layer, moments, context):
    with pytest.raises(InputError, match="context"):
        empty_cache(method_of("bf16", moments), layer, context, one_device())


def test_standard_errors_are_over_queries():
    x = np.random.default_rng(0).normal(size=(5, 3, 40)) + np.arange(120).reshape(3, 40)
    mean, error = mean_and_error(x, (0,))
    each = x.mean(0).ravel()
    assert mean == pytest.approx(each.mean())
    assert error == pytest.approx(each.std(ddof=1) / np.sqrt(120))
