"""Arrays and facts about them as one safetensors file, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from kvjax.core.errors import InputError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes the folder of `path`; what cannot be written inside is an `InputError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(
            str(path),
            got=error.strerror or str(error),
            expected="a folder to write",
            fix="choose another",
        ) from error


def write_tensors(path: Path, tensors: dict[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Replaces the file at `path`; the same arrays and facts give the same bytes."""
    partial = path.with_suffix(".partial")
    # One key: the order of several would differ from run to run.
    save_file(tensors, partial, {"kvjax": json.dumps(facts, sort_keys=True)})
    os.replace(partial, path)
