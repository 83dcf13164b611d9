"""GGUF files: a bounds-checked header, and tensors read on demand.

The header is parsed here and not by `gguf.GGUFReader`, which makes one memory-mapped array per
token of the vocabulary (20 s for Gemma's 262,144) and fails on damaged files with whatever error
comes first. Types, block sizes and dequantization are the `gguf` package's.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from kvjax.core.errors import InputError
from kvjax.models.config import ModelConfig

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_VALUES_AT_ONCE = 1 << 18  # values dequantized at a time: bounds the temporaries

_TOP = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
_LAYER = {
    "attn_norm": "attn_norm.weight",
    "wq": "attn_q.weight",
    "wk": "attn_k.weight",
    "wv": "attn_v.weight",
    "wo": "attn_output.weight",
    "bq": "attn_q.bias",
    "bk": "attn_k.bias",
    "bv": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "w_gate": "ffn_gate.weight",
    "w_up": "ffn_up.weight",
    "w_down": "ffn_down.weight",
    "post_attn_norm": "post_attention_norm.weight",
    "post_mlp_norm": "post_ffw_norm.weight",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: shape in numpy order (rows first), quantization, bytes in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


class _Cursor:
    """Reads little-endian values off a buffer and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise damaged(
                self.path,
                f"a header that ends at byte {len(self.data):,} where more is announced",
                "a complete header",
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            return self._array()
        return self.number(self._code(kind))

    def _array(self) -> Any:
        kind, count = self.number("I"), self.number("Q")
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        code = self._code(kind)
        return np.frombuffer(self.take(count * struct.calcsize(f"<{code}")), f"<{code}")

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise damaged(self.path, f"a metadata value of type {kind}", "a type from 0 to 12")
        return _SCALARS[GGUFValueType(kind)]


def damaged(path: Path, got: str, expected: str) -> InputError:
    """The error for a weight file that is not what it says it is."""
    return InputError(str(path), got=got, expected=expected, fix="fetch or convert the file again")


class GGUFFile:
    """One GGUF file, open for reading; a weight source for `kvjax.models.load`.

    Attributes:
      fields: metadata by key; arrays of numbers are numpy arrays, arrays of strings lists.
      tensors: `TensorInfo` by tensor name.

    Raises:
      InputError: when the file is absent, cut off, damaged, or holds a type that is not known.
    """

    norm_offset = False  # Gemma's +1 is already in the file

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(
                str(path), got="no such file", expected="a .gguf file", fix="check the path"
            )
        with self.path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise damaged(self.path, f"a file that starts with {magic!r}", "b'GGUF'")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(self.path, self._data)
        cursor.at = 4
        version, tensor_count, field_count = (cursor.number(code) for code in "IQQ")
        if version not in (2, 3):
            raise damaged(self.path, f"GGUF version {version}", "version 2 or 3, little-endian")
        self.fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = cursor.text()
            self.fields[key] = cursor.value(cursor.number("I"))
        infos = [self._read_info(cursor) for _ in range(tensor_count)]
        align = self.fields.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise damaged(self.path, f"alignment {align}", "a positive number")
        start = -(-cursor.at // align) * align
        self.tensors = {name: self._place(name, info, start) for name, info in infos}

    def _read_info(self, cursor: _Cursor) -> tuple[str, TensorInfo]:
        name, dims = cursor.text(), cursor.number("I")
        if dims > 4:
            raise damaged(self.path, f"{dims} dimensions for tensor {name[:80]!r}", "4 at most")
        shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
        raw, offset = cursor.number("I"), cursor.number("Q")
        if raw not in set(GGMLQuantizationType):
            raise damaged(
                self.path, f"type {raw} for tensor {name[:80]!r}", "a type that gguf knows"
            )
        return name, TensorInfo(shape, GGMLQuantizationType(raw), offset, 0)

    def _place(self, name: str, info: TensorInfo, start: int) -> TensorInfo:
        """`info` with its place in the file, checked against the end of the file."""
        block, block_bytes = GGML_QUANT_SIZES[info.kind]
        if info.shape and info.shape[-1] % block:
            raise damaged(
                self.path, f"rows of {info.shape[-1]} in {name}", f"a multiple of {block}"
            )
        size = prod(info.shape) // block * block_bytes
        end = start + info.offset + size
        if end > len(self._data):
            raise damaged(
                self.path,
                f"a file of {len(self._data):,} bytes",
                f"at least {end:,}, where tensor {name} ends",
            )
        return TensorInfo(info.shape, info.kind, start + info.offset, size)

    def names(self) -> set[str]:
        return set(self.tensors) - {"rope_freqs.weight"}

    def name_of(self, leaf: str, layer: int | None = None) -> str:
        return _TOP[leaf] if layer is None else f"blk.{layer}.{_LAYER[leaf]}"

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32, rows first ([out, in] for matrices)."""
        info = self.tensors[name]
        flat = np.frombuffer(self._data, np.uint8, info.size, info.offset)
        rows = max(prod(info.shape[:-1]), 1)
        flat = flat.reshape(rows, -1)
        out = np.empty((rows, info.shape[-1]), np.float32)
        step = max(_VALUES_AT_ONCE // info.shape[-1], 1)
        try:
            for i in range(0, rows, step):
                out[i : i + step] = dequantize(flat[i : i + step], info.kind)
        except NotImplementedError as error:
            raise InputError(
                f"tensor {name} of {self.path}",
                got=f"quantization {info.kind.name}",
                expected="one that the gguf package can read",
                fix="use a file with another quantization, such as Q8_0 or Q4_K_M",
            ) from error
        return out.reshape(info.shape)

    def leaf(self, config: ModelConfig, leaf: str, name: str) -> np.ndarray:
        """The tensor as the decoder's leaf wants it, matrices still [out, in]."""
        weight = self.read(name)
        if config.arch == "llama" and leaf in ("wq", "wk"):
            return _undo_interleave(weight, config.head_dim)
        return weight


def _undo_interleave(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp stores Llama's q and k rows so that RoPE turns neighbours; ours turns halves."""
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[-1])  # [heads, d/2, 2, in]
    return pairs.swapaxes(1, 2).reshape(weight.shape)
