"""The RotationZoo's files, made by hand from opcodes: read exactly, and hostile ones refused."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from kvjax.calibrate.torch_file import TorchFile
from kvjax.calibrate.zoo import read_zoo
from kvjax.core.errors import InputError

D, L, H = 8, 3, 2
ASKED = {"layers": L, "kv_heads": H, "head_dim": D}


def rotations(*lead: int) -> np.ndarray:
    noise = np.random.default_rng(7000).normal(size=(*lead, D, D))
    return np.linalg.qr(noise)[0].astype(np.float32)


# A pickle as torch.save writes it: protocol 2, tensors by persistent ids of their storages.

KINDS = {"<f8": "DoubleStorage", "<f4": "FloatStorage", "<f2": "HalfStorage"}


class Global(str):
    """Written as the global of that name."""


class Reduce(tuple):
    """(function, arguments), written as the call of it."""


class Stored(tuple):
    """(kind, key, size), written as the persistent id of a storage."""


def opcodes(value) -> bytes:
    if isinstance(value, Global):
        return b"c" + value.replace(" ", "\n").encode() + b"\n"
    if isinstance(value, Reduce):
        return opcodes(value[0]) + opcodes(value[1]) + b"R"
    if isinstance(value, Stored):
        kind, key, size = value
        return opcodes(("storage", Global(f"torch {kind}"), key, "cpu", size)) + b"Q"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little", signed=True)
    if isinstance(value, str):
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"
    if isinstance(value, dict):
        pairs = b"".join(opcodes(part) for item in value.items() for part in item)
        return b"}q\x01(" + pairs + b"u"
    raise TypeError(value)


def tensor(a: np.ndarray, storages: dict[str, bytes], shape=None, strides=None, offset=0) -> Reduce:
    """`a` as a tensor, its numbers added to the storages."""
    key = str(len(storages))
    storages[key] = a.tobytes()
    kind = "BFloat16Storage" if a.dtype == ml_dtypes.bfloat16 else KINDS[a.dtype.str]
    shape = a.shape if shape is None else shape
    strides = tuple(s // a.itemsize for s in a.strides) if strides is None else strides
    hooks = Reduce((Global("collections OrderedDict"), ()))
    arguments = (Stored((kind, key, a.size)), offset, shape, strides, False, hooks)
    return Reduce((Global("torch._utils _rebuild_tensor_v2"), arguments))


def write(path: Path, program: bytes, storages: dict[str, bytes], **options) -> Path:
    with zipfile.ZipFile(path, "w", options.pop("compression", zipfile.ZIP_STORED)) as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/byteorder", options.pop("byteorder", "little"))
        for key, data in storages.items():
            file.writestr(f"archive/data/{key}", data)
        file.writestr("archive/version", "3\n")
    return path


def zoo(path: Path, matrices: np.ndarray, *, make=tensor, ids=None, **changes) -> Path:
    storages: dict[str, bytes] = {}
    version = 1 if matrices.ndim == 3 else 2
    values = np.arange(matrices[0, ..., 0].size, dtype=np.float32).reshape(matrices.shape[1:-1])
    table = {
        (i if ids is None else ids[i]): {
            "layer_id": i,
            "rotation": make(m, storages),
            "eigenvalues": tensor(values + i, storages),
        }
        for i, m in enumerate(matrices)
    }
    root = {
        "format_version": version,
        "objective": "qqt_r_h_pbr",
        "source_grouping": "layer" if version == 1 else "per_kv_head",
        "layers": table,
        **changes,
    }
    return write(path, b"\x80\x02" + opcodes(root) + b".", storages)


@pytest.mark.parametrize("lead", [(L,), (L, H)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_both_versions_exactly(tmp_path, lead, dtype):
    expected = rotations(*lead).astype(dtype)
    got = read_zoo(zoo(tmp_path / "k.pt", expected), **ASKED, tolerance=0.02)
    np.testing.assert_array_equal(got.rotations, expected.astype(np.float64))
    assert got.eigenvalues is not None
    assert got.eigenvalues.shape == (*lead, D)
    assert got.eigenvalues[1].ravel()[:3].tolist() == [1, 2, 3]
    assert (got.version, got.objective) == (len(lead), "qqt_r_h_pbr")
    assert got.grouping == ("layer" if len(lead) == 1 else "per_kv_head")


def test_transforms_are_of_rows(tmp_path):
    matrices = rotations(L, H)
    got = read_zoo(zoo(tmp_path / "k.pt", matrices), **ASKED).transforms()
    x = np.random.default_rng(7001).normal(size=(1, H, 1, 5, D)).astype(np.float32)
    assert len(got) == L
    for made, matrix in zip(got, matrices, strict=True):
        expected = np.einsum("bhntd,hde->bhnte", x, matrix)
        np.testing.assert_allclose(made.forward(x), expected, atol=1e-5)


def test_views_and_names_of_layers(tmp_path):
    """A transposed tensor, inside a larger storage, with layers named by strings."""
    matrices = rotations(L)

    def view(m, storages):
        padded = np.concatenate([np.full(5, np.nan, np.float32), m.T.ravel()])
        return tensor(padded, storages, (D, D), (1, D), 5)

    path = zoo(tmp_path / "k.pt", matrices, make=view, ids=[str(i) for i in range(L)])
    np.testing.assert_array_equal(read_zoo(path, **ASKED).rotations, matrices)


def test_other_sizes_than_asked(tmp_path):
    one, two = zoo(tmp_path / "1.pt", rotations(L)), zoo(tmp_path / "2.pt", rotations(L, H))
    for path in (one, two):
        for change in ({"layers": L + 1}, {"layers": L - 1}):
            with pytest.raises(InputError, match=f"layers 0 to {change['layers'] - 1}"):
                read_zoo(path, **(ASKED | change))
        with pytest.raises(InputError, match=r"shape .*head_dim"):
            read_zoo(path, **(ASKED | {"head_dim": 16}))
    with pytest.raises(InputError, match=r"shape \(2, 8, 8\); expected shape \(3, 8, 8\)"):
        read_zoo(two, **(ASKED | {"kv_heads": 3}))
    assert read_zoo(one, **(ASKED | {"kv_heads": 5})).rotations.shape == (L, D, D)


def test_other_formats(tmp_path):
    path = tmp_path / "k.pt"
    m = rotations(L)
    for change, message in (
        ({"format_version": 3}, "version 3"),
        ({"format_version": True}, "version True"),
        ({"format_version": 2}, "shape"),
        ({"layers": "none"}, "version 1"),
    ):
        with pytest.raises(InputError, match=message):
            read_zoo(zoo(path, m, **change), **ASKED)
    for ids in ([0, 1, 3], [0, 1, "x"], [0, 1, "1"], [0, 1, -1], [1, 0, 2], [0, 1, "٢"]):
        with pytest.raises(InputError, match="layer"):
            read_zoo(zoo(path, m, ids=ids), **ASKED)
    storages: dict[str, bytes] = {}
    bare = b"\x80\x02" + opcodes(tensor(rotations(L), storages)) + b"."
    with pytest.raises(InputError, match="may be layers or heads"):
        read_zoo(write(path, bare, storages), **ASKED)


def test_only_rotations(tmp_path):
    for bad in (2.0, np.nan):
        m = rotations(L)
        m[1] *= bad
        with pytest.raises(InputError, match=r"layer 1: .*identity"):
            read_zoo(zoo(tmp_path / "k.pt", m), **ASKED)


class Hostile:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


NEST = b"".join(
    b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60)
)
PROGRAMS = {
    "system": pickle.dumps(Hostile(os.system, ("touch executed",)), 2),
    "eval": pickle.dumps({"layers": Hostile(eval, ("open('executed', 'w')",))}, 2),
    "protocol 4": pickle.dumps(Hostile(os.system, ("touch executed",)), 4),
    "import": opcodes(Global("torch.serialization load")) + b".",
    "attribute": opcodes(Global("torch._utils __builtins__.eval")) + b".",
    "instance": b"(X\x01\x00\x00\x00aios\nsystem\n.",
    "build": opcodes(Global("torch._utils _rebuild_tensor_v2")) + b"}b.",
    "new": opcodes(Global("collections OrderedDict")) + b")\x81.",
    "extension": b"\x82\x01.",
    "call a storage": opcodes(Reduce((Global("torch FloatStorage"), (3,)))) + b".",
    "fill a dict": opcodes(Reduce((Global("collections OrderedDict"), ((1, 2),)))) + b".",
    "storage of what": opcodes(Stored(("x", "0", 3))).replace(
        b"torch\nx", b"collections\nOrderedDict"
    )
    + b".",
    "nested key": b")q\x00" + NEST + b"}h\x3cNs.",
    "nested version": b")q\x00" + NEST + b"}" + opcodes("format_version") + b"h\x3cs.",
    "empty stack": b"R.",
    "no mark": b"t.",
    "no end": opcodes({"a": 1}),
    "nothing": b"",
    "unknown opcode": b"\xff.",
    "memo": b"h\x07.",
    "long": b"\x8b\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_programs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "k.pt", PROGRAMS[name], {})
    with pytest.raises(InputError, match=r"file .*k\.pt: got"):
        read_zoo(path, **ASKED)
    assert not (tmp_path / "executed").exists()


def test_the_refused_name_is_told(tmp_path):
    path = write(tmp_path / "k.pt", PROGRAMS["system"], {})
    with pytest.raises(InputError, match=r"global posix\.system; expected one of torch\._utils"):
        read_zoo(path, **ASKED)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((D, D), (D, 1), 1),
        ((D, D), (D + 1, 1), 0),
        ((D, D), (D, -1), 0),
        ((D, D), (D, 1), -1),
        ((D, D), (D,), 0),
        ((0, D), (D, 1), 0),
        ((2**20, 2**11), (0, 0), 0),  # a stride of 0: gigabytes out of nothing
        ((2**30, 2**30), (2**30, 1), 0),
        ((D, "8"), (D, 1), 0),
        (D, D, 0),
    ],
)
def test_tensors_beyond_their_storage(tmp_path, shape, strides, offset):
    make = lambda m, storages: tensor(m, storages, shape, strides, offset)
    with pytest.raises(InputError, match=r"data\.pkl with"):
        read_zoo(zoo(tmp_path / "k.pt", rotations(L), make=make), **ASKED)


def test_storages_of_another_size(tmp_path):
    for change in (lambda data: data[:-1], lambda data: data + b"\0"):

        def make(m, storages, change=change):
            made = tensor(m, storages)
            storages[str(len(storages) - 1)] = change(m.tobytes())
            return made

        with pytest.raises(InputError, match="bytes"):
            read_zoo(zoo(tmp_path / "k.pt", rotations(L), make=make), **ASKED)


def test_archives(tmp_path):
    path = tmp_path / "k.pt"
    bomb = {"compression": zipfile.ZIP_DEFLATED}
    with pytest.raises(InputError, match="compressed"):
        read_zoo(write(path, bytes(2**24), {}, **bomb), **ASKED)
    with pytest.raises(InputError, match="at most"):
        read_zoo(write(path, bytes(2**24), {}), **ASKED)
    with pytest.raises(InputError, match="at most"):
        TorchFile(write(path, bytes(2**21), {}), largest=2**24)
    with pytest.raises(InputError, match="big-endian"):
        read_zoo(write(path, b".", {}, byteorder="big"), **ASKED)
    with pytest.raises(InputError, match="no such file"):
        read_zoo(tmp_path / "none.pt", **ASKED)
    with pytest.raises(InputError, match="no such file"):
        read_zoo(tmp_path, **ASKED)
    path.write_bytes(pickle.dumps({"format_version": 1}, 2))  # as torch before 1.6
    with pytest.raises(InputError, match=r"torch 1\.6"):
        read_zoo(path, **ASKED)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b".")
        file.writestr("b/data.pkl", b".")
    with pytest.raises(InputError, match="names twice"):
        read_zoo(path, **ASKED)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/version", b"3")
    with pytest.raises(InputError, match=r"no data\.pkl"):
        read_zoo(path, **ASKED)


def test_truncated_files(tmp_path):
    whole = zoo(tmp_path / "whole.pt", rotations(L)).read_bytes()
    path = tmp_path / "k.pt"
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_zoo(path, **ASKED)


def test_damaged_bytes(tmp_path):
    """Whatever is changed, in the program or around it: an `InputError`, or the same numbers."""
    matrices = rotations(L)
    whole = zoo(tmp_path / "whole.pt", matrices).read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        program = file.read("archive/data.pkl")
        storages = {str(i): file.read(f"archive/data/{i}") for i in range(2 * L)}
    rng, path = np.random.default_rng(7002), tmp_path / "k.pt"
    refused = 0
    for case in range(300):
        data = bytearray(program if case % 2 else whole)
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] = rng.integers(256)
        write(path, bytes(data), storages) if case % 2 else path.write_bytes(bytes(data))
        try:
            got = read_zoo(path, **ASKED).rotations
        except InputError:
            refused += 1
        else:
            np.testing.assert_array_equal(np.sort(got.ravel()), np.sort(matrices.ravel()))
    assert refused > 150


def test_files_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    matrices = rotations(L, H)
    table = {i: {"rotation": torch.tensor(m), "layer_id": i} for i, m in enumerate(matrices)}
    torch.save({"format_version": 2, "layers": table}, tmp_path / "k.pt")
    got = read_zoo(tmp_path / "k.pt", **ASKED)
    np.testing.assert_array_equal(got.rotations, matrices)
    assert got.eigenvalues is None
