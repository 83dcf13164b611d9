"""A model over compressed caches: which method serves which layers, and one block of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kvjax.cache import Cache, append, attend, extend, init
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.pytree import pytree, static
from kvjax.models.config import ModelConfig, Run, layer_runs
from kvjax.models.decoder import Params, decode_layers, regroup

Array = jax.Array


@pytree
class Plan:
    """Methods by run of layers. A pytree: arrays of the methods are traced, all else is static.

    Attributes:
      methods: one per run; where layers of a run have arrays of their own, these are stacked.
      stacked: per run, whether that is so.
      runs: consecutive layers that go through one scan.
    """

    methods: tuple[Method, ...]
    stacked: tuple[bool, ...] = static()
    runs: tuple[Run, ...] = static()
    config: ModelConfig = static()


def make_plan(config: ModelConfig, method: Method | Sequence[Method]) -> Plan:
    """Spreads a method, or one method per layer, over a model.

    Layers scan together where window, method structure and layout agree; different arrays
    (calibration) are stacked.

    Raises:
      InputError: methods that do not fit the head_dim, or not one per layer.
    """
    if isinstance(method, Method):
        method.check(config.head_dim)
        runs = layer_runs(config)
        return Plan((method,) * len(runs), (False,) * len(runs), runs, config)
    methods = tuple(method)
    if len(methods) != config.layers:
        raise InputError(
            "methods",
            got=f"{len(methods)} of them",
            expected=f"one for each of the {config.layers} layers",
            fix="give one method for all, or a tuple with one per layer",
        )
    for one in methods:
        one.check(config.head_dim)
    keys = [(jax.tree.structure(m), tuple(a.shape for a in jax.tree.leaves(m))) for m in methods]
    runs = layer_runs(config, keys)
    stack = lambda run: jax.tree.map(lambda *a: jnp.stack(a), *methods[run.start : run.stop])
    return Plan(tuple(stack(run) for run in runs), (True,) * len(runs), runs, config)


def init_caches(plan: Plan, *, batch: int, capacity: int, dtype=jnp.bfloat16) -> tuple[Cache, ...]:
    """Empty caches, one per run of layers; `dtype` is that of their exact windows.

    Raises:
      InputError: a capacity beyond the model's positions.
    """
    config = plan.config
    if capacity > config.max_positions:
        raise InputError(
            "context",
            got=f"{capacity} tokens",
            expected=f"at most the {config.max_positions} positions of {config.name}",
            fix="use a shorter context, or a model with more positions",
        )
    one = lambda method, stacked: jax.tree.map(lambda a: a[0], method) if stacked else method
    return tuple(
        init(
            one(method, stacked),
            capacity=capacity,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            batch=batch,
            layers=run.length,
            window=run.window,
            dtype=dtype,
        )
        for method, stacked, run in zip(plan.methods, plan.stacked, plan.runs, strict=True)
    )


def prepare_params(plan: Plan, params: Params) -> Params:
    """The weights, stacked as the plan's runs are."""
    lengths = [run.length for run in plan.runs]
    if [layers.attn_norm.shape[0] for layers in params.runs] == lengths:
        return params
    return regroup(params, plan.runs)


def forward_block(
    plan: Plan,
    params: Params,
    caches: tuple[Cache, ...],
    tokens: Array,
    count: Array | None = None,
) -> tuple[Array, tuple[Cache, ...], Array]:
    """The model over the next tokens of each sequence, through the caches.

    Args:
      tokens: int32 `[b, t]`. count: `[b]`, how many of them are real; they come first. With t = 1
        a count of 0 leaves the sequence as it is.
    Returns:
      hidden `[b, t, D]`, caches, and `finite` bool `[layers, 2]` (keys, values).
    """
    t = tokens.shape[1]
    positions = caches[0].length[0][:, None] + jnp.arange(t)  # [b, t]

    def layer_attend(run, layer, cache, q, k, v, extra):
        method = extra if plan.stacked[run] else plan.methods[run]
        if t > 1:
            return extend(method, cache, q, k, v, layer=layer, count=count, scale=1.0)
        active = None if count is None else count > 0
        cache = append(method, cache, k[:, 0], v[:, 0], layer=layer, active=active)
        return attend(method, cache, q[:, 0], layer=layer, scale=1.0)[:, None], cache

    xs = tuple(m if s else None for m, s in zip(plan.methods, plan.stacked, strict=True))
    return decode_layers(
        params, plan.config, tokens, positions, layer_attend, caches, runs=plan.runs, xs=xs
    )


def block_size(plan: Plan, longest: int, wanted: int = 256) -> int:
    """Tokens per prefill block for prompts of up to `longest`: at most `wanted`, no more padding
    than the next power of two, and a page at most where a sliding window demands it."""
    sizes = [min(wanted, max(16, 1 << (longest - 1).bit_length()))]
    for method, run in zip(plan.methods, plan.runs, strict=True):
        if run.window is not None:
            sizes.append(method.layout.page)
    return min(sizes)


def check_finite(finite: Array) -> None:
    """Raises `InputError` that names the first layer whose keys or values are not finite."""
    finite = jax.device_get(finite)
    if finite.all():
        return
    layer = int((~finite.all(-1)).argmax())
    side = "keys" if not finite[layer, 0] else "values"
    raise InputError(
        f"layer {layer}",
        got=f"NaN or infinity in its {side}",
        expected="finite numbers",
        fix="check the checkpoint, or run it in float32",
    )
