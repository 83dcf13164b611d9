"""How well do packed codes find neighbours, and how soon are they ready?

Question: recall@k and indexing time at equal bytes, kvjax's codecs beside faiss's quantizers.
Command:  python experiments/vector_search.py --config=configs/vector_search.py
          (a tiny run, ten seconds: --config=configs/vector_search.py:tiny)
          --config.data="('minilm',)" takes one data set; needs `kvjax models fetch minilm`, and
          `pip install faiss-cpu` for the peers.
Cost:     on one core seconds per row, but for training PQ at 4 bits: 40 s at d = 200, 75 s at 384,
          5 minutes at 1536; and for the slowest searches there. Half an hour for the full config,
          whose data sets can be run one by one. Embedding the sentences takes 2 minutes once.
Expected: at 4 bits recall 10@10 no less than any peer's at equal bytes, and indexing at least 20
          times faster than PQ. Which of these have been met: docs/results-log.md.

All in one process on `config.threads` cores (Linux); times are medians of rounds. A first round of
kvjax, which compiles, is told apart ("first s"). Bytes are those per vector, with norms and scales,
without what is one for all vectors (rotation, codebooks). Exact neighbours are those of float32
inner products.

Writes config.json, stamp.json, metrics.json and table.md into `config.out`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import vector_peers
from absl import app
from ml_collections import config_flags
from vector_data import vectors

from kvjax.cli.compare import write_json
from kvjax.codecs import Codebook, Dense, Linear, Normalized, Orthogonal, Split, Trellis, rotated
from kvjax.codecs.linear import Rotation
from kvjax.core.codec import Codec
from kvjax.core.rng import fold
from kvjax.evals.stamp import make_stamp
from kvjax.search import Index

_CONFIG = config_flags.DEFINE_config_file("config")


def _lloyd_max(kind: Rotation, x: np.ndarray, bits: int, rng: jax.Array, search: int = 1) -> Codec:
    """With a float16 scale: of unit vectors it is more exact than bf16."""
    d = x.shape[1]
    scaled = Normalized(Codebook.lloyd_max(d, bits), "unbiased", jnp.dtype("float16"), search)
    return rotated(kind, d, scaled, rng=fold(rng, "rotation"))


def _mean_apart(x: np.ndarray, bits: int, rng: jax.Array, spare: int = 0) -> Codec:
    """The direction of the mean is kept exact, as one float16; the rest is rotated at random.

    Real vectors and queries share a mean: what is common to both is then out of the error.
    `spare` bytes give some of the other channels, after the rotation any of them, a bit more.
    """
    d = x.shape[1]
    noise = jax.random.normal(fold(rng, "rotation"), (d, d)).at[0].set(x.mean(0))
    matrix = jnp.linalg.qr(noise.T)[0].T  # rows: the mean's direction, then a Haar rotation
    more, count = divmod(8 * spare, d - 1)
    book: Codec = Codebook.lloyd_max(d - 1, bits + more)
    if count:
        finer = Codebook.lloyd_max(d - 1, bits + more + 1)
        book = Split(jnp.arange(d - 1), finer, book, count)
    scaled = Normalized(book, "unbiased", jnp.dtype("float16"), search=9)
    return Linear(Orthogonal(matrix), Split(jnp.arange(d), Dense("float16"), scaled, 1))


def _trellis(x: np.ndarray, bits: int, rng: jax.Array) -> Codec:
    d = x.shape[1]
    scaled = Normalized(Trellis(bits, std=d**-0.5), "unbiased", jnp.dtype("float16"))
    return rotated("haar", d, scaled, rng=fold(rng, "rotation"))


def _as_rabitq(x: np.ndarray, bits: int, rng: jax.Array) -> Codec:
    """In the bytes of faiss's RaBitQ, which takes 8 beside its codes at 1 bit, and 20 beyond."""
    return _mean_apart(x, bits, rng, spare=(8 if bits == 1 else 20) - 4)


# Name, and (vectors [n, d], bits, rng) -> codec. What a codec takes from the vectors is part of its
# indexing time. A new codec is one line.
CODECS: list[tuple[str, Callable[[np.ndarray, int, jax.Array], Codec]]] = [
    ("Lloyd-Max, haar", lambda x, bits, rng: _lloyd_max("haar", x, bits, rng)),
    ("Lloyd-Max, hadamard", lambda x, bits, rng: _lloyd_max("hadamard", x, bits, rng)),
    ("Lloyd-Max, haar, scale search", lambda x, bits, rng: _lloyd_max("haar", x, bits, rng, 9)),
    ("Lloyd-Max, mean apart, scale search", _mean_apart),
    ("Lloyd-Max, mean apart, RaBitQ's bytes", _as_rabitq),
    ("Trellis, haar", _trellis),
]
SLOW = ("Trellis, haar",)  # timed in `config.pq_rounds` rounds, like PQ

COLUMNS = {
    "data": "data",
    "bits": "bits",
    "name": "method",
    "bytes": "bytes/vector",
    "recall_1@1": "1@1",
    "recall_10@10": "10@10",
    "recall_1@10": "1@10",
    "index_s": "index s",
    "first_s": "first s",
    "search_ms": "ms/query",
}


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    if hasattr(os, "sched_setaffinity"):  # before jax and faiss count the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.threads])
    vector_peers.set_threads(config.threads)
    if vector_peers.version() is None:
        print(vector_peers.MISSING)
    rows: list[dict[str, Any]] = []
    about = {}
    for name in config.data:
        about[name], x = vectors(name, config.vectors + config.queries, seed=config.seed)
        rows += _compare(name, x[: -config.queries], x[-config.queries :], config)
    stamp = make_stamp(seed=config.seed, command="python experiments/vector_search.py")
    stamp |= {"peers": vector_peers.version() or "none", "threads": config.threads}
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.to_dict())
    write_json(folder / "stamp.json", stamp)
    write_json(folder / "metrics.json", {"data": about, "rows": rows, "stamp": stamp})
    (folder / "table.md").write_text(markdown(rows), encoding="utf-8")
    print("\n" + markdown(rows))


def _compare(data: str, x: np.ndarray, q: np.ndarray, config) -> list[dict[str, Any]]:
    """All rows of one data set."""
    truth = np.argsort(-(q @ x.T), axis=-1, kind="stable")[:, :10]
    rows: list[dict[str, Any]] = []

    def add(bits: int, name: str, measured: dict[str, Any], ids: np.ndarray) -> None:
        rows.append({"data": data, "bits": bits, "name": name, **measured, **recalls(ids, truth)})
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)

    for bits in config.bits:
        for name, make in CODECS:
            rounds = config.pq_rounds if name in SLOW else config.rounds
            add(bits, f"kvjax {name}", *_run_kvjax(make, x, q, bits, rounds, config))
        for name, make in vector_peers.peers(x.shape[1], bits):
            add(bits, f"faiss {name}", *_run_peer(make, x, q, config.rounds))
        if bits in config.pq_bits:
            for name, make in vector_peers.product_quantizer(x.shape[1], bits):
                add(bits, f"faiss {name}", *_run_peer(make, x, q, config.pq_rounds))
    return rows


def _run_kvjax(make, x, q, bits: int, rounds: int, config) -> tuple[dict[str, Any], np.ndarray]:
    """Times and bytes, and the ids found."""

    def build(rng) -> Index:
        index = Index.create(make(x, bits, rng), x.shape[1], page=config.page).add(x)
        return jax.block_until_ready(index)

    rng = jax.random.key(config.seed)
    first_s, _ = _time(lambda: build(rng))
    index_s, index = _median(lambda: build(rng), rounds)
    jax.block_until_ready(index.search(q, 10))
    search_s, found = _median(lambda: jax.block_until_ready(index.search(q, 10)), config.rounds)
    measured = {"bytes": index.bytes / len(index), "index_s": index_s, "first_s": first_s}
    return measured | {"search_ms": 1e3 * search_s / len(q)}, np.asarray(found[1])


def _run_peer(make, x, q, rounds: int) -> tuple[dict[str, Any], np.ndarray]:
    def build():
        index = make()
        index.train(x)
        index.add(x)
        return index

    index_s, index = _median(build, rounds)
    index.search(q, 10)
    search_s, found = _median(lambda: index.search(q, 10), rounds)
    measured = {"bytes": float(index.sa_code_size()), "index_s": index_s, "first_s": None}
    return measured | {"search_ms": 1e3 * search_s / len(q)}, found[1]


def _time(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _median(call: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    times, results = zip(*(_time(call) for _ in range(rounds)), strict=True)
    return statistics.median(times), results[-1]


def recalls(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """a@b: which part of the a nearest is among the first b found; ids `[m, 10]` both."""
    hits = (found[:, :, None] == truth[:, None, :]).any(1)  # [m, 10] of the truth
    return {
        "recall_1@1": float((found[:, 0] == truth[:, 0]).mean()),
        "recall_10@10": float(hits.mean()),
        "recall_1@10": float(hits[:, 0].mean()),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    lines += [[_cell(row[column]) for column in COLUMNS] for row in rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3f}"
    return "–" if value is None else str(value)


if __name__ == "__main__":
    app.run(main)
