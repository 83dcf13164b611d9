"""The cache: fixed shapes, updated in place under jit, read without decoding the history."""

from kvjax.cache.attend import attend
from kvjax.cache.fork import fork, put, take
from kvjax.cache.invariants import invariants
from kvjax.cache.reset import reset
from kvjax.cache.state import Cache, cache_bytes, history_bits_per_value, init
from kvjax.cache.update import append, extend, prefill

__all__ = [
    "Cache",
    "append",
    "attend",
    "cache_bytes",
    "extend",
    "fork",
    "history_bits_per_value",
    "init",
    "invariants",
    "prefill",
    "put",
    "reset",
    "take",
]
