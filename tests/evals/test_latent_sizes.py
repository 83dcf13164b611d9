"""A model with latent attention in what counts, names and calibrates: its latent is there once."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

import kvjax
from kvjax.calibrate.moments import measure_moments
from kvjax.calibrate.names import get_for_model
from kvjax.core.errors import InputError
from kvjax.evals.compare import sizes
from kvjax.evals.memory import footprint, plain_bytes
from kvjax.generate.evict import start_working
from kvjax.generate.plan import make_plan
from kvjax.methods.describe import describe, method_bits
from kvjax.models.config import Latent, known_configs
from kvjax.policies import Eviction, Streaming

RANK, TURN, LAYERS = 64, 32, 3
CONFIG = dataclasses.replace(
    known_configs()["smollm2-135m"],
    name="latent",
    arch="mla",
    layers=LAYERS,
    windows=(),
    kv_heads=1,
    q_heads=4,
    head_dim=RANK + TURN,
    latent=Latent(rank=RANK, rotary_dim=TURN, nope_dim=32, value_dim=32),
)
LAYOUT = kvjax.Layout(sink=4, recent=64, page=64)


def test_bits_and_bytes_count_it_once():
    method = get_for_model("int4/int4", CONFIG, layout=LAYOUT)
    numbers = RANK + TURN
    page = (numbers * 4 + 2 * 2 * 16) / numbers + 32 / 64 / numbers  # codes, two grids, a position
    assert CONFIG.kv_bytes_per_token(2) == 2 * LAYERS * numbers
    assert plain_bytes(CONFIG, 1000) == 2000 * LAYERS * numbers
    found = footprint(CONFIG, method, context=4096)
    assert found.bits_per_value == pytest.approx(page)
    assert found.bytes_per_token == pytest.approx(LAYERS * numbers * page / 8)
    told = sizes(make_plan(CONFIG, method), 4096)
    assert told["bits_per_value"] == pytest.approx(page)
    assert told["bf16_bytes"] == plain_bytes(CONFIG, 4096)
    assert told["bits_per_value_total"] == pytest.approx(
        8 * told["cache_bytes"] / (LAYERS * numbers * 4096)
    )


def test_description_of_a_view():
    method = get_for_model("turboquant-2", CONFIG)
    assert method_bits(method, RANK + TURN)[1] == 0
    text = describe(method, RANK + TURN)
    assert "(values are 64 channels of the keys), head_dim 96" in text.splitlines()[0]
    assert "  values" not in text.splitlines()
    assert "no fused kernel on a GPU: values: a view of the keys" in text


def test_what_wants_keys_and_values_apart():
    for name in ("klt-2", "tuned:FILE", "lowrank:FILE"):
        with pytest.raises(InputError, match="expected a recipe for its latent"):
            get_for_model(name, CONFIG)
    with pytest.raises(InputError, match="method: got 'int4/int4'"):
        get_for_model("int4/int4/int4", CONFIG)
    with pytest.raises(InputError, match="values are a part of its keys"):
        measure_moments(None, CONFIG, [jnp.zeros(64, jnp.int32)])
    plan = make_plan(CONFIG, get_for_model("bf16", CONFIG))
    with pytest.raises(InputError, match="eviction: got latent"):
        start_working(plan, Eviction(Streaming(), 128), batch=1)
