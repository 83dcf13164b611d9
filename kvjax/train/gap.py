"""Where compression hurts: the gap between a model's packed and its full cache, text by text."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.generate.plan import Plan
from kvjax.models.decoder import Params
from kvjax.train.distill import check_training_windows, mean_nll, nll_of
from kvjax.train.quantized import quantized_hidden

Array = jax.Array


def compression_gap(plan: Plan, params: Params, windows: Sequence[np.ndarray]) -> np.ndarray:
    """Perplexity through the packed cache over that through the full one, `[n]`, for each window.

    What has the largest gap is what to train a cache on, or to test it with.

    Args:
      windows: int32 `[t]` each, all of one length, a multiple of 128 with room for a page.
    Raises:
      InputError: windows of other lengths, or too short for a page.

    Source: ours, after the selection of TuneShift-KD (arXiv 2603.24518), which compares a tuned
      model with its base.

    Example:
      >>> worst = compression_gap(plan, params, windows).argsort()[::-1]  # doctest: +SKIP
    """
    check_training_windows(plan, windows)
    found = []
    for window in windows:
        tokens = jnp.asarray(window, jnp.int32)
        full = mean_nll(params, plan.config, tokens)
        found.append(float(_packed_nll(plan, params, tokens) - full))
    return np.exp(np.asarray(found))


@jax.jit
def _packed_nll(plan: Plan, params: Params, tokens: Array) -> Array:
    return nll_of(params, plan.config, quantized_hidden(plan, params, tokens[None])[0], tokens)
