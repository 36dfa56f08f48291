"""Regions from pixels: a `RegionExtractor` makes them, and the embedded one finds salient blobs.

Extractors register by name in the entry-point group `visualbert.extractors`, each entry leading to
one instance; this package's are listed below.
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

from visualbert.errors import MissingBackendError, UsageError
from visualbert.inputs.regions import Regions

ENTRY_POINTS = "visualbert.extractors"
_EXTRACTORS = (EntryPoint("blobs", "visualbert.regions.blobs:extractor", ENTRY_POINTS),)


@runtime_checkable
class RegionExtractor(Protocol):
    """Makes the regions of an image.

    `name` is what recipes and feature files call it, `width` the length of its vectors.
    """

    name: str
    width: int

    def __call__(self, image: Any) -> Regions:
        """The regions of `image`: a path, the bytes of a file, an open file, a PIL image, or an
        array (H, W), (H, W, 3) or (H, W, 4), as `visualbert.regions.image.read_image` takes.

        Raises:
            InputError: it is no image.
        """
        ...


@cache
def get_extractor(name: str = "blobs") -> RegionExtractor:
    """The extractor called `name`.

    Raises:
        UsageError: there is none of that name, or another package's is broken.
        MissingBackendError: a library that it needs is not installed.
    """
    points = _points()
    if name not in points:
        known = ", ".join(sorted(points))
        raise UsageError(f"unknown extractor {name!r}; expected one of {known}")
    return _load(points[name])


def extractor_names() -> list[str]:
    """The registered extractors."""
    return sorted(_points())


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in (*entry_points(group=ENTRY_POINTS), *_EXTRACTORS)}


def _load(point: EntryPoint) -> RegionExtractor:
    origin = f"extractor {point.name!r} ({point.value})"
    try:
        found = point.load()
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        other = point.dist.name if point.dist else library
        install = "visualbert[images]" if point in _EXTRACTORS else other
        raise MissingBackendError(f"{origin} needs {library}: pip install {install}") from None
    except Exception as error:  # whatever importing another's package raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(f"{origin} cannot be loaded: {reason}") from error
    if isinstance(found, type) or not isinstance(found, RegionExtractor):
        raise UsageError(
            f"{origin} is no extractor but {found!r}; it has to be an object with a name and a "
            "width that is called with an image"
        )
    return found
