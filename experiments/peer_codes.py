"""Other people's quantizers for experiments/peers.py, each through its own documented calls.

Runs as a program of its own, one process per package: two of them are imported under the same name.
It takes what is asked from `JOB/job.json` and `JOB/x<d>.npy`, and leaves `JOB/answer.json` and the
decoded vectors. Neither jax nor kvjax is imported here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WIDTHS = (1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Code:
    """A quantizer with its rotation drawn.

    Attributes:
      encode: vectors `[n, d]`, float32, to what the package keeps.
      decode: what it keeps to the `[n, d]` whose inner products are the package's estimates.
      forms: what it keeps, in the forms that it documents: a name ("" for the one in memory), and
        the arrays or bytes of it that grow with the number of vectors.
    """

    encode: Callable[[np.ndarray], Any]
    decode: Callable[[Any], np.ndarray]
    forms: dict[str, Callable[[Any], list[Any]]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row to be: `make` takes a seed; `seeded` says whether anything is random."""

    mode: str
    claimed_bits: float
    make: Callable[[int], Code]
    note: str = ""
    seeded: bool = True


def turboquant_py(d: int) -> Iterator[Entry]:
    package = importlib.import_module("turboquant")

    def saved(kept) -> list[np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            kept.save(folder)
            return [np.load(path) for path in sorted(Path(folder).glob("*.npy"))]

    def estimates(code, kept) -> np.ndarray:
        # Linear in the query, so the estimates of unit vectors are the vector behind them.
        return np.stack([code.inner_product(e, kept) for e in np.eye(d)], -1)

    def make(mode: str, bits: int, seed: int) -> Code:
        code = package.TurboQuant(d, bits, mode=mode, seed=seed)
        decode = code.dequantize if mode == "mse" else functools.partial(estimates, code)
        memory = lambda kept: [kept.indices, kept.norms, *kept.extra_arrays.values()]
        return Code(code.quantize, decode, {"": memory, "saved": saved})

    for bits in WIDTHS:
        note = "a byte per index and float64 norms in memory; save() packs the indices"
        yield Entry(f"mse b={bits}", bits, functools.partial(make, "mse", bits), note)
    for bits in WIDTHS:
        note = "scale of a Gaussian sketch on an orthonormal one; a byte per sign, saved too"
        part = functools.partial(make, "inner_product", bits)
        yield Entry(f"inner_product b={bits}", bits, part, note)


def turboquant(d: int) -> Iterator[Entry]:
    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # what NumPy 2.4 calls it
    torch = importlib.import_module("torch")
    core = importlib.import_module("turboquant.core")
    shim = "needs np.trapz, which NumPy 2.4 no longer has: shimmed; a byte per index"

    def make(kind, bits: int, seed: int) -> Code:
        code = kind(d, bits=bits, device="cpu", seed=seed)
        return Code(
            lambda x: code.quantize(torch.from_numpy(x)),
            lambda kept: code.dequantize(*kept).numpy(),
            {"": _tensors},
        )

    claimed = lambda bits, two: core.compute_memory_bytes(d, bits, 1, two)["bits_per_element"]
    for bits in WIDTHS:
        part = functools.partial(make, core.TurboQuantMSE, bits)
        note = f"{shim}; cells of equal mass, not Lloyd-Max"
        yield Entry(f"MSE b={bits}", claimed(bits, False), part, note)
    for bits in WIDTHS:
        part = functools.partial(make, core.TurboQuantIP, bits)
        note = f"{shim} and per sign; sketch scaled down twice"
        if bits == 1:
            note += "; b=1 still has a first stage of 1 bit"
        yield Entry(f"IP b={bits}", claimed(bits, True), part, note)


def turbo_quant_lite(d: int) -> Iterator[Entry]:
    package = importlib.import_module("turbo_quant_lite")

    def make(bits: int, seed: int) -> Code:
        code = package.TurboQuant(d, bits=bits, seed=seed)
        packed = lambda kept: [package.pack(i, float(n), bits) for i, n in zip(*kept, strict=True)]
        return Code(
            code.encode_batch, lambda kept: code.decode_batch(*kept), {"": list, "pack()": packed}
        )

    for bits in WIDTHS:
        claimed = package.TurboQuant(d, bits=bits).compressed_size_bytes() * 8 / d
        note = "one table, made for d = 512" + ("; pack() takes 8 bits for 3" if bits == 3 else "")
        yield Entry(f"b={bits}", claimed, functools.partial(make, bits), note)


def faiss_cpu(d: int) -> Iterator[Entry]:
    faiss = importlib.import_module("faiss")
    peers = importlib.import_module("vector_peers").peers

    def encode(index, x: np.ndarray):
        index.reset()
        index.train(x)
        index.add(x)
        return index

    def scores(index) -> np.ndarray:
        # Not sa_decode: RaBitQ's decodes its first bit only.
        values, ids = index.search(np.eye(d, dtype=np.float32), index.ntotal)
        found = np.empty_like(values)
        np.put_along_axis(found, ids, values, 1)
        return found.T

    def quantizer(index):
        rotated = isinstance(index, faiss.IndexPreTransform)
        return faiss.downcast_index(index.index) if rotated else index

    def make(index_of: Callable[[], Any], seed: int) -> Code:
        index = index_of()
        if isinstance(index, faiss.IndexPreTransform):
            faiss.downcast_VectorTransform(index.chain.at(0)).init(seed)
        if hasattr(quantizer(index), "qb"):
            quantizer(index).qb = 0
        codes = lambda index: [faiss.vector_to_array(quantizer(index).codes)]
        return Code(functools.partial(encode, index), scores, {"": codes})

    notes = {
        "RaBitQ": "queries in float32 (qb = 0; its default at 1 bit is 4 bits)",
        "SQ": "ranges of each channel learnt from these vectors; no rotation",
        "SQ tqmse": "keeps no norm: for unit vectors only",
        "SQ tq": "in an IndexScalarQuantizer; shrinks as turboquant-py's inner_product does",
    }
    for bits in (*WIDTHS, 8):
        for name, index_of in peers(d, bits):
            if bits in WIDTHS or name == "SQ":
                part = functools.partial(make, index_of)
                yield Entry(f"{name} b={bits}", bits, part, notes.get(name, ""), name != "SQ")


def quantized_cache(backend: str, widths: tuple[int, ...], d: int) -> Iterator[Entry]:
    """transformers' `QuantizedCache` with the vectors as one head's keys, in bfloat16."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=d, num_attention_heads=1, num_key_value_heads=1
    )

    def encode(options: dict[str, int], x: np.ndarray):
        keys = torch.from_numpy(x).to(torch.bfloat16)[None, None]
        cache = transformers.QuantizedCache(backend, config, **options)
        cache.update(keys, keys[:, :, :1], 0)  # one value: the time is to be that of the keys
        return cache

    def decode(cache) -> np.ndarray:
        one = torch.zeros(1, 1, 1, d, dtype=torch.bfloat16)
        keys, _ = cache.update(one, one, 0)  # hands all of the past back
        return keys[0, 0, :-1].float().numpy()

    def make(options: dict[str, int], seed: int) -> Code:
        held = lambda cache: _tensors(cache.layers[0]._quantized_keys)
        return Code(functools.partial(encode, options), decode, {"": held})

    for bits in widths:
        options = {} if backend == "fp8" else {"nbits": bits}
        note = (
            "one scale for the tensor"
            if backend == "fp8"
            else "default axis 0: groups of 64 channels of a token, scale and zero in bfloat16"
        )
        part = functools.partial(make, options)
        yield Entry(f"QuantizedCache b={bits}", bits, part, note, seeded=False)


@dataclasses.dataclass(frozen=True)
class Peer:
    """`folders`: under --peers; `packages`: whose versions are told; `entries`: of a dimension."""

    folders: tuple[str, ...]
    packages: tuple[str, ...]
    entries: Callable[[int], Iterator[Entry]]


PEERS = {
    "turboquant-py": Peer(("turboquant-py",), ("turboquant-py",), turboquant_py),
    "turboquant": Peer(("turboquant", "torch"), ("turboquant",), turboquant),
    "turbo-quant-lite": Peer(("turbo-quant-lite",), ("turbo-quant-lite",), turbo_quant_lite),
    "faiss-cpu": Peer(("faiss-cpu",), ("faiss-cpu",), faiss_cpu),
    "optimum-quanto": Peer(
        ("optimum-quanto", "torch"),
        ("optimum-quanto", "transformers"),
        functools.partial(quantized_cache, "quanto", (2, 4)),
    ),
    "hqq": Peer(
        ("hqq", "torch"),
        ("hqq", "transformers"),
        functools.partial(quantized_cache, "hqq", (1, 2, 3, 4, 8)),
    ),
    "transformers fp8": Peer(
        ("torch",), ("transformers",), functools.partial(quantized_cache, "fp8", (8,))
    ),
}


def nbytes(arrays: list[Any]) -> int:
    """Bytes of NumPy arrays, torch tensors (their storage, views and all) and bytes."""
    size = lambda a: a.untyped_storage().nbytes() if hasattr(a, "untyped_storage") else a.nbytes
    return sum(len(a) if isinstance(a, bytes) else size(a) for a in arrays)


def _tensors(kept: Any) -> list[Any]:
    """The plain tensors inside tuples, dicts and tensors that are made of tensors."""
    if isinstance(kept, tuple | list):
        return [a for part in kept for a in _tensors(part)]
    if isinstance(kept, dict):
        return _tensors(list(kept.values()))
    if hasattr(kept, "__tensor_flatten__"):
        return _tensors([getattr(kept, name) for name in kept.__tensor_flatten__()[0]])
    return [kept] if hasattr(kept, "untyped_storage") else []


def measure(entry: Entry, x: np.ndarray, seeds: list[int], out: Path) -> dict[str, Any]:
    """Encodes with each seed, and puts what is decoded `[seeds, n, d]` into the file `out`.

    Returns:
      mode, claimed_bits, note, bytes of each form, encode_mvps (median over the seeds).
    """
    decoded, times, size = [], [], {}
    for seed in seeds if entry.seeded else seeds[:1]:
        code = entry.make(seed)
        if not decoded:
            code.encode(x)  # the first call of a library is not its speed
        start = time.perf_counter()
        kept = code.encode(x)
        times.append(time.perf_counter() - start)
        if not decoded:
            size = {name: nbytes(arrays(kept)) for name, arrays in code.forms.items()}
        decoded.append(np.asarray(code.decode(kept), np.float32))
    np.save(out, np.stack(decoded))
    return {
        "mode": entry.mode,
        "claimed_bits": entry.claimed_bits,
        "note": entry.note,
        "bytes": size,
        "encode_mvps": x.size / 1e6 / statistics.median(times),
    }


def main(name: str, job: Path) -> None:
    peer, asked = PEERS[name], json.loads((job / "job.json").read_text())
    own, *shared = asked["folders"]
    sys.path.insert(0, own)
    sys.path.extend(shared)  # last: what is installed here already comes first
    found: list[dict[str, Any]] = []
    for d in asked["dims"]:
        x = np.load(job / f"x{d}.npy")
        for entry in peer.entries(d):
            out = job / f"{len(found)}.npy"
            try:
                row = measure(entry, x, asked["seeds"], out)
            except Exception as error:  # a width that the package refuses is a row that says so
                row = {"mode": entry.mode, "claimed_bits": entry.claimed_bits}
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            found.append({"d": d, "decoded": out.name} | row)
    versions = [f"{package} {importlib.metadata.version(package)}" for package in peer.packages]
    versions[0] = versions[0].split()[-1]
    answer = {"version": ", ".join(versions), "rows": found}
    (job / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
