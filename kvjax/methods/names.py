"""Methods by the names that the command line and tables use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from kvjax.core.errors import InputError, known
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.core.rng import fold
from kvjax.methods.e8 import e8
from kvjax.methods.eden import eden
from kvjax.methods.floats import fp8, mxfp4, nvfp4
from kvjax.methods.gear import gear, gear_coded
from kvjax.methods.hadamard_int import hadamard_int
from kvjax.methods.kivi import kivi
from kvjax.methods.naive import bf16, integer
from kvjax.methods.oscar_canalized import oscar_canalized
from kvjax.methods.polarquant import polarquant, polarquant_pairs
from kvjax.methods.qjl import qjl
from kvjax.methods.quarot import quarot
from kvjax.methods.rabitq import rabitq
from kvjax.methods.released import (
    VLLM_PRESETS,
    turboquant_kv_released,
    turboquant_prod_released,
    vllm_turboquant,
)
from kvjax.methods.trellis import trellis
from kvjax.methods.turboquant import turboquant

Recipe = Callable[[int, jax.Array], Method]  # (head_dim, rng) -> Method


def _fixed(method: Method) -> Recipe:
    return lambda d, rng: method


def _each(
    name: str, recipe: Callable[..., Method], bits: tuple[float, ...], **options
) -> dict[str, Recipe]:
    """`recipe(bits, head_dim, rng=..., **options)` for each width, as `name` with the width."""

    def at(width: float) -> Recipe:
        return lambda d, rng: recipe(width, d, rng=rng, **options)

    return {f"{name}{width:g}": at(width) for width in bits}


def _canalized(bits: int) -> Recipe:
    return lambda d, rng: oscar_canalized(bits, d)


def _vllm(preset: str) -> Recipe:
    return lambda d, rng: vllm_turboquant(preset, d)


RECIPES: dict[str, Recipe] = {
    "bf16": _fixed(bf16()),
    **{f"int{b}": _fixed(integer(b)) for b in (8, 4, 3, 2)},
    **_each("hadamard-int", hadamard_int, (8, 4, 3, 2)),
    **{f"kivi-{b}": _fixed(kivi(b)) for b in (4, 2)},
    **_each("gear-", gear, (4, 2)),
    **_each("gear-l-", gear, (4, 2), outliers=0),
    **_each("gear-l4-", gear_coded, (4, 2)),
    **{f"oscar-canalized-{b}": _canalized(b) for b in (4, 2)},
    **_each("quarot-", quarot, (4,)),
    **_each("turboquant-", turboquant, (1, 2, 2.5, 3, 3.5, 4, 5)),
    **_each("turboquant-prod-", turboquant, (1, 2, 3, 4, 5), residual="qjl"),
    **_each("eden-", eden, (1, 2, 3, 4, 5)),
    **_each("eden-search-", eden, (2, 3, 4, 5), search=9),
    **_each("rabitq-", rabitq, (1, 2, 3, 4, 5)),
    **_each("e8-", e8, (2, 4)),
    **_each("trellis-", trellis, (1, 2, 3, 4, 5)),
    "qjl": lambda d, rng: qjl(d, rng=rng),
    "polarquant": lambda d, rng: polarquant(d, rng=rng),
    **{f"polarquant-pairs-{b}": _fixed(polarquant_pairs(b, b)) for b in (4, 3)},
    "fp8": _fixed(fp8()),
    "fp8-e5m2": _fixed(fp8("e5m2")),
    "nvfp4": _fixed(nvfp4()),
    "mxfp4": _fixed(mxfp4()),
    **_each("turboquant-prod-released-", turboquant_prod_released, (1, 2, 3, 4)),
    **_each("turboquant-kv-released-", turboquant_kv_released, (2.5, 3.5)),
    **{f"vllm-{name}": _vllm(name) for name in VLLM_PRESETS},
}


def get(name: str, head_dim: int, *, layout: Layout | None = None, seed: int = 0) -> Method:
    """The method called `name`, for vectors of `head_dim`.

    Args:
      name: one of `RECIPES`, or "KEYS/VALUES" to take keys from one and values from another.
      layout: windows and page; None is the default layout.
      seed: for rotations and sketches.
    Raises:
      InputError: an unknown name (lists the known ones), or a head_dim or page that does not fit.

    Example:
      >>> get("kivi-2/turboquant-3", head_dim=64).name
      'kivi-2/turboquant-3'
    """
    layout = layout or Layout()
    rng = fold(jax.random.key(seed), "methods")
    key, value = (recipe(head_dim, rng) for recipe in recipes(name))
    method = dataclasses.replace(key, value=value.value, layout=layout, name=name)
    method.check(head_dim)
    return method


def recipes(name: str) -> tuple[Recipe, Recipe]:
    """The recipes of "METHOD" or "KEYS/VALUES", for keys and for values.

    Raises:
      InputError: an unknown name; lists the known ones.
    """
    keys, _, values = name.partition("/")
    return _lookup(keys), _lookup(values or keys)


def _lookup(name: str) -> Recipe:
    if name not in RECIPES:
        raise InputError(
            "method",
            got=repr(name),
            expected=known(RECIPES),
            fix="use one of these names, or KEYS/VALUES to mix two",
        )
    return RECIPES[name]
