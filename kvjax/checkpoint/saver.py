"""Saving: arrays are taken at once, written in the background, and count once they are whole."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kvjax.checkpoint import folder as disk
from kvjax.checkpoint.arrays import Writer, own
from kvjax.checkpoint.record import ARRAYS, RECORD, Record, key_of, record_of, write_record
from kvjax.checkpoint.tree import leaves_of, words_of
from kvjax.core.errors import InputError


def save(
    folder: str | os.PathLike,
    state: Any,
    *,
    about: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Writes a state and returns once it counts; see `Saver`.

    Args:
      state: any pytree of arrays, `jax.random` keys and plain numbers: caches, a generation's
        `State`, methods.
      about: plain data kept with it, which `restore` can insist on.
    Returns:
      The folder within it that now counts.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from kvjax.checkpoint import restore, save
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     at = save(folder, {"read": jnp.arange(3), "steps": 7}, about={"model": "mine"})
      ...     state, about = restore(folder, {"read": jnp.zeros(3, jnp.int32), "steps": 0})
      >>> at.name, state, about
      ('000001', {'read': Array([0, 1, 2], dtype=int32), 'steps': 7}, {'model': 'mine'})
    """
    with Saver(folder, keep=keep) as saver:
        return saver.save(state, about=about)


class Saver:
    """Saves one state after the other into a folder, each in the background.

    A kill at any moment leaves the state saved before or the new one. Where there are several
    processes, each makes one for the same folder, which all of them see, and all call `save`
    together; each writes its parts, and process 0 commits once all have.

    Args:
      folder: made if need be; nobody else saves into it until `close`.
      keep: how many of the newest states stay.
    Raises:
      InputError: a folder that cannot be written, or that another process saves into.

    Example:
      >>> with Saver("state") as saver:  # doctest: +SKIP
      ...     for n in range(64):
      ...         state = step(plan, params, state)
      ...         saver.save(state, about={"model": name, "steps": n})
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2):
        if keep < 1:
            raise InputError("keep", got=keep, expected="1 state or more", fix="2 is the default")
        self.folder, self.keep = Path(folder).expanduser(), keep
        self._own = contextlib.ExitStack()
        self._first = jax.process_index() == 0
        if self._first:
            self._own.enter_context(disk.alone(self.folder, "run"))
        self._writer: Writer | None = None
        self._thread = ThreadPoolExecutor(1, "kvjax-saver")
        self._pending: Future[None] | None = None
        atexit.register(self._tell)

    def save(self, state: Any, *, about: Mapping[str, Any] | None = None) -> Path:
        """Takes the state, which may then be donated or changed, and begins to write it.

        Waits first for the save before it.

        Returns:
          The folder that will count.
        Raises:
          InputError: a leaf that cannot be kept, a folder that does not take it; also what went
            wrong in the save before.
        """
        self.wait()
        record = record_of(state, about or {})
        arrays = {
            key_of(n): own(leaf.name, words_of(value))
            for n, (leaf, value) in enumerate(leaves_of(state))
            if leaf.stored
        }
        new = self._new_folder()
        try:
            if self._writer is None:
                self._writer = Writer()
            if arrays:
                self._writer.start(new / ARRAYS, arrays)
        except Exception as error:  # whatever orbax makes of a place that it cannot write
            self._discard(new)
            raise disk.not_taken(f"checkpoint in {self.folder}", error) from error
        self._pending = self._thread.submit(self._finish, self._writer, new, record)
        return new

    def wait(self) -> None:
        """Returns once all that was saved counts.

        Raises:
          InputError: what went wrong since the last call.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, and lets others save into the folder."""
        try:
            self.wait()
        finally:
            atexit.unregister(self._tell)
            self._thread.shutdown()
            if self._writer is not None:
                self._writer.close()
            self._writer = None
            self._own.close()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except InputError as failed:
            if error is None:
                raise
            error.add_note(f"and the state was not saved: {failed}")

    def _new_folder(self) -> Path:
        """The next one, made by process 0, the same in all."""
        number, why = 0, None
        if self._first:
            try:
                number = int(disk.new_folder(self.folder).name)
            except OSError as error:
                why = error
        if jax.process_count() > 1:
            number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
        if not number:
            told = why or "process 0 could not write it"
            raise disk.not_taken(f"checkpoint in {self.folder}", told) from why
        return self.folder / f"{number:06d}"

    def _finish(self, writer: Writer, new: Path, record: Record) -> None:
        """In the background: waits for the arrays and commits."""
        what = f"checkpoint in {self.folder}"
        try:
            writer.finish()
            if self._first:
                self._commit(new, record)
        except Exception as error:  # whatever orbax and what is under it make of a full disk
            self._discard(new)
            raise disk.not_taken(what, error) from error
        finally:
            writer.meet(f"{self.folder.name}_{new.name}")
        if not self._first and not disk.counts(new):
            raise disk.not_taken(what, "process 0 could not commit it")

    def _commit(self, new: Path, record: Record) -> None:
        digest = write_record(new, record)
        found = [(new, digest), *disk.current(self.folder)][: self.keep]
        disk.commit(self.folder, found)
        disk.tidy(self.folder, [at for at, _ in found], _ours)

    def _discard(self, new: Path) -> None:
        if self._first and not disk.counts(new):
            shutil.rmtree(new, ignore_errors=True)

    def _tell(self) -> None:
        """At an exit without `close`: a save that failed is told."""
        try:
            self.wait()
        except Exception as error:
            print(f"kvjax: {error}", file=sys.stderr)


def _ours(path: Path) -> bool:
    """Whether a file or folder in a numbered folder is one that a `Saver` makes."""
    return path.name == RECORD or path.name.startswith(ARRAYS)
