"""How the turns of a conversation read: the model's chat format, or `speaker: text`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvjax.episodes.conversation import Conversation
from kvjax.episodes.prompt import context

if TYPE_CHECKING:
    from kvjax.models.tokenizer import Tokenizer

USER, ASSISTANT = "user", "assistant"  # speakers of a chat; all others are people in a file


@dataclasses.dataclass(frozen=True)
class Turns:
    """The texts between which turns stand.

    Attributes:
      opening: before the first turn of a chat; BOS is the tokenizer's business.
      told: before and after what the model is told at the start (a conversation to answer about).
      begin: before a turn, by speaker. end: after each.
      stop: text that ends an answer besides the model's own tokens, or None.
    """

    opening: str
    told: tuple[str, str]
    begin: Mapping[str, str]
    end: str
    stop: str | None = None

    def history(self, conversation: Conversation) -> str:
        """All that was said: what people of a file said as one text, a chat turn by turn.

        Example:
          >>> from kvjax.episodes import Utterance
          >>> said = Utterance("user", "Tea?"), Utterance("assistant", "Yes")
          >>> PLAIN.history(Conversation("chat", said)).splitlines()[2:]
          ['User: Tea?', 'Assistant: Yes']
        """
        said = conversation.utterances
        chat = next((i for i, u in enumerate(said) if u.speaker in self.begin), len(said))
        text = self.opening
        if chat:
            starts = tuple(start for start in conversation.starts if start < chat)
            people = dataclasses.replace(conversation, utterances=said[:chat], starts=starts)
            text = self.told[0] + context(people) + self.told[1]
        for u in said[chat:]:
            role = u.speaker if u.speaker in self.begin else USER
            text += self.begin[role] + u.text + self.end
        return text

    def question(self, text: str) -> str:
        """A user's turn, up to where the answer begins."""
        header = self.begin[ASSISTANT]
        return self.begin[USER] + text + self.end + (header.rstrip(" ") if self.stop else header)


PLAIN = Turns(
    "The following is a conversation between User and Assistant.\n\n",
    ("", "\n"),
    {USER: "User: ", ASSISTANT: "Assistant: "},
    "\n",
    stop="\n",
)


def turns_of(tokenizer: Tokenizer) -> Turns:
    """The model's chat format where it has one that is known here, else `PLAIN`."""
    template = tokenizer.chat_template or ""
    if "<|im_start|>" in template:
        begin = {role: f"<|im_start|>{role}\n" for role in (USER, ASSISTANT)}
        added = len(tokenizer.encode(""))  # BOS, where the model has one
        opening = tokenizer.decode(tokenizer.chat([])[added:], special=True)
        opening = opening.removesuffix(begin[ASSISTANT])
        told = ("<|im_start|>system\n", "<|im_end|>\n")
        return Turns(opening, told, begin, "<|im_end|>\n")
    if "<start_of_turn>" in template:  # Gemma has no system role
        begin = {USER: "<start_of_turn>user\n", ASSISTANT: "<start_of_turn>model\n"}
        told = (begin[USER], "<end_of_turn>\n")
        return Turns("", told, begin, "<end_of_turn>\n")
    return PLAIN
