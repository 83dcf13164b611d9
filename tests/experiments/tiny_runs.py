"""Experiments for their tests: their modules by name, and their tiny variants from a command line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load(path: Path, name: str) -> ModuleType:
    """A file as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and other modules look it up
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def modules(*names: str) -> Iterator[list[ModuleType]]:
    """Files of `experiments/`, each after those that it imports; forgotten in the end."""
    try:
        yield [load(ROOT / "experiments" / f"{name}.py", name) for name in names]
    finally:
        for name in names:
            sys.modules.pop(name, None)


def tiny_config(name: str):
    """The tiny variant of a config."""
    found = load(ROOT / "configs" / f"{name}.py", f"{name}_config").get_config("tiny")
    del sys.modules[f"{name}_config"]
    return found


def run(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    """An experiment's tiny variant, as a user runs it, into a folder."""
    return subprocess.run(
        [
            *(sys.executable, f"experiments/{name}.py", f"--config=configs/{name}.py:tiny"),
            *(f"--config.out={folder}", *options),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # as in tests: they share their programs
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def lines(path: Path) -> list[dict]:
    """What a metrics.jsonl has."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a whole PNG."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
