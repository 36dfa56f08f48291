"""`FeatureStore`: the regions of many images by the image's id, whatever file they are in.

A store reads what is asked for when it is asked for, and any number of threads may ask at once.
What it cannot read is one `InputError` that names the file and the image.
"""

import difflib
import itertools
import re
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from visualbert.errors import CheckpointError, InputError
from visualbert.inputs.regions import Regions

_SUFFIXES = re.compile(r"\.(npy|npz|jpe?g|png)$", re.IGNORECASE)
_NUMBER = re.compile(r"(?:^|_)0*(\d+)$")
_NEAR = 10_000  # ids that a misspelled one is compared with
# What damaged data makes numpy, h5py, zipfile and zlib raise.
DAMAGE = (
    *(ValueError, LookupError, OSError, EOFError, RuntimeError),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)


class FeatureStore(ABC):
    """The regions of many images, read when they are asked for.

    `store[image_id]` is a `Regions`, whose arrays may be read-only views of the file; `image_id in
    store`, `len(store)` and iteration over the ids do what they do for a dictionary. An id is text
    or a number. One that is not there as it stands is looked for without the suffix of a file, and
    then as the number behind its last underscore (COCO_val2014_000000000042 is 42), as MMF does.

    Args:
        path: the file or folder.
        provenance: the detector that made the features, where the file does not say.
        index: the file that tells which image is in which row, for formats that have one.

    Raises:
        InputError: the file is damaged, or not what it looks like.
    """

    form: ClassVar[str]  # what messages call the format

    def __init__(self, path: Path, provenance: str = "", index: Path | None = None) -> None:
        self.path = path
        self.provenance = provenance
        self._index = index
        self._closed = False
        try:
            self._open()
        except CheckpointError as error:  # it names the file
            raise InputError(str(error)) from None
        except DAMAGE as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path}: not a whole {self.form} ({words(error)}); fetch or write it again"
            ) from None

    @staticmethod
    @abstractmethod
    def recognises(path: Path, head: bytes) -> bool:
        """Whether a file that starts with `head`, or a folder, has this format."""

    @abstractmethod
    def _open(self) -> None:
        """Find out where everything is."""

    @abstractmethod
    def _find(self, name: str) -> Any:
        """What `_read` needs to read the image called exactly `name`; None if it is not there."""

    @abstractmethod
    def _read(self, place: Any) -> Regions:
        """The regions at a place that `_find` has found."""

    @abstractmethod
    def __iter__(self) -> Iterator[str]:
        """The ids, in the order of the file."""

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    def __contains__(self, image_id: object) -> bool:
        if not isinstance(image_id, str | int | np.integer):
            return False
        return any(self._find(name) is not None for name in _spellings(str(image_id)))

    def __getitem__(self, image_id: str | int) -> Regions:
        """The regions of an image.

        Raises:
            InputError: there is no such image, or what is there is not its regions.
        """
        if self._closed:
            raise InputError(f"{self.path}: it has been closed")
        if not isinstance(image_id, str | int | np.integer):
            raise InputError(f"an image id is text or a number, got {type(image_id).__name__}")
        for name in _spellings(str(image_id)):
            place = self._find(name)
            if place is not None:
                break
        else:
            raise self._unknown(str(image_id))
        try:
            regions = self._read(place)
            check_finite(regions)
        except DAMAGE as error:
            raise InputError(f"{self.path}: image {str(image_id)!r}: {words(error)}") from None
        return regions

    def items(self) -> Iterator[tuple[str, Regions]]:
        """Every id with its regions, in the order of the file."""
        for image_id in self:
            yield image_id, self[image_id]

    def _unknown(self, image_id: str) -> InputError:
        """The error for an id that is not there: it names near ones."""
        some = list(itertools.islice(self, _NEAR + 1))
        count = len(self) if len(some) > _NEAR else len(some)
        near = difflib.get_close_matches(image_id, some, 3, 0.8) if len(some) <= _NEAR else []
        have = f"it has {count} image{'' if count == 1 else 's'}"
        if near:
            have += f", among them {', '.join(map(repr, near))}"
        elif some:
            have += f", the first is {some[0]!r}"
        return InputError(f"{self.path}: no image {image_id[:200]!r}; {have}")

    def close(self) -> None:
        """Let go of the file; arrays that were taken from it stay as they are."""
        self._closed = True
        self._close()

    @abstractmethod
    def _close(self) -> None:
        """What a format has to do to let go of its file."""

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process, such as a data loader's worker, opens the file anew."""
        return type(self), (self.path, self.provenance, self._index)


def _spellings(image_id: str) -> Iterator[str]:
    """An id as it stands, then as other files than the asker's spell it."""
    yield image_id
    plain = _SUFFIXES.sub("", image_id)
    if plain != image_id:
        yield plain
    number = _NUMBER.search(plain)
    if number and number[1] != plain:
        yield number[1]


def check_finite(regions: Regions) -> None:
    """Refuse features that are not numbers: they would turn every answer into nothing.

    Raises:
        InputError: a feature is NaN or infinite.
    """
    flat = regions.features.reshape(-1)
    with np.errstate(all="ignore"):
        probe = np.dot(flat, flat)  # a third of the time of a sum
    if not np.isfinite(probe) and not np.isfinite(flat).all():
        region = int(np.flatnonzero(~np.isfinite(regions.features).all(axis=1))[0])
        raise InputError(f"a feature of region {region} is NaN or infinite")


def words(error: BaseException) -> str:
    """One line for an error of another library."""
    return " ".join(str(error).split())[:300] or type(error).__name__
