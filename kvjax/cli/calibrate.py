"""`kvjax calibrate`: what a model's queries, keys and values look like, for calibrated methods."""

from __future__ import annotations

import argparse
import re
import shlex
import sys

from kvjax.cli import options

GRADIENT_CONTEXT = 1024  # tokens per window that gradients go back through


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="measure a model's queries, keys and values, for attention-aware methods",
        description="Two exact passes over a text. Writes OUT/moments.safetensors (or "
        "moments.orbax), which `kvjax compare --calibration OUT` takes. Never calibrate on the "
        "text you test on.",
    )
    options.add_model(parser)
    options.add_sample(parser, tokens=8192)
    parser.add_argument("--context", type=int, default=2048, help="tokens per window (%(default)s)")
    parser.add_argument(
        "--positions",
        type=int,
        metavar="TOKENS",
        help="the longest context that will be served: keys and queries are averaged over its "
        "positions, at no cost in time (default: --context; far beyond that methods lose what "
        "calibration gains)",
    )
    parser.add_argument(
        "--gradients",
        type=int,
        default=0,
        metavar="TOKENS",
        help="also measure, on so many tokens in windows of 1024, what errors of keys and values "
        "do to the predictions, for klt-fisher and klt-layers methods (%(default)s; the README's "
        "results had 8192)",
    )
    parser.add_argument("--out", help="folder (default: runs/calibration/MODEL)")
    parser.add_argument(
        "--format",
        choices=("safetensors", "orbax"),
        default="safetensors",
        help="one file, or an orbax checkpoint (%(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import jax

    import kvjax
    from kvjax.calibrate.artefact import Provenance, save_moments
    from kvjax.calibrate.drift import drift_summary
    from kvjax.calibrate.klt import shrinkage
    from kvjax.calibrate.moments import layer_windows, measure_moments
    from kvjax.calibrate.sensitivity import measure_sensitivity
    from kvjax.calibrate.served import at_positions
    from kvjax.cli.compare import write_json
    from kvjax.core.errors import InputError
    from kvjax.core.rng import fold
    from kvjax.evals.stamp import make_stamp
    from kvjax.evals.text import model_windows, read_docstrings, read_text
    from kvjax.models.fingerprint import fingerprint
    from kvjax.models.load import load

    context = options.positive("--context", args.context)
    windows = options.whole_windows(args.tokens, context, "raise it, or lower --context")
    name, text = read_text(args.text) if args.text else read_docstrings()
    options.use_compilation_cache()
    drawn = args.gradients // GRADIENT_CONTEXT if args.gradients else 0
    if args.gradients and drawn < 1:
        raise InputError(
            "--gradients",
            got=args.gradients,
            expected=f"0, or {GRADIENT_CONTEXT} tokens and more",
            fix="raise it, or leave it out",
        )
    positions = None
    if args.positions is not None:
        positions = options.positive("--positions", args.positions)
        if positions < context:
            raise InputError(
                "--positions",
                got=positions,
                expected=f"the {context} of --context or more",
                fix="give the longest context that will be served, or a smaller --context",
            )
    with options.progress(2 * windows + drawn + 1) as report:
        report(f"loading {args.model}")
        model = load(args.model)
        cut = model_windows(model, text, context=context, windows=windows)
        folder = options.out_folder(args.out or f"runs/calibration/{_plain(model.config.name)}")
        moments = measure_moments(model.params, model.config, list(cut), report)
        if drawn:
            cut = model_windows(model, text, context=GRADIENT_CONTEXT, windows=drawn)
            rng = fold(jax.random.key(0), "calibrate")
            moments = measure_sensitivity(
                model.params, model.config, list(cut), moments, rng=rng, progress=report
            )
    if positions is not None:
        moments = at_positions(
            moments,
            context,
            positions,
            gradient_window=GRADIENT_CONTEXT,
            layer_windows=layer_windows(model.config),
        )
    layers, heads, d = moments.shape
    if moments.tokens < 8 * d:
        print(
            f"kvjax: {moments.tokens} tokens for covariances of {d} channels, fewer than {8 * d}: "
            f"methods will draw these {shrinkage(moments.tokens, d):.0%} of the way to their "
            "diagonals; better give more --tokens",
            file=sys.stderr,
        )
    about = Provenance(
        model.config.name,
        name,
        kvjax.__version__,
        moments.tokens,
        context,
        fingerprint(model.params),
        positions,
    )
    path = save_moments(moments, folder, about, args.format)
    stamp = make_stamp(seed=0, command="kvjax " + shlex.join(sys.argv[1:]))
    write_json(folder / "stamp.json", stamp)
    about_tokens = f"{moments.tokens} tokens of {name}"
    if positions is not None:
        about_tokens += f", at {positions} positions"
    print(f"{model.config.name}: {layers} layers, {heads} KV heads of {d}; {about_tokens}")
    for line in drift_summary(moments):
        print(line)
    print(f"wrote {path}")
    return 0


def _plain(name: str) -> str:
    """A name as a folder: what a model file calls itself is not to be trusted with a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
