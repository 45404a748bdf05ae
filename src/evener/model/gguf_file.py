"""A GGUF file: metadata, tensor table, and decoding of a piece of a tensor. No torch.

Format: ggml docs/gguf.md, versions 2 and 3, little endian. The header is parsed here because `gguf.GGUFReader` makes
a numpy array of every string of the vocabulary, which takes seconds; decoding is gguf's.
"""

import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from evener.errors import InvalidInput, UnsupportedModel
from evener.spec.plan import Interval

Floats = npt.NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 20
"""Decoded at a time: bounds the temporaries of a large tensor."""

_SCALAR = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip


_LENGTH = struct.Struct("<Q")


class TensorEntry(NamedTuple):
    """One line of the tensor table."""

    shape: tuple[int, ...]
    """Rows first, as in Hugging Face files (the file itself has the fastest dimension first)."""
    kind: GGMLQuantizationType
    offset: int
    """Of the first byte, from the start of the file."""


class GgufFile:
    """The mapped file. Raises InvalidInput for a damaged file, UnsupportedModel for types that gguf cannot decode."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, mode="r", dtype=np.uint8)
            self.metadata, self.tensors = _Header(self._bytes.data).read()
        except (struct.error, UnicodeDecodeError, ValueError, OSError) as error:
            raise InvalidInput(f"{path} cannot be read as GGUF ({error}); download it again") from error
        for name, entry in self.tensors.items():
            if entry.offset + prod(entry.shape[:-1]) * row_bytes(entry) > self._bytes.size:
                raise InvalidInput(f"{path} ends inside tensor {name}; download it again")
        for kind in {e.kind for e in self.tensors.values()}:
            check_decodable(kind, str(path))

    def rows(self, name: str, index: npt.NDArray[np.int64] | slice, cols: Interval) -> Floats:
        """Rows of a matrix (or elements of a vector) as fp32, [len(index), cols] or [len(index)].

        Reads the rows that `index` names and, within them, the blocks that cover [cols).
        """
        entry = self.tensors[name]
        if len(entry.shape) == 1:
            vector: Floats = self._decode(entry, 1, slice(0, 1), (0, entry.shape[0]))[0]
            return vector[index]
        return self._decode(entry, entry.shape[0], index, cols)

    def _decode(self, entry: TensorEntry, n_rows: int, index: Any, cols: Interval) -> Floats:
        width = row_bytes(entry)
        data = self._bytes[entry.offset : entry.offset + n_rows * width].reshape(-1, width)
        block, block_bytes = GGML_QUANT_SIZES[entry.kind]
        first, last = cols[0] // block, -(-cols[1] // block)
        skip = cols[0] - first * block
        order = np.arange(data.shape[0])[index]
        out = np.empty((len(order), cols[1] - cols[0]), np.float32)
        if out.size == 0:
            return out
        step = max(1, CHUNK_ELEMENTS // ((last - first) * block))
        for at in range(0, len(order), step):
            raw = np.ascontiguousarray(data[order[at : at + step], first * block_bytes : last * block_bytes])
            # Blocks stand alone: one long row spares gguf its loop over groups of rows.
            decoded = dequantize(raw.reshape(1, -1), entry.kind).reshape(raw.shape[0], -1)
            out[at : at + step] = decoded[:, skip : skip + out.shape[1]]
        return out


def row_bytes(entry: TensorEntry) -> int:
    """Bytes of one row (the last dimension)."""
    block, block_bytes = GGML_QUANT_SIZES[entry.kind]
    return entry.shape[-1] // block * block_bytes


def check_decodable(kind: GGMLQuantizationType, where: str) -> None:
    """Raise UnsupportedModel when the installed gguf package has no decoder for a tensor type."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"{where}: tensors of type {kind.name} cannot be decoded; take a file in F32, F16, BF16, Q8_0, Q4_K or "
            "another type that the gguf package dequantises"
        ) from error


class _Header:
    """A cursor over the head of the file."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        if bytes(self.data[:4]) != b"GGUF":
            raise ValueError("it does not start with GGUF")
        self.at = 4
        version = self._one("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, or big endian; versions 2 and 3 in little endian are read")
        n_tensors, n_keys = self._one("Q"), self._one("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string()
            metadata[key] = self._value(GGUFValueType(self._one("I")))
        entries = []
        for _ in range(n_tensors):
            name = self._string()
            shape = tuple(reversed([self._one("Q") for _ in range(self._one("I"))]))
            entries.append((name, shape, GGMLQuantizationType(self._one("I")), self._one("Q")))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        return metadata, {name: TensorEntry(shape, kind, start + offset) for name, shape, kind, offset in entries}

    def _one(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        (length,) = _LENGTH.unpack_from(self.data, self.at)
        start, self.at = self.at + 8, self.at + 8 + length
        if self.at > len(self.data):
            raise ValueError("it ends inside a string")
        return str(self.data[start : self.at], "utf-8")

    def _strings(self, count: int) -> list[str]:
        """The vocabulary and the merges: nearly all of the header, so in one loop."""
        data, at, end, length_at = self.data, self.at, len(self.data), _LENGTH.unpack_from
        strings = []
        for _ in range(count):
            start = at + 8
            at = start + length_at(data, at)[0]
            if at > end:
                raise ValueError("it ends inside a string")
            strings.append(str(data[start:at], "utf-8"))
        self.at = at
        return strings

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            return self._one(_SCALAR[kind])
        kind, count = GGUFValueType(self._one("I")), self._one("Q")
        if count > len(self.data):
            raise ValueError(f"an array of {count} entries is longer than the file")
        if kind in _SCALAR:
            values = list(struct.unpack_from(f"<{count}{_SCALAR[kind]}", self.data, self.at))
            self.at += struct.calcsize(f"<{count}{_SCALAR[kind]}")
            return values
        if kind == GGUFValueType.STRING:
            return self._strings(count)
        return [self._value(kind) for _ in range(count)]
