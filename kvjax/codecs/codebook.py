"""Scalar codebook: each coordinate becomes the index of its nearest level (Lloyd-Max levels)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.lloyd_max import lloyd_max
from kvjax.codecs.uniform import check_page
from kvjax.core.codec import Array, Codec
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from pallas_kernels import planes

# Steps of the optimal uniform quantizers of 1 to 8 bits for standard normal values.
_MAX_STEPS = (1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)


@pytree
class Codebook(Codec):
    """`x_hat = levels[c]` with `c` the index of the level nearest to x.

    Levels are an array, so that layers may have their own. They belong to the scale of the data:
    `Normalized(Codebook.lloyd_max(d, bits))` feeds it unit vectors of the right dimension.

    Args:
      levels: `[2**bits]` float32, sorted, and symmetric about 0 (`levels == -levels[::-1]`): half
        of the look-up is then a sign.

    Example:
      >>> import jax.numpy as jnp
      >>> book = Codebook.lloyd_max(64, bits=1)
      >>> book.decode(book.encode(jnp.full((16, 64), 0.3)))[0, 0].round(4)
      Array(0.1001, dtype=float32)
    """

    levels: Array
    bits: int = static()
    transposed: bool = static(default=False)

    @staticmethod
    def lloyd_max(d: int | None, bits: int) -> Codebook:
        """The optimal book for unit vectors of dimension `d` (None: for standard normal values)."""
        return Codebook(jnp.asarray(lloyd_max(d, bits), jnp.float32), bits)

    @staticmethod
    def uniform(d: int | None, bits: int) -> Codebook:
        """Evenly spaced levels, with the best step for unit vectors of dimension `d` (None: for
        standard normal values): a grid that needs no look-up.

        Source: steps of the optimal uniform quantizer, J. Max 1960.
        """
        if not 1 <= bits <= len(_MAX_STEPS):
            raise InputError("bits", got=bits, expected="1 to 8", fix="choose such a width")
        step = _MAX_STEPS[bits - 1] / math.sqrt(d or 1)
        grid = np.arange(2**bits) - (2**bits - 1) / 2
        return Codebook(jnp.asarray(step * grid, jnp.float32), bits)

    def check(self, head_dim: int, page: int) -> None:
        check_page(page, self.bits)
        if self.levels.shape[-1] != 2**self.bits:
            raise InputError(
                "codebook",
                got=f"{self.levels.shape[-1]} levels",
                expected=f"{2**self.bits} for {self.bits} bits",
                fix="make it with Codebook.lloyd_max",
            )
        if isinstance(self.levels, jax.core.Tracer):
            return
        levels = np.asarray(self.levels)
        if not np.allclose(levels, -levels[..., ::-1]):
            raise InputError(
                "codebook",
                got=f"levels from {levels.min()} to {levels.max()}",
                expected="levels symmetric about 0",
                fix="make it with Codebook.lloyd_max, or centre the data first",
            )

    def transpose_planes(self) -> Codebook:
        return dataclasses.replace(self, transposed=True)

    def encode(self, x: Array, positions: Array | None = None) -> tuple[Array, ...]:
        edges = (self.levels[1:] + self.levels[:-1]) / 2
        if self.bits <= 4:
            codes = sum((x > edge).astype(jnp.uint32) for edge in edges)
        else:
            codes = jnp.searchsorted(edges, x).astype(jnp.uint32)
        return planes.pack(codes, self.bits, transposed=self.transposed)

    def decode(self, code: tuple[Array, ...]) -> Array:
        codes = planes.unpack(code, self.bits, transposed=self.transposed)
        return look_up(self.levels, codes, self.bits)


def look_up(levels: Array, codes: Array, bits: int) -> Array:
    """`levels[codes]` by selects, which vectorize where a gather does not.

    The top bit is the sign of a symmetric book, the others index its positive half; beyond 5 bits
    a gather is cheaper.
    """
    if bits > 5:
        return levels[codes.astype(jnp.int32)]
    half = 2 ** (bits - 1)
    positive = codes >= half
    index = jnp.where(positive, codes - half, half - 1 - codes)
    magnitudes = [levels[half + i] for i in range(half)]
    for bit in range(bits - 1):
        odd = (index >> bit) & 1 == 1
        magnitudes = [
            jnp.where(odd, high, low)
            for low, high in zip(magnitudes[::2], magnitudes[1::2], strict=True)
        ]
    return jnp.where(positive, magnitudes[0], -magnitudes[0])
