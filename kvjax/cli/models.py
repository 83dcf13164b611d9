"""`kvjax models list | fetch NAME`: the real models that kvjax knows how to get."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvjax.models import hub


def add(subparsers) -> None:
    """Registers `models` with an argparse sub-parser collection; `args.run(args)` runs it."""
    parser = subparsers.add_parser("models", help="list and fetch real models")
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{list,fetch}")
    actions.add_parser("list", help="what can be fetched, and what is already here")
    fetch = actions.add_parser("fetch", help="download a model into the cache folder")
    fetch.add_argument("name", help="a name from `kvjax models list`")
    fetch.add_argument(
        "--verify", action="store_true", help="read the file again and compare its checksum"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `models list` or `models fetch`; mistakes come out as `InputError`."""
    console = Console()
    if args.action == "list":
        return _list(console)
    return _fetch(console, args.name, args.verify)


def _list(console: Console) -> int:
    table = Table("name", "fetched", "size", "licence", "file", box=None)
    for model in hub.MODELS:
        fetched = "yes" if hub.installed(model) else "no"
        size = f"{model.size / 1e6:.0f} MB"
        table.add_row(model.name, fetched, size, model.licence, str(hub.path_of(model)))
    if console.is_terminal:
        console.print(table)
        return 0
    for model in hub.MODELS:  # plain lines for pipes: tab-separated, never wrapped
        fetched = "fetched" if hub.installed(model) else "not fetched"
        size = f"{model.size / 1e6:.0f} MB"
        print(model.name, fetched, size, model.licence, hub.path_of(model), sep="\t")
    return 0


def _fetch(console: Console, name: str, verify: bool) -> int:
    model = hub.find(name)
    with _progress(console) as report:
        path, fetched = hub.fetch(model.name, verify=verify, report=report)
    state = "fetched" if fetched else "already here, checksum right" if verify else "already here"
    console.print(f"{model.name}: {state}: {path}", soft_wrap=True, highlight=False)
    licence = f"Licence: {model.licence}. {model.notice}".strip()
    console.print(licence, soft_wrap=True, highlight=False)
    return 0


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal; elsewhere one line for each new step."""
    if not console.is_terminal:
        seen: set[str] = set()

        def line(what: str, done: int, total: int) -> None:
            if what not in seen:
                seen.add(what)
                print(f"{what}: {done / 1e6:.0f} of {total / 1e6:.0f} MB", flush=True)

        yield line
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def bar(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield bar
