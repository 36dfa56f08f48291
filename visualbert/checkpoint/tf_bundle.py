"""TensorFlow's checkpoints (`NAME.index` and `NAME.data-…`) as `Tensors`, without TensorFlow.

The index is a sorted table of protocol buffers that say which bytes of which data file a tensor is;
its checksums are compared, the arrays are mapped, not read. Strings and counters, which no model
needs, are left out. Sources: tensorflow/core/util/tensor_bundle, tensorflow/core/lib/io/table.
"""

import functools
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from visualbert.checkpoint.mapped import MOST_ENTRIES, broken, open_file
from visualbert.checkpoint.tensors import STORED, Spec, check_spec, map_array
from visualbert.errors import CheckpointError

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_TRAILER = 5  # behind a block: how it is compressed, and its checksum
_MOST_BYTES = 1 << 24
_MOST_SHARDS = 10_000
_LITTLE = 0
_TYPES = {
    1: "float32",
    2: "float64",
    3: "int32",
    4: "uint8",
    5: "int16",
    6: "int8",
    8: "complex64",
    9: "int64",
    10: "bool",
    14: "bfloat16",
    17: "uint16",
    18: "complex128",
    19: "float16",
    22: "uint32",
    23: "uint64",
    24: "float8_e5m2",
    25: "float8_e4m3fn",
}
_STRING = 7


class BundleFiles:
    """`Tensors` over a TensorFlow checkpoint; `prefix` is its name without `.index`."""

    format = "TensorFlow checkpoint"

    def __init__(self, label: str, prefix: Path) -> None:
        self.label = label
        self._index = prefix.with_name(prefix.name + ".index")
        self.specs: dict[str, Spec] = {}
        self._places: dict[str, tuple[int, int]] = {}  # shard, offset
        try:
            entries = _entries(_read(self._index))
            if "" not in entries:
                raise ValueError("it has no header")
            shards, order = _numbers(entries.pop(""), 1, 2)
            if order != _LITTLE:
                raise ValueError("it was written on a big-endian machine")
            if not 1 <= shards <= _MOST_SHARDS:
                raise ValueError(f"it claims {shards} data files")
            self._files = self._open(prefix, shards)
            for name, value in entries.items():
                if not name.startswith("\0"):  # a slice, of which the variable's own entry tells
                    self._add(name, value)
        except CheckpointError:
            raise
        except (OSError, ValueError, IndexError, struct.error) as error:
            raise broken(self._index, "TensorFlow checkpoint", error) from None

    def _open(self, prefix: Path, shards: int) -> list[BinaryIO]:
        ends = [f".data-{i:05}-of-{shards:05}" for i in range(shards)]
        self.paths = [self._index, *(prefix.with_name(prefix.name + end) for end in ends)]
        return [open_file(path) for path in self.paths[1:]]

    def _add(self, name: str, value: bytes) -> None:
        kind, shard, offset, size = _numbers(value, 1, 3, 4, 5)
        if kind == _STRING:  # the object graph, or the path that it was saved to
            return
        if _messages(value, 7):
            raise CheckpointError(
                f"{self._index}: {name[:200]!r} is saved in slices; save the variable whole"
            )
        dims = [_numbers(dim, 1)[0] for s in _messages(value, 2) for dim in _messages(s, 2)]
        dtype = _TYPES.get(kind, f"number {kind}")
        spec = check_spec(self._index, name, dims, dtype, self.specs)
        if size != math.prod(dims) * STORED[dtype].itemsize:
            raise ValueError(f"{name[:80]} has {size} bytes for the shape {tuple(dims)}")
        if shard >= len(self._files):
            raise ValueError(f"{name[:80]} is in data file {shard} of {len(self._files)}")
        if offset + size > os.fstat(self._files[shard].fileno()).st_size:
            raise CheckpointError(
                f"{self.paths[1 + shard]}: {name[:200]} reaches beyond the end of the file"
            )
        self.specs[name] = spec
        self._places[name] = shard, offset

    def read(self, name: str) -> np.ndarray:
        shard, offset = self._places[name]
        path, file = self.paths[1 + shard], self._files[shard]
        return map_array(path, name, offset, self.specs[name], file)


def _read(path: Path) -> bytes:
    with open_file(path) as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"its index is longer than {_MOST_BYTES >> 20} MiB")
    return data


def _entries(data: bytes) -> dict[str, bytes]:
    """Every key and value of a sorted table."""
    found: dict[str, bytes] = {}
    last = None
    for key, value in _pairs(data):
        if last is not None and key <= last:
            raise ValueError("its keys are out of order")
        if len(found) >= MOST_ENTRIES:
            raise ValueError("it holds more than any model has")
        found[key.decode(errors="backslashreplace")] = value  # of a slice, it is no text
        last = key
    return found


def _pairs(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(data) < _FOOTER or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise ValueError("it does not end as an index does")
    at = len(data) - _FOOTER
    for _ in range(2):  # the index of what it says about itself
        _, at = _varint(data, at)
    start, at = _varint(data, at)
    size, _ = _varint(data, at)
    end = 0
    for _, handle in _block(data, start, size):
        start, at = _varint(handle, 0)
        size, _ = _varint(handle, at)
        if start < end:
            raise ValueError("its blocks overlap")
        end = start + size
        yield from _block(data, start, size)


def _block(data: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block; a key repeats the start of the one before it."""
    end = start + size
    if end + _TRAILER > len(data) - _FOOTER or size < 4:
        raise ValueError("a block reaches beyond its end")
    if data[end]:
        raise ValueError("it is compressed, which TensorFlow never does")
    (recorded,) = struct.unpack("<I", data[end + 1 : end + _TRAILER])
    if _masked_crc32c(data[start : end + 1]) != recorded:
        raise ValueError("a checksum does not match: it has changed since it was written")
    (restarts,) = struct.unpack("<I", data[end - 4 : end])
    end -= 4 + 4 * restarts
    if end < start:
        raise ValueError("a block reaches beyond its end")
    at, key = start, b""
    while at < end:
        shared, at = _varint(data, at)
        own, at = _varint(data, at)
        length, at = _varint(data, at)
        if shared > len(key) or own > 1000 or at + own + length > end:
            raise ValueError("an entry reaches beyond its block")
        key = key[:shared] + data[at : at + own]
        yield key, data[at + own : at + own + length]
        at += own + length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a protocol buffer."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        value: Any
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = data[at : at + size], at + size
        elif wire == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"a field of the unknown kind {wire}")
        if at > len(data):
            raise ValueError("a field reaches beyond its end")
        yield tag >> 3, value


def _messages(data: bytes, number: int) -> list[bytes]:
    """What stands in every field of this number."""
    found = [value for field, value in _fields(data) if field == number]
    if not all(isinstance(value, bytes) for value in found):
        raise ValueError("a number stands where a message should")
    return found


def _numbers(data: bytes, *wanted: int) -> list[int]:
    """The whole numbers in these fields, 0 where there is none."""
    found = dict(_fields(data))
    values = [found.get(number, 0) for number in wanted]
    if not all(isinstance(value, int) and value < 1 << 62 for value in values):
        raise ValueError("a field is no number from 0 up")
    return values


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


def _masked_crc32c(data: bytes) -> int:
    """The checksum that TensorFlow records: CRC-32C, rotated and shifted."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
