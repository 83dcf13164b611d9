"""Which mesh for a model, a method and so many devices: bytes, what fits, and a roofline of time.

A roofline is no measurement: it says what a step cannot be faster than, on paper. See
`docs/scaling.md`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from jax.sharding import AbstractMesh, AxisType

from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.evals.devices import Device
from kvjax.evals.memory import CacheUnits, cache_units, weight_bytes
from kvjax.models.config import ModelConfig
from kvjax.parallel.rules import AXES, ShardingRules

LATENCY = 10e-6
"""Seconds that a collective takes however small it is: an assumption, not measured."""
USABLE = 0.9
"""Part of a device's memory for weights and caches; the rest is for activations and the runtime."""
UNBOUNDED = 2**48


@dataclasses.dataclass(frozen=True)
class Placement:
    """A model and its caches on one mesh. Bytes are of one device; all devices have the same.

    Attributes:
      method: its name.
      data, heads, sequence: sizes of the mesh's axes. mlp: as in `ShardingRules`.
      weights: bytes of weights in bf16. cache: bytes of caches. room: bytes for both.
      largest_batch: at this context; 0 where the weights alone, or one sequence each, do not fit.
      largest_context: at this batch, in tokens, whatever the model's positions; 0 where nothing
        fits, None where no context is too long (sliding windows in all layers).
      read_weights, read_cache: seconds to read what a step reads of them.
      links: seconds of its collectives.
    """

    method: str
    data: int
    heads: int
    sequence: int
    mlp: str | None
    weights: int
    cache: int
    room: int
    largest_batch: int
    largest_context: int | None
    read_weights: float
    read_cache: float
    links: float

    @property
    def step(self) -> float:
        """Seconds per step, of one token for every sequence: reading, then talking."""
        return self.read_weights + self.read_cache + self.links

    @property
    def fits(self) -> bool:
        return self.weights + self.cache <= self.room

    @property
    def mesh(self) -> str:
        return f"{self.data}x{self.heads}x{self.sequence}" + ("+mlp" if self.mlp else "")


def plan_layouts(
    config: ModelConfig,
    method: Method | Sequence[Method],
    device: Device,
    devices: int,
    *,
    context: int,
    batch: int = 1,
    latency: float = LATENCY,
    usable: float = USABLE,
) -> list[Placement]:
    """Every mesh of data x heads x sequence with so many devices, the cheapest first.

    Those that fit come first, by seconds per step, then by bytes; then the others, by bytes. The
    arrays of calibrated methods are not counted: a rotation per layer and head is far below the
    weights.

    Args:
      method: one, or one per layer.
      batch: sequences over all devices.
      latency: seconds per collective. usable: part of the memory that weights and caches may take.
    Raises:
      InputError: no devices; a context beyond the model's positions; a part of the memory or a
        latency that is none; or no mesh that batch, heads and codecs allow.

    Example:
      >>> from kvjax.evals.devices import get_device
      >>> from kvjax.methods import get
      >>> from kvjax.models.config import known_configs
      >>> llama, h200 = known_configs()["llama-3.1-70b"], get_device("h200")
      >>> best = plan_layouts(llama, get("int4", 128), h200, 8, context=131_072)[0]
      >>> best.mesh, best.fits
      ('1x8x1+mlp', True)
    """
    if min(devices, batch, context) < 1:
        raise InputError(
            "plan",
            got=f"{devices} devices, batch {batch}, context {context}",
            expected="1 or more of each",
            fix="raise them",
        )
    if context > config.max_positions:
        raise InputError(
            "context",
            got=f"{context} tokens",
            expected=f"at most the {config.max_positions} positions of {config.name}",
            fix="use a shorter context, or a config with more positions",
        )
    if not 0 < usable <= 1 or not 0 <= latency < math.inf:
        raise InputError(
            "plan",
            got=f"usable {usable}, latency {latency} s",
            expected="a usable part of the memory above 0 and up to 1, a latency of 0 or more",
            fix="choose such numbers",
        )
    methods = (method,) if isinstance(method, Method) else tuple(method)
    units = cache_units(config, method)
    found, refused = [], []
    for rules in meshes(config, devices):
        try:
            rules.check(config, methods, batch)
        except InputError as error:
            refused.append(error)
            continue
        found.append(
            _place(
                config,
                methods[0].name,
                units,
                device,
                rules,
                context,
                batch,
                latency,
                int(usable * device.memory),
            )
        )
    if not found:
        raise refused[-1]
    return sorted(found, key=_cost)


def _cost(row: Placement) -> tuple:
    size = row.weights + row.cache
    return (False, row.step, size) if row.fits else (True, size, row.step)


def meshes(config: ModelConfig, devices: int) -> Iterator[ShardingRules]:
    """Rules for all ordered factorisations of a number, with and without split feed-forwards."""
    parts = [n for n in range(1, devices + 1) if devices % n == 0]
    for data in parts:
        for heads in parts:
            if devices % (data * heads):
                continue
            shape = (data, heads, devices // (data * heads))
            mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)
            yield ShardingRules(mesh)  # type: ignore[arg-type]
            if heads > 1 and config.d_ff % heads == 0:
                yield ShardingRules(mesh, mlp="heads")  # type: ignore[arg-type]


def _place(
    config: ModelConfig,
    name: str,
    units: tuple[CacheUnits, ...],
    device: Device,
    rules: ShardingRules,
    context: int,
    batch: int,
    latency: float,
    room: int,
) -> Placement:
    heads = config.kv_heads * rules.copies(config) // rules.heads
    weights, read = weight_bytes(config, rules)

    def cache(sequences: int, tokens: int) -> int:
        own = {"sequences": sequences, "heads": heads, "shards": rules.sequence}
        return sum(unit.on_device(context=tokens, **own) for unit in units)

    sequences = batch // rules.data
    held = cache(sequences, context)
    return Placement(
        method=name,
        data=rules.data,
        heads=rules.heads,
        sequence=rules.sequence,
        mlp=rules.mlp,
        weights=weights,
        cache=held,
        room=room,
        largest_batch=max(0, (room - weights) // cache(1, context)) * rules.data,
        largest_context=_largest(lambda tokens: weights + cache(sequences, tokens) <= room),
        read_weights=read / device.bandwidth,
        read_cache=held / device.bandwidth,
        links=link_seconds(config, rules, device, batch, latency),
    )


def link_seconds(
    config: ModelConfig, rules: ShardingRules, device: Device, batch: int, latency: float = LATENCY
) -> float:
    """Seconds of a step's collectives, one after the other.

    Per layer, with b sequences, h KV heads and g queries for each on a device:

        sequence   a maximum of b*h*g and a sum of b*h*g*(d + 1) numbers in float32
        heads      a sum of b*D activations in bf16; with mlp="heads", two
        data       nothing

    Devices of a mesh are counted with sequence fastest, then heads, then data.
    """
    b = batch // rules.data
    rows = b * config.q_heads // rules.heads  # b * h * g
    sequence = [4 * rows, 4 * rows * (config.head_dim + 1)]
    heads = [2 * b * config.d_model] * (2 if rules.mlp else 1)
    fast = device.speed(rules.sequence, rules.mesh.size)
    far = device.speed(rules.sequence * rules.heads, rules.mesh.size)
    merge = sum(all_reduce_seconds(n, rules.sequence, fast, latency) for n in sequence)
    add = sum(all_reduce_seconds(n, rules.heads, far, latency) for n in heads)
    return config.layers * (merge + add)


def all_reduce_seconds(size: int, devices: int, link: float, latency: float = LATENCY) -> float:
    """Seconds to sum `size` bytes of every device in a ring, `2 (n-1)/n size / link + latency`.

    Example:
      >>> all_reduce_seconds(1000, 4, link=500.0, latency=1.0)
      4.0
    """
    return 0.0 if devices == 1 else 2 * (devices - 1) / devices * size / link + latency


def why(rows: Sequence[Placement]) -> str:
    """Why the first of `plan_layouts` is the cheapest, in a line.

    Example:
      >>> row = Placement("m", 1, 2, 1, None, 6, 3, 10, 1, 9, 6e-3, 3e-3, 1e-3)
      >>> why([row])
      'weights 60 %, cache 30 %, links 10 % of its time; the only one that fits'
    """
    best = rows[0]
    if not best.fits:
        return (
            f"the fewest bytes, and {(best.weights + best.cache - best.room) / 2**30:.1f} GiB "
            "per device too many"
        )
    parts = {"weights": best.read_weights, "cache": best.read_cache, "links": best.links}
    shares = ", ".join(f"{name} {100 * part / best.step:.0f} %" for name, part in parts.items())
    others = [row for row in rows[1:] if row.fits]
    if not others:
        return f"{shares} of its time; the only one that fits"
    return f"{shares} of its time; next {others[0].mesh}, {1e3 * others[0].step:.2f} ms"


def _largest(fits: Callable[[int], bool]) -> int | None:
    """The largest number that fits, of those up to `UNBOUNDED`; None if that does."""
    if fits(UNBOUNDED):
        return None
    low, high = 0, UNBOUNDED
    if not fits(1):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
