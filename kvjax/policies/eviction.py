"""A policy with its budget: everything that decides which tokens a cache keeps."""

from __future__ import annotations

import math
import numbers
from typing import Literal, get_args

from kvjax.core.codec import Array
from kvjax.core.errors import InputError, known
from kvjax.core.layout import Layout
from kvjax.core.pytree import pytree, static
from kvjax.policies.policy import Policy
from kvjax.policies.retain import Compete

Merge = Literal["none", "runs", "values"]


@pytree
class Eviction:
    """Keep the `budget` best tokens of every KV head, judged after every block.

    History is processed in blocks against what was kept of it so far, so the peak is budget plus
    block, however long it is. Layers with a sliding window keep what they reach and take no part.

    Args:
      policy: gives the scores.
      budget: tokens per KV head, or a tuple with one for each layer that has no sliding window. It
        counts all that stays, also sink and recent tokens.
      block: tokens between two evictions.
      compete: "head", "layer" or "model"; see `retain.keep`. But for "head" the budget is a mean.
      floor: share of the budget that every head is sure of where heads compete.
      spread: a head holds at most `spread` budgets where heads compete; the working set has room
        for that many, so that it is the price of adaptivity while a history is processed.
      merge: what becomes of tokens that leave. "none": they are gone. "runs": neighbours with like
        keys become one, until the budget holds all (KVMerger; the policy only chooses which token
        of a run is in the middle). "values": their values go to the next tokens that stay (CaM).
      rng: a key for "values".
      positions: where keys stand in the rotary frame. "logical": where they were said, gaps and
        all. "cache": moved up to the newest token, as StreamingLLM counts positions within its
        cache; what is dropped leaves no gap.
      sink, recent: first and last tokens that always stay; the windows of the method's layout and
        of the policy always do as well.

    Raises:
      InputError: numbers that make no sense; heads that compete under a policy by which they all
        keep the same tokens; a way to merge that does not go with the policy or the budgets.

    Example:
      >>> from kvjax.policies import KeyNorm
      >>> Eviction(KeyNorm(), budget=256).slots
      256
    """

    policy: Policy
    budget: int | tuple[int, ...] = static()
    block: int = static(default=256)
    compete: Compete = static(default="head")
    floor: float = static(default=0.2)
    spread: float = static(default=2.0)
    sink: int = static(default=4)
    recent: int = static(default=0)
    merge: Merge = static(default="none")
    rng: Array | None = None
    positions: Literal["logical", "cache"] = static(default="logical")

    def __post_init__(self):
        if not isinstance(self.policy, Policy):
            raise InputError(
                "policy",
                got=repr(self.policy),
                expected="a policy",
                fix='make one, as `policies.get("snapkv")` does by name',
            )
        if self.compete not in ("head", "layer", "model"):
            raise InputError(
                "compete", got=repr(self.compete), expected="head, layer or model", fix="name one"
            )
        if self.positions not in ("logical", "cache"):
            raise InputError(
                "positions", got=repr(self.positions), expected="logical or cache", fix="name one"
            )
        if self.policy.shared and self.compete != "head":
            raise InputError(
                "compete",
                got=f"{self.compete!r} with {type(self.policy).__name__}",
                expected="head, since all heads keep the same tokens",
                fix='use compete="head", or another policy',
            )
        counts = (*self.budgets, self.block, self.sink, self.recent)
        whole = all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in counts)
        if not whole or not self.budgets or min(*counts[:-2]) < 1 or min(counts[-2:]) < 0:
            raise InputError(
                "eviction",
                got=f"budget {self.budget!r}, block {self.block}, sink {self.sink}, "
                f"recent {self.recent}",
                expected="whole numbers, budget and block of 1 or more, "
                "sink and recent of 0 or more",
                fix="choose such numbers; `as_tokens` turns a share into tokens",
            )
        self._check_merge()
        if not 0 <= self.floor <= 1 or not 1 <= self.spread < math.inf:
            raise InputError(
                "eviction",
                got=f"floor {self.floor}, spread {self.spread}",
                expected="a floor of 0 to 1, a spread of 1 or more",
                fix="choose such numbers",
            )

    def _check_merge(self):
        if self.merge not in get_args(Merge):
            raise InputError(
                "merge", got=repr(self.merge), expected=known(get_args(Merge)), fix="name one"
            )
        if self.merge == "runs" and (self.compete != "head" or len(self.budgets) > 1):
            raise InputError(
                "merge",
                got=f"runs with compete={self.compete!r} and budget {self.budget}",
                expected="heads and layers that hold equally many runs",
                fix='use compete="head" and one budget',
            )
        if self.merge == "values" and (self.rng is None or self.policy.notes != "attention"):
            raise InputError(
                "merge",
                got=f"values with {type(self.policy).__name__} and "
                + ("a key" if self.rng is not None else "no key"),
                expected="a policy that gathers attention (H2O), and a key",
                fix="use Eviction(H2O(), ..., rng=jax.random.key(seed))",
            )

    @property
    def budgets(self) -> tuple[int, ...]:
        """One number for all layers, or one for each."""
        return tuple(self.budget) if isinstance(self.budget, tuple | list) else (self.budget,)

    @property
    def slots(self) -> int:
        """Tokens that a head can hold between two blocks."""
        most = max(self.budgets)
        return most if self.compete == "head" else math.ceil(most * self.spread)

    def recent_of(self, layout: Layout | None) -> int:
        """Newest tokens that may have to stay."""
        window = 0 if layout is None else layout.ring - 1
        return max(self.recent, self.policy.window, window)

    def sink_of(self, layout: Layout | None) -> int:
        """First tokens that stay."""
        return max(self.sink, 0 if layout is None else layout.sink)

    def check(self, layers: int, layout: Layout | None) -> None:
        """Raises `InputError` unless there is a budget for each of `layers` and it holds what
        always stays."""
        if isinstance(self.budget, tuple | list) and len(self.budget) != layers:
            raise InputError(
                "budget",
                got=f"{len(self.budget)} numbers",
                expected=f"one, or one for each of the {layers} layers without a sliding window",
                fix="give so many",
            )
        sure = self.sink_of(layout) + self.recent_of(layout)
        rest = self.merge == "runs"  # all others need one run at least
        sure += rest
        if min(self.budgets) < sure:
            raise InputError(
                "budget",
                got=f"{min(self.budgets)} tokens",
                expected=f"at least the {sure} that always stay ({self.sink_of(layout)} sink, "
                f"{self.recent_of(layout)} recent{', a run of all others' if rest else ''})",
                fix="raise it, or choose smaller windows or pages",
            )
