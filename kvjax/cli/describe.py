"""`kvjax describe`: what a method is, and what it really costs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kvjax.cli import options
from kvjax.core.errors import InputError

if TYPE_CHECKING:
    from kvjax.calibrate.moments import Moments
    from kvjax.core.layout import Layout
    from kvjax.core.method import Method
    from kvjax.models.config import ModelConfig


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "describe",
        help="a method's tree of codecs, with the true bits of every part",
        description="Prints what a method is made of. Bits count scales, norms and indices.",
    )
    parser.add_argument("method", nargs="?", help="a name, or KEYS/VALUES; without it, all names")
    parser.add_argument("--head-dim", type=int, help="(128, or that of the model)")
    options.add_calibration(parser)
    parser.add_argument(
        "--model", help="with --calibration: check that it is of this model, as `compare` does"
    )
    options.add_layout(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from kvjax.calibrate.artefact import load_moments
    from kvjax.calibrate.names import CALIBRATED, check_name
    from kvjax.cli.memory import read_calibration
    from kvjax.methods import RECIPES
    from kvjax.methods.describe import describe

    layout = options.layout_of(args)
    if args.method is not None:
        check_name(args.method, args.calibration)
    moments = config = None
    if args.calibration is not None and args.model is not None:
        config, moments = read_calibration(args.calibration, args.model)
    elif args.calibration is not None:
        moments, _ = load_moments(args.calibration)
    elif args.model is not None:
        raise InputError(
            "--model",
            got=f"{args.model} without --calibration",
            expected="the folder of a calibration of this model",
            fix="add --calibration, or give --head-dim instead",
        )
    head_dim = _head_dim(args.head_dim, moments)
    made = lambda name: _method(name, head_dim, config, moments, layout)
    if args.method is not None:
        print(describe(made(args.method), head_dim))
        return 0
    print(f"{'method':27s} {'keys':>6s} {'values':>6s}  true bits per value at head_dim {head_dim}")
    for name in (*RECIPES, *(CALIBRATED if moments is not None else ())):
        try:
            print(_row(name, made(name), head_dim), flush=True)
        except InputError as error:  # of no use here is of interest too: it says what is missing
            print(f"{name:27s} {'-':>6s} {'-':>6s}  {error}")
    return 0


def _head_dim(asked: int | None, moments: Moments | None) -> int:
    if asked is not None:
        options.positive("--head-dim", asked)
    if moments is None:
        return 128 if asked is None else asked
    d = moments.shape[2]
    if asked not in (None, d):
        raise InputError(
            "--head-dim", got=asked, expected=f"{d}, that of the calibration", fix="leave it out"
        )
    return d


def _method(
    name: str,
    head_dim: int,
    config: ModelConfig | None,
    moments: Moments | None,
    layout: Layout,
) -> Method | tuple[Method, ...]:
    """As `get_for_model`, without a model too where a name needs none."""
    from kvjax.calibrate.names import (
        CALIBRATED,
        LOWRANK,
        TUNED,
        get_calibrated,
        get_for_model,
    )
    from kvjax.methods import get

    if config is not None:
        return get_for_model(name, config, moments, layout=layout)
    if name.startswith((TUNED, LOWRANK)):
        raise InputError(
            f"method {name}",
            got="no --model",
            expected="the model that it was fitted to",
            fix="name it: fitted methods are checked against their model",
        )
    if moments is not None and name in CALIBRATED:
        return get_calibrated(name, moments, layout=layout)
    return get(name, head_dim, layout=layout)


def _row(name: str, method: Method | tuple[Method, ...], head_dim: int) -> str:
    """A line of the table: the mean over layers, and their range where they differ."""
    from kvjax.core.method import Method
    from kvjax.methods.describe import layer_kinds, method_bits

    kinds = layer_kinds((method,) if isinstance(method, Method) else method)
    count = sum(map(len, kinds))
    bits = [(len(layers), *method_bits(one, head_dim)) for layers, one in kinds.items()]
    keys, values = (sum(row[0] * row[side] for row in bits) / count for side in (1, 2))
    line = f"{name:27s} {keys:6.2f} {values:6.2f}"
    if len(kinds) > 1:
        low, high = min(row[1] for row in bits), max(row[1] for row in bits)
        line += f"  mean of {count} layers; keys {low:.2f} to {high:.2f}"
    return line
