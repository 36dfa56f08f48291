"""Region features by image id, from the files that the published programs make and from our own.

`open_features` looks at what is in a file, not at its name. Nothing in a file is run, and an
image is read when it is asked for. Source of the formats: `visualbert.inputs.feature_files`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from visualbert.checkpoint.write import replace_files
from visualbert.errors import InputError
from visualbert.inputs.feature_files import own_files
from visualbert.inputs.feature_files.hdf5_files import Hdf5Store
from visualbert.inputs.feature_files.lmdb_files import LmdbStore
from visualbert.inputs.feature_files.numpy_files import NumpyStore
from visualbert.inputs.feature_files.own_files import OwnStore
from visualbert.inputs.feature_files.store import FeatureStore
from visualbert.inputs.feature_files.torch_files import TorchStore
from visualbert.inputs.feature_files.tsv_files import TsvStore
from visualbert.inputs.regions import Regions

__all__ = ["FeatureStore", "open_features", "with_spatial", "write_features"]

# Asked in this order: text is what is left when no signature fits.
_STORES: tuple[type[FeatureStore], ...] = (
    *(Hdf5Store, LmdbStore, TorchStore, NumpyStore, OwnStore, TsvStore),
)
_HEAD = 1 << 12


def open_features(
    path: str | os.PathLike,
    *,
    provenance: str = "",
    index: str | os.PathLike | None = None,
) -> FeatureStore:
    """The region features in a file or folder, of whatever format.

    Read are a folder of .npy or .npz files (MMF, Pythia, the original VQA), one such file, the
    tables of bottom-up-attention and LXMERT, the HDF5 of LXMERT, BAN and VL-T5, MMF's LMDB,
    dictionaries of tensors saved by torch, and what `write_features` writes.

    Args:
        path: the file or folder.
        provenance: the detector that made the features, as `visualbert.inputs.recipes` names it,
            where the file does not say.
        index: for HDF5, the file that tells which image is in which row; for a table, a file that
            keeps where its lines are, so that it is scanned once.

    Raises:
        InputError: there is nothing at `path`, its format is none of these, or it is damaged.
        MissingBackendError: the format needs a library that is not installed.
    """
    path = Path(path)
    head = _head(path)
    for store in _STORES:
        if store.recognises(path, head):
            return store(path, provenance, None if index is None else Path(index))
    raise InputError(
        f"{path}: no format of features that is known; read are folders of .npy or .npz files, "
        "such a file, tables of bottom-up-attention and LXMERT (unpacked), HDF5, LMDB, torch's and "
        "our own safetensors"
    )


def _head(path: Path) -> bytes:
    if path.is_dir():
        return b""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not path.is_file():
        raise InputError(f"{path}: neither a file nor a folder, so there is nothing to read")
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def write_features(path: str | os.PathLike, items: Iterable[tuple[str | int, Regions]]) -> None:
    """Write the regions of images to one safetensors file, which `open_features` maps.

    `write_features(new, open_features(old).items())` turns any format into the fastest. One image
    is in memory at a time; the file appears when it is whole, and what was there stays if it does
    not get so far.

    Args:
        path: of the file.
        items: pairs, or a mapping, of an image's id and its regions; all of one width and
            provenance.

    Raises:
        InputError: there are none, an id comes twice, or two do not fit into one file.
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(
            f"{path}: a folder; give the file to write, such as {path}/features.safetensors"
        )
    replace_files(path.parent, {path.name: lambda new: own_files.write(new, _pairs(items))})


def _pairs(items: Any) -> Iterator[tuple[str, Regions]]:
    """The items, one by one, if they are pairs of an id and regions."""
    for item in items.items() if isinstance(items, Mapping) else items:
        pair = isinstance(item, tuple) and len(item) == 2
        if not pair or not isinstance(item[1], Regions):
            shown = tuple(type(part).__name__ for part in item) if pair else type(item).__name__
            raise InputError(f"items must be pairs of an image's id and its Regions, got {shown}")
        yield item


def with_spatial(regions: Regions) -> Regions:
    """Regions whose features end in six more numbers, where they are: x1, y1, x2, y2, width and
    height as shares of the image, as the Flickr30K models read them.

    Source: BAN's detection_features_converter.py; uclanlp's flickr_dataset.py puts them last.

    Raises:
        InputError: the boxes or the image's size are not known.
    """
    if regions.boxes is None or regions.image_size is None:
        lacking = "boxes" if regions.boxes is None else "image_size"
        raise InputError(f"the places of regions need their {lacking}, which are not known")
    corners = regions.boxes / np.tile(np.array(regions.image_size, np.float32), 2)
    places = np.hstack([corners, corners[:, 2:] - corners[:, :2]])
    return Regions(
        np.hstack([regions.features, places]),
        **{name: getattr(regions, name) for name in ("boxes", "scores", "classes")},
        image_size=regions.image_size,
        provenance=regions.provenance,
    )
