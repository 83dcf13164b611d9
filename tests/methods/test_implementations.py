"""What `describe` says of what runs: here, on a GPU, and why."""

import jax
import pytest

import kvjax
from kvjax.methods.describe import implementations

SCAN = "page scan in XLA, straight from the packed words, memory of one chunk of pages"
SCORES = "eviction scores: probe_scores, a fused kernel, on "


def told(name, attention="auto", head_dim=64):
    method = kvjax.methods.get(name, head_dim=head_dim).with_attention(attention)
    lines = list(implementations(method, head_dim))
    described = kvjax.describe(method, head_dim).splitlines()
    assert described[-len(lines) :] == [f"  {line}" for line in lines]
    return lines


def test_here_and_on_a_gpu(monkeypatch):
    assert told("turboquant-2") == [
        f"attention: packed_decode, a fused kernel, on a GPU; here, on cpu, {SCAN}",
        "encoding: encode, a fused kernel, on a GPU; here, on cpu, the codec in XLA",
        f"{SCORES}a GPU; here, on cpu, XLA, queries by blocks",
    ]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert told("turboquant-2") == [
        f"attention: packed_decode, a fused kernel, on this GPU; elsewhere {SCAN}",
        "encoding: encode, a fused kernel, on this GPU; elsewhere the codec in XLA",
        f"{SCORES}this GPU; elsewhere XLA, queries by blocks",
    ]


def test_each_side_has_its_own_reason():
    lines = told("kivi-2/turboquant-5")
    assert lines[0].startswith(f"attention: {SCAN}; no fused kernel on a GPU: keys: scales of")
    why = "the codec in XLA; no fused kernel on a GPU: "
    assert lines[1] == f"encoding of keys: {why}scales of channels"
    assert lines[2].startswith(f"encoding of values: {why}got 5 bits")


@pytest.mark.parametrize(
    ("asked", "decode", "encode"),
    [
        ("page_scan", f"{SCAN}; asked for", "the codec in XLA; asked for"),
        ("triton", "packed_decode as 'triton'; asked for", "encode as 'triton'; asked for"),
        (
            "tpu",
            "packed_decode as 'tpu'; asked for",
            "the codec in XLA; 'tpu' is for decode steps alone",
        ),
    ],
)
def test_what_is_asked_for(asked, decode, encode):
    lines = told("int4", asked)
    assert lines[:2] == [f"attention: {decode}", f"encoding: {encode}"]


def test_a_kernel_that_is_asked_for_in_vain():
    lines = told("fp8", "triton")
    assert lines[0] == "attention: none, 'triton' is asked for: keys: Float8 codes"
    assert lines[1] == "encoding: the codec in XLA; no fused kernel on a GPU: Float8 codes"
