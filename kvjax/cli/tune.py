"""`kvjax tune`: keys of a calibrated method, corrected by gradients at an unchanged format."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys

from kvjax.cli import options, qat
from kvjax.core.errors import InputError

CONTEXT = 512  # tokens per window: early tokens have most of the weight, so many short windows
METHODS = ("klt-fisher-2", "klt-fisher-3", "klt-fisher-4")


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="correct a calibrated method's keys by gradients, at the same bytes",
        description="Learns means, rotations, scales and gains of keys, layer by layer. Writes "
        "OUT/tuned.safetensors, which `kvjax compare --methods tuned:OUT` takes together with the "
        "same --calibration. With --qat it trains the model's W_K and W_V for a method instead. "
        "Never tune on the text you test on.",
    )
    options.add_model(parser)
    parser.add_argument(
        "--calibration",
        help="folder that `kvjax calibrate --gradients` wrote for this model; needed without --qat",
    )
    options.add_sample(parser, tokens=4096)
    parser.add_argument(
        "--method", help=f"what to tune: {', '.join(METHODS)} ({METHODS[0]}); with --qat any method"
    )
    parser.add_argument("--steps", type=int, help="of Adam: 20 per layer, with --qat 100")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of drawn labels; with --qat of rotations, the start and "
        "the order of windows (%(default)s)",
    )
    parser.add_argument("--out", help="folder (runs/tuned, with --qat runs/qat)")
    qat.add(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.qat:
        return qat.run(args)
    qat.check_unused(args)
    args.method, args.out = args.method or METHODS[0], args.out or "runs/tuned"
    args.steps = 20 if args.steps is None else args.steps
    if args.calibration is None or args.method not in METHODS:
        raise InputError(
            "--calibration" if args.calibration is None else "--method",
            got="none" if args.calibration is None else args.method,
            expected="a folder that `kvjax calibrate --gradients` wrote"
            if args.calibration is None
            else ", ".join(METHODS),
            fix="give it, or train the model for a method with --qat",
        )
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    import kvjax
    from kvjax.calibrate.artefact import load_moments
    from kvjax.calibrate.tuned_file import TunedFrom, moments_hash, save_tuned
    from kvjax.cli.compare import write_json
    from kvjax.evals.stamp import make_stamp
    from kvjax.evals.text import model_windows, read_docstrings, read_text
    from kvjax.models.load import load

    steps = options.positive("--steps", args.steps)
    count = options.whole_windows(args.tokens, CONTEXT)
    text_name, text = read_text(args.text) if args.text else read_docstrings()
    folder = options.out_folder(args.out)
    options.use_compilation_cache()
    with options.progress(count + 2) as report:
        report(f"loading {args.model}")
        model = load(args.model)
        moments, _ = load_moments(args.calibration, model.config, model.params)
        windows = model_windows(model, text, context=CONTEXT, windows=count)
        tuned, losses = _tune(model, moments, windows, args, steps, report)
    made = TunedFrom(
        model=model.config.name,
        method=args.method,
        text=text_name,
        kvjax=kvjax.__version__,
        tokens=count * CONTEXT,
        steps=steps,
        moments=moments_hash(moments),
    )
    path = save_tuned(tuned, folder, made)
    stamp = make_stamp(seed=args.seed, command="kvjax " + shlex.join(sys.argv[1:]))
    write_json(
        folder / "tune.json",
        {**dataclasses.asdict(made), "losses": losses.tolist(), "stamp": stamp},
    )
    before, after = losses.sum(0)
    print(
        f"{made.model}, {made.method}: loss of the text tuned on {before:.3g} -> {after:.3g} "
        f"({after / before - 1:+.1%})\nwrote {path}"
    )
    return 0


def _tune(model, moments, windows, args: argparse.Namespace, steps: int, report):
    import jax

    from kvjax.calibrate.names import get_calibrated
    from kvjax.calibrate.tune import tune_keys
    from kvjax.calibrate.tune_sample import collect
    from kvjax.core.rng import fold

    methods = get_calibrated(args.method, moments)
    rng = fold(jax.random.key(args.seed), "tune")
    sample = collect(model.params, model.config, list(windows), moments, rng=rng, progress=report)
    report("tuning")
    return tune_keys(methods, moments, sample, steps=steps)
