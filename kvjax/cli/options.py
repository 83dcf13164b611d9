"""Options that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvjax.core.errors import InputError, known
from kvjax.core.layout import Layout

if TYPE_CHECKING:
    from kvjax.models.config import ModelConfig
    from kvjax.policies.eviction import Eviction

MODEL_HELP = "a name from `kvjax models list`, a Hugging Face folder, or a .gguf file"


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m", help=f"{MODEL_HELP} (%(default)s)")


def add_sample(parser: argparse.ArgumentParser, tokens: int) -> None:
    """The text that arrays of methods are fitted to, and how much of it is looked at."""
    parser.add_argument(
        "--text", help="a UTF-8 text file (default: docstrings of Python's standard library)"
    )
    parser.add_argument("--tokens", type=int, default=tokens, help="to look at (%(default)s)")


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


def warn_reach(reach: int, context: int) -> None:
    """A line on stderr where more is served than was calibrated (see `calibrate.served`)."""
    if context > reach:
        print(
            f"kvjax: methods are calibrated up to {reach} positions, and {context} are served: "
            "all but those before RoPE (klt-pre-rope) lose their gain on the way; run "
            f"`kvjax calibrate --positions {context}`",
            file=sys.stderr,
        )


def add_policy(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which tokens stay; no option has a default, so that what is not given can be told."""
    group = parser.add_argument_group("which tokens stay")
    group.add_argument("--policy", help="what judges them, such as snapkv")
    group.add_argument("--budget", type=int, help="tokens per KV head, windows included")
    group.add_argument("--block", type=int, help="tokens between two evictions (256)")
    group.add_argument(
        "--compete", help="who shares the budget: head (each its own), layer or model (head)"
    )
    return group


def eviction_of(
    config: ModelConfig,
    policy: str,
    budget: int,
    block: int,
    compete: str,
    *,
    tokens: int,
    layout: Layout,
) -> Eviction:
    """Policy and budget by name, as its paper has them.

    PyramidKV shares out what is beyond the tokens that always stay in every layer, those of the
    layout among them.

    Args:
      tokens: length of the history, or the most that it can get: PyramidKV's layers hold no more.
    """
    import dataclasses

    import jax

    from kvjax.core.rng import fold
    from kvjax.models.config import layer_runs
    from kvjax.policies.eviction import Eviction
    from kvjax.policies.names import get, layer_budgets

    rng = fold(jax.random.key(0), "policy") if policy == "random" else None
    scorer = get(policy, rng=rng)
    layers = sum(run.length for run in layer_runs(config) if run.window is None)
    eviction = Eviction(
        scorer,
        positive("--budget", budget),
        block=positive("--block", block),
        compete=compete,  # type: ignore[arg-type]
        recent=budget // 2 if policy == "h2o" else 0,
    )
    sure = eviction.sink_of(layout) + eviction.recent_of(layout)
    by_layer = layer_budgets(policy, budget, layers, tokens, scorer, sure)
    uneven = len(set(by_layer)) > 1
    return dataclasses.replace(eviction, budget=by_layer) if uneven else eviction


def check_policy(name: str) -> None:
    """Raises `InputError` for a name that no policy has; nothing is loaded."""
    from kvjax.policies.names import POLICIES

    if name not in POLICIES:
        raise InputError(
            "--policy", got=repr(name), expected=known(POLICIES), fix="name one of them"
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


def method_names(text: str) -> list[str]:
    """`names`, of which there must be one."""
    found = names(text)
    if not found:
        raise InputError(
            "--methods", got="no names", expected="at least one", fix="name one, or leave it out"
        )
    return found


def whole_windows(tokens: int, context: int, fix: str = "raise it") -> int:
    """How many windows of `context` there are in `--tokens`; an error where there is none."""
    count = positive("--tokens", tokens) // context
    if count < 1:
        raise InputError(
            "--tokens", got=tokens, expected=f"at least one window of {context}", fix=fix
        )
    return count


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
