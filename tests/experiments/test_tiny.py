"""Every experiment runs in its tiny variant, from the command line as its docstring says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Experiment -> what it needs to have been fetched, and the files that it writes.
EXPERIMENTS = {
    "fidelity_map": ("smollm2-135m", {"metrics.json", "metrics.jsonl", "pareto.png"}),
    "distortion": (None, {"metrics.json", "gap.png", "config.json"}),
    "selection": (None, {"metrics.json", "metrics.jsonl", "table.txt", "stamp.json"}),
    "vector_search": (None, {"metrics.json", "table.md", "stamp.json", "config.json"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_tiny_variant_runs(name, tmp_path):
    model, files = EXPERIMENTS[name]
    if model is not None:
        from kvjax.models import hub

        if hub.installed(hub.find(model)) is None:
            pytest.skip(f"not fetched: run `kvjax models fetch {model}`")
    done = subprocess.run(
        [
            *(sys.executable, f"experiments/{name}.py"),
            *(f"--config=configs/{name}.py:tiny", f"--config.out={tmp_path}"),
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert files <= {path.name for path in tmp_path.iterdir()}
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert rows


def test_every_experiment_has_a_config_with_both_variants():
    programs = {p.stem for p in (ROOT / "experiments").glob("*.py") if "app.run" in p.read_text()}
    own_tests = {
        "peers",
        "frontier",
        "tokens",
        "conversations",
        "soak",
        "long_context",
        "tune_shift",
    }
    assert programs <= set(EXPERIMENTS) | own_tests
    for name in programs:
        text = (ROOT / "configs" / f"{name}.py").read_text()
        assert "def get_config" in text
        assert '"tiny"' in text
        assert "Command:" in (ROOT / "experiments" / f"{name}.py").read_text()
