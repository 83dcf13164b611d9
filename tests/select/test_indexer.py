"""The indexer against its formula in float64, its 8-bit cache, its training, and the model around."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.core.errors import InputError
from kvjax.core.pytree import same
from kvjax.models.causal import forward
from kvjax.models.config import layer_runs
from kvjax.models.decoder import logits
from kvjax.models.load import load
from kvjax.select import (
    Choice,
    IndexTraining,
    Observed,
    append_index,
    by_attention,
    by_index,
    index_keys,
    index_queries,
    index_scores,
    init_index,
    init_indexer,
    observe_windows,
    read_exactly,
    read_index,
    recall_matrix,
    restricted_pass,
    shared_targets,
    train_indexer,
    train_indexer_saving,
)
from kvjax.select.index_cache import index_bytes, pack_keys, unpack_keys

TINY = Path(__file__).parents[1] / "models" / "tiny"
D, H, W, T = 12, 3, 8, 40


def made(layers=2, seed=0, hadamard=True):
    """Indexers of some layers, with gains and biases that show."""
    indexer = init_indexer(
        D, layers=layers, heads=H, width=W, rotated=4, hadamard=hadamard, rng=jax.random.key(seed)
    )
    rng = np.random.default_rng(seed)
    gain, bias = rng.normal(1, 0.3, (layers, W)), rng.normal(0, 0.3, (layers, W))
    return dataclasses.replace(
        indexer, gain=jnp.asarray(gain, jnp.float32), bias=jnp.asarray(bias, jnp.float32)
    )


def one(indexer, layer):
    return jax.tree.map(lambda a: a[layer], indexer)


def turn(x, positions, frequencies):
    """RoPE on the pairs (i, i + r), position by position."""
    out, r = x.copy(), len(frequencies)
    for t, position in enumerate(positions):
        for i, frequency in enumerate(frequencies):
            c, s = np.cos(position * frequency), np.sin(position * frequency)
            out[t, ..., i] = x[t, ..., i] * c - x[t, ..., i + r] * s
            out[t, ..., i + r] = x[t, ..., i + r] * c + x[t, ..., i] * s
    return out


def formula(indexer, x, rows):
    """I[rows, s] in float64, without the Hadamard transform, which changes nothing."""
    wq, wk, ww, gain, bias, frequencies = (
        np.asarray(a, np.float64)
        for a in (
            *(indexer.wq, indexer.wk, indexer.ww),
            *(indexer.gain, indexer.bias, indexer.frequencies),
        )
    )
    k = x @ wk
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
    k = turn(k * gain + bias, range(len(x)), frequencies)
    q = turn((x[rows] @ wq).reshape(len(rows), H, W), rows, frequencies)
    w = x[rows] @ ww / np.sqrt(H * W)
    scores = np.zeros((len(rows), len(x)))
    for i in range(len(rows)):
        for j in range(H):
            scores[i] += w[i, j] * np.maximum(k @ q[i, j], 0)
    return scores


@pytest.mark.parametrize("hadamard", [True, False])
def test_scores_are_those_of_the_formula(hadamard):
    indexer = one(made(hadamard=hadamard), 1)
    x = np.random.default_rng(1).normal(size=(T, D)).astype(np.float32)
    rows = np.array([0, 7, 39])
    keys = index_keys(indexer, jnp.asarray(x), jnp.arange(T))
    got = index_scores(*index_queries(indexer, jnp.asarray(x)[rows], jnp.asarray(rows)), keys)
    np.testing.assert_allclose(got, formula(indexer, x.astype(np.float64), rows), atol=2e-5)


def test_index_keys_in_8_bits():
    rng = np.random.default_rng(2)
    keys = rng.normal(size=(3, W)).astype(np.float32) * [[1.0], [1e-3], [0.0]]
    codes, scale = pack_keys(jnp.asarray(keys))
    back = np.asarray(unpack_keys(codes, scale), np.float64)
    step = np.asarray(scale, np.float64)[:, None]
    # Half a step, and half a unit of the scale's 11 bits at code 127.
    assert (np.abs(back - keys) <= step * (0.5 + 127 * 2**-11) + 1e-12).all()
    assert (codes[2] == 0).all()

    cache = init_index(layers=2, batch=3, capacity=5, width=W)
    assert sum(a.nbytes for a in jax.tree.leaves(cache)) == 3 * 5 * index_bytes(2, W)
    positions = jnp.array([4, 0, 5])  # the last one does not fit
    keys_of = jnp.asarray(keys)[:, None]
    cache = jax.jit(append_index)(cache, keys_of, positions[:, None], layer=1)
    got = np.asarray(read_index(cache, layer=1))
    np.testing.assert_array_equal(got[0, 4], back[0])
    np.testing.assert_array_equal(got[1, 0], back[1])
    assert (got[2] == 0).all()
    assert (np.asarray(cache.codes[0]) == 0).all()


def teacher(seed=3, layers=2, rows=24):
    """A window whose attention is the softmax of another indexer's scores."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(layers, T, D))
    at = np.sort(rng.choice(np.arange(8, T), rows, replace=False))
    sharp = made(layers, seed=100)
    mass = np.zeros((layers, rows, T))
    for l in range(layers):
        scores = np.where(np.arange(T) <= at[:, None], 6 * formula(one(sharp, l), x[l], at), -1e9)
        mass[l] = np.exp(scores - scores.max(-1, keepdims=True))
    mass /= mass.sum(-1, keepdims=True)
    return Observed(jnp.asarray(x, jnp.float32), jnp.asarray(mass, jnp.float32), jnp.asarray(at))


CHOICE = Choice(k=8, sink=1, recent=2)


def test_recall_is_the_mass_of_what_is_chosen():
    indexer, window = made(), teacher()
    got = np.asarray(recall_matrix(indexer, window, CHOICE))
    x, mass, rows = (np.asarray(a, np.float64) for a in (window.x, window.mass, window.rows))
    rows = rows.astype(int)
    for m in range(2):
        scores = formula(one(indexer, m), x[m], rows)
        always = (np.arange(T) < 1) | (rows[:, None] - np.arange(T) < 2)
        scores = np.where(always, np.inf, scores)
        scores[np.arange(T) > rows[:, None]] = -np.inf
        chosen = np.argsort(-scores, axis=-1, kind="stable")[:, :8]
        for l in range(2):
            want = np.mean([mass[l, i, c].sum() for i, c in enumerate(chosen)])
            assert got[l, m] == pytest.approx(want, abs=1e-5)


def test_training_recalls_more_and_goes_on_after_a_kill(tmp_path):
    training = IndexTraining(steps=60, rate=1e-2, rows=16, keys=32, sink=1, recent=2)
    windows = [teacher(3), teacher(4)]
    start = made(seed=5)
    before = recall_matrix(start, windows[0], CHOICE)
    *_, straight = train_indexer(start, windows, training)
    after = recall_matrix(straight.indexer, windows[0], CHOICE)
    for layer in range(2):
        assert after[layer, layer] > before[layer, layer] + 0.05
    assert np.isfinite(np.asarray(straight.losses)).all()
    assert straight.losses[-10:].mean() < 0.85 * straight.losses[:10].mean()

    for progress in train_indexer_saving(start, windows, training, tmp_path, every=10):
        if int(progress.step) == 25:
            break  # a kill: what was done after step 20 is lost
    *_, resumed = train_indexer_saving(start, windows, training, tmp_path, every=10)
    assert same(resumed, straight)
    with pytest.raises(InputError):
        list(train_indexer_saving(made(seed=6), windows, training, tmp_path))


def test_one_indexer_learns_for_the_layers_that_it_serves():
    window = teacher(layers=3)
    shared = shared_targets(window, "FSF")
    np.testing.assert_array_equal(shared.x, window.x[np.array([0, 2])])
    np.testing.assert_allclose(shared.mass[0], (window.mass[0] + window.mass[1]) / 2, atol=1e-6)
    np.testing.assert_array_equal(shared.mass[1], window.mass[2])


def test_bad_trainings_are_refused():
    with pytest.raises(InputError, match="rate"):
        IndexTraining(rate=float("nan"))
    with pytest.raises(InputError, match="observed"):
        next(train_indexer(made(), [], IndexTraining()))
    with pytest.raises(InputError, match="rows"):
        next(train_indexer(made(), [teacher()], IndexTraining(rows=64)))


@pytest.fixture(scope="module")
def gemma():
    model = load(TINY / "gemma3")
    rng = np.random.default_rng(7)
    return model, rng.integers(3, model.config.vocab_size, 64, dtype=np.int32)


def test_observed_attention_is_that_of_the_model(gemma):
    model, tokens = gemma
    config = model.config
    window = observe_windows(model.params, config, [tokens], rows=8, first=20)[0]
    run = next(r for r in layer_runs(config) if r.window is None)
    weights = jax.tree.map(
        lambda a: np.asarray(a, np.float64)[0], model.params.runs[layer_runs(config).index(run)]
    )
    x, rows = np.asarray(window.x[0], np.float64), np.asarray(window.rows)
    scaling = run.rope_scaling
    assert scaling is not None
    h, g, d = config.kv_heads, config.q_per_kv, config.head_dim

    def norm(a, w):
        return a / np.sqrt((a**2).mean(-1, keepdims=True) + config.norm_eps) * w

    frequencies = run.rope_theta ** (-np.arange(0, d, 2) / d) / scaling.factor
    k = turn(norm((x @ weights.wk).reshape(-1, h, d), weights.k_norm), range(64), frequencies)
    q = norm((x[rows] @ weights.wq).reshape(-1, h * g, d), weights.q_norm)
    q = turn(q, rows, frequencies) * config.attention_scale
    want = np.zeros((len(rows), 64))
    for i, row in enumerate(rows):
        for head in range(h * g):
            scores = k[: row + 1, head // g] @ q[i, head]
            weight = np.exp(scores - scores.max())
            want[i, : row + 1] += weight / weight.sum() / (h * g)
    np.testing.assert_allclose(window.mass[0], want, atol=2e-3)  # of float16


def test_a_choice_of_everything_is_the_model(gemma):
    """Through stretches that follow an exact history, with an indexer, and with local layers."""
    model, tokens = gemma
    config = model.config
    layers = sum(w is None for w in config.windows)
    own = init_indexer(config.d_model, layers=layers, heads=2, width=8, rng=jax.random.key(0))
    history = read_exactly(model.params, config, tokens)
    starts = (16, 40)
    stretches = np.stack([tokens[s : s + 8] for s in starts])
    options = {"chooser": by_index, "own": own, "history": history, "starts": starts}
    everything = Choice(k=64, sink=1, recent=2)
    found = restricted_pass(model.params, config, stretches, choice=everything, **options)
    want = forward(model.params, config, jnp.asarray(tokens)[None])[0]
    got = logits(model.params, config, found.hidden)
    for row, start in enumerate(starts):
        np.testing.assert_allclose(got[row], want[start : start + 8], atol=2e-4)
    np.testing.assert_allclose(found.recall, 1.0, atol=1e-5)
    # And with few tokens the model does not stay what it was.
    few = restricted_pass(
        model.params, config, stretches, choice=Choice(k=4, sink=1, recent=2), **options
    )
    assert (np.asarray(few.recall) < 0.99).any()
    assert np.abs(np.asarray(few.hidden - found.hidden)).max() > 1e-3
    best = {
        by_head: restricted_pass(
            model.params,
            config,
            stretches,
            choice=Choice(k=4, sink=1, recent=2, by_head=by_head),
            **(options | {"chooser": by_attention}),
        )
        for by_head in (False, True)
    }
    means = [float(best[by_head].recall[0].mean()) for by_head in (False, True)]  # of one input
    assert float(few.recall[0].mean()) < means[0] < means[1] < 1
    for wrong in ((16,), (-1, 40), (16, 57)):  # the last would read beyond the text
        with pytest.raises(InputError, match="starts"):
            restricted_pass(
                model.params, config, stretches, choice=everything, **(options | {"starts": wrong})
            )
