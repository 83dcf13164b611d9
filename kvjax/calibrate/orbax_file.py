"""Named arrays and a JSON record as one orbax checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]

_NAMES = "arrays"  # which there are, in the record


def is_checkpoint(path: Path) -> bool:
    """Whether the folder `path` is a checkpoint, whole or damaged, and not one that holds some."""
    return path.suffix == ".orbax" or (path / "_CHECKPOINT_METADATA").exists()


def write(path: Path, arrays: Arrays, about: Mapping[str, Any]) -> None:
    """The items "moments" (arrays) and "about" (JSON) of a checkpoint at `path`.

    A checkpoint that is there is deleted before; one that is half written has another name, so what
    is at `path` is whole.

    Raises:
      OSError: a place that cannot be written.
    """
    import orbax.checkpoint as ocp  # here: it takes seconds to import

    items = ocp.args.Composite(
        moments=ocp.args.PyTreeSave(dict(arrays)),
        about=ocp.args.JsonSave({**about, _NAMES: sorted(arrays)}),
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), args=items, force=True)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write` wrote.

    Raises:
      ValueError: a damaged checkpoint, or one of something else.
    """
    import orbax.checkpoint as ocp

    def one(name: str) -> Any:
        return ocp.args.PyTreeRestore({name: 0}, partial_restore=True)

    arrays = {}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restore = lambda **items: checkpointer.restore(
                path.absolute(), args=ocp.args.Composite(**items)
            )
            about = dict(restore(about=ocp.args.JsonRestore())["about"])
            # One by one: where one of several fails, the others' threads print to stderr.
            for name in about.pop(_NAMES):
                arrays[name] = np.asarray(restore(moments=one(name))["moments"][name])
        return arrays, about
    except Exception as error:  # whatever orbax and what is under it make of damage
        raise ValueError(f"{type(error).__name__}, {error}") from error
