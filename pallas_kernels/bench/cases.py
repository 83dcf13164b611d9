"""Which shapes are measured, with which formats."""

from __future__ import annotations

import dataclasses

from pallas_kernels.arg_specs import PAIRS, Spec, spec

HEADLINE = ("uniform-2", "lloyd-max-2", "lloyd-max-3", "uniform-4")
BASELINES = ("xla-f32", "xla-bf16", "cudnn-bf16", "torch-bf16")
OWN = "bf16"  # the pair of PAIRS that is our kernel over 16-bit blocks


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode step of one layer.

    Attributes:
      pairs: of `arg_specs.PAIRS`, measured beside the baselines; "-paged" behind a name is a pool
        of pages.
    """

    batch: int
    tokens: int
    head_dim: int = 128
    pairs: tuple[str, ...] = (OWN, *HEADLINE)
    kv_heads: int = 8
    group: int = 4
    page: int = 256

    @property
    def name(self) -> str:
        """The first part of the ids of its rows."""
        return f"attention/b{self.batch}/t{self.tokens}/d{self.head_dim}"

    @property
    def baselines(self) -> list[str]:
        """Ids of what the formats are compared with."""
        return [f"{self.name}/{name}" for name in BASELINES]

    @property
    def units(self) -> list[str]:
        """Ids of all rows."""
        return [*self.baselines, *(f"{self.name}/{pair}" for pair in self.pairs)]

    def spec(self, pair: str, layers: int = 1, **changes) -> Spec:
        """The launch of a pair."""
        fields = {f: getattr(self, f) for f in ("batch", "tokens", "head_dim", "kv_heads", "group")}
        paged = pair.endswith("-paged")
        fields |= {"page": self.page, "layers": layers, "paged": paged, **changes}
        return spec(pair.removesuffix("-paged"), **fields)

    def dense_bytes(self, itemsize: int) -> int:
        """Of a dense cache."""
        return 2 * self.batch * self.kv_heads * self.tokens * self.head_dim * itemsize


ALL = (OWN, *(p for p in PAIRS if p != OWN), "bf16-paged", "lloyd-max-2-paged")

CASES = (
    *(Case(b, t) for b in (1, 8, 32) for t in (8192, 32768, 131072) if (b, t) != (8, 32768)),
    Case(8, 32768, pairs=ALL),
    Case(8, 32768, head_dim=64),
    Case(8, 32768, head_dim=256),
)
TINY = (Case(2, 128, 32, pairs=(OWN, "lloyd-max-2"), kv_heads=1, group=2, page=64),)


def cases(tiny: bool) -> tuple[Case, ...]:
    """All of them, in order."""
    return TINY if tiny else CASES
