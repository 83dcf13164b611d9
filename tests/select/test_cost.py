"""Costs per token, against counts by hand and GLM-5.2's published ones."""

from __future__ import annotations

import dataclasses

import pytest

from kvjax.core.errors import InputError
from kvjax.models.config import known_configs
from kvjax.models.layer_map import pairs
from kvjax.select import cost, glm_5_2, periodic_pattern, sizes_of
from kvjax.select.index_cache import index_bytes

MILLION = 2**20


def test_a_small_model_by_hand():
    sizes = sizes_of(known_configs()["smollm2-135m"], index_heads=4, index_width=32)
    # q . k and p . v: 9 heads x 64 channels, a multiplication and an addition each.
    assert cost(sizes, 4096).attention == 30 * 4096 * 9 * 64 * 2 * 2
    assert cost(sizes, 4096).kept == 30 * 2 * 3 * 64 * 2  # bf16 keys and values
    sparse = cost(sizes, 4096, k=256, pattern="DD" + "FS" * 14)
    assert sparse.attention == (2 * 4096 + 28 * 256) * 9 * 64 * 4
    scores = 4096 * 4 * (2 * 32 + 3)
    weights = 2 * 576 * (4 * 32 + 32 + 4)
    assert sparse.indexer == 14 * (scores + weights)
    assert sparse.read == (2 * 4096 + 28 * 256) * 768 + 14 * 4096 * 34
    assert cost(sizes, 100, k=256).attention == cost(sizes, 100).attention  # no more than there are


def test_local_layers_are_left_out():
    assert sizes_of(known_configs()["gemma-3-270m"], index_heads=4, index_width=32).layers == 3


def test_glm_5_2_shares_its_indexers():
    """Published: 2.9 times fewer FLOPs per token at 1M tokens than with an indexer in each layer."""
    pattern = periodic_pattern(78)
    assert pattern.count("F") == 21
    sizes = glm_5_2()
    every, shared = cost(sizes, MILLION, k=2048), cost(sizes, MILLION, k=2048, pattern=pattern)
    assert every.flops / shared.flops == pytest.approx(2.74, abs=0.01)
    # The weights that a token passes decide: 28e9 of them give 2.9, none at all 3.4.
    few = glm_5_2(weights=28e9)
    ratio = cost(few, MILLION, k=2048).flops / cost(few, MILLION, k=2048, pattern=pattern).flops
    assert ratio == pytest.approx(2.9, abs=0.01)
    assert cost(sizes, MILLION).attention / shared.attention == MILLION / 2048


def test_glm_5_2_keeps_less():
    """89.9 KB of latents per token, and 10.3 KB of index keys, of which sharing leaves 2.8."""
    assert 78 * 2 * (512 + 64) == 89_856
    assert index_bytes(78, 128, scale_bytes=4) == 10_296
    assert index_bytes(21, 128, scale_bytes=4) == 2_772
    kept = [cost(glm_5_2(), 1, k=2048, pattern=p).kept for p in (None, periodic_pattern(78))]
    assert kept == [89_856 + 10_296, 89_856 + 2_772]
    assert 1 - kept[1] / kept[0] == pytest.approx(0.075, abs=0.001)


def test_a_pattern_of_another_model_is_refused():
    with pytest.raises(InputError, match="pattern"):
        cost(glm_5_2(), 10, k=2, pattern="FS")


def test_sizes_that_cannot_be_are_refused():
    for context, k in ((0, None), (8, 0)):
        with pytest.raises(InputError, match="1 or more tokens"):
            cost(glm_5_2(), context, k=k)
    plain = known_configs()["smollm2-135m"]
    shared = dataclasses.replace(plain, layer_map=pairs(plain.layers))
    with pytest.raises(InputError, match="borrow keys and values"):
        sizes_of(shared, index_heads=4, index_width=32)
