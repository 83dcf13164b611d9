"""`kvjax launch`: one command in several processes that are one program."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
from pathlib import Path

from kvjax.cli import options
from kvjax.core.errors import InputError


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "launch",
        help="run a script in several processes with one mesh over their devices",
        description="Starts COMMAND once per process, with KVJAX_COORDINATOR, KVJAX_PROCESSES, "
        "KVJAX_PROCESS_ID and KVJAX_LOCAL_DEVICES in its environment; the script's first line, "
        "kvjax.parallel.start_from_environment(), reads them. Every line that comes out is "
        "marked with its process. Where one process dies the others are ended, within 5 s, and "
        "the last line of this command says which and why. For several machines: --coordinator "
        "and --print, and start each printed line where it belongs.",
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument(
        "--local-devices",
        type=int,
        help="devices of each: simulated CPUs, or GPUs of this machine, dealt out in turn "
        "(1 CPU; an equal share of the GPUs)",
    )
    parser.add_argument(
        "--coordinator", help="HOST:PORT where process 0 listens (a free port of this machine)"
    )
    parser.add_argument(
        "--timeout", type=float, help="seconds that processes wait for each other at the start (30)"
    )
    parser.add_argument(
        "--print", action="store_true", dest="show", help="print the commands, run nothing"
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from kvjax.cli.workers import run_all

    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words:
        raise InputError(
            "command",
            got="none",
            expected="one after --",
            fix="as in: kvjax launch --processes 2 -- python script.py",
        )
    every = environments(args)
    if args.show:
        for own in every:
            print(" ".join(f"{k}={shlex.quote(v)}" for k, v in own.items()), shlex.join(words))
        return 0
    run_all(words, every)
    return 0


def environments(args: argparse.Namespace) -> list[dict[str, str]]:
    """The variables of each process.

    Raises:
      InputError: numbers below 1, an address that is none, more processes than GPUs.
    """
    from kvjax.parallel.processes import check_timeout
    from kvjax.parallel.rollcall import address

    count = options.positive("--processes", args.processes)
    if args.timeout is not None:
        check_timeout("--timeout", args.timeout)
    if args.local_devices is not None:
        options.positive("--local-devices", args.local_devices)
    coordinator = args.coordinator or f"127.0.0.1:{free_port()}"
    address(coordinator)
    shared = {"KVJAX_COORDINATOR": coordinator, "KVJAX_PROCESSES": str(count)}
    if args.timeout is not None:
        shared["KVJAX_TIMEOUT"] = f"{args.timeout:g}"
    # Commands that are printed for other machines leave their GPUs to them.
    gpus = [] if args.coordinator and args.show else gpus_here()
    each = args.local_devices or (max(1, len(gpus) // count) if gpus else 1)
    if gpus and count * each > len(gpus):
        raise InputError(
            "--processes",
            got=f"{count} with {each} devices each",
            expected=f"at most the {len(gpus)} GPUs of this machine",
            fix="start fewer, or simulate devices with JAX_PLATFORMS=cpu",
        )
    found = []
    for n in range(count):
        own = shared | {"KVJAX_PROCESS_ID": str(n), "KVJAX_LOCAL_DEVICES": str(each)}
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[n * each : (n + 1) * each])
        found.append(own)
    return found


def gpus_here() -> list[str]:
    """NVIDIA GPUs that jax would use, by what CUDA_VISIBLE_DEVICES calls them; none on CPU."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and platforms.split(",")[0] not in ("cuda", "gpu"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return [name for name in names if name and not name.startswith("-")]
    nodes = [p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]
    return [str(n) for n in range(len(nodes))]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
