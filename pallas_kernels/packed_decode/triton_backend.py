"""`packed_decode` by `jax_triton`: the same arguments, the same results, no Pallas in between.

Pallas is to drop Triton; this is the way to keep it. Both packages are imported at the first call:
nothing else needs them.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.packed_decode.config import Config
from pallas_kernels.packed_decode.read import Plan
from pallas_kernels.packed_decode.triton_form import ARRAYS, Form
from pallas_kernels.packed_decode.triton_tables import describe

Array = jax.Array

INSTALL = "pip install 'kvjax[gpu,triton]', or let something else read the codes"


def why_absent() -> str | None:
    """What of `jax_triton` and `triton` cannot be imported here, and why; or None."""
    for name in ("triton", "jax_triton"):
        try:
            importlib.import_module(name)
        except ImportError as error:  # jax_triton raises it as well where jax has no GPU plugin
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"no {name} ({said.split('. ')[0]})"
    return None


def why_not(arrays: list[Array]) -> str | None:
    """Why the source does not take this launch, or None."""
    if len(arrays) > ARRAYS:
        return (
            f"got {len(arrays)} arrays; expected {ARRAYS} or fewer; use fewer tiers, or larger "
            "groups of channels"
        )
    return None


def call(
    args: dict[str, Any],
    plan: Plan,
    out_shape: dict[str, Any],
    config: Config,
    *,
    empty: float,
    compute_capability: int | None = None,
) -> dict[str, Any]:
    """As `_call.call` of `kernel._body`.

    Args:
      args, out_shape: pytrees as `kernel.packed_decode` makes them.
      empty: a logit of nothing.
      compute_capability: of the GPU, as 90; None asks the first one here.
    Raises:
      ValueError: where `why_not` has a reason, or there is no jax_triton.
    """
    columns = out_shape["lse"].shape[-1]
    form, arrays = describe(args, plan, columns, empty)
    reason = why_not(arrays)
    if reason:
        raise ValueError(f"packed_decode as 'jax_triton': {reason}")
    lead = out_shape["lse"].shape[:-1]
    out = jax.ShapeDtypeStruct((*lead, form.out_rows, columns), jnp.float32)
    filled = arrays + [args["layer"]] * (ARRAYS - len(arrays))
    sums, lse = launch(form, filled, (out, out_shape["lse"]), config, compute_capability)
    pieces, row = [], 0
    for shape in jax.tree.leaves(out_shape["out"]):
        pieces.append(sums[..., row : row + shape.shape[-2], :])
        row += shape.shape[-2]
    return {"out": jax.tree.unflatten(jax.tree.structure(out_shape["out"]), pieces), "lse": lse}


def launch(
    form: Form,
    arrays: list[Array],
    out_shape: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
    config: Config,
    compute_capability: int | None = None,
) -> tuple[Array, Array]:
    """The kernel, on a GPU: sums `[b, h, splits, rows, columns]` and base-2 log-sum-exps."""
    absent = why_absent()
    if absent:
        said = f"got {absent}; expected triton and jax_triton; {INSTALL}"
        raise ValueError(f"packed_decode as 'jax_triton': {said}")
    import jax_triton

    from pallas_kernels.packed_decode.triton_source import packed_decode_kernel

    # jax_triton 0.4 calls what comes out by another name.
    known = inspect.signature(jax_triton.triton_call).parameters
    shapes: dict[str, Any] = {"out_type" if "out_type" in known else "out_shape": out_shape}
    return jax_triton.triton_call(
        *arrays,
        kernel=packed_decode_kernel,
        grid=out_shape[1].shape[:3],
        name="packed_decode",
        num_warps=config.warps,
        num_stages=config.stages,
        compute_capability=compute_capability,
        FORM=form,
        **shapes,
    )
