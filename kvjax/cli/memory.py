"""`kvjax memory`: exact cache sizes for any model and method, without loading either."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kvjax.cli import options
from kvjax.core.errors import InputError, known


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "memory",
        help="plan memory: bytes per token and at a context, for every method",
        description="Sizes come from the shapes that would be allocated. No weights are needed.",
    )
    parser.add_argument(
        "--model",
        default="llama-3.1-70b",
        help="a known name, a config.json or its folder, or a .gguf file (%(default)s)",
    )
    parser.add_argument("--context", type=int, help="tokens (default: the model's positions)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (%(default)s)")
    parser.add_argument("--methods", help="comma-separated names (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options.add_layout(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import dataclasses

    from kvjax.evals.memory import footprint, plain_bytes
    from kvjax.methods import RECIPES

    config = read_config(args.model)
    context = config.max_positions if args.context is None else args.context
    context, batch = options.positive("--context", context), options.positive("--batch", args.batch)
    layout = options.layout_of(args)
    names = options.names(args.methods) if args.methods else list(RECIPES)
    rows = [footprint(config, name, context=context, batch=batch, layout=layout) for name in names]
    per_token = int(config.kv_bytes_per_token(2))
    plain = plain_bytes(config, context, batch)
    if args.json:
        data = {
            "model": config.name,
            "context": context,
            "batch": batch,
            "plain_bf16": {"bytes_per_token": per_token, "bytes": plain},
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        print(json.dumps(data, indent=1))
        return 0
    print(
        f"{config.name}: {config.layers} layers, {config.kv_heads} KV heads of {config.head_dim}; "
        f"context {context:,}, batch {batch}\n"
        f"plain bf16 cache: {per_token:,} B per token, {plain / 2**30:.2f} GiB\n"
    )
    print(f"{'method':20s} {'bits/value':>10s} {'B/token':>10s} {'cache GiB':>10s} {'of bf16':>8s}")
    for row in rows:
        print(
            f"{row.method:20s} {row.bits_per_value:10.3f} {row.bytes_per_token:10,.0f} "
            f"{row.cache_bytes / 2**30:10.3f} {row.ratio:8.3f}"
        )
    print(
        f"\nbits/value: packed history with all side information; cache: with {layout.sink} sink "
        f"and {layout.recent + layout.page} recent slots in bf16"
    )
    return 0


def read_config(name: str):
    """A `ModelConfig` from a known name, a config.json, a folder that holds one, or a GGUF file."""
    from kvjax.models.config import known_configs

    configs = known_configs()
    if name.lower() in configs:
        return configs[name.lower()]
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise InputError(
            "--model",
            got=repr(name),
            expected=f"{known(configs)}, or a config.json or .gguf file",
            fix="use one of these names or check the path",
        )
    if path.suffix == ".gguf":
        from kvjax.models.gguf_config import from_gguf
        from kvjax.models.gguf_file import GGUFFile

        return from_gguf(GGUFFile(path))
    from kvjax.models.hf_config import from_hf

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            str(path),
            got=f"text that is not JSON ({error})",
            expected="a config.json",
            fix="check the file",
        ) from None
    return from_hf(data)
