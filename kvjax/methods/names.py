"""Methods by the names that the command line and tables use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax

from kvjax.core.errors import InputError, known
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.core.rng import fold
from kvjax.methods.hadamard_int import hadamard_int
from kvjax.methods.kivi import kivi
from kvjax.methods.naive import bf16, integer
from kvjax.methods.qjl import qjl
from kvjax.methods.turboquant import turboquant

Recipe = Callable[[int, jax.Array], Method]  # (head_dim, rng) -> Method


def _fixed(method: Method) -> Recipe:
    return lambda d, rng: method


def _hadamard(bits: int) -> Recipe:
    return lambda d, rng: hadamard_int(bits, d, rng=rng)


def _turbo(bits: float, residual: Literal["qjl"] | None = None) -> Recipe:
    return lambda d, rng: turboquant(bits, d, rng=rng, residual=residual)


RECIPES: dict[str, Recipe] = {
    "bf16": _fixed(bf16()),
    **{f"int{b}": _fixed(integer(b)) for b in (8, 4, 3, 2)},
    **{f"hadamard-int{b}": _hadamard(b) for b in (8, 4, 3, 2)},
    **{f"kivi-{b}": _fixed(kivi(b)) for b in (4, 2)},
    **{f"turboquant-{b:g}": _turbo(b) for b in (1, 2, 2.5, 3, 3.5, 4)},
    **{f"turboquant-prod-{b}": _turbo(b, residual="qjl") for b in (1, 2, 3, 4)},
    "qjl": lambda d, rng: qjl(d, rng=rng),
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
