"""`Regions`: what a detector saw in one image, checked once, whatever made it."""

from dataclasses import dataclass

import numpy as np

from visualbert.errors import InputError


@dataclass(frozen=True)
class Regions:
    """The regions of one image.

    Args:
        features: (V, F) float32, one vector a region.
        boxes: (V, 4) float32, x1, y1, x2, y2 in pixels of the image; None where unknown.
        scores: (V,) float32 confidences; None where unknown.
        classes: (V,) int64 indices into the detector's classes; None where unknown.
        image_size: width and height in pixels; None where unknown.
        provenance: the detector that made them, as `visualbert.inputs.recipes` names it; "" where
            unknown.

    Raises:
        InputError: an array of another rank or length, or one that holds no numbers.
    """

    features: np.ndarray
    boxes: np.ndarray | None = None
    scores: np.ndarray | None = None
    classes: np.ndarray | None = None
    image_size: tuple[int, int] | None = None
    provenance: str = ""

    def __post_init__(self) -> None:
        kinds = {"features": np.float32, "boxes": np.float32, "scores": np.float32}
        for name, dtype in {**kinds, "classes": np.int64}.items():
            value = getattr(self, name)
            if value is not None or name == "features":
                object.__setattr__(self, name, _array(name, value, dtype))
        shape = self.features.shape
        if len(shape) != 2 or not shape[1]:
            raise InputError(f"features has shape {shape}, expected (regions, width)")
        wanted = {"boxes": (shape[0], 4), "scores": shape[:1], "classes": shape[:1]}
        for name, want in wanted.items():
            value = getattr(self, name)
            if value is not None and value.shape != want:
                raise InputError(
                    f"{name} has shape {value.shape}, expected {want} for {shape[0]} regions"
                )

    def __len__(self) -> int:
        return len(self.features)

    @property
    def width(self) -> int:
        """F, the length of one feature vector."""
        return self.features.shape[1]

    def first(self, count: int) -> "Regions":
        """The first `count` regions, which are the most confident where a detector sorted them."""
        parts = {
            name: None if getattr(self, name) is None else getattr(self, name)[:count]
            for name in ("features", "boxes", "scores", "classes")
        }
        return Regions(**parts, image_size=self.image_size, provenance=self.provenance)  # type: ignore[arg-type]


def _array(name: str, value: object, dtype: type) -> np.ndarray:
    try:
        return np.ascontiguousarray(value, dtype)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} must be an array of numbers, got {type(value).__name__}"
        ) from None


def overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(V, E) intersection over union of every box of (V, 4) with every one of (E, 4)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (high - low).clip(0).prod(2)
    area = [(b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, others)]
    return shared / (area[0][:, None] + area[1][None] - shared).clip(1e-9)
