"""Named methods for the cache of latent attention: one row per token, key and value at once."""

from __future__ import annotations

import dataclasses

from kvjax.codecs import latent
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.methods.names import get, recipes


def latent_method(
    name: str, rank: int, head_dim: int, *, layout: Layout | None = None, seed: int = 0
) -> Method:
    """The method `name` over a latent of `rank`, the rotary part beside it.

    Args:
      name: "LATENT", or "LATENT/ROTARY" to code the rotary part too; alone it stays in bf16. Of
        either the recipe for keys is used: the latent is coded once, for logits and outputs.
      rank, head_dim: of the model, `config.latent.rank` and `config.head_dim`.
      layout, seed: as for `get`.
    Raises:
      InputError: an unknown name, or sizes that do not fit.

    Example:
      >>> method = latent_method("turboquant-4/turboquant-4", 512, 576)
      >>> method.name, type(method.value).__name__
      ('turboquant-4/turboquant-4', 'View')
    """
    recipes(name)  # that there are two at most, and both are known
    first, _, second = name.partition("/")
    options = {"layout": layout, "seed": seed}
    inner = get(first, rank, **options)  # type: ignore[arg-type]
    rotary = get(second or "bf16", head_dim - rank, **options)  # type: ignore[arg-type]
    key, value = latent(inner.key, rank, head_dim, rotary.key)
    return dataclasses.replace(inner, key=key, value=value, name=name)
