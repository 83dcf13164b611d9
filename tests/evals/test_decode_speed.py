"""What speeds are measured on: random caches are caches, and wrong numbers are seen."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.core.errors import InputError
from kvjax.evals import attend_error as attend_error_module
from kvjax.evals import step_speed
from kvjax.evals.attend_error import attend_error, filled
from kvjax.evals.random_cache import random_cache
from kvjax.models.config import known_configs
from pallas_kernels.bench.command import main
from pallas_kernels.bench.setting import Setting

HEADS = (2, 2, 16)


@pytest.fixture(scope="module")
def method():
    return kvjax.methods.get("int4", head_dim=16)


def test_a_random_cache_is_what_appending_leaves(method):
    """The same shapes, and the same numbers wherever these do not depend on the tokens."""
    empty = kvjax.init(method, capacity=400, kv_heads=2, head_dim=16)
    kv = jnp.zeros((1, 300, 2, 16))
    grown = jax.jit(lambda c: kvjax.prefill(method, c, kv, kv, block=100)[1])(empty)
    made = random_cache(method, empty, 300, rng=jax.random.key(0))
    shapes = lambda c: jax.tree.map(lambda a: (a.shape, str(a.dtype)), c)
    assert shapes(made) == shapes(grown)
    for field in ("window_positions", "page_starts", "length", "packed"):
        np.testing.assert_array_equal(getattr(made, field), getattr(grown, field))


def test_pages_are_not_all_alike(method):
    cache = filled(method, 2000, HEADS)
    words = np.asarray(cache.key_pages.words[0])  # [1, 1, h, n, ...]
    pages = {w.tobytes() for w in words.reshape(-1, *words.shape[4:])}
    assert len(pages) > 20
    assert not np.array_equal(words[0, 0, 0], words[0, 0, 1])


def test_attention_is_right_and_a_wrong_one_is_seen(method, monkeypatch):
    assert attend_error(method, HEADS, 300) < 1e-5
    right = attend_error_module.filled(method, 300, HEADS)
    # What attends reads other codes than what is decoded: the check must not pass.
    flipped = jax.tree.map(lambda a: a[:, :, ::-1], right.value_pages)
    wrong = dataclasses.replace(right, value_pages=flipped)
    attend = kvjax.attend
    monkeypatch.setattr(kvjax, "attend", lambda method, cache, q: attend(method, wrong, q))
    assert attend_error(method, HEADS, 300) > 0.05


@pytest.mark.parametrize("length", [0, 500])
def test_lengths_beyond_the_capacity_are_refused(method, length):
    empty = jax.eval_shape(lambda: kvjax.init(method, capacity=400, kv_heads=2, head_dim=16))
    with pytest.raises(InputError, match=f"got {length} tokens for a capacity of 400"):
        random_cache(method, empty, length, rng=jax.random.key(0))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of a tiny run of everything that goes through kvjax."""
    out = tmp_path_factory.mktemp("speed") / "rows.json"
    words = ["--tiny", "--out", str(out)]
    assert main([*words, "--device", "cpu"]) == 0
    assert main([*words, "--device", "gpu", "--part", "encode,step"]) == 0
    return {row["id"]: row for row in json.loads(out.read_text())["rows"]}


def test_the_page_scan_is_told_beside_dense_attention(rows):
    dense, packed = (rows[f"page-scan/t300/{name}"] for name in ("dense-bf16", "hadamard-int2"))
    assert dense["of dense"] == 1
    assert packed["of dense"] == pytest.approx(packed["ms"] / dense["ms"])
    assert packed["error"] < 1e-4


def test_steps_are_tokens_per_second_of_whole_models(rows):
    base, packed = (rows[f"step/t150/{name}"] for name in ("bf16", "int4"))
    assert packed["tokens/s"] == pytest.approx(1e3 / packed["ms"])
    assert packed["x_bf16"] == pytest.approx(packed["tokens/s"] / base["tokens/s"])
    assert packed["attention"] == "page scan"
    assert packed["GB"] < base["GB"]


def test_the_largest_batch_fits_the_budget_and_one_more_does_not(rows):
    setting = Setting("interpret", 2, 0.0, 1.0, tiny=True, tune=False, stamp={})
    scale = step_speed._scale(tiny=True)
    batch = rows["batch/t150/int4"]["batch"]
    size = lambda b: step_speed.Setup.make(scale, "int4", b, 150, setting).bytes
    assert size(batch) <= scale.budget < size(batch + 1)
    assert rows["batch/t150/int4"]["GB"] == pytest.approx(size(batch) / 1e9)


def test_encoding_is_told_per_token(rows):
    codec, kernel = (rows[f"encode/pages1/{name}"] for name in ("int4", "kernel-int4"))
    assert codec["us/token"] == pytest.approx(codec["us"] / 64)
    assert kernel["us"] > 0


def test_what_a_whole_model_takes_is_what_its_maker_says():
    """The step part really is Llama 3.1 8B: 8.03e9 weights, 32 layers, 131,072 bytes a token."""
    config = step_speed._scale(tiny=False).config
    assert config.weight_count() == pytest.approx(8.03e9, rel=1e-3)
    assert config.kv_bytes_per_token() == known_configs()["llama-3.1-8b"].kv_bytes_per_token()
    assert config.layers == 32
