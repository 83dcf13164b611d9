"""How many tokens each layer keeps."""

from __future__ import annotations

import numbers

from kvjax.core.errors import InputError


def as_tokens(budget: int | float, length: int) -> int:
    """A budget in tokens: an int is one already, a float is a share of `length` tokens.

    A share is rounded down, to 1 at least. An int may be more than there are tokens: then all stay.

    Raises:
      InputError: an int below 1, a float outside (0, 1].

    Example:
      >>> as_tokens(0.25, 1000), as_tokens(2048, 1000)
      (250, 2048)
    """
    if isinstance(budget, numbers.Integral) and not isinstance(budget, bool) and budget >= 1:
        return int(budget)
    share = isinstance(budget, numbers.Real) and not isinstance(budget, numbers.Integral)
    if share and 0 < budget <= 1:
        return max(1, int(budget * length + 1e-9))  # 0.29 * 100 is 28.999999999999996
    raise InputError(
        "budget",
        got=repr(budget),
        expected="tokens (an int of 1 or more) or a share of the prompt (a float in (0, 1])",
        fix="write 2048 for tokens, 0.25 for a quarter",
    )


def uniform(budget: int, layers: int) -> tuple[int, ...]:
    """The same for every layer.

    Example:
      >>> uniform(256, 3)
      (256, 256, 256)
    """
    _check(budget, layers)
    return (budget,) * layers


def pyramid(budget: int, layers: int, tokens: int, window: int, beta: int = 20) -> tuple[int, ...]:
    """PyramidKV: budgets that fall from layer to layer on a straight line.

        base = budget - window,   low = base // beta,   high = 2 base - low
        high = tokens - window, low = 2 base - high     if that is less: a layer holds no more
        layer l keeps window + high - l (high - low) / (layers - 1), rounded

    The first layers are rounded up and the last ones down, so that the sum is `layers * budget`
    exactly. The budget is uniform where the prompt fits it, and where the window leaves nothing
    to share.

    Args:
      budget: tokens per layer and KV head on average, window included.
      tokens: length of the prompt.
      window: newest tokens that stay in every layer.
      beta: the lowest layer of the line gets `1 / beta` of the average beyond the window.

    Source: arXiv 2406.02069 (beta 20).
    Differs from the paper's code: it takes a whole-numbered step, so that its sum exceeds the
    budget by up to `(layers - 1) / 2` tokens per layer. kvpress counts the window neither in the
    budget nor in what a layer keeps, and is uniform unless `low >= window`.

    Raises:
      InputError: numbers below 1, or a negative window.

    Example:
      >>> pyramid(64, 4, tokens=1000, window=8, beta=20)
      (118, 82, 46, 10)
    """
    _check(budget, layers)
    if tokens < 1 or window < 0 or beta < 1:
        raise InputError(
            "pyramid",
            got=f"{tokens} tokens, window {window}, beta {beta}",
            expected="tokens and beta of 1 or more, a window of 0 or more",
            fix="choose such numbers",
        )
    base = budget - window
    if budget >= tokens or base <= 0 or layers == 1:
        return uniform(budget, layers)
    high = min(2 * base - base // beta, tokens - window)
    low = 2 * base - high
    drops = [divmod(layer * (high - low), layers - 1) for layer in range(layers)]
    down = [window + high - drop - (rest > 0) for drop, rest in drops]
    spare = layers * budget - sum(down)
    broken = [layer for layer, (_, rest) in enumerate(drops) if rest]
    return tuple(count + (layer in broken[:spare]) for layer, count in enumerate(down))


def _check(budget: int, layers: int) -> None:
    if budget < 1 or layers < 1:
        raise InputError(
            "budget",
            got=f"{budget} tokens for {layers} layers",
            expected="1 or more of both",
            fix="choose such numbers; `as_tokens` turns a share into tokens",
        )
