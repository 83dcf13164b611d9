"""Several policies as one."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.policies.policy import Policy, Seen


@pytree
class Weighted(Policy):
    """Policies that vote: `s_j = sum of weight * rank of j`, with ranks in [0, 1].

    The rank is the share of the head's tokens that score less, so that policies whose scores have
    other units and tails can be added. Where heads compete, ranks make them equals.

    Args:
      parts: pairs of a policy and its weight; no two policies of one kind, and one at most that
        notes something of every token (H2O, or a probe that remembers), since they would share it.

    Raises:
      InputError: no parts, two of one kind, two that note something of every token.

    Example:
      >>> from kvjax.policies import KeyDiff, SnapKV
      >>> Weighted(((KeyDiff(), 0.5), (SnapKV(window=16), 1.0))).window
      16
    """

    parts: tuple[tuple[Policy, float], ...]

    def __post_init__(self):
        kinds = [type(policy).__name__ for policy, _ in self.parts]
        if not kinds or len(set(kinds)) < len(kinds):
            raise InputError(
                "parts",
                got=", ".join(kinds) or "none",
                expected="one policy or more, each of another kind",
                fix="name each kind once",
            )
        noting = [type(policy).__name__ for policy, _ in self.parts if policy.notes]
        if len(noting) > 1:
            raise InputError(
                "parts",
                got=" and ".join(noting),
                expected="one at most that notes something of every token",
                fix="leave out the others",
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What any part needs."""
        return frozenset().union(*(policy.needs for policy, _ in self.parts))

    @property
    def window(self) -> int:
        return max(policy.window for policy, _ in self.parts)

    @property
    def shared(self) -> bool:
        return any(policy.shared for policy, _ in self.parts)

    @property
    def notes(self) -> Literal["attention", "verdict"] | None:
        return next((policy.notes for policy, _ in self.parts if policy.notes), None)

    def start(self, b: int, h: int, g: int, d: int) -> tuple:
        return tuple(policy.start(b, h, g, d) for policy, _ in self.parts)

    def observe(self, seen: Seen) -> tuple[Array, Any]:
        notes = []
        mass = seen.mass
        for (policy, _), memory in zip(self.parts, seen.memory, strict=True):
            mass, note = policy.observe(dataclasses.replace(seen, mass=mass, memory=memory))
            notes.append(note)
        return mass, tuple(notes)

    def score(self, seen: Seen) -> Array:
        total = jnp.zeros(seen.positions.shape, jnp.float32)
        for (policy, weight), memory in zip(self.parts, seen.memory, strict=True):
            score = policy.score(dataclasses.replace(seen, memory=memory))
            total = total + weight * _ranks(score, seen.real)
        if self.shared:  # one choice for the layer: heads vote
            total = jnp.broadcast_to(total.mean(1, keepdims=True), total.shape)
        return total


def _ranks(score: Array, real: Array) -> Array:
    """Share of the other real slots that score less, `[b, h, s]`; ties share a rank."""
    score = jnp.where(real, score, jnp.inf)
    search = jax.vmap(jax.vmap(lambda ordered, x: jnp.searchsorted(ordered, x, side="left")))
    less = search(jnp.sort(score, axis=-1), score).astype(jnp.float32)
    return jnp.where(real, less / jnp.maximum(real.sum(-1, keepdims=True) - 1, 1), 0.0)
