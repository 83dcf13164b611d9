"""What is written beside the arrays of a checkpoint, and whether it is what is asked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kvjax
from kvjax.checkpoint import folder as disk
from kvjax.checkpoint.tree import Leaf, dealt_of, leaves_of, structure_of
from kvjax.core.errors import InputError

FORMAT, VERSION = "kvjax.checkpoint", "1"
ARRAYS, RECORD = "arrays", "state.json"

Record = dict[str, Any]


def key_of(number: int) -> str:
    """What the array of the leaf of that number is called."""
    return f"{number:05d}"


def record_of(state: Any, about: Mapping[str, Any]) -> Record:
    """The record of a state, without the checksums of its files.

    Raises:
      InputError: a leaf that cannot be kept, or an `about` that JSON cannot hold.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "kvjax": kvjax.__version__,
        "about": plain(about),
        "structure": structure_of(state),
        "dealt": dealt_of(state),
        "leaves": [dataclasses.asdict(leaf) for leaf, _ in leaves_of(state)],
    }


def plain(about: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples as lists.

    Raises:
      InputError: what JSON cannot hold.
    """
    try:
        return json.loads(json.dumps(dict(about)))
    except (TypeError, ValueError) as error:
        raise InputError(
            "about", got=error, expected="names and plain data", fix="keep arrays in the state"
        ) from None


def write_record(at: Path, record: Record) -> str:
    """Writes the record with the checksums of all files under `at`, which are then on the disk.

    Returns:
      The checksum of the record.
    """
    paths = sorted((at / ARRAYS).rglob("*"))
    files = [path for path in paths if path.is_file()]
    for path in (*paths, at / ARRAYS):
        if path.exists():
            disk.sync(path)
    digests = {path.relative_to(at).as_posix(): disk.digest_of(path) for path in files}
    disk.write(at / RECORD, json.dumps({**record, "files": digests}, indent=1))
    disk.sync(at)
    return disk.digest_of(at / RECORD)


def read_record(root: Path, number: int | None = None) -> tuple[Path, Record] | None:
    """The folder that counts and its record, or an older one by number; None where none is.

    Raises:
      InputError: a damaged record or pointer, another format or version, a number that is not
        there.
    """
    found = disk.current(root)
    if not found:
        return None
    known = {int(at.name): (at, digest) for at, digest in found}
    if number is not None and number not in known:
        raise InputError(
            f"checkpoint in {root}",
            got=f"number {number}",
            expected=f"one of {sorted(known)}",
            fix="name one of those, or leave the number out",
        )
    at, digest = found[0] if number is None else known[number]
    try:
        disk.check_digest(at / RECORD, digest)
    except InputError as error:
        ours = (at / RECORD).exists() or (at / ARRAYS).exists()
        raise error if ours else another(root, "another kind of folder", "a checkpoint") from None
    record = json.loads((at / RECORD).read_text(encoding="utf-8"))
    for name, expected in (("format", FORMAT), ("version", VERSION), ("kvjax", kvjax.__version__)):
        if record.get(name) != expected:
            raise another(root, f"{name} {record.get(name)}", expected)
    return at, record


def check_about(root: Path, record: Record, expected: Mapping[str, Any]) -> None:
    """Raises `InputError` for the first fact that differs."""
    for name, value in plain(expected).items():
        have = record["about"].get(name)
        if have != value:
            part, got, want = _first_difference(name, have, value)
            raise another(root, f"{part} {_short(got)}", _short(want))


def check_structure(root: Path, record: Record, like: Any) -> None:
    """Raises `InputError` for a state that is made of other parts."""
    saved = [leaf.name for leaf in saved_leaves(record)]
    names = [leaf.name for leaf, _ in leaves_of(like)]
    if saved != names:
        extra, missing = set(saved) - set(names), set(names) - set(saved)
        got = f"{min(extra)}" if extra else f"no {min(missing, default='such order')}"
        raise another(root, got, f"the {len(names)} arrays of this state")
    mine, other = structure_of(like), record["structure"]
    if mine != other:
        at = next(
            (i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b),
            min(len(mine), len(other)),
        )
        part = slice(max(0, at - 40), at + 40)
        raise another(root, f"a state with ...{other[part]}...", f"...{mine[part]}...")


def check_files(at: Path, record: Record, share: tuple[int, int] = (0, 1)) -> None:
    """Raises `InputError` for the first file that is not as it was written.

    Args:
      share: which of how many parts of the files is looked at.
    """
    which, of = share
    for name, digest in list(record["files"].items())[which::of]:
        disk.check_digest(at / name, digest)


def saved_leaves(record: Record) -> list[Leaf]:
    return [Leaf(**{**leaf, "shape": tuple(leaf["shape"])}) for leaf in record["leaves"]]


def another(root: Path, got: str, expected: str) -> InputError:
    """The error for a checkpoint of something else."""
    return InputError(
        f"checkpoint in {root}",
        got=" ".join(got.split()),
        expected=" ".join(expected.split()),
        fix="go on with what it was made with, or name another folder",
    )


def _first_difference(name: str, have: Any, want: Any) -> tuple[str, Any, Any]:
    """Of two facts that differ the first part that does, and its name."""
    if isinstance(have, dict) and isinstance(want, dict) and have.keys() == want.keys():
        parts = [(f"{name} {key}", have[key], want[key]) for key in want]
    elif isinstance(have, list) and isinstance(want, list) and len(have) == len(want):
        parts = [(name, *pair) for pair in zip(have, want, strict=True)]
    else:
        return name, have, want
    return next(_first_difference(*part) for part in parts if part[1] != part[2])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."
