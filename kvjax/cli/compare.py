"""`kvjax compare`: methods side by side on a real model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys

from kvjax.cli import options
from kvjax.core.errors import InputError

DEFAULT_METHODS = (
    "bf16,int8,int2,hadamard-int4,hadamard-int2,kivi-2,kivi-4,"
    "turboquant-2,turboquant-3,turboquant-4,turboquant-prod-3"
)


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="compare methods on a real model: bits, bytes, KL, perplexity, speed",
        description="Feeds text through the model with each method's real packed cache, and writes "
        "OUT/metrics.json, OUT/report.html and OUT/pareto.png.",
    )
    options.add_model(parser)
    parser.add_argument(
        "--methods",
        default=DEFAULT_METHODS,
        help="comma-separated names; KEYS/VALUES mixes two; an unknown name lists them all "
        "(%(default)s)",
    )
    options.add_calibration(parser)
    parser.add_argument("--context", type=int, default=2048, help="tokens per window (%(default)s)")
    parser.add_argument("--windows", type=int, default=1, help="windows of text (%(default)s)")
    parser.add_argument("--text", help="a UTF-8 text file (default: prose that ships with Python)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of rotations and sketches (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=4, help="timed rounds of 5 steps per method; 0 skips speed"
    )
    parser.add_argument(
        "--samples", metavar="METHOD", help="also continue some text with METHOD and the full cache"
    )
    parser.add_argument(
        "--out", default="runs/compare", help="folder for the results (%(default)s)"
    )
    options.add_layout(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from kvjax.calibrate.artefact import load_moments
    from kvjax.calibrate.names import check_name, fitted_on
    from kvjax.evals.compare import Settings, compare
    from kvjax.evals.report import write_report
    from kvjax.evals.stamp import make_stamp
    from kvjax.evals.table import print_table
    from kvjax.evals.text import read_text, same_text
    from kvjax.models.load import load

    layout = options.layout_of(args)
    names = options.method_names(args.methods)
    if args.rounds < 0:
        raise InputError("--rounds", got=args.rounds, expected="0 or more", fix="0 skips speed")
    settings = Settings(
        methods=names,
        context=options.positive("--context", args.context),
        windows=options.positive("--windows", args.windows),
        layout=layout,
        seed=args.seed,
        rounds=args.rounds,
        sample_method=args.samples,
    )
    for name in [*names, *([args.samples] if args.samples else [])]:
        check_name(name, args.calibration)  # told before anything is loaded
    text_name, text = read_text(args.text)
    folder = options.out_folder(args.out)
    options.use_compilation_cache()
    with options.progress(len(names) + settings.windows + 3) as report:
        report(f"loading {args.model}")
        model = load(args.model)
        if args.calibration is not None:
            moments, made = load_moments(args.calibration, model.config, model.params)
            settings = dataclasses.replace(settings, calibration=moments)
        seen = {"calibration": None if args.calibration is None else made.text}
        seen |= {
            f"fit of {name}": fitted_on(name, model.config, settings.calibration, model.params)
            for name in names
        }
        for what, of in seen.items():
            if of is not None and same_text(of, text_name):
                raise InputError(
                    "--text",
                    got=f"the text of the {what}, {of}",
                    expected="another text",
                    fix="test on a text that played no part",
                )
        if args.calibration is not None:
            options.warn_reach(made.reach, settings.context)
        result = compare(model, text, settings, report)
    command = "kvjax " + shlex.join(sys.argv[1:])
    metrics = {
        "model": model.config.name,
        "text": text_name,
        **result,
        "stamp": make_stamp(seed=args.seed, command=command),
    }
    write_json(folder / "metrics.json", metrics)
    write_report(metrics, folder)
    print_table(metrics)
    for sample in metrics["samples"]:
        print(f"{sample['method']:>14}: ... {sample['prompt'][-40:]} | {sample['text']}")
    print(f"wrote {folder / 'metrics.json'}, report.html, pareto.png")
    return 0


def write_json(path, data) -> None:
    """Writes atomically: a reader sees the old file or the new one, never half of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
