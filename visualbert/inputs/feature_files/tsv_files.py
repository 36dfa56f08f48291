"""Tab-separated tables of features, a line an image, arrays as base64.

One scan finds where each line starts, and may be kept beside the file; after it lines are read
where they are. Sources: bottom-up-attention's tools/generate_tsv.py and LXMERT's src/utils.py,
whose columns are known without a header.
"""

import binascii
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from visualbert.errors import InputError
from visualbert.inputs.feature_files.records import regions_of
from visualbert.inputs.feature_files.store import FeatureStore
from visualbert.inputs.regions import Regions

_COLUMNS = (
    ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
    (
        *("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf"),
        *("num_boxes", "boxes", "features"),
    ),
)
_IDS = ("image_id", "img_id")
_ARRAYS: dict[str, tuple[np.dtype, int]] = {  # type, how many a region; 0: as many as there are
    "boxes": (np.dtype("<f4"), 4),
    "features": (np.dtype("<f4"), 0),
    "objects_id": (np.dtype("<i8"), 1),
    "objects_conf": (np.dtype("<f4"), 1),
}
_NUMBERS = ("image_w", "image_h", "img_w", "img_h")
_LONGEST = 1 << 26  # bytes of a line
_NEAR = 1 << 10  # bytes of a line in which its id is


class TsvStore(FeatureStore):
    """A table of bottom-up-attention or LXMERT, with its header or without.

    Where the argument `index` names a file, the scan's result is kept in it and taken from it as
    long as the table has not changed. Of lines with the same id the last one counts, as in LXMERT.
    """

    form = "table of features"

    @staticmethod
    def recognises(path: Path, head: bytes) -> bool:
        fields = head.split(b"\n")[0].split(b"\t")
        text = all(32 <= byte < 256 for field in fields[:4] for byte in field.rstrip(b"\r"))
        return len(fields) > 2 and text

    def _open(self) -> None:
        self._file = open(self.path, "rb")  # noqa: SIM115
        try:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._columns, first = self._header()
            self._places = self._kept() or self._scan(first)
        except BaseException:
            self._file.close()
            raise

    def _header(self) -> tuple[tuple[str, ...], int]:
        """The columns, and where the first image's line starts."""
        end = self._line_end(0)
        fields = [self._map[a:b] for a, b in self._fields(0, end)]
        if fields[0] in [name.encode() for name in _IDS]:
            columns = tuple(field.decode("utf-8", "replace").strip() for field in fields)
            missing = {"num_boxes", "features"} - set(columns)
            if missing:
                raise InputError(f"{self.path}: its header has no column {sorted(missing)[0]}")
            return columns, end + 1
        for columns in _COLUMNS:
            if len(columns) == len(fields):
                return columns, 0
        raise InputError(
            f"{self.path}: a table of {len(fields)} columns without a header; those of "
            f"bottom-up-attention have {len(_COLUMNS[0])} ({', '.join(_COLUMNS[0])}), those of "
            f"LXMERT {len(_COLUMNS[1])}"
        )

    def _line_end(self, start: int) -> int:
        end = self._map.find(b"\n", start, start + _LONGEST)
        if end < 0 and len(self._map) - start >= _LONGEST:
            raise InputError(f"{self.path}: the line at byte {start} is longer than any image's")
        return end if end >= 0 else len(self._map)

    def _fields(self, start: int, end: int) -> list[tuple[int, int]]:
        """Where the fields of a line start and end."""
        found = []
        while True:
            tab = self._map.find(b"\t", start, end)
            found.append((start, tab if tab >= 0 else end))
            if tab < 0:
                return found
            start = tab + 1

    def _scan(self, first: int) -> dict[str, tuple[int, int]]:
        """Where each image's line is: start and bytes."""
        column = next((i for i, name in enumerate(self._columns) if name in _IDS), 0)
        places: dict[str, tuple[int, int]] = {}
        at = left = first
        while at < len(self._map):
            end = self._line_end(at)
            line = self._map[at : min(end, at + _NEAR)].rstrip(b"\r\n")
            if line:
                name = line.split(b"\t", column + 1)[column].decode("utf-8", "replace").strip()
                places.pop(name, None)
                places[name] = at, end - at - (self._map[end - 1 : end] == b"\r")
            at = end + 1
            if at - left > _LONGEST and hasattr(self._map, "madvise"):
                left = left // mmap.PAGESIZE * mmap.PAGESIZE
                self._map.madvise(mmap.MADV_DONTNEED, left, min(at, len(self._map)) - left)
                left = at
        if not places:
            raise InputError(f"{self.path}: a table without a line")
        if self._index is not None:
            _keep(self._index, {**self._state(), "places": places})
        return places

    def _state(self) -> dict[str, Any]:
        """What changes when the table does."""
        found = os.fstat(self._file.fileno())
        return {"bytes": found.st_size, "modified": found.st_mtime_ns}

    def _kept(self) -> dict[str, tuple[int, int]] | None:
        """The places that an earlier scan has kept, if they are this table's."""
        if self._index is None:
            return None
        try:
            found = json.loads(self._index.read_text(encoding="utf-8"))
            places = {str(name): (int(a), int(b)) for name, (a, b) in found.pop("places").items()}
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return None
        return places if found == self._state() else None

    def _find(self, name: str) -> tuple[int, int] | None:
        return self._places.get(name)

    def _read(self, place: tuple[int, int]) -> Regions:
        start, size = place
        fields = self._fields(start, start + size)
        if len(fields) != len(self._columns):
            raise InputError(
                f"its line has {len(fields)} columns, expected {len(self._columns)}; the file is "
                "cut short or damaged"
            )
        where = dict(zip(self._columns, fields, strict=True))
        count = self._number("num_boxes", where["num_boxes"])
        record: dict[str, Any] = {
            name: self._array(name, where[name], count) for name in _ARRAYS if name in where
        }
        record |= {name: self._number(name, where[name]) for name in _NUMBERS if name in where}
        return regions_of(record, self.provenance)

    def _number(self, name: str, where: tuple[int, int]) -> int:
        text = self._map[where[0] : min(where[1], where[0] + 40)]
        try:
            return int(float(text))
        except (ValueError, OverflowError):
            raise InputError(f"its {name} is {text[:40]!r}, expected a number") from None

    def _array(self, name: str, where: tuple[int, int], count: int) -> np.ndarray:
        dtype, each = _ARRAYS[name]
        with memoryview(self._map) as data, data[where[0] : where[1]] as text:
            try:
                decoded = binascii.a2b_base64(text, strict_mode=True)
            except binascii.Error as error:
                raise InputError(f"its {name} are no whole base64 ({error})") from None
        values, rest = divmod(len(decoded), dtype.itemsize)
        wide = each or (values // count if count > 0 else 1)
        if rest or values != count * wide:
            of = f" of {each}" if each > 1 else ""
            raise InputError(
                f"its {name} have {len(decoded)} bytes, which are not {count} rows{of} of type "
                f"{dtype.name}"
            )
        array = np.frombuffer(decoded, dtype)
        return array if each == 1 else array.reshape(count, wide)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _close(self) -> None:
        self._file.close()
        self._map.close()


def _keep(path: Path, value: dict[str, Any]) -> None:
    """Write an index whole or not at all; where it cannot be written there is none."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(new, "x", encoding="utf-8") as file:
            json.dump(value, file)
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
