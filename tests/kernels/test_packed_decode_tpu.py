"""`packed_decode` for a TPU: interpreted, against attention in float64; and lowered for one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packs import attention, block, part

from pallas_kernels import planes
from pallas_kernels.packed import Block, Part
from pallas_kernels.packed_decode.tpu import packed_decode_tpu
from pallas_kernels.packed_decode.tpu_form import (
    Codes,
    fields,
    operand_weights,
    operands,
    split,
    widen,
)

B, H, D, LAYERS, PAGE = 2, 2, 32, 2, 32


@functools.partial(jax.jit, static_argnames=("window", "parts"))
def run(q, key, value, lengths, extra, *, window=None, parts=lambda side: side):
    setup = functools.partial(packed_decode_tpu, page=PAGE, tokens=64, interpret=True)
    return setup(q, parts(key), value, lengths, layer=1, window=window, **extra)


def tensor(rng, lead, bits, levels, scale, transposed=False):
    packed, x = part(rng, lead, PAGE, [block(rng, lead, PAGE, D, bits, levels, transposed)], scale)
    return (packed,), x


def flat(x):
    """Pages of the second layer in a row, `[b, h, t, d]`."""
    return x[1].reshape(B, H, -1, x.shape[-1])


def queries(rng, g=3):
    return jnp.asarray(rng.normal(size=(B, H, g, D)) * D**-0.5, jnp.float32)


def before(lengths, tokens=4 * PAGE):
    lengths = np.asarray(lengths)
    lengths = lengths if lengths.ndim == 2 else lengths[:, None]
    return np.broadcast_to(np.arange(tokens) < lengths[..., None], (B, H, tokens))


def check(got, want):
    """Queries, weights and codes are exact to 2**-16: closer than half precision would be."""
    (out, lse), (out64, lse64) = got, want
    scale = np.abs(out64).max()
    np.testing.assert_allclose(np.asarray(out) / scale, out64 / scale, atol=1e-4)
    np.testing.assert_allclose(np.asarray(lse), lse64, rtol=1e-5, atol=1e-4)


CASES = {
    "levels of 3 bits with channel scales, 8 bits": ((3, True, "channel"), (8, False, "token")),
    "bf16, levels of 4 bits": ((16, False, "none"), (4, True, "token", True)),
    "levels of 1 bit, 3 bits": ((1, True, "none"), (3, False, "none")),
}


@pytest.mark.parametrize("case", CASES)
def test_is_attention(case):
    rng = np.random.default_rng(0)
    (k, k64), (v, v64) = (tensor(rng, (LAYERS, B, H, 4), *kind) for kind in CASES[case])
    q = queries(rng)
    want = attention(q, flat(k64), flat(v64), before([128, 37]))
    check(run(q, k, v, jnp.array([128, 37]), {}), want)


@pytest.fixture(scope="module")
def simple():
    """Two-bit tensors of four pages, with their values."""
    rng = np.random.default_rng(1)
    k, k64 = tensor(rng, (LAYERS, B, H, 4), 2, False, "token")
    v, v64 = tensor(rng, (LAYERS, B, H, 4), 2, True, "token", True)
    return queries(rng), k, v, flat(k64), flat(v64)


@pytest.mark.parametrize(
    "lengths",
    [
        [[128, 128], [128, 128]],
        [[1, 0], [33, 64]],
        [[500, -7], [65, 127]],
    ],
    ids=["full", "ragged", "outside"],
)
def test_lengths_of_every_head(simple, lengths):
    """Also those beyond what there is room for, which are clamped; and of nothing at all."""
    q, k, v, k64, v64 = simple
    want = attention(q, k64, v64, before(lengths))
    check(run(q, k, v, jnp.array(lengths), {}), want)


def test_pages_through_a_table_and_many_queries():
    rng, pool = np.random.default_rng(2), 11
    k, k64 = tensor(rng, (LAYERS, pool, H), 2, True, "token")
    v, v64 = tensor(rng, (LAYERS, pool, H), 2, False, "token")
    table = rng.permutation(pool)[: B * 4].reshape(B, 4)
    rows = lambda x: np.moveaxis(x[1][table], 2, 1).reshape(B, H, 128, D)
    want = attention(q := queries(rng, 9), rows(k64), rows(v64), before([128, 50]))
    table[1, 2:] = -1  # beyond that sequence's length: not read
    check(run(q, k, v, jnp.array([128, 50]), {"table": jnp.asarray(table)}), want)


def test_sliding_window(simple):
    """Slots are used in turn: the order of positions is not that of slots."""
    q, k, v, k64, v64 = simple
    starts = np.array([[132, 164, 68, 100], [0, 32, -1, -1]])
    position = np.array([190, 40])
    at = (starts[..., None] + np.arange(PAGE)).reshape(B, 1, 128)
    now = position[:, None, None]
    seen = (np.repeat(starts, PAGE, -1)[:, None] >= 0) & (at <= now) & (now - at < 70)
    extra = {
        "starts": jnp.asarray(np.stack([0 * starts, starts])),
        "position": jnp.asarray(position),
    }
    got = run(q, k, v, jnp.array([128, 64]), extra, window=70)
    check(got, attention(q, k64, v64, np.broadcast_to(seen, (B, H, 128))))


def by_group(side):
    """Parts of eight channels each that share words, scales and zeros."""
    words, scale, zero = side
    return tuple(
        Part((Block(words, None, 2, 8 * i, 8),), scale, zero, column=i) for i in range(D // 8)
    )


def test_groups_of_channels_and_tiers_of_bits():
    """Keys: parts of the same words, a column of scales each. Values: tiers in one part of two."""
    rng, lead = np.random.default_rng(3), (LAYERS, B, H, 4)
    codes = rng.integers(0, 4, (*lead, PAGE, D))
    scale, zero = (rng.uniform(0.1, 1, (*lead, PAGE, D // 8)).astype(np.float32) for _ in "sz")
    k64 = codes * np.repeat(scale, 8, -1).astype(float) + np.repeat(zero, 8, -1)
    k = (planes.pack(jnp.asarray(codes), 2), jnp.asarray(scale, jnp.float32), jnp.asarray(zero))
    tier = lambda size, bits, levels: block(rng, lead, PAGE, size, bits, levels, True)
    one = part(rng, lead, PAGE, [tier(16, 4, False), tier(8, 2, True)], "token")
    two = part(rng, lead, PAGE, [tier(8, 1, True)], "none")
    v, v64 = (one[0], two[0]), np.concatenate([one[1], two[1]], -1)
    q = queries(rng)
    got = run(q, k, v, jnp.array([128, 40]), {}, parts=by_group)
    check(got, attention(q, flat(k64), flat(v64), before([128, 40])))


def abstract(x):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)


@pytest.mark.parametrize("pool", [False, True], ids=["rows", "pool"])
def test_lowers_for_a_tpu(pool):
    """What interpreting does not ask: that Mosaic knows every operation."""
    rng = np.random.default_rng(4)
    lead = (LAYERS, B * 4, H) if pool else (LAYERS, B, H, 4)
    k, _ = tensor(rng, lead, 3, False, "channel")
    v, _ = tensor(rng, lead, 2, True, "token", True)
    extra = {"table": jnp.zeros((B, 4), jnp.int32)} if pool else {}
    args = abstract((queries(rng), k, v, jnp.array([128, 37]), extra))
    mesh = jax.sharding.AbstractMesh(
        (1,),
        ("one",),
        axis_types=(jax.sharding.AxisType.Auto,),
        abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu"),
    )
    setup = lambda q, k, v, n, extra: packed_decode_tpu(q, k, v, n, page=PAGE, layer=1, **extra)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(setup).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    assert "@tpu_custom_call" in text


@pytest.mark.parametrize(
    ("bits", "levels"),
    [(1, False), (2, False), (3, False), (8, False), (1, True), (2, True), (3, True), (4, True)],
)
def test_weights_of_operands_give_every_level(bits, levels):
    book = np.sort(np.random.default_rng(5).normal(size=2 ** (bits - 1)))
    book = np.concatenate([-np.abs(book)[::-1], np.abs(book)]).astype(np.float32)
    made = Block((), jnp.asarray(book) if levels else None, bits, 0, 1, 0.0 if levels else 2.5)
    codes = np.arange(2**bits)
    want = book[codes] if levels else codes - 2.5
    weight = np.asarray(operand_weights(made), np.float64)
    got = weight[-1]
    for w, field in zip(weight, fields(bits, levels), strict=False):
        of = np.stack([codes >> i & 1 for i in field])
        number = of.sum(0) % 2 / 2 if levels else (of.T @ 2.0 ** np.arange(len(of))) / 2 ** len(of)
        got = got + w * (1 + number)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_operands_of_words_that_are_turned_in_the_kernel():
    codes = np.random.default_rng(7).integers(0, 8, (64, 6))
    words = planes.pack(jnp.asarray(codes), 3, transposed=True)
    got = jax.jit(lambda w: operands(Codes((0, 1), 3, True, True), lambda i: w[i]))(words)
    for x, field in zip(got, fields(3, True), strict=True):
        parity = sum(codes >> i & 1 for i in field) % 2
        np.testing.assert_array_equal(np.asarray(x, np.float32), 1 + parity / 2)


def test_half_precision_is_read_from_its_bits():
    bits = np.arange(2**16, dtype=np.uint16)
    want = bits.view(np.float16).astype(np.float32)
    some = np.isfinite(want)
    np.testing.assert_array_equal(np.asarray(widen(jnp.asarray(bits), half=True))[some], want[some])


def test_two_halves_are_the_whole():
    x = np.random.default_rng(6).normal(size=(8, 64)).astype(np.float32)
    both = np.asarray(split(jnp.asarray(x)), np.float64)
    np.testing.assert_allclose(both[:8] + both[8:], x, rtol=2**-16)


def test_other_words_are_named(simple):
    q, k, v = simple[:3]
    change = lambda f: (Part((dataclasses.replace(k[0].blocks[0], words=(f,)),)),)
    words = k[0].blocks[0].words[0]
    for wrong, says in ((words.astype(jnp.uint32), "words of uint32"), (words[..., :1, :], "even")):
        with pytest.raises(ValueError, match=says):
            packed_decode_tpu(q, change(wrong), v, jnp.array([1, 1]), page=PAGE, interpret=True)
