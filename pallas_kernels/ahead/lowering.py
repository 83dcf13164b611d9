"""Lowering for a GPU or a TPU on a host that has neither: what CI can check with no extra wheel.

Interpret mode takes shapes and operations that Triton and Mosaic do not, so that a kernel needs
both: the numbers interpreted, and this.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax

Platform = Literal["cuda", "tpu"]

DEVICES: dict[Platform, tuple[str, int | None, str]] = {
    "cuda": ("NVIDIA H200", None, "gpu"),
    "tpu": ("TPU v5 lite", 1, "tpu"),
}
TARGETS: dict[Platform, str] = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}


@contextlib.contextmanager
def lowering_for(platform: Platform):
    """Within it, jax knows which device is meant: Triton asks for its compute capability (since
    jax 0.11), Mosaic for its kind."""
    mesh = jax.sharding.AbstractMesh(
        (1,),
        ("device",),
        axis_types=(jax.sharding.AxisType.Auto,),
        abstract_device=jax.sharding.AbstractDevice(*DEVICES[platform]),
    )
    with jax.sharding.use_abstract_mesh(mesh), quiet():
        yield


@contextlib.contextmanager
def quiet():
    """Without the announcement that Pallas will drop Triton."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def lower(f: Callable, platform: Platform, *args: Any) -> str:
    """StableHLO of a function for a platform.

    Args:
      args: pytrees of arrays or of `jax.ShapeDtypeStruct`s.
    """
    with lowering_for(platform):
        return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def kernels(text: str, platform: Platform) -> int:
    """How many Pallas kernels a lowered program calls.

    Example:
      >>> kernels("%0 = stablehlo.custom_call @tpu_custom_call(%arg0)", "tpu")
      1
    """
    return len(re.findall(rf"custom_call @{re.escape(TARGETS[platform])}\(", text))
