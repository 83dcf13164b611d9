"""Scores against values by hand, the runner against exact attention, and the heat map."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from matplotlib import colormaps

from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.evals.haystack import Sample
from kvjax.evals.heat_map import cells, heat_map_png
from kvjax.evals.retrieval import run, score
from kvjax.evals.retrieval_runner import (
    answer_scores,
    full_cache_runner,
    teacher_forced_scores,
)
from kvjax.evals.retrieval_scores import exact_match, normalized, string_match_all, token_f1
from kvjax.generate.loop import advance, prefill, start
from kvjax.generate.plan import init_caches, make_plan
from kvjax.methods import get
from kvjax.models.causal import forward
from kvjax.models.load import Model, load

TINY = Path(__file__).parents[1] / "models" / "tiny"
LAYOUT = Layout(sink=4, recent=16, page=16)


class Letters:
    """A token per character."""

    def encode(self, text, *, bos=True):
        return [1, *map(ord, text)] if bos else [*map(ord, text)]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > 1)


SAMPLE = Sample("abc", "?", ("xy", "z"), "demo", 0.5, 16)


@functools.cache
def model(arch: str) -> Model:
    return load(TINY / arch, dtype="float32")


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 90, count).tolist()


def test_all_strings():
    assert string_match_all("the numbers are 12, 345 AND Six", ["345", "six"]) == 1
    assert string_match_all("1234", ["23", "45", "1", "5"]) == 0.5
    assert string_match_all("", ["a"]) == 0
    with pytest.raises(InputError, match=r"got \[\]; expected a list of at least one text"):
        string_match_all("a word", [])
    with pytest.raises(InputError, match="put a single answer in a list"):
        token_f1("a word", "word")


def test_words_in_common():
    assert normalized(" The  Three-legged cat's AN apple; a, nine. ") == "threelegged cats apple 9"
    assert normalized("another theme, ten") == "another theme ten"
    assert exact_match("A seven!", ["7"]) == 1
    assert exact_match("seven 7", ["7"]) == 0
    assert token_f1("in May of 2023", ["May 2023"]) == pytest.approx(2 * 2 / (4 + 2))
    assert token_f1("cat cat dog", ["cat bird cat cat"]) == pytest.approx(2 * 2 / (3 + 4))
    assert token_f1("bird", ["dog", "a bird"]) == 1
    assert token_f1("bird", ["dog"]) == 0
    assert token_f1("the", ["a"]) == 1
    assert token_f1("", ["dog"]) == 0


def test_teacher_forced_scores_are_log_softmax():
    scores = np.random.default_rng(8600).normal(size=(5, 9)) * 4
    answer = scores.argmax(1)
    answer[[1, 3]] = (answer[[1, 3]] + 1) % 9
    exact = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    picked, first = teacher_forced_scores(jnp.asarray(scores), jnp.asarray(answer))
    np.testing.assert_allclose(picked, exact[np.arange(5), answer], rtol=1e-5, atol=1e-5)
    assert first.tolist() == [True, False, True, False, True]
    again, _ = teacher_forced_scores(jnp.asarray(exact), jnp.asarray(answer))
    np.testing.assert_allclose(again, picked, rtol=1e-5, atol=1e-5)


def test_rows_by_hand():
    seen = []

    def runner(context, question, answer):
        seen.append((context, question, answer))
        n = len(answer)
        return np.log(np.full(n, 0.5)), np.arange(n) != 2

    (row,) = score([SAMPLE], runner, tokenizer=Letters(), method="mine")
    # The space before the answer is a token of its own, and goes with the question.
    assert seen == [([1, *b"abc"], [*b"? "], [*b"xy, z"])]
    assert row == {
        "method": "mine",
        "task": "demo",
        "length": 16,
        "depth": 0.5,
        "tokens": 4 + 2 + 5,
        "answer_tokens": 5,
        "exact": 0.0,
        "token_accuracy": 0.8,
        "nll": pytest.approx(np.log(2)),
    }
    (row,) = score([SAMPLE], lambda *_: (np.zeros(5), np.ones(5, bool)), tokenizer=Letters())
    assert (row["exact"], row["token_accuracy"], row["nll"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("log_probs", "greedy", "message"),
    [
        (np.zeros(4), np.ones(5, bool), r"shape \(4,\) and \(5,\); expected two of shape \(5,\)"),
        (np.zeros(5), np.ones((5, 1), bool), r"and \(5, 1\)"),
        (np.array([0, -1, 0.1, -2, -3]), np.ones(5, bool), "above 0, or NaN"),
        (np.array([0, -1, np.nan, -2, -3]), np.ones(5, bool), "above 0, or NaN"),
    ],
)
def test_runners_that_return_something_else(log_probs, greedy, message):
    with pytest.raises(InputError, match=message):
        score([SAMPLE], lambda *_: (log_probs, greedy), tokenizer=Letters())


def test_a_run_is_the_product_of_its_axes():
    seen = []

    def runner(context, question, answer):
        seen.append((tuple(context), tuple(question), tuple(answer)))
        return np.full(len(answer), -1.0), np.ones(len(answer), bool)

    ask = lambda seed=0: run(
        ["passkey", "frequent_words"],
        [400, 600],
        [0.0, 1.0],
        2,
        runner,
        tokenizer=Letters(),
        seed=seed,
    )
    rows = ask()
    assert [(r["task"], r["length"], r["depth"]) for r in rows[::2]] == [
        ("passkey", 400, 0.0),
        ("passkey", 400, 1.0),
        ("passkey", 600, 0.0),
        ("passkey", 600, 1.0),
        ("frequent_words", 400, None),
        ("frequent_words", 600, None),
    ]
    assert len(rows) == len(set(seen)) == 12
    assert [r["tokens"] for r in rows] == [sum(map(len, parts)) for parts in seen]
    assert all(r["length"] - 24 < r["tokens"] <= r["length"] for r in rows)
    assert ask() == rows
    assert seen[12:] == seen[:12]  # every method is asked the same
    ask(seed=7)
    assert not set(seen[24:]) & set(seen[:12])
    with pytest.raises(InputError, match="got 0 samples of 1 tasks"):
        run(["passkey"], [400], [0.5], 0, runner, tokenizer=Letters())
    with pytest.raises(InputError, match="got 1 samples of 1 tasks, 1 lengths, 0 depths"):
        run(["passkey"], [400], [], 1, runner, tokenizer=Letters())


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_the_runner_scores_what_the_model_says(arch):
    """A bf16 cache against exact attention without one; measured 0.003 apart, and 0.5 over tokens."""
    one = model(arch)
    runner = full_cache_runner(one, get("bf16", one.config.head_dim, layout=LAYOUT))
    samples = [(ids(25, 1), ids(4, 2), ids(17, 3))]
    samples += [([*ids(32, 6), 5], [], [7])] if arch == "llama" else []
    for context, question, answer in samples:
        tokens = [*context, *question, *answer]
        scores = np.asarray(forward(one.params, one.config, jnp.asarray([tokens])), np.float64)[0]
        before = scores[len(tokens) - len(answer) - 1 : -1]
        exact = before - np.log(np.exp(before).sum(1, keepdims=True))
        log_probs, greedy = runner(context, question, answer)
        np.testing.assert_allclose(log_probs, exact[np.arange(len(answer)), answer], atol=0.01)
        right = before.argmax(1)
        assert greedy.shape == (len(answer),)
        assert not greedy[right != np.array(answer)].any()


def test_greedy_decoding_is_scored_as_right(quick_jit):
    """What lossy codes generate token by token is what they teacher-force, pages and all."""
    one = model("llama")
    method = get("int4", one.config.head_dim, layout=LAYOUT)
    plan, prompt, answer = make_plan(one.config, method), ids(38, 4), []
    state = start(
        plan, one.params, [prompt], max_new=26
    )  # the capacity of the runner: one compilation
    step = quick_jit(advance)
    for _ in range(22):
        answer.append(int(state.token[0]))
        state = step(plan, one.params, state)
    assert len(set(answer)) > 3
    runner = full_cache_runner(one, method)
    log_probs, greedy = runner(prompt[:30], prompt[30:], answer)
    assert greedy.all()
    other = answer.copy()
    other[12] = (other[12] + 1) % 90
    changed, greedy = runner(prompt[:30], prompt[30:], other)
    assert greedy[:12].all()
    assert not greedy[12]
    np.testing.assert_allclose(changed[:12], log_probs[:12], atol=1e-5)

    # The cache has read the context only, as one that is compressed before the question is known.
    padded = np.pad(np.array([prompt[:30]], np.int32), ((0, 0), (0, 34)))
    caches = init_caches(plan, batch=1, capacity=64)
    _, caches, _ = prefill(plan, one.params, caches, padded, np.array([30], np.int32), block=64)
    later, greedy = answer_scores(plan, one.params, caches, prompt[30:], answer, block=64)
    assert greedy.all()
    np.testing.assert_allclose(later, log_probs, atol=1e-4)
    with pytest.raises(InputError, match="got 0 tokens before an answer of 22"):
        answer_scores(plan, one.params, caches, [], answer, block=64)


def test_what_the_runner_refuses():
    one = model("llama")
    runner = full_cache_runner(one, get("bf16", one.config.head_dim, layout=LAYOUT))
    with pytest.raises(InputError, match="got 0 tokens before an answer of 1"):
        runner([], [], [3])
    with pytest.raises(InputError, match="got 2 tokens before an answer of 0"):
        runner([3], [4], [])
    positions = one.config.max_positions
    with pytest.raises(InputError, match=f"got {positions + 1} tokens; expected at most"):
        runner(ids(positions, 5), [], [3])


def rows(values, score="exact"):
    """From {(method, task, length, depth): [scores]}."""
    names = "method", "task", "length", "depth"
    return [
        dict(zip(names, place, strict=True)) | {score: value}
        for place, many in values.items()
        for value in many
    ]


def test_cells_are_means():
    found = cells(rows({("a", "t", 8, 0.5): [1, 0, 0, 0], ("a", "t", 8, None): [1, 1]}), "exact")
    assert found == {("a", "t", 8, 0.5): (0.25, 4), ("a", "t", 8, None): (1.0, 2)}


def picture(values, score="exact"):
    png = heat_map_png(rows(values, score), score=score)
    return matplotlib.image.imread(io.BytesIO(png))[..., :3]


def area(image, value: float) -> float:
    """The share of pixels in the colour of a value from 0 to 1."""
    return float((np.abs(image - colormaps["cividis"](value)[:3]).max(-1) < 0.01).mean())


def test_the_heat_map_shows_the_scores():
    places = [("a", "t", length, depth) for length in (1024, 2048) for depth in (0.0, 0.5)]
    good, bad = picture({p: [1.0] for p in places}), picture({p: [0.0] for p in places})
    assert area(good, 1.0) > 0.4 > 0.05 > area(good, 0.0)
    assert area(bad, 0.0) > 0.4 > 0.05 > area(bad, 1.0)
    mixed = picture({p: [float(p[3] == 0)] for p in places})  # right at depth 0 only
    top, bottom = np.split(mixed, [mixed.shape[0] * 55 // 100])
    assert area(top, 1.0) > 3 * area(top, 0.0)
    assert area(bottom, 0.0) > 3 * area(bottom, 1.0)


def test_the_heat_map_has_a_panel_per_method_and_task():
    one = {("$a$", "t", 100, 0.0): [1.0]}
    wide = one | {("$a$", "frequent_words", 100, None): [0.5]} | {("$a$", "u", 9, 0.0): [0.5]}
    tall = wide | {("b", "t", 100, 1.0): [0.0, 1.0]}  # b has not run the other tasks
    a, b, c = map(picture, (one, wide, tall))
    assert a.shape[1] < b.shape[1] == c.shape[1]
    assert a.shape[0] == b.shape[0] < c.shape[0]
    # The least loss is in the colour of the best, whatever its size.
    loss = picture({("a", "t", 8, 0.0): [0.0], ("a", "t", 8, 1.0): [9.0]}, score="nll")
    top, bottom = np.split(loss, [loss.shape[0] * 55 // 100])
    assert area(top, 1.0) > 3 * area(top, 0.0)
    assert area(bottom, 0.0) > 3 * area(bottom, 1.0)


def test_what_the_heat_map_refuses():
    with pytest.raises(InputError, match="rows: got none"):
        heat_map_png([])
    with pytest.raises(InputError, match="score: got 'f1'; expected one of exact, token_accuracy"):
        heat_map_png(rows({("a", "t", 8, 0.0): [1.0]}), score="f1")
    with pytest.raises(InputError, match="nll that is not finite"):
        heat_map_png(rows({("a", "t", 8, 0.0): [np.inf]}, "nll"), score="nll")
