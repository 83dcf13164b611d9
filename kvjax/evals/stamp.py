"""Where and when a number was made."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path

import jax


def make_stamp(*, seed: int, command: str) -> dict[str, str | int]:
    """Date, versions, commit, device, seed and the command that makes it again."""
    import kvjax

    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kvjax": kvjax.__version__,
        "git": _commit(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{device.device_kind} ({device.platform}, {jax.device_count()} device)",
        "machine": f"{platform.system()} {platform.machine()}",
        "seed": seed,
        "command": command,
    }


def _commit() -> str:
    """The checkout's commit, with + for uncommitted changes; "release" outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return "release"
    git = lambda *words: subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
    ).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
