"""Real shapes of `packed_decode`: shared by tests, the benchmark and the compile report.

A format names how one side is kept, in the leaves and dtypes that kvjax hands to kernels (see
`kvjax/attention/packed_form.py`); a spec is a launch. `packed_decode(**spec.arrays(rng),
**spec.options)` runs it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packed import Block, Packed, Part, size, widths

Side = Literal["key", "value"]
Make = Callable[[str, tuple[int, ...]], Any]  # (kind of leaf, shape) -> leaf

# Of each kind of leaf: its dtype, and which bits of a random word are kept and which are set.
KINDS = {
    "codes": (np.uint16, 0xFFFF, 0),
    "bf16": (np.uint16, 0x80FF, 0x3F00),  # as its bits: 0.5 to 2, of either sign
    "norm": (np.uint16, 0x007F, 0x3C80),  # bf16 as its bits: 1/64 to 1/32
    "half": (np.float16, 0x03FF, 0x2400),  # 1/64 to 1/32
}
MOST_DRAWN = 2**24  # words: larger arrays repeat them

# Lloyd-Max levels of N(0, 1), the positive half, by bits.
LEVELS = {
    1: (0.7979,),
    2: (0.4528, 1.510),
    3: (0.2451, 0.7560, 1.344, 2.152),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}
SIGN = (1.0,)


@dataclasses.dataclass(frozen=True)
class Format:
    """How keys or values are kept.

    Attributes:
      tiers: (bits, share of the channels), one tier after the other.
      levels: whether codes stand for Lloyd-Max levels, or for whole numbers.
      scales: "none"; "token": a norm (levels), or a scale and a zero point (whole numbers);
        "channel": the same per channel and page, which values have per token and 32 channels
        instead, as in KIVI.
      signs: whether there is a second part, one sign per channel and a norm per token (QJL).
    """

    tiers: tuple[tuple[int, float], ...]
    levels: bool = False
    scales: Literal["none", "token", "channel"] = "none"
    signs: bool = False

    def parts(
        self, side: Side, lead: tuple[int, ...], page: int, d: int, make: Make, transposed: bool
    ) -> Packed:
        """The arrays of one side, each leading with `lead`."""
        block = lambda bits, size, levels: _block(bits, size, levels, lead, page, transposed, make)
        widths = [round(d * share) for _, share in self.tiers]
        blocks = tuple(
            block(bits, width, LEVELS[bits] if self.levels else None)
            for (bits, _), width in zip(self.tiers, widths, strict=True)
        )
        own = self._scaled(blocks, side, lead, page, make)
        if not self.signs:
            return own
        return (*own, Part((block(1, d, SIGN),), token_scale=make("half", (*lead, page))))

    def _scaled(self, blocks, side: Side, lead, page: int, make: Make) -> Packed:
        if self.scales == "none":
            return (Part(blocks),)
        if self.levels:
            return (Part(blocks, token_scale=make("norm", (*lead, page))),)
        [block] = blocks
        if self.scales == "channel" and side == "key":
            scale, zero = (make("half", (*lead, block.size)) for _ in range(2))
            return (Part(blocks, channel_scale=scale, channel_zero=zero),)
        group = 32 if self.scales == "channel" else block.size
        scale, zero = (make("half", (*lead, page, block.size // group)) for _ in range(2))
        return tuple(
            Part(
                (dataclasses.replace(block, start=i * group, size=group),),
                token_scale=scale,
                token_zero=zero,
                column=i,
            )
            for i in range(block.size // group)
        )


def _block(bits: int, size: int, levels, lead, page: int, transposed: bool, make: Make) -> Block:
    if bits == 16:
        return Block((make("bf16", (*lead, page, size)),), None, bits, 0, size)
    rows = [page * width // 16 for width in widths(bits)]
    words = tuple(make("codes", (*lead, size, r) if transposed else (*lead, r, size)) for r in rows)
    book = None if levels is None else _levels(levels)
    return Block(words, book, bits, 0, size, transposed=transposed)


def _levels(positive: tuple[float, ...]) -> Any:
    return np.array([-x for x in reversed(positive)] + list(positive), np.float32)


def _uniform(bits: int) -> Format:
    return Format(((bits, 1.0),), scales="token")


def _lloyd_max(bits: int, **more) -> Format:
    return Format(((bits, 1.0),), levels=True, scales="token", **more)


FORMATS: dict[str, Format] = {
    "bf16": Format(((16, 1.0),)),
    **{f"uniform-{bits}": _uniform(bits) for bits in (1, 2, 3, 4, 5, 6, 8)},
    **{f"lloyd-max-{bits}": _lloyd_max(bits) for bits in (1, 2, 3, 4)},
    "kivi-2": Format(((2, 1.0),), scales="channel"),
    "kivi-4": Format(((4, 1.0),), scales="channel"),
    "turboquant-prod-2": _lloyd_max(1, signs=True),
    "turboquant-prod-3": _lloyd_max(2, signs=True),
    "tiers-4-2": Format(((4, 0.25), (2, 0.75)), levels=True, scales="token"),
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """One launch of `packed_decode`.

    Args:
      name: for reports.
      batch, kv_heads, group, head_dim: `q` is `[batch, kv_heads, group, head_dim]`, or longer where
        the keys have a part of signs.
      tokens: in the pages of every sequence; `page` of them in a page.
      key, value: names of `FORMATS`.
      paged: whether pages lie in a pool that the sequences share.
      window: of sliding attention, in tokens: the pages are then a ring.
      layers: that the arrays hold; the first is read.
      transposed_values: whether words of values are kept transposed, as GPUs want them.
    """

    name: str
    batch: int
    kv_heads: int
    group: int
    head_dim: int
    tokens: int
    page: int
    key: str
    value: str
    paged: bool = False
    window: int | None = None
    layers: int = 1
    transposed_values: bool = True

    def __post_init__(self):
        for side in (self.key, self.value):
            if side not in FORMATS:
                raise ValueError(
                    f"format: got {side!r}; expected one of {', '.join(FORMATS)}; name one of them"
                )

    @property
    def slots(self) -> int:
        """Pages of a sequence."""
        return -(-self.tokens // self.page)

    @property
    def options(self) -> dict[str, Any]:
        """Static arguments of `packed_decode`."""
        return {"page": self.page, "window": self.window}

    def shapes(self) -> dict[str, Any]:
        """Array arguments of `packed_decode` as `jax.ShapeDtypeStruct`s: all shapes, no memory."""
        args = self._cache(lambda kind, shape: jax.ShapeDtypeStruct(shape, KINDS[kind][0]))
        args["q"] = jax.ShapeDtypeStruct(self._query(args["key"]), jnp.float32)
        args.update(self._indices(np.random.default_rng(0)))
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)

    def arrays(self, rng: np.random.Generator) -> dict[str, Any]:
        """The same, with random codes, small positive scales, and every page full of tokens. Of an
        array beyond 16 million numbers the first 16 million are drawn and repeated.

        Example:
          >>> spec = Spec("small", 1, 2, 4, 64, 128, 64, "lloyd-max-2", "uniform-2")
          >>> args = spec.arrays(np.random.default_rng(0))
          >>> args["key"][0].blocks[0].words[0].shape, args["lengths"].tolist(), spec.bytes()
          ((1, 1, 2, 2, 8, 64), [128], 9728)
        """
        args = self._cache(lambda kind, shape: _draw(rng, kind, shape))
        q = rng.normal(size=self._query(args["key"])) * self.head_dim**-0.5
        args["q"] = jnp.asarray(q, jnp.float32)
        args.update(self._indices(rng))
        return jax.tree.map(jnp.asarray, args)

    def bytes(self) -> int:
        """Of codes and scales, in whole pages, that a decode step reads."""
        sizes: list[int] = []

        def count(kind: str, shape: tuple[int, ...]) -> None:
            sizes.append(math.prod(shape) * np.dtype(KINDS[kind][0]).itemsize)

        self._cache(count)
        return sum(sizes) // self.layers

    def values(self) -> int:
        """Numbers of keys and values that a decode step attends to."""
        return 2 * self.batch * self.kv_heads * self.tokens * self.head_dim

    def _cache(self, make: Make) -> dict[str, Any]:
        if self.paged:
            lead: tuple[int, ...] = (self.layers, self.batch * self.slots, self.kv_heads)
        else:
            lead = (self.layers, self.batch, self.kv_heads, self.slots)
        both: tuple[tuple[Side, str, bool], ...] = (
            ("key", self.key, False),
            ("value", self.value, self.transposed_values),
        )
        return {
            side: FORMATS[name].parts(side, lead, self.page, self.head_dim, make, transposed)
            for side, name, transposed in both
        }

    def _query(self, key: Packed) -> tuple[int, ...]:
        return (self.batch, self.kv_heads, self.group, size(key))

    def _indices(self, rng: np.random.Generator) -> dict[str, Any]:
        b, n = self.batch, self.slots
        out: dict[str, Any] = {"lengths": np.full((b,), self.tokens, np.int32)}
        table = rng.permutation(b * n).reshape(b, n).astype(np.int32)
        if self.paged:
            out["table"] = table
        if self.window is not None:
            order = (np.arange(n, dtype=np.int32) + n // 2) % n * self.page  # a ring, half around
            starts = np.broadcast_to(order, (b, n))
            if self.paged:
                pool = np.zeros(b * n, np.int32)
                pool[table] = starts
                starts = pool
            out["starts"] = np.broadcast_to(starts, (self.layers, *starts.shape))
            out["position"] = np.full((b,), self.tokens - 1, np.int32)
        return out


def _draw(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> jax.Array:
    dtype, kept, fixed = KINDS[kind]
    count = math.prod(shape)
    words = rng.integers(0, 2**16, min(count, MOST_DRAWN), np.uint16)
    drawn = jnp.asarray((words & np.uint16(kept) | np.uint16(fixed)).view(dtype))
    return drawn.reshape(shape) if count <= MOST_DRAWN else jnp.resize(drawn, shape)


# What is measured and compiled: both sides alike but where a recipe has them differ.
PAIRS: dict[str, tuple[str, str]] = {
    "bf16": ("bf16", "bf16"),
    "uniform-8": ("uniform-8", "uniform-8"),
    "uniform-4": ("uniform-4", "uniform-4"),
    "uniform-2": ("uniform-2", "uniform-2"),
    "lloyd-max-2": ("lloyd-max-2", "lloyd-max-2"),
    "lloyd-max-3": ("lloyd-max-3", "lloyd-max-3"),
    "lloyd-max-4": ("lloyd-max-4", "lloyd-max-4"),
    "kivi-2": ("kivi-2", "uniform-2"),
    "kivi-2-grouped": ("kivi-2", "kivi-2"),
    "turboquant-prod-3": ("turboquant-prod-3", "lloyd-max-3"),
    "tiers-4-2": ("tiers-4-2", "tiers-4-2"),
}


def spec(pair: str, **changes) -> Spec:
    """A pair of `PAIRS` at 128K tokens of one sequence, 8 KV heads of 128 channels, 4 queries each.

    Args:
      changes: fields of the spec that are to differ; they are named in its name.

    Example:
      >>> spec("uniform-2", head_dim=64, paged=True).name
      'uniform-2,head_dim=64,paged=True'
    """
    key, value = PAIRS[pair]
    name = ",".join([pair, *(f"{field}={x}" for field, x in changes.items())])
    plain = Spec(name, 1, 8, 4, 128, 131072, 256, key, value)
    return dataclasses.replace(plain, **changes)


# Variations that need code of their own somewhere: what must lower and compile besides the plain
# shape of every pair.
VARIED: tuple[Spec, ...] = (
    spec("uniform-2", head_dim=64),
    spec("lloyd-max-2", head_dim=96, group=8),
    spec("lloyd-max-2", head_dim=256, page=64),
    spec("uniform-4", group=16, paged=True),
    spec("lloyd-max-3", group=1, page=64, paged=True),
    spec("bf16", page=64, paged=True),
    spec("lloyd-max-2", tokens=4608, window=4096),
    spec("uniform-2", tokens=4608, window=4096, paged=True),
)
PLAIN: tuple[Spec, ...] = tuple(spec(pair) for pair in PAIRS)
