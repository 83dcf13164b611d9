"""What a decoder looks like: one frozen record, read from Hugging Face or GGUF metadata."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvjax.core.errors import InputError, known
from kvjax.models.layer_map import check_layer_map

ARCHS = ("llama", "qwen2", "qwen3", "gemma3", "mla")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `kind` is "linear" (all frequencies divided by `factor`), "llama3" (only the slow ones, with a
    ramp between the two cut-offs) or "table" (each of the d/2 frequencies divided by its own
    entry: how GGUF files store the llama3 rule).
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    table: tuple[float, ...] = ()


@dataclass(frozen=True)
class Run:
    """Consecutive layers `start .. stop-1` that are alike, so that one scan covers them.

    `window` is how many tokens a query sees, itself included (None: all before it).
    """

    start: int
    stop: int
    window: int | None
    rope_theta: float
    rope_scaling: RopeScaling | None

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Latent:
    """What a layer with latent attention caches, and what its heads make of it; see `models.mla`.

    Attributes:
      rank: r, channels of the latent, which is key and value of all heads.
      rotary_dim: channels of a rotary head, which keys of all heads share.
      nope_dim: position-free channels of a query head; 0 where the latent is values only.
      value_dim: channels of a head's value.
      q_rank: rank of the queries' own latent, or None.
      rotary_heads: of `rotary_dim` channels each, one after the other: 1 in DeepSeek's models.
      norm: whether the latent is normed.

    Example:
      >>> Latent(rank=512, rotary_dim=64, nope_dim=128, value_dim=128).width
      576
    """

    rank: int
    rotary_dim: int
    nope_dim: int
    value_dim: int
    q_rank: int | None = None
    rotary_heads: int = 1
    norm: bool = True

    def __post_init__(self):
        sizes = (self.rank, self.rotary_dim, self.value_dim, self.rotary_heads)
        if min(sizes) < 1 or self.nope_dim < 0 or (self.q_rank is not None and self.q_rank < 1):
            raise InputError(
                "latent",
                got=self,
                expected="sizes of 1 or more, and nope_dim of 0 or more",
                fix="check the model's config",
            )

    @property
    def width(self) -> int:
        """Numbers per token and layer in the cache: the latent and the rotary part."""
        return self.rank + self.rotary_heads * self.rotary_dim


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama, Qwen 2, Qwen 3 or Gemma 3 family, or with MLA.

    Frozen and hashable, so it can be a static argument of `jax.jit`. `windows` holds one entry per
    layer (None: full attention); empty means that no layer has a window. Layers with a window
    rotate with `rope_theta_local`, unscaled, where the family has one (Gemma 3). `layer_map` holds
    each layer's owner of keys and values, itself or an earlier layer that it borrows from (see
    `kvjax.models.layer_map`); empty means that every layer has its own. With `latent` attention
    there is one KV head, of the latent's width, for all query heads.

    Example:
      >>> from kvjax.models.config import known_configs
      >>> known_configs()["llama-3.1-70b"].kv_bytes_per_token(bytes_per_value=2)
      327680
    """

    name: str
    arch: str
    vocab_size: int
    layers: int
    d_model: int
    d_ff: int
    q_heads: int
    kv_heads: int
    head_dim: int
    attention_scale: float
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_theta_local: float | None = None
    rope_scaling: RopeScaling | None = None
    max_positions: int = 8192
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    embed_scale: float = 1.0
    post_norms: bool = False
    windows: tuple[int | None, ...] = ()
    layer_map: tuple[int, ...] = ()
    latent: Latent | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.arch not in ARCHS:
            raise InputError(
                f"architecture of {self.name}",
                got=repr(self.arch),
                expected=known(ARCHS),
                fix="convert the model, or write its decoder beside kvjax/models/decoder.py",
            )
        if self.kv_heads < 1 or self.q_heads % self.kv_heads:
            raise InputError(
                f"heads of {self.name}",
                got=f"{self.q_heads} query heads over {self.kv_heads} kv heads",
                expected="a whole number of query heads per kv head",
                fix="check the model's config",
            )
        if self.rotary_dim % 2:
            raise InputError(
                f"head_dim of {self.name}" if self.latent is None else f"rotary_dim of {self.name}",
                got=self.rotary_dim,
                expected="an even number, for rotary pairs",
                fix="check the model's config",
            )
        if (self.arch == "mla") != (self.latent is not None) or (
            self.latent and (self.kv_heads, self.head_dim) != (1, self.latent.width)
        ):
            raise InputError(
                f"latent of {self.name}",
                got=f"{self.latent}, {self.kv_heads} KV heads of {self.head_dim}, {self.arch}",
                expected="with architecture mla one KV head of the latent's width, else no latent",
                fix="set arch, latent, kv_heads and head_dim together",
            )
        pairs = self.rotary_dim // 2
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "table" and len(scaling.table) != pairs:
            raise InputError(
                f"rope scaling of {self.name}",
                got=f"a table of {len(scaling.table)} entries",
                expected=f"one for each of the {pairs} rotary pairs",
                fix="check the model's config",
            )
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.layers)
        if len(self.windows) != self.layers:
            raise InputError(
                f"windows of {self.name}",
                got=f"{len(self.windows)} entries",
                expected=f"one for each of the {self.layers} layers",
                fix="check the model's config",
            )
        if self.layer_map:
            check_layer_map(self.layer_map, self.windows, self.name)

    @property
    def owners(self) -> tuple[int, ...]:
        """Whose keys and values each layer reads: its own, or those that it borrows."""
        return self.layer_map or tuple(range(self.layers))

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotate together."""
        return self.head_dim if self.latent is None else self.latent.rotary_dim

    @property
    def q_per_kv(self) -> int:
        """Queries per kv head: the letter g."""
        return self.q_heads // self.kv_heads

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> float:
        """Bytes that one more token costs over all layers in an uncompressed, full cache.

        Sliding windows are not counted: past its window a local layer stops growing. Layers that
        borrow keys and values cost nothing.
        """
        values = self.kv_heads * self.head_dim * (2 if self.latent is None else 1)
        return len(set(self.owners)) * values * bytes_per_value

    def weight_count(self) -> int:
        """Numbers in the weight matrices (norms and biases left out)."""
        attention = 2 * self.d_model * self.head_dim * (self.q_heads + self.kv_heads)
        if (latent := self.latent) is not None:
            query = self.q_heads * (latent.nope_dim + latent.width - latent.rank)
            attention = self.d_model * (latent.width + self.q_heads * latent.value_dim)
            attention += self.q_heads * latent.rank * (latent.nope_dim + latent.value_dim)
            attention += (latent.q_rank or self.d_model) * query
            attention += self.d_model * (latent.q_rank or 0)
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return self.layers * (attention + 3 * self.d_model * self.d_ff) + embeddings


def layer_runs(
    config: ModelConfig, extra_keys: Sequence[Hashable] | None = None
) -> tuple[Run, ...]:
    """Maximal runs of consecutive layers with the same window, rotation and extra key.

    Args:
      config: the model.
      extra_keys: one hashable per layer that also splits runs, for instance the compression
        method of each layer.

    Returns:
      Runs in order, covering every layer once.

    Example:
      >>> from kvjax.models.config import known_configs, layer_runs
      >>> [run.length for run in layer_runs(known_configs()["gemma-3-270m"])]
      [5, 1, 5, 1, 5, 1]
    """
    keys = tuple(extra_keys) if extra_keys is not None else (None,) * config.layers
    if len(keys) != config.layers:
        raise InputError(
            "layer keys",
            got=f"{len(keys)} keys",
            expected=f"one for each of the {config.layers} layers of {config.name}",
            fix="give every layer one",
        )
    runs, start = [], 0
    for (window, _), group in itertools.groupby(zip(config.windows, keys, strict=True)):
        stop = start + len(list(group))
        theta, scaling = config.rope_theta, config.rope_scaling
        if window is not None and config.rope_theta_local is not None:
            theta, scaling = config.rope_theta_local, None
        runs.append(Run(start, stop, window, theta, scaling))
        start = stop
    return tuple(runs)


def periodic_windows(layers: int, window: int, pattern: int) -> tuple[int | None, ...]:
    """Gemma's layers: every `pattern`-th sees everything, the others `window` tokens."""
    return tuple(None if (i + 1) % pattern == 0 else window for i in range(layers))


def _llama(name: str, **fields: Any) -> ModelConfig:
    fields.setdefault("attention_scale", fields["head_dim"] ** -0.5)
    return ModelConfig(**{"name": name, "arch": "llama", **fields})


def _gemma3(name: str, *, window: int, **fields: Any) -> ModelConfig:
    defaults: Mapping[str, Any] = {
        "arch": "gemma3",
        "head_dim": 256,
        "attention_scale": 256**-0.5,
        "norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_theta_local": 1e4,
        "vocab_size": 262_144,
        "max_positions": 32_768,
        "tie_embeddings": True,
        "qk_norm": True,
        "post_norms": True,
        "activation": "gelu_tanh",
        "embed_scale": fields["d_model"] ** 0.5,
        "windows": periodic_windows(fields["layers"], window, 6),
        "bos_id": 2,
        "eos_ids": (1,),
    }
    return ModelConfig(**{"name": name, **defaults, **fields})


_LLAMA31: Mapping[str, Any] = {
    "vocab_size": 128_256,
    "head_dim": 128,
    "kv_heads": 8,
    "rope_theta": 5e5,
    "rope_scaling": RopeScaling("llama3", factor=8.0),
    "max_positions": 131_072,
    "bos_id": 128_000,
    "eos_ids": (128_001, 128_008, 128_009),
}
_QWEN: Mapping[str, Any] = {
    "head_dim": 128,
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "eos_ids": (151_645, 151_643),
}
_SMOLLM2: Mapping[str, Any] = {
    "vocab_size": 49_152,
    "head_dim": 64,
    "max_positions": 8192,
    "tie_embeddings": True,
    "bos_id": 1,
    "eos_ids": (2,),
}

# Shapes as published by their makers: enough to plan memory without any weights.
KNOWN: tuple[ModelConfig, ...] = (
    _llama("llama-3.1-8b", layers=32, d_model=4096, d_ff=14_336, q_heads=32, **_LLAMA31),
    _llama("llama-3.1-70b", layers=80, d_model=8192, d_ff=28_672, q_heads=64, **_LLAMA31),
    _llama(
        "qwen2.5-7b",
        arch="qwen2",
        vocab_size=152_064,
        layers=28,
        d_model=3584,
        d_ff=18_944,
        q_heads=28,
        kv_heads=4,
        qkv_bias=True,
        max_positions=32_768,
        **_QWEN,
    ),
    _llama(
        "qwen3-8b",
        arch="qwen3",
        vocab_size=151_936,
        layers=36,
        d_model=4096,
        d_ff=12_288,
        q_heads=32,
        kv_heads=8,
        qk_norm=True,
        max_positions=40_960,
        **_QWEN,
    ),
    _gemma3("gemma-3-270m", window=512, layers=18, d_model=640, d_ff=2048, q_heads=4, kv_heads=1),
    _gemma3("gemma-3-1b", window=512, layers=26, d_model=1152, d_ff=6912, q_heads=4, kv_heads=1),
    _gemma3(
        "gemma-3-4b",
        window=1024,
        vocab_size=262_208,
        layers=34,
        d_model=2560,
        d_ff=10_240,
        q_heads=8,
        kv_heads=4,
        rope_scaling=RopeScaling("linear", factor=8.0),
        max_positions=131_072,
    ),
    _llama(
        "smollm2-135m",
        layers=30,
        d_model=576,
        d_ff=1536,
        q_heads=9,
        kv_heads=3,
        rope_theta=1e5,
        **_SMOLLM2,
    ),
    _llama(
        "smollm2-1.7b",
        layers=24,
        d_model=2048,
        d_ff=8192,
        q_heads=32,
        kv_heads=32,
        rope_theta=1.3e5,
        **_SMOLLM2,
    ),
)


def known_configs() -> dict[str, ModelConfig]:
    """Configs by name, for planning memory without weights."""
    return {config.name: config for config in KNOWN}
