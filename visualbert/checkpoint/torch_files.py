"""torch's files as `Tensors`, without torch: the zip archive (since 1.6) and the older stream.

Nothing in a file is run: the pickle that lists the tensors goes through an interpreter that knows
tensors, storages and ordered dictionaries, lets what training programs keep beside them fall away,
and refuses everything else by its name. Storages are mapped, not read, and every offset is checked
against them before an array is made. Formats: torch/serialization.py and torch/_utils.py.
"""

import io
import itertools
import math
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from visualbert.checkpoint import pickles
from visualbert.checkpoint.mapped import open_file
from visualbert.checkpoint.pieces import crc_of
from visualbert.checkpoint.tensors import STORED, Spec, check_spec
from visualbert.errors import CheckpointError

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_MOST_AXES = 32
_MOST_INDEX = 1 << 22  # bytes of a zip's directory
_EXPANDED = 1 << 26  # bytes that a view may have although its file is smaller

_KERAS = ("config.json", "metadata.json", "model.weights.h5")  # members of another kind of zip

_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}


class _Unlike(pickles.Refused):
    """A tensor that is more than a strided view of a storage."""


class _Type(NamedTuple):
    """An element type; a storage class in a stream stands for one, bytes where it is None."""

    dtype: np.dtype | None


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    size: int  # bytes
    start: int = 0  # bytes into the storage that it is a view of


@dataclass(frozen=True)
class TorchTensor:
    """A tensor of a file that has not been read: a strided view of one of its storages."""

    storage: _Storage
    dtype: np.dtype
    offset: int  # bytes into the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes

    def is_run_of(self, size: int) -> bool:
        """Whether its elements in order are `size` bytes that follow one another."""
        step = self.dtype.itemsize
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length > 1 and stride != step:
                return False
            step *= length
        return step == size


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise pickles.Broken("a size or an offset is no number from 0 up")
    return value


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any = False,
    hooks: Any = None,
    bits: Any = None,
) -> TorchTensor:
    if not isinstance(storage, _Storage):
        raise pickles.Broken("a tensor has no storage")
    _check_bits(bits)
    return _view(storage, storage.dtype, offset, shape, strides)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    bits: Any = None,
) -> TorchTensor:
    if not isinstance(storage, _Storage) or not isinstance(dtype, _Type) or dtype.dtype is None:
        raise pickles.Broken("a tensor has no storage or no type")
    _check_bits(bits)
    return _view(storage, dtype.dtype, offset, shape, strides)


def _check_bits(bits: Any) -> None:
    """Refuse a tensor whose values are not those of its storage."""
    if isinstance(bits, dict) and (bits.get("conj") or bits.get("neg")):
        raise _Unlike("a lazily conjugated or negated tensor; save tensor.resolve_conj()")


def _view(storage: _Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> TorchTensor:
    if not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise pickles.Broken("a tensor has no shape")
    if len(shape) != len(strides) or len(shape) > _MOST_AXES:
        raise pickles.Broken(f"a tensor has {len(shape)} axes and {len(strides)} strides")
    sizes = [_natural(size) for size in shape]
    # An axis of one has a stride too, and it may be anything.
    steps = [
        _natural(step) * dtype.itemsize if size > 1 else 0
        for size, step in zip(sizes, strides, strict=True)
    ]
    first = _natural(offset) * dtype.itemsize
    last = first + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    if 0 not in sizes and last + dtype.itemsize > storage.size:
        raise pickles.Broken(
            f"a tensor of shape {tuple(sizes)} reaches beyond its storage of {storage.size} bytes"
        )
    return TorchTensor(storage, dtype, first, tuple(sizes), tuple(steps))


def _parameter(tensor: Any, *rest: Any) -> TorchTensor:
    if not isinstance(tensor, TorchTensor):
        raise pickles.Broken("a parameter is no tensor")
    return tensor


def _from_type(rebuild: Any, kind: Any, arguments: Any, state: Any) -> TorchTensor:
    """A tensor to which a program had tied attributes of its own."""
    if rebuild not in (_tensor, _tensor_v3) or not isinstance(arguments, tuple):
        raise pickles.Broken("a tensor has no storage")
    return rebuild(*arguments)


def _unlike(what: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise _Unlike(f"a {what}; save a dense one")

    return refuse


def _ordered(pairs: Any = (), *rest: Any) -> OrderedDict:
    if rest or not isinstance(pairs, list | tuple):
        raise pickles.Broken("an ordered dictionary is made of pairs")
    found: OrderedDict = OrderedDict()
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise pickles.Broken("an ordered dictionary is made of pairs")
        found[pair[0]] = pair[1]
    if len(found) != len(pairs):
        raise pickles.Broken("a key occurs twice")
    return found


def _size(sizes: Any = (), *rest: Any) -> tuple[int, ...]:
    if rest or not isinstance(sizes, list | tuple):
        raise pickles.Broken("a size is made of numbers")
    return tuple(_natural(size) for size in sizes)


# What training programs pickle beside the weights: numbers of numpy's, and configurations.
_BESIDE = frozenset({"pythia", "mmf", "omegaconf", "yacs"})
_BUILTINS = ("dict", "list", "tuple", "set", "str", "int", "long", "float", "bool")
_INERT = {
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "_codecs": ("encode",),
    "collections": ("defaultdict", "Counter"),
    "typing": ("Any",),
    "builtins": _BUILTINS,
    "__builtin__": _BUILTINS,
    "torch": ("device", "Tensor"),
    "torch.serialization": ("_get_layout",),
}
_OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "sparse tensor",
    "_rebuild_sparse_csr_tensor": "sparse tensor",
    "_rebuild_meta_tensor_no_storage": "tensor without data (meta)",
    "_rebuild_qtensor": "quantized tensor",
    "_rebuild_nested_tensor": "nested tensor",
}
_TABLE: dict[tuple[str, str], Any] = {
    **{(m, name): pickles.INERT for m, names in _INERT.items() for name in names},
    ("collections", "OrderedDict"): _ordered,
    ("pythia.utils.configuration", "ConfigNode"): _ordered,  # it is one
    ("mmf.utils.configuration", "ConfigNode"): _ordered,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch", "UntypedStorage"): _Type(None),
    ("torch.storage", "UntypedStorage"): _Type(None),
    **{("torch._utils", name): _unlike(what) for name, what in _OTHER_TENSORS.items()},
    **{("torch", f"{name}Storage"): _Type(STORED[d]) for name, d in _STORAGES.items()},
    **{("torch", name): _Type(dtype) for name, dtype in STORED.items()},
}


@dataclass
class TorchFile:
    """One opened file: the value that was saved, and where every storage's bytes are."""

    path: Path
    file: BinaryIO
    value: Any
    places: dict[str, int] = field(default_factory=dict)  # storage -> first byte
    swapped: bool = False  # written on a machine of the other byte order
    # What starts at a byte: member, bytes, CRC-32.
    sums: dict[int, tuple[str, int, int]] = field(default_factory=dict)

    def start_of(self, tensor: TorchTensor) -> int:
        """The byte of the file at which a tensor starts."""
        return self.places[tensor.storage.key] + tensor.storage.start + tensor.offset

    def read(self, tensor: TorchTensor) -> np.ndarray:
        """The array behind `tensor`: mapped copy-on-write where it is contiguous."""
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, tensor.dtype)
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        start = self.start_of(tensor)
        try:
            data = np.memmap(self.file, np.uint8, "c", start, (reach + tensor.dtype.itemsize,))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: cannot be read any more ({error}); the file has changed since it "
                "was opened"
            ) from None
        array = np.ndarray(tensor.shape, tensor.dtype, data.view(np.ndarray), 0, tensor.strides)
        if self.swapped:
            return _swap(array)
        plain = array.flags.c_contiguous and array.flags.aligned
        return array if plain else np.array(array, order="C")


def _swap(array: np.ndarray) -> np.ndarray:
    """`array`, as a machine of the other byte order wrote it, in this one's."""
    array = np.array(array, order="C")
    part = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
    array.reshape(-1).view(f"u{part}").byteswap(inplace=True)
    return array


def open_torch(path: Path, file: BinaryIO | None = None) -> TorchFile:
    """Parse a file of either format; no tensor is read.

    Args:
        path: what it is called.
        file: its bytes, where they are not at `path`.

    Raises:
        CheckpointError: the file is damaged, or holds more than tensors.
    """
    try:
        file = file or open_file(path)
        archive = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        return _open_archive(path, file) if archive else _open_stream(path, file)
    except CheckpointError:
        raise
    except _Unlike as error:
        raise CheckpointError(
            f"{path}: only dense tensors are read, and it holds {error}"
        ) from None
    except pickles.Refused as error:
        raise CheckpointError(
            f"{path}: refused, because it is not weights alone: it asks for {error}; where its "
            "code is at hand and trusted, torch.save(model.state_dict(), FILE) writes the weights "
            "alone (such a file can run code when it is loaded)"
        ) from None
    except (pickles.Broken, zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path}: not a whole PyTorch file ({pickles.shown(str(error))}); fetch or write it "
            "again"
        ) from None


def _open_archive(path: Path, file: BinaryIO) -> TorchFile:
    with zipfile.ZipFile(_Bounded(file)) as archive:  # type: ignore[arg-type]
        names = archive.namelist()
        if set(_KERAS) <= set(names):
            raise CheckpointError(
                f"{path}: a Keras archive, as model.save writes it: it holds a program beside the "
                'weights; load it with Keras, write model.save_weights("model.weights.h5") and '
                "give that file"
            )
        if any(name.endswith("/constants.pkl") for name in names):
            raise pickles.Refused("a program: it is a TorchScript archive")
        members = _members(archive, file)
        sums = {
            members[i.filename][0]: (*(i.filename, members[i.filename][1]), i.CRC)
            for i in archive.infolist()
        }
    indices = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(indices) != 1:
        raise pickles.Broken("it is a zip archive without torch's data.pkl")
    root = indices[0].removesuffix("data.pkl")
    order = _small(file, members.get(root + "byteorder", (0, 0)))
    if order not in (b"", b"little", b"big"):
        raise pickles.Broken(f"its byte order is {order!r}")
    start, size = members[indices[0]]
    if size > pickles.MOST_BYTES:
        raise pickles.Broken(f"its index is longer than {pickles.MOST_BYTES} bytes")
    places = {
        name.removeprefix(root + "data/"): place
        for name, (place, _) in members.items()
        if name.startswith(root + "data/")
    }
    sizes = {name: members[root + "data/" + name][1] for name in places}

    def storage(ident: Any) -> _Storage:
        made = _storage(ident, 5)
        if made.size != sizes.get(made.key):
            have = f"has {sizes[made.key]}" if made.key in sizes else "is not there"
            raise pickles.Broken(f"storage {made.key[:40]!r} needs {made.size} bytes and {have}")
        return made

    file.seek(start)
    index = file.read(size)
    if not any(crc for _, _, crc in sums.values()):  # torch.serialization.set_crc32_options(False)
        sums = {}
    elif zlib.crc32(index) != sums[start][2]:
        raise pickles.Broken("its index is not what was written: the CRC-32 differs")
    value = pickles.load(io.BytesIO(index), _TABLE, storage, _BESIDE)
    return TorchFile(path, file, value, places, order == b"big", sums)


class _Bounded:
    """A file for `zipfile`, which would read a directory of any size into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > _MOST_INDEX:
            raise pickles.Broken("its zip directory is larger than any model's")
        return self._file.read(size if size >= 0 else _MOST_INDEX)


def _members(archive: zipfile.ZipFile, file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Where every member's bytes start and how many they are; none is compressed or overlaps."""
    end = file.seek(0, 2)
    found: dict[str, tuple[int, int]] = {}
    for info in archive.infolist():
        if info.filename in found:
            raise pickles.Broken(f"it has two members called {info.filename[:80]!r}")
        if info.flag_bits & 1:
            raise pickles.Broken(f"{info.filename[:80]!r} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise pickles.Broken(
                f"{info.filename[:80]!r} is compressed, which torch never does; unpack it and "
                "save it again"
            )
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise pickles.Broken(f"{info.filename[:80]!r} is not where the archive says")
        start = info.header_offset + 30 + sum(struct.unpack("<2H", header[26:]))
        if start + info.file_size > end:
            raise pickles.Broken(f"{info.filename[:80]!r} reaches beyond the end of the file")
        found[info.filename] = (start, info.file_size)
    taken = sorted(place for place in found.values() if place[1])
    for (start, size), (following, _) in itertools.pairwise(taken):
        if start + size > following:
            raise pickles.Broken("its members overlap")
    return found


def _small(file: BinaryIO, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(min(place[1], 16))


def _open_stream(path: Path, file: BinaryIO) -> TorchFile:
    if pickles.load(file, {}) != _MAGIC or pickles.load(file, {}) != _VERSION:
        raise pickles.Broken("it does not start as torch's files do")
    pickles.load(file, {})  # sizes of C types on the machine that wrote it
    roots: dict[str, tuple[int, int]] = {}  # bytes, bytes of an element

    def storage(ident: Any) -> _Storage:
        made = _storage(ident, 6)
        view = ident[5]
        size = _natural(ident[4]) * made.dtype.itemsize
        if roots.setdefault(made.key, (size, made.dtype.itemsize))[0] != size:
            raise pickles.Broken(f"storage {made.key[:40]!r} has two sizes")
        if view is None:
            return made
        if not isinstance(view, tuple) or len(view) != 3:
            raise pickles.Broken("a view of a storage has no offset")
        start, length = (_natural(n) * made.dtype.itemsize for n in view[1:])
        if start + length > size:
            raise pickles.Broken(f"a view reaches beyond its storage of {size} bytes")
        return _Storage(made.key, made.dtype, length, start)

    value = pickles.load(file, _TABLE, storage, _BESIDE)
    keys = pickles.load(file, {})
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) for key in keys)
        or sorted(keys) != sorted(roots)
    ):
        raise pickles.Broken("its list of storages does not match its tensors")
    end = file.seek(0, 1), file.seek(0, 2)
    places, at = {}, end[0]
    for key in keys:
        size, itemsize = roots[key]
        file.seek(at)
        count = file.read(8)
        if len(count) < 8 or int.from_bytes(count, "little", signed=True) * itemsize != size:
            raise pickles.Broken(f"storage {key[:40]!r} is not where it should be")
        places[key] = at + 8
        at += 8 + size
        if at > end[1]:
            raise pickles.Broken(f"it ends before storage {key[:40]!r} does")
    return TorchFile(path, file, value, places)


def _storage(ident: Any, length: int) -> _Storage:
    """What ("storage", type, key, device, elements, …) stands for."""
    kind = ident[0] if isinstance(ident, tuple) and ident else None
    if kind != "storage":
        words = pickles.shown(kind[:40]) if isinstance(kind, str) else type(kind).__name__
        raise pickles.Refused(f"a persistent object of the kind {words}")
    if len(ident) != length or not isinstance(ident[1], _Type) or not isinstance(ident[2], str):
        raise pickles.Broken("a storage has no type or no key")
    dtype = ident[1].dtype or np.dtype(np.uint8)
    return _Storage(ident[2], dtype, _natural(ident[4]) * dtype.itemsize)


class TorchFiles:
    """`Tensors` over one or more torch files, each a dictionary of tensors by name.

    `files` are their bytes, where they are not at `paths`.
    """

    format = "torch"

    def __init__(self, label: str, paths: list[Path], files: list[BinaryIO] | None = None) -> None:
        self.label = label
        self.paths = paths
        self.specs: dict[str, Spec] = {}
        self._tensors: dict[str, tuple[TorchFile, TorchTensor]] = {}
        for number, path in enumerate(paths):
            opened = open_torch(path, files[number] if files else None)
            for name, tensor in _state(opened).items():
                self._add(opened, name, tensor)

    def _add(self, opened: TorchFile, name: str, tensor: TorchTensor) -> None:
        spec = check_spec(opened.path, name, tensor.shape, tensor.dtype.name, self.specs)
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if size > max(tensor.storage.size, _EXPANDED):
            raise CheckpointError(
                f"{opened.path}: {name} of shape {tensor.shape} repeats its "
                f"{tensor.storage.size} bytes to {size}; save it contiguous"
            )
        self.specs[name] = spec
        self._tensors[name] = (opened, tensor)

    def read(self, name: str) -> np.ndarray:
        opened, tensor = self._tensors[name]
        return opened.read(tensor)

    def recorded(self, name: str) -> int | None:
        """The CRC-32 of a tensor's bytes, where the file records it: of a whole storage."""
        opened, tensor = self._tensors[name]
        _, size, recorded = opened.sums.get(opened.start_of(tensor), ("", -1, 0))
        return recorded if tensor.is_run_of(size) and not opened.swapped else None

    def verify_checksum(self, besides: Collection[str] = ()) -> bool:
        """Compare the data with the checksums of torch's zip files; False where there are none.

        Args:
            besides: tensors that somebody else compares with what is `recorded` of them.

        Raises:
            CheckpointError: the data is not what was written.
        """
        seen = {self._tensors[name][0].start_of(self._tensors[name][1]) for name in besides}
        opened = {id(file): file for file, _ in self._tensors.values()}.values()
        for one in opened:
            _test_archive(one, seen if len(opened) == 1 else frozenset())
        return all(one.sums for one in opened)


# Where a training program keeps the weights among its other state.
_NESTS = ("model", "state_dict", "model_state_dict")


def _state(opened: TorchFile) -> Mapping[str, TorchTensor]:
    """The dictionary of tensors in a file, which may lie beside an optimizer and counters."""
    value = opened.value
    if isinstance(value, dict):
        for name in _NESTS:
            if isinstance(value.get(name), dict):
                value = value[name]
                break
    if isinstance(value, dict) and value and all(_is_weight(item) for item in value.items()):
        return value
    what = "expected a dictionary of tensors by name, as torch.save(model.state_dict()) writes it"
    if isinstance(value, dict) and "optimizer" in value:
        what = "it is the state of an optimizer, without the model; open the model's own file"
    elif isinstance(value, dict) and value:
        name, item = next(entry for entry in value.items() if not _is_weight(entry))
        what += f"; {pickles.shown(repr(name))} is " + (
            _kind(item) if isinstance(name, str) else "not a name"
        )
    elif not isinstance(value, dict):
        what += f"; it is {_kind(value)}"
    raise CheckpointError(f"{opened.path}: {what}")


def _kind(value: Any) -> str:
    if isinstance(value, TorchTensor):
        return "one tensor"
    return repr(value) if value is pickles.INERT else f"of type {type(value).__name__}"


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], TorchTensor)


def _test_archive(opened: TorchFile, besides: Collection[int]) -> None:
    """Compare every member with its CRC-32, beside whoever reads tensors."""
    for start, (name, size, recorded) in opened.sums.items():
        if start not in besides and crc_of(opened.file, start, size) != recorded:
            raise CheckpointError(
                f"{opened.path}: the data has changed since it was written (CRC-32 of {name}); "
                "fetch or convert the checkpoint again"
            )
