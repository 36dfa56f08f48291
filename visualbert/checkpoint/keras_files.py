"""Keras's `.weights.h5` as canonical `Tensors`, and back, without TensorFlow.

Keras names a variable by the path to its layer and a number; the table of `visualbert.schema` says
which parameter that is. The arrays are mapped, not read. Only plain arrays are taken: links,
filters, external and virtual datasets are refused. Source: keras/src/saving/saving_lib.py.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visualbert.checkpoint.mapped import MOST_ENTRIES, MappedFile, Place, broken, leaves_of, need
from visualbert.checkpoint.tensors import STORED, Tensors
from visualbert.errors import CheckpointError
from visualbert.schema import PREFIX, Kind, Param

KERAS = "model.weights.h5"
_BODY = "layers/tf_visual_bert_model/"


class KerasFile(MappedFile):
    """`Tensors` over Keras's `.weights.h5` of one of this package's models."""

    format = "Keras HDF5"

    def __init__(self, label: str, path: Path) -> None:
        super().__init__(label, path)
        h5py = need("h5py", path, "tf")
        try:
            with h5py.File(self._file, "r") as file:
                found = list(_h5_datasets(h5py, file, path))
        except CheckpointError:
            raise
        except Exception as error:  # HDF5 raises whatever a broken file makes it trip over
            raise broken(path, "HDF5 file", error) from None
        for parts, place in found:
            self._add(*_from_keras(path, parts, place))


def _h5_datasets(h5py: Any, file: Any, path: Path) -> Iterator[tuple[list[str], Place]]:
    """Every dataset's path and place; links that lead elsewhere are refused, not followed."""
    waiting, count = [([], file)], 0  # type: ignore[var-annotated]
    while waiting:
        parts, group = waiting.pop()
        for name in group:
            count += 1
            if count > MOST_ENTRIES or len(parts) > 32:
                raise CheckpointError(f"{path}: more groups than any model has")
            where = "/".join([*parts, name])[:200]
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise CheckpointError(
                    f"{path}: {where!r} is a link to another place; only plain arrays are read"
                )
            item = group[name]
            if isinstance(item, h5py.Group):
                waiting.append(([*parts, name], item))
            elif isinstance(item, h5py.Dataset):
                yield [*parts, name], _h5_place(h5py, item, path, where)


def _h5_place(h5py: Any, item: Any, path: Path, where: str) -> Place:
    plist = item.id.get_create_plist()
    plain = plist.get_layout() == h5py.h5d.CONTIGUOUS and not plist.get_external_count()
    dtype = item.dtype.name
    if item.attrs.get("dtype") == "bfloat16" and item.dtype.itemsize == 2:
        dtype = "bfloat16"
    elif not item.dtype.isnative:
        dtype = item.dtype.str
    start = item.id.get_offset()
    if 0 in item.shape:
        start = 0
    if not plain or start is None or item.is_virtual:
        raise CheckpointError(
            f"{path}: {where!r} is chunked, compressed or kept elsewhere, which Keras never does; "
            "only plain arrays are read"
        )
    return Place(start, tuple(int(n) for n in item.shape), dtype)


def _from_keras(path: Path, parts: list[str], place: Place) -> tuple[str, Place, bool]:
    """The canonical name of a dataset `…/vars/N`, and whether it lies transposed."""
    module, number = "/".join(parts[:-2]), parts[-1]
    module = module.replace(_BODY, PREFIX.replace(".", "/"), 1)
    names = [name.removesuffix("_") if name == "output_" else name for name in module.split("/")]
    for at in range(len(names) - 1):
        layer = names[at + 1]
        if names[at] == "layer" and (layer == "layer" or layer.startswith("layer_")):
            names[at + 1] = layer.removeprefix("layer").removeprefix("_") or "0"
    leaves = list(leaves_of(".".join(names)).items())
    if parts[-2:-1] != ["vars"] or number not in map(str, range(len(leaves))):
        raise CheckpointError(f"{path}: {'/'.join(parts)[:200]!r} is no parameter of a VisualBERT")
    leaf, kind = leaves[int(number)]
    return ".".join([*names, leaf]), place, kind is Kind.LINEAR


def write_keras(
    path: Path, tensors: Tensors, params: Sequence[Param], progress: Callable[[int], object]
) -> None:
    """Write what Keras's `save_weights` writes for the same model."""
    h5py = need("h5py", path, "tf")
    with h5py.File(path, "w") as file:
        counts: dict[str, int] = {}
        for param in params:
            module = param.name.rpartition(".")[0]
            number = counts[module] = counts.get(module, -1) + 1
            array = tensors.read(param.name)
            if param.kind is Kind.LINEAR:
                array = np.ascontiguousarray(array.T)
            item = file.create_dataset(f"{_to_keras(module)}/vars/{number}", data=array)
            if array.dtype == STORED["bfloat16"]:
                item.attrs["dtype"] = "bfloat16"
            progress(array.nbytes)


def _to_keras(module: str) -> str:
    names = module.split(".")
    for at in range(len(names) - 1):
        if names[at] == "layer" and names[at + 1].isdecimal():
            names[at + 1] = "layer" if names[at + 1] == "0" else f"layer_{names[at + 1]}"
    names = ["output_" if name == "output" else name for name in names]
    return "/".join(names).replace(PREFIX.replace(".", "/"), _BODY, 1)
