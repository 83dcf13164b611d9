"""Options that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from kvjax.core.errors import InputError
from kvjax.core.layout import Layout

MODEL_HELP = "a name from `kvjax models list`, a Hugging Face folder, or a .gguf file"


def add_layout(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("layout of the cache")
    group.add_argument(
        "--sink", type=int, default=4, help="exact tokens at the start (%(default)s)"
    )
    group.add_argument(
        "--recent", type=int, default=64, help="exact tokens at the end, at least (%(default)s)"
    )
    group.add_argument("--page", type=int, default=64, help="tokens packed together (%(default)s)")


def add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration", help="folder that `kvjax calibrate` wrote, for methods such as klt-2"
    )


def layout_of(args: argparse.Namespace) -> Layout:
    return Layout(sink=args.sink, recent=args.recent, page=args.page)


def positive(what: str, value: int) -> int:
    """`value`, or an error that names the option."""
    if value < 1:
        raise InputError(what, got=value, expected="1 or more", fix="raise it")
    return value


def names(text: str) -> list[str]:
    """A comma-separated list, without repetitions."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def out_folder(path: str) -> Path:
    """The folder, made if need be."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            "--out",
            got=f"{path} ({error.strerror})",
            expected="a folder to write",
            fix="choose one",
        ) from None
    if not os.access(folder, os.W_OK):
        raise InputError(
            "--out", got=f"{path}, not writable", expected="a folder to write", fix="choose another"
        )
    return folder


@contextlib.contextmanager
def progress(total: int | None = None) -> Iterator[Callable[[str], None]]:
    """A bar with what is being done, on a terminal; plain lines on stderr elsewhere."""
    if not sys.stderr.isatty():
        yield lambda message: print(f"{message} ...", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=total)
        started = False

        def report(message: str) -> None:
            nonlocal started
            bar.update(task, description=message, advance=1 if started else 0)
            started = True

        yield report


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run starts at once."""
    import jax

    home = os.environ.get("KVJAX_HOME") or Path.home() / ".cache" / "kvjax"
    jax.config.update("jax_compilation_cache_dir", str(Path(home) / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
