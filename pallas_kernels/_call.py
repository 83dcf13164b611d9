"""The only `pallas_call`: which compiler a kernel body goes to, always named explicitly."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

Backend = Literal["interpret", "triton"]


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
