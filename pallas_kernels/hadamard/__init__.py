"""Walsh-Hadamard transform of the last axis."""

from pallas_kernels.hadamard.kernel import hadamard, why_not
from pallas_kernels.hadamard.reference import hadamard_reference

__all__ = ["hadamard", "hadamard_reference", "why_not"]
