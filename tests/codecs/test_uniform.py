"""Uniform integers: the very codes of the oracle, and the true bits of known formats."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from kvjax.codecs import Uniform
from kvjax.methods import get
from kvjax.methods.describe import code_bits
from pallas_kernels import planes

TRUE_BITS = json.loads((Path(__file__).parent.parent / "golden" / "true_bits.json").read_text())
T, D = 32, 24
CASES = [
    *({"bits": b} for b in range(1, 9)),
    {"bits": 4, "group": 8},
    {"bits": 2, "axis": "tokens"},
    {"bits": 2, "axis": "tokens", "group": 8},
    {"bits": 3, "clip": 0.8},
    {"bits": 4, "symmetric": True},
    {"bits": 3, "symmetric": True, "axis": "tokens", "group": 16, "clip": 0.9},
    {"bits": 5, "scale_dtype": "float32"},
]


def page() -> np.ndarray:
    rng = np.random.default_rng(42)
    return (rng.normal(size=(T, D)) * np.exp(rng.normal(size=D)) + 0.5).astype(np.float32)


@jax.jit
def round_trip(codec, x):
    code = codec.encode(x)
    return code, planes.unpack(code.words, codec.bits), codec.decode(code)


@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_codes_scales_and_values_are_the_oracles(case):
    codec = Uniform(**case)
    code, unpacked, back = round_trip(codec, page())
    settings = {"axis": "channels", "scale_dtype": "float16", **case}
    codes, scales, zeros, decoded = oracle.min_max(page(), **settings)
    np.testing.assert_array_equal(unpacked, codes)
    # The oracle's scale is exact before it is rounded, the library's has float32 behind it.
    step = 2e-7 if codec.scale_dtype == jnp.float32 else 0
    np.testing.assert_allclose(np.asarray(code.scale, float).ravel(), scales, rtol=step)
    if codec.symmetric:
        assert code.zero is None
    else:
        np.testing.assert_allclose(
            np.asarray(code.zero, float).ravel(), zeros, rtol=step, atol=step
        )
    np.testing.assert_allclose(back, decoded, rtol=1e-6, atol=2e-6)


def test_every_level_is_used():
    """An arithmetic ramp: both ends exact, all levels met, nothing beyond them."""
    for bits in (1, 3, 8):
        ramp = np.tile(np.linspace(-1, 1, 2**bits, dtype=np.float32), (16, 1))
        codes, decoded = round_trip(Uniform(bits, scale_dtype=jnp.float32), ramp)[1:]
        np.testing.assert_array_equal(codes[0], np.arange(2**bits))
        np.testing.assert_allclose(decoded, ramp, atol=1e-6)


def test_rounding_is_within_half_a_step():
    x = page()
    code, _, decoded = round_trip(Uniform(4, group=8), x)
    error = abs(np.asarray(decoded) - x).reshape(T, D // 8, 8)
    step = np.asarray(code.scale, np.float64)[..., None]
    # Half a step, and what the ends lose where scale and zero were rounded to float16.
    lost = 2.0**-11 * (abs(x.reshape(T, D // 8, 8)).max(-1, keepdims=True) + 15 * step)
    assert (error <= step / 2 + 2 * lost).all()


@pytest.mark.parametrize(
    ("name", "codec", "d", "page_size"),
    [
        ("q8_0_g32", Uniform(8, group=32, symmetric=True), 64, 32),
        ("q4_0_g32", Uniform(4, group=32, symmetric=True), 128, 32),
        ("kivi_2bit g32", Uniform(2, axis="tokens", group=32), 64, 64),
        ("kivi_2bit g32", Uniform(2, axis="channels", group=32), 64, 64),
        ("kivi_2bit g64", Uniform(2, axis="tokens", group=64), 64, 128),
        ("kivi_2bit g128", Uniform(2, axis="channels", group=128), 128, 32),
        ("turboquant_4_d128", get("turboquant-4", 128).key, 128, 64),
        ("turboquant_3_d128", get("turboquant-3", 128).value, 128, 64),
    ],
)
def test_true_bits_of_known_formats(name, codec, d, page_size):
    outer, _, inner = name.partition(" ")
    expected = TRUE_BITS[outer][inner] if inner else TRUE_BITS[outer]
    assert code_bits(codec, d, page_size) == expected


def test_true_bits_by_hand():
    """Codes, scales, norms, indices: nothing forgotten, nothing twice."""
    assert code_bits(Uniform(8), 64, 16) == 8.5  # int8 with a scale and a zero per token
    assert code_bits(Uniform(8, scale_dtype=jnp.float32), 64, 16) == 9
    assert code_bits(Uniform(3, axis="tokens"), 64, 16) == 3 + 2 * 16 / 16
    # The paper's split of 128 channels, and a byte per outlier channel and page of 64 tokens.
    index = 32 * 8 / (64 * 128)
    for bits in (2.5, 3.5):
        codec = get(f"turboquant-{bits}", 128).key
        assert code_bits(codec, 128, 64) == TRUE_BITS[f"turboquant_{bits}_d128"] + index
    # 2 bits of mse codes and a norm, 1 bit of signs and a norm.
    assert code_bits(get("turboquant-prod-3", 128).key, 128, 64) == 3 + 2 * 16 / 128
