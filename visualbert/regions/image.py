"""Any picture as 8-bit RGB of a bounded size, upright and without transparency."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from visualbert.errors import InputError

LONGEST = 1333  # pixels, as detectors of the field bound an image
_MOST_PIXELS = 1 << 27  # half a gigabyte decoded, below what Pillow itself refuses
_STRIP = 1 << 20  # pixels converted at a time
_BACKGROUND = "white"
_WHITE = (1.0, 255.0, 65535.0)  # where greys wider than a byte may end
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


def read_image(source: Any) -> tuple[np.ndarray, tuple[int, int]]:
    """The image as bytes (H, W, 3), scaled so that its longer side is at most `LONGEST`; and its
    own width and height. Of several frames or pages it is the first.

    Args:
        source: a path, the bytes of a file, a file open for reading, a PIL image, or an array or
            tensor (H, W), (H, W, 3) or (H, W, 4) of bytes, 16-bit numbers, booleans, or floats
            from 0 to 1.

    Raises:
        InputError: it is no image, is damaged, or has more than 2^27 pixels.
    """
    label = str(source)[:200] if isinstance(source, str | os.PathLike) else "the image"
    try:
        with _opened(source, label) as image:
            return _upright(image, label, draft=image is not source)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{label}: not an image of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(label) from None
    except Exception as error:  # decoders raise whatever a damaged file makes them trip over
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{label}: cannot be read: {error.strerror}") from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{label}: the image is damaged ({reason})") from None


@contextmanager
def _opened(source: Any, label: str) -> Iterator[Image.Image]:
    """The image, not yet decoded where its format allows."""
    if isinstance(source, Image.Image):
        yield source
    elif isinstance(source, str | os.PathLike):
        if _ADDRESS.match(label):
            raise InputError(f"{label}: addresses are not downloaded; give the path of a file")
        if os.path.exists(source) and not os.path.isfile(source):  # a pipe would block
            raise InputError(f"{label}: not a file")
        with open(source, "rb") as file:
            yield _open(file, label)
    elif isinstance(source, bytes | bytearray | memoryview):
        yield _open(io.BytesIO(source), label)
    elif hasattr(source, "read"):
        if source.read(0) != b"":
            raise InputError(f'{label}: the file is open as text; open it with mode "rb"')
        yield _open(source, label)
    else:
        yield _from_array(source, label)


def _open(file: Any, label: str) -> Image.Image:
    image = Image.open(file)
    if image.format == "EPS":
        raise InputError(f"{label}: PostScript is a program, which is not run; give its picture")
    return image


def _too_large(label: str) -> InputError:
    return InputError(f"{label}: more than {_MOST_PIXELS} pixels; scale it down")


def _from_array(source: Any, label: str) -> Image.Image:
    if not hasattr(source, "__array__"):
        raise InputError(
            "an image is a path, the bytes of a file, an open file, a PIL image or an array; "
            f"got {type(source).__name__}"
        )
    try:
        array = np.asarray(source)
    except Exception as error:  # a tensor on another device, or one that wants gradients
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{label}: no array can be made of it ({reason})") from None
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    known = array.dtype.kind in "bf" or array.dtype in (np.uint8, np.uint16)
    if not fits or 0 in array.shape or not known:
        raise InputError(
            f"{label} has shape {array.shape} and type {array.dtype}, expected (height, width), "
            "(height, width, 3) or (height, width, 4) of uint8, uint16, booleans, or floats from "
            "0 to 1"
        )
    if array.shape[0] * array.shape[1] > _MOST_PIXELS:
        raise _too_large(label)
    if array.dtype.kind in "bf":
        low, high = array.min(), array.max()
        if not 0 <= low <= high <= 1:  # false of NaN too
            raise InputError(
                f"{label} has floats from {low:g} to {high:g}, expected 0 to 1; divide them by 255 "
                "if they are bytes, or clip them"
            )
        array = array * np.float32(255)
    elif array.dtype == np.uint16:
        array = array >> 8
    return Image.fromarray(array.astype(np.uint8))


def _upright(image: Image.Image, label: str, draft: bool) -> tuple[np.ndarray, tuple[int, int]]:
    """`read_image` of an opened image; `draft` lets a JPEG be decoded at a fraction of its size."""
    width, height = image.size
    if width * height > _MOST_PIXELS:
        raise _too_large(label)
    drafted = image.draft("RGB", _within(width, height)) if draft else None
    image.load()
    if not drafted:
        width, height = image.size  # which TIFF and ICO know only now
    turn = _TURNS.get(_orientation(image))
    image = _reduced(image, max(1, int(max(image.size) / LONGEST / 2)))
    if turn is not None:
        image = image.transpose(turn)
        if turn in (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8]):
            width, height = height, width
    if image.size != _within(width, height):
        image = image.resize(_within(width, height), Image.Resampling.BOX)
    return np.asarray(image), (width, height)


def _within(width: int, height: int) -> tuple[int, int]:
    scale = max(1.0, max(width, height) / LONGEST)
    return max(1, round(width / scale)), max(1, round(height / scale))


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # broken metadata does not spoil a picture
        return None


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """RGB, every `factor` × `factor` pixels averaged; in strips, as memory is for one copy."""
    rows = factor * max(1, _STRIP // (factor * image.width))
    wide = image.mode[0] in "IF"
    white = max(_white(strip) for _, strip in _strips(image, rows)) if wide else 0.0
    if factor == 1:
        return _rgb(image, white)
    whole = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top, strip in _strips(image, rows):
        whole.paste(_rgb(strip, white).reduce(factor), (0, top // factor))
    return whole


def _strips(image: Image.Image, rows: int) -> Iterator[tuple[int, Image.Image]]:
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _white(image: Image.Image) -> float:
    """The value that is white in a grey image wider than a byte."""
    if image.mode.startswith("I;16"):
        return 65535.0
    highest = float(_finite(image).max(initial=0))
    ends = _WHITE if image.mode == "F" else _WHITE[1:]
    return next((end for end in ends if highest <= end), highest)


def _finite(image: Image.Image, infinity: float = 0.0) -> np.ndarray:
    return np.nan_to_num(np.asarray(image, np.float32), posinf=infinity, neginf=0.0)


def _rgb(image: Image.Image, white: float) -> Image.Image:
    """Three channels of eight bits, laid on white where the image is transparent."""
    if white:
        grey = np.rint(_finite(image, white).clip(0, white) * np.float32(255 / white))
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.new("RGBA", over.size, _BACKGROUND)
        image.alpha_composite(over)
    return image.convert("RGB")
