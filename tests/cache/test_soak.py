"""A few hundred steps of `experiments/soak.py`: sequences come and go over a pool that is too small."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

import pytest

import kvjax

ROOT = Path(__file__).parents[2]


@functools.cache
def load(path: str):
    """A file as a module, once: absl takes the same flag of one module only."""
    name = path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def test_a_soak_that_makes_no_sense():
    config = load("configs/soak.py").get_config("tiny")
    soak = load("experiments/soak.py")
    config.active = 0.0
    with pytest.raises(kvjax.InputError, match=r"active: got 0\.0"):
        soak.run(config)
    config.active, config.tokens, config.check_every = 0.8, 5, 40
    with pytest.raises(kvjax.InputError, match="expected enough for a check after 80 steps"):
        soak.run(config)


@pytest.mark.parametrize("window", [0, 20])
def test_a_short_soak(window):
    config = load("configs/soak.py").get_config("tiny")
    config.window, config.pool = window, 13 if not window else 9
    sink, recent, page = config.layout
    layout, most = kvjax.Layout(sink=sink, recent=recent, page=page), config.capacity
    # Slots of a window are used in turn.
    assert (layout.page_slots(most, window or None) < layout.packed_pages(most)) == bool(window)
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
