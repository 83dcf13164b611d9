"""Logits of queries with packed keys."""

from pallas_kernels.logits_only.kernel import logits_only
from pallas_kernels.logits_only.reference import logits_only_reference

__all__ = ["logits_only", "logits_only_reference"]
