"""Weight files as `Tensors`: safetensors, one file or sharded, and `pytorch_model.bin`.

Nothing here runs code from a file. safetensors headers are checked by the safetensors library; the
tensors are mapped, not read, and each mapping lasts as long as its array. Pickles go through
torch's restricted unpickler and nothing else.
"""

import json
import math
import pickle
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
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
_MOST_AXES = 32

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
_READABLE = [dtype.name for dtype in _DTYPES.values()]


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
                code = entry["dtype"]
                dtype = _DTYPES[code].name if code in _DTYPES else code
                _check_entry(path, name, entry["shape"], dtype, self.specs)
                self.specs[name] = Spec(tuple(entry["shape"]), dtype)
                self._places[name] = (path, start + entry["data_offsets"][0])

    def read(self, name: str) -> np.ndarray:
        (path, offset), spec = self._places[name], self.specs[name]
        dtype = next(d for d in _DTYPES.values() if d.name == spec.dtype)
        if 0 in spec.shape:
            return np.zeros(spec.shape, dtype)
        try:
            array = np.memmap(path, dtype, "c", offset, spec.shape).view(np.ndarray)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: {name} cannot be read any more ({error}); the file has changed since it "
                "was opened"
            ) from None
        return array if array.flags.aligned else array.copy()

    def verify_checksum(self) -> bool:
        """Compare the data with the checksum that this package writes; False where there is none.

        Raises:
            CheckpointError: the data is not what was written.
        """
        if CHECKSUM not in self.metadata or len(self.paths) != 1:
            return False
        value = 0
        for name in sorted(self.specs):
            value = add_to_checksum(value, self.read(name))
        if f"{value:08x}" != self.metadata[CHECKSUM]:
            raise CheckpointError(
                f"{self.paths[0]}: the data has changed since it was written (CRC-32 {value:08x}, "
                f"recorded {self.metadata[CHECKSUM]!r}); fetch or convert the checkpoint again"
            )
        return True


def add_to_checksum(value: int, array: np.ndarray) -> int:
    """The CRC-32 of a contiguous `array` after whatever gave `value`; tensors go by their names."""
    return zlib.crc32(array.reshape(-1).view(np.uint8).data, value)


def _header(path: Path) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Where the data starts, the entries and the metadata, once the library has validated them."""
    try:
        with safe_open(path, framework="np"):
            pass
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(size), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, struct.error, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); fetch or write it again"
        ) from None
    metadata = entries.pop("__metadata__", None) or {}
    return 8 + size, entries, metadata


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return found


def _check_entry(
    path: Path, name: str, shape: Sequence[int], dtype: str, others: Mapping[str, Spec]
) -> None:
    """Refuse what no checkpoint of any model holds, before numpy trips over it."""
    if not name.isprintable() or len(name) > 500:
        raise CheckpointError(f"{path}: {name[:40]!r} is not a tensor's name")
    if name in others:
        raise CheckpointError(f"{path}: {name} is in another shard already")
    if dtype not in _READABLE:
        raise CheckpointError(
            f"{path}: {name} has the type {dtype}, which is not one of {', '.join(_READABLE)}; "
            "convert it first"
        )
    if len(shape) > _MOST_AXES or math.prod(max(size, 1) for size in shape) >= 2**59:
        raise CheckpointError(f"{path}: {name} has the impossible shape {reprlib.repr(shape)}")


class TorchFiles:
    """`Tensors` over one or more torch files, read with `weights_only=True` and mapped where
    possible.
    """

    def __init__(self, label: str, paths: list[Path]) -> None:
        self.label = label
        self.paths = paths
        self.specs: dict[str, Spec] = {}
        self._tensors: dict[str, Any] = {}
        for path in paths:
            for name, tensor in _torch_state(path).items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                _check_entry(path, name, tensor.shape, dtype, self.specs)
                self.specs[name] = Spec(tuple(tensor.shape), dtype)
                self._tensors[name] = tensor

    def read(self, name: str) -> np.ndarray:
        from visualbert.pt.backend import to_numpy

        return np.array(to_numpy(self._tensors[name]))

    def verify_checksum(self) -> bool:
        """Compare the data with the checksums of torch's zip files; False where there are none.

        Raises:
            CheckpointError: the data is not what was written.
        """
        if not all(zipfile.is_zipfile(path) for path in self.paths):
            return False
        for path in self.paths:
            try:
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip()
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                damaged = str(error)
            if damaged:
                raise CheckpointError(
                    f"{path}: the data has changed since it was written (CRC-32 of {damaged}); "
                    "fetch or convert the checkpoint again"
                )
        return True


def _torch_state(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        raise MissingBackendError(
            f"{path} is a PyTorch pickle, which needs PyTorch to be read: "
            "pip install visualbert[pt], or convert it to safetensors where PyTorch is"
        ) from None
    state = _load_restricted(path)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        for name, tensor in state.items()
    ):
        raise CheckpointError(
            f"{path}: expected a dictionary of dense tensors by name, as "
            "torch.save(model.state_dict()) writes it"
        )
    return state


def _load_restricted(path: Path) -> Any:
    """What torch's restricted unpickler makes of the file."""
    import torch

    for mapped in (True, False):  # files older than torch 1.6 cannot be mapped
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            reasons = str(error).splitlines() or [type(error).__name__]
            named = next((r for r in reasons if "GLOBAL" in r or "Unsupported" in r), reasons[0])
            raise CheckpointError(
                f"{path}: refused, because it is not weights alone: {named.strip()} "
                "(such a file can run code when it is loaded)"
            ) from None
        except Exception as error:  # torch raises whatever a broken file makes it trip over
            if not mapped or isinstance(error, FileNotFoundError):
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise CheckpointError(
                    f"{path}: not a whole PyTorch file ({reason}); fetch or write it again"
                ) from None
    raise AssertionError


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
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} lies outside the folder")
        if Path(name).suffix != suffix:
            raise CheckpointError(f"{index}: shard {name!r} is not a {suffix} file")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: shard {name!r} is missing from the folder")
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


def read_weights(folder: Path, label: str | None = None) -> Tensors:
    """The canonical weights in `folder`.

    Raises:
        CheckpointError: there are none, they are damaged, or not what their index says.
    """
    paths = find_weights(folder)
    kind = SafetensorsFiles if paths[0].suffix == ".safetensors" else TorchFiles
    tensors: Tensors = kind(label or str(folder), paths)
    if paths[0].name not in (SAFETENSORS, TORCH):
        index = folder / ((SAFETENSORS if kind is SafetensorsFiles else TORCH) + INDEX)
        promised = sorted(set(_weight_map(index)) - set(tensors.specs))
        if promised:
            raise CheckpointError(
                f"{index}: {promised[0]} is in none of its shards"
                + (f", nor are {len(promised) - 1} more" if len(promised) > 1 else "")
                + "; fetch the checkpoint again"
            )
    return tensors
