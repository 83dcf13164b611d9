"""The file of results: rows of one run after another, each with what made it; and its table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

Row = dict[str, Any]


class Problem(ValueError):
    """What a user asked for and cannot have, in one line: got, expected, what to do."""

    def __init__(self, what: str, *, got: object, expected: object, fix: str):
        super().__init__(f"{what}: got {got}; expected {expected}; {fix}")


def make_stamp(command: str, *, measured: bool) -> Row:
    """Where and when numbers are made, and whether they are measurements."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "platform": device.platform,
        "commit": _commit(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "command": command,
        "note": "" if measured else "interpret: not a measurement",
    }


def _commit() -> str:
    """The checkout's commit, with + for uncommitted changes; "release" outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return "release"

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except OSError:
            return ""

    commit = git("rev-parse", "--short", "HEAD").strip()
    return (commit or "unknown") + ("+" if git("status", "--porcelain").strip() else "")


class Results:
    """Rows by their id; those that are in the file already stay as they are.

    Args:
      path: a JSON file, or None to keep rows in memory only.
      stamp: of this run; its rows refer to it.
    Raises:
      Problem: a file that cannot be written, is something else, or is of another device.
    """

    def __init__(self, path: Path | None, stamp: Row):
        self.path, self.rows, self.runs = path, {}, []  # type: ignore[var-annotated]
        if path is not None:
            self._open(path, stamp)
        self.runs.append(stamp)

    def _open(self, path: Path, stamp: Row) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8"):
                pass
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise Problem(
                "--out",
                got=f"{path} ({error.strerror or error})",
                expected="a file that can be written",
                fix="name another",
            ) from None
        if not text:
            return
        try:
            kept = json.loads(text)
            self.runs, rows = list(kept["runs"]), list(kept["rows"])
            self.rows = {row["id"]: row for row in rows}
            known = {(run["device"], run["note"]) for run in self.runs}
        except (ValueError, KeyError, TypeError):
            raise Problem(
                "--out",
                got=f"{path}, which holds something else",
                expected="a file of this command, or none",
                fix="name another",
            ) from None
        for device, note in known - {(stamp["device"], stamp["note"])}:
            raise Problem(
                "--out",
                got=f"{path} with rows of {device}{', ' * bool(note)}{note}",
                expected=f"rows of {stamp['device']}{', ' * bool(stamp['note'])}{stamp['note']}",
                fix="name another file for this device",
            )

    def done(self, name: str) -> bool:
        """Whether there is such a row; one that was left out is tried again."""
        return name in self.rows and "skipped" not in self.rows[name]

    def add(self, rows: Iterable[Row]) -> None:
        """Keeps rows that are not there yet, and writes the file."""
        for row in rows:
            if not self.done(row["id"]):
                self.rows[row["id"]] = {**row, "run": len(self.runs) - 1}
        self.save()

    def save(self) -> None:
        """Writes the file whole, so that there is never half of one."""
        if self.path is None:
            return
        kept = {"runs": self.runs, "rows": list(self.rows.values())}
        half = self.path.with_name(self.path.name + ".part")
        half.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        half.replace(self.path)


def table(rows: Iterable[Row]) -> str:
    """Rows in columns: numbers of one kind of row under one head, reasons where there are none.

    Example:
      >>> print(table([{"id": "a", "us": 1.5}, {"id": "bc", "skipped": "no room"}]))
      id  us
      a   1.50
      bc  left out: no room
    """
    rows = list(rows)
    hidden = {"id", "run", "skipped", "config"}
    heads = list(dict.fromkeys(k for row in rows for k in row if k not in hidden))
    body = [[row["id"], *(_cell(row.get(k)) for k in heads)] for row in rows]
    lines = [
        ["id", *heads],
        *(b for b, row in zip(body, rows, strict=True) if "skipped" not in row),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    widths[0] = max(2, *(len(row["id"]) for row in rows))
    out = [_line(lines[0], widths)]
    for row, cells in zip(rows, body, strict=True):
        left_out = [row["id"], f"left out: {row['skipped']}"] if "skipped" in row else cells
        out.append(_line(left_out, widths))
    return "\n".join(out)


def _line(cells: list[str], widths: list[int]) -> str:
    return "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=False)).rstrip()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return (
            f"{value:.3g}" if abs(value) < 1 else f"{value:.0f}" if value >= 1e3 else f"{value:.2f}"
        )
    return "" if value is None else str(value)
