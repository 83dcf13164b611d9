"""Decode attention of one layer: our kernels by format, against attention over dense caches."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arg_specs import Spec
from pallas_kernels.bench import baselines, timing
from pallas_kernels.bench.cases import BASELINES, OWN, Case, cases
from pallas_kernels.bench.check import TOLERANCE, check, check_last, sharpness
from pallas_kernels.bench.results import Row
from pallas_kernels.bench.setting import Room, Setting, attempt
from pallas_kernels.bench.timing import Program, Seconds
from pallas_kernels.packed_decode import packed_decode

Array = jax.Array
Found = tuple[Program, dict[str, Any]] | str  # what to run and what to tell of it, or why not

COPY = "copy"
ONE_AT_A_TIME = threading.Lock()
SPREAD = 2.0  # of logits over standard normal keys, as in `check`
RATIOS = {"x_" + name.replace("-", "_"): name for name in BASELINES} | {"x_ours_bf16": OWN}


def units(tiny: bool) -> list[str]:
    """Ids of all rows."""
    return [unit for case in cases(tiny) for unit in case.units]


def measure(wanted: Sequence[str], setting: Setting) -> Iterator[list[Row]]:
    """Case by case: the formats that are wanted, and always the baselines, in the same rounds."""
    verdicts: dict[tuple, Any] = {}
    for case in cases(setting.tiny):
        pairs = [pair for pair in case.pairs if f"{case.name}/{pair}" in wanted]
        if pairs or set(case.baselines) & set(wanted):
            yield _measure_case(case, [OWN, *(p for p in pairs if p != OWN)], setting, verdicts)


def _measure_case(
    case: Case, pairs: list[str], setting: Setting, verdicts: dict[tuple, Any]
) -> list[Row]:
    room, found = Room(), {}
    dense = _baselines(case, setting, room)  # one after the other: XLA tries its products out
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = {p: pool.submit(attempt, _format, case, p, setting, verdicts, room) for p in pairs}
        found = {p: job.result() for p, job in jobs.items()}
    found = dense | found
    programs = {name: f[0] for name, f in found.items() if not isinstance(f, str)}
    size = 2**20 if setting.tiny else 2**30
    options = {"seconds": setting.seconds, "bandwidth": setting.bandwidth}
    programs[COPY] = timing.copy_program(size, **options)
    times = timing.race(programs, rounds=setting.rounds)
    return [_row(case, name, f, programs, times) for name, f in found.items()]


def _row(case: Case, name: str, found: Found, programs, times: dict[str, Seconds]) -> Row:
    row: Row = {"id": f"{case.name}/{name}"}
    if isinstance(found, str):
        return row | {"skipped": found}
    own, speed = times[name], programs[name].bytes / times[name].median
    copy = programs[COPY].bytes / times[COPY].median
    row |= {
        "us": own.median * 1e6,
        "us_low": own.low * 1e6,
        "us_high": own.high * 1e6,
        "GB/s": speed / 1e9,
        "% copy": 100 * speed / copy,
        "MB": programs[name].bytes / 1e6,
    }
    row |= {head: times[b].median / own.median for head, b in RATIOS.items() if b in times}
    return row | found[1] | {"calls": programs[name].times, "rounds": own.rounds}


def _format(case: Case, pair: str, setting: Setting, verdicts, room: Room) -> Found:
    """A format of whose numbers a small batch is right, and of the large one the last sequence."""
    key = (pair, case.head_dim)
    if key not in verdicts:
        small = case.spec(pair, batch=2, kv_heads=1, tokens=5 * case.page)
        verdicts[key] = check(small, setting.backend)
    if verdicts[key].reason:
        return verdicts[key].reason
    made = inputs(case, pair, case.page, setting, room)
    return made if isinstance(made, str) else packed_program(*made, setting)


def inputs(
    case: Case, pair: str, page: int, setting: Setting, room: Room
) -> tuple[Spec, dict[str, Any]] | str:
    """A launch with its arrays, of as many layers as a loop has to rotate over, or why not."""
    size = case.spec(pair, page=page).bytes()
    copies = 2 if setting.tiny else timing.copies_of(size)
    spec = case.spec(pair, page=page, layers=copies)
    with ONE_AT_A_TIME:  # making arrays takes several times their memory
        reason = room.take(copies * size)
        if reason:
            return reason
        args = spec.arrays(np.random.default_rng(0))
        args["q"] = args["q"] * sharpness(args["q"], args["key"])
        return spec, jax.block_until_ready(args)


def packed_program(spec: Spec, args: dict[str, Any], setting: Setting, config=None) -> Found:
    """Our kernel, checked as it will be measured; call i reads copy i of the arrays, where a model
    has its layers."""
    arrays = {k: a for k, a in args.items() if k != "q"}

    def step(q, arrays, i):
        layer = i % spec.layers
        options = {**spec.options, "config": config, "backend": setting.backend}
        return packed_decode(q, layer=layer, **arrays, **options)[0]

    size = spec.bytes()
    times = timing.turns(size, spec.layers, **_length(setting))
    program = timing.program(step, args["q"], arrays, times, size)
    verdict = check_last(spec, args, program.run())
    about = {"bits": round(8 * size / spec.values(), 3), "error": max(verdict.errors.values())}
    return verdict.reason or (program, about)


def _baselines(case: Case, setting: Setting, room: Room) -> dict[str, Found]:
    """Attention over dense caches, by name; those of one dtype and layout read the same arrays."""
    found: dict[str, Found] = {}
    arrays: dict[tuple, list] = {}
    rng = jax.random.key(0)
    shape = (case.batch, case.kv_heads, case.group, case.head_dim)
    q = jax.random.normal(rng, shape) * SPREAD * case.head_dim**-0.5
    gpu = jax.default_backend() == "gpu"
    for dtype, names in ((jnp.bfloat16, BASELINES[1:]), (jnp.float32, BASELINES[:1])):
        for name in names:
            no = baselines.torch_why_not() if name.startswith("torch") else None
            no = "cuDNN needs a GPU" if name.startswith("cudnn") and not gpu else no
            found[name] = no or attempt(_baseline, name, case, q, dtype, setting, room, arrays)
    return {name: found[name] for name in BASELINES}


def _baseline(
    name: str, case: Case, q: Array, dtype: Any, setting: Setting, room: Room, arrays: dict
) -> Found:
    size = case.dense_bytes(jnp.dtype(dtype).itemsize)
    count = 2 if setting.tiny else timing.copies_of(size)
    swap = name.startswith("cudnn")
    if (dtype, swap) not in arrays:
        reason = room.take(count * size)
        if reason:
            return reason
        arrays[dtype, swap] = [_dense(case, dtype, i, swap) for i in range(count)]
    copies = arrays[dtype, swap]
    times = timing.turns(size, count, **_length(setting))
    about: dict[str, Any] = {"bits": 8.0 * jnp.dtype(dtype).itemsize}
    if name.startswith("torch"):
        program, about["note"] = baselines.torch_program(q, copies, times, size)
    else:
        attention = baselines.cudnn if swap else baselines.xla
        program = timing.unrolled(attention, q, copies, times, size)
    error = _baseline_error(q, copies[-1], program.run(), swap)
    if not error <= TOLERANCE["bf16"]:
        return f"WRONG NUMBERS: error {error:.2g} against float32, beyond {TOLERANCE['bf16']:g}"
    return program, about | {"error": error}


def _baseline_error(q: Array, arrays, out: Array, swap: bool) -> float:
    """Of the last sequence, against float32 of highest precision."""
    k, v = (a[-1:].astype(jnp.float32) for a in arrays)
    k, v = (a.swapaxes(1, 2) if swap else a for a in (k, v))
    with jax.default_matmul_precision("highest"):
        right = jax.jit(baselines.xla)(q[-1:], k, v)
    return float(jnp.abs(out[-1:] - right).max() / jnp.abs(right).max())


def _dense(case: Case, dtype: Any, copy: int, swap: bool) -> tuple[Array, Array]:
    """Standard normal keys and values `[b, h, t, d]`, or `[b, t, h, d]` if swapped. All sequences
    are alike: what matters is that they lie in memory of their own."""
    one = (case.kv_heads, case.tokens, case.head_dim)
    one = (one[1], one[0], one[2]) if swap else one

    @jax.jit
    def draw(rng):
        drawn = jax.random.normal(rng, one, dtype)
        return jnp.broadcast_to(drawn, (case.batch, *one))

    key, value = jax.random.split(jax.random.key(copy + 1))
    return draw(key), draw(value)


def _length(setting: Setting) -> dict[str, float]:
    return {"seconds": setting.seconds, "bandwidth": setting.bandwidth}
