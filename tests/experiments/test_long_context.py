"""experiments/long_context.py on a tiny model: all parts, devices, and runs that are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from tiny_runs import lines, png_size

from kvjax.core.errors import InputError
from kvjax.models.config import known_configs

CASES = 7  # 4 needles, 2 speed, 1 text
KILLS = 10 if os.environ.get("KVJAX_LONG_CHECKS") else 3


@pytest.fixture(scope="module")
def modules():
    """long_context_cases, _speed, _tables, _plot and _text."""
    names = ("cases", "speed", "tables", "plot", "text")
    with tiny_runs.modules(*(f"long_context_{name}" for name in names)) as found:
        yield dict(zip(names, found, strict=True))


@pytest.fixture
def config():
    return tiny_runs.tiny_config("long_context")


def run(folder: Path, *options: str) -> str:
    done = tiny_runs.run("long_context", folder, *options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def kept(path: Path) -> list[str]:
    """Lines without what another run has otherwise; half-written ones are none."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        del row["run"]
        rows.append(json.dumps(row))
    return rows


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("long_context")
    return folder, run(folder)


@pytest.mark.slow
def test_a_line_for_every_measurement(first):
    folder, printed = first
    rows = lines(folder / "metrics.jsonl")
    assert len(rows) == CASES
    assert f"0 of {CASES} are there" in printed
    found = {
        (row["settings"]["context"], row["settings"]["method"]): row
        for row in rows
        if row["part"] == "needles"
    }
    assert list(found) == [(c, m) for c in (256, 512) for m in ("bf16", "turboquant-2")]
    for (context, method), row in found.items():
        assert row["cache_bytes"] < row["bf16_bytes"] * (1.04 if method == "bf16" else 0.26)
        assert row["bf16_bytes"] == 2 * 2 * 2 * 16 * (2 + context + 8)
        assert row["run"]["fill_peak_bytes"] >= 0
        steady, fading = row["needles"]
        assert steady["share"] == pytest.approx(0.5, abs=1e-4)
        assert fading["margin"] == pytest.approx(2.2 - np.log(context / 256), abs=1e-5)
        assert fading["share"] == pytest.approx(1 / (1 + np.exp(-fading["margin"])), abs=1e-4)
        assert 0 <= steady["top"] <= 1
        for one in row["needles"]:
            if method == "bf16":
                assert one["top"] == 1
                assert one["read_share"] == pytest.approx(one["share"], abs=0.01)
                assert row["error"] < 0.01
            else:
                assert one["read_share"] < one["share"]  # noise goes to the sum of the others
                assert one["error"] > 0.05
                assert row["kl"] > 3 * row["kl_se"] > 0
    steps = [row for row in rows if row["part"] == "speed"]
    assert [set(row["run"]["times"]) for row in steps] == [{"bf16", "turboquant-2"}] * 2
    (text,) = [row for row in rows if row["part"] == "text"]
    assert [at["stop"] for at in text["by_position"]] == [63, 255]
    assert text["kl"] == pytest.approx(np.mean([at["kl"] for at in text["by_position"]]), rel=1e-5)
    assert text["kl"] > 0.001


@pytest.mark.slow
def test_what_it_writes(first):
    folder, printed = first
    assert png_size((folder / "long_context.png").read_bytes()) == (1800, 1050)
    tables = (folder / "tables.txt").read_text()
    for words in ("a decode step of one layer", "ns per token", "needle", "drawn from moments of"):
        assert words in tables
        assert words in printed
    assert (folder / "calibration" / "moments.safetensors").exists()
    (folder / "long_context.png").unlink()
    assert "are there" not in run(folder, "--plot_only")
    assert png_size((folder / "long_context.png").read_bytes()) == (1800, 1050)


@pytest.mark.slow
def test_many_devices_find_the_same(first, tmp_path):
    folder, _ = first
    printed = run(tmp_path, "--config.devices=8", "--config.mesh=(2, 4)")
    assert "on one device only: speed" in printed
    one = [row for row in lines(folder / "metrics.jsonl") if row["part"] == "needles"]
    many = lines(tmp_path / "metrics.jsonl")
    assert len(one) == len(many) == 4
    for a, b in zip(one, many, strict=True):
        assert b["settings"]["mesh"] == [2, 4]
        for name in ("kl", "error", "log_sum", "largest_share"):
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-4)
        for x, y in zip(a["needles"], b["needles"], strict=True):
            for name in ("share", "read_share", "error", "kl"):
                assert y[name] == pytest.approx(x[name], rel=2e-3, abs=2e-4)
            assert y["top"] == x["top"]


def wait(folder: Path, process: subprocess.Popen, rows: int) -> None:
    """Until metrics.jsonl has so many lines."""
    path, end = folder / "metrics.jsonl", time.monotonic() + 600
    while process.poll() is None and len(kept(path)) < rows:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_runs_go_on_where_they_were(first, tmp_path):
    """Killed at random points, some while a line is written: the lines are the same, bit by bit."""
    folder, _ = first
    path = tmp_path / "metrics.jsonl"
    draw = random.Random(0)
    points = sorted(draw.randrange(CASES) for _ in range(KILLS))
    for count, point in enumerate(points):
        process = start(tmp_path)
        wait(tmp_path, process, point)
        time.sleep(draw.uniform(0, 4) if not point else draw.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if count % 2:  # as if it had been writing
            with path.open("a") as file:
                file.write('{"part": "needles", "settings": {"par')
        assert process.returncode in (-signal.SIGKILL, 0)
    before = kept(path)
    assert len(before) >= points[-1]
    printed = run(tmp_path)
    assert f"{len(before)} of {CASES} are there" in printed
    assert kept(path) == kept(folder / "metrics.jsonl")
    assert f"{CASES} of {CASES} are there" in run(tmp_path)
    assert kept(path) == kept(folder / "metrics.jsonl")


def start(folder: Path) -> subprocess.Popen:
    """The tiny variant, not waited for."""
    command = [
        *(sys.executable, "experiments/long_context.py"),
        *("--config=configs/long_context.py:tiny", f"--config.out={folder}"),
    ]
    keep = {
        "JAX_COMPILATION_CACHE_DIR": str(tiny_runs.ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=tiny_runs.ROOT, env={**os.environ, **keep}, **silent)


def test_cases_come_in_order(modules, config):
    cases = modules["cases"].all_cases(config)
    assert [case.part for case in cases] == ["needles"] * 4 + ["speed"] * 2 + ["text"]
    assert cases[4].methods == ("bf16", "turboquant-2")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parts", ("needle",)),
        ("methods", ("klt-9",)),
        ("methods", ("klt-layers-2",)),  # what predictions cost is not known of a drawn layer
        ("methods", ("oscar",)),
        ("speed_shapes", ("llama-3.1-8b",)),  # not among the shapes
        ("text_methods", ("klt-2",)),  # without a calibration
    ],
)
def test_what_cannot_be_is_told_at_once(modules, config, field, value):
    with config.unlocked():
        config[field] = value
    with pytest.raises(InputError):
        modules["cases"].all_cases(config)


def test_meshes(modules, config):
    mesh = modules["cases"].mesh_of
    assert mesh(config) == (1, 1)
    config.devices = 8
    assert mesh(config) == (1, 8)
    config.mesh = (2, 0)
    assert mesh(config) == (2, 4)
    config.mesh = (3, 0)
    with pytest.raises(InputError, match="mesh"):
        mesh(config)


def test_shapes_by_name(modules):
    own = known_configs()["smollm2-135m"]
    shape = modules["cases"].shape_config
    assert shape("smollm2-135m", own) is own
    assert shape("llama-3.1-70b", own).q_heads == 64
    with pytest.raises(InputError, match="shape"):
        shape("llama-4", own)


def test_slopes_are_those_of_lines(modules):
    contexts = [8192, 32768, 131072, 524288]
    line = modules["speed"].fit_slope(contexts, [0.5 + 3e-4 * c for c in contexts])
    assert line.ns == pytest.approx(300)
    assert line.base == pytest.approx(0.5)
    assert line.worst == 0
    bent = modules["speed"].fit_slope(contexts, [1.0, 4.0, 16.0, 80.0])
    assert bent.worst > 0.05


def test_the_last_line_of_equal_settings_counts(modules):
    rows = [{"part": "text", "settings": {"a": a}, "kl": kl} for a, kl in ((1, 0), (2, 1), (1, 2))]
    current = modules["tables"].current
    assert [row["kl"] for row in current(rows)] == [2, 1]
    wanted = {modules["cases"].settings_of(rows[1])}
    assert [row["kl"] for row in current([*rows, {"no": "line of ours"}], wanted)] == [1]


def test_a_picture_without_lines(modules):
    assert png_size(modules["plot"].long_context_png([])) == (1800, 1050)
