"""OSCAR's integers: the arithmetic to the last bit, published distortions and gains, hard rows."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import Codebook, Normalized
from kvjax.codecs.clipped_uniform import ClippedUniform
from kvjax.core.codec import Codec
from kvjax.core.errors import InputError

D, ROWS = 128, 6000
GOLDEN = Path(__file__).parents[1] / "golden" / "oscar_distortion_rules.json"


@functools.cache
def rows() -> np.ndarray:
    return np.random.default_rng(6000).normal(size=(ROWS, D)).astype(np.float32)


@functools.cache
def compiled():
    return jax.jit(lambda codec, x: codec.decode(codec.encode(x)))


def decoded(codec: Codec, x: np.ndarray) -> np.ndarray:
    return np.asarray(compiled()(codec, x))


def exactly(**choices) -> ClippedUniform:
    return ClippedUniform(scale_dtype="float32", **choices)


# The oracle: float32 and nothing wider, row by row, from the fact sheet and not from the codec.


def clipped(row: np.ndarray, clip: float) -> np.ndarray:
    limit = np.sort(np.abs(row))[min(int(clip * len(row)), len(row) - 1)]
    return np.minimum(np.maximum(row, -limit), limit)


def affine(row: np.ndarray, bits: int, kept: type) -> np.ndarray:
    top = np.float32(2**bits - 1)
    s = np.float32(kept((row.max() - row.min()) / top))
    z = np.float32(kept(-row.min() / s))
    q = np.minimum(np.maximum(np.floor(row / s + z + np.float32(0.5)), 0), top)
    return (q - z) * s


def oracle(x: np.ndarray, bits: int, clip: float, group: int, kept: type = np.float32):
    out = np.empty_like(x)
    for t, row in enumerate(x):
        row = clipped(row, clip)
        for start in range(0, len(row), group):
            out[t, start : start + group] = affine(row[start : start + group], bits, kept)
    assert out.dtype == np.float32
    return out


@pytest.mark.parametrize("clip", [0.96, 0.92, 1.0])
@pytest.mark.parametrize("group", [128, 32])
def test_the_arithmetic_to_the_last_bit(clip, group):
    x = rows()[:512] + np.float32(0.3)
    for bits in (2, 3, 4):
        got = decoded(exactly(bits=bits, clip=clip, group=group), x)
        np.testing.assert_array_equal(got, oracle(x, bits, clip, group))
    got = decoded(ClippedUniform(2, clip=clip, group=group), x)
    np.testing.assert_array_equal(got, oracle(x, 2, clip, group, np.float16))


def test_less_optimized_the_same(quick_jit):
    codec, x = exactly(clip=0.96), rows()[:64]
    less = quick_jit(lambda codec, x: codec.decode(codec.encode(x)))
    np.testing.assert_array_equal(less(codec, x), decoded(codec, x))


def test_which_order_statistic():
    golden = json.loads(GOLDEN.read_text())["clip_index_d128"]
    x = np.arange(1, D + 1, dtype=np.float32) * np.where(np.arange(D) % 2, 1, -1)
    x = np.tile(x[::-1], (16, 1)).astype(np.float32)
    for clip, index in golden.items():
        out = decoded(exactly(bits=8, clip=float(clip)), x)
        assert abs(out).max() == pytest.approx(index + 1, rel=1e-6)


def test_lloyd_max_variant():
    x = rows()[:512] * np.float32(0.7) + np.float32(0.2)
    codec = exactly(clip=0.96, rule="lloyd_max")
    code = jax.jit(lambda c, x: c.encode(x))(codec, x)
    y = np.stack([clipped(row, 0.96) for row in x]).astype(np.float64)
    mean, std = y.mean(1, keepdims=True), y.std(1, keepdims=True)
    z = (y - mean) / std
    scale = 3.0191 / 3 * 1.16 * std
    zero = 1.5 - mean / scale
    np.testing.assert_allclose(code.scale, scale, rtol=1e-6)
    np.testing.assert_allclose(code.zero, zero, atol=1e-6)
    sure = np.min([abs(z - t) for t in (-0.98107, 0, 0.98107)], 0) > 1e-5
    q = np.searchsorted([-0.98107, 0, 0.98107], z)
    out = decoded(codec, x)
    kept_scale, kept_zero = (np.asarray(a, np.float32) for a in (code.scale, code.zero))
    expected = (q.astype(np.float32) - kept_zero) * kept_scale  # the last bit, in float32
    np.testing.assert_array_equal(out[sure], expected[sure])
    levels = json.loads(GOLDEN.read_text())["shipped_lm"]["levels_over_std"]
    np.testing.assert_allclose(np.take(levels, q)[sure], ((out - mean) / std)[sure], atol=5e-4)


# Every rule of the fact sheet, by its name there; the first three are not OSCAR's integers.


def naive_symmetric(x: np.ndarray) -> np.ndarray:
    """Codes -2 to 1 of half the largest magnitude; it uses three levels and a half."""
    scale = abs(x).max(1, keepdims=True) / 2
    return np.clip(np.round(x / scale), -2, 1) * scale


def standardized(x: np.ndarray) -> np.ndarray:
    mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True)
    return decoded(Codebook.lloyd_max(None, 2), (x - mean) / std) * std + mean


def after_clip(x: np.ndarray) -> np.ndarray:
    return standardized(np.stack([clipped(row, 0.96) for row in x]))


def by_rms() -> Codec:
    """The levels for normal values, at each token's root mean square."""
    book = Codebook.lloyd_max(None, 2)
    return Normalized(Codebook(book.levels / np.sqrt(D), 2), scale_dtype="float32")


def by(codec: Codec):
    return lambda x: decoded(codec, x)


CLIPS = ("0.96", "0.94", "0.92", "0.90", "0.88", "0.85", "0.80")
RULES = {
    "sym_naive": naive_symmetric,
    "lm_exact_row_mean_std": standardized,
    "best_uniform_step": by(Codebook.uniform(None, 2)),
    "asym_minmax": by(exactly(clip=1.0)),
    **{f"clip {c}": by(exactly(clip=float(c))) for c in CLIPS},
    "shipped_lm_1.16": by(exactly(clip=0.96, rule="lloyd_max")),
    "shipped_lm_1.0": by(exactly(clip=0.96, rule="lloyd_max", gain=1.0)),
    "group32_minmax_3.0_bits": by(exactly(clip=1.0, group=32)),
}
GAINS = {
    "asym_minmax": RULES["asym_minmax"],
    **{f"clip_{c}": RULES[f"clip {c}"] for c in ("0.96", "0.92", "0.88")},
    "mse_best_uniform": by(Normalized(Codebook.uniform(D, 2), scale_dtype="float32")),
    "lm_exact_rms": lambda x: decoded(by_rms(), x),
    "lm_exact_after_clip_0.96": after_clip,
    "shipped_lm_1.16": RULES["shipped_lm_1.16"],
}


def published(rule: str) -> float:
    rules = json.loads(GOLDEN.read_text())["rules"]
    value = rules["clip"][rule.removeprefix("clip ")] if rule.startswith("clip") else rules[rule]
    return value["D"] if isinstance(value, dict) else value


def close(per_row: np.ndarray, number: float, digits: int) -> None:
    """Within 4 sigma of both samples' means and half of the last digit that is given.

    Theirs had 20,000 rows or more; fewer than that are assumed, and 1e-4 for a mean of rounded
    squares.
    """
    sigma = per_row.std() * np.sqrt(1 / len(per_row) + 1 / 20_000)
    assert abs(per_row.mean() - number) < 4 * sigma + 0.5 * 10.0**-digits + 1e-4


def test_every_rule_is_here():
    rules = set(json.loads(GOLDEN.read_text())["rules"]) - {"setting", "clip"}
    clips = {f"clip {c}" for c in json.loads(GOLDEN.read_text())["rules"]["clip"]}
    assert set(RULES) == rules | clips
    assert set(GAINS) == set(json.loads(GOLDEN.read_text())["gain"]) - {"setting"}


@pytest.mark.parametrize("rule", RULES)
def test_published_distortion(rule):
    x = rows()
    number = published(rule)
    digits = len(str(number).split(".")[1])
    close(((RULES[rule](x).astype(np.float64) - x) ** 2).mean(1), number, digits)


@pytest.mark.parametrize("rule", GAINS)
def test_published_gain(rule):
    golden = json.loads(GOLDEN.read_text())["gain"][rule]
    x = rows().astype(np.float64)
    y = GAINS[rule](rows()).astype(np.float64)
    gain = (x * y).sum() / (x * x).sum()
    size = (x * x).sum(1)
    off = ((x * y).sum(1) - gain * size) / size.mean()  # a ratio's error, to first order
    close(gain + off, golden["gain"], 3)
    close(((x - y) ** 2).mean(1), golden["mse"], 3)
    close(((x - y / gain) ** 2).mean(1), golden["noise_after_gain"], 3)


CHOICES = [
    {"clip": 0.96},
    {"clip": 1.0, "group": 32},
    {"clip": 0.92, "rule": "lloyd_max"},
    {"clip": 0.96, "scale_dtype": "float32"},
]


@pytest.mark.parametrize("choices", CHOICES)
def test_zero_and_constant_rows(choices):
    x = rows()[:16].copy()
    x[3], x[5], x[7], x[9] = 0, 3.25, -0.5, 1e-30
    out = decoded(ClippedUniform(2, **choices), x)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[3], 0)
    np.testing.assert_array_equal(out[5], 3.25)  # a number of float16, as the next
    np.testing.assert_array_equal(out[7], -0.5)
    assert abs(out[9]).max() <= 2e-30


@pytest.mark.parametrize("choices", CHOICES)
def test_ranges_that_the_zero_cannot_resolve(choices):
    """Rows far from zero: never further off than the range, or the rounding of what is stored."""
    x = rows()[:16].copy()
    for shift in (10, 1e3, 1e4):
        y = (x + np.float32(shift)).astype(np.float32)
        codec = ClippedUniform(2, **choices)
        error = abs(decoded(codec, y) - y).max()
        assert error < 4 + shift * float(jnp.finfo(codec.scale_dtype).eps)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("choices", CHOICES)
def test_what_is_not_finite_stays_in_its_token(choices, bad):
    """An infinity too, which the clip would otherwise hide."""
    x = rows()[:16].copy()
    clean = decoded(ClippedUniform(2, **choices), x)
    x[5, 7] = bad
    out = decoded(ClippedUniform(2, **choices), x)
    assert np.isnan(out[5]).all()
    np.testing.assert_array_equal(np.delete(out, 5, 0), np.delete(clean, 5, 0))


@functools.cache
def attention():
    def run(codec, x, q, p):
        code = codec.encode(x)
        logits = codec.logits(codec.prepare(q), code)
        return codec.decode(code), logits, codec.restore(codec.accumulate(p, code))

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("choices", CHOICES)
def test_attention_stays_in_the_codes(choices):
    """The two laws, with scales folded into logits and weights, in either layout of words."""
    rng = np.random.default_rng(6001)
    x = rows()[:64].reshape(2, 2, 16, D) + np.float32(0.5)
    q, p = (rng.normal(size=(2, 2, 4, n)).astype(np.float32) for n in (D, 16))
    plain = ClippedUniform(2, **choices)
    y = decoded(plain, x).astype(np.float64)
    for codec in (plain, plain.transpose_planes()):
        got, logits, out = attention()(codec, x, q, p)
        np.testing.assert_array_equal(got, y)
        np.testing.assert_allclose(logits, np.einsum("...gd,...td->...gt", q, y), atol=1e-4)
        np.testing.assert_allclose(out, np.einsum("...gt,...td->...gd", p, y), atol=1e-4)


def test_mistakes():
    wrong = {
        "rule": {"rule": "max"},
        "bits": {"bits": 9},
        "clip": {"clip": 0.0},
        "group": {"group": 0},
        "gain": {"gain": 0.0},
        "scale_dtype": {"scale_dtype": "bfloat16"},
    }
    for name, choice in wrong.items():
        with pytest.raises(InputError, match=name):
            ClippedUniform(**choice)
    with pytest.raises(InputError, match="2 for lloyd_max"):
        ClippedUniform(3, rule="lloyd_max")
    with pytest.raises(InputError, match="divisor"):
        ClippedUniform(group=48).check(D, 64)
    with pytest.raises(InputError, match="page"):
        ClippedUniform().check(D, 12)
