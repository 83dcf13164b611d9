"""Evicted caches against masks on the exact model, and the runner against the full cache."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import Dense
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.evals.evicted import continuation_fidelity, evicted_runner, repeat_probe
from kvjax.evals.fidelity import summarize
from kvjax.evals.reference import reference_pass
from kvjax.evals.retrieval_runner import full_cache_runner
from kvjax.generate.evict import Keep, ProbePrompt
from kvjax.generate.plan import make_plan
from kvjax.methods import get
from kvjax.models.causal import forward
from kvjax.models.config import layer_runs
from kvjax.models.decoder import decode_layers, logits
from kvjax.models.load import Model, load
from kvjax.policies import Eviction, Probe, Streaming

TINY = Path(__file__).parents[1] / "models" / "tiny"
LAYOUT = Layout(sink=2, recent=8, page=8)
EXACT = Method(Dense(jnp.float32), Dense(jnp.float32), LAYOUT)
HISTORY, MORE = 96, 32


@functools.cache
def model(arch: str = "llama") -> Model:
    found = load(TINY / arch, dtype="float32")
    return dataclasses.replace(found, config=dataclasses.replace(found.config, max_positions=4096))


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 90, count).tolist()


@functools.cache
def reference():
    tokens = np.array(ids(HISTORY + MORE, 1), np.int32)
    hidden = reference_pass(model().params, model().config, tokens).hidden
    return tokens, hidden[HISTORY:]


def streamed(tokens, budget: int, block: int) -> np.ndarray:
    """Log-probabilities `[n, V]` after the history, by a mask of what StreamingLLM leaves."""
    config, t = model().config, len(tokens)
    seen = np.tril(np.ones((t, t), bool))
    for first in range(block, HISTORY + 1, block):  # `first` tokens are read, and evicted
        kept = [0, 1, *range(max(2, first - budget + 2), first)]
        seen[first:, :first] &= np.isin(np.arange(first), kept)
    runs = layer_runs(config)
    positions = jnp.arange(t)[None]

    def look(run, layer, cache, q, k, v, extra):
        scores = jnp.einsum("bshgd,bthd->bhgst", q, k)
        weights = jax.nn.softmax(jnp.where(jnp.asarray(seen), scores, -jnp.inf))
        return jnp.einsum("bhgst,bthd->bshgd", weights, v), cache

    hidden, _, _ = decode_layers(
        model().params, config, jnp.asarray(tokens)[None], positions, look, (None,) * len(runs)
    )
    return normalized(logits(model().params, config, hidden)[0, HISTORY:])


def normalized(scores) -> np.ndarray:
    x = np.asarray(scores, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_continuation_sees_what_is_left():
    """KL, NLL and agreement are those of a mask on the exact model, in float64."""
    tokens, hidden = reference()
    plan = make_plan(model().config, EXACT)
    keep = Keep(Eviction(Streaming(), budget=34, block=32, sink=2))
    scores, sizes = continuation_fidelity(
        plan, model().params, tokens, hidden, keep, history=HISTORY
    )
    ours = streamed(tokens, 34, 32)[:-1]
    full = normalized(forward(model().params, model().config, tokens[None])[0, HISTORY:-1])
    targets = tokens[HISTORY + 1 :, None]
    kl = (np.exp(full) * (full - ours)).sum(-1)
    assert kl.mean() > 1e-3  # what is gone is missed
    np.testing.assert_allclose(scores.kl, kl, rtol=0.1, atol=0.02 * kl.mean())  # bf16 windows
    nll = -np.take_along_axis(ours, targets, 1)[:, 0]
    full_nll = -np.take_along_axis(full, targets, 1)[:, 0]
    np.testing.assert_allclose(scores.nll, nll, atol=0.01)
    assert np.abs(nll - full_nll).max() > 0.1
    np.testing.assert_allclose(scores.full_nll, full_nll, atol=1e-4)
    row = dict(summarize([scores]))
    assert row["kl_se"] == pytest.approx(kl.std(ddof=1) / np.sqrt(MORE - 1), rel=0.05)
    assert sizes["cache_bytes"] < sizes["bf16_bytes"] * 2  # the pages here are float32


def test_codes_and_budgets_at_true_bytes():
    """bf16 without eviction takes what it takes; budgets and codes shrink it, and cost KL."""
    tokens, hidden = reference()
    found = {}
    for name, budget in (("bf16", None), ("bf16", 34), ("int2", 34)):
        plan = make_plan(model().config, get(name, model().config.head_dim, layout=LAYOUT))
        keep = None
        if budget:
            keep = Keep(Eviction(Streaming(), budget=budget, block=32, sink=2))
        scores, sizes = continuation_fidelity(
            plan, model().params, tokens, hidden, keep, history=HISTORY
        )
        found[name, budget] = sizes["ratio"], scores.kl.mean()
        assert sizes["growing_ratio"] == sizes["ratio"]  # no layer has a sliding window
    ratios, kls = np.array([found[k] for k in found]).T
    assert ratios[0] == 1
    assert (np.diff(ratios) < 0).all()
    assert (np.diff(kls) > 0).all()
    assert kls[0] < 0.01 * kls[1]


def test_a_budget_for_all_is_the_full_cache():
    """Where nothing leaves, answers are those of a cache that keeps every token; policies see the
    question only when asked."""
    context, question, answer = ids(20, 2), ids(3, 3), ids(5, 4)
    full, _ = full_cache_runner(model("gemma3"), EXACT)(context, question, answer)
    for with_question, history in ((False, context), (True, context + question[:-1])):
        read: list[int] = []

        def watch(blocks, before, read=read):
            read.extend(blocks[0])
            return [[5, 6]]

        keep = Keep(Eviction(Probe(), budget=24, block=16), ProbePrompt(watch))
        run = evicted_runner(model("gemma3"), EXACT, keep, with_question=with_question)
        log_probs, greedy = run(context, question, answer)
        assert read == history
        assert log_probs.shape == greedy.shape == (5,)
        np.testing.assert_allclose(log_probs, full, atol=0.01)  # bf16 windows


class Words:
    """A token per word."""

    def encode(self, text, *, bos=True):
        return [1] * bos + [7] * len(text.split())

    def decode(self, ids):
        raise NotImplementedError


def test_a_block_is_repeated():
    probe = repeat_probe(Words(), 4)
    rows, lengths = probe.padded([[20, 21, 22, 23]], [[]])
    assert lengths == [5 + 4]  # "Repeat the previous context exactly."
    assert rows[0, 5:9].tolist() == [20, 21, 22, 23]
    before = list(range(30, 40))
    rows, lengths = probe.padded([[20, 21]], [before])
    assert lengths == [10 + 8 + 2]  # "Repeat the part ... starting with", the last 8 tokens
    assert rows[0, 10:20].tolist() == [*before[-8:], 20, 21]
    assert rows.shape == (1, 10 + 8 + 4)


def test_continuations_that_do_not_do():
    tokens, hidden = reference()
    plan = make_plan(model().config, EXACT)
    for count, states in ((24, 24), (32, 16)):
        with pytest.raises(InputError, match=f"got {count} tokens after 96, hidden states of"):
            continuation_fidelity(
                plan, model().params, tokens[: 96 + count], hidden[:states], None, history=96
            )
