"""The same tokens stay as in kvpress 0.5.5, on the same random keys, values and queries.

kvpress pins an older transformers than ours, and its package imports data loaders, so only its
modules of presses are loaded. To run this:

    pip install torch transformers "cachetools<6" && pip install --no-deps kvpress
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies import (
    H2O,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    Seen,
    SnapKV,
    Streaming,
    Tova,
    merge_values,
    pyramid,
    rerotate,
)

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if (_spec := importlib.util.find_spec("kvpress")) is None:
    pytest.skip("kvpress is not installed", allow_module_level=True)

B, H, G, D, T = 2, 2, 3, 16, 48
RATIO = 0.5  # of tokens to prune
KEPT = T // 2
FREQUENCIES = (100.0 ** -(np.arange(D // 2) / (D // 2))).astype(np.float32)


@pytest.fixture(scope="module")
def press():
    """Loads a press by the names of its module and class, without kvpress' `__init__`."""
    package = types.ModuleType("kvpress")
    package.__path__ = list(_spec.submodule_search_locations)
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, "kvpress", package)
    load = lambda module, name: getattr(
        importlib.import_module(f"kvpress.presses.{module}_press"), name
    )
    yield load
    patch.undo()
    for name in [n for n in sys.modules if n.startswith("kvpress.")]:
        del sys.modules[name]


@functools.cache
def data() -> dict[str, np.ndarray]:
    noise = np.random.default_rng(20)
    raw = noise.normal(size=(B, H, G, T, D)) + 0.5 * noise.normal(size=(1, H, G, 1, D))
    key, value = noise.normal(size=(2, B, H, T, D))
    turn = lambda x: np.asarray(_rope(torch.tensor(x), np.arange(T)))
    out = {"raw": raw, "query": turn(raw), "key": turn(key + 0.7), "value": value}
    return {name: x.astype(np.float32) for name, x in out.items()}


def _cos_sin(positions):
    angles = torch.tensor(np.asarray(positions)[..., None] * FREQUENCIES)
    both = torch.cat([angles, angles], -1)
    return both.cos(), both.sin()


def _rope(x, positions):
    cos, sin = _cos_sin(positions)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Rotary:
    """What a press asks of a model's rotary embedding."""

    inv_freq = torch.tensor(FREQUENCIES)

    def __call__(self, x, position_ids):
        return tuple(t.to(x.dtype) for t in _cos_sin(position_ids))


def attention_module(layer: int = 0, layers: int = 1):
    """What a press asks of an attention layer. Hidden states are the queries themselves."""
    config = types.SimpleNamespace(
        num_attention_heads=H * G, num_key_value_heads=H, num_hidden_layers=layers
    )
    return types.SimpleNamespace(
        config=config, head_dim=D, q_proj=lambda x: x, rotary_emb=Rotary(), layer_idx=layer
    )


def theirs(press, attentions=None) -> np.ndarray:
    x = data()
    hidden = torch.tensor(x["raw"].reshape(B, H * G, T, D)).transpose(1, 2).reshape(B, T, -1)
    cos, sin = (c.float() for c in _cos_sin(np.arange(T)[None]))
    kwargs = {"position_embeddings": (cos, sin)}
    key, value = torch.tensor(x["key"]), torch.tensor(x["value"])
    return press.score(attention_module(), hidden, key, value, attentions, kwargs).numpy()


def ours(policy) -> np.ndarray:
    """Scores when the prompt is one block, newest tokens of the policy's window on top."""
    x = data()
    at = jnp.arange(T)

    @jax.jit
    def run(key, value, query):
        seen = Seen(
            key=key,
            value=value,
            positions=jnp.broadcast_to(at, (B, H, T)),
            query=query / np.sqrt(D),
            query_positions=jnp.broadcast_to(at, (B, T)),
            mass=jnp.zeros((B, H, T)),
            memory=policy.start(B, H, G, D),
            frequencies=jnp.asarray(FREQUENCIES),
        )
        mass, memory = policy.observe(seen)
        seen = type(seen)(**{**vars(seen), "mass": mass, "memory": memory})
        return policy.score(seen)

    return np.asarray(run(x["key"], x["value"], x["query"]))


def keep(score: np.ndarray, sure: np.ndarray | None = None) -> np.ndarray:
    """Slots of the `KEPT` best of each head, in order."""
    score = score if sure is None else np.where(sure, np.inf, score)
    return np.sort(np.argsort(-score, axis=-1, kind="stable")[..., :KEPT], axis=-1)


def agree(mine, other, sure=None, factor=1.0):
    """Same tokens, and same scores up to a factor where kvpress does not pin them."""
    free = slice(None) if sure is None else ~sure
    np.testing.assert_allclose(factor * mine[..., free], other[..., free], rtol=5e-5, atol=1e-7)
    np.testing.assert_array_equal(keep(mine, sure), keep(other))


def newest(n: int) -> np.ndarray:
    return np.arange(T) >= T - n


def test_key_norm(press):
    agree(ours(KeyNorm()), theirs(press("knorm", "KnormPress")(RATIO)))


def test_key_diff(press):
    agree(ours(KeyDiff()), theirs(press("keydiff", "KeyDiffPress")(RATIO)))


def test_streaming(press):
    sink = np.arange(T) < 4
    other = theirs(press("streaming_llm", "StreamingLLMPress")(RATIO, n_sink=4))
    np.testing.assert_array_equal(keep(ours(Streaming()), sink), keep(other))


def test_tova(press):
    """kvpress pins the newest token, as `recent=1` does."""
    agree(ours(Tova()), theirs(press("tova", "TOVAPress")(RATIO)), newest(1))


def test_snapkv(press):
    """kvpress has the mean over the window's queries, ours is their sum."""
    other = theirs(press("snapkv", "SnapKVPress")(RATIO, window_size=8, kernel_size=5))
    agree(ours(SnapKV(window=8, kernel=5)), other, newest(8), factor=1 / 8)


def test_observed_attention(press):
    x = data()
    logits = torch.einsum("bhgtd,bhsd->bhgts", *(torch.tensor(x[n]) for n in ("query", "key")))
    logits = logits.reshape(B, H * G, T, T) / D**0.5
    logits = logits.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    other = theirs(press("observed_attention", "ObservedAttentionPress")(RATIO), logits.softmax(-1))
    agree(ours(H2O(normalized=True)), other)


@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_expected_attention(press, epsilon):
    other = theirs(
        press("expected_attention", "ExpectedAttentionPress")(
            RATIO, n_future_positions=64, n_sink=4, epsilon=epsilon
        )
    )
    mine = ours(ExpectedAttention(future=64, sink=4, epsilon=epsilon))
    np.testing.assert_array_equal(keep(mine), keep(other))
    agree(mine, other, np.arange(T) < 4)


def test_rerotated_keys(press):
    x = data()
    one = press("key_rerotation", "KeyRerotationPress")(press("knorm", "KnormPress")(RATIO))
    key, value = torch.tensor(x["key"]), torch.tensor(x["value"])
    want, _ = one.compress(attention_module(), None, key, value, None, {})
    at = keep(ours(KeyNorm()))
    mine = np.take_along_axis(x["key"], at[..., None], axis=2)
    got = rerotate(mine, at, np.arange(KEPT), jnp.asarray(FREQUENCIES))
    np.testing.assert_allclose(got, want.numpy(), atol=2e-5)


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_pyramid(press, ratio):
    """kvpress' line is ours beyond the window; each of the two rounds in its own way."""
    tokens, layers, window = 4000, 8, 32
    line = press("pyramidkv", "PyramidKVPress")(ratio, window_size=window)
    want = [line.get_layer_budget(attention_module(n, layers), tokens) for n in range(layers)]
    got = pyramid(round(tokens * (1 - ratio)) + window, layers, tokens, window)
    assert max(abs(a - window - b) for a, b in zip(got, want, strict=True)) <= 1
    assert sum(got) - layers * window == layers * tokens * (1 - ratio)


def test_cam(press):
    """Attention of 0 or 1, so that no merge is left to chance; heads of a layer share tokens."""
    x = data()
    cam = press("cam", "CAMPress")(press("knorm", "KnormPress")(), target_size=KEPT, merge_budget=5)
    cam.layer_step_counts[0] = T - KEPT  # candidates for a merge: all that leave
    score = ours(KeyNorm()).mean(1)
    at = keep(score)  # [b, kept]
    stays = np.zeros((B, 1, T), bool)
    np.put_along_axis(stays[:, 0], at, True, axis=-1)
    mass = np.random.default_rng(1).integers(0, 2, (B, H, T)).astype(np.float32)
    mass = np.where(stays, 1.0, mass).astype(np.float32)
    cam._running_attn_sum[0] = torch.tensor(mass)
    key, value = torch.tensor(x["key"]), torch.tensor(x["value"])
    _, want = cam.compress(attention_module(), None, key, value.clone(), torch.tensor(mass), {})
    line = np.broadcast_to(np.arange(T), (B, H, T))
    stays = np.broadcast_to(stays, (B, H, T))
    got = merge_values(x["value"], line, stays, mass, rng=jax.random.key(0), window=5)
    got = np.take_along_axis(np.asarray(got), at[:, None, :, None], axis=2)
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
