"""What a code does to vectors: error, bias, true bits, and how far the limit of the rate is."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kvjax.codecs import (
    E8,
    QJL,
    Centered,
    ClippedUniform,
    Codebook,
    Linear,
    Normalized,
    Outliers,
    Residual,
    RotaryMean,
    Split,
    Tiers,
    Trellis,
)
from kvjax.codecs.uniform import Uniform
from kvjax.core.codec import Array, Code, Codec
from kvjax.core.errors import InputError
from kvjax.evals.vectors import Vectors
from kvjax.methods.describe import code_bits
from pallas_kernels import planes


@dataclasses.dataclass(frozen=True)
class Row:
    """One codec on one kind of vectors.

    Attributes:
      bits_per_value: true bits, scalars and indices included.
      mse: `sum |x - x_hat|^2 / sum |x|^2`.
      ip_error: `d * mean <q, x - x_hat>^2 / (mean |q|^2 mean |x|^2)`; for random directions of q
        that is the mse, so the two differ by what the queries look at.
      slope: of `<q, x_hat>` over `<q, x>`, a regression through the origin; 1 is unbiased.
      gap_db: mse over `4^-bits_per_value`, the least that any code of these true bits can do on
        normal values (all directions and channels alike; vectors that are not may beat it).
      entropy: of the indices, bits per value; what an entropy coder could still save. None where
        a code has no indices.
      encode, decode: million values per second, median of three runs, on the device at hand.
    """

    codec: str
    data: str
    d: int
    bits_per_value: float
    mse: float
    ip_error: float
    slope: float
    gap_db: float
    entropy: float | None
    encode: float | None = None
    decode: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite become None."""
        plain = dataclasses.asdict(self)
        bad = lambda v: isinstance(v, float) and not math.isfinite(v)
        return {name: None if bad(value) else value for name, value in plain.items()}


def measure(name: str, codec: Codec, data: Sequence[Vectors], *, repeats: int = 3) -> Iterator[Row]:
    """A row per kind of vectors; all of one shape, so that the codec is compiled once.

    Args:
      repeats: timed runs on the first kind; 0 leaves the speeds out.
    Raises:
      InputError: vectors that the codec does not take.

    Example:
      >>> import kvjax
      >>> from kvjax.evals.vectors import synthetic
      >>> codec = kvjax.methods.get("turboquant-2", head_dim=64).key
      >>> row, = measure("turboquant-2", codec, [synthetic("sphere", 8, 64, 64, seed=1)], repeats=0)
      >>> row.bits_per_value, round(row.mse, 2)
      (2.25, 0.12)
    """
    page, d = data[0].x.shape[-2:]
    codec.check(d, page)
    bits = code_bits(codec, d, page)
    encode = jax.jit(lambda codec, x: codec.encode(x, _positions(x)))
    decode = jax.jit(lambda codec, code: codec.decode(code))
    speeds: tuple[float | None, float | None] = (None, None)
    for vectors in data:
        code = encode(codec, vectors.x)
        x_hat = decode(codec, code)
        if repeats and vectors is data[0]:
            size = vectors.x.size / 1e6
            speeds = (
                size / _median_time(functools.partial(encode, codec, vectors.x), repeats),
                size / _median_time(functools.partial(decode, codec, code), repeats),
            )
        numbers = errors(vectors.x, x_hat, vectors.q)
        yield Row(
            name,
            vectors.name,
            d,
            bits,
            **numbers,
            gap_db=gap_db(numbers["mse"], bits),
            entropy=index_entropy(codec, code, d),
            encode=speeds[0],
            decode=speeds[1],
        )


def errors(x: ArrayLike, x_hat: ArrayLike, q: ArrayLike) -> dict[str, float]:
    """mse, ip_error and slope, as `Row` defines them; `x, x_hat: [n, p, d]`, `q: [n, m, d]`.

    In float64 on the host: sums over a million small numbers.
    """
    exact, coded, queries = (np.asarray(a, np.float64) for a in (x, x_hat, q))
    energy = (exact**2).sum(-1).mean()
    true, estimate = (np.einsum("npd,nmd->npm", a, queries) for a in (exact, coded))
    product = (queries**2).sum(-1).mean() * energy / exact.shape[-1]
    return {
        "mse": float(((exact - coded) ** 2).sum(-1).mean() / energy),
        "ip_error": float(((true - estimate) ** 2).mean() / product),
        "slope": float((true * estimate).sum() / (true**2).sum()),
    }


def gap_db(mse: float, bits: float) -> float:
    """Decibels above the rate-distortion bound of normal values, `4^-bits`.

    Example:
      >>> round(gap_db(0.0625, 2.0), 6)
      0.0
    """
    return 10 * math.log10(mse * 4.0**bits) if mse > 0 else -math.inf


def index_entropy(codec: Codec, code: Code, d: int) -> float | None:
    """Empirical entropy of the indices of all leaves, in bits per value of the vector."""
    total, found = 0.0, False
    for symbols, bits in _indices(codec, code):
        counts = np.bincount(np.asarray(symbols).ravel(), minlength=2**bits)
        share = counts[counts > 0] / counts.sum()
        total += float(-(share * np.log2(share)).sum()) * symbols.shape[-1]
        found = True
    return total / d if found else None


def _indices(codec: Codec, code: Code) -> Iterator[tuple[Array, int]]:
    """The indices `[..., t, channels]` in a code and their bits, leaf by leaf."""
    match codec:
        case Linear():
            yield from _indices(codec.inner, code)
        case Centered():
            yield from _indices(codec.inner, code)
        case Normalized() | RotaryMean():
            yield from _indices(codec.inner, code.code)
        case Tiers():
            for child, part in zip(codec.codecs, code, strict=True):
                yield from _indices(child, part)
        case Residual() | Split():
            yield from _indices(codec.first, code[0])
            yield from _indices(codec.second, code[1])
        case Outliers():
            yield from _indices(codec.first, code.first)
            yield from _indices(codec.second, code.second)
        case Codebook() | Trellis():
            yield planes.unpack(code, codec.bits, transposed=codec.transposed), codec.bits
        case QJL():
            yield planes.unpack(code.signs, 1, transposed=codec.transposed), 1
        case E8():
            yield planes.unpack(code, 2, transposed=codec.transposed), 2
        case Uniform() | ClippedUniform():
            yield planes.unpack(code.words, codec.bits, transposed=codec.transposed), codec.bits


def pages_for(d: int, page: int, values: int) -> int:
    """Pages of d channels that hold about `values` numbers, at least one."""
    if values < 1:
        raise InputError("values", got=values, expected="1 or more", fix="raise it")
    return max(1, round(values / (page * d)))


def _positions(x: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(x.shape[-2]), x.shape[:-1])


def _median_time(run: Callable[[], Any], repeats: int) -> float:
    """Seconds; the caller has compiled `run` already."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
