"""The only `pallas_call`: which compiler a kernel body goes to, always named explicitly."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plt

Backend = Literal["interpret", "triton", "tpu", "jax_triton"]


def call(
    body: Callable,
    *args: Any,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    backend: Backend,
    warps: int = 4,
    stages: int = 2,
) -> Any:
    """Runs `body(*refs of args, *refs of outputs)` on every point of the grid.

    References are to whole arrays (pointers, on a GPU): a body indexes them itself, so that a layer
    of a stack or a page of a pool is read where it lies.

    Args:
      args: pytrees of arrays. out_shape: a pytree of `jax.ShapeDtypeStruct`.
      backend: "interpret" runs the body as XLA operations on any device, for tests; "triton"
        compiles it for a GPU.
      warps, stages: of a Triton program.
    """
    if backend not in ("interpret", "triton"):
        raise ValueError(
            f"backend: got {backend!r}; expected 'interpret' or 'triton'; name one of them"
        )
    with warnings.catch_warnings():  # jax 0.11 announces that Pallas will drop Triton
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="jax")
        return pl.pallas_call(
            body,
            grid=grid,
            out_shape=out_shape,
            in_specs=jax.tree.map(lambda _: pl.BlockSpec(), args),
            out_specs=jax.tree.map(lambda _: pl.BlockSpec(), out_shape),
            compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=backend == "interpret",
            name=name,
        )(*args)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one point of the grid sees of an array.

    Attributes:
      block: its size, None for a dimension that is indexed away; or None: all of it, as scalars.
      index: `(*point, scalars)` -> which block along each dimension. A point that sees the block of
        the point before it costs no copy.
    """

    block: tuple[int | None, ...] | None
    index: Callable | None = None


def call_tiles(
    body: Callable,
    scalars: Any,
    args: Any,
    tiles: Any,
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    out_tiles: Any,
    scratch: Any,
    interpret: bool = False,
) -> Any:
    """Runs `body(scalars, args, outputs, scratch)`, pytrees of references to tiles, on a TPU.

    The points of the grid's last axis are visited in order, with scratch kept between them.

    Args:
      scalars: pytree of integers, fetched before the rest: tiles may be picked by them.
      args, out_shape: pytrees of arrays and of `jax.ShapeDtypeStruct`; `tiles` and `out_tiles` have
        a `Tile` for each.
      scratch: pytree of `jax.ShapeDtypeStruct`, float32 in vector memory.
      interpret: run as XLA operations on any device, for tests.
    """
    shapes = (scalars, args, out_shape, scratch)
    structures = [jax.tree.structure(x) for x in shapes]
    counts = [len(jax.tree.leaves(x)) for x in shapes]

    def spec(tile: Tile) -> pl.BlockSpec:
        if tile.block is None:
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        return pl.BlockSpec(tile.block, lambda *at: picked(tile, at))

    def picked(tile: Tile, at):
        assert tile.index is not None
        point, numbers = at[: len(grid)], at[len(grid) :]
        return tile.index(*point, jax.tree.unflatten(structures[0], numbers))

    order: list[Any] = ["parallel"] * (len(grid) - 1) + ["arbitrary"]

    def flat_body(*refs):
        trees = []
        for structure, count in zip(structures, counts, strict=True):
            trees.append(jax.tree.unflatten(structure, refs[:count]))
            refs = refs[count:]
        body(*trees)

    out = pl.pallas_call(
        flat_body,
        out_shape=jax.tree.leaves(out_shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=counts[0],
            grid=grid,
            in_specs=[spec(tile) for tile in jax.tree.leaves(tiles)],
            out_specs=[spec(tile) for tile in jax.tree.leaves(out_tiles)],
            scratch_shapes=[pltpu.VMEM(x.shape, jnp.float32) for x in jax.tree.leaves(scratch)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=order),
        interpret=interpret,
        name=name,
    )(*jax.tree.leaves(scalars), *jax.tree.leaves(args))
    return jax.tree.unflatten(structures[2], out)
