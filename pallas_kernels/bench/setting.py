"""What all parts of a run share."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

from pallas_kernels._call import Backend
from pallas_kernels.bench.results import Row


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a part is to be measured.

    Attributes:
      backend: of the kernels.
      rounds: in which all programs of a comparison take turns.
      seconds: that a call of a program should last, by looping.
      bandwidth: bytes per second, roughly, to size loops before anything is known.
      tiny: small shapes, to see that all of it runs: not a measurement.
      tune: whether the best of a sweep is written down.
      stamp: of this run.
    """

    backend: Backend
    rounds: int
    seconds: float
    bandwidth: float
    tiny: bool
    tune: bool
    stamp: Row


class Part(Protocol):
    """One kind of measurement: a module with these two functions."""

    def units(self, tiny: bool) -> list[str]:
        """The ids of all its rows."""

    def measure(self, wanted: Sequence[str], setting: Setting) -> Iterator[list[Row]]:
        """Rows with these ids, group by group, and those that they are compared with."""


def matching(names: Sequence[str], pattern: str | None) -> list[str]:
    """The names that hold the pattern, `*` and `?` being wild.

    Example:
      >>> matching(["a/b1/t32", "a/b32/t8"], "b1*t32")
      ['a/b1/t32']
    """
    return [n for n in names if pattern is None or fnmatch.fnmatchcase(n, f"*{pattern}*")]


class Room:
    """Memory of the device, as far as this process may have it; without a limit on a CPU."""

    SHARE = 0.9  # the rest is for what programs need besides their inputs

    def __init__(self) -> None:
        stats = jax.devices()[0].memory_stats() or {}
        limit = stats.get("bytes_limit") if jax.default_backend() != "cpu" else None
        self.free = None if limit is None else self.SHARE * limit - stats.get("bytes_in_use", 0)

    def take(self, size: int) -> str | None:
        """Reserves so many bytes, or says why not."""
        if self.free is None:
            return None
        if size > self.free:
            return f"needs {size / 1e9:.1f} GB, {max(self.free, 0) / 1e9:.1f} GB are left"
        self.free -= size
        return None


def attempt(work: Callable, *args: Any) -> Any:
    """What the work gives, or in one line what kept it from it: told in the table, not hidden."""
    try:
        return work(*args)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:160]}"
