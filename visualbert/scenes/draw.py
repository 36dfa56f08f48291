"""Scenes of real handwritten digits, deterministic by seed.

The digits are those of the UCI collection that scikit-learn carries (1797 scans of 8 × 8 pixels).
Training and test scenes are drawn from disjoint sets of scans, so a test asks about handwriting
that training never saw.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from visualbert.errors import UsageError

WIDTH, HEIGHT = 640, 480  # pixels
SPLITS = {"train": 0.7, "test": 0.3}  # share of the scans
COLOURS = {
    "red": (205, 35, 40),
    "green": (40, 145, 60),
    "blue": (40, 80, 205),
    "orange": (240, 135, 20),
    "purple": (125, 50, 160),
    "black": (25, 25, 25),
}
SIZES = {"small": (44, 64), "large": (96, 128)}  # pixels, the height of a digit
FEWEST, MOST = 3, 6
_GAP = 14  # pixels between digits, at least
_TRIES = 300
_OUTLINE = 12  # rows of a digit that its outline goes through


@dataclass(frozen=True)
class Thing:
    """One digit in a scene."""

    digit: int
    colour: str
    size: str
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels
    scan: int  # which of the 1797

    @property
    def centre(self) -> tuple[float, float]:
        """Of the box, in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """What there is to see; `paint` shows it."""

    number: int
    seed: int
    split: str
    things: tuple[Thing, ...]


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images / 16, found.target


@cache
def scans_of(split: str) -> tuple[int, ...]:
    """Which scans the scenes of a split use; no scan is in two splits.

    Raises:
        UsageError: there is no such split.
    """
    if split not in SPLITS:
        raise UsageError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    images, _ = _scans()
    order = np.random.default_rng(0).permutation(len(images))
    bounds = np.cumsum([0, *SPLITS.values()]) * len(images)
    at = list(SPLITS).index(split)
    return tuple(int(i) for i in order[round(bounds[at]) : round(bounds[at + 1])])


def make_scene(number: int, seed: int, split: str = "train") -> Scene:
    """The scene with this number: the same for the same arguments."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split), number])
    _, digits = _scans()
    pool = scans_of(split)
    things: list[Thing] = []
    count = int(rng.integers(FEWEST, MOST + 1))
    while len(things) < count:
        scan = int(rng.choice(pool))
        size = str(rng.choice(list(SIZES)))
        height = int(rng.integers(*SIZES[size]))
        width = max(1, round(height * _ink(scan).shape[1] / _ink(scan).shape[0]))
        box = _place(rng, width, height, things)
        if box is None:
            break
        colour = str(rng.choice(list(COLOURS)))
        things.append(Thing(int(digits[scan]), colour, size, box, scan))
    return Scene(number, seed, split, tuple(things))


def _place(
    rng: np.random.Generator, width: int, height: int, things: list[Thing]
) -> tuple[int, int, int, int] | None:
    """A box that keeps its distance from the others', if one is found."""
    for _ in range(_TRIES):
        x = int(rng.integers(_GAP, WIDTH - width - _GAP))
        y = int(rng.integers(_GAP, HEIGHT - height - _GAP))
        box = (x, y, x + width, y + height)
        if all(_apart(box, thing.box) for thing in things):
            return box
    return None


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[2] + _GAP <= b[0] or b[2] + _GAP <= a[0] or a[3] + _GAP <= b[1] or b[3] + _GAP <= a[1]


@cache
def _ink(scan: int) -> np.ndarray:
    """A scan, enlarged smoothly and cut to what is written."""
    images, _ = _scans()
    image = Image.fromarray((images[scan] * 255).astype(np.uint8))
    large = np.asarray(image.resize((128, 128), Image.Resampling.BICUBIC)) / 255
    written = large > 0.3
    rows, columns = (np.flatnonzero(written.any(axis)) for axis in (1, 0))
    return large[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _share(thing: Thing) -> np.ndarray:
    """(height, width) how much of each pixel of its box is ink, 0 to 1."""
    x1, y1, x2, y2 = thing.box
    ink = Image.fromarray((_ink(thing.scan) * 255).astype(np.uint8))
    drawn = np.asarray(ink.resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)) / 255
    return np.clip((drawn - 0.2) / 0.4, 0, 1)


def outline(thing: Thing) -> list[tuple[int, int]]:
    """A polygon round what is written, in pixels: down its left edge and up its right one."""
    written = _share(thing) > 0.5
    rows = np.flatnonzero(written.any(1))
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, _OUTLINE).round().astype(int))]
    left = written[rows].argmax(1) + thing.box[0]
    right = thing.box[2] - written[rows][:, ::-1].argmax(1)
    heights = [int(row) + thing.box[1] for row in rows]
    down = [(int(x), y) for x, y in zip(left, heights, strict=True)]
    up = [(int(x), y) for x, y in zip(right, heights, strict=True)]
    return [*down, *reversed(up)]


def paint(scene: Scene) -> Image.Image:
    """The scene as an RGB image of `WIDTH` × `HEIGHT`, on paper with a little noise."""
    rng = np.random.default_rng([scene.seed, list(SPLITS).index(scene.split), scene.number, 1])
    paper = rng.integers(225, 256)
    canvas = np.full((HEIGHT, WIDTH, 3), float(paper))
    canvas += rng.normal(0, 3, (HEIGHT, WIDTH, 1))
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        share = _share(thing)[..., None]
        shade = np.array(COLOURS[thing.colour]) + rng.normal(0, 8, 3)
        canvas[y1:y2, x1:x2] = canvas[y1:y2, x1:x2] * (1 - share) + shade * share
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
