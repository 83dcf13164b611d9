"""Moments at the positions that are served, worked out from those of shorter windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kvjax.calibrate.moments import Moments
from kvjax.calibrate.turned import average, average_mean
from kvjax.core.errors import InputError


def at_positions(
    moments: Moments,
    window: int,
    served: int,
    *,
    gradient_window: int | None = None,
    layer_windows: Sequence[int | None] | None = None,
) -> Moments:
    """What calibration would have seen, had its windows begun everywhere in the served context.

    A model with rotary positions does not notice where a text begins: queries and keys s positions
    later are R_s q and R_s k. So their moments over all starts s = 0 .. served - window are
    averages that need no other pass over the model:

        query_gram = mean_s R_s G R_s^T,   key_cov = mean_s R_s (C + m m^T) R_s^T - mean mean^T

    Without it methods know slowly turning channels at the first positions only, and lose all that
    calibration gained at three times the length of its windows.

    Keys before RoPE have no position; to them only the queries' distances grow, by the same
    average.

    Args:
      window: tokens of a calibration window. served: of the longest context; not more than
        `window` leaves all as it is.
      gradient_window: that of `key_fisher`, where it is another.
      layer_windows: how far each layer sees, None for all: no query is farther from a key.
    Returns:
      Moments whose `query_gram`, `key_mean`, `key_cov`, `key_cov_pre`, `key_fisher` and
      `query_gram_pre_rope` are those averages. Values and other moments before RoPE do not depend
      on positions; scales and buckets stay those of the window.
    Raises:
      InputError: sizes under 1.

    """
    gradient_window = gradient_window or window
    if min(window, served, gradient_window) < 1:
        raise InputError(
            "positions",
            got=f"{served} with windows of {min(window, gradient_window)}",
            expected="1 or more of each",
            fix="give the tokens of the longest context",
        )
    turns = moments.frequencies[:, None]  # [l, 1, d / 2]
    fisher = moments.key_fisher
    if fisher is not None and served > gradient_window:
        fisher = average(fisher, turns, served - gradient_window + 1)
        moments = dataclasses.replace(moments, key_fisher=fisher)
    if served <= window:
        return moments
    starts = served - window + 1
    mean = average_mean(moments.key_mean, turns, starts)
    before = moments.query_gram_pre_rope
    if before is not None:
        sees = np.array([s or served for s in layer_windows or [None] * len(turns)])[:, None]
        further = np.minimum(sees, served) - np.minimum(sees, window) + 1
        before = average(before, turns, further)
    outer = lambda m: m[..., :, None] * m[..., None, :]
    about = average(moments.key_cov + outer(moments.key_mean), turns, starts)
    return dataclasses.replace(
        moments,
        query_gram=average(moments.query_gram, turns, starts),
        key_mean=mean,
        key_cov=about - outer(mean),
        key_cov_pre=average(moments.key_cov_pre, turns, starts),
        query_gram_pre_rope=before,
    )
