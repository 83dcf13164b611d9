"""Texts to evaluate on: a file, or the prose that ships with Python."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvjax.core.errors import InputError
from kvjax.models.tokenizer import Tokenizer


def read_text(path: str | None) -> tuple[str, str]:
    """A name for the text, with a short hash, and the text.

    None is the prose of the language reference in `pydoc_data.topics`: on every machine that has
    Python, though its wording moves with the Python version.

    Raises:
      InputError: a file that is missing, empty or not UTF-8.
    """
    if path is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(_prose("\n\n".join(topics[name] for name in sorted(topics))))
        return _named("prose of pydoc_data.topics", text), text
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"text {path}", got=error.strerror, expected="a readable file", fix="check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"text {path}",
            got=f"bytes that are not UTF-8 at offset {error.start}",
            expected="plain UTF-8 text",
            fix="convert the file",
        ) from None
    if not text.strip():
        raise InputError(
            f"text {path}", got="no text", expected="some prose", fix="choose another file"
        )
    return _named(Path(path).name, text), text


def _prose(text: str) -> Iterator[str]:
    """Paragraphs that are sentences: no code, tables or lists; each once, on one line."""
    seen = set()
    for paragraph in text.split("\n\n"):
        line = " ".join(paragraph.split())
        plain = sum(c.isalpha() or c in " ,.;'()-" for c in line)
        sentences = line.endswith(".") and line[:1].isupper() and len(line) > 150
        if sentences and paragraph[:1] != " " and plain > 0.95 * len(line) and line not in seen:
            seen.add(line)
            yield line


def _named(name: str, text: str) -> str:
    return f"{name} (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def cut_windows(tokenizer: Tokenizer, text: str, *, context: int, windows: int) -> np.ndarray:
    """`windows` stretches of `context` tokens, int32 `[windows, context]`, spread over the text.

    Each begins with BOS if the model wants one.

    Raises:
      InputError: a text too short for them.
    """
    bos = tokenizer.encode("")
    body = context - len(bos)
    limit = 12 * body * windows  # characters: more than enough for that many tokens
    ids = tokenizer.encode(text if len(text) <= 4 * limit else text[: 4 * limit], bos=False)
    if len(ids) < body * windows:
        raise InputError(
            "text",
            got=f"{len(ids)} tokens",
            expected=f"{body * windows} for {windows} windows of {context}",
            fix="give a longer text (--text) or a shorter --context",
        )
    starts = np.linspace(0, len(ids) - body, windows).astype(int)
    return np.array([[*bos, *ids[s : s + body]] for s in starts], np.int32)
