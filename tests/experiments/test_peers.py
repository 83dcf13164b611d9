"""experiments/peers.py as a user runs it, with a stand-in for one package and none of the others."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]

# Keeps 4 bytes per value and 8 per vector, and hands 3/4 of a vector back: slope 0.75, mse 1/16.
STAND_IN = """
import numpy as np

class TurboQuant:
    def __init__(self, dim, bits=4, seed=42):
        self.dim, self.bits = dim, bits

    def compressed_size_bytes(self):
        return self.dim

    def encode_batch(self, xs):
        if self.bits == 3:
            raise ValueError("no 3 bits\\nhere")
        return xs, np.ones(len(xs))

    def decode_batch(self, indices, norms):
        return 0.75 * indices

def pack(indices, norm, bits):
    return bytes(2 * len(indices))
"""


@pytest.fixture(scope="module")
def peer_codes():
    path = ROOT / "experiments" / "peer_codes.py"
    spec = importlib.util.spec_from_file_location("peer_codes", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, list[dict]]:
    """What it prints, and its rows."""
    folder = tmp_path_factory.mktemp("peers")
    package = folder / "all" / "turbo-quant-lite"
    (package / "turbo_quant_lite-9.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: turbo-quant-lite\nVersion: 9\n"
    (package / "turbo_quant_lite-9.dist-info" / "METADATA").write_text(metadata)
    (package / "turbo_quant_lite.py").write_text(STAND_IN)
    broken = folder / "all" / "faiss-cpu"
    broken.mkdir()
    (broken / "faiss.py").write_text("raise RuntimeError('built for another machine')")
    done = subprocess.run(
        [
            sys.executable,
            "experiments/peers.py",
            "--config=configs/peers.py:tiny",
            f"--config.out={folder / 'out'}",
            f"--peers={folder / 'all'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert metrics["stamp"]["command"].startswith("python experiments/peers.py")
    assert json.loads((folder / "out" / "config.json").read_text())["dims"] == [64]
    return done.stdout, metrics["rows"]


def test_a_row_of_ours_is_the_published_number(run):
    (row,) = [row for row in run[1] if row["peer"] == "kvjax"]
    assert row["mse"] == pytest.approx(0.114526, rel=0.02)  # Lloyd-Max, d = 64 (fact sheet, 1.3)
    assert row["slope"] == pytest.approx(1 - row["mse"], rel=0.02)
    assert row["bits_per_value"] == row["claimed_bits"] == 2 + 16 / 64


def test_rows_of_a_peer(run):
    rows = {row["mode"]: row for row in run[1] if row["peer"] == "turbo-quant-lite"}
    assert rows.pop("b=3")["note"] == "ValueError: no 3 bits here"
    assert list(rows) == [*(f"b={b}{form}" for b in (1, 2, 4) for form in ("", " pack()"))]
    for mode, row in rows.items():
        assert row["version"] == "9"
        assert row["claimed_bits"] == 8
        assert row["bits_per_value"] == (16 if "pack" in mode else 32 + 64 / 64)
        assert row["mse"] == pytest.approx(1 / 16, rel=1e-5)
        assert row["slope"] == pytest.approx(0.75, rel=1e-5)
        assert row["ip_error"] == pytest.approx(1 / 16, rel=0.05)
        assert (row["encode_mvps"] is None) == ("pack" in mode)


def test_what_is_not_there_says_why(run):
    reasons = {row["peer"]: row["note"] for row in run[1] if row["mode"] is None}
    assert reasons["turboquant-py"] == "not installed: no turboquant-py in the --peers folder"
    assert "torch" in reasons["hqq"]
    assert reasons["faiss-cpu"] == "failed: RuntimeError: built for another machine"
    assert all(f"{peer}: {reason}" in run[0] for peer, reason in reasons.items())


def test_bytes_are_those_of_what_is_kept(peer_codes):
    arrays = [np.zeros((4, 8), np.uint8), np.zeros(4), b"12345"]
    assert peer_codes.nbytes(arrays) == 32 + 32 + 5


def test_every_seed_is_decoded_once(peer_codes, tmp_path):
    seen = []

    def make(seed: int):
        seen.append(seed)
        code = lambda x: seed * x
        half = lambda kept: [kept.tobytes()[:16]]
        return peer_codes.Code(code, lambda kept: kept, {"": lambda kept: [kept], "half": half})

    entry = peer_codes.Entry("m", 2.0, make)
    x = np.ones((2, 4), np.float32)
    found = peer_codes.measure(entry, x, [1, 2, 3], tmp_path / "x.npy")
    assert seen == [1, 2, 3]
    assert np.load(tmp_path / "x.npy")[:, 0, 0].tolist() == [1, 2, 3]
    assert found["bytes"] == {"": 32, "half": 16}
