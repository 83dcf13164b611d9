"""Policies: which tokens of a cache stay."""

from kvjax.policies.budgets import as_tokens, pyramid, uniform
from kvjax.policies.cam import merge_values
from kvjax.policies.chunked import Chunked
from kvjax.policies.eviction import Eviction
from kvjax.policies.expected_attention import ExpectedAttention
from kvjax.policies.h2o import H2O
from kvjax.policies.key_diff import KeyDiff
from kvjax.policies.key_norm import KeyNorm
from kvjax.policies.merge_runs import Merged, merge_runs
from kvjax.policies.names import POLICIES, get
from kvjax.policies.policy import Policy, Seen
from kvjax.policies.probe import Probe, catalyst_prompt, repeat_prompt
from kvjax.policies.rerotate import rerotate
from kvjax.policies.snapkv import SnapKV
from kvjax.policies.streaming import Random, Streaming
from kvjax.policies.tova import Tova
from kvjax.policies.weighted import Weighted

__all__ = [
    "H2O",
    "POLICIES",
    "Chunked",
    "Eviction",
    "ExpectedAttention",
    "KeyDiff",
    "KeyNorm",
    "Merged",
    "Policy",
    "Probe",
    "Random",
    "Seen",
    "SnapKV",
    "Streaming",
    "Tova",
    "Weighted",
    "as_tokens",
    "catalyst_prompt",
    "get",
    "merge_runs",
    "merge_values",
    "pyramid",
    "repeat_prompt",
    "rerotate",
    "uniform",
]
