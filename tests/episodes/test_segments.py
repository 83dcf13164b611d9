"""Segments, their texts, the prompts made of them, and embedders."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from kvjax.core.errors import InputError
from kvjax.episodes.conversation import Conversation, Question, Utterance
from kvjax.episodes.embed import embed, of_model
from kvjax.episodes.prompt import INSTRUCTION, context, patched_prompt, question_prompt
from kvjax.episodes.segment import cut, evidence_segments
from kvjax.models.tokenizer import Tokenizer

TALK = Conversation(
    "tea",
    tuple(
        Utterance("AB"[i % 2], f"line {i}", f"D{1 + i // 3}:{1 + i % 3}", f"{1 + i // 3} May")
        for i in range(7)
    ),
    starts=(0, 3, 6),
)


def test_segments_cross_sessions_and_lose_nothing():
    segments = cut(TALK.utterances)
    assert [(s.first, s.stop) for s in segments] == [(0, 4), (4, 7)]
    assert segments[1].text == 'A said, "line 4"\nB said, "line 5"\nA said, "line 6"\n'
    assert "".join(s.text for s in cut(TALK.utterances, 3)) == "".join(s.text for s in segments)
    assert cut(()) == ()
    assert [s.text for s in cut(TALK.utterances[:1])] == ['A said, "line 0"\n']
    with pytest.raises(InputError, match="width: got 0"):
        cut(TALK.utterances, 0)


def test_evidence_is_found():
    assert evidence_segments(TALK, ("D2:2", "D1:1", "D1:2")) == (0, 1)
    assert evidence_segments(TALK, ("D2:2",), width=2) == (2,)
    assert evidence_segments(TALK, ("D", "D9:1", "")) == ()


def test_patched_prompt():
    first, second = (s.text for s in cut(TALK.utterances[:2], 1))
    assert patched_prompt([first, second], "<end>") == (
        INSTRUCTION + '<end>A said, "line 0"\n\nB said, "line 1"\n\n'
    )


def test_context_has_every_line_and_date_once():
    text = context(TALK)
    for i in range(7):
        assert text.count(f'{"AB"[i % 2]} said, "line {i}"\n') == 1
    assert [text.count(f"\nDATE: {k} May\nCONVERSATION:\n") for k in (1, 2, 3)] == [1, 1, 1]
    assert "between A and B," in text
    undated = context(Conversation("x", (Utterance("A", "Look!", caption="a cat"),)))
    assert undated.endswith('\nCONVERSATION:\nA said, "Look!" and shared a cat.\n')
    assert "DATE" not in undated


def test_temporal_questions_ask_for_a_date():
    asked = [question_prompt(Question("When?", category=c)) for c in ("1", "2")]
    assert asked[1] == asked[0] + " Use DATE of CONVERSATION to answer with an approximate date."
    assert asked[0].endswith("Question: When?")


def test_any_function_may_embed():
    got = embed(lambda texts: [[len(t), 0.0] for t in texts], ["a", "bcd"])
    np.testing.assert_array_equal(got, [[1, 0], [1, 0]])
    assert got.dtype == np.float32
    with pytest.raises(InputError, match=r"got shape \(1, 2\) for 2 texts"):
        embed(lambda texts: np.ones((1, 2)), ["a", "b"])
    for bad in (0.0, np.nan, np.inf):
        with pytest.raises(InputError, match=r"embedding of text 1: .*'b'"):
            embed(lambda texts, bad=bad: [[1.0], [bad]], ["a", "b"])


def test_a_models_own_embeddings():
    words = {w: i for i, w in enumerate(["<unk>", "tea", "milk", "sugar"])}
    backend = Backend(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    table = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    embedder = of_model(type("Weights", (), {"embed": table})(), Tokenizer(backend))
    got = embed(embedder, ["tea milk tea", "sugar"])
    want = np.stack([table[[1, 2, 1]].astype(np.float64).mean(0), table[3]])
    np.testing.assert_allclose(got, want / np.linalg.norm(want, axis=1)[:, None], atol=1e-6)
    with pytest.raises(InputError, match="embedding of text 1"):
        embed(embedder, ["tea", ""])
