"""What the framework-neutral readers of native weight files share.

`MappedFile` reads any file that has every tensor in one piece at a known place; `leaves_of` says,
from the table of `visualbert.schema`, which leaves a module has and in what order.
"""

import importlib
import math
import os
import stat
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from visualbert.checkpoint.tensors import STORED, Spec, check_spec, map_array, transpose
from visualbert.config import VisualBertConfig
from visualbert.errors import CheckpointError, ConfigError, MissingBackendError
from visualbert.schema import ARCHITECTURES, Kind, parameters

MOST_ENTRIES = 100_000
_CLASSIFIERS = ("linear", "mlp")


class Place(NamedTuple):
    """Where a tensor's bytes are, and how they lie."""

    start: int
    shape: tuple[int, ...]
    dtype: str


class MappedFile:
    """`Tensors` over one file that has every tensor in one piece at a known place."""

    def __init__(self, label: str, path: Path) -> None:
        self.label = label
        self.paths = [path]
        self._path = path
        self._file = open_file(path)
        self._places: dict[str, Place] = {}
        self.specs: dict[str, Spec] = {}
        self._transposed: set[str] = set()

    def _add(self, name: str, place: Place, transposed: bool) -> None:
        spec = check_spec(self._path, name, place.shape, place.dtype, self.specs)
        size = math.prod(place.shape) * STORED[place.dtype].itemsize
        if place.start < 0 or place.start + size > os.fstat(self._file.fileno()).st_size:
            raise CheckpointError(f"{self._path}: {name} reaches beyond the end of the file")
        self._places[name] = place
        self.specs[name] = Spec(spec.shape[::-1] if transposed else spec.shape, spec.dtype)
        if transposed:
            self._transposed.add(name)

    def read(self, name: str) -> np.ndarray:
        start, shape, dtype = self._places[name]
        array = map_array(self._path, name, start, Spec(shape, dtype), self._file)
        return transpose(array) if name in self._transposed else array


def open_file(path: Path) -> BinaryIO:
    """A file to read; a pipe or a device, which has no end, is none.

    Raises:
        CheckpointError: it cannot be opened.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a file, so there is nothing to read")
        return open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def broken(path: Path, what: str, reason: object) -> CheckpointError:
    """The one sentence for a file that its library cannot read."""
    words = " ".join(str(reason).split())[:200] or type(reason).__name__
    return CheckpointError(f"{path}: not a whole {what} ({words}); fetch or write it again")


def need(module: str, path: Path, extra: str) -> Any:
    """An optional library, imported.

    Raises:
        MissingBackendError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingBackendError(
            f"{path}: this format needs {module}: pip install visualbert[{extra}]"
        ) from None


def leaves_of(module: str) -> dict[str, Kind]:
    """The leaves of the module at a dotted path, in order; none if no architecture has it."""
    parts = module.split(".")
    for at in range(len(parts) - 1):
        if parts[at] == "layer" and parts[at + 1].isdecimal() and len(parts[at + 1]) < 4:
            parts[at + 1] = "0"
    return _modules().get(".".join(parts), {})


@cache
def _modules() -> dict[str, dict[str, Kind]]:
    """The leaves of every module of any architecture, with layer 0 for every layer."""
    found: dict[str, dict[str, Kind]] = {}
    for head in _CLASSIFIERS:
        variant = VisualBertConfig(
            num_hidden_layers=1, bypass_transformer=True, classifier_head=head
        )
        for architecture in ARCHITECTURES:
            try:
                params = parameters(architecture, variant)
            except ConfigError:  # it has no such classifier
                continue
            for param in params:
                module, _, leaf = param.name.rpartition(".")
                found.setdefault(module, {})[leaf] = param.kind
    return found
