"""Files of conversations: LoCoMo, REALTALK, LongMemEval, and plain `speaker: text`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kvjax.core.errors import InputError, known
from kvjax.episodes.conversation import Conversation, Question, Utterance
from kvjax.episodes.plain import parse_plain

_LONG = 500  # characters of an assistant's turn, beyond which its sentences are utterances
_SHORT = 10  # characters of a sentence, up to which it is dropped


def read(path: str | os.PathLike, format: str | None = None) -> tuple[Conversation, ...]:
    """The conversations of a file, in its order.

    Args:
      format: "locomo", "realtalk", "longmemeval" or "plain"; by default, told from the content.

    Raises:
      InputError: a file that is not there, not UTF-8, of an unknown format or damaged, or a
        conversation without utterances.

    Example:
      >>> read("locomo10.json")[0].questions[0].evidence  # doctest: +SKIP
      ('D1:3',)
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            str(file),
            got=f"a file that does not open ({error})",
            expected="conversations as UTF-8 text",
            fix="check the path and the encoding",
        ) from error
    return parse(text, format, name=file.stem)


def parse(
    text: str, format: str | None = None, *, name: str = "conversation"
) -> tuple[Conversation, ...]:
    """`read` of text that is already here; `name` is for conversations that bring none."""
    if format is not None and format not in FORMATS:
        raise InputError("format", got=format, expected=known(FORMATS), fix="name one of them")
    looks_like_json = re.match(r"\s*(\{|\[\s*[\[{\]])", text) is not None
    if format == "plain" or (format is None and not looks_like_json):
        found: tuple[Conversation, ...] = (parse_plain(text, name),)
    else:
        data = _json(text, name)
        items = data if isinstance(data, list) else [data]
        chosen = format or _detect(items, name)
        try:
            found = tuple(_READERS[chosen](item, name) for item in items)
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                name,
                got=f"JSON in which something is missing or misplaced ({error!r})",
                expected=f"the format {chosen}",
                fix=f"mend the file, or give another format ({known(FORMATS)})",
            ) from error
    for conversation in found:
        if not conversation.utterances:
            raise _empty(conversation.name)
    if not found:
        raise _empty(name)
    return found


def _detect(items: list[Any], name: str) -> str:
    first = items[0] if items else None
    for format, marks in _MARKS.items():
        if isinstance(first, dict) and all(mark in first for mark in marks):
            return format
    if items == []:
        raise _empty(name)
    raise InputError(
        name,
        got="JSON that looks like none of the known formats",
        expected=known(FORMATS),
        fix="convert it, the simplest is a text file of `speaker: text` lines",
    )


def _locomo(item: dict[str, Any], name: str) -> Conversation:
    return _of_sessions(str(item.get("sample_id", name)), item["conversation"], item.get("qa", ()))


def _realtalk(item: dict[str, Any], name: str) -> Conversation:
    return _of_sessions(name, item, item.get("qa", ()))


def _of_sessions(name: str, body: dict[str, Any], qa: Iterable[dict]) -> Conversation:
    """LoCoMo's and REALTALK's sessions, by number; those without turns are none."""
    numbers = sorted(int(m[1]) for key in body if (m := re.fullmatch(r"session_(\d+)", key)))
    sessions = []
    for k in numbers:
        date = body.get(f"session_{k}_date_time", "")
        sessions.append([_turn(turn, date) for turn in body[f"session_{k}"]])
    return _conversation(name, sessions, tuple(map(_question, qa)))


def _turn(turn: dict[str, Any], date: str) -> Utterance:
    return Utterance(
        speaker=turn["speaker"],
        text=turn["clean_text"] if "clean_text" in turn else turn["text"],
        id=turn.get("dia_id", ""),
        date=turn.get("date_time", date),
        caption=turn.get("blip_caption") or "",
    )


def _question(item: dict[str, Any]) -> Question:
    """An answer may be a number; one that is missing (adversarial questions) is ""."""
    given = item.get("evidence") or ()
    given = [given] if isinstance(given, str) else given
    evidence = [id for text in given for id in _ids(str(text))]
    return Question(
        text=item["question"],
        answer=_answer(item),
        evidence=tuple(dict.fromkeys(evidence)),
        category=str(item.get("category", "")),
    )


def _answer(item: dict[str, Any]) -> str:
    answer = item.get("answer")
    return "" if answer is None else str(answer)


def _ids(text: str) -> list[str]:
    """The ids in one entry: the data has "D8:6; D9:17", "D:11:26" and "D30:05" too."""
    pairs = re.findall(r"D:?(\d+):(\d+)", text)
    return [f"D{int(a)}:{int(b)}" for a, b in pairs] or [text]


def _longmemeval(item: dict[str, Any], name: str) -> Conversation:
    """One question with its haystack. Evidence: the turns marked `has_answer`, or else all turns
    of the sessions that hold the answer."""
    dates = item.get("haystack_dates") or [""] * len(item["haystack_sessions"])
    ids = item.get("haystack_session_ids") or [""] * len(item["haystack_sessions"])
    answer_ids = set(item.get("answer_session_ids") or ())
    sessions: list[list[Utterance]] = []
    marked: list[str] = []
    within: list[str] = []
    for k, (turns, date, id) in enumerate(
        zip(item["haystack_sessions"], dates, ids, strict=True), start=1
    ):
        sessions.append([])
        for t, turn in enumerate(turns, start=1):
            pieces = _pieces(turn, f"D{k}:{t}", date)
            sessions[-1] += pieces
            marked += [u.id for u in pieces if turn.get("has_answer")]
            within += [u.id for u in pieces if id in answer_ids]
    question = Question(
        text=item["question"],
        answer=_answer(item),
        evidence=tuple(marked or within),
        category=item.get("question_type", ""),
        date=item.get("question_date", ""),
    )
    return _conversation(str(item.get("question_id", name)), sessions, (question,))


def _pieces(turn: dict[str, str], id: str, date: str) -> list[Utterance]:
    """A turn; a long one of the assistant as its sentences, the very short ones left out."""
    text, assistant = turn["content"], turn["role"] == "assistant"
    speaker = "Assistant" if assistant else "User"
    if not assistant or len(text) <= _LONG:
        return [Utterance(speaker, text, id, date)]
    sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+", text)]
    kept = [s for s in sentences if len(s) > _SHORT] or [text]
    return [Utterance(speaker, s, f"{id}.{i}", date) for i, s in enumerate(kept, start=1)]


def _conversation(
    name: str, sessions: list[list[Utterance]], questions: tuple[Question, ...]
) -> Conversation:
    utterances = tuple(u for session in sessions for u in session)
    starts, at = [], 0
    for session in filter(None, sessions):
        starts.append(at)
        at += len(session)
    return Conversation(name, utterances, questions, tuple(starts) or (0,))


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(
            name,
            got=f"JSON that does not parse ({error})",
            expected="a whole JSON file",
            fix='fetch it again, or give format "plain" if it is a text file',
        ) from error


def _empty(name: str) -> InputError:
    return InputError(
        name, got="no utterances", expected="one or more", fix="check that this is the right file"
    )


_READERS: dict[str, Callable[[dict[str, Any], str], Conversation]] = {
    "locomo": _locomo,
    "realtalk": _realtalk,
    "longmemeval": _longmemeval,
}
_MARKS = {
    "locomo": ("conversation",),
    "realtalk": ("name", "session_1"),
    "longmemeval": ("haystack_sessions",),
}
FORMATS = (*_READERS, "plain")
