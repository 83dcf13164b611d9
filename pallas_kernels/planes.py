"""Token planes: how codes of 1 to 8 bits lie in machine words. Kernels and jnp share this file.

Codes of b bits (1, 2, 4, 8) are packed along the tokens of a page of `t` tokens, into words of w
bits. A page is `w / b` planes; with `R = t * b / w` rows,

    token j * R + r  lives in word r, bits b * j .. b * j + b - 1,   j < w / b,  r < R

so a plane is a plain `[R, d]` tile and no word straddles anything. Other widths are sums of planes
with the same token map (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1): the low bits come first.
Words are kept as `[R, d]`, or transposed as `[d, R]`: what a kernel wants of values, whose tokens
are the contracted axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
WORDS = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}


def fits(tokens: int, bits: int, word: int = 16) -> bool:
    """Whether a page of `tokens` codes fills whole words in every plane."""
    return all(tokens * width % word == 0 for width in PLANES[bits])


def pack(codes: Array, bits: int, *, transposed: bool = False, word: int = 16) -> tuple[Array, ...]:
    """Words of one page.

    Args:
      codes: `[..., t, d]` integers in `[0, 2**bits)`.
      bits: 1 to 8.
      transposed: keep words as `[..., d, R]`.
    Returns:
      One array per plane width, `[..., R, d]` with `R = t * width / word`.
    Raises:
      ValueError: when t does not fill whole words.

    Example:
      >>> import jax.numpy as jnp
      >>> words = pack(jnp.arange(64).reshape(16, 4) % 8, bits=3)
      >>> [(w.shape, str(w.dtype)) for w in words]
      [((2, 4), 'uint16'), ((1, 4), 'uint16')]
    """
    tokens = codes.shape[-2]
    if not fits(tokens, bits, word):
        raise ValueError(
            f"page: got {tokens} tokens of {bits} bits; expected whole {word}-bit words in each of "
            f"the planes {PLANES[bits]}; use a page that is a multiple of {word}"
        )
    codes = codes.astype(jnp.uint32)
    planes, shift = [], 0
    for width in PLANES[bits]:
        words = _pack_plane((codes >> shift) & ((1 << width) - 1), width, word)
        planes.append(words.swapaxes(-1, -2) if transposed else words)
        shift += width
    return tuple(planes)


def unpack(planes: tuple[Array, ...], bits: int, *, transposed: bool = False) -> Array:
    """The codes `[..., t, d]` of `pack`'s words, in the words' own dtype: exact inverse.

    Example:
      >>> import jax.numpy as jnp
      >>> codes = jnp.arange(64).reshape(16, 4) % 8
      >>> bool((unpack(pack(codes, bits=3), bits=3) == codes).all())
      True
    """
    if transposed:  # turn the words, not the codes: there are fewer, and the rest stays vectorized
        planes = jax.lax.optimization_barrier(tuple(w.swapaxes(-1, -2) for w in planes))
    widths = PLANES[bits]
    total, shift = _unpack_plane(planes[0], widths[0]), widths[0]
    for width, words in zip(widths[1:], planes[1:], strict=True):
        total = total | (_unpack_plane(words, width) << shift)
        shift += width
    return total


def _pack_plane(codes: Array, width: int, word: int) -> Array:
    *lead, t, d = codes.shape
    count = word // width
    planes = codes.reshape(*lead, count, t // count, d)  # [..., j, R, d]
    shifts = (width * jnp.arange(count, dtype=jnp.uint32))[:, None, None]
    words = jax.lax.reduce_or(planes << shifts, (len(lead),))  # [..., R, d]
    return words.astype(WORDS[word])


def _unpack_plane(words: Array, width: int) -> Array:
    *lead, rows, d = words.shape
    count = words.dtype.itemsize * 8 // width
    shifts = (width * jnp.arange(count, dtype=words.dtype))[:, None, None]
    planes = (words[..., None, :, :] >> shifts) & words.dtype.type((1 << width) - 1)
    return planes.reshape(*lead, count * rows, d)  # [..., j, R, d] -> [..., t, d]
