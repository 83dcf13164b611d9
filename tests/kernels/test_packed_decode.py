"""`packed_decode` in interpret mode against softmax attention in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packs import attention, block, part

from pallas_kernels.packed import Part
from pallas_kernels.packed_decode import packed_decode, packed_decode_reference
from pallas_kernels.packed_decode.config import Config

B, H, D, LAYERS = 2, 2, 32, 2


@functools.partial(jax.jit, static_argnames=("page", "splits", "tokens", "window"))
def run(q, key, value, lengths, extra, *, page, splits=2, tokens=128, window=None):
    config = Config(splits=splits, tokens=tokens)
    setup = functools.partial(packed_decode, config=config, backend="interpret", window=window)
    return setup(q, key, value, lengths, page=page, layer=1, **extra)


def tensors(rng, lead, page, key, value):
    """(bits, levels, scale) of each side -> parts and their values."""
    sides = []
    for (bits, levels, scale), transposed in ((key, False), (value, True)):
        made = block(rng, lead, page, D, bits, levels, transposed and bits < 16)
        packed, x = part(rng, lead, page, [made], scale)
        sides.append(((packed,), x))
    return sides


def flat(x):
    """Pages of the second layer in a row, `[b, h, t, d]`."""
    return x[1].reshape(B, H, -1, x.shape[-1])


def check(got, want, tolerance):
    (out, lse), (out64, lse64) = got, want
    scale = np.abs(out64).max()
    np.testing.assert_allclose(np.asarray(out) / scale, out64 / scale, atol=tolerance)
    np.testing.assert_allclose(np.asarray(lse), lse64, rtol=1e-4, atol=2 * tolerance)


CASES = {
    "1 bit levels": ((1, True, "token"), (1, True, "token")),
    "2 bits": ((2, False, "token"), (2, False, "token")),
    "2 bits levels": ((2, True, "token"), (2, True, "token")),
    "channel scales, 8 bits": ((2, False, "channel"), (8, False, "token")),
    "3 bits levels, 4 bits": ((3, True, "token"), (4, False, "token")),
    "4 bits levels, 3 bits": ((4, True, "none"), (3, False, "none")),
    "bf16, 2 bits": ((16, False, "none"), (2, True, "none")),
    "bf16": ((16, False, "none"), (16, False, "none")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", [(192, 77)], ids=["ragged"])
def test_is_attention(case, lengths):
    rng = np.random.default_rng(0)
    key, value = CASES[case]
    page, n = 64, 3
    (k, k64), (v, v64) = tensors(rng, (LAYERS, B, H, n), page, key, value)
    q = jnp.asarray(rng.normal(size=(B, H, 3, D)) * D**-0.5, jnp.float32)
    lengths = np.array(lengths)
    seen = np.broadcast_to(np.arange(n * page) < lengths[:, None, None], (B, H, n * page))
    want = attention(q, flat(k64), flat(v64), seen)
    # Operands of a product are rounded: to 11 bits of codes' queries and weights, 8 of bf16's.
    check(run(q, k, v, jnp.asarray(lengths), {}, page=page), want, 1e-2 if "bf16" in case else 2e-3)


@pytest.fixture(scope="module")
def simple():
    """Two-bit tensors of four pages of 32 tokens, with their values."""
    rng = np.random.default_rng(1)
    kind = (2, True, "token")
    (k, k64), (v, v64) = tensors(rng, (LAYERS, B, H, 4), 32, kind, kind)
    q = jnp.asarray(rng.normal(size=(B, H, 3, D)) * D**-0.5, jnp.float32)
    return q, k, v, flat(k64), flat(v64)


@pytest.mark.parametrize(
    "lengths", [(128, 128), (1, 0), (32, 33), (500, -7)], ids=["full", "one", "border", "outside"]
)
def test_lengths(simple, lengths):
    """Also those beyond what there is room for, which are clamped: nothing outside is read."""
    q, k, v, k64, v64 = simple
    seen = np.arange(128) < np.array(lengths)[:, None, None]
    want = attention(q, k64, v64, np.broadcast_to(seen, (B, H, 128)))
    check(run(q, k, v, jnp.array(lengths), {}, page=32), want, 2e-3)


def test_heads_may_differ_in_length(simple):
    q, k, v, k64, v64 = simple
    lengths = np.array([[128, 5], [0, 70]])
    want = attention(q, k64, v64, np.arange(128) < lengths[..., None])
    check(run(q, k, v, jnp.asarray(lengths), {}, page=32), want, 2e-3)


@pytest.mark.parametrize("splits", [1, 7])
def test_any_number_of_splits(simple, splits):
    q, k, v, k64, v64 = simple
    seen = np.broadcast_to(np.arange(128) < np.array([[[100]], [[3]]]), (B, H, 128))
    got = run(q, k, v, jnp.array([100, 3]), {}, page=32, splits=splits, tokens=32)
    check(got, attention(q, k64, v64, seen), 2e-3)


def test_pages_through_a_table(simple):
    q, _, _, _, _ = simple
    rng = np.random.default_rng(2)
    kind, pool = (2, False, "token"), 11
    (k, k64), (v, v64) = tensors(rng, (LAYERS, pool, H), 32, kind, kind)
    table = rng.permutation(pool)[: B * 4].reshape(B, 4)
    rows = lambda x: np.moveaxis(x[1][table], 2, 1).reshape(B, H, 128, D)
    table[1, 2:] = -1  # beyond that sequence's length: not read
    seen = np.broadcast_to(np.arange(128) < np.array([[[128]], [[50]]]), (B, H, 128))
    got = run(q, k, v, jnp.array([128, 50]), {"table": jnp.asarray(table)}, page=32)
    check(got, attention(q, rows(k64), rows(v64), seen), 2e-3)


def test_sliding_window(simple):
    """Slots are used in turn: the order of positions is not that of slots."""
    q, k, v, k64, v64 = simple
    starts = np.array([[[132, 164, 68, 100]], [[0, 32, -1, -1]]])
    position = np.array([190, 40])
    at = (starts[..., None] + np.arange(32)).reshape(B, 1, 128)
    now = position[:, None, None]
    seen = (np.repeat(starts, 32, -1) >= 0) & (at <= now) & (now - at < 70)
    extra = {
        "starts": jnp.asarray(np.broadcast_to(starts[:, 0], (LAYERS, B, 4))),
        "position": jnp.asarray(position),
    }
    got = run(q, k, v, jnp.array([128, 64]), extra, page=32, window=70)
    check(got, attention(q, k64, v64, np.broadcast_to(seen, (B, H, 128))), 2e-3)


def test_parts_blocks_and_odd_channels():
    """Tiers of 16, 8 and 24 channels of different widths, and a second part of its own scale."""
    rng, page, n = np.random.default_rng(3), 32, 2
    lead = (LAYERS, B, H, n)
    tier = lambda size, bits, levels, t: block(rng, lead, page, size, bits, levels, t)
    sides = []
    for t in (False, True):
        one = part(rng, lead, page, [tier(16, 4, True, t), tier(8, 2, True, t)], "token")
        two = part(rng, lead, page, [tier(24, 2, False, t)], "none")
        sides.append(((one[0], two[0]), np.concatenate([one[1], two[1]], -1)))
    (k, k64), (v, v64) = sides
    q = jnp.asarray(rng.normal(size=(B, H, 9, 48)) * 0.2, jnp.float32)
    lengths = np.array([64, 40])
    seen = np.broadcast_to(np.arange(64) < lengths[:, None, None], (B, H, 64))
    got = run(q, k, v, jnp.asarray(lengths), {}, page=page)
    check(got, attention(q, flat(k64), flat(v64), seen), 2e-3)


def test_the_reference_is_attention(simple):
    q, k, v, k64, v64 = simple
    seen = np.broadcast_to(np.arange(128) < np.array([[[128]], [[9]]]), (B, H, 128))
    got = packed_decode_reference(q, k, v, jnp.array([128, 9]), layer=1)
    check(got, attention(q, k64, v64, seen), 1e-5)


def test_large_scales_of_values_do_not_overflow(simple):
    """fp16 weights hold p times the scale: only in units of the largest scale."""
    q, k, v = simple[:3]
    scale = v[0].token_scale.astype(jnp.float32)
    plain, big = ((Part(v[0].blocks, token_scale=scale * by),) for by in (1, 1e6))
    lengths = jnp.array([128, 128])
    got, _ = run(q, k, big, lengths, {}, page=32)
    want, _ = run(q, k, plain, lengths, {}, page=32)
    np.testing.assert_allclose(got / 1e6, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q, k, v: (jnp.zeros((B, H, 17, D)), k, v, 32), "17 query heads"),
        (lambda q, k, v: (q[..., :8], k, v, 32), "keys of 32 channels"),
        (lambda q, k, v: (q, k, v, 16), "expected 2 for a page of 16"),
        (lambda q, k, v: (q, k, v, 20), "pages of 20"),
        (lambda q, k, v: (q, k, (Part(v[0].blocks, channel_scale=q),), 32), "axis"),
    ],
)
def test_what_it_does_not_take_is_said_before_launch(simple, change, says):
    q, k, v, page = change(*simple[:3])
    with pytest.raises(ValueError, match=says):
        packed_decode(q, k, v, jnp.array([1, 1]), page=page, backend="interpret")
