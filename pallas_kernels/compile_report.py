"""What the compilers for H200 and TPU make of every kernel, from a host that has neither.

    python -m pallas_kernels.compile_report --only 'lloyd*' --out build/compiles.json

Compiles each launch of `arg_specs` by XLA for an H200 and reports registers, spills, shared memory,
the instructions of the main loop per cached value, and the time below which they project that it
cannot go. Nothing is run and nothing is timed. Ends with status 1 when a launch spills, or takes
more instructions than its budget. `make compiles` fetches the wheels that it needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pallas_kernels.ahead import ptxas, wheels

if TYPE_CHECKING:
    from pallas_kernels.ahead.measure import Row, TpuRow
    from pallas_kernels.arg_specs import Spec
    from pallas_kernels.packed_decode.config import Config

DEVICES = ("h200", "tpu")


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    out = argparse.ArgumentParser(
        prog="python -m pallas_kernels.compile_report", description=__doc__.splitlines()[0]
    )
    out.add_argument("--only", default="*", metavar="PATTERN", help="launches, as 'lloyd*'")
    out.add_argument("--device", choices=DEVICES, help="one of the two; both by default")
    out.add_argument("--out", type=Path, metavar="FILE.json", help="also write all numbers there")
    out.add_argument(
        "--config",
        metavar="NAME=NUMBER,...",
        help="fields of packed_decode's Config in place of the default, as warps=4,tokens=128",
    )
    out.add_argument("--wheels", type=Path, default=wheels.FOLDER, help="where they are")
    out.add_argument("--install", action="store_true", help="fetch them there if they are not")
    out.add_argument("--list", action="store_true", help="only name the launches")
    return out


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    options = parser().parse_args(argv)
    if options.list:
        from pallas_kernels import arg_specs

        print("\n".join(spec.name for spec in _chosen(arg_specs, options.only)))
        return 0
    reason = wheels.install(options.wheels) if options.install else wheels.why_not(options.wheels)
    tools = ptxas.find(options.wheels)
    if reason is None and isinstance(tools, str):
        reason = tools
    if reason:
        print(f"compiles: skipped: {reason}")
        return 0
    assert not isinstance(tools, str)
    with tempfile.TemporaryDirectory(prefix="compiles") as dump:
        _prepare(options.wheels.resolve(), dump)
        return _report(options, Path(dump), tools)


def _prepare(folder: Path, dump: str) -> None:
    """The environment in which jax must start: it reads these once."""
    os.environ["JAX_PLATFORMS"] = (
        "cpu"  # otherwise the CUDA plugin looks for a driver, and gives up
    )
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a program from the cache writes no PTX
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    sys.path.append(str(folder))


def _report(options: argparse.Namespace, dump: Path, tools: tuple[str, str]) -> int:
    import jax

    from pallas_kernels import arg_specs
    from pallas_kernels.ahead import measure, table

    specs = _chosen(arg_specs, options.only)
    if not specs:
        names = ", ".join(spec.name for spec in _chosen(arg_specs, "*"))
        print(f"--only: got {options.only!r}; expected to match one of {names}", file=sys.stderr)
        return 2
    try:
        configs = {spec.name: _config(options.config, spec) for spec in specs}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    rows: list[Row] = []
    tpu_rows: list[TpuRow] = []
    if options.device != "tpu":
        for spec in specs:
            row = measure.compile_spec(spec, dump, tools, configs[spec.name])
            if row is None:
                print(f"H200: skipped: jax {jax.__version__} writes no PTX; jax 0.10.2 does")
                break
            if not rows:
                print(table.heading())
            print(table.line(row), flush=True)  # some take minutes
            rows.append(row)
        else:
            print(table.note(rows))
    if options.device != "h200" and importlib.util.find_spec("pallas_kernels.packed_decode.tpu"):
        from pallas_kernels.packed_decode.tpu import packed_decode_tpu

        print("\nThrough libtpu, for TPU v5e:")
        for spec in specs:
            flat = dataclasses.replace(spec, transposed_values=False)
            tpu_row = measure.compile_tpu(flat, packed_decode_tpu)
            print(table.tpu_line(tpu_row), flush=True)
            tpu_rows.append(tpu_row)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(_numbers(rows, tpu_rows, jax.__version__), indent=1))
    failed = [row for row in rows if row.failures], [row for row in tpu_rows if row.failures]
    return int(any(failed))


def _chosen(arg_specs: Any, pattern: str) -> list[Spec]:
    specs = [*arg_specs.PLAIN, *arg_specs.VARIED]
    return [spec for spec in specs if fnmatch.fnmatch(spec.name, pattern)]


def _config(text: str | None, spec: Spec) -> Config | None:
    """The default configuration with some fields changed, or None for the default itself.

    Raises:
      ValueError: a name that Config does not have, or a number that is none.
    """
    if text is None:
        return None
    from pallas_kernels.packed_decode.config import Config

    names = [field.name for field in dataclasses.fields(Config)]
    changes = {}
    for item in text.split(","):
        name, _, number = item.partition("=")
        if name not in names or not number.isdigit():
            raise ValueError(f"--config: got {item!r}; expected one of {', '.join(names)}=NUMBER")
        changes[name] = int(number)
    steps = max(1, spec.tokens // 256)
    return dataclasses.replace(Config(splits=min(steps, 132)), **changes)


def _numbers(rows: list[Row], tpu_rows: list[TpuRow], version: str) -> dict[str, Any]:
    return {
        "jax": version,
        "projected": "times are lower bounds from counts and vendor rates: not measured",
        "h200": [dataclasses.asdict(row) for row in rows],
        "tpu": [dataclasses.asdict(row) for row in tpu_rows],
    }


if __name__ == "__main__":
    sys.exit(main())
