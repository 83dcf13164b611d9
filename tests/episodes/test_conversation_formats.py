"""Readers of conversations, on made-up files of each shape."""

from __future__ import annotations

import json

import pytest

from kvjax.core.errors import InputError
from kvjax.episodes.conversation import Conversation, Question, Utterance
from kvjax.episodes.formats import parse, read

LOCOMO = {
    "sample_id": "conv-1",
    "conversation": {
        "speaker_a": "Ana",
        "speaker_b": "Ben",
        "session_10_date_time": "3 May",
        "session_10": [{"speaker": "Ben", "dia_id": "D10:1", "text": "Bye."}],
        "session_2_date_time": "2 May",
        "session_2": [],
        "session_1_date_time": "1 May",
        "session_1": [
            {"speaker": "Ana", "dia_id": "D1:1", "text": "Look!", "blip_caption": "a cat"},
            {"speaker": "Ben", "dia_id": "D1:2", "text": "Nice."},
        ],
    },
    "qa": [
        {"question": "When?", "answer": 2022, "evidence": ["D1:1; D10:01", "D:1:2"], "category": 2},
        {"question": "Who?", "adversarial_answer": "Ben", "evidence": ["D"], "category": 5},
    ],
}
REALTALK = {
    "name": {"speaker_1": "Ana", "speaker_2": "Ben"},
    "session_1": [
        {"clean_text": "Hi", "speaker": "Ana", "date_time": "1.5., 10:00", "dia_id": "D1:1"},
        {"clean_text": "", "speaker": "Ben", "date_time": "1.5., 10:01", "dia_id": "D1:2"},
    ],
    "events_session_1": {"Ana": []},
    "qa": [{"question": "Who?", "answer": "Ana", "evidence": ["D1:1"], "category": 1}],
}
LONG = "Yes. " + "This is a sentence of some length! " * 14 + "No way out of here"
LONGMEMEVAL = {
    "question_id": "q1",
    "question_type": "multi-session",
    "question": "What?",
    "answer": 3,
    "question_date": "2023/06/01",
    "haystack_session_ids": ["s1", "s2"],
    "haystack_dates": ["2023/05/01", "2023/05/02"],
    "haystack_sessions": [
        [{"role": "user", "content": LONG}, {"role": "assistant", "content": LONG}],
        [{"role": "user", "content": "Three.", "has_answer": True}],
    ],
    "answer_session_ids": ["s2"],
}


def test_locomo():
    (talk,) = parse(json.dumps([LOCOMO]))
    assert talk.name == "conv-1"
    assert talk.utterances == (
        Utterance("Ana", "Look!", "D1:1", "1 May", "a cat"),
        Utterance("Ben", "Nice.", "D1:2", "1 May"),
        Utterance("Ben", "Bye.", "D10:1", "3 May"),
    )
    assert talk.starts == (0, 2)
    assert talk.questions == (
        Question("When?", "2022", ("D1:1", "D10:1", "D1:2"), "2"),
        Question("Who?", "", ("D",), "5"),
    )


def test_what_is_no_string():
    """Names and answers may be numbers, answers missing, and evidence one text."""
    item = {**LOCOMO, "sample_id": 7, "qa": [{**LOCOMO["qa"][0], "evidence": "D1:1; D1:2"}]}
    (talk,) = parse(json.dumps(item))
    assert talk.name == "7"
    assert talk.questions[0].evidence == ("D1:1", "D1:2")
    (talk,) = parse(json.dumps({**LONGMEMEVAL, "answer": None}))
    assert talk.questions[0].answer == ""


def test_realtalk():
    (talk,) = parse(json.dumps(REALTALK), name="Chat_1")
    assert talk.name == "Chat_1"
    assert talk.utterances[1] == Utterance("Ben", "", "D1:2", "1.5., 10:01")
    assert talk.questions[0].evidence == ("D1:1",)


def test_longmemeval():
    (talk,) = parse(json.dumps([LONGMEMEVAL]))
    assert len(LONG) > 500
    assert talk.speakers == ("User", "Assistant")
    assert talk.utterances[0] == Utterance("User", LONG, "D1:1", "2023/05/01")
    pieces = talk.sessions[0][1:]
    assert [p.id for p in pieces] == [f"D1:2.{i}" for i in range(1, 16)]
    assert pieces[0].text == "This is a sentence of some length!"  # "Yes." is too short
    assert pieces[-1].text == "No way out of here"
    asked = Question("What?", "3", ("D2:1",), "multi-session", "2023/06/01")
    assert talk.questions == (asked,)
    unmarked = json.loads(json.dumps(LONGMEMEVAL))
    del unmarked["haystack_sessions"][1][0]["has_answer"]
    unmarked["answer_session_ids"] = ["s1"]
    (talk,) = parse(json.dumps(unmarked), "longmemeval")
    assert talk.questions[0].evidence == tuple(u.id for u in talk.sessions[0])


def test_plain():
    text = (
        "\ufeff# 2024-05-01\r\n\r\nAna: Tea?\r\nOr coffee: black\r\n  Ben: no, a quotation\r\n\r\n"
        "see https://a.b/c\r\nDr. Ben Ito:\r\nTea. [laughs]\r\n[2 May]\r\n[10:30] Ana: Good.\r\n"
    )
    (talk,) = parse(text.lstrip("\ufeff"))
    assert talk.utterances == (
        Utterance("Ana", "Tea?", "D1:1", "2024-05-01"),
        Utterance(
            "Or coffee", "black\nBen: no, a quotation\n\nsee https://a.b/c", "D1:2", "2024-05-01"
        ),
        Utterance("Dr. Ben Ito", "Tea. [laughs]", "D1:3", "2024-05-01"),
        Utterance("Ana", "Good.", "D2:1", "10:30"),
    )
    assert talk.starts == (0, 3)
    assert parse("Ana: [1] is a JSON list: [{}]")[0].utterances[0].text.startswith("[1]")
    assert parse("[1 May]\nAna: Hi")[0].utterances[0].date == "1 May"


def test_read(tmp_path):
    file = tmp_path / "talk.txt"
    file.write_bytes("\ufeffAna: Grüße".encode())
    assert read(file) == (Conversation("talk", (Utterance("Ana", "Grüße", "D1:1"),)),)
    file.write_bytes("Ana: Grüße".encode("latin-1"))
    with pytest.raises(InputError, match="does not open"):
        read(file)
    with pytest.raises(InputError, match="no_such"):
        read(tmp_path / "no_such.txt")


@pytest.mark.parametrize(
    ("text", "format", "message"),
    [
        ("", None, "conversation: got no utterances"),
        ("[]", None, "got no utterances"),
        ("[]", "locomo", "got no utterances"),
        ('{"a": 1}', None, "none of the known formats; expected one of locomo, .*, plain"),
        ('{"a": 1', None, "does not parse"),
        ("[[1]]", None, "none of the known formats"),
        ('{"conversation": {}}', None, "got no utterances"),
        ('{"conversation": {"session_1": [{}]}}', None, "missing or misplaced.*'speaker'"),
        ('{"conversation": 3}', None, "missing or misplaced"),
        (
            '{"conversation": {"session_1": [{"speaker": "A", "text": null}]}}',
            None,
            "utterance 0 of .*text None; expected strings",
        ),
        (
            '{"haystack_sessions": [[]], "haystack_dates": ["a", "b"], "question": "?"}',
            None,
            "missing or misplaced",
        ),
        (
            '{"conversation": {"session_1": [{"speaker": "A", "text": "x"}]}, "qa": [{"question": 1}]}',
            None,
            "question 0 of .*text 1.*; expected strings",
        ),
        ("Just a text.", None, "line 1 of conversation: got 'Just a text.'"),
        ("# 1 May\n# 2 May\nAna: Hi", None, "date '1 May' with no utterance"),
        ("Ana: Hi", "locomo", "does not parse"),
        ("Ana: Hi", "csv", "format: got csv; expected one of locomo, realtalk, longmemeval, plain"),
    ],
)
def test_what_is_refused(text, format, message):
    with pytest.raises(InputError, match=message):
        parse(text, format)


def test_conversations_are_checked():
    two = (Utterance("A", "x", "1"), Utterance("B", "y", "1"))
    with pytest.raises(InputError, match="got 1 twice"):
        Conversation("c", two)
    for starts in ((1,), (0, 2), (0, 1, 1), ()):
        with pytest.raises(InputError, match="starts of conversation c"):
            Conversation("c", (two[0], Utterance("B", "y")), starts=starts)
    empty = Conversation("new", ())
    assert (empty.sessions, empty.speakers, empty.index_of("")) == (((),), (), None)
