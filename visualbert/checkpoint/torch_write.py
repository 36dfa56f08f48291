"""torch's zip archive written without torch: what `torch.save(model.state_dict())` means.

Tensors are written one at a time, each at a multiple of 64 bytes as torch places them, so that the
file can be mapped. Equal tensors give equal files. Formats: torch/serialization.py,
caffe2/serialize/inline_container.cc.
"""

import hashlib
import math
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from visualbert.checkpoint.tensors import STORED, Spec, Tensors
from visualbert.schema import Param

_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
}
_ALIGNMENT = 64
_BLOCK = 1 << 22
_HEADER = 30  # bytes of a member's header before its name
_ZIP64 = 20  # and of what a member beyond 4 GiB has more
_PADDING = b"FB"  # the extra field that torch fills up with


def write_torch(
    path: Path, tensors: Tensors, params: Sequence[Param], progress: Callable[[int], object]
) -> None:
    """Write what `torch.save(model.state_dict())` writes."""
    root = path.stem
    specs = {param.name: tensors.specs[param.name] for param in params}
    index = _index(specs)
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, f"{root}/data.pkl", index)
        _add(archive, f"{root}/byteorder", b"little")
        for number, (name, spec) in enumerate(specs.items()):
            array = np.ascontiguousarray(tensors.read(name), STORED[spec.dtype])
            _add(archive, f"{root}/data/{number}", array.reshape(-1).view(np.uint8).data)
            progress(array.nbytes)
        _add(archive, f"{root}/version", b"3\n")
        ident = int.from_bytes(hashlib.sha256(index).digest()[:16], "big")
        _add(archive, f"{root}/.data/serialization_id", f"{ident:040}".encode())


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(name)
    info.file_size = len(data)
    large = len(data) >= zipfile.ZIP64_LIMIT
    file: IO[bytes] = archive.fp  # type: ignore[assignment]
    start = file.tell() + _HEADER + len(name.encode()) + _ZIP64 * large + 4
    padding = -start % _ALIGNMENT
    info.extra = _PADDING + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as member:
        for at in range(0, len(data), _BLOCK):
            member.write(data[at : at + _BLOCK])


def _index(specs: Mapping[str, Spec]) -> bytes:
    """The pickle of a dictionary of tensors, each the whole of a storage of its own."""
    parts = [b"\x80\x02}("]
    for number, (name, spec) in enumerate(specs.items()):
        count = math.prod(spec.shape)
        strides = [math.prod(spec.shape[axis + 1 :]) for axis in range(len(spec.shape))]
        storage = (
            b"(" + _text("storage") + b"ctorch\n" + _STORAGES[spec.dtype].encode() + b"\n",
            _text(str(number)) + _text("cpu") + _number(count) + b"tQ",
        )
        parts += (
            _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(",
            *storage,
            _number(0) + _numbers(spec.shape) + _numbers(strides),
            b"\x89ccollections\nOrderedDict\n)RtR",  # no gradient, no hooks
        )
    return b"".join(parts) + b"u."


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(data)]) + data


def _numbers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"
