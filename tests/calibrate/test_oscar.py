"""OSCAR: rotations from moments against an oracle, what P does and does not, true bits, a cache."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.calibrate import oscar as fit
from kvjax.codecs.clipped_uniform import ClippedUniform
from kvjax.core.errors import InputError
from kvjax.methods.describe import code_bits
from kvjax.methods.oscar import LAYOUT, oscar

D, H = 32, 3
COMPOSITIONS = fit._FACTORS


def moment(*lead: int, d: int = D, seed: int = 0) -> np.ndarray:
    """Second moments with a spread spectrum, in a basis of their own."""
    rng = np.random.default_rng(8000 + seed)
    basis = np.linalg.qr(rng.normal(size=(*lead, d, d)))[0]
    x = rng.normal(size=(*lead, 4 * d, d)) * np.linspace(0.2, 3, d) @ basis
    return x.swapaxes(-1, -2) @ x / (4 * d)


def oracle_permutation(eigenvalues: np.ndarray) -> np.ndarray:
    """The released rule, word for word: perm[br[i]] = argsort(ev, descending)[i]."""
    bits = int(math.log2(len(eigenvalues)))
    perm = [0] * len(eigenvalues)
    for i, s in enumerate(np.argsort(-eigenvalues)):
        perm[int(format(i, f"0{bits}b")[::-1], 2)] = int(s)
    return np.eye(len(eigenvalues))[:, perm]


def oracle_hadamard(d: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < d:
        h = np.kron([[1, 1], [1, -1]], h)
    return h / math.sqrt(d)


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_compositions(composition):
    gram = moment()
    eigenvalues, u = np.linalg.eigh(gram)
    factor = {"r": u, "h": oracle_hadamard(D), "pbr": oracle_permutation(eigenvalues)}
    names = {"plain": ["r"], "br": ["r", "pbr"], "br_h128": ["r", "pbr", "h"]}
    expected = np.eye(D)
    for name in names.get(composition, composition.split("_")):
        expected = expected @ factor[name]
    got = fit.oscar_rotation(gram, composition)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert fit.defect(got) < 1e-12


def test_the_eigenbasis():
    """Diagonal in it, by rising weight, to 1e-6; and one head at a time equals all at once."""
    gram = moment(2, H)
    u = fit.oscar_rotation(gram, "plain")
    inside = u.swapaxes(-1, -2) @ gram @ u
    weights = np.diagonal(inside, axis1=-2, axis2=-1)
    assert (np.diff(weights) > 0).all()
    off = inside - weights[..., None] * np.eye(D)
    assert abs(off).max() < 1e-6 * weights.max()
    rotation = fit.oscar_rotation(gram)
    assert fit.defect(rotation) < 1e-6
    np.testing.assert_array_equal(rotation[1, 2], fit.oscar_rotation(gram[1, 2]))
    assert fit.oscar_rotation(gram, "h_pbr").shape == gram.shape


def test_every_direction_gets_the_mean_weight():
    """What H is for: after U H the diagonal of the moment is flat, whatever the spectrum."""
    gram = moment()
    rotation = fit.oscar_rotation(gram)
    np.testing.assert_allclose(np.diag(rotation.T @ gram @ rotation), np.trace(gram) / D, rtol=1e-9)


def test_the_permutation_is_the_same_for_all_data():
    perm = fit.oscar_rotation(moment(), "pbr").argmax(0)
    np.testing.assert_array_equal(perm, D - 1 - fit.bit_reversal(D))
    np.testing.assert_array_equal(fit.oscar_rotation(moment(seed=1), "pbr").argmax(0), perm)


QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def compiled():
    return jax.jit(lambda codec, x: codec.decode(codec.encode(x)), compiler_options=QUICK)


def errors(codec, y: np.ndarray) -> np.ndarray:
    return np.asarray(compiled()(codec, y)) - y


@pytest.mark.parametrize("clip", [0.96, 0.92, 1.0])
def test_p_does_nothing_at_one_group_per_token(clip):
    """Not approximately: the same errors, in another order of the channels."""
    d = 128
    gram = moment(d=d)
    x = np.random.default_rng(8001).normal(size=(64, d)) * np.linspace(0.1, 2, d)
    with_p, without = (fit.oscar_rotation(gram, c) for c in ("r_h_pbr", "r_h"))
    perm = d - 1 - fit.bit_reversal(d)
    np.testing.assert_array_equal(with_p, without[:, perm])
    y = (x @ without).astype(np.float32)
    for dtype in ("float16", "float32"):
        codec = ClippedUniform(2, clip=clip, scale_dtype=dtype)
        np.testing.assert_array_equal(errors(codec, y[:, perm]), errors(codec, y)[:, perm])
        small = ClippedUniform(2, clip=clip, group=32, scale_dtype=dtype)
        assert (np.sort(errors(small, y[:, perm])) != np.sort(errors(small, y))).any()


@pytest.mark.parametrize("lead", [(), (H,)])
def test_a_transform_is_the_row_convention(lead):
    """`Linear` computes A x of columns; OSCAR's k' = k R is the same with A = R^T."""
    rotation = fit.oscar_rotation(moment(*lead))
    made = fit.transform(rotation)
    x = np.random.default_rng(8002).normal(size=(2, H, 1, 5, D)).astype(np.float32)
    expected = x @ (rotation if not lead else rotation[:, None])
    np.testing.assert_allclose(made.forward(x), expected, atol=1e-5)
    np.testing.assert_allclose(made.inverse(made.forward(x)), x, atol=1e-5)
    assert made.matrix.shape == ((H, 1, D, D) if lead else (D, D))


def test_moments_of_values():
    rng = np.random.default_rng(8003)
    q, k, v = (rng.normal(size=(2, 40, D)) for _ in range(3))
    s = np.exp(q @ k.swapaxes(-1, -2))
    s /= s.sum(-1, keepdims=True)
    got = fit.value_gram(s, v)
    expected = np.einsum("hst,htd,hsu,hue->hde", s, v, s, v, optimize=True) / 40
    np.testing.assert_allclose(got, expected, rtol=1e-10)

    gram = np.einsum("htd,hte->hde", q, q) / 40
    got = fit.proxy_value_gram(k, v, gram)
    for h in range(2):
        w = np.array([key @ gram[h] @ key for key in k[h]])
        w /= w.mean()
        expected = sum(
            weight * np.outer(value, value) for weight, value in zip(w, v[h], strict=True)
        )
        np.testing.assert_allclose(got[h], expected / 40, rtol=1e-10)
    np.testing.assert_allclose(fit.pooled(got), got.mean(0))
    np.testing.assert_array_equal(fit.proxy_value_gram(np.zeros_like(k), v, gram), 0)


def test_residual_rotation_is_the_best_pairing():
    gram, error = moment(d=6), moment(d=6, seed=3)
    best = fit.residual_rotation(gram, error)
    assert fit.defect(best) < 1e-12
    cost = lambda r: np.trace(error @ r.T @ gram @ r)
    rising = np.linalg.eigvalsh(gram) @ np.linalg.eigvalsh(error)[::-1]
    assert cost(best) == pytest.approx(rising, rel=1e-9)
    rng = np.random.default_rng(8004)
    assert all(cost(np.linalg.qr(rng.normal(size=(6, 6)))[0]) > rising for _ in range(200))


def test_mistakes():
    with pytest.raises(InputError, match="r_h_pbr"):
        fit.oscar_rotation(moment(), "r_p")
    with pytest.raises(InputError, match="power of two"):
        fit.oscar_rotation(moment(d=24))
    for bad in (np.ones((4, 8)), np.ones(4), np.triu(np.ones((4, 4))), np.full((4, 4), np.nan)):
        with pytest.raises(InputError, match="gram"):
            fit.oscar_rotation(bad)
    for bad in (np.eye(4) * 2, np.ones((4, 4)), np.eye(4)[None, None], np.full((4, 4), np.nan)):
        with pytest.raises(InputError, match="rotation"):
            fit.transform(bad)
    with pytest.raises(InputError, match="variant"):
        oscar(*sides(D), variant="lm")


# The recipe: true bits, and a cache whose windows are exact.


def sides(d: int, *lead: int):
    return (fit.transform(fit.oscar_rotation(moment(*lead, d=d, seed=s))) for s in (4, 5))


@pytest.mark.parametrize(("dtype", "published"), [("float16", 2.284), ("float32", 2.533)])
@pytest.mark.parametrize("variant", ["int2", "lloyd_max"])
def test_published_bits(dtype, published, variant):
    """BPE(T) = (1 - 320 / T) (2 + 2 m / 128) + 16 * 320 / T at 131,072 tokens, from real shapes.

    It leaves out what a cache has besides: one page more of exact slots in the ring (theirs: 7),
    and positions. 131,072 - 320 is a whole number of pages of 64, so nothing is left over.
    """
    context, heads, d = 131_072, 8, 128
    method = oscar(*sides(d), variant=variant, scale_dtype=dtype)
    shapes = jax.eval_shape(
        lambda: kvjax.init(method, capacity=context, kv_heads=heads, head_dim=d)
    )
    values = 2 * context * heads * d
    bits = lambda leaves: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(leaves)) * 8
    pages = bits((shapes.key_pages, shapes.value_pages))
    windows = bits((shapes.window_key, shapes.window_value))
    slack = 2 * heads * d * 16 * LAYOUT.page
    assert (pages + windows - slack) / values == pytest.approx(published, abs=1e-3)

    side = 2 * int(dtype[-2:]) / d
    assert code_bits(method.key, d, LAYOUT.page) == code_bits(method.value, d, LAYOUT.page)
    assert code_bits(method.key, d, LAYOUT.page) == 2 + side
    positions = bits((shapes.page_starts, shapes.window_positions, shapes.length, shapes.packed))
    assert slack / values == 16 * 64 / context  # 0.008 bits
    assert positions / values < 3e-4
    assert kvjax.cache_bytes(shapes) * 8 == pages + windows + positions


def test_short_contexts_cost_more():
    """The published 2.38 at 32K."""
    share = 320 / 32_768
    per_token = code_bits(oscar(*sides(128)).key, 128, LAYOUT.page)
    assert (1 - share) * per_token + 16 * share == pytest.approx(2.384, abs=1e-3)


def test_a_cache_of_it():
    """Sink and recent tokens exact, pages as the codec alone would code them, per KV head."""
    layout = kvjax.Layout(sink=4, recent=16, page=16)
    method = oscar(*sides(D, H), layout=layout)
    rng = np.random.default_rng(8005)
    t = 4 + 3 * 16 + 5
    k, v = (jnp.asarray(rng.normal(size=(1, t, H, D)), jnp.bfloat16) for _ in range(2))
    q = rng.normal(size=(1, H, 2, D)).astype(np.float32)

    def run(method, q, k, v):
        cache = kvjax.init(method, capacity=64, kv_heads=H, head_dim=D)
        return kvjax.attend(method, kvjax.prefill(method, cache, k, v)[1], q)

    out = np.asarray(jax.jit(run, compiler_options=QUICK)(method, q, k, v), np.float64)
    packed = slice(4, 4 + 2 * 16)
    full = [np.array(a, np.float64).swapaxes(1, 2) for a in (k, v)]  # [b, h, t, d]
    for codec, a in zip((method.key, method.value), full, strict=True):
        page = jnp.asarray(a[:, :, None, packed], jnp.float32)
        a[:, :, packed] = compiled()(codec, page)[:, :, 0]
    logits = np.einsum("bhgd,bhtd->bhgt", q, full[0]) / math.sqrt(D)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(out, np.einsum("bhgt,bhtd->bhgd", p, full[1]), atol=1e-5)
