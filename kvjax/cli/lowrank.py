"""`kvjax lowrank`: subspaces for keys and values, as Palu and Eigen Attention choose them."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys

from kvjax.cli import options
from kvjax.core.errors import InputError

GRADIENT_CONTEXT = 1024  # tokens per window that gradients go back through


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "lowrank",
        help="fit low-rank methods, Palu or Eigen Attention, to a model",
        description="One exact pass over a text, and with --search fisher gradients of some of it. "
        "Writes OUT/lowrank.safetensors, which `kvjax compare --methods lowrank:OUT` takes. Never "
        "fit to the text you test on.",
    )
    options.add_model(parser)
    options.add_sample(parser, tokens=8192)
    parser.add_argument("--context", type=int, default=2048, help="tokens per window (%(default)s)")
    parser.add_argument(
        "--rank", type=float, default=0.5, help="mean share of the channels kept (%(default)s)"
    )
    parser.add_argument(
        "--bits", type=int, default=4, help="per kept coordinate, 1 to 8, or 16 (%(default)s)"
    )
    parser.add_argument(
        "--group-heads", type=int, default=1, help="KV heads of one subspace (%(default)s)"
    )
    parser.add_argument(
        "--variant", default="palu", help="palu or eigen: whose basis keys have (%(default)s)"
    )
    parser.add_argument(
        "--search",
        help="how ranks differ by layer: fisher (palu's), threshold (eigen's) or uniform",
    )
    parser.add_argument(
        "--leaf",
        default="uniform",
        help="uniform, a grid per token as in Palu, or lloyd_max, TurboQuant's (%(default)s)",
    )
    parser.add_argument(
        "--multiple",
        type=int,
        default=0,
        help="that ranks per head are multiples of (a quarter of the head, at most 32)",
    )
    parser.add_argument(
        "--gradients",
        type=int,
        default=4096,
        metavar="TOKENS",
        help=f"for --search fisher, in windows of {GRADIENT_CONTEXT} (%(default)s)",
    )
    parser.add_argument("--out", default="runs/lowrank", help="folder (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import kvjax
    from kvjax.calibrate.joint_moments import measure_joint, weight_fisher
    from kvjax.calibrate.low_rank import LowRankSettings, low_rank_methods
    from kvjax.calibrate.low_rank_file import LowRankFrom, save_low_rank
    from kvjax.cli.compare import write_json
    from kvjax.evals.stamp import make_stamp
    from kvjax.evals.text import model_windows, read_docstrings, read_text
    from kvjax.models.fingerprint import fingerprint
    from kvjax.models.load import load

    if args.search is None:
        args.search = "threshold" if args.variant == "eigen" else "fisher"
    names = [field.name for field in dataclasses.fields(LowRankSettings)]
    settings = LowRankSettings(**{name: getattr(args, name) for name in names})
    context = options.positive("--context", args.context)
    count = options.whole_windows(args.tokens, context, "raise it, or lower --context")
    drawn = args.gradients // GRADIENT_CONTEXT if settings.search == "fisher" else 0
    if settings.search == "fisher" and drawn < 1:
        raise InputError(
            "--gradients",
            got=args.gradients,
            expected=f"{GRADIENT_CONTEXT} tokens or more, for --search fisher",
            fix="raise it, or use --search uniform",
        )
    text_name, text = read_text(args.text) if args.text else read_docstrings()
    folder = options.out_folder(args.out)
    options.use_compilation_cache()
    with options.progress(count + drawn + 2) as report:
        report(f"loading {args.model}")
        model = load(args.model)
        config, params = model.config, model.params
        settings.check(config.kv_heads, config.head_dim)
        cut = lambda length, many: list(model_windows(model, text, context=length, windows=many))
        moments = measure_joint(params, config, cut(context, count), report)
        if drawn:
            fisher = weight_fisher(params, config, cut(GRADIENT_CONTEXT, drawn), report)
            moments = dataclasses.replace(moments, fisher=fisher)
        report("bases")
        methods = low_rank_methods(moments, settings)
    made = LowRankFrom(
        model=config.name,
        weights=fingerprint(params),
        text=text_name,
        kvjax=kvjax.__version__,
        tokens=moments.tokens,
        context=context,
        gradients=drawn * GRADIENT_CONTEXT,
        settings=dataclasses.asdict(settings),
    )
    path = save_low_rank(methods, folder, made)
    stamp = make_stamp(seed=0, command="kvjax " + shlex.join(sys.argv[1:]))
    write_json(folder / "stamp.json", stamp)
    print(f"{config.name}, {settings.variant} at {settings.bits} bits, {text_name}")
    page = math.lcm(64, 16 * settings.group_heads)
    for line in _table(methods, config.head_dim, page):
        print(line)
    if page > 64:
        print(f"its pages are multiples of {16 * settings.group_heads} tokens: give --page")
    print(f"wrote {path}")
    return 0


def _table(methods, head_dim: int, page: int) -> list[str]:
    """Ranks per head, and bytes of packed tokens against bf16, by kinds of layers."""
    import numpy as np

    from kvjax.calibrate.low_rank import ranks_of
    from kvjax.core.layout import Layout
    from kvjax.methods.describe import layer_kinds, method_bits, ranges

    ranks = ranks_of(methods)
    methods = [m.with_layout(Layout(recent=page, page=page)) for m in methods]
    share = np.array([sum(method_bits(m, head_dim)) / 2 / 16 for m in methods])
    lines = ["   keys  values  of bf16  layers"]
    for layers in layer_kinds(methods):
        key, value = ranks[layers[0]]
        lines.append(f"  {key:5g}  {value:6g}  {share[layers[0]]:7.3f}  {ranges(layers)}")
    key, value = ranks.mean(0)
    lines.append(f"  {key:5.1f}  {value:6.1f}  {share.mean():7.3f}  mean, of {head_dim} channels")
    return lines
