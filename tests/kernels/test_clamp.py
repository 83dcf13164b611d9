"""Lengths, page ids and layers out of range: clamped, no other sequence touched, and flagged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from packs import block, part

from pallas_kernels.checks import wanted
from pallas_kernels.packed_decode import kernel, packed_decode
from pallas_kernels.packed_decode.config import Config
from pallas_kernels.probe_scores import probe_scores

B, H, D, LAYERS, SLOTS, POOL, PAGE = 3, 1, 16, 2, 2, 5, 16
FINE = ([20, 32, 7], [[0, 1], [2, 3], [4, -1]], 1)  # the last sequence has no second page


def made(rng, lead):
    packed, _ = part(rng, lead, PAGE, [block(rng, lead, PAGE, D, 2, True)], "token")
    return (packed,)


@functools.cache
def tensors(paged):
    rng = np.random.default_rng(0)
    lead = (LAYERS, POOL, H) if paged else (LAYERS, B, H, SLOTS)
    q = jnp.asarray(rng.normal(size=(B, H, 2, D)), jnp.float32)
    return q, made(rng, lead), made(rng, lead)


@functools.partial(jax.jit, static_argnames=("check",))
def run(tensors, lengths, table, layer, check=None):
    """The error, and `packed_decode`'s output and log-sum-exp."""
    config = Config(tokens=16)
    setup = functools.partial(packed_decode, page=PAGE, config=config, backend="interpret")
    given = (lengths, {"table": table, "layer": layer})
    return checkify.checkify(lambda n, more: setup(*tensors, n, check=check, **more))(*given)


def read(lengths, table, layer, paged=True):
    table = jnp.array(table) if paged else None
    error, out = run(tensors(paged), jnp.array(lengths), table, jnp.int32(layer))
    return error.get(), [np.asarray(a) for a in out]


def check(wrong, clamped, says, others, paged=True):
    """What is wrong reads as what is clamped, and sequences `others` as if nothing were wrong."""
    error, got = read(*wrong, paged)
    assert says in error
    assert "packed_decode: got" in error
    silent, want = read(*clamped, paged)
    assert silent is None
    fine = read(*FINE, paged)[1]
    for a, b, c in zip(got, want, fine, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[others], c[others])
        assert np.isfinite(a).all()


def test_what_is_in_range_is_not_flagged():
    """The id -1 is in a slot that holds no token."""
    assert read(*FINE)[0] is None
    assert read(*FINE, paged=False)[0] is None


@pytest.mark.parametrize("paged", [True, False])
def test_a_length_past_the_room(paged):
    _, table, layer = FINE
    wrong, clamped = [20, 1000, 7], [20, 32, 7]
    says = "got length 1000 in sequence 1; expected 0 to 32, clamped; correct the lengths"
    check((wrong, table, layer), (clamped, table, layer), says, [0, 2], paged)


def test_a_negative_length_reads_nothing():
    _, table, layer = FINE
    says = "got length -5 in sequence 0; expected 0 to 32"
    check(([-5, 32, 7], table, layer), ([0, 32, 7], table, layer), says, [1, 2])
    out, lse = read([-5, 32, 7], table, layer)[1]
    assert (out[0] == 0).all()
    assert (lse[0] < -1e29).all()


@pytest.mark.parametrize(("page", "nearest"), [(99, POOL - 1), (POOL, POOL - 1), (-1, 0)])
def test_a_page_outside_of_the_pool(page, nearest):
    lengths, table, layer = FINE
    wrong, clamped = ([table[0], [2, id_], table[2]] for id_ in (page, nearest))
    says = f"got page {page} in sequence 1; expected 0 to 4, clamped; correct the page table"
    check((lengths, wrong, layer), (lengths, clamped, layer), says, [0, 2])


@pytest.mark.parametrize(("layer", "nearest"), [(7, 1), (-1, 0)])
def test_a_layer_that_is_not_there(layer, nearest):
    lengths, table, _ = FINE
    says = f"got layer {layer}; expected 0 to 1, clamped; correct the layer"
    check((lengths, table, layer), (lengths, table, nearest), says, [])


def test_the_error_is_thrown_and_lengths_by_head_are_checked():
    lengths = jnp.array([[20], [33], [7]])
    error, _ = run(tensors(True), lengths, jnp.array(FINE[1]), jnp.int32(1))
    with pytest.raises(checkify.JaxRuntimeError, match="got length 33 in sequence 1"):
        error.throw()


def test_without_checks_it_is_clamped_all_the_same():
    given = (tensors(True), jnp.array([20, 1000, 7]), jnp.array(FINE[1]), jnp.int32(1))
    error, out = run(*given, check=False)
    assert error.get() is None
    for a, b in zip(out, run(*given)[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_kernel_is_given_what_is_in_range(monkeypatch):
    """Interpret mode would clamp an index of its own: on a GPU nothing but this does."""
    given = {}

    def launch(body, args, **_):
        given.update({name: np.asarray(args[name]) for name in ("lengths", "layer", "table")})
        raise InterruptedError

    monkeypatch.setattr(kernel, "call", launch)
    table = jnp.array([[99, -1], [-2, 4], [5, 0]])
    more = {"page": PAGE, "layer": 7, "backend": "triton", "config": Config(), "table": table}
    with pytest.raises(InterruptedError):
        packed_decode(*tensors(True), jnp.array([-5, 1000, 32]), **more)
    assert given["lengths"][:, 0].tolist() == [0, 32, 32]
    assert given["layer"].tolist() == [LAYERS - 1]
    assert given["table"].tolist() == [[4, 0], [0, 4], [4, 0]]


def test_probe_scores():
    rng = np.random.default_rng(1)
    q, key = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 1, 1, 4, D), (2, 1, 9, D)))
    scores = functools.partial(probe_scores, q, key, backend="interpret")
    run = jax.jit(checkify.checkify(scores))
    error, got = run(jnp.array([4, 10]))
    assert "probe_scores: got length 10 in sequence 1; expected 0 to 9" in error.get()
    fine, want = run(jnp.array([4, 9]))
    assert fine.get() is None
    np.testing.assert_array_equal(got.total, want.total)


def test_where_checks_are():
    assert wanted(None, "interpret")
    assert not wanted(None, "triton")
    assert wanted(True, "triton")
    assert not wanted(False, "interpret")
    with jax.enable_checks(True):
        assert wanted(None, "triton")
