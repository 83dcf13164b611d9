"""`kvjax`: the command line. Mistakes end in one line on stderr and status 2."""

from __future__ import annotations

import argparse
import os
import sys

from kvjax.core.errors import InputError

COMMANDS = (
    "compare",
    "calibrate",
    "tune",
    "lowrank",
    "mla",
    "limits",
    "distortion",
    "generate",
    "chat",
    "episodes",
    "describe",
    "memory",
    "launch",
    "models",
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    from importlib import import_module

    import kvjax

    parser = argparse.ArgumentParser(
        prog="kvjax",
        description="Compress the key-value cache of language models, and measure what it costs.",
        epilog="`kvjax COMMAND --help` tells more. First steps: kvjax models fetch smollm2-135m, "
        "then kvjax compare --model smollm2-135m.",
    )
    parser.add_argument("--version", action="version", version=f"kvjax {kvjax.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"kvjax.cli.{name}").add(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except InputError as error:
        print(f"kvjax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone: not our error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("kvjax: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
