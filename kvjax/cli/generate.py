"""`kvjax generate`: text from a model over a compressed cache, as it comes."""

from __future__ import annotations

import argparse
import sys
import time

from kvjax.cli import options
from kvjax.core.errors import InputError


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="generate text through a compressed cache; prints tokens/s and bytes",
        description="Streams text. At the end: tokens per second, and the cache's bytes beside "
        "those of a plain bf16 cache of the same capacity.",
    )
    parser.add_argument("prompt", nargs="?", help="the text to continue; - or nothing reads stdin")
    parser.add_argument(
        "--model", default="smollm2-135m", help=f"{options.MODEL_HELP} (%(default)s)"
    )
    parser.add_argument("--method", default="turboquant-3", help="(%(default)s)")
    parser.add_argument("--chat", action="store_true", help="put the prompt in the chat format")
    parser.add_argument("--max-new", type=int, default=128, help="most new tokens (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the best token (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for sampling (%(default)s)")
    options.add_calibration(parser)
    options.add_layout(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from kvjax.calibrate.names import check_name, get_for_model

    check_name(args.method, args.calibration)
    layout = options.layout_of(args)
    options.positive("--max-new", args.max_new)
    if args.temperature < 0:
        raise InputError(
            "--temperature", got=args.temperature, expected="0 or more", fix="0 is greedy"
        )
    prompt = sys.stdin.read() if args.prompt in (None, "-") else args.prompt
    if not prompt.strip():
        raise InputError("prompt", got="no text", expected="some text", fix="give a prompt")

    import jax

    from kvjax.calibrate.artefact import load_moments
    from kvjax.generate import check_finite, make_plan, start, step
    from kvjax.models.load import load

    options.use_compilation_cache()
    with options.progress() as report:
        report(f"loading {args.model}")
        model = load(args.model)
        if model.tokenizer is None:
            raise InputError(
                args.model,
                got="no tokenizer",
                expected="a tokenizer.json beside the weights",
                fix="add it to the folder",
            )
        moments = None
        if args.calibration is not None:
            moments, _ = load_moments(args.calibration, model.config, model.params)
        method = get_for_model(args.method, model.config, moments, layout=layout, seed=args.seed)
        plan = make_plan(model.config, method)
        ids = (
            model.tokenizer.chat([{"role": "user", "content": prompt}])
            if args.chat
            else model.tokenizer.encode(prompt)
        )
        report("reading the prompt")
        rng = jax.random.key(args.seed)
        state = start(
            plan, model.params, [ids], max_new=args.max_new, rng=rng, temperature=args.temperature
        )
        check_finite(state.finite)
    stream, count, clock = model.tokenizer.stream(), 0, None
    while True:
        token = int(state.token[0])
        if token in model.config.eos_ids:
            break
        print(stream.push(token), end="", flush=True)
        count += 1
        if count == args.max_new:
            break
        state = step(plan, model.params, state, temperature=args.temperature)
        if clock is None:  # from the first step on: compiling it is not speed
            jax.block_until_ready(state)
            clock, before = time.perf_counter(), count
    print(stream.finish(), flush=True)
    check_finite(state.finite)
    seconds = time.perf_counter() - clock if clock else 0.0
    timed = count - before if clock else 0
    print(summary(plan, state, len(ids), count, timed, seconds), file=sys.stderr)
    return 0


def summary(plan, state, prompt: int, new: int, timed: int, seconds: float) -> str:
    """One line: tokens, speed, cache bytes against plain bf16, and what is packed."""
    from kvjax.cache import cache_bytes
    from kvjax.evals.memory import plain_bytes

    held = sum(cache_bytes(cache) for cache in state.caches)
    capacity = max(cache.capacity for cache in state.caches)
    plain = plain_bytes(plan.config, capacity)
    page = plan.methods[0].layout.page
    packed = max(int(cache.packed.max()) for cache in state.caches) * page
    speed = f"{timed / seconds:.1f} tokens/s" if timed > 0 and seconds > 0 else "too few to time"
    return (
        f"[{plan.methods[0].name}: {prompt} + {new} tokens, {speed}; cache {held / 2**20:.2f} MiB "
        f"for {capacity} tokens, {held / plain:.2f} of bf16's {plain / 2**20:.2f} MiB; "
        f"{packed} tokens packed, the rest exact]"
    )
