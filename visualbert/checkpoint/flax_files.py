"""Flax's files as canonical `Tensors`, and back: msgpack (`flax.serialization`) and Orbax folders.

Both name a parameter by the path to it and spell its leaf in Flax's way; the table of
`visualbert.schema` says which one is meant. msgpack needs no Flax and its arrays are mapped; Orbax
needs tensorstore, which reads one array at a time (`orbax_write` writes it). Sources:
flax/serialization.py, orbax.checkpoint.
"""

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from visualbert.checkpoint.mapped import MOST_ENTRIES, MappedFile, Place, broken, leaves_of, need
from visualbert.checkpoint.tensors import STORED, Spec, Tensors, check_spec, transpose
from visualbert.config import read_json_object
from visualbert.errors import CheckpointError, ConfigError
from visualbert.schema import Kind, Param

ORBAX = "orbax"
_INDEX = "_METADATA"
MSGPACK = "flax_model.msgpack"
_LEAST_PACKED = 50  # weights never shrink this much
_FREE = 1 << 24
_LEAVES = {
    Kind.EMBEDDING: "embedding",
    Kind.LINEAR: "kernel",
    Kind.BIAS: "bias",
    Kind.SCALE: "scale",
    Kind.SHIFT: "bias",
}


def _from_flax(path: Path, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Of every parameter among `names`: its canonical name, and whether it lies transposed.

    A dropout's random state is none; nor does a wrapping of NNX's (`.value`) or of Linen's
    (`params.`) belong to a name.
    """
    names = [name for name in names if "rngs" not in name.split(".")]
    start = "params." if all(name.startswith("params.") for name in names) else ""
    found = {}
    for name in names:
        module, _, leaf = name.removeprefix(start).removesuffix(".value").rpartition(".")
        for canonical, kind in leaves_of(module).items():
            if _LEAVES[kind] == leaf:
                found[name] = f"{module}.{canonical}", kind is Kind.LINEAR
        if name not in found:
            raise CheckpointError(f"{path}: {name[:200]!r} is no parameter of a VisualBERT")
    return found


def _to_flax(param: Param) -> str:
    return f"{param.name.rpartition('.')[0]}.{_LEAVES[param.kind]}"


class MsgpackFile(MappedFile):
    """`Tensors` over `flax.serialization`'s msgpack, as the Hub's `flax_model.msgpack`."""

    format = "Flax msgpack"

    def __init__(self, label: str, path: Path) -> None:
        super().__init__(label, path)
        try:
            data = np.memmap(self._file, np.uint8, "r").view(np.ndarray).data
            found = _MsgpackIndex(data).read()
        except (ValueError, IndexError, struct.error, OSError) as error:
            raise broken(path, "msgpack file", error) from None
        for name, (canonical, transposed) in _from_flax(path, found).items():
            self._add(canonical, found[name], transposed)


class _MsgpackIndex:
    """The arrays in nested maps of a msgpack buffer: their names and places, nothing read."""

    _ARRAY = 1  # Flax's extension type

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def read(self) -> dict[str, Place]:
        found: dict[str, Place] = {}
        steps = 0
        open_maps: list[list[Any]] = [["", self._map()]]  # name and entries still to come
        while open_maps:
            name, left = open_maps[-1]
            if not left:
                open_maps.pop()
                continue
            open_maps[-1][1] = left - 1
            steps += 1
            if steps > MOST_ENTRIES or len(open_maps) > 64:
                raise ValueError("it holds more than any model has")
            key = f"{name}.{self._text()}" if name else self._text()
            if len(key) > 500:
                raise ValueError("a name is longer than 500 letters")
            if self._peek() >> 4 == 0x8 or self._peek() in (0xDE, 0xDF):
                open_maps.append([key, self._map()])
            else:
                if key in found:
                    raise ValueError(f"{key[:80]!r} occurs twice")
                found[key] = self._array(key)
        if self._at != len(self._data):
            raise ValueError("something follows its end")
        return found

    def _peek(self) -> int:
        return self._data[self._at]

    def _take(self, count: int) -> memoryview:
        if count < 0 or self._at + count > len(self._data):
            raise ValueError("it ends too early")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _length(self, fixed: tuple[int, int], sized: Mapping[int, int], what: str) -> int:
        """The length that the next object starts with: in its first byte, or behind it."""
        first = self._number(1)
        mask, value = fixed
        if first & ~mask & 0xFF == value:
            return first & mask
        if first not in sized:
            raise ValueError(f"byte {self._at - 1} is {first:#x}, expected {what}")
        return self._number(sized[first])

    def _map(self) -> int:
        return self._length((0x0F, 0x80), {0xDE: 2, 0xDF: 4}, "a map of arrays by name")

    def _text(self) -> str:
        size = self._length((0x1F, 0xA0), {0xD9: 1, 0xDA: 2, 0xC4: 1, 0xC5: 2}, "a name")
        if size > 500:
            raise ValueError("a name is longer than 500 bytes")
        text = bytes(self._take(size)).decode()
        if not text.isprintable():
            raise ValueError("a name cannot be shown")
        return text

    def _natural(self) -> int:
        first = self._number(1)
        if first < 0x80:
            return first
        sizes = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
        if first not in sizes:
            raise ValueError(f"byte {self._at - 1} is {first:#x}, expected a size")
        return self._number(sizes[first])

    def _array(self, key: str) -> Place:
        first = self._number(1)
        fixed = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
        sized = {0xC7: 1, 0xC8: 2, 0xC9: 4}
        if first not in fixed and first not in sized:
            raise ValueError(f"{key[:80]!r} is no array")
        size = fixed.get(first) or self._number(sized[first])
        if self._number(1) != self._ARRAY:
            raise ValueError(f"{key[:80]!r} is no array")
        end = self._at + size
        if self._number(1) != 0x93:
            raise ValueError(f"{key[:80]!r} is not an array of shape, type and data")
        axes = self._length((0x0F, 0x90), {0xDC: 2}, "a shape")
        shape = tuple(self._natural() for _ in range(min(axes, 33)))
        dtype = self._text()
        count = self._length((0, 0xC1), {0xC4: 1, 0xC5: 2, 0xC6: 4}, "data")
        start = self._at
        self._take(count)
        itemsize = STORED[dtype].itemsize if dtype in STORED else 0
        if self._at != end or (itemsize and count != math.prod(shape) * itemsize):
            raise ValueError(f"{key[:80]!r} has {count} bytes for the shape {shape}")
        return Place(start, shape, dtype)


def write_msgpack(
    path: Path, tensors: Tensors, params: Sequence[Param], progress: Callable[[int], object]
) -> None:
    """Write what `flax.serialization.to_bytes` gives for the model's nested dictionary."""
    nested = _nested({_to_flax(p): p for p in params})
    with open(path, "wb") as file:
        _pack(file, nested, tensors, progress)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        at = root
        for parent in parents:
            at = at.setdefault(parent, {})
        at[leaf] = value
    return root


def _pack(file: BinaryIO, node: Any, tensors: Tensors, progress: Callable[[int], object]) -> None:
    if isinstance(node, dict):
        file.write(bytes([0x80 | len(node)]) if len(node) < 16 else b"\xde" + _big(len(node), 2))
        for name, child in node.items():
            file.write(_packed_text(name))
            _pack(file, child, tensors, progress)
        return
    array = tensors.read(node.name)
    array = transpose(array) if node.kind is Kind.LINEAR else np.ascontiguousarray(array)
    head = b"".join(
        (
            b"\x93",
            bytes([0x90 | array.ndim]),
            *(b"\xce" + _big(n, 4) for n in array.shape),
            _packed_text(array.dtype.name),
            b"\xc6" + _big(array.nbytes, 4),
        )
    )
    if array.nbytes >= 2**30:
        raise CheckpointError(f"{node.name} is too large for msgpack, whose arrays end at 1 GiB")
    file.write(b"\xc9" + _big(len(head) + array.nbytes, 4) + bytes([_MsgpackIndex._ARRAY]) + head)
    file.write(array.reshape(-1).view(np.uint8).data)
    progress(array.nbytes)


def _big(number: int, size: int) -> bytes:
    return number.to_bytes(size, "big")


def _packed_text(text: str) -> bytes:
    data = text.encode()
    return (bytes([0xA0 | len(data)]) if len(data) < 32 else b"\xd9" + _big(len(data), 1)) + data


def is_orbax(path: Path) -> bool:
    """Whether a folder is an Orbax checkpoint itself, rather than one that holds it."""
    return os.path.isfile(path / _INDEX)


class OrbaxFolder:
    """`Tensors` over an Orbax checkpoint of one of this package's NNX models."""

    format = "Orbax"

    def __init__(self, label: str, path: Path) -> None:
        self.label = label
        self.paths = [path]
        self._path = path
        self._tensorstore = need("tensorstore", path, "flax")
        self.specs: dict[str, Spec] = {}
        self._stores: dict[str, tuple[Any, bool]] = {}
        names, driver = _orbax_names(path)
        left = _LEAST_PACKED * _size_of_files(path) + _FREE
        for name, (canonical, transposed) in _from_flax(path, names).items():
            try:
                store = self._open(name, driver)
            except Exception as error:  # tensorstore raises ValueError with a long status
                raise broken(path, "Orbax checkpoint", error) from None
            shape, dtype = tuple(store.shape), store.dtype.numpy_dtype.name
            spec = check_spec(path, canonical, shape, dtype, self.specs)
            chunk = store.chunk_layout.read_chunk.shape
            if chunk is None or math.prod(chunk) > max(4 * math.prod(shape), 2**20):
                raise CheckpointError(f"{path}: {name} is stored in chunks larger than itself")
            left -= math.prod(shape) * STORED[dtype].itemsize
            if left < 0:
                raise CheckpointError(
                    f"{path}: {name} and those before it are far larger than the files; what is "
                    "left out there cannot be weights"
                )
            self.specs[canonical] = Spec(shape[::-1] if transposed else shape, spec.dtype)
            self._stores[canonical] = (store, transposed)

    def _open(self, name: str, driver: str) -> Any:
        files = {"driver": "file", "path": f"{self._path.absolute()}/"}
        store = {"driver": "ocdbt", "base": files, "path": name + "/"}
        spec = {"driver": driver, "kvstore": store}
        return self._tensorstore.open(spec, open=True, read=True).result()

    def read(self, name: str) -> np.ndarray:
        store, transposed = self._stores[name]
        try:
            array = np.array(store.read().result())
        except Exception as error:
            raise broken(self._path, "Orbax checkpoint", error) from None
        return transpose(array) if transposed else array


def _orbax_names(path: Path) -> tuple[list[str], str]:
    """The name of every array, from the checkpoint's own metadata, and what stores them."""
    index = path / _INDEX
    if not os.path.lexists(index):
        raise CheckpointError(f"{path}: not an Orbax checkpoint: it has no _METADATA")
    try:
        found = read_json_object(index)
        tree = found["tree_metadata"]
        names = [[str(key["key"]) for key in entry["key_metadata"]] for entry in tree.values()]
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise broken(path, "Orbax checkpoint", f"its _METADATA lacks {error}") from None
    if len(names) > MOST_ENTRIES or any("/" in key for keys in names for key in keys):
        raise CheckpointError(f"{path}: its _METADATA names what no model has")
    return [".".join(keys) for keys in names], "zarr3" if found.get("use_zarr3") else "zarr"


def _size_of_files(path: Path) -> int:
    """The bytes of all files in a folder.

    Raises:
        CheckpointError: one of them is elsewhere, or is a pipe or a device.
    """
    root, total = path.resolve(), 0
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            item = Path(folder, name).resolve()
            cached = item.parent.name == "blobs" and item.is_file()  # as the Hub's cache links it
            if not item.is_relative_to(root) and not cached:
                raise CheckpointError(f"{path}: {name[:200]!r} is a link to another place")
            if not item.is_file() and not item.is_dir():
                raise CheckpointError(f"{path}: {name[:200]!r} is neither a file nor a folder")
            total += item.stat().st_size
    return total
