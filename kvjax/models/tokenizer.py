"""Text to token ids and back, from tokenizer.json or from what a GGUF file says about its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as Backend
from tokenizers import models as backends
from tokenizers import pre_tokenizers

from kvjax.core.errors import InputError
from kvjax.models.gguf_config import eos_ids
from kvjax.models.gguf_tokenizer import build, damaged, read_backend

if TYPE_CHECKING:
    from kvjax.models.gguf_file import GGUFFile

_SYSTEM_PROMPTS = {
    "named SmolLM": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are Qwen": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
}


@dataclass(frozen=True)
class Tokenizer:
    """Token ids of one model.

    Attributes:
      backend: a `tokenizers.Tokenizer`; it adds BOS itself where the model wants one.
      bos_id: None when the model has none.
      eos_ids: ids that end an answer.
      chat_template: the model's own template text; it decides which chat format `chat` writes.

    Example:
      >>> tokenizer = load("smollm2-135m").tokenizer  # doctest: +SKIP
      >>> tokenizer.decode(tokenizer.encode("Call me Ishmael."))  # doctest: +SKIP
      'Call me Ishmael.'
    """

    backend: Backend
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    @classmethod
    def from_folder(cls, path: str | os.PathLike) -> Tokenizer:
        """From the tokenizer.json of a Hugging Face folder, and its config files if present."""
        folder = Path(path)
        settings: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):
            settings |= {k: v for k, v in _optional_json(folder / name).items() if v is not None}
        eos = settings.get("eos_token_id", ())
        template = _optional_json(folder / "tokenizer_config.json").get("chat_template")
        jinja = folder / "chat_template.jinja"
        if template is None and jinja.is_file():
            template = jinja.read_text(encoding="utf-8")
        return cls(
            backend=read_backend(folder / "tokenizer.json"),
            bos_id=settings.get("bos_token_id"),
            eos_ids=tuple(eos) if isinstance(eos, list) else (eos,) if eos != () else (),
            chat_template=template if isinstance(template, str) else None,
        )

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """Built from a GGUF file's vocabulary (and kept in the cache folder when that is slow)."""
        fields = file.fields
        return cls(
            backend=build(file),
            bos_id=fields.get("tokenizer.ggml.bos_token_id"),
            eos_ids=eos_ids(file),
            chat_template=fields.get("tokenizer.chat_template"),
        )

    @classmethod
    def of_letters(cls, vocab_size: int) -> Tokenizer:
        """A token per character from the space on, id 0 for all others: for models without one.

        Example:
          >>> Tokenizer.of_letters(96).encode("Ab")
          [34, 67]
        """
        letters = {"[UNK]": 0} | {chr(32 + i): i + 1 for i in range(vocab_size - 1)}
        backend = Backend(backends.WordLevel(letters, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        return cls(backend)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of `text`; special tokens in it count as such.

        Args:
          text: any string.
          bos: begin with BOS if the model is one that wants it; False for a continuation.
        """
        return self.backend.encode(text, add_special_tokens=bos).ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of `ids`; control tokens are left out unless `special`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation, ready for the model's next answer.

        Args:
          messages: `{"role": "system" | "user" | "assistant", "content": text}` in order.

        Raises:
          InputError: when the model has no chat format that is known here.
        """
        template = self.chat_template or ""
        if "<|im_start|>" in template:
            return self.encode(_chatml(messages, template))
        if "<start_of_turn>" in template:
            return self.encode(_gemma_turns(messages))
        raise InputError(
            "chat",
            got="a model without a chat template" if not template else "an unknown chat template",
            expected="ChatML (SmolLM2, Qwen) or Gemma turns",
            fix="give the prompt as plain text with encode()",
        )

    def stream(self) -> StreamDecoder:
        """A decoder for printing ids as they come."""
        return StreamDecoder(self)


class StreamDecoder:
    """Turns ids into pieces of text, holding back bytes until they are whole characters.

    Example:
      >>> stream = tokenizer.stream()  # doctest: +SKIP
      >>> for i in ids: print(stream.push(i), end="", flush=True)  # doctest: +SKIP
      >>> print(stream.finish())  # doctest: +SKIP
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # ids before this one are on the screen

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is still open."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """What is left, with a replacement character for bytes that never became whole."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        # Decoded together with the ids shown last, because a piece's text hangs on its left.
        shown = self._tokenizer.decode(self._ids[: self._shown])
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(shown) :]


def _chatml(messages, template: str) -> str:
    turns = [(m["role"], m["content"]) for m in messages]
    if not turns or turns[0][0] != "system":
        turns[:0] = [("system", text) for mark, text in _SYSTEM_PROMPTS.items() if mark in template]
    body = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return body + "<|im_start|>assistant\n"


def _gemma_turns(messages) -> str:
    """Gemma has no system role: its text opens the first user turn."""
    turns = [(m["role"], m["content"]) for m in messages]
    if len(turns) > 1 and turns[0][0] == "system":
        turns[:2] = [(turns[1][0], turns[0][1] + "\n\n" + turns[1][1])]
    names = {"assistant": "model"}
    body = "".join(
        f"<start_of_turn>{names.get(role, role)}\n{content.strip()}<end_of_turn>\n"
        for role, content in turns
    )
    return body + "<start_of_turn>model\n"


def _optional_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, error) from error
    return data if isinstance(data, dict) else {}
