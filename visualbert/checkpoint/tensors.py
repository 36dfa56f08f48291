"""A `Tensors` is anything that holds named arrays in the canonical layout and can list them unread.

Weight files, a model in memory, freshly drawn values and a BERT being turned into a VisualBERT are
all `Tensors`; loading, saving and converting only ever see this protocol.
"""

import math
import mmap
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from visualbert.errors import CheckpointError, UsageError

# Floating types that a weight file may hold, by the names used in options and in config.json.
DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# What a model can be loaded in: a floating type, or with linear layers in int8.
LOADED = (*DTYPES, "int8")

# Every type that a weight file may hold, under the name that torch, numpy and ml_dtypes share.
STORED: dict[str, np.dtype] = {
    **DTYPES,
    **{name: np.dtype(name) for name in ("int64", "int32", "int16", "int8", "bool")},
    **{name: np.dtype(name) for name in ("uint64", "uint32", "uint16", "uint8")},
    **{name: np.dtype(name) for name in ("complex64", "complex128")},
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_MOST_AXES = 32
_CACHE_LINE = 64  # bytes


class Spec(NamedTuple):
    """Shape and numpy dtype name of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: str


class Tensors(Protocol):
    """Named arrays: `specs` lists them, `read` gives one."""

    @property
    def label(self) -> str:
        """What messages call it."""
        ...

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every tensor's shape and type by name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The array called `name`; writable, and owned by the caller."""
        ...


def check_spec(
    path: Path, name: str, shape: Sequence[int], dtype: str, others: Mapping[str, Spec]
) -> Spec:
    """The spec of a tensor that a file claims to hold, unless no model's checkpoint could.

    Raises:
        CheckpointError: its name, type or shape is none, or `others` hold the name already.
    """
    if not name.isprintable() or len(name) > 500:
        raise CheckpointError(f"{path}: {name[:40]!r} is not a tensor's name")
    if name in others:
        raise CheckpointError(f"{path}: {name} is in another shard already")
    if dtype not in STORED:
        raise CheckpointError(
            f"{path}: {name} has the type {dtype}, which is not one of {', '.join(STORED)}; "
            "convert it first"
        )
    if len(shape) > _MOST_AXES or math.prod(max(size, 1) for size in shape) >= 2**59:
        raise CheckpointError(f"{path}: {name} has the impossible shape {reprlib.repr(shape)}")
    return Spec(tuple(shape), dtype)


def map_array(
    path: Path, name: str, start: int, spec: Spec, file: BinaryIO | None = None
) -> np.ndarray:
    """The array whose bytes start at `start` of a file, mapped copy-on-write.

    Args:
        path: what the file is called.
        name: what the array is called.
        start: its first byte.
        spec: its shape and type.
        file: the opened file; opened anew where there is none.

    Raises:
        CheckpointError: the file is not what it was when it was looked at.
    """
    dtype = STORED[spec.dtype]
    if 0 in spec.shape:
        return np.zeros(spec.shape, dtype)
    try:
        array = np.memmap(file or path, dtype, "c", start, spec.shape).view(np.ndarray)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {name} cannot be read any more ({error}); the file has changed since it was "
            "opened"
        ) from None
    return array if array.flags.aligned else array.copy()


@dataclass
class ArrayTensors:
    """`Tensors` over arrays that are in memory already."""

    label: str
    arrays: Mapping[str, np.ndarray]

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: Spec(a.shape, a.dtype.name) for name, a in self.arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return np.array(self.arrays[name])


class Selected:
    """Some of the tensors of another."""

    def __init__(self, tensors: Tensors, names: Iterable[str]) -> None:
        self.label = tensors.label
        self.specs = {name: tensors.specs[name] for name in names}
        self.read = tensors.read
        self.recorded = getattr(tensors, "recorded", lambda name: None)


def dtype_name(dtype: object) -> str:
    """The name in `LOADED` of a numpy, torch, JAX or TensorFlow dtype, or of a name itself.

    Raises:
        UsageError: it is not a type that a model can be loaded in.
    """
    # DType.name (TensorFlow), dtype.__name__ (jnp.float32, np.float32), str(torch.float32).
    name = str(getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or dtype)
    name = name.removeprefix("torch.")
    if name not in LOADED:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(LOADED)}")
    return name


def common_dtype(tensors: Tensors) -> str:
    """The widest floating type among `tensors`.

    Raises:
        CheckpointError: there is none.
    """
    found = {spec.dtype for spec in tensors.specs.values()} & set(DTYPES)
    if not found:
        raise CheckpointError(f"{tensors.label!r} holds no floating-point tensors")
    if found == {"float16", "bfloat16"}:
        return "float32"
    return max(found, key=lambda name: DTYPES[name].itemsize)


def total_bytes(tensors: Tensors) -> int:
    """What the arrays of `tensors` take, without their names."""
    return sum(
        math.prod(spec.shape) * STORED[spec.dtype].itemsize for spec in tensors.specs.values()
    )


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` as `dtype`, itself if it is already."""
    return array if array.dtype == DTYPES[dtype] else array.astype(DTYPES[dtype])


def transpose(array: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
    """The transpose of a matrix in memory of its own, or in `into`, whose type may differ.

    It goes by strips of rows, each of which fills whole cache lines; numpy, which goes column by
    column, takes twice as long.
    """
    if into is None:
        into = np.empty(array.shape[::-1], array.dtype)
    if not array.size:
        return into
    rows = max(1, _CACHE_LINE // into.itemsize)
    for at in range(0, len(array), rows):
        into[:, at : at + rows] = array[at : at + rows].T
    return into


class Memory:
    """One block of memory from which arrays are cut.

    It is mapped, not numpy's: numpy asks for huge pages, and a system whose memory is in pieces
    spends longer on finding them than they save.
    """

    def __init__(self, size: int) -> None:
        self._block = np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)
        self._end = 0

    @staticmethod
    def room(shape: Sequence[int]) -> int:
        """What an array of `shape` takes at most, in bytes."""
        return math.prod(shape) * np.dtype(np.float64).itemsize + _CACHE_LINE

    def take(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """An array without values that starts at a multiple of 64 bytes."""
        start = self._end + -(self._block.ctypes.data + self._end) % _CACHE_LINE
        self._end = start + math.prod(shape) * dtype.itemsize
        return self._block[start : self._end].view(dtype).reshape(shape)
