"""`load`: a checkpoint from a folder, a GGUF file or by name, as decoder parameters."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kvjax.core.errors import InputError, known
from kvjax.models import hub, mla
from kvjax.models.config import ModelConfig, Run, layer_runs
from kvjax.models.decoder import Layers, Params
from kvjax.models.gguf_config import from_gguf
from kvjax.models.gguf_file import GGUFFile
from kvjax.models.hf import HFFolder
from kvjax.models.tokenizer import Tokenizer

NORMS = ("attn_norm", "mlp_norm", "q_norm", "k_norm", "post_attn_norm", "post_mlp_norm")


class WeightSource(Protocol):
    """What a checkpoint format has to offer: tensors by the decoder's leaf names."""

    path: Path
    norm_offset: bool  # stored norm weights lack the +1

    def names(self) -> set[str]: ...
    def name_of(self, leaf: str, layer: int | None = None) -> str: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def leaf(self, config: ModelConfig, leaf: str, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint.

    Attributes:
      config: what it looks like.
      params: its weights, stacked by `layer_runs(config)`.
      tokenizer: None when the folder has no tokenizer.json, or the GGUF file no vocabulary.
      source: the file or folder it came from.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    source: Path


def load(name_or_path: str | os.PathLike, dtype: Any = None) -> Model:
    """Loads a model.

    Args:
      name_or_path: a Hugging Face folder, a `.gguf` file, or a name that `kvjax models list` shows.
      dtype: "float32" or "bfloat16" (or the jax dtype); default float32 on CPU, else bfloat16.

    Returns:
      The `Model`; norm weights are float32, all else `dtype`.

    Raises:
      InputError: unknown name, model not fetched, or a tensor that is missing, superfluous, of the
        wrong shape or in a damaged file.

    Example:
      >>> model = load("smollm2-135m")  # doctest: +SKIP
      >>> logits = forward(model.params, model.config, tokens)  # doctest: +SKIP
    """
    dtype = _dtype(dtype)
    path, name = _find(name_or_path)
    if path.is_dir():
        folder = HFFolder(path)
        params = read_params(folder, folder.config, dtype)
        return Model(folder.config, params, _folder_tokenizer(path), path)
    file = GGUFFile(path)
    config = from_gguf(file)
    config = dataclasses.replace(config, name=name or config.name)
    params = read_params(file, config, dtype)
    known_tokens = "tokenizer.ggml.model" in file.fields
    return Model(config, params, Tokenizer.from_gguf(file) if known_tokens else None, path)


def _dtype(dtype: Any) -> np.dtype:
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    allowed = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in allowed:
        raise InputError("dtype", got=name, expected=known(allowed), fix="choose one of these")
    return allowed[name]


def _find(name_or_path: str | os.PathLike) -> tuple[Path, str | None]:
    """The file or folder, and the model's name if it is one that `kvjax models` knows."""
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path, None
    if path.suffix == ".gguf" or len(path.parts) > 1:
        raise InputError(
            str(path),
            got="no such file or folder",
            expected="a Hugging Face folder or a .gguf file",
            fix="check the path, or use a name from `kvjax models list`",
        )
    spec = hub.find(str(name_or_path))
    if spec.kind != "decoder":
        raise InputError(
            f"model {spec.name}",
            got=f"an {spec.kind}",
            expected="a decoder",
            fix="load it with kvjax.models.minilm.MiniLM.load",
        )
    fetched = hub.installed(spec)
    if fetched is None:
        raise InputError(
            f"model {spec.name}",
            got="a model that is not on this machine",
            expected=f"its file at {hub.path_of(spec)}",
            fix=f"run `kvjax models fetch {spec.name}`",
        )
    return fetched, spec.name


def _folder_tokenizer(path: Path) -> Tokenizer | None:
    if not (path / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_folder(path)


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each leaf of one layer as checkpoints hold it: matrices [out, in]."""
    D, F, d = config.d_model, config.d_ff, config.head_dim
    q, kv = config.q_heads * d, config.kv_heads * d
    shapes = {"attn_norm": (D,), "wq": (q, D), "wk": (kv, D), "wv": (kv, D), "wo": (D, q)}
    if config.latent is not None:
        shapes = {"attn_norm": (D,), **mla.attention_shapes(config)}
    shapes |= {"mlp_norm": (D,), "w_gate": (F, D), "w_up": (F, D), "w_down": (D, F)}
    if config.qkv_bias:
        shapes |= {"bq": (q,), "bk": (kv,), "bv": (kv,)}
    if config.qk_norm:
        shapes |= {"q_norm": (d,), "k_norm": (d,)}
    if config.post_norms:
        shapes |= {"post_attn_norm": (D,), "post_mlp_norm": (D,)}
    return shapes


def read_params(source: WeightSource, config: ModelConfig, dtype: Any = np.float32) -> Params:
    """All weights of `source`, checked against `config` and stacked by `layer_runs(config)`.

    One stacked leaf is held twice at most. Norm weights come out in float32, with Gemma's +1.
    """
    shapes = leaf_shapes(config)
    top: dict[str, tuple[int, ...]] = {
        "embed": (config.vocab_size, config.d_model),
        "final_norm": (config.d_model,),
    }
    if not config.tie_embeddings:
        top["head"] = top["embed"]
    _check(source, config, shapes, top)
    embed = _put(source.leaf(config, "embed", source.name_of("embed")), dtype)  # largest first
    runs = tuple(
        Layers(
            **{
                leaf: _stack(source, config, leaf, shape, run, dtype)
                for leaf, shape in shapes.items()
            }
        )
        for run in layer_runs(config)
    )
    norm = source.leaf(config, "final_norm", source.name_of("final_norm")).astype(np.float32)
    return Params(
        embed=embed,
        runs=runs,
        final_norm=jnp.asarray(norm + source.norm_offset),
        head=_put(source.leaf(config, "head", source.name_of("head")), dtype)
        if "head" in top
        else None,
    )


def _put(weight: np.ndarray, dtype: Any) -> jax.Array:
    return jnp.asarray(weight.astype(dtype, copy=False))


def _stack(source, config, leaf, shape, run: Run, dtype) -> jax.Array:
    """One leaf over the layers of a run: [l, in, out] for matrices, [l, n] for vectors."""
    norm = leaf in NORMS
    out = np.empty((run.length, *shape[::-1]), np.float32 if norm else dtype)
    for i in range(run.length):
        out[i] = source.leaf(config, leaf, source.name_of(leaf, run.start + i)).T
    if norm and source.norm_offset:
        out += 1
    return jnp.asarray(out)


def _check(
    source: WeightSource,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    top: Mapping[str, tuple[int, ...]],
) -> None:
    """Every tensor is there, has the config's shape, and none is left over."""
    expected = {source.name_of(leaf): shape for leaf, shape in top.items()}
    for layer in range(config.layers):
        expected |= {source.name_of(leaf, layer): shape for leaf, shape in shapes.items()}
    present = source.names()
    for name, shape in expected.items():
        got = source.shape(name) if name in present else "nothing"
        if got != shape:
            raise InputError(
                f"tensor {name} of {source.path}",
                got=got,
                expected=shape,
                fix="check that config and weights belong to one model",
            )
    if extra := sorted(present - set(expected)):
        raise InputError(
            f"weights of {source.path}",
            got=f"{len(extra)} tensors that a {config.arch} model has no use for ({extra[0]}, ...)",
            expected=f"{len(expected)} tensors",
            fix="check that the config describes these weights",
        )
