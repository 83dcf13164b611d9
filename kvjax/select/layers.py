"""The decoder's layers with their inputs in sight: an indexer reads what a layer projects from.

`decode_layers` hands its `attend` queries, keys and values; a selection also needs the normed input
of the layer, and what an earlier layer chose. So here is the same loop over the same layers, whose
`attend` is

  `out, state, seen = attend(run, state, x, q, k, v, extra)`

with x `[b, t, D]` the normed input, `state` carried through all layers, `seen` stacked over the
layers of a run, and the rest as in `models.decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.core.errors import InputError
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Params, layer_block, project, rope_angles, whole
from kvjax.models.primitives import rms_norm

Array = jax.Array
AttendWithInput = Callable[..., tuple[Array, Any, Any]]


def layers_with_input(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    attend: AttendWithInput,
    *,
    state: Any = None,
    xs: Sequence[Any] | None = None,
    positions: Array | None = None,
) -> tuple[Array, Any, tuple[Any, ...]]:
    """All layers over some tokens.

    Args:
      tokens: int32 `[b, t]`.
      attend: see the top of this file.
      state: a pytree that layers hand on.
      xs: per run, a pytree whose leaves lead with its layers; each layer gets its own as `extra`.
      positions: int32 `[b, t]`; None is 0 to t - 1.
    Returns:
      hidden `[b, t, D]` after the final norm, the last state, and what each run has seen.
    Raises:
      InputError: a model whose layers borrow keys and values, or whose values are a latent.
    """
    if config.layer_map or config.latent is not None:
        raise InputError(
            "selection",
            got=f"{config.name}, whose "
            + ("layers borrow keys and values" if config.layer_map else "values are a latent"),
            expected="keys and values of its own in every layer",
            fix="select for another model",
        )
    runs = layer_runs(config)
    extras = (None,) * len(runs) if xs is None else tuple(xs)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = params.embed[tokens]  # [b, t, D]
    x = x * jnp.asarray(config.embed_scale, x.dtype)
    found = []
    for index, (run, extra) in enumerate(zip(runs, extras, strict=True)):
        angles = rope_angles(run, config.rotary_dim, positions)

        def step(carry, inputs, index=index, angles=angles):
            x, state = carry
            weights, extra = inputs
            normed = rms_norm(x, weights.attn_norm, config.norm_eps)

            q, k, v = project(config, weights, x, angles)

            def attention():
                out, new, seen = attend(index, state, normed, q, k, v, extra)
                return out, (new, seen)

            (x, (state, seen)), _ = layer_block(config, weights, x, (k, v), attention, whole)
            return (x, state), seen

        inputs = (params.runs[index], extra)
        (x, state), seen = jax.lax.scan(step, (x, state), inputs)
        found.append(seen)
    return rms_norm(x, params.final_norm, config.norm_eps), state, tuple(found)
