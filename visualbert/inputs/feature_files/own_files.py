"""Our own file of features: one safetensors file, the regions of all images one after another.

`features [R, F]` with `boxes`, `scores` and `classes` beside them, `offsets [N+1]` at which each
image's regions start, `image_sizes [N, 2]`, `parts [N]` (which of these an image has) and `ids`, a
JSON list. It is mapped whole, so that an image costs two slices. Writing is one pass that holds one
image in memory, and ends with a whole file or none.
"""

import json
import mmap
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from visualbert.checkpoint.read import CHECKSUM, CODES, SafetensorsFiles
from visualbert.checkpoint.tensors import STORED
from visualbert.errors import InputError
from visualbert.inputs.feature_files.store import FeatureStore, check_finite
from visualbert.inputs.regions import Regions

FORMAT = "visualbert-features"
_HEADER = 4096  # bytes, so that the features can be written before it is known
_BLOCK = 1 << 20
_MOST_IDS = 1 << 30
_BOXES, _SCORES, _CLASSES, _SIZE = 1, 2, 4, 8  # bits of `parts`
_FIELDS = {"boxes": _BOXES, "scores": _SCORES, "classes": _CLASSES}
_TYPES = {
    "features": "float32",
    "boxes": "float32",
    "scores": "float32",
    "classes": "int32",
    "offsets": "int64",
    "image_sizes": "int32",
    "parts": "uint8",
    "ids": "uint8",
}


class OwnStore(FeatureStore):
    """A file that `write_features` has written; it tells its provenance itself."""

    form = "safetensors file of features"

    @staticmethod
    def recognises(path: Path, head: bytes) -> bool:
        return 0 < int.from_bytes(head[:8], "little") < 1 << 24 and head[8:9] == b"{"

    def _open(self) -> None:
        files = SafetensorsFiles(str(self.path), [self.path])
        if files.metadata.get("kind") != FORMAT:
            raise InputError(
                f"{self.path}: a safetensors file, but not of features; those are written by "
                "visualbert.inputs.features.write_features"
            )
        self.provenance = files.metadata.get("provenance") or self.provenance
        with open(self.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack_from("<Q", self._map)
        entries = json.loads(self._map[8 : 8 + length])
        arrays = {}
        for name, dtype in _TYPES.items():
            if name not in files.specs or files.specs[name].dtype != dtype:
                raise InputError(f"{self.path}: it has no {name} of the type {dtype}")
            start, end = (8 + length + at for at in entries[name]["data_offsets"])
            kind = STORED[dtype]
            flat = np.frombuffer(self._map, kind, (end - start) // kind.itemsize, start)
            arrays[name] = flat.reshape(files.specs[name].shape)
        self._arrays = arrays
        self._offsets = np.array(arrays["offsets"]).tolist()
        self._parts = np.array(arrays["parts"]).tolist()
        self._rows = self._check()

    def _check(self) -> dict[str, int]:
        """The row of each image, once the arrays fit each other."""
        if len(self._arrays["ids"]) > _MOST_IDS:
            raise InputError(f"{self.path}: its ids take {len(self._arrays['ids'])} bytes")
        ids = json.loads(self._arrays["ids"].tobytes())
        count, regions = len(ids), len(self._arrays["features"])
        shapes = {
            "boxes": (regions, 4),
            "scores": (regions,),
            "classes": (regions,),
            "offsets": (count + 1,),
            "image_sizes": (count, 2),
            "parts": (count,),
        }
        wrong = [name for name, shape in shapes.items() if self._arrays[name].shape != shape]
        ends = self._arrays["offsets"]
        if wrong or ends[0] != 0 or ends[-1] != regions or np.any(np.diff(ends) < 0):
            raise InputError(
                f"{self.path}: its {wrong[0] if wrong else 'offsets'} do not fit {count} images of "
                f"{regions} regions; write it again"
            )
        rows = {str(name): row for row, name in enumerate(ids)}
        if len(rows) != count:
            raise InputError(f"{self.path}: an id occurs twice")
        return rows

    def _find(self, name: str) -> int | None:
        return self._rows.get(name)

    def _read(self, place: int) -> Regions:
        arrays, held = self._arrays, self._parts[place]
        at = slice(self._offsets[place], self._offsets[place + 1])
        size = arrays["image_sizes"][place].tolist() if held & _SIZE else None
        return Regions(
            arrays["features"][at],
            boxes=arrays["boxes"][at] if held & _BOXES else None,
            scores=arrays["scores"][at] if held & _SCORES else None,
            classes=arrays["classes"][at] if held & _CLASSES else None,
            image_size=(size[0], size[1]) if size else None,
            provenance=self.provenance,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def _close(self) -> None:
        self._arrays = {}


class _Kind(NamedTuple):
    """What all images of a file share."""

    width: int
    provenance: str


def write(path: Path, items: Iterable[tuple[str | int, Regions]]) -> None:
    """Write the regions of images to a new file at `path`, one image at a time.

    Raises:
        InputError: there are none, or two do not fit into one file.
    """
    with ExitStack() as stack, open(path, "wb") as file:
        # What is not features comes behind them; it is small, and waits on the disk.
        spools: dict[str, Any] = {
            name: stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for name in _FIELDS
        }
        file.write(b"\0" * _HEADER)
        writer = _Writer(file, spools)
        for image_id, regions in items:
            writer.add(str(image_id), regions)
        writer.finish()


class _Writer:
    """One file being written."""

    def __init__(self, file: BinaryIO, spools: dict[str, BinaryIO]) -> None:
        self._file, self._spools = file, spools
        self._kind: _Kind | None = None
        self._ids: dict[str, None] = {}
        self._offsets, self._parts = [0], bytearray()
        self._sizes: list[tuple[int, int]] = []
        self._sum = 0

    def add(self, image_id: str, regions: Regions) -> None:
        """Append an image."""
        kind = _Kind(regions.width, regions.provenance)
        self._kind = self._kind or kind
        if image_id in self._ids:
            raise InputError(f"image {image_id!r} comes twice")
        if kind != self._kind:
            raise InputError(
                f"image {image_id!r} has features of {_told(kind)}, those before it of "
                f"{_told(self._kind)}; one file holds one kind"
            )
        try:
            check_finite(regions)
        except InputError as error:
            raise InputError(f"image {image_id!r}: {error}") from None
        self._ids[image_id] = None
        self._append(self._file, regions.features)
        held = _SIZE if regions.image_size else 0
        for name, bit in _FIELDS.items():
            value = getattr(regions, name)
            held |= bit if value is not None else 0
            shape = (len(regions), 4) if name == "boxes" else (len(regions),)
            filler = np.zeros(shape, STORED[_TYPES[name]])
            spooled = filler if value is None else value.astype(filler.dtype)
            if value is not None and not np.array_equal(spooled, value, equal_nan=True):
                raise InputError(f"image {image_id!r}: its {name} do not fit into {filler.dtype}")
            self._spools[name].write(spooled.tobytes())
        self._parts.append(held)
        self._sizes.append(regions.image_size or (0, 0))
        self._offsets.append(self._offsets[-1] + len(regions))

    def _append(self, file: BinaryIO, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._sum = zlib.crc32(data, self._sum)
        file.write(data)

    def finish(self) -> None:
        """Write what follows the features, and the header."""
        if self._kind is None:
            raise InputError("there are no images to write")
        for spool in self._spools.values():
            spool.seek(0)
            while block := spool.read(_BLOCK):
                self._append(self._file, np.frombuffer(block, np.uint8))
        ids = json.dumps(list(self._ids), ensure_ascii=False, separators=(",", ":")).encode()
        tail: dict[str, np.ndarray] = {
            "offsets": np.array(self._offsets, np.int64),
            "image_sizes": np.array(self._sizes, np.int32),
            "parts": np.frombuffer(bytes(self._parts), np.uint8),
            "ids": np.frombuffer(ids, np.uint8),
        }
        for array in tail.values():
            self._append(self._file, array)
        regions = self._offsets[-1]
        shapes = {
            "features": (regions, self._kind.width),
            "boxes": (regions, 4),
            "scores": (regions,),
            "classes": (regions,),
            **{name: array.shape for name, array in tail.items()},
        }
        self._file.seek(0)
        self._file.write(self._header(shapes))

    def _header(self, shapes: dict[str, tuple[int, ...]]) -> bytes:
        assert self._kind is not None
        head: dict[str, Any] = {
            "__metadata__": {
                "kind": FORMAT,
                "provenance": self._kind.provenance,
                CHECKSUM: f"{self._sum:08x}",
            }
        }
        end = 0
        for name, dtype in _TYPES.items():
            start = end
            end += int(np.prod(shapes[name], dtype=np.int64)) * STORED[dtype].itemsize
            head[name] = {
                "dtype": CODES[dtype],
                "shape": shapes[name],
                "data_offsets": [start, end],
            }
        text = json.dumps(head, separators=(",", ":")).encode()
        if len(text) > _HEADER - 8:
            raise InputError(f"the provenance is {len(self._kind.provenance)} characters long")
        return struct.pack("<Q", _HEADER - 8) + text.ljust(_HEADER - 8)


def _told(kind: _Kind) -> str:
    return f"the width {kind.width} from {kind.provenance or 'an unknown detector'}"
