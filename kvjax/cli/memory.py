"""`kvjax memory`: exact cache sizes for any model and method, without loading either."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvjax.cli import options
from kvjax.core.errors import InputError, known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvjax.calibrate.moments import Moments
    from kvjax.core.method import Method
    from kvjax.models.config import ModelConfig

DEFAULT_MODEL = "llama-3.1-70b"
DEFAULT_DEVICE = "h200"


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
        "--methods",
        help="comma-separated names (default: all that need no calibration and fit the model)",
    )
    options.add_calibration(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    spread = parser.add_argument_group("many devices")
    spread.add_argument("--devices", type=int, help="plan for so many: bytes on each, best mesh")
    spread.add_argument("--device", help="their kind, such as h200 (the default) or tpu-v5e")
    options.add_layout(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from kvjax.calibrate.names import check_name, get_for_model
    from kvjax.evals.devices import get_device
    from kvjax.methods import RECIPES

    names = list(RECIPES) if args.methods is None else options.method_names(args.methods)
    for name in names:
        check_name(name, args.calibration)  # told before anything is loaded
    if args.device is not None and args.devices is None:
        raise InputError(
            "--device", got="no --devices", expected="how many there are", fix="add --devices"
        )
    if args.devices is not None:
        options.positive("--devices", args.devices)
        get_device(args.device or DEFAULT_DEVICE)
    moments = None
    if args.calibration is None:
        config = read_config(args.model or DEFAULT_MODEL)
    else:
        config, moments = read_calibration(args.calibration, args.model)
    context = config.max_positions if args.context is None else args.context
    options.positive("--context", context)
    options.positive("--batch", args.batch)
    layout = options.layout_of(args)
    make = lambda name: get_for_model(name, config, moments, layout=layout)
    asked = ((name, make(name)) for name in names)
    methods = asked if args.methods is not None else _fitting(names, make, config.head_dim)
    show = sizes if args.devices is None else spread
    show(args, config, methods, context)
    return 0


def _fitting(
    names: Iterable[str], make: Callable[[str], Any], head_dim: int
) -> Iterator[tuple[str, Method]]:
    """The methods that take the head_dim; of the others stderr says why not."""
    for name in names:
        try:
            method = make(name)
            method.check(head_dim)
        except InputError as error:
            print(f"kvjax: left out {name}: {error}", file=sys.stderr)
        else:
            yield name, method


def sizes(
    args: argparse.Namespace,
    config: ModelConfig,
    methods: Iterable[tuple[str, Method | tuple[Method, ...]]],
    context: int,
) -> None:
    """Prints what the caches take together."""
    import dataclasses

    from kvjax.evals.memory import footprint, plain_bytes

    batch = args.batch
    rows, by_layer = [], {}
    for _, method in methods:
        rows.append(footprint(config, method, context=context, batch=batch))
        if isinstance(method, tuple):
            by_layer[rows[-1].method] = rows[-1].bits_by_layer
    per_token = int(config.kv_bytes_per_token(2))
    plain = plain_bytes(config, context, batch)
    if args.json:
        data = {
            "model": config.name,
            "context": context,
            "batch": batch,
            "plain_bf16": {"bytes_per_token": per_token, "bytes": plain},
            "rows": [],
        }
        for row in rows:
            fields = dataclasses.asdict(row)
            del fields["bits_by_layer"]
            data["rows"].append({**fields, "bits_per_value_by_layer": by_layer.get(row.method)})
        print(json.dumps(data, indent=1))
        return
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
        f"\nbits/value: packed history with all side information; cache: with {args.sink} sink "
        f"and {args.recent + args.page} recent slots in bf16"
    )


def spread(
    args: argparse.Namespace,
    config: ModelConfig,
    methods: Iterable[tuple[str, Method | tuple[Method, ...]]],
    context: int,
) -> None:
    """Prints the cheapest mesh for every method, and what it holds."""
    import dataclasses

    from kvjax.evals.devices import get_device
    from kvjax.evals.planner import LATENCY, USABLE, plan_layouts, why

    device, devices = get_device(args.device or DEFAULT_DEVICE), args.devices
    positions = config.max_positions
    stretched = dataclasses.replace(config, max_positions=max(positions, context))
    plans = {
        name: plan_layouts(stretched, m, device, devices, context=context, batch=args.batch)
        for name, m in methods
    }
    if args.json:
        data = {
            "model": config.name,
            "context": context,
            "beyond_positions": context > positions,
            "batch": args.batch,
            "devices": devices,
            "device": dataclasses.asdict(device),
            "usable": USABLE,
            "latency": LATENCY,
            "time": "a roofline, not measured",
            "methods": [
                {
                    "method": name,
                    "why": why(rows),
                    "layouts": [
                        {**dataclasses.asdict(row), "fits": row.fits, "step": row.step}
                        for row in rows
                    ],
                }
                for name, rows in plans.items()
            ],
        }
        print(json.dumps(data, indent=1))
        return
    print(
        f"{config.name} on {devices} {device.kind}: context {context:,}, batch {args.batch}; room "
        f"{USABLE * device.memory / 2**30:.1f} GiB each ({USABLE:.0%} of the memory)"
    )
    if context > positions:
        print(f"beyond its {positions:,} positions: as if its rotary embedding had been stretched")
    print(
        f"\n{'':27s} {'data x heads':>15s} {'GiB per device':>17s} {'':4s} {'largest':>9s} "
        f"{'largest':>13s} {'ms per':>8s}\n"
        f"{'method':27s} {'x sequence':>15s} {'weights':>8s} {'cache':>8s} {'fits':4s} "
        f"{'batch':>9s} {'context':>13s} {'step':>8s}  why"
    )
    for name, rows in plans.items():
        row = rows[0]
        longest = "any" if row.largest_context is None else f"{row.largest_context:,}"
        print(
            f"{name:27s} {row.mesh:>15s} {row.weights / 2**30:8.2f} {row.cache / 2**30:8.2f} "
            f"{'yes' if row.fits else 'no':4s} {row.largest_batch:9,} {longest:>13s} "
            f"{1e3 * row.step:8.3f}  {why(rows)}"
        )
    print(
        "\nms per step, one token for every sequence: a roofline, not measured. Bytes read over "
        f"{device.bandwidth / 1e12:.3g} TB/s, then a\nring per collective at "
        f"{device.link / 1e9:.3g} GB/s ({device.network / 1e9:.3g} beyond {device.domain} "
        f"devices) and {1e6 * LATENCY:.0f} us of latency, which is assumed."
    )


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
