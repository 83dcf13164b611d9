"""Small floats: every code and every edge against ml_dtypes, block formats against their formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_laws import B, G, H, N, P, check_laws, compiled, data, pages, queries, weights

from kvjax.codecs.floats import Float4, Float8
from kvjax.codecs.small_floats import (
    E2M1,
    E4M3,
    E5M2,
    from_bits,
    scale_from_bits,
    scale_to_bits,
    to_bits,
)
from kvjax.core.errors import InputError
from kvjax.methods.describe import code_bits
from pallas_kernels import planes

TYPES = {
    "e4m3": (E4M3, ml_dtypes.float8_e4m3fn),
    "e5m2": (E5M2, ml_dtypes.float8_e5m2),
    "e2m1": (E2M1, ml_dtypes.float4_e2m1fn),
}
VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
BYTES = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("name", TYPES)
def test_every_code_decodes_as_in_ml_dtypes(name, quick_jit):
    form, dtype = TYPES[name]
    codes = BYTES[: 2**form.bits]
    expected = codes.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(quick_jit(lambda c: from_bits(c, form))(codes), expected)


@pytest.mark.parametrize("name", TYPES)
def test_every_edge_rounds_as_in_ml_dtypes(name, quick_jit):
    """All values, all midpoints between them and the floats beside those, the ends, and noise."""
    form, dtype = TYPES[name]
    values = BYTES[: 2**form.bits].view(dtype).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    middles = (values[1:] + values[:-1]) / 2
    end = form.largest * (1 + 2.0 ** -(form.mantissa + 2))  # between the largest and its successor
    rest = [end, -end, 1e-45, -1e-40, 1e-30, 1e9, -1e38, np.inf, -np.inf]
    points = [values, middles, np.float32(rest), data(4096, seed=1) * form.largest]
    points = np.concatenate([np.nextafter(p, s) for p in points for s in (-np.inf, p, np.inf)])
    points = points.astype(np.float32)
    expected = points.astype(dtype).view(np.uint8)
    seen = np.asarray(quick_jit(lambda x: to_bits(x, form))(points))
    np.testing.assert_array_equal(seen, expected)
    if form.nan is not None:
        assert np.isnan(from_bits(to_bits(jnp.float32([np.nan]), form), form)).all()


def test_the_edges_of_e2m1(quick_jit):
    """The table in the source: nearest, and the even code at a tie."""
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4}
    edges = np.float32(list(ties))
    for x, nearest in (
        (edges, list(ties.values())),
        (np.nextafter(edges, np.float32(0)), VALUES[:-1]),
        (np.nextafter(edges, np.float32(9)), VALUES[1:]),
    ):
        round_trip = quick_jit(lambda x: from_bits(to_bits(x, E2M1), E2M1))
        np.testing.assert_array_equal(round_trip(x), nearest)
        np.testing.assert_array_equal(round_trip(-x), np.negative(nearest))


def test_e8m0_scales(quick_jit):
    expected = BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(quick_jit(scale_from_bits)(BYTES), expected)
    powers = np.float32(2.0 ** np.arange(-123, 128))
    for largest in (powers, np.nextafter(2 * powers[:-1], np.float32(0))):
        scale = scale_from_bits(quick_jit(scale_to_bits)(largest))
        np.testing.assert_array_equal(scale, 2.0 ** (np.floor(np.log2(largest.astype(float))) - 2))
    ends = scale_to_bits(jnp.float32([0, 1e-45, 1e-38, np.inf, np.nan]))
    np.testing.assert_array_equal(ends, [1, 1, 1, 255, 255])


def oracle(x: np.ndarray, kind: str):
    """Scales and reconstruction by ml_dtypes, block by block, in float32 as the formulas are."""
    block = 16 if kind == "nvfp4" else 32
    page_scale = np.float32(1)
    if kind == "nvfp4":
        page_scale = np.abs(x).max() / np.float32(6 * 448)
    scales, decoded = [], np.zeros_like(x)
    for token in range(len(x)):
        for j in range(0, x.shape[-1], block):
            part = x[token, j : j + block]
            largest = np.abs(part).max()
            if kind == "nvfp4":
                scale = (largest / np.float32(6) / page_scale).astype(ml_dtypes.float8_e4m3fn)
            else:
                scale = np.float32(2.0 ** (np.floor(np.log2(largest)) - 2))
                scale = scale.astype(ml_dtypes.float8_e8m0fnu)
            scales.append(scale.view(np.uint8))
            step = scale.astype(np.float32) * page_scale
            units = (part / step).astype(ml_dtypes.float4_e2m1fn)
            decoded[token, j : j + block] = units.astype(np.float32) * step
    return np.array(scales), decoded


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_block_formats_are_their_formulas(kind, quick_jit):
    x = data(16, 64, seed=2) * np.exp(data(16, 64, seed=3))
    scales, decoded = oracle(x, kind)
    codec = Float4(kind)
    code, back = quick_jit(lambda codec, x: (codec.encode(x), codec.decode(codec.encode(x))))(
        codec, x
    )
    np.testing.assert_array_equal(np.ravel(code.scale), scales)
    np.testing.assert_allclose(back, decoded, rtol=1e-6)
    # Half a step below 6 scales (a step is 2 there), and what saturates: 6.4 or 8 of them at most.
    largest = np.abs(x).reshape(16, -1, codec.block).max(-1, keepdims=True)
    error = np.abs(back - x).reshape(16, -1, codec.block)
    assert (error <= largest * (0.18 if kind == "nvfp4" else 0.251)).all()


def test_relative_error_on_normal_values(quick_jit):
    """NVFP4: .0086 of the power on values with two channels of 8 times the size, on one page of
    1024 tokens as the measurement had it; two digits are known, 3 % of sampling."""
    x = data(1024, 128, seed=4)
    x[:, [3, 70]] *= 8
    back = quick_jit(lambda codec, x: codec.decode(codec.encode(x)))(Float4("nvfp4"), x)
    assert ((back - x) ** 2).mean() / (x**2).mean() == pytest.approx(0.0086, rel=0.04)


FLOAT8 = {
    "e4m3": Float8("e4m3"),
    "e5m2": Float8("e5m2"),
    "blocks": Float8("e4m3", group=8),
    "bf16 scale": Float8("e4m3", scale_dtype="bfloat16"),
    "cast": Float8("e4m3", scaled=False),
    "transposed": Float8("e4m3").transpose_planes(),
}


@pytest.mark.parametrize("name", FLOAT8)
def test_laws_and_error_of_float8(name):
    codec = FLOAT8[name]
    check_laws(codec, pages(), queries(), weights())
    decoded = compiled()(codec, pages(), queries(), weights())[1]
    # Half of the last place, relative (2**-4 or 2**-3), where numbers are not subnormal.
    step = 2.0 ** -(3 if name == "e5m2" else 4)
    least = 2.0**-9 * (1 if name == "cast" else np.abs(pages()).max() / 448)
    assert (np.abs(decoded - pages()) <= step * 1.001 * np.abs(pages()) + least).all()


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("turned", [False, True])
def test_laws_of_float4(kind, turned):
    """As `check_laws`, whose vectors of 24 channels are not whole blocks."""
    d = 64
    x, q, p = data(B, H, N, P, d, seed=5), data(B, H, 1, G, d, seed=6), weights()
    codec = Float4(kind).transpose_planes() if turned else Float4(kind)
    code, decoded, logits, out = compiled()(codec, x, q, p)
    assert all(a.shape[:3] == (B, H, N) for a in jax.tree.leaves(code))
    decoded = np.asarray(decoded, np.float64)
    expected = np.einsum("bhgd,bhnpd->bhngp", q[:, :, 0], decoded)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    expected = np.einsum("bhngp,bhnpd->bhgd", p, decoded)[:, :, None]
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(decoded).max())


def test_true_bits():
    assert code_bits(Float4("mxfp4"), 128, 64) == 4 + 8 / 32
    assert code_bits(Float4("nvfp4"), 128, 64) == 4 + 8 / 16 + 32 / (64 * 128)
    assert code_bits(Float8(), 128, 64) == 8 + 32 / 128
    assert code_bits(Float8(group=32, scale_dtype="bfloat16"), 128, 64) == 8 + 16 / 32
    assert code_bits(Float8(scaled=False), 128, 64) == 8


ALL = {"nvfp4": Float4("nvfp4"), "mxfp4": Float4("mxfp4"), **FLOAT8}


@pytest.mark.parametrize("name", ALL)
def test_zeros_subnormals_and_tiny_numbers(name, quick_jit):
    """Zero blocks are exactly zero beside others; what is too small for the format fades to zero."""
    x = data(16, 64, seed=7)
    x[:, :32] = 0
    x[3] = 0
    round_trip = quick_jit(lambda codec, x: codec.decode(codec.encode(x)))
    back = np.asarray(round_trip(ALL[name], x))
    np.testing.assert_array_equal(back[x == 0], 0)
    for size in (1e-45, 1e-40, 1e-37):
        back = np.asarray(round_trip(ALL[name], np.full((16, 64), size, np.float32)))
        assert (np.abs(back) <= 2 * max(size, 1.2e-38)).all()
    scaled = name != "cast"  # a scale carries the smallness
    back = np.asarray(round_trip(ALL[name], np.full((16, 64), 1e-30, np.float32)))
    np.testing.assert_allclose(back, 1e-30 if scaled else 0, rtol=0.25)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_loud(name, bad, quick_jit):
    """Never a finite number in their place, and never a NaN outside what shares their scale."""
    x = np.ones((16, 64), np.float32)
    x[2, 5] = bad
    back = np.asarray(quick_jit(lambda codec, x: codec.decode(codec.encode(x)))(ALL[name], x))
    assert not np.isfinite(back[2, 5])
    shares = {"nvfp4": (16, 64), "mxfp4": (3, 32), "blocks": (3, 8), "cast": (3, 6)}
    tokens, channels = shares.get(name, (3, 64))
    rest = np.ones((16, 64), bool)
    rest[:tokens, :channels] = False
    assert np.isfinite(back[rest]).all()


def test_a_plain_cast_does_not_saturate_in_silence(quick_jit):
    x = np.float32([[449, 463, 465, -1e6]] * 16)
    round_trip = quick_jit(lambda codec, x: codec.decode(codec.encode(x)))
    back = np.asarray(round_trip(Float8("e4m3", scaled=False), x))
    np.testing.assert_array_equal(back[0], [448, 448, np.nan, np.nan])
    back = np.asarray(round_trip(Float8("e5m2", scaled=False), x * 1000))
    np.testing.assert_array_equal(back[0], [np.inf, np.inf, np.inf, -np.inf])


def test_codes_are_packed_in_token_planes(quick_jit):
    """Token i has code i, beside a 6 that fixes the scale at 1."""
    x = np.zeros((16, 16), np.float32)
    x[:, 0] = np.concatenate([VALUES, np.negative(np.float32(VALUES))])
    x[:, 1] = 6
    code = quick_jit(Float4("nvfp4").encode)(x)
    assert [(w.shape, w.dtype) for w in code.words] == [((4, 16), jnp.uint16)]
    np.testing.assert_array_equal(planes.unpack(code.words, 4)[:, 0], np.arange(16))
    np.testing.assert_array_equal(code.scale, np.full((16, 1), E4M3.top))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Float8("e3m4"),
        lambda: Float8(scale_dtype="float16"),
        lambda: Float8(group=0),
        lambda: Float8(group=8, scaled=False),
        lambda: Float8(group=24).check(64, 16),
        lambda: Float8().check(64, 9),
        lambda: Float4("fp4"),
        lambda: Float4("nvfp4").check(24, 16),
        lambda: Float4("mxfp4").check(80, 16),
        lambda: Float4("mxfp4").check(64, 6),
    ],
)
def test_mistakes_are_told(make):
    with pytest.raises(InputError, match=r"got .*; expected .*; "):
        make()
