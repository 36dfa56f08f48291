"""The embedded extractor: salient blobs by connected components, a grid where there are none.

No weights and no training: what differs from the background is a blob, each blob a region, and its
vector holds the resized patch, its gradients, its colour and the geometry of its box. The first
region is the whole image.
"""

import itertools

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.feature import hog
from skimage.filters import threshold_otsu
from skimage.measure import label

from visualbert.inputs.regions import Regions
from visualbert.regions.image import read_image

MOST = 36
SIDE = 16  # of a patch
_WORK = 640  # pixels, the longer side on which blobs are looked for
_LEAST_AREA, _MOST_AREA = 2e-4, 0.6  # of the image
_CONTRAST = 24.0  # least distance from the background, of 255 a channel
_GRID = 3
_WAVES = (1, 2, 4, 8)


class BlobExtractor:
    """See `visualbert.regions.RegionExtractor`."""

    name = "blobs"

    def __init__(self) -> None:
        blank = np.zeros((4, 4, 3), np.uint8)
        self.width = len(_describe(blank, blank[:, :, 0], (0, 0, 4, 4)))

    def __call__(self, image: object) -> Regions:
        pixels, (width, height) = read_image(image)
        shrink = max(1.0, max(pixels.shape[:2]) / _WORK)
        size = [max(1, round(side / shrink)) for side in pixels.shape[:2]]
        if shrink > 1:
            pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BOX))
        difference = _difference(pixels)
        boxes = _blobs(difference) or _grid(difference.shape)
        boxes = [(0, 0, size[1], size[0]), *boxes[: MOST - 1]]
        features = np.stack([_describe(pixels, difference, box) for box in boxes])
        scores = np.array([_strength(difference, box) for box in boxes], np.float32)
        scale = np.array([width / size[1], height / size[0]] * 2)
        return Regions(features, np.array(boxes) * scale, scores, None, (width, height), self.name)


def _difference(pixels: np.ndarray) -> np.ndarray:
    """(H, W) distance of every pixel from the background's colour, in its furthest channel."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0).astype(np.int16)
    difference = np.abs(pixels[:, :, 0] - background[0])
    for channel in (1, 2):
        other = np.abs(pixels[:, :, channel] - background[channel])
        np.maximum(difference, other, out=difference)
    return difference.astype(np.uint8)


def _blobs(difference: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Boxes (x1, y1, x2, y2) of what stands out, largest first; with a grid's among them where one
    blob is most of the image, as in many photos, and says too little of where things are."""
    if difference.max(initial=0) < _CONTRAST or min(difference.shape) < 3:
        return []
    level = max(_CONTRAST, 0.6 * threshold_otsu(difference))
    found = []
    for rows, columns in ndimage.find_objects(label(difference > level, connectivity=2)):
        found.append((columns.start, rows.start, columns.stop, rows.stop))
    shares = {box: _area(box) / difference.size for box in found}
    boxes = [box for box in found if _LEAST_AREA <= shares[box] <= _MOST_AREA]
    if max(shares.values(), default=0) > _MOST_AREA:
        boxes += _grid(difference.shape)
    return sorted(boxes, key=lambda box: (_area(box), box), reverse=True)


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _grid(shape: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Boxes that divide the image evenly."""
    ys, xs = (np.linspace(0, side, min(_GRID, side) + 1).round().astype(int) for side in shape)
    return [
        (int(x1), int(y1), int(x2), int(y2))
        for y1, y2 in itertools.pairwise(ys)
        for x1, x2 in itertools.pairwise(xs)
    ]


def _strength(difference: np.ndarray, box: tuple[int, int, int, int]) -> float:
    x1, y1, x2, y2 = box
    return float(difference[y1:y2, x1:x2].mean() / 255)


def _describe(
    pixels: np.ndarray, difference: np.ndarray, box: tuple[int, int, int, int]
) -> np.ndarray:
    """The vector of one region: patch, gradients, colour, geometry."""
    x1, y1, x2, y2 = box
    inside = difference[y1:y2, x1:x2]
    patch = _square(inside)
    gradients = hog(patch, orientations=8, pixels_per_cell=(4, 4), cells_per_block=(2, 2))
    weights = inside.astype(np.float32) + 1e-3
    colour = np.einsum("hwc,hw->c", pixels[y1:y2, x1:x2], weights) / weights.sum() / 255
    height, width = difference.shape
    place = np.array([x1 / width, y1 / height, x2 / width, y2 / height])
    size = place[2:] - place[:2]
    centre = (place[2:] + place[:2]) / 2
    geometry = np.concatenate([place, size, centre, [size.prod(), np.sqrt(size.prod())]])
    waves = np.concatenate([f(np.pi * k * centre) for k in _WAVES for f in (np.sin, np.cos)])
    return np.concatenate([patch.ravel(), gradients, colour, geometry, waves]).astype(np.float32)


def _square(patch: np.ndarray) -> np.ndarray:
    """The patch in the middle of a square of `SIDE` pixels, its proportions kept, 0 to 1."""
    height, width = patch.shape
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(Image.fromarray(patch).resize(size, Image.Resampling.BILINEAR))
    whole = np.zeros((SIDE, SIDE))
    top, left = (SIDE - size[1]) // 2, (SIDE - size[0]) // 2
    whole[top : top + size[1], left : left + size[0]] = small / max(small.max(initial=0), 1)
    return whole


extractor = BlobExtractor()
