"""`kvjax memory`: exact cache sizes for any model and method, without loading either."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvjax.cli import options
from kvjax.core.errors import InputError, known

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvjax.calibrate.moments import Moments
    from kvjax.core.method import Method
    from kvjax.evals.memory import Footprint
    from kvjax.models.config import ModelConfig

DEFAULT_MODEL = "llama-3.1-70b"


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "memory",
        help="plan memory: bytes per token and at a context, for every method",
        description="Sizes come from the shapes that would be allocated. No weights are needed; "
        "with --calibration those that are on this machine are read, to check that it is theirs.",
    )
    parser.add_argument(
        "--model",
        help="a known name, a config.json or its folder, or a .gguf file "
        f"({DEFAULT_MODEL}, or the model of the calibration)",
    )
    parser.add_argument("--context", type=int, help="tokens (default: the model's positions)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (%(default)s)")
    parser.add_argument(
        "--methods", help="comma-separated names (default: all that need no calibration)"
    )
    options.add_calibration(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options.add_layout(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import dataclasses

    from kvjax.calibrate.names import check_name, get_for_model
    from kvjax.evals.memory import footprint, plain_bytes
    from kvjax.methods import RECIPES

    names = options.names(args.methods) if args.methods else list(RECIPES)
    for name in names:
        check_name(name, args.calibration)  # told before anything is loaded
    moments = None
    if args.calibration is None:
        config = read_config(args.model or DEFAULT_MODEL)
    else:
        config, moments = read_calibration(args.calibration, args.model)
    context = config.max_positions if args.context is None else args.context
    context, batch = options.positive("--context", context), options.positive("--batch", args.batch)
    layout = options.layout_of(args)
    rows, by_layer = [], {}
    for name in names:
        method = get_for_model(name, config, moments, layout=layout)
        if isinstance(method, tuple):
            row, by_layer[name] = layers_footprint(config, method, context=context, batch=batch)
        else:
            row = footprint(config, name, context=context, batch=batch, layout=layout)
        rows.append(row)
    per_token = int(config.kv_bytes_per_token(2))
    plain = plain_bytes(config, context, batch)
    if args.json:
        data = {
            "model": config.name,
            "context": context,
            "batch": batch,
            "plain_bf16": {"bytes_per_token": per_token, "bytes": plain},
            "rows": [
                {**dataclasses.asdict(row), "bits_per_value_by_layer": by_layer.get(row.method)}
                for row in rows
            ],
        }
        print(json.dumps(data, indent=1))
        return 0
    print(
        f"{config.name}: {config.layers} layers, {config.kv_heads} KV heads of {config.head_dim}; "
        f"context {context:,}, batch {batch}\n"
        f"plain bf16 cache: {per_token:,} B per token, {plain / 2**30:.2f} GiB\n"
    )
    print(f"{'method':27s} {'bits/value':>10s} {'B/token':>10s} {'cache GiB':>10s} {'of bf16':>8s}")
    for row in rows:
        print(
            f"{row.method:27s} {row.bits_per_value:10.3f} {row.bytes_per_token:10,.0f} "
            f"{row.cache_bytes / 2**30:10.3f} {row.ratio:8.3f}"
        )
    for name, bits in by_layer.items():
        if max(bits) > min(bits):
            print(f"{name}: from {min(bits):.3f} to {max(bits):.3f} bits/value, by layer")
    print(
        f"\nbits/value: packed history with all side information; cache: with {layout.sink} sink "
        f"and {layout.recent + layout.page} recent slots in bf16"
    )
    return 0


def layers_footprint(
    config: ModelConfig, methods: Sequence[Method], *, context: int, batch: int
) -> tuple[Footprint, list[float]]:
    """As `footprint`, for one method per layer; also true bits per value of every layer, of which
    the footprint has the mean."""
    import jax

    from kvjax.cache import cache_bytes, history_bits_per_value
    from kvjax.evals.memory import Footprint, plain_bytes
    from kvjax.generate.plan import init_caches, make_plan

    plan = make_plan(config, methods)
    caches = jax.eval_shape(lambda: init_caches(plan, batch=batch, capacity=context))
    bits, growing = [0.0] * config.layers, 0.0
    for method, cache, group in zip(plan.methods, caches, plan.groups, strict=True):
        own = history_bits_per_value(method, cache)
        for layer in group.layers:
            bits[layer] = own
        if group.window is None:
            growing += 2 * len(group.layers) * config.kv_heads * config.head_dim * own / 8
    total = sum(cache_bytes(cache) for cache in caches)
    ratio, mean = total / plain_bytes(config, context, batch), sum(bits) / len(bits)
    return Footprint(methods[0].name, mean, growing, total, ratio), bits


def read_calibration(folder: str, name: str | None) -> tuple[ModelConfig, Moments]:
    """The calibration in `folder` and the model that it must be of.

    Args:
      name: of the model, as `read_config` takes it; by default what the calibration says.
    Raises:
      InputError: a calibration of another model, or of other weights than those of `name`. Where
        these are not on this machine it is checked by name and sizes, and stderr says so.
    """
    from kvjax.calibrate.artefact import load_moments
    from kvjax.models.load import load

    moments, made = load_moments(folder)
    name = name or made.model
    if _has_weights(name):
        model = load(name, dtype="bfloat16")  # of which fingerprints are made in any case
        load_moments(folder, model.config, model.params)
        return model.config, moments
    config = read_config(name)
    load_moments(folder, config)
    print(
        f"kvjax: the weights of {name} are not on this machine: {folder} was checked by the "
        "model's name and sizes only",
        file=sys.stderr,
    )
    return config, moments


def _has_weights(name: str) -> bool:
    """Whether `load` finds weights under that name, looking where it looks."""
    from kvjax.models import hub

    path = Path(name).expanduser()
    if path.exists():
        return any(path.glob("*.safetensors")) if path.is_dir() else path.suffix == ".gguf"
    for spec in hub.MODELS:
        if name.lower() in {n.lower() for n in (spec.name, *spec.aliases)}:
            return spec.kind == "decoder" and hub.installed(spec) is not None
    return False


def read_config(name: str) -> ModelConfig:
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
    return from_hf(data, path.parent.name)  # the name that `load` gives it
