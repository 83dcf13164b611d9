"""Float64 numpy that shares no code with kvjax: what the tests hold the library against."""

from __future__ import annotations

import math

import numpy as np


# --- packing -----------------------------------------------------------------------------------
def pack(codes: np.ndarray, bits: int, word: int, transposed: bool) -> list[np.ndarray]:
    """Token planes of `codes: [t, d]`, token by token: token j*R + r in word r, bits b*j ..."""
    planes, rest = [], [[int(c) for c in row] for row in codes]
    tokens, d = codes.shape
    for width in (8, 4, 2, 1):  # the binary digits of `bits`; the low bits of a code go first
        if not bits & width:
            continue
        rows = tokens * width // word
        words = np.zeros((rows, d), np.uint64)
        for token in range(tokens):
            j, r = divmod(token, rows)
            for channel in range(d):
                low = rest[token][channel] % (1 << width)
                rest[token][channel] >>= width
                words[r, channel] |= np.uint64(low << (width * j))
        planes.append(words.T if transposed else words)
    return planes


# --- quantizers --------------------------------------------------------------------------------
def min_max(x, bits, *, axis, group=None, clip=1.0, symmetric=False, scale_dtype=np.float16):
    """Affine integers of `x: [t, d]`, group by group; scale and zero as they are stored.

    Returns codes `[t, d]`, scales and zeros (a list per group, in the order of `groups_of`) and the
    reconstruction.
    """
    x = np.asarray(x, np.float64)
    codes, decoded = np.zeros(x.shape, int), np.zeros(x.shape)
    scales, zeros = [], []

    def stored(a):
        return float(np.asarray(a, scale_dtype))

    for index in groups_of(x.shape, axis, group):
        part = x[index]
        levels = 2**bits - 1
        if symmetric:
            scale = stored(2 * np.abs(part).max() * clip / levels)
            low = -scale * levels / 2
        else:
            middle, half = (part.max() + part.min()) / 2, (part.max() - part.min()) / 2
            scale, low = stored(2 * half * clip / levels), stored(middle - half * clip)
        c = np.zeros(part.shape) if scale == 0 else np.round((part - low) / scale)
        codes[index] = np.clip(c, 0, levels)
        decoded[index] = codes[index] * scale + low
        scales.append(scale)
        zeros.append(low)
    return codes, np.array(scales), np.array(zeros), decoded


def groups_of(shape, axis: str, group: int | None):
    """Index of each group, tokens outermost: [t, d / group] or [t / group, d] of them, in order."""
    t, d = shape
    if axis == "channels":
        width = group or d
        return [
            (slice(i, i + 1), slice(j, j + width)) for i in range(t) for j in range(0, d, width)
        ]
    width = group or t
    return [(slice(i, i + width), slice(j, j + 1)) for i in range(0, t, width) for j in range(d)]


def lloyd_max(d: int | None, bits: int) -> tuple[np.ndarray, float]:
    """Levels and distortion by Gauss-Legendre integration over each cell, iterated to a fixed point.

    The distortion is that of a whole unit vector (d coordinates), or of one normal value.
    """
    nodes, weights = np.polynomial.legendre.leggauss(40)
    reach = 12.0 if d is None else 1.0

    def density(x):
        return np.exp(-(x**2) / 2) if d is None else np.maximum(1 - x**2, 0) ** ((d - 3) / 2)

    spread = 1 if d is None else 1 / math.sqrt(d)
    levels = (
        spread * np.linspace(-2.5, 2.5, 2**bits) if bits > 1 else spread * np.array([-0.8, 0.8])
    )

    def moments(levels):
        edges = np.concatenate([[-reach], (levels[1:] + levels[:-1]) / 2, [reach]])
        # The outer cells are wide and the density is not: cut where nothing is left.
        edges = np.clip(edges, -10 * spread, 10 * spread) if d is None or d > 30 else edges
        half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
        x = middle[:, None] + half[:, None] * nodes
        mass = density(x) * weights * half[:, None]
        return mass, x

    for _ in range(6000):
        mass, x = moments(levels)
        moved = (mass * x).sum(1) / mass.sum(1)
        done = np.abs(moved - levels).max() < 1e-12 * spread
        levels = moved
        if done:
            break
    mass, x = moments(levels)
    error = (mass * (x - levels[:, None]) ** 2).sum() / mass.sum()
    return levels, float(error * (d or 1))


# --- attention ---------------------------------------------------------------------------------
def softmax_attention(q, k, v, scale=None) -> np.ndarray:
    """One query `[d]` over `k, v: [n, d]`; zeros when there is nothing to see."""
    if len(k) == 0:
        return np.zeros(np.shape(q)[-1])
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    logits = k @ q * (len(q) ** -0.5 if scale is None else scale)
    p = np.exp(logits - logits.max())
    return p @ v / p.sum()


def causal_attention(q, k, v, window=None, scale=None) -> np.ndarray:
    """`q: [t, h, g, d]`, `k, v: [t, h, d]`: token i sees tokens max(0, i - window + 1) .. i."""
    out = np.zeros(q.shape)
    for t in range(q.shape[0]):
        first = 0 if window is None else max(0, t - window + 1)
        for h in range(q.shape[1]):
            for g in range(q.shape[2]):
                seen = slice(first, t + 1)
                out[t, h, g] = softmax_attention(q[t, h, g], k[seen, h], v[seen, h], scale)
    return out


def packed_tokens(length: int, *, sink: int, recent: int, page: int) -> int:
    """How many tokens after the sink are packed, by the definition in `Layout`'s docstring.

    A page goes when its youngest token is more than `recent` old, where the last token is 1 old.
    """
    packed = 0
    while True:
        youngest = sink + packed + page - 1
        if youngest >= length or length - youngest <= recent:
            return packed
        packed += page


def cache_attention(
    q, k, v, *, sink, recent, page, key_page, value_page, window=None, scale=None, exact=None
) -> np.ndarray:
    """What a cache answers at each step: `q: [t, h, g, d]`, `k, v: [t, h, d]`.

    Args:
      key_page, value_page: `[h, page, d]` -> its reconstruction; called once for each page.
      exact: how the sink and the recent window are rounded, None for not at all. Pages are encoded
        from what the window kept.
    """
    exact = exact or (lambda a: np.asarray(a, np.float64))
    k, v = exact(np.asarray(k)).astype(np.float64), exact(np.asarray(v)).astype(np.float64)
    known_k, known_v = k.copy(), v.copy()  # as a query sees them: pages are overwritten when packed
    out, done = np.zeros(q.shape), 0
    for t in range(q.shape[0]):
        due = packed_tokens(t + 1, sink=sink, recent=recent, page=page)
        while done < due:
            at = slice(sink + done, sink + done + page)
            known_k[at] = np.moveaxis(key_page(np.moveaxis(k[at], 0, 1)), 0, 1)
            known_v[at] = np.moveaxis(value_page(np.moveaxis(v[at], 0, 1)), 0, 1)
            done += page
        first = 0 if window is None else max(0, t - window + 1)
        seen = slice(first, t + 1)
        for h in range(q.shape[1]):
            for g in range(q.shape[2]):
                out[t, h, g] = softmax_attention(
                    q[t, h, g], known_k[seen, h], known_v[seen, h], scale
                )
    return out


# --- transforms --------------------------------------------------------------------------------
def hadamard(d: int) -> np.ndarray:
    """Sylvester's matrix, entry by entry: (-1)^(number of bits that i and j share) / sqrt(d)."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)]) / d**0.5
