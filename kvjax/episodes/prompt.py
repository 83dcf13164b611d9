"""Texts for the language model: what scores a cache, the context, and the question."""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.episodes.conversation import Conversation, Question, Utterance
from kvjax.episodes.segment import said

INSTRUCTION = (
    "\n\nExtract essential information from this conversation segment. Identify speaker names, "
    "personas, key events with dates/times, personal details, commitments, opinions, "
    "relationships, emotional moments, and unique experiences."
)
ASK_FOR_DATE = " Use DATE of CONVERSATION to answer with an approximate date."
_TEMPORAL = "2"  # the category of LoCoMo


def patched_prompt(medoids: Sequence[str], postfix: str = "") -> str:
    """What is read after every block to score the cache for one episode, then forgotten.

    It looks as if the assistant were asked for the essentials and answered with the segments that
    are most like the episode.

    Args:
      medoids: texts of those segments in the order of the conversation.
      postfix: how the model's chat format ends a user's turn and begins the assistant's, such as
        "<|im_end|>\\n<|im_start|>assistant\\n".

    Example:
      >>> patched_prompt(['Ana said, "Tea?"\\n'], "<end>").split("unique ")[1]
      'experiences.<end>Ana said, "Tea?"\\n\\n'

    Source: EpiCache (arXiv 2509.17396), and the code released with it.
    """
    return INSTRUCTION + postfix + "".join(text + "\n" for text in medoids)


def context(conversation: Conversation) -> str:
    """The whole conversation with dates and captions of images, session by session.

    Example:
      >>> tea = Utterance("Ana", "Tea?", date="1 May", caption="a teapot")
      >>> print(context(Conversation("tea", (tea, Utterance("Ben", "Yes.", date="1 May")))))
      Below is a conversation between Ana and Ben, with the date of each session.
      <BLANKLINE>
      DATE: 1 May
      CONVERSATION:
      Ana said, "Tea?" and shared a teapot.
      Ben said, "Yes."
      <BLANKLINE>
    """
    names = " and ".join(conversation.speakers)
    opening = f"Below is a conversation between {names}, with the date of each session.\n"
    return opening + "".join(map(_session, conversation.sessions))


def question_prompt(question: Question) -> str:
    """The instruction for a short answer, and the question; temporal ones of LoCoMo ask for a
    date.

    Example:
      >>> question_prompt(Question("When was tea?", category="2")).split("Question: ")[1]
      'When was tea? Use DATE of CONVERSATION to answer with an approximate date.'
    """
    hint = ASK_FOR_DATE if question.category == _TEMPORAL else ""
    return (
        "\n\nAnswer the question below in a few words, with exact words from the conversations "
        f"where possible.\n\nQuestion: {question.text}{hint}"
    )


def _session(utterances: tuple[Utterance, ...]) -> str:
    date = utterances[0].date if utterances else ""
    heading = f"\nDATE: {date}\nCONVERSATION:\n" if date else "\nCONVERSATION:\n"
    return heading + "".join(map(_line, utterances))


def _line(utterance: Utterance) -> str:
    """As in a segment, with what was shared."""
    shared = f" and shared {utterance.caption}." if utterance.caption else ""
    return said(utterance).rstrip("\n") + shared + "\n"
