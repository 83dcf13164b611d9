"""Which axis of every array lies on which axis of the mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from kvjax.cache.kept import Kept
from kvjax.cache.state import Cache, pool_part
from kvjax.cache.working_set import WorkingSet
from kvjax.codecs.subspace import most_group_heads
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Layers, Params

AXES = ("data", "heads", "sequence")
_SPLIT = {  # Layers: the axis that goes over the heads
    **dict.fromkeys(("wq", "wk", "wv"), 2),
    **dict.fromkeys(("bq", "bk", "bv", "wo"), 1),
}
_SPLIT_MLP = {"w_gate": 2, "w_up": 2, "w_down": 1}


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """A mesh, and what its axes split.

        data       sequences of a batch
        heads      KV heads with their queries, and the attention weights that make them
        sequence   packed pages of every sequence, dealt in turn; windows are on every device

    A shared pool of pages is in equal parts over data and sequence: pages are shared within a part.
    All else is on every device.

    Args:
      mesh: with the axes "data", "heads", "sequence"; see `make_mesh`.
      mlp: "heads" splits the feed-forward weights over the heads' devices too: less memory, one
        more reduction per layer.

    Raises:
      InputError: a mesh with other axes.

    Example:
      >>> ShardingRules(make_mesh(1, 1, 1)).sequence
      1
    """

    mesh: Mesh
    mlp: str | None = None

    def __post_init__(self):
        if self.mesh.axis_names != AXES:
            raise InputError(
                "mesh", got=f"axes {self.mesh.axis_names}", expected=f"{AXES}", fix="use make_mesh"
            )
        if self.mlp not in (None, "heads"):
            raise InputError("mlp", got=repr(self.mlp), expected="None or 'heads'", fix="use these")

    @property
    def data(self) -> int:
        return self.mesh.shape["data"]

    @property
    def heads(self) -> int:
        return self.mesh.shape["heads"]

    @property
    def sequence(self) -> int:
        return self.mesh.shape["sequence"]

    def copies(self, config: ModelConfig) -> int:
        """Devices that hold the same KV head, with other queries of its group: 1, unless there are
        more devices than KV heads.

        Raises:
          InputError: heads that the mesh does not divide.
        """
        copies = self.heads // math.gcd(self.heads, config.kv_heads)
        if config.q_per_kv % copies or (copies > 1 and self.heads % config.kv_heads):
            raise InputError(
                "mesh",
                got=f"{self.heads} devices for {config.kv_heads} KV heads of {config.q_per_kv} "
                "query heads each",
                expected="a number that divides the KV heads, or a multiple of them that divides "
                "the query heads",
                fix="make the axis heads smaller, and data or sequence larger",
            )
        return copies

    def check(self, config: ModelConfig, methods: Sequence[Method], batch: int) -> None:
        """Raises `InputError` for a batch, heads, widths, pools or codecs that do not split."""
        self.copies(config)
        if batch % self.data:
            raise InputError(
                "batch",
                got=f"{batch} sequences over {self.data} devices",
                expected="a multiple",
                fix="pad the batch, or make the axis data smaller",
            )
        if self.mlp and config.d_ff % self.heads:
            raise InputError(
                "mlp",
                got=f"width {config.d_ff} over {self.heads} devices",
                expected="a multiple",
                fix="leave mlp at None",
            )
        for method in methods:
            if self.heads > 1 and "TokenScale" in str(jax.tree.structure(method)):
                raise InputError(
                    method.name,
                    got=f"lengths of tokens over all heads, and {self.heads} devices of heads",
                    expected="codecs of one head",
                    fix="make the axis heads 1",
                )
            group = max(most_group_heads(method.key), most_group_heads(method.value))
            own = config.kv_heads // self.heads
            if self.heads > 1 and group > 1 and (self.copies(config) > 1 or own % group):
                raise InputError(
                    method.name,
                    got=f"{group} heads that share coordinates, and {own} of them on a device",
                    expected="whole groups on every device",
                    fix="make the axis heads smaller, or fit it with smaller groups",
                )
            if method.layout.pool is not None:
                pool_part(method.layout.pool, self.data, self.sequence)


def make_mesh(
    data: int = 1, heads: int = 1, sequence: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of the first `data x heads x sequence` of some devices.

    Args:
      devices: in the order in which they are placed, `sequence` fastest; None is `jax.devices()`.
    Raises:
      InputError: sizes below 1, or more devices than there are.
    """
    found = list(jax.devices() if devices is None else devices)
    wanted = data * heads * sequence
    if min(data, heads, sequence) < 1 or len(found) < wanted:
        raise InputError(
            "mesh",
            got=f"{data} x {heads} x {sequence}",
            expected=f"positive numbers with a product of at most {len(found)} devices",
            fix="make it smaller, or start with more devices",
        )
    grid = np.array(found[:wanted]).reshape(data, heads, sequence)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def cache_specs(cache: Cache | WorkingSet) -> Any:
    """The `PartitionSpec` of every leaf of a cache, as a prefix of it.

    Pages that heads compete for, in a pool of a policy's, are on every device.
    """
    spec: Any = PartitionSpec
    rows, heads = spec(None, "data"), spec(None, "data", "heads")
    if isinstance(cache, WorkingSet):
        return jax.tree.map(lambda a: rows if a.ndim == 2 else heads, cache)
    dealt = "sequence" if cache.shards > 1 else None
    pages, starts = spec(None, "data", "heads", dealt), spec(None, "data", dealt)
    paged: dict[str, Any] = {}
    if cache.page_table is not None:
        part = ("data",) if dealt is None else ("data", dealt)
        paged = {"page_table": starts, "page_readers": spec(None, part)}
        pages, starts = spec(None, part, "heads"), spec(None, part)
    return dataclasses.replace(
        cache,
        window_key=heads,
        window_value=heads,
        window_positions=rows,
        key_pages=pages,
        value_pages=pages,
        page_starts=starts,
        length=rows,
        packed=rows,
        kept=None if cache.kept is None else _kept_specs(cache.kept),
        **paged,
    )


def _kept_specs(kept: Kept) -> Any:
    spec: Any = PartitionSpec
    pages = spec() if kept.table is not None else spec(None, "data", "heads")
    return dataclasses.replace(
        kept,
        key=pages,
        value=pages,
        positions=pages,
        bias=None if kept.bias is None else pages,
        table=None if kept.table is None else spec(None, "data", "heads"),
        used=spec(),
        most=spec(None, "data"),
    )


def param_specs(rules: ShardingRules, params: Params) -> Params:
    """The `PartitionSpec` of every weight."""
    split = _SPLIT | (_SPLIT_MLP if rules.mlp else {})

    def of_run(layers: Layers) -> Layers:
        specs: dict[str, Any] = {}
        for field in dataclasses.fields(layers):
            axis = split.get(field.name)
            names = [] if axis is None else [*[None] * axis, "heads"]
            leaf = getattr(layers, field.name)
            specs[field.name] = None if leaf is None else PartitionSpec(*names)
        return Layers(**specs)

    nothing: Any = PartitionSpec()
    return Params(
        embed=nothing,
        runs=tuple(map(of_run, params.runs)),
        final_norm=nothing,
        head=None if params.head is None else nothing,
    )


def method_specs(method: Method, heads: int, stacked: bool) -> Any:
    """The `PartitionSpec` of every array of a method: those that differ by KV head, `[h, 1, ...]`,
    go with their heads."""
    lead = [None] if stacked else []

    def one(leaf):
        own = leaf.shape[len(lead) :]
        by_head = len(own) >= 2 and own[:2] == (heads, 1)
        return PartitionSpec(*lead, "heads") if by_head else PartitionSpec()

    return jax.tree.map(one, method)
