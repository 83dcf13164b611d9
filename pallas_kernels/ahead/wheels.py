"""The wheels that compile for a GPU and a TPU on a host without them, in a folder of their own.

They stay out of the environment: with jax-cuda13-pjrt in it, every start of jax reports a driver
that is missing.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path("build") / "aot"
NEEDED = {  # package -> what it brings
    "jax-cuda13-plugin": "jax_cuda13_plugin",
    "jax-cuda13-pjrt": "jax_plugins/xla_cuda13",
    "triton": "triton/backends/nvidia/bin",
    "libtpu": "libtpu",
}


def requirements() -> list[str]:
    """What fits the jax that is installed."""
    version = importlib.metadata.version("jax")
    pinned = [m for r in importlib.metadata.requires("jax") or [] if (m := tpu_version(r))]
    tpu = f"libtpu{pinned[0]}" if pinned else "libtpu"
    cuda = [f"{name}=={version}" for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt")]
    return [*cuda, "triton>=3.6", tpu]


def tpu_version(requirement: str) -> str | None:
    """The version of libtpu in one of jax's requirements.

    Example:
      >>> tpu_version('libtpu==0.0.42.*; extra == "tpu"')
      '==0.0.42.*'
    """
    m = re.fullmatch(r"libtpu\s*([^;]*?)\s*(;.*)?", requirement)
    return m[1] if m else None


def why_not(folder: Path) -> str | None:
    """What is missing in the folder, or None."""
    missing = [name for name, brings in NEEDED.items() if not (folder / brings).exists()]
    if not missing:
        return None
    return f"no {', '.join(missing)} in {folder}; run make compiles where a package index answers"


def install(folder: Path) -> str | None:
    """Fetches what is missing. Returns the reason where that fails."""
    if why_not(folder) is None:
        return None
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--upgrade", "--target", str(folder), *requirements()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it says nothing").splitlines()
        return f"pip cannot install {' '.join(requirements())}: {said[-1]}"
    return why_not(folder)
