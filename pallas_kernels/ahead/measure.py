"""One launch compiled ahead of time, as a row of numbers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels.ahead import bound, step
from pallas_kernels.ahead.h200 import Kernel, compile_for_h200, placed
from pallas_kernels.ahead.lowering import quiet
from pallas_kernels.ahead.sass import main_loop
from pallas_kernels.arg_specs import Spec
from pallas_kernels.packed_decode import packed_decode
from pallas_kernels.packed_decode.config import Config

# Lane-instructions per value that the default configuration may take, by both sides' format.
BUDGETS = {
    ("bf16", "bf16"): 2.3,
    ("uniform-2", "uniform-2"): 1.7,
    ("uniform-4", "uniform-4"): 2.4,
    ("lloyd-max-2", "lloyd-max-2"): 2.6,
    ("lloyd-max-3", "lloyd-max-3"): 4.5,
}
SMALLEST = 16  # tokens: of one matrix instruction


@dataclasses.dataclass(frozen=True)
class Row:
    """What compiling one launch for an H200 says; bytes, counts, and projected microseconds.

    Attributes:
      lanes_per_value: lane-instructions of the main loop per value of keys and values read.
      half_rate_per_value: those of the integer and comparison pipe.
      budget: most lanes per value, or None for a launch that has none.
      resident_warps: that a processor holds at once, of 64.
      padding: products done per product needed.
      projected: times from counts and the vendor's rates; no launch was timed.
      failures: why the launch does not pass; empty where it does.
    """

    name: str
    failures: tuple[str, ...]
    seconds: float
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    threads: int = 0
    programs: int = 0
    resident_warps: int = 0
    loop_instructions: int = 0
    loop_tokens: int = 0
    opcodes: dict[str, int] = dataclasses.field(default_factory=dict)
    lanes_per_value: float = 0.0
    half_rate_per_value: float = 0.0
    budget: float | None = None
    bits_per_value: float = 0.0
    padding: float = 0.0
    projected: bound.Bound | None = None


def budget(spec: Spec) -> float | None:
    """Of the shapes that budgets were set for: 128 channels, 8 queries or fewer, pages of 256."""
    plain = spec.page == 256 and spec.head_dim == 128 and spec.group <= 8
    return BUDGETS.get((spec.key, spec.value)) if plain else None


def compile_spec(
    spec: Spec, dump: Path, tools: tuple[str, str], config: Config | None = None
) -> Row | None:
    """The row of one launch of `packed_decode`; None where XLA wrote no PTX.

    A compiler's error becomes the row's failure: the others are still worth having.
    """
    args, begun = spec.shapes(), time.monotonic()
    run = lambda a: packed_decode(**a, **spec.options, config=config)
    try:
        kernels = compile_for_h200(run, args, dump, tools, "packed_decode")
        if not kernels:
            return None
        tokens = loop_tokens(run, args)
        row = describe(spec, kernels[0], tokens, columns=8 if spec.group <= 8 else 16)
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        said = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
        return Row(spec.name, (said,), time.monotonic() - begun, budget=budget(spec))
    return dataclasses.replace(row, seconds=time.monotonic() - begun)


def loop_tokens(run: Callable, args: Any) -> int:
    """Tokens that an iteration of the kernel's loop reads.

    Raises:
      RuntimeError: when its products are not those that this file knows.
    """
    elements = step.operand_elements(run, args, "packed_decode")
    tokens, rest = divmod(elements, step.elements_of_token(args["key"], args["value"]))
    if rest or not tokens or tokens % SMALLEST:
        raise RuntimeError(
            f"loop: got {elements} operand elements; expected a multiple of {SMALLEST} tokens' "
            f"({step.elements_of_token(args['key'], args['value'])} each); see ahead/step.py"
        )
    return tokens


def describe(spec: Spec, kernel: Kernel, tokens: int, columns: int) -> Row:
    """The row of a compiled kernel whose loop reads so many tokens."""
    loop = main_loop(kernel.listing)
    if loop is None:
        raise RuntimeError("loop: got none in the listing; expected one; see ahead/sass.py")
    values = 2 * tokens * spec.head_dim
    args = spec.shapes()
    elements = tokens * step.elements_of_token(args["key"], args["value"])
    padding = loop.multiplied() * (kernel.threads / 32) / (elements * columns)
    if padding < 0.99:
        raise RuntimeError(
            f"loop: got {padding:.2f} of the products of {tokens} tokens in the main loop of the "
            "listing; expected all; see ahead/sass.py"
        )
    iterations = spec.batch * spec.kv_heads * spec.tokens / tokens
    used, size = kernel.used, spec.bytes()
    lanes = len(loop.opcodes) * kernel.threads / values
    return Row(
        name=spec.name,
        failures=failures(lanes, used.spilled, budget(spec)),
        seconds=0.0,
        registers=used.registers,
        spilled=used.spilled,
        shared=kernel.shared,
        threads=kernel.threads,
        programs=kernel.programs,
        resident_warps=bound.resident_warps(used.registers, kernel.threads, kernel.shared),
        loop_instructions=len(loop.opcodes),
        loop_tokens=tokens,
        opcodes=dict(loop.histogram().most_common()),
        lanes_per_value=lanes,
        half_rate_per_value=loop.half_rate() * kernel.threads / values,
        budget=budget(spec),
        bits_per_value=8 * size / spec.values(),
        padding=padding,
        projected=bound.project(loop, kernel.threads, iterations, size, columns, elements),
    )


def failures(lanes: float, spilled: int, most: float | None) -> tuple[str, ...]:
    """Why a launch does not pass.

    Example:
      >>> failures(2.0, 336, most=1.7)
      ('spills 336 bytes', '2.00 lane-instructions per value, beyond 1.7')
    """
    out = [f"spills {spilled} bytes"] if spilled else []
    if most is not None and lanes > most:
        out.append(f"{lanes:.2f} lane-instructions per value, beyond {most:g}")
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class TpuRow:
    """What compiling one launch for a TPU says: temporary bytes in its memory, or why it failed."""

    name: str
    device: str
    failures: tuple[str, ...]
    temporary: int
    seconds: float


def compile_tpu(spec: Spec, run: Callable, kind: str = "v5e:2x2") -> TpuRow:
    """One launch of `packed_decode_tpu` through libtpu."""
    begun = time.monotonic()
    try:
        topology = topologies.get_topology_desc(kind, platform="tpu")
        mesh = jax.sharding.Mesh(topology.devices[:1], ("device",))
        with quiet(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            f = jax.jit(lambda a: run(**a, **spec.options))
            compiled = f.lower(placed(spec.shapes(), mesh)).compile()
    except Exception as error:  # libtpu has kinds of its own
        said = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
        return TpuRow(spec.name, kind, (said,), 0, time.monotonic() - begun)
    temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
    return TpuRow(spec.name, kind, (), temporary, time.monotonic() - begun)
