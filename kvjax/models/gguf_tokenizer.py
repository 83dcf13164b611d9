"""A `tokenizers` back end rebuilt from the vocabulary that a GGUF file carries."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from kvjax.core.errors import InputError, known
from kvjax.models.hub import home

if TYPE_CHECKING:
    from kvjax.models.gguf_file import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build(file: GGUFFile) -> Backend:
    """The tokenizer of a GGUF file; one that is slow to build is kept in the cache folder.

    Raises:
      InputError: when the file holds none, one of another kind, or a damaged one.
    """
    fields = file.fields
    _check(file)
    try:
        if fields["tokenizer.ggml.model"] == "gpt2":
            return _byte_bpe(fields)
        path = home() / "tokenizers" / f"{_fingerprint(fields)}.json"
        with contextlib.suppress(InputError):  # a damaged copy is built anew
            if path.is_file():
                return read_backend(path)
        backend = _sentencepiece_bpe(fields)
    except InputError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise damaged(file.path, error) from error
    _keep(backend, path)
    return backend


def _check(file: GGUFFile) -> None:
    """The parts of the vocabulary are there, and as long as each other."""
    kinds = {"gpt2": "merges", "llama": "scores"}
    kind = file.fields.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(
            f"tokenizer.ggml.model of {file.path}",
            got=repr(kind),
            expected=known(kinds),
            fix="use a file with such a tokenizer",
        )
    lists = {
        k: file.fields.get(f"tokenizer.ggml.{k}") for k in ("tokens", "token_type", kinds[kind])
    }
    lengths = {k: len(v) if isinstance(v, (list, np.ndarray)) else None for k, v in lists.items()}
    alike = {n for k, n in lengths.items() if k != "merges"}
    if None in lengths.values() or len(alike) > 1:
        raise InputError(
            f"tokenizer of {file.path}",
            got=", ".join(f"{n} {k}" for k, n in lengths.items()),
            expected="all of them, one of each per token",
            fix="fetch or convert the file again",
        )


def _fingerprint(fields: Mapping[str, Any]) -> str:
    digest = hashlib.sha256("\0".join(fields["tokenizer.ggml.tokens"]).encode())
    for key in ("scores", "token_type"):
        digest.update(fields[f"tokenizer.ggml.{key}"].tobytes())
    names = ("add_bos_token", "bos_token_id", "unknown_token_id", "add_space_prefix")
    digest.update(f"1 {[fields.get(f'tokenizer.ggml.{name}') for name in names]}".encode())
    return digest.hexdigest()[:32]


def _keep(backend: Backend, path: Path) -> None:
    """Saves in one step; a folder that cannot be written only costs time at the next start."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            backend.save(str(Path(folder, path.name)), pretty=False)
            os.replace(Path(folder, path.name), path)
    except OSError:
        return


def _byte_bpe(fields: Mapping[str, Any]) -> Backend:
    """GPT-2 style: bytes as printable characters, merges in the file."""
    name = fields.get("tokenizer.ggml.pre", "gpt-2")
    splits = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), _bytes(regex=True)],
        "gpt-2": [_bytes(regex=True)],
        "default": [_bytes(regex=True)],
        "llama-bpe": [_split(_WORDS % "{1,3}"), _bytes(regex=False)],
        "qwen2": [_split(_WORDS % ""), _bytes(regex=False)],
    }
    if name not in splits:
        raise InputError(
            "tokenizer.ggml.pre",
            got=repr(name),
            expected=known(splits),
            fix="use the model's Hugging Face folder, which has a tokenizer.json",
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits[name])
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, fields)
    return backend


def _bytes(regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _sentencepiece_bpe(fields: Mapping[str, Any]) -> Backend:
    """SentencePiece style: spaces as ▁, byte fallback, merges implied by the scores."""
    tokens = fields["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = merges_from_scores(tokens, fields["tokenizer.ggml.scores"])
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)
    _add_special(backend, fields)
    return backend


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """BPE merges of a SentencePiece vocabulary: every split of every token, best score first.

    Splits of one token come in the order of their parts' ids.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    order = sorted(range(len(tokens)), key=lambda i: -scores[i])
    merges = []
    for i in order:
        token = tokens[i]
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found = [s for s in splits if s[0] in vocab and s[1] in vocab]
        merges += sorted(found, key=lambda s: (vocab[s[0]], vocab[s[1]]))
    return merges


def _add_special(backend: Backend, fields: Mapping[str, Any]) -> None:
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    kinds = ((_CONTROL, True), (_USER_DEFINED, False))
    for kind, special in kinds:
        chosen = [t for t, k in zip(tokens, types.tolist(), strict=True) if k == kind]
        added = [AddedToken(t, special=special, normalized=False) for t in chosen]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    if fields.get("tokenizer.ggml.add_bos_token", False):
        bos = fields["tokenizer.ggml.bos_token_id"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )


def read_backend(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> InputError:
    detail = " ".join(str(error).split())[:200]
    return InputError(
        str(path),
        got=f"a file that does not parse ({detail})",
        expected="JSON as the tokenizers package writes it",
        fix="fetch or save the model again",
    )
