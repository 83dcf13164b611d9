"""Memory while a history is read, in live buffers: that of a budget and a block, at any length."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import kvjax
from kvjax import Layout
from kvjax.generate import make_plan, start, step
from kvjax.generate.evict import Keep, feed, start_working
from kvjax.models.load import load
from kvjax.policies import H2O, Eviction, KeyNorm

TINY = Path(__file__).parents[1] / "models" / "tiny"
LAYOUT = Layout(sink=4, recent=16, page=16)


@pytest.fixture(scope="module")
def model():
    found = load(TINY / "llama")
    return dataclasses.replace(
        found, config=dataclasses.replace(found.config, max_positions=1 << 17)
    )


def peak_of(model, length, eviction):
    """Most bytes alive after any block, and what the compiled step takes beside its arguments."""
    method = kvjax.methods.get("turboquant-2", head_dim=model.config.head_dim, layout=LAYOUT)
    plan = make_plan(model.config, method)
    tokens = np.random.default_rng(0).integers(3, 90, (1, length), dtype=np.int32)
    before = sum(a.nbytes for a in jax.live_arrays())
    caches = start_working(plan, eviction, batch=1)
    count, most = np.array([eviction.block], np.int32), 0
    for first in range(0, length, eviction.block):
        block = tokens[:, first : first + eviction.block]
        _, caches, _ = feed(plan, model.params, eviction, caches, block, count)
        most = max(most, sum(a.nbytes for a in jax.live_arrays()) - before)
    memory = feed.lower(plan, model.params, eviction, caches, block, count).compile()
    assert int(caches[0].length[0, 0]) == length
    return most, memory.memory_analysis().temp_size_in_bytes


def test_the_peak_does_not_grow_with_the_history(model):
    """8K against 64K tokens at a budget of 128 and blocks of 256."""
    eviction = Eviction(KeyNorm(), budget=128, block=256)
    (short, temp), (long, again) = (peak_of(model, n, eviction) for n in (8192, 65536))
    assert long <= 1.05 * short
    assert temp == again
    config = model.config
    exact = config.layers * config.kv_heads * 384 * config.head_dim * 2 * 2  # K and V, bf16
    assert short < 1.6 * exact  # positions, mass, scores; head_dim is 16 here


def test_decoding_after_eviction_compiles_once(model):
    method = kvjax.methods.get("turboquant-2", head_dim=model.config.head_dim, layout=LAYOUT)
    plan = make_plan(model.config, method)
    keep = Keep(Eviction(H2O(), budget=64, block=64))
    step.clear_cache()
    for length in (70, 200):
        prompt = [3 + i % 80 for i in range(length)]
        state = start(plan, model.params, [prompt], max_new=40, keep=keep)
        for _ in range(30):
            state = step(plan, model.params, state)
    assert step._cache_size() == 1
