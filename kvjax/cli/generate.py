"""`kvjax generate`: text from a model over a compressed cache, as it comes."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

from kvjax.cli import options
from kvjax.core.errors import InputError

SAVE_EVERY = 1024  # tokens


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="generate text through a compressed cache; prints tokens/s and bytes",
        description="Streams text. At the end: tokens per second, and the cache's bytes beside "
        "those of a plain bf16 cache of the same capacity. With a policy only a budget of the "
        "prompt's tokens stays, judged block by block; new tokens follow.",
    )
    parser.add_argument("prompt", nargs="?", help="the text to continue; - or nothing reads stdin")
    options.add_model(parser)
    parser.add_argument("--method", default="turboquant-3", help="(%(default)s)")
    parser.add_argument("--chat", action="store_true", help="put the prompt in the chat format")
    parser.add_argument("--max-new", type=int, default=128, help="most new tokens (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the best token (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for sampling (%(default)s)")
    options.add_calibration(parser)
    options.add_layout(parser)
    group = options.add_policy(parser)
    group.add_argument(
        "--keep-exact",
        action="store_true",
        help="keep the budget in bf16 and evict at every step: no method, no growth",
    )
    group = parser.add_argument_group("state that lasts")
    group.add_argument(
        "--save", metavar="FOLDER", help="save the state there; the same command goes on from it"
    )
    group.add_argument(
        "--save-every",
        type=int,
        metavar="TOKENS",
        help=f"of the prompt or new, between two saves ({SAVE_EVERY})",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from kvjax.calibrate.names import check_name, get_for_model

    check_name(args.method, args.calibration)
    layout = options.layout_of(args)
    options.positive("--max-new", args.max_new)
    check_keep(args)
    check_save(args)
    if not args.temperature >= 0:  # NaN too
        raise InputError(
            "--temperature", got=args.temperature, expected="0 or more", fix="0 is greedy"
        )
    prompt = sys.stdin.read() if args.prompt in (None, "-") else args.prompt
    if not prompt.strip():
        raise InputError("prompt", got="no text", expected="some text", fix="give a prompt")

    from kvjax.calibrate.artefact import load_moments
    from kvjax.generate import check_finite, make_plan
    from kvjax.models.load import load

    options.use_compilation_cache()
    with contextlib.ExitStack() as stack:
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
                moments, about = load_moments(args.calibration, model.config, model.params)
            method = get_for_model(
                args.method,
                model.config,
                moments,
                layout=layout,
                seed=args.seed,
                params=model.params,
            )
            plan = make_plan(model.config, method)
            ids = (
                model.tokenizer.chat([{"role": "user", "content": prompt}])
                if args.chat
                else model.tokenizer.encode(prompt)
            )
            if moments is not None:
                options.warn_reach(about.reach, len(ids) + args.max_new)
            keep = make_keep(args, model, len(ids))
            report("reading the prompt")
            steps = stack.enter_context(generation(args, plan, model, ids, keep))
            first = next(steps)
            check_finite(first[1].finite)
        stream, count, clock = model.tokenizer.stream(), 0, None
        for made in itertools.chain([first], steps):
            new, state = made
            if clock is None and count:  # from the first step on: compiling it is not speed
                clock, before = time.perf_counter(), count
            ends = [n for n, token in enumerate(new) if token in model.config.eos_ids]
            for token in new[: ends[0] if ends else None]:
                print(stream.push(token), end="", flush=True)
                count += 1
            if ends:
                break
    print(stream.finish(), flush=True)
    check_finite(state.finite)
    seconds = time.perf_counter() - clock if clock else 0.0
    timed = count - before if clock else 0
    speed = f"{timed / seconds:.1f} tokens/s" if timed > 0 and seconds > 0 else "too few to time"
    sizes = f"{len(ids)} + {count} tokens, {speed}"
    if keep is None:
        print(summary(plan, state, sizes), file=sys.stderr)
    else:
        print(summary_of_kept(plan, state, sizes, args, len(ids) + count), file=sys.stderr)
    return 0


@contextlib.contextmanager
def generation(
    args: argparse.Namespace, plan, model, ids: list[int], keep
) -> Iterator[Iterator[tuple[list[int], Any]]]:
    """New tokens and the state after them, one by one; saved as they come where that is wanted."""
    import jax

    from kvjax.generate import start, step

    sampling: dict[str, Any] = {"max_new": args.max_new, "temperature": args.temperature}
    sampling |= {"rng": jax.random.key(args.seed), "keep": keep}

    def plain():
        state = start(plan, model.params, [ids], **sampling)
        eviction = keep.eviction if keep is not None and not keep.pack else None
        yield [int(state.token[0])], state
        for _ in range(args.max_new - 1):
            state = step(plan, model.params, state, temperature=args.temperature, eviction=eviction)
            yield [int(state.token[0])], state

    if args.save is None:
        yield plain()
        return
    from kvjax.checkpoint import Saver
    from kvjax.generate.resume import steps_saving

    with Saver(args.save) as saver:
        every = SAVE_EVERY if args.save_every is None else args.save_every
        tell = lambda line: print(f"[{line}]", file=sys.stderr, flush=True)
        steps = steps_saving(plan, model.params, [ids], saver, every=every, report=tell, **sampling)
        yield ((new[0].tolist(), state) for new, state in steps)


def check_save(args: argparse.Namespace) -> None:
    """Raises `InputError` for a folder without a name, or `--save-every` that is no number of
    tokens or without `--save`."""
    if args.save is not None and not args.save.strip():
        raise InputError(
            "--save", got="no name", expected="a folder", fix="give --save FOLDER, or . for here"
        )
    if args.save_every is None:
        return
    options.positive("--save-every", args.save_every)
    if args.save is None:
        raise InputError(
            "--save-every", got="no --save", expected="a folder beside it", fix="give --save FOLDER"
        )


def check_keep(args: argparse.Namespace) -> None:
    """Raises `InputError` for options of a policy that do not go together."""
    given = {
        "--budget": args.budget,
        "--block": args.block,
        "--compete": args.compete,
        "--keep-exact": args.keep_exact or None,
    }
    if args.policy is None:
        if stray := [name for name, value in given.items() if value is not None]:
            raise InputError(
                stray[0], got="no --policy", expected="one beside it", fix="name one: --policy h2o"
            )
        return
    options.check_policy(args.policy)
    if args.policy == "epicache":
        raise InputError(
            "--policy",
            got="epicache",
            expected="a policy for one prompt",
            fix="its episodes come from a conversation: use kvjax chat or kvjax episodes; kvzip "
            "judges by a prompt of its own too",
        )
    if args.budget is None:
        raise InputError(
            "--policy", got="no --budget", expected="tokens that stay", fix="give --budget 512"
        )
    if args.keep_exact and args.policy == "kvzip":
        raise InputError(
            "--keep-exact",
            got="kvzip, which judges whole blocks by a prompt",
            expected="a policy that judges at every step",
            fix="leave it out, or use h2o, tova or streaming",
        )
    for name in ("--budget", "--block"):
        if given[name] is not None:
            options.positive(name, given[name])


def make_keep(args: argparse.Namespace, model, tokens: int):
    """What stays of a prompt of so many tokens, or None for all of it."""
    if args.policy is None:
        return None
    from kvjax.evals.evicted import repeat_probe
    from kvjax.generate.evict import Keep

    block, compete = args.block or 256, args.compete or "head"
    eviction = options.eviction_of(
        model.config,
        args.policy,
        args.budget,
        block,
        compete,
        tokens=tokens,
        layout=options.layout_of(args),
    )
    probe = repeat_probe(model.tokenizer, block) if args.policy == "kvzip" else None
    return Keep(eviction, probe, pack=not args.keep_exact)


def summary_of_kept(plan, state, sizes: str, args: argparse.Namespace, tokens: int) -> str:
    """One line: tokens, speed, the budget, and its true bytes against plain bf16 of all tokens."""
    from kvjax.cache import cache_bytes
    from kvjax.evals.memory import plain_bytes

    held = sum(cache_bytes(cache) for cache in state.caches)
    plain = plain_bytes(plan.config, tokens)
    form = "bf16" if args.keep_exact else plan.methods[0].name
    return (
        f"[{args.policy}, {args.budget} tokens per head, {form}: {sizes}; cache "
        f"{held / 2**20:.2f} MiB, {held / plain:.2f} of the {plain / 2**20:.2f} MiB that all "
        f"{tokens} tokens take in bf16]"
    )


def summary(plan, state, sizes: str) -> str:
    """One line: tokens, speed, cache bytes against plain bf16, and what is packed."""
    from kvjax.cache import cache_bytes
    from kvjax.evals.memory import plain_bytes

    held = sum(cache_bytes(cache) for cache in state.caches)
    capacity = max(cache.capacity for cache in state.caches)
    plain = plain_bytes(plan.config, capacity)
    page = plan.methods[0].layout.page
    packed = max(int(cache.packed.max()) for cache in state.caches) * page
    return (
        f"[{plan.methods[0].name}: {sizes}; cache {held / 2**20:.2f} MiB "
        f"for {capacity} tokens, {held / plain:.2f} of bf16's {plain / 2**20:.2f} MiB; "
        f"{packed} tokens packed, the rest exact]"
    )
