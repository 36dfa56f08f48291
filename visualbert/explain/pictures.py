"""What each word looked at, as a figure for a paper.

Everything has its place in inches, which the content decides; text is wrapped or cut to the room
that it has, so nothing is clipped, however long the question, many the regions or odd the image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from visualbert.errors import InputError, MissingBackendError
from visualbert.explain.style import (
    EDGE,
    INK,
    MARK,
    PALE_MARK,
    SHADE,
    SIZES,
    clean,
    cut,
    style,
    width_of,
)

WIDTH = 7.0  # inches, the text width of a paper
_GAP = 0.14  # inches between panels
_LINE = 0.17  # inches, a line of text
_PANEL_AREA, _NARROWEST, _TALLEST = 1.9, 0.95, 2.6  # square inches, inches, inches
_MAIN_HEIGHT, _MAIN_WIDTH = 2.3, 3.9  # inches, at most
_BARS = 3.4  # inches, at most
_SHAPES = 1 / 4, 4.0  # height / width; beyond, pixels are not square
_PANEL_PIXELS = 480  # of the longer side
_WHOLE = 0.95  # of the image, from which on a box is all of it
_STRONGEST = 0.9  # opacity of the strongest shade
_MOST_PANELS, _MOST_ANSWERS, _MOST_LINES = 12, 8, 4
_NAMES = {"[MASK]": "answer"}
_FUNCTION_WORDS = (
    "a an the this that these those is are was were be been being am do does did has have had can "
    "could will would shall should may might must of in on at to from by with for as and or but if "
    "than then there here it its he she they them his her their you your we our i me my what which "
    "who whom whose where when why how [cls] [sep] [pad]"
)


def content_words(words: Sequence[Any]) -> list[int]:
    """Which of the words say something: neither function words, nor punctuation, nor `[CLS]` and
    `[SEP]`; `[MASK]`, where an answer is read, does. All of them if none would be left.
    """
    texts = [_text(word) for word in words]
    ignored = frozenset(_FUNCTION_WORDS.split())
    kept = [
        i
        for i, text in enumerate(texts)
        if text.lower() not in ignored and any(map(str.isalnum, text))
    ]
    return kept or list(range(len(texts)))


def picture(
    image: Any,
    regions: Any,
    words: Sequence[Any],
    grounding: Any,
    answers: Sequence[tuple[str, float]] = (),
    question: str = "",
    panels: Sequence[int] | None = None,
) -> Any:
    """The image with its boxes, the top answers as bars, and a panel for each content word with the
    boxes shaded by what the word looked at.

    Shades are shares of the attention that the word gives to regions (attention to words is set to
    zero, as in the paper), on one scale for all panels; the strongest box is outlined and its share
    stands over the panel.

    Args:
        image: a path, bytes, a PIL image or an array, as `visualbert.regions.image.read_image`.
        regions: `Regions` with boxes, or boxes (V, 4) in pixels of the image.
        words: W words, as text or `(text, first, end)`.
        grounding: (W, V), as `visualbert.explain.grounding` and `rolled_grounding` give it.
        answers: `(text, probability)`, the best first; at most 8 are drawn.
        question: stands above; it is cut after four lines.
        panels: which words get a panel; the content words when left out. Of more than 12, those
            that give most to regions are drawn.

    Returns:
        a `matplotlib.figure.Figure`, 7 inches wide, for `save_picture`. Characters that DejaVu Sans
        lacks are boxes in PNG and PDF.

    Raises:
        InputError: the image is none, or the parts do not fit each other.
        MissingBackendError: matplotlib or Pillow is not installed.
    """
    boxes = _boxes(regions)
    shares = _shares(grounding, len(words), len(boxes))
    bars = [(clean(text), _probability(text, p)) for text, p in answers[:_MOST_ANSWERS]]
    with style():
        photo = _photo(image)
        shown = _chosen(words, grounding, panels) if len(boxes) else []
        page = _Page(photo.shape, _wrapped(question), len(shown))
        page.write_question()
        _draw_photo(page, photo, boxes)
        if bars:
            _draw_answers(page, bars)
        top = max((shares[i].max() for i in shown), default=0.0)
        faded = _faded(photo)
        for at, word in enumerate(shown):
            _draw_word(page, at, faded, boxes, _text(words[word]), shares[word], top)
        if shown:
            _draw_scale(page, top)
    return page.figure


class _Photo(NamedTuple):
    """Pixels (H, W, 3), the image's own width and height, and the height / width it is drawn at."""

    pixels: np.ndarray
    size: tuple[int, int]
    shape: float


def _photo(image: Any) -> _Photo:
    try:
        from visualbert.regions.image import read_image
    except ImportError as error:
        raise MissingBackendError(
            f"pictures need {error.name}: pip install visualbert[images]"
        ) from None
    pixels, (width, height) = read_image(image)
    return _Photo(pixels, (width, height), float(np.clip(height / width, *_SHAPES)))


def _boxes(regions: Any) -> np.ndarray:
    boxes = getattr(regions, "boxes", regions)
    if boxes is None:
        raise InputError("the regions have no boxes: there is no place to draw them")
    boxes = np.asarray(boxes, np.float64)
    boxes = boxes.reshape(0, 4) if not boxes.size else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise InputError(f"boxes has shape {boxes.shape}, expected finite numbers (regions, 4)")
    return boxes


def _shares(grounding: Any, words: int, regions: int) -> np.ndarray:
    """(W, V) with rows that sum to 1, or 0 where a word looked at no region."""
    found = np.asarray(grounding, np.float64)
    if found.shape != (words, regions):
        raise InputError(
            f"grounding has shape {found.shape}, expected {(words, regions)} for {words} words and "
            f"{regions} regions"
        )
    if not (np.isfinite(found) & (found >= 0)).all():
        raise InputError(
            "grounding holds numbers that are no attention (negative, infinite or not a number); a "
            "layer that saw no regions cannot be drawn"
        )
    total = found.sum(1, keepdims=True)
    return np.divide(found, total, np.zeros_like(found), where=total > 0)


def _probability(text: str, value: float) -> float:
    if not 0 <= value <= 1 + 1e-6:
        raise InputError(f"the answer {text!r} has probability {value}, expected 0 to 1")
    return min(float(value), 1.0)


def _chosen(words: Sequence[Any], grounding: Any, panels: Sequence[int] | None) -> list[int]:
    chosen = content_words(words) if panels is None else list(panels)
    outside = [i for i in chosen if not 0 <= i < len(words)]
    if outside:
        raise InputError(f"panels names word {outside[0]} of {len(words)}, counted from 0")
    if len(chosen) > _MOST_PANELS:
        mass = np.asarray(grounding, np.float64).sum(1)
        chosen = sorted(sorted(chosen, key=lambda i: -mass[i])[:_MOST_PANELS])
    return chosen


def _text(word: Any) -> str:
    return word if isinstance(word, str) else word[0]


def _wrapped(question: str) -> list[str]:
    """The question in lines of the figure's width."""
    room, size = WIDTH - 2 * EDGE, SIZES["question"]
    lines: list[str] = []
    words = clean(question[:5000]).split()
    while words and len(lines) < _MOST_LINES:
        taken = 1
        while taken < len(words) and width_of(" ".join(words[: taken + 1]), size) <= room:
            taken += 1
        if len(lines) == _MOST_LINES - 1:
            taken = len(words)
        lines.append(cut(" ".join(words[:taken]), room, size))
        words = words[taken:]
    return lines


class _Page:
    """Where everything stands, in inches from the top left corner."""

    def __init__(self, photo_shape: float, question: list[str], panels: int) -> None:
        from matplotlib.figure import Figure

        usable = WIDTH - 2 * EDGE
        self.question = question
        self.main_top = EDGE + len(question) * _LINE + (0.08 if question else 0)
        self.main_height = min(_MAIN_HEIGHT, _MAIN_WIDTH * photo_shape)
        self.main_width = self.main_height / photo_shape
        wanted = max(_NARROWEST, (_PANEL_AREA / photo_shape) ** 0.5)
        self.columns = _columns(round((usable + _GAP) / (wanted + _GAP)), panels)
        self.cell = (usable - (self.columns - 1) * _GAP) / self.columns
        self.panel_height = min(self.cell * photo_shape, _TALLEST)
        self.panel_width = self.panel_height / photo_shape
        self.panels_top = self.main_top + max(self.main_height, 1.0) + _GAP
        rows = -(-panels // self.columns)
        self.scale_top = self.panels_top + rows * (self.panel_height + _LINE + 0.1)
        self.height = (self.scale_top + 0.34 if panels else self.panels_top - _GAP) + EDGE
        self.figure = Figure(figsize=(WIDTH, self.height))

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        at = (left / WIDTH, 1 - (top + height) / self.height)
        return self.figure.add_axes((*at, width / WIDTH, height / self.height))

    def write(self, left: float, top: float, text: str, **how: Any) -> None:
        """A line whose upper edge is at `top`."""
        how = {"va": "top", "fontsize": SIZES["text"], **how}
        self.figure.text(left / WIDTH, 1 - top / self.height, text, **how)

    def write_question(self) -> None:
        for number, line in enumerate(self.question):
            top = EDGE + number * _LINE
            self.write(EDGE, top, line, fontsize=SIZES["question"], fontweight="bold")


def _columns(wanted: int, panels: int) -> int:
    """About as many as wanted, so that the last row is as full as can be."""
    options = range(max(1, wanted - 1), wanted + 2)
    return min(options, key=lambda n: (-panels % n + abs(n - wanted), abs(n - wanted)))


def _show(axes: Any, photo: _Photo, pixels: np.ndarray) -> None:
    """The image, in the coordinates of its own pixels, under a thin frame."""
    width, height = photo.size
    axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto", interpolation="antialiased")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def _draw_photo(page: _Page, photo: _Photo, boxes: np.ndarray) -> None:
    from matplotlib.patheffects import withStroke

    axes = page.axes(EDGE, page.main_top, page.main_width, page.main_height)
    _show(axes, photo, photo.pixels)
    line = 1.1 if len(boxes) <= 20 else 0.6
    halo = [withStroke(linewidth=2.2 * line, foreground="white")]
    for box in boxes:
        _outline(axes, photo, box, edgecolor=MARK, linewidth=line, path_effects=halo)


def _outline(axes: Any, photo: _Photo, box: np.ndarray, **how: Any) -> None:
    """A box, as far as it is in the image; along the image's edge it covers the frame."""
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box.clip(0, np.tile(photo.size, 2))
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, facecolor="none", clip_on=False, **how))


def percent_of(share: float) -> str:
    """A probability for people."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _draw_answers(page: _Page, bars: list[tuple[str, float]]) -> None:
    """Horizontal bars, the best at the top, each with its text before and its share behind."""
    left = EDGE + page.main_width + 0.3
    room = min(WIDTH - EDGE - left, _BARS)
    size = SIZES["text"]
    texts = [cut(text, 0.45 * room) for text, _ in bars]
    label = max(width_of(text, size) for text in texts) + 0.08
    percent = width_of("100.0 %", size) + 0.08
    height = min(max(page.main_height, 1.0), 0.3 * len(bars))
    axes = page.axes(left + label, page.main_top, room - label - percent, height)
    for row, (text, (_, share)) in enumerate(zip(texts, bars, strict=True)):
        best = row == 0
        axes.barh(row, share, height=0.62, color=MARK if best else PALE_MARK)
        weight = "bold" if best else "normal"
        for x, string, side, offset in (
            (0, text, "right", -0.06),
            (share, percent_of(share), "left", 0.05),
        ):
            axes.annotate(
                string, (x, row), (72 * offset, 0), textcoords="offset points", ha=side,
                va="center_baseline", fontsize=size, fontweight=weight,
                annotation_clip=False,
            )  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(len(bars) - 0.5, -0.5), xticks=[], yticks=[])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_word(
    page: _Page,
    at: int,
    photo: _Photo,
    boxes: np.ndarray,
    word: str,
    shares: np.ndarray,
    top: float,
) -> None:
    row, column = divmod(at, page.columns)
    cell_left = EDGE + column * (page.cell + _GAP)
    left = cell_left + (page.cell - page.panel_width) / 2
    title_top = page.panels_top + row * (page.panel_height + _LINE + 0.1)
    strongest = int(shares.argmax())
    share = f"{shares[strongest]:.0%}".replace("%", " %")
    width = max(page.panel_width, min(page.cell, 0.9))
    title_left = cell_left + (page.cell - width) / 2
    name = _NAMES.get(word, word)
    name = cut(clean(name), width - width_of(share, SIZES["small"]) - 0.08)
    how = {"fontstyle": "italic"} if word in _NAMES else {}
    page.write(title_left, title_top, name, fontweight="bold", **how)
    page.write(
        title_left + width, title_top + 0.012, share, ha="right", fontsize=SIZES["small"]
    )  # fmt: skip
    axes = page.axes(left, title_top + _LINE, page.panel_width, page.panel_height)
    _show(axes, photo, _shaded(photo, boxes, shares / top if top else shares))
    if shares[strongest] > 0:
        _outline(axes, photo, boxes[strongest], edgecolor=INK, linewidth=1.0)


def _faded(photo: _Photo) -> _Photo:
    """Of a panel's size, grey and light, so that the only colour is the shade."""
    from PIL import Image

    longer = _PANEL_PIXELS / max(1.0, photo.shape)
    size = max(1, round(longer)), max(1, round(longer * photo.shape))
    shrinks = photo.pixels.shape[1] > size[0]
    how = Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST
    small = np.asarray(Image.fromarray(photo.pixels).convert("L").resize(size, how))
    grey = 130 + small * (125 / 255)
    return photo._replace(pixels=np.repeat(grey.astype(np.uint8)[..., None], 3, 2))


def _shaded(photo: _Photo, boxes: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """The faded image, every pixel tinted by the strongest box over it.

    A box that is the whole image, where there are others, tints nothing: it would hide them.
    """
    height, width = photo.pixels.shape[:2]
    scale = np.array([width / photo.size[0], height / photo.size[1]] * 2)
    heat = np.zeros((height, width, 1))
    area = (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1) / np.prod(photo.size)
    whole = area >= _WHOLE
    if not whole.all():
        boxes, strengths = boxes[~whole], strengths[~whole]
    for box, strength in zip(boxes * scale, strengths, strict=True):
        x1, y1 = np.floor(box[:2].clip(0)).astype(int)
        x2, y2 = np.ceil(box[2:].clip(0)).astype(int)
        np.maximum(heat[y1:y2, x1:x2], strength, out=heat[y1:y2, x1:x2])
    return _tinted(photo.pixels, heat)


def _tinted(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Grey under a glass of `SHADE`, from clear (0) to strongest (1); what lies below shows."""
    glass = np.array([int(SHADE[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return (pixels * (1 - heat * _STRONGEST * (1 - glass))).astype(np.uint8)


def _draw_scale(page: _Page, top: float) -> None:
    """What the shades mean."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    label = "share of the word’s attention to regions"
    top = top or 1.0
    width = 1.8
    text = width_of(label, SIZES["small"])
    left = EDGE
    page.write(left, page.scale_top + 0.02, label, fontsize=SIZES["small"])
    axes = page.axes(left + text + 0.15, page.scale_top + 0.03, width, 0.1)
    colours = _tinted(np.full((1, 256, 3), 243.0), np.linspace(0, 1, 256)[:, None])
    axes.imshow(colours, extent=(0, top, 0, 1), aspect="auto")
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.tick_params(length=2, pad=1.5, width=0.6)
