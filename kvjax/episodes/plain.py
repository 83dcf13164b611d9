"""Conversations as people write them down: one `speaker: text` after the other."""

from __future__ import annotations

import re

from kvjax.core.errors import InputError
from kvjax.episodes.conversation import Conversation, Utterance

_DAY = re.compile(r"#+\s*(?P<a>.*\d.*)|\[(?P<b>[^\]]*\d[^\]]*)\]\s*")
_SPEAKER = re.compile(
    r"(?:\[(?P<date>[^\]]*\d[^\]]*)\]\s*)?"
    r"(?P<speaker>[^\W_][^:\s]*(?: [^:\s]+){0,2}):(?:\s+(?P<text>.*)|)"
)


def parse_plain(text: str, name: str = "conversation") -> Conversation:
    """A conversation from lines, all of them kept.

        # 1 May 2024                     a new session and its date; [1 May 2024] does too
        Ana: Shall we have tea?          an utterance
        Ben: Yes.                        another;
        The green one, please.           a line that names no speaker continues it,
          Note: not the black one.       and so does any line that is indented
        [10:30] Ana: Here you are.       an utterance with a date of its own

    A speaker is one to three words before a colon that ends the line or has a space behind it.
    A date is any text with a digit, kept as it is written. Blank lines within an utterance are
    kept, others mean nothing. Utterances get the ids "D1:1", "D1:2", ... of session and turn.

    Raises:
      InputError: text before the first speaker, a date line that nothing follows.

    Example:
      >>> talk = parse_plain("# 1 May\\nAna: Tea?\\nBen: Yes.\\nThe green one.")
      >>> talk.utterances[1]
      Utterance(speaker='Ben', text='Yes.\\nThe green one.', id='D1:2', date='1 May', caption='')
    """
    sessions: list[tuple[str, list[tuple[str, str, list[str]]]]] = []  # date, speaker, lines
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        turns = sessions[-1][1] if sessions else []
        if day := _DAY.fullmatch(line):
            sessions.append(((day["a"] or day["b"]).strip(), []))
        elif opened := _SPEAKER.fullmatch(line):
            if not sessions:
                sessions.append(("", []))
            date, turns = sessions[-1]
            turns.append((opened["date"] or date, opened["speaker"], [opened["text"] or ""]))
        elif turns:
            turns[-1][2].append(line.strip())
        elif line.strip():
            raise InputError(
                f"line {number} of {name}",
                got=repr(line.strip()[:60]),
                expected="`speaker: text` or a line with a date",
                fix="name who speaks first, or give the format if this is no text file",
            )
    utterances: list[Utterance] = []
    starts: list[int] = []
    for k, (date, turns) in enumerate(sessions, start=1):
        if not turns:
            raise InputError(
                name,
                got=f"the date {date!r} with no utterance after it",
                expected="one or more",
                fix="take the line out",
            )
        starts.append(len(utterances))
        for t, (when, speaker, lines) in enumerate(turns, start=1):
            utterances.append(Utterance(speaker, "\n".join(lines).strip(), f"D{k}:{t}", when))
    return Conversation(name, tuple(utterances), starts=tuple(starts) or (0,))
