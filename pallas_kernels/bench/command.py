"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from pallas_kernels.bench.results import Problem, Results, make_stamp, table
from pallas_kernels.bench.setting import Part, Setting, matching

# By device, in this order. Those of kvjax need kvjax beside this package.
PARTS = {
    "gpu": {
        "attention": "pallas_kernels.bench.attention",
        "sweep": "pallas_kernels.bench.sweep",
        "encode": "kvjax.evals.encode_speed",
        "step": "kvjax.evals.step_speed",
    },
    "cpu": {"page-scan": "kvjax.evals.page_scan_speed"},
}
GPU = ("gpu", "cuda")
WRONG = "WRONG NUMBERS"  # how rows say why something was not measured
ABOUT = """Checks numbers, then measures. On a GPU: decode attention of one layer by format against
XLA, cuDNN and torch (attention), tunings of the kernel (sweep), encoding (encode), and whole steps
of an 8B model (step); about 8 minutes on an H200. On a CPU: the page scan of kvjax against dense
attention (page-scan)."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Problem("arguments", got=message, expected="those of --help", fix="see --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. 0: all is well; 1: numbers of some format are wrong; 2: bad arguments."""
    try:
        return _run(_parser().parse_args(argv), argv)
    except Problem as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m pallas_kernels.bench", description=ABOUT)
    parser.add_argument("--device", choices=("gpu", "cpu"), help="default: gpu where jax sees one")
    parser.add_argument("--part", help="parts to run, with commas between; default: all")
    parser.add_argument("--only", metavar="PATTERN", help="rows whose id holds this; * is wild")
    parser.add_argument("--out", type=Path, help="JSON file; rows in it are kept, not run again")
    parser.add_argument("--rounds", type=int, help="of every comparison; default 21")
    parser.add_argument("--tune", action="store_true", help="write the best of the sweeps down")
    parser.add_argument("--tiny", action="store_true", help="small, on any device: no measurement")
    parser.add_argument("--list", action="store_true", help="ids of rows, and nothing else")
    return parser


def _run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    if args.device == "cpu":
        jax.config.update("jax_platforms", "cpu")  # also where there is a GPU
    device = args.device or ("gpu" if jax.default_backend() in GPU else "cpu")
    if device == "gpu" and not args.tiny and not args.list and jax.default_backend() not in GPU:
        raise Problem(
            "--device gpu",
            got=f"only {jax.default_backend()} here",
            expected="a GPU that jax sees",
            fix="install jax[cuda13], or try --device cpu or --tiny",
        )
    if args.rounds is not None and args.rounds < 1:
        raise Problem("--rounds", got=args.rounds, expected="1 or more", fix="use 21")
    wanted = _wanted(device, args)
    if args.list:
        print("\n".join(name for names in wanted.values() for name in names))
        return 0
    words = sys.argv[1:] if argv is None else argv
    command = " ".join(["python -m pallas_kernels.bench", *words])
    measured = not args.tiny
    stamp = make_stamp(command, measured=measured)
    setting = Setting(
        backend="interpret" if args.tiny else "triton",
        rounds=args.rounds or (2 if args.tiny else 21),
        seconds=0.0 if args.tiny else 0.01,
        bandwidth=4e12,
        tiny=args.tiny,
        tune=args.tune,
        stamp=stamp,
    )
    results = Results(args.out, stamp)
    return _measure(device, wanted, setting, results)


def _measure(device: str, wanted: dict[str, list[str]], setting: Setting, results: Results) -> int:
    stamp, begin, wrong = setting.stamp, time.perf_counter(), False
    label = [stamp[k] for k in ("device", "date", "note") if stamp[k]]
    print(", ".join(label), f"commit {stamp['commit']}, jax {stamp['jax']}", sep=", ", flush=True)
    for name, names in wanted.items():
        left = [n for n in names if not results.done(n)]
        kept = [results.rows[n] for n in names if results.done(n)]
        if kept:
            print(f"\n{name}, kept from before\n{table(kept)}")
        if not left:
            continue
        for rows in _part(device, name).measure(left, setting):
            results.add(rows)
            wrong |= WRONG in str(rows)
            spent = time.perf_counter() - begin
            print(f"\n{name}, {spent:.0f} s{_marked(setting)}\n{table(rows)}", flush=True)
    return int(wrong)


def _marked(setting: Setting) -> str:
    return ", interpret: not a measurement" if setting.tiny else ""


def _wanted(device: str, args: argparse.Namespace) -> dict[str, list[str]]:
    """The ids of each part that are asked for."""
    known = PARTS[device]
    parts = list(known) if args.part is None else args.part.split(",")
    for part in parts:
        if part not in known:
            raise Problem(
                "--part",
                got=repr(part),
                expected=f"some of {', '.join(known)} with --device {device}",
                fix="name one of them",
            )
    names = {part: _part(device, part).units(args.tiny) for part in parts}
    found = {part: matching(own, args.only) for part, own in names.items()}
    if not any(found.values()):
        some = [n for own in names.values() for n in own][:3]
        raise Problem(
            "--only",
            got=repr(args.only),
            expected=f"part of an id, such as {', '.join(some)}",
            fix="see --list",
        )
    return {part: own for part, own in found.items() if own}


def _part(device: str, name: str) -> Part:
    module = PARTS[device][name]
    if module.startswith("kvjax") and importlib.util.find_spec("kvjax") is None:
        raise Problem(
            f"--part {name}",
            got="no kvjax beside pallas_kernels",
            expected="kvjax, whose caches and models it runs through",
            fix="install kvjax, or use --part attention,sweep",
        )
    part: Part = importlib.import_module(module)
    return part
