"""What the programs that make features call their parts, and `Regions` made of them.

Sources: MMF's feature_readers.py and tools/scripts/features, LXMERT's utils.py, bottom-up-
attention's generate_tsv.py, BAN's detection_features_converter.py, VL-T5's feature extraction.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from visualbert.errors import InputError
from visualbert.inputs.regions import Regions

FEATURES = ("features", "feature", "image_feat", "image_feature", "image_features")
BOXES = ("boxes", "bbox", "image_bboxes", "image_bb")
SCORES = ("scores", "objects_conf", "obj_conf", "object_pro", "max_conf", "conf", "cls_prob")
CLASSES = ("classes", "objects", "objects_id", "obj_id", "object_ids")
WIDTHS = ("image_width", "image_w", "img_w")
HEIGHTS = ("image_height", "image_h", "img_h")
PARTS = frozenset((*FEATURES, *BOXES, *SCORES, *CLASSES, *WIDTHS, *HEIGHTS, "info"))
_DEEPEST = 4


def regions_of(record: Any, provenance: str) -> Regions:
    """The regions that a record of one image holds.

    Args:
        record: an array of features, or a dictionary that holds one beside boxes and the like.
        provenance: of the regions.

    Raises:
        InputError: there are no features in it, or its parts do not fit each other.
    """
    parts = _flat(record)
    features = first_of(parts, FEATURES)
    if features is None:
        names = ", ".join(sorted(map(str, parts))[:12]) or "nothing"
        raise InputError(f"holds no features under any of {', '.join(FEATURES)}; it holds {names}")
    return Regions(
        as_rows(features),
        boxes=first_of(parts, BOXES),
        scores=_scores(first_of(parts, SCORES)),
        classes=first_of(parts, CLASSES),
        image_size=size_of(first_of(parts, WIDTHS), first_of(parts, HEIGHTS)),
        provenance=provenance,
    )


def as_rows(features: Any) -> np.ndarray:
    """Features as (V, F); a grid, such as ResNet's (1, 14, 14, F), is flattened.

    Raises:
        InputError: they are no array of numbers of two axes or more.
    """
    if not isinstance(features, np.ndarray) or features.dtype.kind not in "fiu":
        kind = getattr(features, "dtype", type(features).__name__)
        raise InputError(f"its features are no array of numbers but {kind}")
    if features.ndim < 2 or not features.shape[-1]:
        raise InputError(f"its features have the shape {features.shape}, expected (regions, width)")
    return features if features.ndim == 2 else features.reshape(-1, features.shape[-1])


def first_of(parts: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of `names` that is there and is not None."""
    for name in names:
        value = parts.get(name)
        if value is not None:
            return value
    return None


def size_of(width: Any, height: Any) -> tuple[int, int] | None:
    """An image's size, where both sides are known.

    Raises:
        InputError: they are no positive numbers.
    """
    if width is None or height is None:
        return None
    try:
        size = int(width), int(height)
    except (TypeError, ValueError, OverflowError):
        size = (0, 0)
    if min(size) <= 0:
        raise InputError(f"the image's size is {width!r} x {height!r}, expected pixels")
    return size


def _scores(value: Any) -> Any:
    """Confidences: where there is one for each class, the highest."""
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.shape[1]:
        return value.max(axis=1)
    return value


def _flat(record: Any) -> dict[str, Any]:
    """A record's parts by name, out of the dictionaries and 0-d arrays that they are wrapped in."""
    value = _unwrapped(record)
    parts = {"features": value} if not isinstance(value, dict) else dict(value)
    for _ in range(_DEEPEST):
        values = {name: _unwrapped(value) for name, value in parts.items()}
        parts = {name: value for name, value in values.items() if not isinstance(value, dict)}
        if len(parts) == len(values):
            break
        for inner in values.values():
            if isinstance(inner, dict):
                parts = {**inner, **parts}
    return parts


def _unwrapped(value: Any) -> Any:
    """What `numpy.save` has put into an array because it was none."""
    wrapped = isinstance(value, np.ndarray) and value.dtype.hasobject and value.ndim == 0
    return value.item() if wrapped else value
