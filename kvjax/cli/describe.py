"""`kvjax describe`: what a method is, and what it really costs."""

from __future__ import annotations

import argparse

from kvjax.cli import options


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "describe",
        help="a method's tree of codecs, with the true bits of every part",
        description="Prints what a method is made of. Bits count scales, norms and indices.",
    )
    parser.add_argument("method", nargs="?", help="a name, or KEYS/VALUES; without it, all names")
    parser.add_argument("--head-dim", type=int, default=128, help="(%(default)s)")
    options.add_layout(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from kvjax.methods import RECIPES, get
    from kvjax.methods.describe import code_bits, describe

    layout = options.layout_of(args)
    head_dim = options.positive("--head-dim", args.head_dim)
    if args.method is not None:
        print(describe(get(args.method, head_dim, layout=layout), head_dim))
        return 0
    print(f"{'method':20s} {'keys':>6s} {'values':>6s}  true bits per value at head_dim {head_dim}")
    for name in RECIPES:
        method = get(name, head_dim, layout=layout)
        bits = [code_bits(c, head_dim, layout.page) for c in (method.key, method.value)]
        print(f"{name:20s} {bits[0]:6.2f} {bits[1]:6.2f}")
    return 0
