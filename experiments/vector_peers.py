"""faiss's quantizers for experiments/vector_search.py, as far as the installed version has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import faiss
except ImportError:
    faiss = None

MISSING = (
    "faiss is not installed, so there are kvjax rows only; for the peers: pip install faiss-cpu"
)


def version() -> str | None:
    return None if faiss is None else f"faiss-cpu {faiss.__version__}"


def set_threads(threads: int) -> None:
    if faiss is not None:
        faiss.omp_set_num_threads(threads)


def peers(d: int, bits: int) -> list[tuple[str, Callable[[], Any]]]:
    """Names and makers of indexes for inner products that take about `bits` bits per value.

    Data-oblivious codes get a random rotation first, as ours do. The EDEN types among the scalar
    quantizers lack their scale, so EDEN is run as the index that has it.
    """
    if faiss is None:
        return []
    ip, sq = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer
    scalar = lambda kind: faiss.IndexScalarQuantizer(d, getattr(sq, kind), ip)
    found = []
    if hasattr(faiss, "IndexRaBitQ"):
        found.append(("RaBitQ", lambda: _rotated(faiss.IndexRaBitQ(d, ip, bits))))
    if hasattr(faiss, "IndexEDEN"):
        found.append(("EDEN", lambda: _rotated(faiss.IndexEDEN(d, ip, bits))))
    if hasattr(sq, f"QT_{bits}bit_tqmse"):
        found.append(("SQ tqmse", lambda: _rotated(scalar(f"QT_{bits}bit_tqmse"))))
    if hasattr(sq, f"QT_{bits}bit_tq"):
        found.append(("SQ tq", lambda: _rotated(scalar(f"QT_{bits}bit_tq"))))
    if hasattr(sq, f"QT_{bits}bit"):
        found.append(("SQ", lambda: scalar(f"QT_{bits}bit")))
    return found


def product_quantizer(d: int, bits: int) -> list[tuple[str, Callable[[], Any]]]:
    """PQ with 256 words for each `8 / bits` channels: none where that does not divide."""
    if faiss is None or d * bits % 8 or d % (d * bits // 8):
        return []

    def make() -> Any:
        index = faiss.IndexPQ(d, d * bits // 8, 8, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.min_points_per_centroid = 1  # else it warns once for every sub-quantizer
        return index

    return [("PQ", make)]


def _rotated(index: Any) -> Any:
    rotation = faiss.RandomRotationMatrix(index.d, index.d)
    rotation.init(5)
    return faiss.IndexPreTransform(rotation, index)
