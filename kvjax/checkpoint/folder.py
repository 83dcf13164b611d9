"""Numbered folders of which one counts: written beside the old one, which counts until the new one
is whole.

    000003/   what counted before     000004/   what counts     current   "000004 SHA-256"

The pointer `current` is replaced in one step after all that it names is on the disk, so a kill at
any moment leaves the old state or the new one. It has the checksum of one file of every folder it
names, and that file those of the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvjax.core.errors import InputError

CURRENT = "current"
LOCK = ".lock"

Found = list[tuple[Path, str]]  # folders that count, newest first, and their checksums


def new_folder(root: Path) -> Path:
    """The next numbered folder in `root`, made.

    Raises:
      OSError: a place that cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in root.iterdir() if path.name.isdigit()]
    new = root / f"{1 + max(taken, default=0):06d}"
    new.mkdir()
    return new


def commit(root: Path, found: Found) -> None:
    """From here on these folders count, the first of them as the newest.

    Raises:
      OSError: a place that cannot be written; what counted before still does.
    """
    write(root / f"{CURRENT}.new", "".join(f"{at.name} {digest}\n" for at, digest in found))
    os.replace(root / f"{CURRENT}.new", root / CURRENT)
    sync(root)


def current(root: Path) -> Found:
    """The folders that count, newest first; none where nothing was saved yet.

    Raises:
      InputError: a pointer that cannot be read, or one to a folder that is not there.
    """
    try:
        text = (root / CURRENT).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        if root.exists() and not root.is_dir():
            raise damaged(root, "it is no folder") from None
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(root / CURRENT, error) from error
    found = []
    for line in text.splitlines() or [""]:
        name, digest = (*line.split(), "", "")[:2]
        if not name.isdigit() or not (root / name).is_dir():
            raise damaged(root / CURRENT, f"it names {name!r}, which is not there")
        found.append((root / name, digest))
    return found


def counts(path: Path) -> bool:
    """Whether a folder counts, or may do: where that cannot be told."""
    try:
        return any(path == at for at, _ in current(path.parent))
    except InputError:
        return True


def tidy(root: Path, kept: Sequence[Path], ours: Callable[[Path], bool]) -> None:
    """Deletes numbered folders that nothing names any more: only those that hold nothing but files
    that `ours` knows."""
    for path in root.iterdir():
        numbered = path.is_dir() and path.name.isdigit() and len(path.name) >= 6
        if numbered and path not in kept and all(map(ours, path.iterdir())):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def alone(root: Path, what: str) -> Iterator[None]:
    """Nobody else who asks for it writes into the folder meanwhile, where there are file locks.

    Args:
      what: what would write into it, for the error.
    Raises:
      InputError: somebody does, or a folder that cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / LOCK).open("w")
    except OSError as error:
        raise InputError(
            str(root),
            got=reason(error),
            expected="a folder that can be written",
            fix="name another folder",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                str(root),
                got=f"another {what} with it under way",
                expected="one at a time",
                fix="end the other one, or name another folder",
            ) from error
        yield


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
      InputError: one that cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise damaged(path, error) from error


def check_digest(path: Path, digest: str) -> None:
    """Raises `InputError` for a file that is not there, or has another checksum."""
    if digest_of(path) != digest:
        raise damaged(path, "its checksum is another")


def write(path: Path, text: str) -> None:
    """A text file, on the disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """A file or folder, on the disk and not only on its way there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damaged(path: Path, why: Any) -> InputError:
    """The error for a file that is not as it was written."""
    return InputError(
        str(path),
        got=f"a file that cannot be read ({reason(why)})",
        expected="what `save` wrote",
        fix="restore it from a backup, or name another folder",
    )


def not_taken(what: str, why: Any) -> InputError:
    """The error for a folder that could not be written."""
    return InputError(
        what,
        got=f"a folder that does not take it ({reason(why)})",
        expected="one that can be written, with room",
        fix="free some space or name another folder; what was saved before is as it was",
    )


def reason(why: Any) -> str:
    """An error or a text, on one line."""
    return (why.strerror if isinstance(why, OSError) else None) or " ".join(str(why).split())[:200]
