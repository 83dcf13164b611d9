"""Arrays in the files of `torch.save`, read without torch and without executing anything.

Such a file is a zip: `data.pkl`, a pickle program that builds the objects, and one entry of raw
numbers per storage. A pickle may name any function and call it. Here the program is interpreted
over the few opcodes that plain containers and tensors need, and the only calls are to make a tensor
or an empty `OrderedDict`: no name is ever looked up.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kvjax.core.errors import InputError, known

_LARGEST_PROGRAM = 2**20  # bytes; those of the released rotations have some ten thousand
_REBUILD, _DICT = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
_STORAGES: dict[str, np.dtype] = {
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
_PUSHED = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()

# What zipfile raises at files that are not as they should be.
_DAMAGE = (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that has not been read yet: strides and offset count elements of the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Storage:
    """Raw numbers, the entry `data/<key>` of the file."""

    dtype: np.dtype
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class _Name:
    """What a pickle calls a global: allowed names only, and no more than the name."""

    name: str


class TorchFile:
    """The objects of a `.pt` file, with `Tensor` where it has tensors.

    Args:
      path: the file.
      largest: bytes that it may have at most. Nothing in it may be compressed, so this bounds all
        that is read.
    Attributes:
      root: dicts, lists, tuples, numbers, strings and `Tensor`.
    Raises:
      InputError: no such file, one that is no uncompressed zip of torch 1.6 or later, too large,
        damaged, or whose program does more than build containers of tensors.
    """

    def __init__(self, path: str | os.PathLike, *, largest: int):
        self.path = Path(path)
        size = self.path.stat().st_size if self.path.is_file() else -1
        if not 0 <= size <= largest:
            got = f"{size} bytes" if size >= 0 else "no such file"
            raise self.bad(got, f"a file of at most {largest} bytes")
        self._entries = self._list()
        if "byteorder" in self._entries and self._bytes("byteorder", 16).strip() != b"little":
            raise self.bad("big-endian numbers", "little-endian ones")
        self.root = _Program(self).run(self._bytes("data.pkl", _LARGEST_PROGRAM))

    def array(self, tensor: Tensor) -> np.ndarray:
        """The numbers of a tensor, copied, in their own dtype.

        Raises:
          InputError: bytes that are missing, superfluous or damaged.
        """
        storage = tensor.storage
        length = storage.size * storage.dtype.itemsize
        data = self._bytes(f"data/{storage.key}", length)
        if len(data) != length:
            raise self.bad(f"{len(data)} bytes in storage {storage.key}", f"{length}")
        flat = np.frombuffer(data, storage.dtype)[tensor.offset :]
        strides = tuple(s * storage.dtype.itemsize for s in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides).copy()

    def bad(self, got: str, expected: str, fix: str = "fetch or make the file again") -> InputError:
        """The error that this file is not as it should be."""
        return InputError(f"file {self.path}", got=got, expected=expected, fix=fix)

    def _list(self) -> dict[str, zipfile.ZipInfo]:
        """Entries by their name inside the one folder that torch makes."""
        try:
            with zipfile.ZipFile(self.path) as file:
                infos = file.infolist()
        except _DAMAGE as error:
            raise self.bad(f"no whole zip ({error})", "a zip of torch 1.6 or later") from error
        entries = {info.filename.partition("/")[2]: info for info in infos}
        plain = all(info.compress_type == zipfile.ZIP_STORED for info in infos)
        if len(entries) != len(infos) or not plain:
            got = "names twice" if plain else "compressed entries"
            raise self.bad(got, "entries of different names, as they are stored by torch")
        return entries

    def _bytes(self, name: str, most: int) -> bytes:
        info = self._entries.get(name)
        if info is None or info.file_size > most:
            got = f"no {name}" if info is None else f"{name} of {info.file_size} bytes"
            raise self.bad(got, f"{name} of at most {most} bytes")
        try:
            with zipfile.ZipFile(self.path) as file:
                return file.read(info)
        except _DAMAGE as error:
            raise self.bad(f"{name} damaged ({error})", "a whole file") from error


class _Program:
    """Interpreter of the pickle opcodes that `torch.save` writes for containers of tensors."""

    def __init__(self, file: TorchFile):
        self.file = file
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._step(opcode.name, argument)
        except InputError:
            raise
        except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            raise self._bad(f"{type(error).__name__}: {error}") from error
        raise self._bad("no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in _TUPLES:
            stack.append(tuple(self._popped(_TUPLES[name])))
        elif name in ("SETITEM", "SETITEMS"):
            self._set(self._popped(2) if name == "SETITEM" else self._marked())
        elif name in ("APPEND", "APPENDS"):
            items = self._popped(1) if name == "APPEND" else self._marked()
            self._top(list).extend(items)
        elif name == "GLOBAL":
            stack.append(self._allowed(argument))
        elif name == "BINPERSID":
            stack.append(self._storage(*stack.pop()))
        elif name == "REDUCE":
            function, arguments = self._popped(2)
            stack.append(self._call(function, arguments))
        elif name != "PROTO":
            raise self._bad(f"opcode {name}")

    def _popped(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise self._bad("an empty stack")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def _marked(self) -> list[Any]:
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not _MARK:
            at -= 1
        if at < 0:
            raise self._bad("no mark")
        return self._popped(len(self.stack) - at)[1:]

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise self._bad(f"no {kind.__name__} where one is filled")
        return self.stack[-1]

    def _set(self, items: list[Any]) -> None:
        into = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (int, str):  # hashing nested tuples can take for ever
                raise self._bad(f"a {type(key).__name__} as a key")
            into[key] = value

    def _allowed(self, name: str) -> _Name:
        if name not in (_REBUILD, _DICT, *_STORAGES):
            names = known(n.replace(" ", ".") for n in (_REBUILD, _DICT, *_STORAGES))
            got = f"global {name.replace(' ', '.')[:80]}"
            raise self.file.bad(got, names, "do not trust this file: it is no table of tensors")
        return _Name(name)

    def _storage(self, kind: str, name: _Name, key: str, place: str, size: int) -> Storage:
        if kind != "storage" or type(key) is not str or type(size) is not int or size < 0:
            raise self._bad("another persistent id than a storage's")
        return Storage(_STORAGES[name.name], key, size)

    def _call(self, function: Any, arguments: Any) -> Any:
        if function == _Name(_DICT) and arguments == ():
            return {}
        if function != _Name(_REBUILD):
            raise self._bad("a call of something else than a tensor")
        storage, offset, shape, strides, *_ = arguments
        numbers = (offset, *shape, *strides)
        whole = type(storage) is Storage and all(type(n) is int and n >= 0 for n in numbers)
        if not whole or len(shape) != len(strides) or len(shape) > 4:
            raise self._bad("a tensor without a storage, shape or strides")
        end = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        # A stride of 0 would make any size of a few numbers.
        if min(shape, default=1) < 1 or end > storage.size or math.prod(shape) > storage.size:
            raise self._bad(f"a tensor {shape} beyond its storage of {storage.size}")
        return Tensor(storage, offset, tuple(shape), tuple(strides))

    def _bad(self, got: str) -> InputError:
        return self.file.bad(f"data.pkl with {got[:120]}", "a pickle that torch.save wrote")
