"""Answer-KL and bytes against numbers made another way; which questions a beginning answers."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import cache_bytes
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.episodes import Conversation, Question, Utterance, create
from kvjax.episodes.prompt import context, question_prompt
from kvjax.evals.conversation_caches import (
    evidence_inside,
    exact_caches,
    exact_plan,
    full_bytes,
    judge,
    read_whole,
    routes,
    state_bytes,
)
from kvjax.evals.conversations import (
    ASK,
    HOWS,
    Talk,
    answer,
    compare,
    mean_and_error,
    prefix,
    ratio_and_error,
    talk,
)
from kvjax.evals.text import load_readable
from kvjax.generate.evict import ProbePrompt, pack_all, packed_shapes, take_history
from kvjax.generate.plan import make_plan
from kvjax.methods import get
from kvjax.models.causal import forward
from kvjax.models.load import Model
from kvjax.policies import Eviction, Probe

TINY = Path(__file__).parents[1] / "models" / "tiny" / "llama"
LAYOUT = Layout(sink=4, recent=16, page=16)


@functools.cache
def model() -> Model:
    return load_readable(str(TINY))


@functools.cache
def plan_of():
    return make_plan(model().config, get("bf16", model().config.head_dim, layout=LAYOUT))


def made(questions: tuple[Question, ...]) -> Conversation:
    said = ["Tea?", "Yes, a big pot.", "With milk?", "No, with lemon.", "And cake?", "Of course."]
    turns = [Utterance(("Ana", "Ben")[i % 2], text, f"D1:{i + 1}") for i, text in enumerate(said)]
    return Conversation("tea", tuple(turns), questions)


QUESTIONS = (
    Question("What with?", "lemon", ("D1:4",), "4"),
    Question("What is big?", "a pot", ("D1:2",), "1"),
)


@functools.cache
def short() -> Talk:
    return talk(made(QUESTIONS), model().tokenizer)


def random_hidden(seed: int, n: int) -> np.ndarray:
    shape = (n, short().longest, model().config.d_model)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_beginning_has_the_questions_that_it_answers():
    asked = (
        *QUESTIONS,
        Question("Cake?", "of course", ("D1:2", "D1:6"), "1"),  # half of its evidence comes later
        Question("Coffee?", "", ("D1:1",), "5"),
        Question("Dogs?", "none", ("D1:1",), "5"),
        Question("When?", "noon", (), "2"),
        Question("Where?", "", ("D1:1",), "4"),
    )
    tokenizer = model().tokenizer
    whole = made(asked)
    first = dataclasses.replace(whole, utterances=whole.utterances[:4], questions=())
    limit = len(tokenizer.encode(context(first)))
    cut = prefix(whole, tokenizer, limit)
    assert cut.utterances == whole.utterances[:4]
    assert cut.questions == QUESTIONS
    assert len(prefix(whole, tokenizer, limit - 1).utterances) == 3
    everything = prefix(whole, tokenizer, 4000)
    assert everything.utterances == whole.utterances
    assert [q.text for q in everything.questions] == ["What with?", "What is big?", "Cake?"]


def test_sessions_that_were_not_begun_are_cut_off():
    whole = dataclasses.replace(made(QUESTIONS), starts=(0, 2, 4))
    limit = len(model().tokenizer.encode(context(whole))) - 1
    assert prefix(whole, model().tokenizer, limit).starts == (0, 2, 4)
    few = dataclasses.replace(whole, utterances=whole.utterances[:4], starts=(0, 2))
    limit = len(model().tokenizer.encode(context(few)))
    assert prefix(whole, model().tokenizer, limit).starts == (0, 2)


def test_no_answerable_question_is_an_error():
    wrong = (Question("Dogs?", "none", ("D1:1",), "5"), Question("Cake?", "yes", ("D9:1",), "4"))
    with pytest.raises(InputError, match="tea: got no question that the first 6 utterances answer"):
        prefix(made(wrong), model().tokenizer, 4000)
    with pytest.raises(InputError, match="a first utterance beyond 20 tokens"):
        prefix(made(QUESTIONS), model().tokenizer, 20)


def test_questions_share_their_opening():
    encode = model().tokenizer.encode
    for i, question in enumerate(QUESTIONS):
        asked = [*short().opening, *short().questions[i]]
        assert asked == encode(question_prompt(question) + ASK, bos=False)
        assert list(short().answers[i]) == encode(" " + question.answer, bos=False)
    assert short().questions[0][0] != short().questions[1][0] or len(short().questions[0]) == 1
    assert short().evidence == ((0,), (0,))
    one = talk(made(QUESTIONS[:1]), model().tokenizer)
    assert len(one.questions[0]) == 1  # something is left to ask


def test_answers_through_a_cache_are_those_of_the_whole_text():
    """Hidden states against one pass over history, question and answer; forks leave no trace."""
    page = LAYOUT.page
    room = -(-short().room // page) * page
    plan = exact_plan(model().config, len(short().history) + room, page=page)
    caches = exact_caches(plan, model().params, short().history, room=room, dtype=jnp.float32)
    rows = [(1, 0), (0, 0), (1, 0)]
    found = answer(plan, model().params, caches, short(), rows, batch=2)
    for (i, _), ours, nll in zip(rows, found.hidden, found.question_nll, strict=True):
        before = [*short().history, *short().opening, *short().questions[i]]
        text = np.array([*before, *short().answers[i]], np.int32)[None]
        scores = np.asarray(forward(model().params, model().config, text))[0]
        n = len(short().answers[i])
        head = model().params.embed if model().params.head is None else model().params.head
        got = ours[:n] @ np.asarray(head, np.float32).T
        np.testing.assert_allclose(got, scores[len(before) - 1 : len(before) - 1 + n], atol=2e-4)
        asked = list(short().questions[i])
        z = scores[len(before) - len(asked) : len(before) - 1].astype(np.float64)
        own = z[np.arange(len(asked) - 1), asked[1:]] - np.log(np.exp(z).sum(-1))
        assert nll == pytest.approx(-own.mean(), abs=1e-4)


def test_kl_and_nll_by_hand():
    reference, ours = random_hidden(0, 2), random_hidden(1, 2)
    scores = compare(plan_of(), model().params, reference, ours, short())
    head = model().params.embed if model().params.head is None else model().params.head
    head = np.asarray(head, np.float64)

    def log_p(hidden):
        z = hidden.astype(np.float64) @ head.T
        z -= z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    for i, tokens in enumerate(short().answers):
        n = len(tokens)
        full, own = log_p(reference[i, :n]), log_p(ours[i, :n])
        kl = (np.exp(full) * (full - own)).sum(-1).mean()
        at = np.arange(n), list(tokens)
        assert scores.kl[i] == pytest.approx(kl, rel=1e-4)
        assert scores.nll[i] == pytest.approx(-own[at].mean(), rel=1e-4)
        assert scores.full_nll[i] == pytest.approx(-full[at].mean(), rel=1e-4)
        assert scores.same[i] == pytest.approx((full.argmax(-1) == own.argmax(-1)).mean())
    nothing = compare(plan_of(), model().params, reference, reference, short())
    assert np.abs(nothing.kl).max() < 1e-6


def test_errors_of_means_and_ratios():
    rng = np.random.default_rng(3)
    theirs = rng.gamma(4.0, size=400)
    ours = 0.5 * theirs * rng.gamma(9.0, 1 / 9, size=400)
    mean, error = mean_and_error(ours)
    assert mean == pytest.approx(ours.sum() / 400)
    assert error == pytest.approx(np.sqrt(((ours - mean) ** 2).sum() / 399 / 400))
    ratio, spread = ratio_and_error(ours, theirs)
    draws = rng.integers(0, 400, (2000, 400))
    again = ours[draws].mean(1) / theirs[draws].mean(1)
    assert ratio == pytest.approx(ours.sum() / theirs.sum())
    assert spread == pytest.approx(again.std(), rel=0.15)
    assert mean_and_error([2.0]) == (2.0, 0.0)


def sets_of(plan, eviction, probe):
    _, sets, _ = take_history(
        plan, model().params, [list(short().history)], eviction, probe=ProbePrompt([probe], 64)
    )
    return sets


def test_a_history_that_was_read_whole_is_judged_like_one_block():
    plan, history = plan_of(), short().history
    eviction = Eviction(Probe(), budget=64, block=len(history))
    probe = list(short().questions[0])
    whole = read_whole(plan, model().params, eviction, history)
    for _ in range(2):  # it is still there
        left = judge(plan, model().params, eviction, whole, probe, longest=64)
    blocks = sets_of(plan, eviction, probe)
    kept = [np.asarray(sets[0].positions)[..., :64] for sets in (left, blocks)]
    np.testing.assert_array_equal(*kept)
    assert (kept[0] >= 0).all()
    np.testing.assert_array_equal(
        *(np.asarray(sets[0].key)[..., :64, :].astype(np.float32) for sets in (left, blocks))
    )


def test_a_history_beyond_the_block_is_refused():
    eviction = Eviction(Probe(), budget=64, block=64)
    with pytest.raises(InputError, match="got 65 tokens; expected 1 to 64"):
        read_whole(plan_of(), model().params, eviction, short().history[:65])


def test_bytes_by_hand():
    plan, config = plan_of(), model().config
    eviction = Eviction(Probe(), budget=64, block=len(short().history))
    sets = sets_of(plan, eviction, list(short().questions[0]))
    two = jax.tree.map(lambda a: jnp.concatenate([a, a], 1), sets)
    caches = pack_all(plan, eviction, two, room=32)
    active, total = state_bytes(caches)
    assert total == sum(a.nbytes for a in jax.tree.leaves(caches))
    per_token = config.kv_heads * config.head_dim * 2 * 2  # K and V in bf16
    window, kept = 4 + 16 + 16, 48  # sink and ring; 64 - 4 - 16 as whole pages of 16
    length = len(short().history)
    tail = (length + 32 - 20) // 16 - (length - 20) // 16
    numbers = 4 * (window + tail + 2 + 1)  # positions of window and pages; length, packed; most
    kept_bytes = kept * (per_token + 4 * config.kv_heads)  # each with its position
    one = config.layers * ((window + tail * 16) * per_token + kept_bytes + numbers)
    used = 4 * config.layers  # whatever the batch
    assert (active, total) == (one + used, 2 * one + used)
    pooled = dataclasses.replace(eviction, compete="layer")
    single, both = (packed_shapes(plan, pooled, batch=b, tail=tail) for b in (1, 2))
    assert both[0].kept.table is not None
    assert state_bytes(both) == (state_bytes(single)[1], sum(map(cache_bytes, both)))
    n = 16 * 9 + 20
    full = config.layers * ((window + 9 * 16) * per_token + 4 * (window + 9 + 2))
    assert full_bytes(plan, n) == full


def test_routes_and_an_oracle():
    x = np.eye(4, dtype=np.float32)[[0, 0, 1, 1, 1]]
    index = create(x, 2, rng=jax.random.key(0))
    a, b = int(index.labels[0]), int(index.labels[4])
    found = routes(index, x[[0, 2]], [(2, 3, 0), (0,)])  # asked of one, answered by the other
    assert found["cosine"].tolist() == found["segments"].tolist() == [a, b]
    assert found["oracle"].tolist() == [b, a]
    for how in HOWS:  # of the first question one of three pieces, of the second none
        ours = evidence_inside(index, found[how], [(2, 3, 0), (0,)])
        assert ours == pytest.approx({"inside": 1 / 6, "chance": 1 / 2, "best": 5 / 6})
    best = evidence_inside(index, found["oracle"], [(2, 3, 0), (0,)])
    assert best["inside"] == best["best"] == pytest.approx(5 / 6)
