"""How every figure looks, and how it is written.

Fonts are matplotlib's own (DejaVu Sans) and stay text in SVG and PDF, colours are safe for the
colour-blind, and the same figure gives the same bytes. The user's matplotlib settings play no part
and are not changed; pyplot is not used.
"""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visualbert.errors import MissingBackendError, UsageError

INK, PALE, SHADE, MARK = "#222222", "#8a8a8a", "#d55e00", "#0072b2"  # of Okabe and Ito's palette
PALE_MARK = "#9db8cc"
EDGE = 0.08  # inches around a figure
DPI = 200
_LOCK = threading.RLock()
SIZES = {"question": 9, "text": 8, "small": 7}  # points
_SUFFIXES = {
    ".png": {"Software": None},
    ".pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    ".svg": {"Date": None, "Creator": None},
}
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": SIZES["text"],
    "svg.fonttype": "none",
    "svg.hashsalt": "visualbert",
    "pdf.fonttype": 42,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": SIZES["small"],
    "ytick.labelsize": SIZES["small"],
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib's own defaults and `_STYLE`, whatever the user has set; no word about characters
    that the font lacks. One thread at a time, since matplotlib's settings are the process's.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingBackendError(
            "pictures need matplotlib: pip install visualbert[plots]"
        ) from None
    with _LOCK, matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def save_picture(figure: Any, path: Any) -> None:
    """Write a figure as `.png`, `.pdf` or `.svg`, the same bytes every time.

    Raises:
        UsageError: another suffix, or a place that cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UsageError(f"{path}: a picture is written as {', '.join(_SUFFIXES)}")
    written = io.BytesIO()
    with style():
        figure.savefig(written, format=suffix[1:], dpi=DPI, metadata=_SUFFIXES[suffix])
    try:
        path.write_bytes(written.getvalue())
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from None


def clean(text: str) -> str:
    """On one line, without what cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def width_of(text: str, size: float) -> float:
    """Inches that a text takes, in bold: no less than it takes in any other weight."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight="bold")
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def cut(text: str, room: float, size: float = SIZES["text"]) -> str:
    """The text, or as much of its beginning as fits into `room` inches and `…`."""
    if width_of(text[:500], size) <= room and len(text) <= 500:
        return text
    low, high = 0, min(len(text), 500)
    while low < high:
        middle = (low + high + 1) // 2
        fits = width_of(text[:middle].rstrip() + "…", size) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return text[:low].rstrip() + "…"
