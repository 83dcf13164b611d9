"""Policies that judge by attention: column scores by the fused kernel in interpret mode and by XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import probe_kernel
from kvjax.attention.probe_kernel import backend
from kvjax.policies.h2o import H2O
from kvjax.policies.policy import Columns, Seen, columns
from kvjax.policies.probe import Probe
from kvjax.policies.snapkv import SnapKV
from kvjax.policies.tova import Tova
from pallas_kernels.ahead.lowering import kernels, lower

B, H, G, T, S, D = 2, 2, 3, 9, 21, 16


def seen(attention, seed=0):
    """Slots in no order, other tokens in every head, empty slots with numbers of no meaning; the
    second sequence has 4 real queries, one of them before all of its keys."""
    rng = np.random.default_rng(seed)
    floats = lambda *shape: jnp.asarray(2 * rng.normal(size=shape), jnp.float32)
    positions = rng.permuted(np.broadcast_to(np.arange(3, 3 + S), (B, H, S)), axis=-1)
    positions = np.where(rng.random(positions.shape) < 0.2, -1, positions)
    at = np.full((B, T), -1)
    at[0], at[1, :4] = np.arange(12, 12 + T), (2, 10, 11, 30)
    key = jnp.where(positions[..., None] < 0, 1e3, floats(B, H, S, D))
    ints = lambda a: jnp.asarray(a, jnp.int32)
    mass = jnp.abs(floats(B, H, S))
    query = floats(B, H, G, T, D) * D**-0.5
    given = (key, key, ints(positions), query, ints(at), mass, (), jnp.ones(D // 2))
    return Seen(*given, attention=attention)


@functools.partial(jax.jit, static_argnames=("last",))
def run(of, last=None):
    return columns(of, last=last, chunk=4)


@pytest.mark.parametrize("last", [None, 3])
def test_columns(last):
    got, want = (run(seen(how), last) for how in ("interpret", "page_scan"))
    assert isinstance(got, Columns)
    np.testing.assert_allclose(got.total, want.total, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got.peak, want.peak, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got.queries, want.queries)
    assert got.queries.dtype == want.queries.dtype
    assert float(want.total.sum()) > 1
    np.testing.assert_array_equal(np.asarray(got.total)[np.asarray(seen("auto").positions) < 0], 0)


def test_against_float64():
    """From the formula: sums are means over the query heads, peaks are not."""
    of = seen("interpret")
    got = run(of)
    q, k = (np.asarray(a, np.float64) for a in (of.query, of.key))
    places, at = np.asarray(of.positions), np.asarray(of.query_positions)
    total, peak, queries = (np.zeros((B, H, S)) for _ in range(3))
    for b, h, g, t in np.ndindex(B, H, G, T):
        held = (places[b, h] >= 0) & (places[b, h] <= at[b, t])
        if held.any():
            weight = np.exp(k[b, h, held] @ q[b, h, g, t])
            weight /= weight.sum()
            total[b, h, held] += weight / G
            peak[b, h, held] = np.maximum(peak[b, h, held], weight)
        queries[b, h] += held / G
    np.testing.assert_allclose(got.total, total, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(got.peak, peak, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(got.queries, queries, atol=1e-5)


def test_policies_give_the_same_verdicts():
    policies = (H2O(), Tova(), SnapKV(window=4), Probe("mean"))
    judge = jax.jit(lambda of: [p.score(of) for p in policies[1:]] + [policies[0].observe(of)[0]])
    for got, want in zip(judge(seen("interpret")), judge(seen("page_scan")), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_it_is_the_kernel_that_runs(monkeypatch):
    calls = []
    real = probe_kernel.probe_scores
    note = lambda *a, **kw: calls.append(kw["backend"]) or real(*a, **kw)
    monkeypatch.setattr(probe_kernel, "probe_scores", note)
    for how in ("interpret", "page_scan", "auto", "tpu"):
        jax.eval_shape(columns, seen(how))
    assert calls == ["interpret"]


def test_lowers_for_cuda():
    """Its two passes."""
    assert kernels(lower(columns, "cuda", seen("triton")), "cuda") == 2


def test_what_is_chosen():
    of = seen("auto")
    assert backend("auto", of.query, of.key) is None  # on a CPU nothing is chosen by itself
    assert backend("triton", of.query, of.key) == "triton"
    assert backend("tpu", of.query, of.key) is None
    assert backend("triton", of.query[:, :, :, :0], of.key) is None
