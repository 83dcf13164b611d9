"""kvjax: compress the key-value cache of language models with pure functions on pytrees."""

from kvjax import codecs, methods
from kvjax.cache import Cache, append, attend, cache_bytes, extend, fork, init, prefill, reset
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.core.partial import Partial
from kvjax.methods.describe import describe

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "InputError",
    "Layout",
    "Method",
    "Partial",
    "append",
    "attend",
    "cache_bytes",
    "codecs",
    "describe",
    "extend",
    "fork",
    "init",
    "methods",
    "prefill",
    "reset",
]
