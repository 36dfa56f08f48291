"""The weights of a canonical folder as `Tensors`: safetensors or torch files, one or sharded.

safetensors headers are checked by the safetensors library; the tensors are mapped, not read, and
each mapping lasts as long as its array.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from visualbert.checkpoint.mapped import MOST_ENTRIES
from visualbert.checkpoint.pieces import crc_of
from visualbert.checkpoint.tensors import Spec, check_spec, map_array
from visualbert.checkpoint.torch_files import TorchFiles
from visualbert.config import read_json_object
from visualbert.errors import CheckpointError, ConfigError

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
INDEX = ".index.json"
CHECKSUM = "crc32"

_MOST_HEADER = 1 << 24

_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
CODES = {name: code for code, name in _TYPES.items()}


class SafetensorsFiles:
    """`Tensors` over one or more safetensors files, mapped copy-on-write."""

    format = "safetensors"

    def __init__(self, label: str, paths: list[Path]) -> None:
        self.label = label
        self.paths = paths
        self.metadata: dict[str, str] = {}
        self.specs: dict[str, Spec] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._data: dict[Path, tuple[int, str | None]] = {}  # start, checksum
        for path in paths:
            start, entries, metadata = _header(path)
            self.metadata.update(metadata)
            self._data[path] = start, metadata.get(CHECKSUM)
            for name, entry in entries.items():
                dtype = _TYPES.get(entry["dtype"], entry["dtype"])
                self.specs[name] = check_spec(path, name, entry["shape"], dtype, self.specs)
                self._places[name] = (path, start + entry["data_offsets"][0])

    def read(self, name: str) -> np.ndarray:
        path, offset = self._places[name]
        return map_array(path, name, offset, self.specs[name])

    def verify_checksum(self) -> bool:
        """Compare the data with the checksum that this package writes; False where there is none.

        Raises:
            CheckpointError: the data is not what was written.
        """
        for path, (start, recorded) in self._data.items():
            if recorded is None:
                return False
            value = _crc(path, start)
            if value != recorded:
                raise CheckpointError(
                    f"{path}: the data has changed since it was written (CRC-32 {value}, "
                    f"recorded {recorded!r}); fetch or convert the checkpoint again"
                )
        return True


def _crc(path: Path, start: int) -> str:
    """The CRC-32 of all that follows the header."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return f"{crc_of(file, start, size - start):08x}"


def _header(path: Path) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Where the data starts, the entries and the metadata, once the library has validated them."""
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > _MOST_HEADER:
                raise ValueError(f"its header claims {size} bytes")
            with safe_open(path, framework="np"):
                pass
            entries = json.loads(file.read(size), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, struct.error, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); fetch or write it again"
        ) from None
    metadata = entries.pop("__metadata__", None) or {}
    if len(entries) > MOST_ENTRIES:
        raise CheckpointError(f"{path}: holds {len(entries)} tensors, more than any model has")
    return 8 + size, entries, metadata


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return found


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights under a canonical name."""
    names = (SAFETENSORS, TORCH, SAFETENSORS + INDEX, TORCH + INDEX)
    return any((folder / name).is_file() for name in names)


def find_weights(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder, safetensors before pickles.

    Raises:
        CheckpointError: there are none, or a shard that the index names is missing.
    """
    for name in (SAFETENSORS, TORCH):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / (name + INDEX)
        if index.is_file():
            return _shards(index)
    raise CheckpointError(
        f"{folder}: no weights found; looked for {SAFETENSORS} and {TORCH}, and for the "
        f"{INDEX[1:]} of either"
    )


def _shards(index: Path) -> list[Path]:
    suffix = Path(index.name.removesuffix(INDEX)).suffix
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        shard = f"{index}: shard {name[:200]!r}"
        if Path(name).name != name:
            raise CheckpointError(f"{shard} lies outside the folder")
        if Path(name).suffix != suffix:
            raise CheckpointError(f"{shard} is not a {suffix} file")
        if not os.path.isfile(index.parent / name):
            raise CheckpointError(f"{shard} is missing from the folder")
    return [index.parent / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = read_json_object(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index}: has no weight_map, which says where each tensor is")
    if not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{index}: its weight_map must give a file name for each tensor")
    return found


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) < 200 else repr(name[:200])


def read_weights(folder: Path, label: str | None = None) -> SafetensorsFiles | TorchFiles:
    """The canonical weights in `folder`.

    Raises:
        CheckpointError: there are none, they are damaged, or not what their index says.
    """
    paths = find_weights(folder)
    kind = SafetensorsFiles if paths[0].suffix == ".safetensors" else TorchFiles
    tensors = kind(label or str(folder), paths)
    if paths[0].name not in (SAFETENSORS, TORCH):
        index = folder / ((SAFETENSORS if kind is SafetensorsFiles else TORCH) + INDEX)
        promised = sorted(set(_weight_map(index)) - set(tensors.specs))
        if promised:
            raise CheckpointError(
                f"{index}: {_shown(promised[0])} is in none of its shards"
                + (f", nor are {len(promised) - 1} more" if len(promised) > 1 else "")
                + "; fetch the checkpoint again"
            )
    return tensors
