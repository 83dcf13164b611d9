"""Texts to evaluate on: a file, or the prose that ships with Python."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvjax.core.errors import InputError
from kvjax.models.load import Model, load
from kvjax.models.tokenizer import Tokenizer


def load_readable(name: str) -> Model:
    """`load`; a model without a tokenizer, as tests have, reads a token per letter and has room for
    4096 of them."""
    model = load(name)
    if model.tokenizer is not None:
        return model
    config = dataclasses.replace(model.config, max_positions=4096)
    letters = Tokenizer.of_letters(config.vocab_size)
    return dataclasses.replace(model, config=config, tokenizer=letters)


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


def read_docstrings() -> tuple[str, str]:
    """A name and a text: the sentences in the docstrings of Python's standard library.

    Another text than `read_text(None)`, so that one can be calibrated on and the other tested on.
    """
    text = "\n\n".join(s for path in _library() for s in dict.fromkeys(_sentences_of(path)))
    return _named("docstrings of the standard library", text), text


def sentences() -> list[str]:
    """Sentences of Python's own documentation: the language reference that ships with it, then the
    docstrings of the standard library. Each once, whatever its case, in a fixed order for one
    version of Python."""
    _, reference = read_text(None)
    found = {s.lower(): s for s in _split(reference)}
    for path in _library():
        found.update((s.lower(), s) for s in _sentences_of(path))
    return list(found.values())


def _library() -> Iterator[Path]:
    root, other = Path(sysconfig.get_path("stdlib")), {"site-packages", "dist-packages", "idlelib"}
    for path in sorted(root.rglob("*.py")):
        if not (other | {"test", "tests"}) & set(path.relative_to(root).parts):
            yield path


def _sentences_of(path: Path) -> Iterator[str]:
    for text in _docstrings(path):
        yield from _split(text)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in string literals
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # files made for lib2to3 to stumble on
        return
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def _split(text: str) -> Iterator[str]:
    """Sentences of 40 to 300 characters that are mostly words."""
    for paragraph in text.split("\n\n"):
        line = " ".join(paragraph.split())
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", line):
            words = sum(c.isalpha() or c in " ,.;'()-`" for c in sentence)
            if 40 <= len(sentence) <= 300 and sentence[-1] in ".!?" and words > 0.9 * len(sentence):
                yield sentence


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


def same_text(one: str, other: str) -> bool:
    """Whether two names that `read_text` gave are of one text: by hash, or by name where `one` has
    none.

    Example:
      >>> same_text("a.txt (sha256 12)", "b.txt (sha256 12)"), same_text("a.txt", "b.txt")
      (True, False)
    """
    name, _, seen = one.partition(" (sha256 ")
    another, _, now = other.partition(" (sha256 ")
    return seen == now if seen else name == another


def model_windows(model: Model, text: str, *, context: int, windows: int) -> np.ndarray:
    """`cut_windows` with a model's own tokenizer.

    Raises:
      InputError: a model without one, or with fewer positions; a text too short.
    """
    if model.tokenizer is None:
        raise InputError(
            "model",
            got="one without a tokenizer",
            expected="a tokenizer.json beside the weights",
            fix="add it to the folder",
        )
    if context > model.config.max_positions:
        raise InputError(
            "context",
            got=f"{context} tokens",
            expected=f"at most the {model.config.max_positions} positions of {model.config.name}",
            fix="use a shorter context, or a model with more positions",
        )
    return cut_windows(model.tokenizer, text, context=context, windows=windows)


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
