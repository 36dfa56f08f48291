"""HDF5 files of features: LXMERT's and BAN's tables with a row an image or a region, and VL-T5's
with a group an image.

What lies in one piece, as these programs write it, is mapped, so that a row costs nothing but its
pages; chunks and compression are left to h5py, row by row. Sources: unsupervised_visualbert's
lxmert_data.py, BAN's detection_features_converter.py, uclanlp's flickr_dataset.py.
"""

import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from visualbert.errors import InputError, MissingBackendError
from visualbert.inputs.feature_files import pickled
from visualbert.inputs.feature_files.records import (
    BOXES,
    CLASSES,
    FEATURES,
    HEIGHTS,
    PARTS,
    SCORES,
    WIDTHS,
    first_of,
    regions_of,
)
from visualbert.inputs.feature_files.store import FeatureStore
from visualbert.inputs.regions import Regions

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_BESIDE = ("_imgid2idx.pkl", ".json", "_info.json", "_ids.json", "_imgid2idx.json")
_SPATIAL, _PLACES, _COUNTS = "spatial_features", "pos_boxes", "num_boxes"
_MOST_INDEX = 1 << 30  # bytes
_MOST_STEPS = 4_000_000  # a dictionary of a million images has three million


class Hdf5Store(FeatureStore):
    """`features [images, regions, F]`, or `image_features [regions, F]` with `pos_boxes`, with the
    boxes and the rest in arrays beside them; or a group for each image.

    Which image is in which row is told by `<name>_imgid2idx.pkl` (BAN), by a JSON list of the
    images (LXMERT), or by the file `index`.
    """

    form = "HDF5 file"

    @staticmethod
    def recognises(path: Path, head: bytes) -> bool:
        return head.startswith(SIGNATURE)

    def _open(self) -> None:
        h5py = _h5py(self.path)
        self._file = h5py.File(self.path, "r")
        try:
            self._raw = open(self.path, "rb")  # noqa: SIM115
            self._map = mmap.mmap(self._raw.fileno(), 0, access=mmap.ACCESS_READ)
            self._tables = {
                name: self._rows(item)
                for name, item in self._file.items()
                if isinstance(item, h5py.Dataset)
            }
            self._features = first_of(self._tables, FEATURES)
            self._sizes: dict[int, tuple[Any, Any]] = {}
            self._row_of = self._groups() if self._features is None else self._rows_by_id()
        except BaseException:
            self._close()
            raise

    def _rows(self, dataset: Any) -> Any:
        """What gives a dataset's rows: an array over the mapped file, or the dataset itself."""
        start = dataset.id.get_offset()
        plain = dataset.chunks is None and dataset.external is None and not dataset.is_virtual
        if start is None or not plain or dataset.dtype.kind not in "iuf" or not dataset.size:
            return dataset
        if start + dataset.nbytes > len(self._map):
            raise InputError(f"{self.path}: {dataset.name} reaches beyond the end of the file")
        flat = np.frombuffer(self._map, dataset.dtype, dataset.size, start)
        return flat.reshape(dataset.shape)

    def _groups(self) -> dict[str, Any]:
        names = [name for name, item in self._file.items() if hasattr(item, "items")]
        if not names:
            raise InputError(
                f"{self.path}: no features in it; looked for arrays called {', '.join(FEATURES)} "
                f"and found {', '.join(sorted(self._tables)[:12]) or 'none'}"
            )
        return {name: name for name in names}

    def _rows_by_id(self) -> dict[str, int]:
        axes = len(self._features.shape)
        if axes == 2 and _PLACES not in self._tables:
            raise InputError(
                f"{self.path}: a table with a row a region, without {_PLACES}, which says whose "
                "they are"
            )
        if axes == 2 and self._tables[_PLACES].shape[1:] != (2,):
            raise InputError(
                f"{self.path}: {_PLACES} has the shape {self._tables[_PLACES].shape}, expected "
                "(images, 2)"
            )
        if axes not in (2, 3):
            raise InputError(
                f"{self.path}: its features have the shape {self._features.shape}, expected "
                "(images, regions, width) or (regions, width)"
            )
        count = len(self._tables[_PLACES] if axes == 2 else self._features)
        path = self._index or self._beside()
        found, sizes = _read_index(path)
        wrong = [name for name, row in found.items() if not 0 <= row < count]
        if wrong or not found:
            what = f"puts image {wrong[0]!r} beyond" if wrong else "names no image for"
            raise InputError(f"{path}: {what} the {count} rows of {self.path}")
        self._sizes = sizes
        return found

    def _beside(self) -> Path:
        stem = self.path.with_suffix("")
        names = [stem.with_name(stem.name + suffix) for suffix in _BESIDE]
        for name in names:
            if name.is_file():
                return name
        raise InputError(
            f"{self.path}: which image is in which row is told by a file beside it, and there is "
            f"none called {', '.join(name.name for name in names[:2])}; pass index="
        )

    def _find(self, name: str) -> Any:
        return self._row_of.get(name)

    def _read(self, place: Any) -> Regions:
        if isinstance(place, str):
            group = self._file[place]
            names = [name for name in group if name in PARTS]
            return regions_of({name: group[name][()] for name in names}, self.provenance)
        at: Any = place
        if len(self._features.shape) == 2:
            at = slice(*(int(end) for end in self._tables[_PLACES][place][:2]))
            if not 0 <= at.start <= at.stop <= len(self._features):
                raise InputError(f"its rows are {at.start} to {at.stop}, beyond the file's")
        known = (*FEATURES, *BOXES, *SCORES, *CLASSES, _SPATIAL)
        record = {name: self._tables[name][at] for name in known if name in self._tables}
        if _COUNTS in self._tables and at is place:
            count = int(self._tables[_COUNTS][place])
            record = {name: rows[:count] for name, rows in record.items()}
        width, height = self._sizes.get(place) or _size_from(record) or (None, None)
        sizes = {"image_width": width, "image_height": height}
        sizes |= {n: self._tables[n][place] for n in (*WIDTHS, *HEIGHTS) if n in self._tables}
        record.pop(_SPATIAL, None)
        return regions_of({**sizes, **record}, self.provenance)

    def __iter__(self) -> Iterator[str]:
        return iter(self._row_of)

    def __len__(self) -> int:
        return len(self._row_of)

    def _close(self) -> None:
        self._file.close()
        if hasattr(self, "_raw"):
            self._raw.close()
        self._tables, self._features, self._map = {}, None, None  # type: ignore[assignment]


def _h5py(path: Path) -> Any:
    try:
        import h5py
    except ImportError:
        raise MissingBackendError(
            f"{path}: HDF5 files need h5py: pip install visualbert[features]"
        ) from None
    return h5py


def _size_from(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """An image's size, from a box in pixels and the same box as a share of the image."""
    boxes, spatial = first_of(record, BOXES), record.get(_SPATIAL)
    if boxes is None or spatial is None or not len(boxes) or len(boxes) != len(spatial):
        return None
    sides = []
    for axis in (2, 3):
        box = int(np.argmax(spatial[:, axis]))
        if not spatial[box, axis] > 0:
            return None
        sides.append(round(float(boxes[box, axis]) / float(spatial[box, axis])))
    return sides[0], sides[1]


def _read_index(path: Path) -> tuple[dict[str, int], dict[int, tuple[Any, Any]]]:
    """The row of each image, and the images' sizes where the file tells them."""
    try:
        if path.stat().st_size > _MOST_INDEX:
            raise InputError(f"it has more than {_MOST_INDEX} bytes")
        data = path.read_bytes()
        found = json.loads(data) if data[:1] in (b"[", b"{") else pickled.load(data, _MOST_STEPS)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a list of images ({error})") from None
    if isinstance(found, dict):
        if not all(isinstance(row, int | np.integer) for row in found.values()):
            raise InputError(f"{path}: expected a row for each image")
        return {str(name): int(row) for name, row in found.items()}, {}
    if not isinstance(found, list):
        raise InputError(f"{path}: expected a list of images, or a row for each")
    rows: dict[str, int] = {}
    sizes: dict[int, tuple[Any, Any]] = {}
    for row, item in enumerate(found):
        entry = item if isinstance(item, dict) else {"img_id": item}
        name = first_of(entry, ("img_id", "image_id"))
        if not isinstance(name, str | int):
            raise InputError(f"{path}: entry {row} has no img_id")
        rows[str(name)] = row
        sides = first_of(entry, WIDTHS), first_of(entry, HEIGHTS)
        if None not in sides:
            sizes[row] = sides
    return rows, sizes
