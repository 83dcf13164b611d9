"""What queries pay to each key: column maximum and sum of their softmax weights."""

from pallas_kernels.probe_scores.kernel import ProbeScores, probe_scores, why_not
from pallas_kernels.probe_scores.reference import probe_scores_reference

__all__ = ["ProbeScores", "probe_scores", "probe_scores_reference", "why_not"]
