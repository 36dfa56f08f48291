"""Folders of .npy and .npz files, one an image, and one such file alone.

Plain arrays are read straight into memory, without pickle; what `numpy.save` has pickled, such as
MMF's `<id>_info.npy`, goes through the restricted reader. Format: numpy/lib/format.py.
"""

import io
import math
import os
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visualbert.errors import InputError
from visualbert.inputs.feature_files import pickled
from visualbert.inputs.feature_files.records import PARTS, regions_of
from visualbert.inputs.feature_files.store import FeatureStore
from visualbert.inputs.regions import Regions

MAGIC = b"\x93NUMPY"
_INFO = "_info"
_SUFFIXES = (".npy", ".npz")
_HEAD = 128  # bytes; what numpy writes for an array of few axes
_MOST_HEADER = 1 << 16
_READERS = {
    1: np.lib.format.read_array_header_1_0,
    2: np.lib.format.read_array_header_2_0,
    3: np.lib.format.read_array_header_2_0,  # the same, in UTF-8
}


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    start: int


class NumpyStore(FeatureStore):
    """A folder of `<id>.npy` or `<id>.npz`, with `<id>_info.npy` beside them or without.

    Ids may lead through folders (`train2014/COCO_train2014_000000000009`); COCO's are found in the
    folder of their split, too.
    """

    form = "NumPy file"

    @staticmethod
    def recognises(path: Path, head: bytes) -> bool:
        return path.is_dir() or head.startswith(MAGIC) or _is_npz(head)

    def _open(self) -> None:
        self._whole = self.path.is_dir()
        self._folder = os.fspath(self.path if self._whole else self.path.parent)
        self._ids: list[str] | None = None
        if not self._whole:
            self._ids = [self.path.stem]
        elif next(self._walk(), None) is None:
            raise InputError(
                f"{self.path}: a folder without features; looked for {' and '.join(_SUFFIXES)} "
                "files in it and below; pass the path of a file of another format"
            )

    def _find(self, name: str) -> tuple[str, str] | None:
        if not self._whole:
            return os.path.splitext(self.path) if name == self.path.stem else None  # type: ignore[return-value]
        self._check_inside(name)
        split = name.split("_")
        below = [f"{split[1]}/{name}"] if split[0] == "COCO" and len(split) == 3 else []
        for place in (name, *below):
            stem = f"{self._folder}/{place}"
            for suffix in _SUFFIXES:
                if not place.endswith(_INFO) and os.path.isfile(stem + suffix):
                    return stem, suffix
        return None

    def _check_inside(self, name: str) -> None:
        parts = name.replace("\\", "/").split("/")
        if ".." in parts or "\0" in name or os.path.isabs(name) or ":" in parts[0]:
            raise InputError(f"{self.path}: the image id {name[:200]!r} leads out of the folder")

    def _read(self, place: tuple[str, str]) -> Regions:
        stem, suffix = place
        record = _read_file(stem + suffix)
        try:
            info = _read_file(f"{stem}{_INFO}.npy")
        except FileNotFoundError:
            return regions_of(record, self.provenance)
        return regions_of({"info": info, "features": record}, self.provenance)

    def __iter__(self) -> Iterator[str]:
        return iter(self._list())

    def __len__(self) -> int:
        return len(self._list())

    def _close(self) -> None:
        pass  # no file stays open

    def _list(self) -> list[str]:
        if self._ids is None:
            self._ids = list(self._walk())
        return self._ids

    def _walk(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self._folder):
            folders.sort()
            relative = os.path.relpath(folder, self._folder).replace(os.sep, "/")
            for file in sorted(files):
                stem, suffix = os.path.splitext(file)
                if suffix in _SUFFIXES and not stem.endswith(_INFO) and not file.startswith("."):
                    yield stem if relative == "." else f"{relative}/{stem}"


def _is_npz(head: bytes) -> bool:
    """Whether the first member of a zip is an array."""
    length = int.from_bytes(head[26:28], "little")
    return head.startswith(b"PK\x03\x04") and head[30 : 30 + length].endswith(b".npy")


def _read_file(path: str) -> Any:
    with open(path, "rb", buffering=0) as file:
        head = file.read(_HEAD)
        if head.startswith(MAGIC):
            return _read_array(file, head)
        if not _is_npz(head):
            raise InputError(
                f"{os.path.basename(path)} is neither a .npy nor a .npz file, whatever its name"
            )
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive)


def _read_array(file: io.FileIO, head: bytes) -> Any:
    """The array, or whatever was pickled, in an opened .npy file of which `head` was read."""
    need = _length(head)
    if need > len(head):
        head += file.read(need - len(head))
    header = _parse(head[:need])
    size = os.fstat(file.fileno()).st_size - header.start
    file.seek(header.start)
    if header.dtype.hasobject:
        if size > pickled.MOST_BYTES:
            raise InputError(f"its pickle has {size} bytes, more than {pickled.MOST_BYTES}")
        return pickled.load(file.read())
    _check_size(header, size)
    flat = np.empty(math.prod(header.shape), header.dtype)
    view, at = flat.view(np.uint8).data, 0
    while at < len(view):
        got = file.readinto(view[at:])
        if not got:
            raise InputError("it ends before its array does")
        at += got
    return flat.reshape(header.shape, order="F" if header.fortran else "C")


def _read_archive(archive: zipfile.ZipFile) -> dict[str, Any]:
    """The parts of an .npz that may belong to a record; a single one holds the features."""
    members = {Path(i.filename).stem: i for i in archive.infolist() if i.filename.endswith(".npy")}
    names = [name for name in members if name in PARTS] or list(members)[:2]
    parts = {}
    for name in names:
        if members[name].file_size > pickled.MOST_BYTES:
            raise InputError(
                f"{name} has {members[name].file_size} bytes, more than {pickled.MOST_BYTES}"
            )
        with archive.open(members[name]) as member:
            parts[name] = _parse_array(member.read(members[name].file_size + 1))
    alone = len(members) == 1 and not PARTS.intersection(members)
    return {"features": parts[names[0]]} if alone else parts


def _parse_array(data: bytes) -> Any:
    """The array, or whatever was pickled, in the bytes of a .npy file."""
    header = _parse(data[: _length(data[:_HEAD])])
    rest = memoryview(data)[header.start :]
    if header.dtype.hasobject:
        return pickled.load(rest)
    size = _check_size(header, len(rest))
    array = np.frombuffer(rest[:size], header.dtype)
    return array.reshape(header.shape, order="F" if header.fortran else "C")


def _check_size(header: _Header, have: int) -> int:
    size = header.dtype.itemsize * math.prod(header.shape)
    if size > have:
        raise InputError(
            f"it is cut short: its array of shape {header.shape} takes {size} bytes and it has "
            f"{have}"
        )
    return size


def _length(head: bytes) -> int:
    """The bytes of a whole header that starts with `head`."""
    if len(head) < 12 or not head.startswith(MAGIC) or head[6] not in _READERS:
        raise InputError("it does not start as a .npy file does")
    wide = 2 if head[6] == 1 else 4
    length = 8 + wide + int.from_bytes(head[8 : 8 + wide], "little")
    if length > _MOST_HEADER:
        raise InputError(f"its header claims {length} bytes")
    return length


@lru_cache(256)
def _parse(head: bytes) -> _Header:
    """A whole header; the files of a folder have a handful of different ones."""
    stream = io.BytesIO(head[8:])
    try:
        shape, fortran, dtype = _READERS[head[6]](stream, max_header_size=_MOST_HEADER)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise InputError("its header is damaged") from None
    if len(shape) > 32 or any(axis < 0 for axis in shape) or dtype.kind not in "biufOSU?":
        raise InputError(f"it holds an array of shape {shape} and type {dtype}")
    return _Header(shape, fortran, dtype, len(head))
