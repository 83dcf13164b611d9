"""Models with random weights, for what does not depend on text: speed and memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kvjax.core.rng import fold
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Layers, Params

Array = jax.Array


def random_params(config: ModelConfig, rng: Array, dtype: Any) -> Params:
    """Weights of a model that was never trained: normal, of a size that keeps activations in range.

    Example:
      >>> import dataclasses
      >>> from kvjax.models.config import known_configs
      >>> config = dataclasses.replace(known_configs()["smollm2-135m"], layers=2, windows=())
      >>> params = random_params(config, jax.random.key(0), jnp.bfloat16)
      >>> params.runs[0].w_up.shape, str(params.runs[0].w_up.dtype)
      ((2, 576, 1536), 'bfloat16')
    """
    D, F, d = config.d_model, config.d_ff, config.head_dim
    heads = {"wq": config.q_heads * d, "wk": config.kv_heads * d, "wv": config.kv_heads * d}
    shapes = {name: (D, width) for name, width in heads.items()}
    shapes |= {"wo": (config.q_heads * d, D), "w_gate": (D, F), "w_up": (D, F), "w_down": (F, D)}

    def run(start: int, stop: int) -> Layers:
        count = stop - start
        norm = jnp.ones((count, D), jnp.float32)

        def matrix(name: str):
            shape = shapes[name]
            rngs = jax.random.split(fold(rng, name, start), count)
            draw = lambda r: jax.random.normal(r, shape, dtype) * shape[0] ** -0.5
            return jax.jit(lambda rngs: jax.lax.map(draw, rngs))(rngs).astype(dtype)

        return Layers(attn_norm=norm, mlp_norm=norm, **{name: matrix(name) for name in shapes})

    table = lambda name: jax.jit(
        lambda r: (jax.random.normal(r, (config.vocab_size, D), dtype) * D**-0.5).astype(dtype)
    )(fold(rng, name))
    return Params(
        embed=table("embed"),
        runs=tuple(run(r.start, r.stop) for r in layer_runs(config)),
        final_norm=jnp.ones(D, jnp.float32),
        head=None if config.tie_embeddings else table("head"),
    )
