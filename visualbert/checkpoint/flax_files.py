"""Flax's files as canonical `Tensors`, and back: msgpack (`flax.serialization`) and Orbax folders.

Both name a parameter by the path to it and spell its leaf in Flax's way; the table of
`visualbert.schema` says which one is meant. msgpack needs no Flax and its arrays are mapped; Orbax
needs tensorstore, which reads one array at a time. Sources: flax/serialization.py,
orbax.checkpoint.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from visualbert.checkpoint.mapped import MOST_ENTRIES, MappedFile, Place, broken, leaves_of, need
from visualbert.checkpoint.tensors import STORED, Spec, Tensors, check_spec
from visualbert.errors import CheckpointError
from visualbert.schema import Kind, Param

ORBAX = "orbax"
MSGPACK = "flax_model.msgpack"
_LEAVES = {
    Kind.EMBEDDING: "embedding",
    Kind.LINEAR: "kernel",
    Kind.BIAS: "bias",
    Kind.SCALE: "scale",
    Kind.SHIFT: "bias",
}


def _from_flax(path: Path, name: str) -> tuple[str, bool]:
    """The canonical name of a leaf, and whether it lies transposed."""
    module, _, leaf = name.rpartition(".")
    for canonical, kind in leaves_of(module).items():
        if _LEAVES[kind] == leaf:
            return f"{module}.{canonical}", kind is Kind.LINEAR
    raise CheckpointError(f"{path}: {name[:200]!r} is no parameter of a VisualBERT")


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
        if all(name.startswith("params.") for name in found):
            found = {name.removeprefix("params."): place for name, place in found.items()}
        for name, place in found.items():
            canonical, transposed = _from_flax(path, name)
            self._add(canonical, place, transposed)


class _MsgpackIndex:
    """The arrays in nested maps of a msgpack buffer: their names and places, nothing read."""

    _ARRAY = 1  # Flax's extension type

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def read(self) -> dict[str, Place]:
        found: dict[str, Place] = {}
        open_maps: list[list[Any]] = [["", self._map()]]  # name and entries still to come
        while open_maps:
            name, left = open_maps[-1]
            if not left:
                open_maps.pop()
                continue
            open_maps[-1][1] = left - 1
            if len(found) > MOST_ENTRIES or len(open_maps) > 64:
                raise ValueError("it holds more than any model has")
            key = f"{name}.{self._text()}" if name else self._text()
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
        return bytes(self._take(size)).decode()

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
    array = np.ascontiguousarray(array.T if node.kind is Kind.LINEAR else array)
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
        for keys in _orbax_names(path):
            name, transposed = _from_flax(path, ".".join(keys))
            try:
                store = self._open(".".join(keys))
            except Exception as error:  # tensorstore raises ValueError with a long status
                raise broken(path, "Orbax checkpoint", error) from None
            shape, dtype = tuple(store.shape), store.dtype.numpy_dtype.name
            spec = check_spec(path, name, shape, dtype, self.specs)
            chunk = store.chunk_layout.read_chunk.shape
            if chunk is None or math.prod(chunk) > max(4 * math.prod(shape), 2**20):
                raise CheckpointError(f"{path}: {name} is stored in chunks larger than itself")
            self.specs[name] = Spec(shape[::-1] if transposed else shape, spec.dtype)
            self._stores[name] = (store, transposed)

    def _open(self, name: str) -> Any:
        base = {"driver": "ocdbt", "base": f"file://{self._path.absolute()}/", "path": name + "/"}
        return self._tensorstore.open(
            {"driver": "zarr", "kvstore": base}, open=True, read=True
        ).result()

    def read(self, name: str) -> np.ndarray:
        store, transposed = self._stores[name]
        try:
            array = np.array(store.read().result())
        except Exception as error:
            raise broken(self._path, "Orbax checkpoint", error) from None
        return np.ascontiguousarray(array.T) if transposed else array


def _orbax_names(path: Path) -> list[list[str]]:
    """The path of every array, from the checkpoint's own metadata."""
    index = path / "_METADATA"
    try:
        if index.stat().st_size > 2**26:
            raise ValueError("it is larger than 64 MiB")
        tree = json.loads(index.read_text(encoding="utf-8"))["tree_metadata"]
        names = [[str(key["key"]) for key in entry["key_metadata"]] for entry in tree.values()]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not an Orbax checkpoint: it has no _METADATA") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise broken(path, "Orbax checkpoint", error) from None
    if len(names) > MOST_ENTRIES or any("/" in key for keys in names for key in keys):
        raise CheckpointError(f"{path}: its _METADATA names what no model has")
    return names


def write_orbax(
    path: Path, tensors: Tensors, params: Sequence[Param], progress: Callable[[int], object]
) -> None:
    """Write what Orbax's `StandardCheckpointer` writes for the model's nested dictionary."""
    need("orbax", path, "flax")
    import orbax.checkpoint as ocp

    arrays = {}
    for param in params:
        array = tensors.read(param.name)
        arrays[_to_flax(param)] = array.T if param.kind is Kind.LINEAR else array
        progress(array.nbytes)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), _nested(arrays))
