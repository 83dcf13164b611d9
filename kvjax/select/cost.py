"""What attention costs per decoded token: dense, with an indexer, with a shared one.

A multiplication and an addition are 2 FLOPs. Per layer, with T tokens in the cache:

    projections     2 x the weights that a token passes (attention, feed-forward, experts in use)
    dense attention 2 T a           a = numbers read per token by the products with q and with p:
                                    H (d_k + d_v) for H query heads (MLA, absorbed: H (r + d_r + r))
    sparse          2 min(k, T) a
    indexer         2 T H_I d_I + 3 T H_I     products with the keys; ReLU, weight, sum
                    + 2 x its weights

An indexer's FLOPs are of lower precision (8 bits) than those of attention; they count alike here.
Choosing k of T is not counted: it does not multiply.
"""

from __future__ import annotations

import dataclasses

from kvjax.core.errors import InputError
from kvjax.models.config import ModelConfig
from kvjax.select.share import check_pattern, seeing_all


@dataclasses.dataclass(frozen=True)
class AttentionSizes:
    """What decides the cost of a model's attention.

    Args:
      layers: that see everything. products: a above, per layer.
      cache_bytes: of keys and values, per token and layer.
      weights: that a token passes in the whole model, embeddings aside.
      index_heads, index_width: H_I and d_I. index_weights: of one indexer.
      index_bytes: per token and layer with an indexer.
    """

    layers: int
    products: int
    cache_bytes: float
    weights: float
    index_heads: int
    index_width: int
    index_weights: int
    index_bytes: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one decoded token.

    Attributes:
      weights, attention, indexer: FLOPs. read: bytes of caches that are read. kept: bytes of caches
        per token of context.
    """

    weights: float
    attention: float
    indexer: float
    read: float
    kept: float

    @property
    def flops(self) -> float:
        return self.weights + self.attention + self.indexer


def sizes_of(
    config: ModelConfig,
    *,
    index_heads: int,
    index_width: int,
    bits_per_value: float = 16,
    index_bytes: float | None = None,
) -> AttentionSizes:
    """Sizes of a model with softmax attention over KV heads; its local layers are left out.

    Args:
      bits_per_value: true bits of the packed cache, see `kvjax.cache.history_bits_per_value`.
      index_bytes: None is 8 bits a channel and a float16 scale.

    Raises:
      InputError: a model with latent attention, or whose layers borrow keys and values: fill in
        `AttentionSizes`, as `glm_5_2` does.
    """
    if config.latent is not None or config.layer_map:
        raise InputError(
            f"model {config.name}",
            got="layers that borrow keys and values" if config.layer_map else "latent attention",
            expected="keys and values of its own in every layer",
            fix="fill in AttentionSizes by hand, as glm_5_2 does",
        )
    width = index_width
    head = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    return AttentionSizes(
        layers=len(seeing_all(config)),
        products=2 * config.q_heads * config.head_dim,
        cache_bytes=2 * config.kv_heads * config.head_dim * bits_per_value / 8,
        weights=config.weight_count() - head + config.vocab_size * config.d_model,
        index_heads=index_heads,
        index_width=width,
        index_weights=config.d_model * (index_heads * width + width + index_heads),
        index_bytes=width + 2 if index_bytes is None else index_bytes,
    )


def glm_5_2(*, weights: float = 40e9) -> AttentionSizes:
    """GLM-5.2 as published: 78 layers, MLA latent 512 + 64 for 64 heads, indexer 32 x 128.

    Args:
      weights: active per token; 40e9 is GLM-5's published count, taken over.

    Source: GLM-5.2's configuration; cache in bf16, index keys in fp8 with a float32 scale.
    """
    return AttentionSizes(
        layers=78,
        products=64 * (512 + 64 + 512),
        cache_bytes=2 * (512 + 64),
        weights=weights,
        index_heads=32,
        index_width=128,
        index_weights=2048 * 32 * 128 + 6144 * (128 + 32),
        index_bytes=128 + 4,
    )


def cost(
    sizes: AttentionSizes,
    context: int,
    *,
    k: int | None = None,
    pattern: str | None = None,
) -> Cost:
    """Cost of one decoded token with `context` tokens in the cache.

    Args:
      k: tokens that each layer attends to; None is all, and no indexer.
      pattern: F, S and D of the layers (see `share`); None is F everywhere.
    Raises:
      InputError: a k or a context under 1; a pattern of other layers.

    Example:
      >>> sizes = glm_5_2()
      >>> dense, indexed = cost(sizes, 2**20), cost(sizes, 2**20, k=2048)
      >>> round(dense.attention / 1e12, 1), round(indexed.indexer / 1e12, 2)
      (11.4, 0.68)
    """
    for name, value in (("context", context), ("k", k)):
        if value is not None and value < 1:
            raise InputError(name, got=value, expected="1 or more tokens", fix="raise it")
    if k is None:
        pattern = "D" * sizes.layers
    pattern = "F" * sizes.layers if pattern is None else pattern
    check_pattern(pattern, sizes.layers)
    full, dense = pattern.count("F"), pattern.count("D")
    tokens = dense * context + (sizes.layers - dense) * min(k or context, context)
    per_index = context * sizes.index_heads * (2 * sizes.index_width + 3) + 2 * sizes.index_weights
    return Cost(
        weights=2 * sizes.weights,
        attention=2 * tokens * sizes.products,
        indexer=full * per_index,
        read=tokens * sizes.cache_bytes + full * context * sizes.index_bytes,
        kept=sizes.layers * sizes.cache_bytes + full * sizes.index_bytes,
    )
