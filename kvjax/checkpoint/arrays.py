"""Named arrays in one orbax checkpoint: every process writes and reads its parts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from kvjax.core.errors import InputError


def own(name: str, array: Any) -> Any:
    """An array that nothing else changes or frees, as orbax takes it.

    On a CPU it is copied; from an accelerator orbax copies it to the host before its call returns.

    Raises:
      InputError: a shape without numbers, or a dtype that tensorstore does not know.
    """
    import tensorstore

    real = isinstance(array, jax.Array | np.ndarray | np.generic)
    if not real or isinstance(array, jax.core.Tracer):
        raise InputError(
            f"state, {name}",
            got=type(array).__name__,
            expected="an array that has its numbers",
            fix="save outside jit, and what a function gives rather than its shape",
        )
    try:
        tensorstore.dtype(array.dtype)
    except (TypeError, ValueError):
        raise InputError(
            f"state, {name}",
            got=array.dtype,
            expected="a dtype that tensorstore keeps",
            fix="pack it into uint8",
        ) from None
    if not isinstance(array, jax.Array):
        return np.array(array)
    if jax.process_count() > 1 and array.is_fully_addressable:  # the same in all: one writes it
        return np.array(array)
    on_cpu = next(iter(array.devices())).platform == "cpu"
    return array.copy() if on_cpu else array


class Writer:
    """Writes in the background, one checkpoint at a time."""

    def __init__(self) -> None:
        import orbax.checkpoint as ocp  # here: it takes seconds to import

        self._save_args = ocp.args.PyTreeSave
        # Packed codes do not get smaller, and trying takes two to eight times as long as writing.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        self._checkpointer = ocp.AsyncCheckpointer(handler)
        self._barrier = ocp.multihost.get_barrier_sync_fn()

    def start(self, path: Path, arrays: Mapping[str, Any]) -> None:
        """Begins to write arrays that are our own (see `own`)."""
        self._checkpointer.save(path.absolute(), args=self._save_args(dict(arrays)))

    def finish(self) -> None:
        """Waits until all processes have written; raises what failed."""
        with quiet():
            self._checkpointer.wait_until_finished()

    def meet(self, name: str, seconds: int = 1200) -> None:
        """Waits for the other processes to come here; from any thread."""
        self._barrier(key=f"kvjax_{name}", timeout_ms=1000 * seconds)

    def close(self) -> None:
        self._checkpointer.close()


def read(path: Path, wanted: Mapping[str, Sharding | None]) -> dict[str, Any]:
    """Arrays by name: with a sharding as `jax.Array`s placed so, else as numpy's."""
    import orbax.checkpoint as ocp

    def one(sharding: Sharding | None) -> Any:
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=sharding)

    if not wanted:
        return {}
    item = dict.fromkeys(wanted, 0)
    how = {name: one(sharding) for name, sharding in wanted.items()}
    with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(
            path.absolute(), args=ocp.args.PyTreeRestore(item, restore_args=how)
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Errors are raised, not also logged by orbax with the stacks of all its threads."""

    def ours(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    log = logging.getLogger("absl")
    log.addFilter(ours)
    try:
        yield
    finally:
        log.removeFilter(ours)
