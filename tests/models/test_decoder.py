import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvjax.core.errors import InputError
from kvjax.models.causal import causal_attend, forward, keys_and_values
from kvjax.models.config import layer_runs
from kvjax.models.decoder import decode_layers, logits, regroup
from kvjax.models.load import load

from . import make_tiny
from .make_tiny import ARCHS, TINY

# Float32 against float32: 3 layers of 48 channels; measured 3e-6 at most.
ATOL = 1e-4


@pytest.fixture(scope="module", params=ARCHS)
def tiny(request):
    with np.load(TINY / request.param / "expected.npz") as data:
        return load(TINY / request.param, dtype="float32"), dict(data)


def test_logits_equal_transformers(tiny):
    model, expected = tiny
    got = forward(model.params, model.config, expected["ids"])
    np.testing.assert_allclose(got, expected["logits"], atol=ATOL)


@pytest.mark.parametrize("arch", ARCHS)
def test_logits_equal_transformers_live(arch, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    family, values = make_tiny.settings()[arch]
    theirs = make_tiny.build(family, values)
    theirs.save_pretrained(tmp_path)
    ours, ids = load(tmp_path, dtype="float32"), make_tiny.prompt()
    got = forward(ours.params, ours.config, ids)
    np.testing.assert_allclose(got, make_tiny.logits_of(theirs, ids), atol=ATOL)


def test_one_token_at_a_time_equals_all_at_once(tiny):
    """The interface carries a cache: an exact one, written by `attend` into the scan's carry."""
    model, expected = tiny
    config, ids = model.config, jnp.asarray(expected["ids"])
    b, t = ids.shape
    runs = layer_runs(config)

    def attend(run, layer, cache, q, k, v, extra):
        keys, values, at = cache
        keys = jax.lax.dynamic_update_slice(keys, k[None], (layer, 0, at, 0, 0))
        values = jax.lax.dynamic_update_slice(values, v[None], (layer, 0, at, 0, 0))
        distance = at - jnp.arange(t)
        window = runs[run].window or t
        seen = (distance >= 0) & (distance < window)
        scores = jnp.einsum("bshgd,bthd->bhgst", q, keys[layer])
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhgst,bthd->bshgd", weights, values[layer]), (keys, values, at)

    def empty(run):
        shape = (run.length, b, t, config.kv_heads, config.head_dim)
        return jnp.zeros(shape), jnp.zeros(shape)

    @jax.jit
    def step(params, caches, token, at):
        caches = tuple((k, v, at) for k, v in caches)
        positions = jnp.full((b, 1), at)
        hidden, caches, ok = decode_layers(params, config, token, positions, attend, caches)
        return logits(params, config, hidden), tuple((k, v) for k, v, _ in caches), ok

    caches, steps = tuple(empty(run) for run in runs), []
    for i in range(t):
        out, caches, ok = step(model.params, caches, ids[:, i : i + 1], i)
        assert bool(ok.all())
        steps.append(out)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), expected["logits"], atol=ATOL)
    assert step._cache_size() == 1


def test_regrouped_layers_compute_the_same(tiny):
    model, expected = tiny
    ids = jnp.asarray(expected["ids"])
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    runs = layer_runs(model.config, extra_keys=["a", "b", "b"])
    params = regroup(model.params, runs)
    seen = []

    def attend(run, layer, cache, q, k, v, extra):
        seen.append(run)
        out, _ = causal_attend(runs, positions)(run, layer, None, q, k, v, None)
        return out * extra["gain"], cache + extra["gain"]

    xs = tuple({"gain": jnp.ones(run.length)} for run in runs)
    caches = tuple(jnp.zeros(()) for _ in runs)
    hidden, caches, ok = decode_layers(
        params, model.config, ids, positions, attend, caches, runs=runs, xs=xs
    )
    np.testing.assert_allclose(logits(params, model.config, hidden), expected["logits"], atol=ATOL)
    assert [int(c) for c in caches] == [run.length for run in runs]
    assert ok.shape == (3, 2)
    back = regroup(params, layer_runs(model.config))
    jax.tree.map(np.testing.assert_array_equal, back, model.params)
    with pytest.raises(InputError, match=r"stacked as .* expected runs of .* regroup"):
        decode_layers(params, model.config, ids, positions, attend, (), runs=runs[:1])


def test_finite_names_the_layer(tiny):
    model, expected = tiny
    runs = layer_runs(model.config, extra_keys=range(3))
    params = regroup(model.params, runs)
    broken = params.runs[1].replace(wv=params.runs[1].wv.at[0, 0, 0].set(jnp.inf))
    params = params.replace(runs=(params.runs[0], broken, params.runs[2]))
    ids = jnp.asarray(expected["ids"])
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    attend = causal_attend(runs, positions)
    _, _, ok = decode_layers(params, model.config, ids, positions, attend, (None,) * 3, runs=runs)
    assert ok[0].tolist() == [True, True]
    assert ok[1].tolist() == [True, False]


def test_padding_and_query_blocks_do_not_matter(tiny, monkeypatch):
    model, expected = tiny
    ids = jnp.asarray(expected["ids"])
    short = forward(model.params, model.config, ids[:, :13])
    padded = forward(model.params, model.config, ids, lengths=jnp.array([13, 13]))
    np.testing.assert_allclose(padded[:, :13], short, atol=ATOL)
    monkeypatch.setattr("kvjax.models.causal._QUERY_BLOCK", 7)
    np.testing.assert_allclose(
        forward(model.params, model.config, ids), expected["logits"], atol=ATOL
    )


def test_a_query_that_sees_nothing_gives_zeros():
    runs = layer_runs(load(TINY / "llama").config)
    positions = jnp.zeros((1, 2), jnp.int32)
    attend = causal_attend(runs, positions, lengths=jnp.array([0]))
    q, k = jnp.ones((1, 2, 2, 2, 16)), jnp.ones((1, 2, 2, 16))
    out, _ = attend(0, 0, None, q, k, k, None)
    np.testing.assert_array_equal(out, 0)


def test_keys_and_values_cover_all_layers(tiny):
    model, expected = tiny
    hidden, keys, values = keys_and_values(model.params, model.config, expected["ids"])
    assert keys.shape == values.shape == (3, 2, 2, 24, 16)
    got = logits(model.params, model.config, hidden)
    np.testing.assert_allclose(got, expected["logits"], atol=ATOL)


def test_bfloat16_checkpoints_and_bfloat16_compute(tmp_path):
    folder = tmp_path / "bf16"
    shutil.copytree(TINY / "gemma3", folder)
    weights = load_file(folder / "model.safetensors")
    halves = {k: v.astype(ml_dtypes.bfloat16) for k, v in weights.items()}
    save_file(halves, folder / "model.safetensors")
    exact = load(folder, dtype="float32")
    assert exact.params.embed.dtype == jnp.float32
    np.testing.assert_array_equal(
        exact.params.embed, halves["model.embed_tokens.weight"].astype(np.float32)
    )
    ids = make_tiny.prompt()
    want = forward(exact.params, exact.config, ids)
    half = load(folder, dtype=jnp.bfloat16)
    assert half.params.runs[0].wq.dtype == jnp.bfloat16
    assert half.params.runs[0].attn_norm.dtype == jnp.float32
    got = forward(half.params, half.config, ids)
    assert got.dtype == jnp.float32
    # bfloat16 keeps 8 bits: a few percent of the logits' spread after 3 layers.
    assert float(jnp.std(got - want)) < 0.05 * float(jnp.std(want))


def test_extra_config_keys_are_harmless(tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(TINY / "llama", folder)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "novelty": 1}))
    assert load(folder).config.layers == 3
