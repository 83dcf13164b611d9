"""Debug checks of the numbers that kernels clamp: lengths, page ids, the layer.

A kernel never reads outside of its arrays: a length beyond the room counts as the room, a negative
one as 0, a page id as the nearest page of the pool. Such a number is a mistake all the same, and
under `jax.experimental.checkify.checkify` these checks say so; elsewhere they are nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from pallas_kernels._call import Backend

Array = jax.Array


def wanted(check: bool | None, backend: Backend) -> bool:
    """Whether a launch has checks: where None, if it is interpreted, or if `jax_enable_checks` is
    set when it is traced (they keep jax from its fastest way to call a compiled program)."""
    asked = bool(jax.config.jax_enable_checks) or backend == "interpret"  # type: ignore[attr-defined]
    return asked if check is None else check


def check_reads(
    name: str,
    lengths: Array,
    layer: Array | int,
    shape: tuple[int, ...],
    page: int,
    table: Array | None,
) -> None:
    """Flags a layer that is not there, lengths beyond the pages, and page ids outside of the pool
    in slots that hold tokens.

    Args:
      name: of the kernel. lengths: `[b]` or `[b, h]`.
      shape: of words, `[layers, b, h, n, ...]`, or `[layers, pool, h, ...]` with a table `[b, n]`.
      page: tokens of a page.
    """
    layer = jnp.asarray(layer).reshape(1)
    _check_range(f"{name}: got layer {{}}", layer, shape[0] - 1, "layer")
    slots = shape[3] if table is None else table.shape[1]
    check_lengths(name, lengths, slots * page)
    if table is not None:
        longest = lengths if lengths.ndim == 1 else lengths.max(1)
        held = jnp.arange(slots) * page < longest[:, None]
        ids = jnp.where(held, table, 0)
        _check_range(f"{name}: got page {{}} in sequence {{}}", ids, shape[1] - 1, "page table")


def check_lengths(name: str, lengths: Array, most: int) -> None:
    """Flags a length below 0 or above `most`.

    Example:
      >>> from jax.experimental.checkify import checkify
      >>> error, _ = checkify(check_lengths)("read", jnp.array([3, 9]), 8)
      >>> print(error.get().split(" (")[0])
      read: got length 9 in sequence 1; expected 0 to 8, clamped; correct the lengths
    """
    _check_range(f"{name}: got length {{}} in sequence {{}}", lengths, most, "lengths")


def _check_range(got: str, numbers: Array, most: int, what: str) -> None:
    if not numbers.size:
        return
    wrong = (numbers < 0) | (numbers > most)
    first = wrong.ravel().argmax()
    row = first // (numbers.size // numbers.shape[0])
    message = f"{got}; expected 0 to {most}, clamped; correct the {what}"
    checkify.debug_check(~wrong.any(), message, numbers.ravel()[first], row)
