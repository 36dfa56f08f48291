"""Keras's `.weights.h5` as canonical `Tensors`, and back, without TensorFlow.

Keras names a variable by the path to its layer and a number; the table of `visualbert.schema` says
which parameter that is. The arrays are mapped, not read, and reading needs no HDF5 library. The
state of an optimizer, which Keras writes beside the weights, is left out. Source:
keras/src/saving/saving_lib.py.
"""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from visualbert.checkpoint import hdf5
from visualbert.checkpoint.mapped import MappedFile, Place, broken, leaves_of, need
from visualbert.checkpoint.tensors import STORED, Tensors, transpose
from visualbert.errors import CheckpointError
from visualbert.schema import PREFIX, Kind, Param

KERAS = "model.weights.h5"
_TRAINING = ("optimizer",)
_BODY = ("layers", "tf_visual_bert_model")  # Keras's name of `visual_bert`
_POOLER = ("layers", "pooler")  # it finds what comes after `layers` in that list


class KerasFile(MappedFile):
    """`Tensors` over Keras's `.weights.h5` of one of this package's models."""

    format = "Keras HDF5"

    def __init__(self, label: str, path: Path) -> None:
        super().__init__(label, path)
        try:
            data = np.memmap(self._file, np.uint8, "r").view(np.ndarray).data
            found = hdf5.datasets(data, skip=_TRAINING)
        except hdf5.Refused as error:
            raise CheckpointError(f"{path}: {error}") from None
        except (ValueError, IndexError, struct.error, OSError) as error:
            raise broken(path, "HDF5 file", error) from None
        for names, place in found.items():
            self._add(*_from_keras(path, names, place))


def _from_keras(path: Path, parts: tuple[str, ...], place: Place) -> tuple[str, Place, bool]:
    """The canonical name of a dataset `…/vars/N`, and whether it lies transposed."""
    names = list(parts[:-2])
    start = PREFIX.split(".")[:1] if tuple(names[:2]) == _BODY else []
    names = start + names[2 * len(start) :]
    if tuple(names[len(start) : len(start) + 2]) == _POOLER:
        del names[len(start)]
    for at in range(1, len(names)):
        if names[at - 1] == "layer":
            names[at] = names[at].removeprefix("layer_") if names[at] != "layer" else "0"
    names = ["output" if name == "output_" else name for name in names]
    leaves = list(leaves_of(".".join(names)).items())
    known = [f"{_to_keras('.'.join(names))}/vars/{number}" for number in range(len(leaves))]
    if "/".join(parts) not in known:
        raise CheckpointError(f"{path}: {'/'.join(parts)[:200]!r} is no parameter of a VisualBERT")
    leaf, kind = leaves[known.index("/".join(parts))]
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
                array = transpose(array)
            item = file.create_dataset(f"{_to_keras(module)}/vars/{number}", data=array)
            if array.dtype == STORED["bfloat16"]:
                item.attrs["dtype"] = "bfloat16"
            progress(array.nbytes)


def _to_keras(module: str) -> str:
    names = module.split(".")
    start: list[str] = []
    if [names[0]] == PREFIX.split(".")[:1]:
        start, names = list(_BODY), names[1:]
    if names[:1] == ["pooler"]:
        start.append("layers")
    for at in range(1, len(names)):
        if names[at - 1] == "layer" and names[at].isdecimal():
            names[at] = f"layer_{names[at]}".removesuffix("_0")
    return "/".join(start + ["output_" if name == "output" else name for name in names])
