"""Weight files as `Tensors`: safetensors, one file or sharded, and `pytorch_model.bin`.

Nothing here runs code from a file. safetensors headers are checked by the safetensors library; the
tensors are mapped, not read, and each mapping lasts as long as its array. Pickles go through
torch's restricted unpickler and nothing else.
"""

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from visualbert.checkpoint.tensors import Spec, Tensors
from visualbert.config import read_json_object
from visualbert.errors import CheckpointError, ConfigError, MissingBackendError

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
INDEX = ".index.json"
CHECKSUM = "crc32"

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class SafetensorsFiles:
    """`Tensors` over one or more safetensors files, mapped copy-on-write."""

    def __init__(self, label: str, paths: list[Path]) -> None:
        self.label = label
        self.paths = paths
        self.metadata: dict[str, str] = {}
        self.specs: dict[str, Spec] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for path in paths:
            start, entries, metadata = _header(path)
            self.metadata.update(metadata)
            for name, entry in entries.items():
                if name in self.specs:
                    raise CheckpointError(f"{path}: {name} is in another shard already")
                if entry["dtype"] not in _DTYPES:
                    raise CheckpointError(
                        f"{path}: {name} has the unsupported type {entry['dtype']}"
                    )
                self.specs[name] = Spec(tuple(entry["shape"]), _DTYPES[entry["dtype"]].name)
                self._places[name] = (path, start + entry["data_offsets"][0])

    def read(self, name: str) -> np.ndarray:
        (path, offset), spec = self._places[name], self.specs[name]
        if 0 in spec.shape:
            return np.zeros(spec.shape, spec.dtype)
        dtype = next(d for d in _DTYPES.values() if d.name == spec.dtype)
        array = np.memmap(path, dtype, "c", offset, spec.shape).view(np.ndarray)
        return array if array.flags.aligned else array.copy()

    def verify_checksum(self) -> bool:
        """Compare the data with the checksum that this package writes; False where there is none.

        Raises:
            CheckpointError: the data is not what was written.
        """
        if CHECKSUM not in self.metadata or len(self.paths) != 1:
            return False
        with open(self.paths[0], "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            file.seek(8 + size)
            value = 0
            while block := file.read(1 << 22):
                value = zlib.crc32(block, value)
        if f"{value:08x}" != self.metadata[CHECKSUM]:
            raise CheckpointError(
                f"{self.paths[0]}: the data has changed since it was written (CRC-32 "
                f"{value:08x}, recorded {self.metadata[CHECKSUM]}); fetch or convert the checkpoint again"
            )
        return True


def _header(path: Path) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Where the data starts, the entries and the metadata, once the library has validated them."""
    try:
        with safe_open(path, framework="np"):
            pass
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(size))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, struct.error, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); fetch or write it again"
        ) from None
    return (
        8 + size,
        {k: v for k, v in entries.items() if k != "__metadata__"},
        entries.get("__metadata__", {}),
    )


class TorchFiles:
    """`Tensors` over one or more torch files, read with `weights_only=True` and mapped where
    possible.
    """

    def __init__(self, label: str, paths: list[Path]) -> None:
        self.label = label
        self._tensors: dict[str, Any] = {}
        for path in paths:
            self._tensors.update(_torch_state(path))
        self.specs = {
            name: Spec(tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for name, t in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        from visualbert.pt.backend import to_numpy

        return np.array(to_numpy(self._tensors[name]))


def _torch_state(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        raise MissingBackendError(
            f"{path} is a PyTorch pickle, which needs PyTorch to be read: "
            "pip install visualbert[pt], or convert it to safetensors where PyTorch is"
        ) from None
    import pickle

    for mapped in (True, False):  # files older than torch 1.6 cannot be mapped
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            break
        except pickle.UnpicklingError as error:
            reasons = str(error).splitlines()
            named = next((r for r in reasons if "GLOBAL" in r or "Unsupported" in r), reasons[0])
            raise CheckpointError(
                f"{path}: refused, because it is not weights alone: {named.strip()} "
                "(such a file can run code when it is loaded)"
            ) from None
        except Exception as error:  # torch raises whatever a broken file makes it trip over
            if not mapped or isinstance(error, FileNotFoundError):
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise CheckpointError(f"{path}: not a whole PyTorch file ({reason})") from None
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise CheckpointError(f"{path}: expected a dictionary of named tensors")
    return state


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
        f"{folder}: no weights found; looked for {SAFETENSORS} and {TORCH}, and for an {INDEX[1:]} of "
        "either"
    )


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = read_json_object(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} lies outside the folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: shard {name} is missing")
    return [index.parent / name for name in names]


def read_weights(folder: Path, label: str | None = None) -> Tensors:
    """The canonical weights in `folder`."""
    paths = find_weights(folder)
    kind = SafetensorsFiles if paths[0].suffix == ".safetensors" else TorchFiles
    return kind(label or str(folder), paths)
