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
from kvjax.generate.resume import generate_saving, prefill_saving, steps_saving

__all__ = [
    "Plan",
    "State",
    "advance",
    "block_size",
    "check_finite",
    "forward_block",
    "generate",
    "generate_saving",
    "init_caches",
    "make_plan",
    "pad_prompts",
    "prefill",
    "prefill_saving",
    "start",
    "step",
    "steps_saving",
]
