"""`kvjax limits`: how far each method is from the least logit error there can be, head by head."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from kvjax.cli import options
from kvjax.core.errors import InputError


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "limits",
        help="predicted and measured logit errors, and the bound, for every KV head",
        description="Climbs from TurboQuant to the rate-distortion bound, one idea per rung: what "
        "each rung should err by the calibration, and what it errs on another text. Writes "
        "OUT/limits.json and OUT/limits.png.",
    )
    options.add_model(parser)
    parser.add_argument(
        "--calibration", required=True, help="folder that `kvjax calibrate` wrote for this model"
    )
    parser.add_argument("--text", help="a UTF-8 text file (default: prose that ships with Python)")
    parser.add_argument(
        "--bits", type=int, default=2, help="of the ladder: 2, 3 or 4 (%(default)s)"
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens per window (%(default)s)")
    parser.add_argument("--windows", type=int, default=1, help="windows of text (%(default)s)")
    parser.add_argument(
        "--methods", help="comma-separated names, calibrated or not (default: the ladder)"
    )
    parser.add_argument("--layers", action="store_true", help="also a line for each layer")
    parser.add_argument("--heads", action="store_true", help="also a line for each KV head")
    parser.add_argument("--seed", type=int, default=0, help="of rotations (%(default)s)")
    parser.add_argument("--out", default="runs/limits", help="folder (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from kvjax.calibrate.artefact import load_moments
    from kvjax.calibrate.names import check_name
    from kvjax.calibrate.rungs import LADDER
    from kvjax.cli.compare import write_json
    from kvjax.evals.limits import Settings, limits, print_limits
    from kvjax.evals.limits_plot import limits_png
    from kvjax.evals.stamp import make_stamp
    from kvjax.evals.text import read_text, same_text
    from kvjax.models.load import load

    if args.bits not in (2, 3, 4):
        raise InputError("--bits", got=args.bits, expected="2, 3 or 4", fix="choose one of these")
    ladder = [f"{rung}-{args.bits}" for rung in LADDER]
    names = ladder if args.methods is None else options.method_names(args.methods)
    for name in names:
        check_name(name, args.calibration)  # told before anything is loaded
    settings = Settings(
        methods=tuple(names),
        bits=args.bits,
        context=options.positive("--context", args.context),
        windows=options.positive("--windows", args.windows),
        seed=args.seed,
    )
    text_name, text = read_text(args.text)
    folder = options.out_folder(args.out)
    options.use_compilation_cache()
    with options.progress(len(names) + settings.windows + 1) as report:
        report(f"loading {args.model}")
        model = load(args.model)
        moments, made = load_moments(args.calibration, model.config, model.params)
        if same_text(made.text, text_name):
            print(
                f"kvjax: the calibration saw this text, {made.text}: what is measured on it says "
                "nothing about others; give another --text",
                file=sys.stderr,
            )
        result = limits(model, moments, text, settings, report)
    metrics = {
        "model": model.config.name,
        "calibration": {"text": made.text, "tokens": made.tokens, "context": made.context},
        "text": text_name,
        **result,
        "stamp": make_stamp(seed=args.seed, command="kvjax " + shlex.join(sys.argv[1:])),
    }
    picture = folder / "limits.png"
    partial = picture.with_suffix(".partial")
    partial.write_bytes(limits_png(metrics))
    os.replace(partial, picture)
    write_json(folder / "limits.json", metrics)
    print_limits(metrics, layers=args.layers, heads=args.heads)
    print(f"wrote {folder / 'limits.json'}, limits.png")
    return 0
