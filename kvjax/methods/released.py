"""TurboQuant as others released it: the authors' code, its key-value script, and vLLM's presets.

For reproducing their numbers. `turboquant` is what to use.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.codecs import (
    QJL,
    Codebook,
    Hadamard,
    Linear,
    Normalized,
    Outliers,
    Residual,
    Uniform,
    rotated,
)
from kvjax.codecs.floats import Float8
from kvjax.core.codec import Codec
from kvjax.core.errors import InputError, known
from kvjax.core.method import Method
from kvjax.core.rng import fold

# The positive halves of the authors' codebooks, for standard normal values. At 3 bits theirs has
# .244893 on one side and .244961 on the other: this is the mean.
LEVELS = {
    1: (0.797885,),
    2: (0.4526475, 1.510017),
    3: (0.244927, 0.75567, 1.34335, 2.1509),
    4: (
        *(0.12730813, 0.3848085, 0.6516434, 0.9357067),
        *(1.2484536, 1.6096783, 2.0604305, 2.7235756),
    ),
}
# Their norm of what is left of a unit vector after 0, 1, .. 4 bits: used instead of a stored one.
RESIDUAL_NORMS = (1.0, 0.60281, 0.3426687, 0.185758, 0.0974343)
# vLLM: bits of keys (8 is FP8) and of values.
VLLM_PRESETS = {"k8v4": (8, 4), "4bit_nc": (4, 4), "k3v4_nc": (3, 4), "3bit_nc": (3, 3)}


def turboquant_prod_released(bits: int, head_dim: int, *, rng: jax.Array) -> Method:
    """TurboQuant_prod as in the authors' supplementary code: orthogonal sketch, no stored gamma.

        u = x / |x|,   u_hat = book_{b-1}(u) + sqrt(pi/2) / sqrt(d) * gamma_b * S^T sign(S r)

    with orthonormal S, r what the book left over, and gamma_b the constant of `RESIDUAL_NORMS`.

    Args:
      bits: 1 to 5, one of them the sketch's; `bits + 16 / head_dim` true bits for keys.

    Source: supplementary code of TurboQuant, arXiv 2504.19874 (ICLR 2026).
    Differs from the paper: Algorithm 2 has a Gaussian S with sqrt(pi/2) / d, and stores gamma.
    Differs from the release: the sketch is applied in the rotated basis (the same in distribution,
    for S is random), the norm is bf16 at any model dtype, and the 3-bit book is made symmetric.
    The release has no values; here they keep `bits` bits (4 at most) of the same book.

    Example:
      >>> import jax
      >>> turboquant_prod_released(3, 64, rng=jax.random.key(0)).name
      'turboquant-prod-3-released'
    """
    if bits not in range(1, len(RESIDUAL_NORMS) + 1):
        raise InputError(
            "bits", got=bits, expected="1 to 5", fix="the release has constants for these widths"
        )
    unit = QJL.random(head_dim, rng=fold(rng, "key", "sketch")).sketch
    unit = unit / jnp.linalg.norm(unit, axis=-1, keepdims=True)
    # Rows of length sqrt(d) turn our sqrt(pi/2) / m into their sqrt(pi/2) / sqrt(d).
    inner: Codec = QJL(unit * math.sqrt(head_dim), fixed_norm=RESIDUAL_NORMS[bits - 1])
    if bits > 1:
        inner = Residual(released_book(bits - 1, head_dim), inner)
    key = rotated("haar", head_dim, Normalized(inner), rng=fold(rng, "key", "rotation"))
    value = rotated(
        "haar",
        head_dim,
        Normalized(released_book(min(bits, 4), head_dim)),
        rng=fold(rng, "value", "rotation"),
    )
    return Method(key, value, name=f"turboquant-prod-{bits}-released")


def turboquant_kv_released(
    bits: float,
    head_dim: int,
    *,
    rng: jax.Array,
    codebook_scale: Literal["own", "released"] = "own",
) -> Method:
    """The "2.5" and "3.5 bit" setting of the authors' Llama script: 32 outlier key channels.

    Keys: the 32 channels of most energy at 3 (or 4) bits, the others at 2 (or 3), each part
    normalized and rotated by itself: 2.25 (3.25) bits of codes, 2.5 (3.5) with two norms at
    head_dim 128. Values: 2-bit integers, a scale and zero per 32 channels (3 bits), at any `bits`.

    Args:
      bits: 2.5 or 3.5; names the keys only.
      head_dim: more than 32.
      codebook_scale: "own" gives each part the book of its own dimension. "released" repeats a
        mistake of that script: levels of N(0, 1/128) on vectors of 32 and 96 channels. At 3 bits it
        quadruples the error of the outlier part and shrinks it to 0.73; the RaBitQ authors' rows
        for "TurboQuant 2.5 bit" were made with it.

    Source: `llm/script-llama3-turbo.py` of that code; arXiv 2504.19874, section 4.3;
    arXiv 2604.19528 for what it does.
    Differs from the paper: which says nothing on keys against values, nor which channels at 3.5
    bits (4-bit outliers and 3 for the rest, by arXiv 2604.19528).
    Differs from the release: outliers are chosen per page, not once per prompt; tokens made while
    generating are quantized too (there an early return keeps them exact).

    Example:
      >>> import jax
      >>> turboquant_kv_released(2.5, 128, rng=jax.random.key(0)).name
      'turboquant-kv-2.5-released'
    """
    if bits not in (2.5, 3.5):
        raise InputError("bits", got=bits, expected="2.5 or 3.5", fix="turboquant() has others")
    if codebook_scale not in ("own", "released"):
        raise InputError(
            "codebook_scale",
            got=repr(codebook_scale),
            expected="'own' or 'released'",
            fix="'own' is right, 'released' reproduces published numbers",
        )
    if head_dim <= 32:
        raise InputError(
            "head_dim", got=head_dim, expected="more than 32", fix="32 channels are outliers"
        )

    def part(size: int, width: int, name: str) -> Codec:
        own = codebook_scale == "own"
        book = Codebook.lloyd_max(size, width) if own else released_book(width, 128)
        return rotated("haar", size, Normalized(book), rng=fold(rng, "key", "rotation", name))

    low = int(bits)
    key = Outliers(part(32, low + 1, "outliers"), part(head_dim - 32, low, "rest"), 32)
    name = f"turboquant-kv-{bits:g}-released" + ("" if codebook_scale == "own" else "-misscaled")
    return Method(key, Uniform(2, group=32), name=name)


def vllm_turboquant(preset: str, head_dim: int) -> Method:
    """What vLLM calls TurboQuant: `--kv-cache-dtype turboquant_PRESET`.

    Keys at 3 or 4 bits: plain Hadamard transform, Lloyd-Max codebook, and the norm correction
    ("nc"): the stored scale makes the reconstruction as long as the key. At 8 bits: an FP8 cast.
    Values: min/max integers per token, in no other basis. No QJL.

    Args:
      preset: one of `VLLM_PRESETS`: "k8v4", "4bit_nc", "k3v4_nc", "3bit_nc".

    Source: vLLM, `vllm/model_executor/layers/quantization/turboquant/config.py`.
    Differs from the paper: values are uniform, not Lloyd-Max; no random signs before the transform,
    so that a constant key lands on a single coordinate, far outside the book.
    Differs from vLLM: the book is that of the sphere in head_dim, not its normal limit (0.2 % of
    the error at 128); the corrected scale is stored, where vLLM renormalizes when it decodes; and
    the first and last two layers, exact there, are as all others here: choose layers yourself.

    Example:
      >>> vllm_turboquant("4bit_nc", 64).name
      'vllm-turboquant-4bit_nc'
    """
    if preset not in VLLM_PRESETS:
        raise InputError(
            "preset", got=repr(preset), expected=known(VLLM_PRESETS), fix="name one of them"
        )
    key_bits, value_bits = VLLM_PRESETS[preset]
    key: Codec = Float8("e4m3", scaled=False)
    if key_bits < 8:
        book = Codebook.lloyd_max(head_dim, key_bits)
        key = Linear(
            Hadamard.plain(head_dim),
            Normalized(book, gain="norm", scale_dtype=jnp.dtype("float16")),
        )
    return Method(key, Uniform(value_bits), name=f"vllm-turboquant-{preset}")


def released_book(bits: int, d: int) -> Codebook:
    """The authors' codebook for a coordinate of variance 1 / d: `LEVELS` over sqrt(d).

    Example:
      >>> released_book(1, 64).levels.round(4)
      Array([-0.0997,  0.0997], dtype=float32)
    """
    half = jnp.asarray(LEVELS[bits], jnp.float32) / math.sqrt(d)
    return Codebook(jnp.concatenate([-half[::-1], half]), bits)
