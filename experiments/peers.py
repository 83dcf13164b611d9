"""What do the quantizers that pip offers do to the same vectors, at the bits that they really keep?

Question: error, bias and true bits of kvjax's codes beside other packages' on one CPU, on the same
          unit vectors with the same queries, several rotations each.
Command:  python experiments/peers.py --config=configs/peers.py --peers=PEERS
          (a tiny run, a quarter of a minute: --config=configs/peers.py:tiny)
Cost:     two to three minutes on two CPU cores, most of it trellis codes and importing torch.
Expected: at d = 128, b = 2: mse 0.116 for turboquant, turboquant-py and faiss's SQ tqmse, 0.128 for
          the package turboquant, 0.264 for turbo-quant-lite; slope 1 for turboquant-prod, and 0.67
          for the inner_product of turboquant-py, the IP of turboquant and faiss's SQ tq. No peer
          is nearer to the bound at its true bits than trellis (at d = 64 and 1 bit SQ tqmse is,
          which keeps no norm); those that keep a byte per index are 30 dB and more away.

PEERS is a folder with a folder for each package, on the import path of that package's own process
only. What is not there becomes a row that says so. To fill it:

    pip install --no-deps --target PEERS/turboquant-py turboquant-py==0.1.0
    pip install --no-deps --target PEERS/turboquant turboquant==0.2.0
    pip install --no-deps --target PEERS/turbo-quant-lite turbo-quant-lite==0.1.1
    pip install --no-deps --target PEERS/faiss-cpu faiss-cpu==1.15.1
    pip install --no-deps --target PEERS/optimum-quanto optimum-quanto==0.2.7
    pip install --no-deps --target PEERS/hqq hqq==0.2.8.post1 termcolor
    pip install --target PEERS/torch torch==2.13.0 transformers==5.23.0

The last is for three of the others, and a CPU build will do. optimum-quanto compiles its unpacking
at the first call: a C++ compiler, ninja, and two minutes once.

How it is fair: packages are called as their own documentation does, with their defaults, and with
as many rotations as ours, none of which shares a generator with the vectors. Their vectors are read
from their own estimates of inner products where those are not the decoded vectors' (estimates are
linear in the query; faiss's RaBitQ's nearly so, 0.2 % of its error). Bits are counted in the arrays
that a package holds, and once more in its packed form where it documents one, which has a row of
its own; what is one for all vectors (rotations, tables) is not counted for anyone.

NVIDIA's kvpress has no row: it evicts tokens and quantizes nothing. With it one quantizes through
transformers' QuantizedCache, which has its rows here.

Writes config.json and metrics.json (rows and stamp) into `config.out`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from peer_codes import PEERS

import kvjax
from kvjax.cli.compare import write_json
from kvjax.core.layout import Layout
from kvjax.evals.distortion import errors, gap_db, pages_for
from kvjax.evals.stamp import make_stamp
from kvjax.evals.vectors import Vectors, synthetic
from kvjax.methods import get
from kvjax.methods.describe import code_bits

_CONFIG = config_flags.DEFINE_config_file("config")
_PEERS = flags.DEFINE_string("peers", None, "Folder of the packages; see the top of this file.")

NUMBERS = ("bits_per_value", "mse", "ip_error", "slope", "gap_db", "encode_mvps")
Row = dict[str, Any]


def main(argv: list[str]) -> None:
    del argv
    config = SimpleNamespace(**_CONFIG.value.to_dict())
    data = [
        synthetic(
            "sphere", pages_for(d, config.page, config.values), config.page, d, seed=config.seed
        )
        for d in config.dims
    ]
    rows: list[Row] = []
    for name in config.methods:
        print(name, flush=True)
        rows += [kvjax_row(name, vectors, tuple(config.seeds)) for vectors in data]
    for name in PEERS:
        print(name, flush=True)
        rows += peer_rows(name, data, config)
    command = "python experiments/peers.py --config=configs/peers.py --peers=PEERS"
    stamp = make_stamp(seed=config.seed, command=command)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", vars(config))
    write_json(folder / "metrics.json", {"rows": rows, "stamp": stamp})
    print("\n".join(table(rows)))
    print(f"wrote {folder / 'metrics.json'}")


def kvjax_row(name: str, vectors: Vectors, seeds: tuple[int, ...]) -> Row:
    """The key codec of a method, its bits counted in the arrays of a real code."""
    page, d = vectors.x.shape[-2:]
    positions = jnp.broadcast_to(jnp.arange(page), vectors.x.shape[:-1])
    encode = jax.jit(lambda codec, x: codec.encode(x, positions))
    decode = jax.jit(lambda codec, code: codec.decode(code))
    decoded, times = [], []
    for seed in seeds:
        codec = get(name, d, layout=Layout(page=page, recent=page), seed=seed).key
        jax.block_until_ready(codec)  # drawing a rotation is not encoding
        if not decoded:
            jax.block_until_ready(encode(codec, vectors.x))
        start = time.perf_counter()
        code = jax.block_until_ready(encode(codec, vectors.x))
        times.append(time.perf_counter() - start)
        decoded.append(np.asarray(decode(codec, code)))
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(code))
    speed = vectors.x.size / 1e6 / statistics.median(times)
    about = {"peer": "kvjax", "version": kvjax.__version__, "mode": name, "d": d}
    about["claimed_bits"] = code_bits(codec, d, page)
    return about | measured(vectors, decoded, size, speed) | {"note": ""}


def peer_rows(name: str, data: Sequence[Vectors], config: SimpleNamespace) -> Iterator[Row]:
    """All rows of a package, from a process of its own; one row with the reason if it has none."""
    nothing: Row = {"peer": name, "version": None, "mode": None, "d": None, "claimed_bits": None}
    nothing |= dict.fromkeys(NUMBERS)
    if _PEERS.value is None:
        yield nothing | {"note": "not run: no --peers folder"}
        return
    folders = [Path(_PEERS.value) / folder for folder in PEERS[name].folders]
    missing = [folder.name for folder in folders if not folder.is_dir()]
    if missing:
        yield nothing | {"note": f"not installed: no {', '.join(missing)} in the --peers folder"}
        return
    with tempfile.TemporaryDirectory() as place:
        job = Path(place)
        for vectors in data:
            d = vectors.x.shape[-1]
            np.save(job / f"x{d}.npy", np.asarray(vectors.x).reshape(-1, d))
        asked = {
            "folders": [str(folder.resolve()) for folder in folders],
            "dims": [vectors.x.shape[-1] for vectors in data],
            "seeds": list(config.seeds),
        }
        (job / "job.json").write_text(json.dumps(asked))
        failure = run_peer(name, job, config.limit_s)
        if failure is not None:
            yield nothing | {"note": f"failed: {failure}"}
            return
        answer = json.loads((job / "answer.json").read_text())
        by_dim = {vectors.x.shape[-1]: vectors for vectors in data}
        for found in answer["rows"]:
            about = {"peer": name, "version": answer["version"], "mode": found["mode"]}
            about |= {"d": found["d"], "claimed_bits": found["claimed_bits"]}
            if "error" in found:
                yield nothing | about | {"note": found["error"]}
                continue
            vectors = by_dim[found["d"]]
            decoded = list(np.load(job / found["decoded"]).reshape(-1, *vectors.x.shape))
            for form, size in found["bytes"].items():
                about["mode"] = f"{found['mode']} {form}".rstrip()
                speed = None if form else found["encode_mvps"]
                yield about | measured(vectors, decoded, size, speed) | {"note": found["note"]}


def run_peer(name: str, job: Path, limit_s: float) -> str | None:
    """Runs peer_codes.py; None, or what it died of."""
    program = Path(__file__).with_name("peer_codes.py")
    try:
        done = subprocess.run(
            [sys.executable, str(program), name, str(job)],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"took more than {limit_s} s"
    lines = done.stderr.strip().splitlines() or ["no word"]
    return None if done.returncode == 0 else lines[-1]


def measured(
    vectors: Vectors, decoded: Sequence[np.ndarray], size: int, speed: float | None
) -> dict[str, float | None]:
    """The numbers of a row: means over rotations, bits from the bytes of one code."""
    found = [errors(vectors.x, x_hat, vectors.q) for x_hat in decoded]
    mean = {name: statistics.fmean(each[name] for each in found) for name in found[0]}
    bits = size * 8 / vectors.x.size
    gap = gap_db(mean["mse"], bits)
    return {"bits_per_value": bits, **mean, "gap_db": gap, "encode_mvps": speed}


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Aligned lines by dimension, and the notes that their last column counts."""
    notes: list[str] = []
    mode = max(len(row["mode"] or "") for row in rows)
    peer = max(len(row["peer"]) for row in rows)
    for d in sorted({row["d"] for row in rows if row["d"]}, reverse=True):
        yield (
            f"\n{f'd = {d}':{peer}s} {'mode':{mode}s} {'claims':>6s} {'bits':>6s} {'mse':>8s} "
            f"{'ip error':>8s} {'slope':>6s} {'dB':>6s} {'enc M/s':>8s}"
        )
        for row in rows:
            if row["d"] != d:
                continue
            if row["note"] and row["note"] not in notes:
                notes.append(row["note"])
            note = f"  [{notes.index(row['note']) + 1}]" if row["note"] else ""
            cells = [
                _cell(row[name], width, digits)
                for name, width, digits in (
                    ("claimed_bits", 6, 3),
                    ("bits_per_value", 6, 3),
                    ("mse", 8, 5),
                    ("ip_error", 8, 5),
                    ("slope", 6, 3),
                    ("gap_db", 6, 2),
                    ("encode_mvps", 8, 2),
                )
            ]
            yield f"{row['peer']:{peer}s} {row['mode']:{mode}s} {' '.join(cells)}{note}"
    yield (
        "\nclaims: bits per value by the package's own account; bits: those of what it keeps; mse "
        "and ip error: relative; dB: above 4^-bits; slope: 1 is unbiased; M/s: million values"
    )
    yield from (f"[{number}] {note}" for number, note in enumerate(notes, 1))
    yield from (f"{row['peer']}: {row['note']}" for row in rows if row["d"] is None)


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'–':>{width}s}" if value is None else f"{value:{width}.{digits}f}"


if __name__ == "__main__":
    app.run(main)
