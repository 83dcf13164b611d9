"""Text from a model over compressed caches: plan, prefill, step, generate."""

from kvjax.generate.loop import State, advance, generate, pad_prompts, prefill, start, step
from kvjax.generate.plan import (
    Plan,
    block_size,
    check_finite,
    forward_block,
    init_caches,
    make_plan,
)

__all__ = [
    "Plan",
    "State",
    "advance",
    "block_size",
    "check_finite",
    "forward_block",
    "generate",
    "init_caches",
    "make_plan",
    "pad_prompts",
    "prefill",
    "start",
    "step",
]
