"""Choices of tokens and pages: what is always in, ties, what is never in."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.core.errors import InputError
from kvjax.select import (
    Choice,
    by_attention,
    by_index,
    by_page_bounds,
    choose_tokens,
    mask_of,
    page_bounds,
    page_logits,
    page_scores,
    tokens_of_pages,
)


def by_hand(scores, position, k, sink, recent):
    """Positions in order: always chosen ones by age, then by score, older first among equals."""
    seen = range(position + 1)
    always = [t for t in seen if t < sink or position - t < recent]
    rest = sorted((t for t in seen if t not in always), key=lambda t: (-scores[t], t))
    return (always + rest)[:k]


def test_the_best_visible_tokens_and_the_windows():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (40, 50)).astype(np.float32)  # with many ties
    positions = rng.integers(0, 50, 40)
    got = np.asarray(
        choose_tokens(jnp.asarray(scores), jnp.asarray(positions), 12, sink=3, recent=4)
    )
    for row, position, one in zip(got, positions, scores, strict=True):
        want = by_hand(one, position, 12, 3, 4)
        assert row.tolist() == want + [-1] * (12 - len(want))


def test_extreme_scores_do_not_beat_the_windows():
    scores = jnp.array([-jnp.inf, 5.0, jnp.inf, jnp.nan, -jnp.inf, jnp.inf])
    got = choose_tokens(scores, jnp.int32(4), 3, sink=1, recent=1)
    assert got.tolist() == [0, 4, 2]  # not 5, which is not there yet
    assert choose_tokens(scores, jnp.int32(-1), 3).tolist() == [-1, -1, -1]
    # A token with the lowest score of all is still one that the query sees.
    assert sorted(choose_tokens(scores, jnp.int32(4), 9).tolist()) == [-1, 0, 1, 2, 3, 4]


def test_fewer_than_k_may_be_wanted():
    scores = jnp.arange(8.0)
    got = choose_tokens(scores, jnp.int32(7), 4, count=jnp.int32(2))
    assert got.tolist() == [7, 6, -1, -1]


def test_windows_beyond_k_are_refused():
    with pytest.raises(InputError, match="68 or more"):
        choose_tokens(jnp.zeros(100), jnp.int32(99), 67, sink=4, recent=64)


def test_masks_hold_what_was_chosen():
    chosen = jnp.array([[[1, 3, -1], [0, 0, 2]]])
    want = [[[False, True, False, True], [True, False, True, False]]]
    assert mask_of(chosen, 4).tolist() == want


def test_page_bounds_are_bounds_and_are_reached():
    rng = np.random.default_rng(1)
    keys, q = rng.normal(size=(2, 5, 8, 16)), rng.normal(size=(2, 3, 16))
    bounds = page_bounds(jnp.asarray(keys, jnp.float32))
    got = np.asarray(page_logits(jnp.asarray(q, jnp.float32), bounds))  # [2, 3, 5]
    want = np.zeros((2, 3, 5))
    for h in range(2):
        for g in range(3):
            for n in range(5):
                ends = np.stack([keys[h, n].min(0) * q[h, g], keys[h, n].max(0) * q[h, g]])
                want[h, g, n] = ends.max(0).sum()
    np.testing.assert_allclose(got, want, rtol=1e-5)
    logits = np.einsum("hgd,hnpd->hgnp", q, keys)
    assert (logits.max(-1) <= got + 1e-5).all()
    one = page_bounds(jnp.asarray(keys[:, :, :1], jnp.float32))  # pages of one token: no slack
    tight = page_logits(jnp.asarray(q, jnp.float32), one)
    np.testing.assert_allclose(tight, logits[..., 0], rtol=2e-5, atol=1e-5)


def test_slots_without_a_token_bound_nothing():
    keys = jnp.array([[[1.0, 2.0], [100.0, -100.0]]])
    bounds = page_bounds(keys, jnp.array([[True, False]]))
    assert bounds.low.tolist() == bounds.high.tolist() == [[1.0, 2.0]]
    both = jnp.concatenate([keys, keys])
    bounds = page_bounds(both, jnp.array([[True, False], [False, False]]))  # and no page at all
    assert page_logits(jnp.array([[2.0, -1.0], [0.0, 0.0]]), bounds).tolist() == [
        [0.0, -np.inf],
        [0.0, -np.inf],
    ]


@pytest.mark.parametrize("choose", [by_attention, by_page_bounds])
def test_tokens_to_come_have_no_say(choose):
    """Neither those of later pages nor those of the page that is being filled."""
    rng = np.random.default_rng(4)
    k, q = rng.normal(size=(64, 2, 8)), rng.normal(size=(64, 2, 2, 8))
    later = k.copy()
    later[42:] = 9 * rng.normal(size=(22, 2, 8))
    choice = Choice(k=24, sink=2, recent=4, page=4)
    at = jnp.arange(64)
    seen, other = (
        np.asarray(
            choose(None, jnp.asarray(a, jnp.float32), None, choice)(None, jnp.asarray(q), at)
        )[0]
        for a in (k, later)
    )
    np.testing.assert_array_equal(seen[:42], other[:42])
    assert (seen[42:] != other[42:]).any()
    assert not np.triu(seen, 1).any()
    assert (seen[24:].sum(-1) <= 24).all()
    assert all(seen[t, t - 3 : t + 1].all() and seen[t, :2].all() for t in range(4, 64))


@pytest.mark.parametrize(
    ("choose", "page"), [(by_attention, None), (by_attention, 4), (by_page_bounds, 4)]
)
def test_heads_that_choose_for_themselves(choose, page):
    """As a layer with that head alone would."""
    rng = np.random.default_rng(5)
    k, q = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 2, 8), (64, 2, 3, 8)))
    at, alone = jnp.arange(64), Choice(k=24, sink=2, recent=4, page=page)
    together = dataclasses.replace(alone, by_head=True)
    found = np.asarray(choose(None, k, None, together)(None, q, at))
    assert found.shape == (2, 64, 64)
    for h in range(2):
        one = choose(None, k[:, h : h + 1], None, alone)(None, q[:, h : h + 1], at)
        np.testing.assert_array_equal(found[h], one[0])
    assert (found[0] != found[1]).any()


def test_an_indexer_has_one_choice():
    with pytest.raises(InputError, match="choice: got by_head, with an indexer"):
        by_index(None, None, None, Choice(by_head=True))


def test_page_scores_are_a_mean_of_softmaxes():
    logits = jnp.array([[[0.0, 1.0, 9.0], [3.0, 0.0, 9.0]]])
    got = page_scores(logits, jnp.array([[[True, True, False]]]))
    rows = np.exp([[0.0, 1.0], [3.0, 0.0]])
    want = (rows / rows.sum(-1, keepdims=True)).mean(0)
    np.testing.assert_allclose(got[0], [*want, 0.0], rtol=1e-6)


def test_tokens_of_pages():
    got = jax.jit(lambda p: tokens_of_pages(p, 3, first=2))(jnp.array([[2, -1], [0, 1]]))
    assert got.tolist() == [[8, 9, 10, -1, -1, -1], [2, 3, 4, 5, 6, 7]]
