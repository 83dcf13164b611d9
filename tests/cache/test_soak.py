"""A few hundred steps of `experiments/soak.py`: sequences come and go over a pool that is too small."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load(path: str):
    name = path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@pytest.mark.parametrize("window", [0, 40])
def test_a_short_soak(window):
    config = load("configs/soak.py").get_config("tiny")
    config.window, config.pool = window, 13 if not window else 11
    notes = []
    found = load("experiments/soak.py").run(config, notes.append)
    assert found["broken"] == []
    assert found["tokens"] >= config.tokens
    assert found["most_pages_read"] == config.pool  # it was full,
    assert found["lost"] > 0  # and even too small,
    assert found["most_readers_of_a_page"] > 1  # though pages were shared
    assert min(found["resets"], found["forks"], found["checks"]) > 8
    assert set(found["programs"].values()) == {1}
    assert found["compiled_after_warm_up"] == 0
    assert found["live_bytes_at_the_end"] == found["live_bytes_after_warm_up"]
    assert len({row["live"] for row in notes}) == 1
