"""What encoding costs: microseconds per token of keys and values, one layer of 8 KV heads.

A part of `python -m pallas_kernels.bench --device gpu`. A token is encoded once in its life and
read at every step after, so this is small beside reading; it is measured so that nobody has to
believe it. Methods are encoded by their codecs through XLA; rows of a "kernel" are
`pallas_kernels.encode` for the same kinds of codes, as `kvjax.append` does it on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import kvjax
from kvjax.codecs import Codebook
from pallas_kernels.bench import timing
from pallas_kernels.bench.setting import Setting, attempt
from pallas_kernels.encode import Grid, Levels, Walsh, encode, encode_reference

Row = dict[str, Any]

METHODS = ("bf16", "int4", "kivi-2", "hadamard-int4", "turboquant-2", "turboquant-3", "rabitq-4")
KERNELS = ("kernel-int4", "kernel-hadamard-int4", "kernel-turboquant-2", "kernel-turboquant-3")
PAGES = (1, 256)  # of one step: of one sequence, and of a batch or a prompt
KV_HEADS, HEAD_DIM = 8, 128


PAGE = 64  # tokens
DIFFER = 0.01  # share of a kernel's words that may differ from the reference's, codes at an edge


def _shapes(tiny: bool) -> tuple[tuple[str, ...], tuple[int, ...], int, int]:
    """Names, pages, KV heads, head_dim."""
    if tiny:
        return ("int4", "kernel-int4"), (1,), 1, 16
    return METHODS + KERNELS, PAGES, KV_HEADS, HEAD_DIM


def units(tiny: bool) -> list[str]:
    """Ids of all rows."""
    names, counts, _, _ = _shapes(tiny)
    return [f"encode/pages{n}/{name}" for n in counts for name in names]


def measure(wanted: Sequence[str], setting: Setting) -> Iterator[list[Row]]:
    """All that encodes one count of pages in the same rounds."""
    names, counts, heads, d = _shapes(setting.tiny)
    for count in counts:
        unit = f"encode/pages{count}/"
        made = {
            name: attempt(_program, name, (count, heads, 1, PAGE, d), setting)
            for name in names
            if unit + name in wanted
        }
        programs = {name: m for name, m in made.items() if not isinstance(m, str)}
        times = timing.race(programs, rounds=setting.rounds)
        rows: list[Row] = [
            {"id": unit + n, "skipped": m} for n, m in made.items() if n not in times
        ]
        for name, time in times.items():
            us = time.median * 1e6
            speed = programs[name].bytes / time.median
            about = {"us": us, "us/token": us / (count * PAGE), "GB/s": speed / 1e9}
            rows.append({"id": unit + name, **about, "page": PAGE, "rounds": time.rounds})
        if rows:
            yield rows


def _program(name: str, shape: tuple[int, ...], setting: Setting) -> timing.Program | str:
    draw = lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    pages = (draw(0), draw(1))
    size = sum(a.nbytes for a in pages)
    times = timing.turns(size, 1, seconds=setting.seconds, bandwidth=setting.bandwidth)
    work, arrays = _kernel(name, shape, setting) if name in KERNELS else _codecs(name, shape)
    if name in KERNELS:
        reference, _ = _kernel(name, shape, setting, encode_reference)
        differ = _differing(jax.jit(work)(arrays, pages), jax.jit(reference)(arrays, pages))
        if not differ <= DIFFER:
            return f"WRONG NUMBERS: {differ:.1%} of the words differ from the reference"

    def run(pages, arrays):
        def body(_, carry):  # codes are carried, so that they are written; the next ones need them
            one, code = carry
            one = timing.feed(one, _last(code))
            return one, work(arrays, tuple(a * one.astype(a.dtype) for a in pages))

        return jax.lax.fori_loop(0, times, body, (jnp.float32(1), work(arrays, pages)))

    ready = jax.jit(run).lower(pages, arrays).compile()
    return timing.Program(lambda: jax.block_until_ready(ready(pages, arrays)), times, size)


def _codecs(name: str, shape: tuple[int, ...]) -> tuple[Callable, Any]:
    """Keys and values by the codecs of a method."""
    method = kvjax.methods.get(name, head_dim=shape[-1]).transpose_values()
    positions = jnp.broadcast_to(jnp.arange(shape[3]), (shape[0], 1, 1, shape[3]))

    def work(method, pages):
        key, value = (a.astype(jnp.float32) for a in pages)
        return method.key.encode(key, positions), method.value.encode(value, positions)

    return work, method


def _kernel(
    name: str, shape: tuple[int, ...], setting: Setting, reference: Callable | None = None
) -> tuple[Callable, Any]:
    """The same kinds of codes by the kernel, or by what it is compared with."""
    bits, d = int(name[-1]), shape[-1]
    rotated = "int4" not in name or "hadamard" in name
    signs = jax.random.rademacher(jax.random.key(2), (d,), jnp.float32)
    transform = Walsh(signs) if rotated else None
    form = Grid(bits) if "int" in name else Levels(Codebook.lloyd_max(d, bits).levels, bits)
    make = reference or functools.partial(encode, backend=setting.backend)

    def work(arrays, pages):
        form, transform = arrays
        return tuple(make(a, form, transform, transposed=i == 1) for i, a in enumerate(pages))

    return work, (form, transform)


def _differing(got: Any, want: Any) -> float:
    """The share of words that differ, of the kind where most do."""
    sides = zip(got, want, strict=True)
    pairs = [(a, b) for g, w in sides for a, b in zip(g.words, w.words, strict=True)]
    return max(float((a != b).mean()) for a, b in pairs)


def _last(code: Any) -> jax.Array:
    """A number that depends on each leaf."""
    return sum(leaf.reshape(-1)[-1].astype(jnp.float32) for leaf in jax.tree.leaves(code))
