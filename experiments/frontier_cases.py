"""What experiments/frontier.py measures, on which texts, and the lines of metrics.jsonl."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.calibrate.names import CALIBRATED, check_name
from kvjax.core.errors import InputError, known
from kvjax.core.layout import Layout
from kvjax.evals.text import read_docstrings, read_text

PARTS = ("frontier", "transfer", "seeds", "positions")

# Of a line: what decides its numbers. With the part it tells which lines a rerun may skip.
SETTINGS = (
    *("kvjax", "model", "weights", "dtype", "method", "calibration", "text", "seed", "layout"),
    *("context", "windows", "buckets"),
)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Text:
    """A text: its name in the config, the name with a hash that results carry, and itself."""

    name: str
    about: str
    text: str


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement, but for the model.

    Attributes:
      calibration: name of a text, None for methods without. text: what is tested on.
      buckets: stretches of positions whose KL is told apart; 0 for none.
    """

    part: str
    method: str
    calibration: str | None
    text: str
    seed: int
    layout: Layout
    context: int
    windows: int
    buckets: int = 0

    @property
    def shared(self) -> tuple[str, int, int]:
        """Cases that agree in this have the same tokens and the same full cache."""
        return self.text, self.context, self.windows

    @property
    def label(self) -> str:
        """All but its lengths, for people."""
        layout = self.layout
        made = f" from {self.calibration}" if self.calibration else ""
        sizes = f"{layout.sink}/{layout.recent}/{layout.page}"
        return f"{self.method}{made} on {self.text}, layout {sizes}, seed {self.seed}"


def read_texts(given: Sequence[str]) -> dict[str, Text]:
    """Texts by name, from NAME=FILE or the name of one that comes with Python.

    Raises:
      InputError: one that cannot be read, two of one name, or fewer than two.
    """
    readers = {
        "docstrings": read_docstrings,
        "reference": lambda: read_text(None),
        "code": read_code,
    }
    texts: dict[str, Text] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if name in texts or not (equals or name in readers):
            raise InputError(
                "texts",
                got=f"{one}",
                expected=f"NAME=FILE or {known(readers)}, each name once",
                fix="name the file, or another text",
            )
        about, text = read_text(path) if equals else readers[name]()
        texts[name] = Text(name, about, text)
    if len(texts) < 2:
        raise InputError(
            "texts",
            got=f"{len(texts)} of them",
            expected="one to calibrate on and others to test on",
            fix="name at least two",
        )
    return texts


def read_code(most: int = 1_000_000) -> tuple[str, str]:
    """A name and a text: the standard library's modules without docstrings and comments, so that
    it shares no sentence with `read_docstrings`."""
    parts: list[str] = []
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        if sum(map(len, parts)) > most:
            break
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
            if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
                node.body[0] = ast.Pass()
        parts.append(ast.unparse(tree))
    text = "\n\n".join(parts)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"code of the standard library (sha256 {digest})", text


def check_apart(calibration: Text, test: Text) -> None:
    """Raises `InputError` where the text of a calibration is tested on, under whatever name."""
    pieces = [calibration.text[i : i + 80] for i in _spread(len(calibration.text) - 80)]
    shared = sum(piece in test.text for piece in pieces) / len(pieces)
    if calibration.about == test.about or shared > 0.1:
        raise InputError(
            f"text {test.name}",
            got=f"{shared:.0%} of the text of the calibration, {calibration.name}",
            expected="another text",
            fix="test on a text that played no part",
        )


def _spread(last: int) -> list[int]:
    return np.linspace(0, max(0, last), 200).astype(int).tolist()


def all_cases(config: Any, texts: Mapping[str, Text]) -> list[Case]:
    """Every case of every part of the config, in order.

    Raises:
      InputError: an unknown name, or a text that is both calibrated and tested on.
    """
    made = {"frontier": _frontier, "transfer": _transfer, "seeds": _seeds, "positions": _positions}
    for part in config.parts:
        if part not in made:
            raise InputError("parts", got=repr(part), expected=known(made), fix="use these")
    lists = ("methods", "transfer_methods", "seed_methods", "position_methods")
    for name in itertools.chain(*(config[which] for which in lists)):
        check_name(name, calibration=True)
    names = list(texts)
    cases = [case for part in config.parts for case in made[part](config, names)]
    for calibration, text in {(c.calibration, c.text) for c in cases if c.calibration}:
        check_apart(texts[calibration], texts[text])
    return cases


def _case(config: Any, part: str, method: str, calibration: str, text: str, **other) -> Case:
    settings = {"seed": config.seeds[0], "layout": _layout(config.layouts[0])}
    settings |= {"context": config.context, "windows": config.windows} | other
    return Case(part, method, calibration if method in CALIBRATED else None, text, **settings)


def _layout(sizes: Sequence[int]) -> Layout:
    sink, recent, page = sizes
    return Layout(sink=sink, recent=recent, page=page)


def _frontier(config: Any, texts: Sequence[str]) -> Iterator[Case]:
    for layout, text, method in itertools.product(config.layouts, texts[1:], config.methods):
        yield _case(config, "frontier", method, texts[0], text, layout=_layout(layout))


def _transfer(config: Any, texts: Sequence[str]) -> Iterator[Case]:
    for text, calibration in itertools.permutations(texts, 2):
        yield from (
            _case(config, "transfer", method, calibration, text)
            for method in config.transfer_methods
            if method in CALIBRATED
        )
    for text, method in itertools.product(texts, config.transfer_methods):
        if method not in CALIBRATED:  # what there is to lose
            yield _case(config, "transfer", method, "", text)


def _seeds(config: Any, texts: Sequence[str]) -> Iterator[Case]:
    for method, seed in itertools.product(config.seed_methods, config.seeds):
        yield _case(config, "seeds", method, texts[0], texts[1], seed=seed)


def _positions(config: Any, texts: Sequence[str]) -> Iterator[Case]:
    lengths = {"context": config.position_context, "windows": config.position_windows}
    for method in config.position_methods:
        found = _case(config, "positions", method, texts[0], texts[1], **lengths)
        yield dataclasses.replace(found, buckets=config.buckets)


def settings_of(row: Row) -> str:
    """What decides the numbers of a line, as one string."""
    return json.dumps({name: row.get(name) for name in SETTINGS}, sort_keys=True)


def read_rows(path: Path) -> list[Row]:
    """The lines of metrics.jsonl; one that a killed run left half-written is no line."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_row(path: Path, row: Row) -> None:
    """One line more, on a line of its own whatever the file ends with."""
    with path.open("a+b") as file:
        if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")


def plain(name: str) -> str:
    """A name as a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "text"
