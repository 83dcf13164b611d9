"""Two real processes save one cache: each its parts, and one commits once both have."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import two_worker

from kvjax.checkpoint import reshard, restore
from kvjax.cli import workers
from kvjax.cli.launch import free_port

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_two_processes_save_one_state(tmp_path):
    shared = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": f"{ROOT}:{HERE}",
        "KVJAX_COORDINATOR": f"127.0.0.1:{free_port()}",
        "KVJAX_PROCESSES": "2",
        "KVJAX_LOCAL_DEVICES": "2",
        "KVJAX_TIMEOUT": "60",
    }
    words = [sys.executable, str(HERE / "two_worker.py"), str(tmp_path)]
    workers.run_all(words, [shared | {"KVJAX_PROCESS_ID": str(n)} for n in (0, 1)])
    zero, one = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 1))
    whole = two_worker.bits(two_worker.shapes(2))
    for found in zero, one:
        assert found["counts"] == "000003"
        assert found["same"]
        assert found["rng"] == np.asarray(jax.random.key_data(jax.random.key(3))).tolist()
        assert found["here"] == whole.page_starts.nbytes  # a half, on two devices each
        assert found["starts"] == reshard(whole, 4, slots=12).page_starts.tolist()
        assert found["left"] is None
    assert zero["file"] in zero["damage"] + one["damage"]
    assert "found damage" in zero["damage"] + one["damage"]
    assert "No space left on device" in zero["full"]
    assert "process 0 could not commit it" in one["full"]
    # The one before the damaged one, here, by one process.
    like = {
        "cache": two_worker.shapes(1),
        "rng": jax.random.key(0),
        "n": 0,
        "host": np.zeros(3, int),
    }
    back, about = restore(tmp_path / "state", like, number=2)
    assert about == {"n": 1}
    want = jax.tree.leaves(reshard(whole, 1, slots=like["cache"].page_starts.shape[-1]))
    assert all(map(np.array_equal, jax.tree.leaves(back["cache"]), want))
