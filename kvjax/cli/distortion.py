"""`kvjax distortion`: errors of codes on vectors, at true bits, beside the bound."""

from __future__ import annotations

import argparse
import shlex
import sys

from kvjax.cli import options
from kvjax.core.errors import InputError, known

DEFAULT_METHODS = (
    "turboquant-2,turboquant-3,turboquant-4,turboquant-prod-3,eden-3,eden-search-3,rabitq-3,"
    "polarquant,nvfp4,hadamard-int3,e8-2,trellis-2,trellis-3"
)


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "distortion",
        help="errors of codes on vectors: true bits, bias, decibels to the bound, speed",
        description="Encodes and decodes vectors with the key codec of each method. Writes "
        "OUT/metrics.json and OUT/gap.png. The whole grid: experiments/distortion.py.",
    )
    parser.add_argument(
        "--methods", default=DEFAULT_METHODS, help="comma-separated names (%(default)s)"
    )
    parser.add_argument("--dims", default="128", help="dimensions (%(default)s)")
    parser.add_argument(
        "--data",
        default="sphere,heavy,outliers",
        help="kinds of random vectors: sphere, heavy, outliers (%(default)s)",
    )
    parser.add_argument(
        "--model",
        help=f"also its keys and values, at its own head_dim: {options.MODEL_HELP}",
    )
    parser.add_argument("--text", help="a UTF-8 text file (default: prose that ships with Python)")
    parser.add_argument(
        "--values", type=int, default=131072, help="numbers per kind of data (%(default)s)"
    )
    parser.add_argument("--page", type=int, default=64, help="vectors per page (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of rotations (%(default)s)")
    parser.add_argument("--out", default="runs/distortion", help="folder (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from kvjax.evals.distortion_run import Settings, run_distortion, write
    from kvjax.evals.vectors import KINDS
    from kvjax.methods.names import recipes

    names, kinds = options.method_names(args.methods), options.names(args.data)
    for name in names:
        recipes(name)  # an unknown one is told before anything runs
    for kind in kinds:
        if kind not in KINDS:
            raise InputError("--data", got=kind, expected=known(KINDS), fix="use these names")
    settings = Settings(
        methods=tuple(names),
        dims=tuple(_dimension(d) for d in options.names(args.dims)),
        data=tuple(kinds),
        models=(args.model,) if args.model else (),
        text=args.text,
        page=options.positive("--page", args.page),
        values=options.positive("--values", args.values),
        seed=args.seed,
    )
    folder = options.out_folder(args.out)
    options.use_compilation_cache()
    with options.progress() as report:
        result = run_distortion(settings, report)
    write(result, folder, command="kvjax " + shlex.join(sys.argv[1:]), seed=args.seed)
    return 0


def _dimension(text: str) -> int:
    if not text.isdecimal():
        raise InputError("--dims", got=text, expected="whole numbers, as 64,128", fix="name some")
    return options.positive("--dims", int(text))
