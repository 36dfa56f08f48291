"""Any picture becomes regions or is refused in one sentence: every mode, format, orientation and
size, damaged files, arrays and tensors; the embedded extractor on photographs and on scenes, where
its numbers may not change (the shipped checkpoint was trained on them); and how extractors
register.
"""

import io
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from opener import Opener
from PIL import Image, ImageCms

from visualbert.errors import InputError, MissingBackendError, UsageError
from visualbert.inputs.regions import Regions
from visualbert.regions import RegionExtractor, blobs, get_extractor
from visualbert.regions.image import LONGEST, read_image
from visualbert.scenes.draw import make_scene, paint

WIDTH, HEIGHT = 61, 43
SECONDS, MEGABYTES = 5, 800  # of the processor; beyond what the process had before
UPRIGHT_TO_STORED = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose
LOSSY = {"JPEG": 2, "WEBP": 2, "AVIF": 2, "JPEG2000": 2}  # mean difference of a byte, at most


def gradient(width=WIDTH, height=HEIGHT):
    """Smooth, and different in every corner and channel."""
    y, x = np.mgrid[:height, :width]
    channels = x * 255 // width, y * 255 // height, (x + 2 * y) * 255 // (width + 2 * height)
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def png(image, **options):
    return saved(image, "PNG", **options)


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def apart(pixels, image):
    """Mean difference of a byte."""
    expected = np.asarray(image.convert("RGB"), int)
    assert pixels.shape == expected.shape and pixels.dtype == np.uint8
    return np.abs(pixels - expected).mean()


def refused(source):
    with pytest.raises(InputError) as caught:
        read_image(source)
    return str(caught.value)


RGB = gradient()
GREY = RGB.convert("L")
BRIGHT = GREY.point(lambda value: round(value * 255 / GREY.getextrema()[1]))
WIDE_GREY = np.asarray(GREY).astype(np.uint16) * 257


def lab():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(RGB, *profiles, outputMode="LAB")


MODES = {  # the image, what it shows, and the most it may differ
    "1": (GREY.convert("1"), GREY.convert("1"), 0),
    "L": (GREY, GREY, 0),
    "P": (RGB.quantize(200), RGB, 5),
    "RGB": (RGB, RGB, 0),
    "RGBX": (RGB.convert("RGBX"), RGB, 0),
    "CMYK": (RGB.convert("CMYK"), RGB, 0),
    "YCbCr": (RGB.convert("YCbCr"), RGB, 2),
    "HSV": (RGB.convert("HSV"), RGB, 3),
    "LAB": (lab(), RGB, 3),
    "I of bytes": (GREY.convert("I"), GREY, 0),
    "I of 16 bits": (Image.fromarray(WIDE_GREY.astype(np.int32)), GREY, 0),
    "I of 31 bits": (Image.fromarray(WIDE_GREY.astype(np.int32) << 15), BRIGHT, 1),
    "I;16": (Image.fromarray(WIDE_GREY), GREY, 0),
    "I;16B": (Image.frombytes("I;16B", GREY.size, WIDE_GREY.astype(">u2").tobytes()), GREY, 0),
    "F of bytes": (GREY.convert("F"), GREY, 0),
    "F to 1": (Image.fromarray(np.asarray(GREY, np.float32) / np.float32(255)), GREY, 1),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_shows_the_same_picture(name):
    image, shown, most = MODES[name]
    before = image.copy()
    pixels, size = read_image(image)
    assert size == (WIDTH, HEIGHT)
    assert apart(pixels, shown) <= most
    assert image == before


def half_transparent():
    alpha = Image.new("L", RGB.size, 255)
    alpha.paste(0, (0, 0, WIDTH // 2, HEIGHT))
    return alpha


def keyed(image, key):
    image.info["transparency"] = key
    return image


ALPHA = half_transparent()
DOTS = Image.frombytes("P", (2, 1), b"\0\1")
DOTS.putpalette([200, 0, 0, 0, 0, 200])
LETTERS = Image.frombytes("L", (2, 1), b"\x50\x70")
PLAIN = Image.frombytes("RGB", (2, 1), bytes([200, 0, 0, 0, 0, 200]))


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La"])
def test_transparent_is_white(mode):
    image = RGB.copy()
    image.putalpha(ALPHA)
    image = image.convert({"La": "LA"}.get(mode, "RGBA" if mode == "RGBa" else mode)).convert(mode)
    pixels, _ = read_image(image)
    shown = (GREY if mode in ("LA", "La") else RGB).convert("RGB")
    shown.paste("white", (0, 0, WIDTH // 2, HEIGHT))
    assert apart(pixels, shown) == 0


@pytest.mark.parametrize(
    ("image", "left"),
    [
        (keyed(DOTS.copy(), 0), [255, 255, 255]),
        (keyed(DOTS.copy(), b"\0\xff"), [255, 255, 255]),
        (keyed(DOTS.copy(), b"\x80"), [227, 127, 127]),
        (keyed(LETTERS.copy(), 0x50), [255, 255, 255]),
        (keyed(PLAIN.copy(), (200, 0, 0)), [255, 255, 255]),
    ],
    ids=["P by index", "P by bytes", "P half", "L", "RGB"],
)
def test_transparent_colours(image, left):
    right = [0x70] * 3 if image.mode == "L" else [0, 0, 200]
    for source in (image, png(image)):
        pixels, _ = read_image(source)
        np.testing.assert_allclose(pixels[0].astype(int), [left, right], atol=1)


def test_palette_with_an_alpha_channel():
    image = Image.merge("LA", [Image.frombytes("L", (2, 1), b"\0\1"), Image.new("L", (2, 1), 255)])
    image = image.convert("PA")
    image.putpixel((0, 0), (image.getpixel((0, 0))[0], 0))
    assert read_image(image)[0][0].tolist() == [[255] * 3, [1] * 3]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", UPRIGHT_TO_STORED)
def test_pictures_come_out_upright(form, orientation):
    turn = UPRIGHT_TO_STORED[orientation]
    stored = RGB if turn is None else RGB.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if form in LOSSY else {}
    pixels, size = read_image(saved(stored, form, exif=exif, **options))
    assert size == (WIDTH, HEIGHT)
    assert apart(pixels, RGB) <= LOSSY.get(form, 0)


@pytest.mark.parametrize("orientation", [3, 6])
def test_large_pictures_come_out_upright(orientation):
    image = RGB.resize((4001, 2003), Image.Resampling.BILINEAR)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(Image.Transpose(UPRIGHT_TO_STORED[orientation]))
    pixels, size = read_image(saved(stored, "JPEG", exif=exif))
    assert size == (4001, 2003)
    assert apart(pixels, image.resize((LONGEST, 667), Image.Resampling.BOX)) < 1


def broken_exif(data):
    return b"Exif\0\0" + data


@pytest.mark.parametrize(
    "data", [b"", b"MM", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40]
)
def test_broken_metadata_does_not_spoil_a_picture(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for form in ("JPEG", "PNG", "WEBP"):
            exif = broken_exif(data)
            pixels, _ = read_image(saved(RGB, form, exif=exif, **{"quality": 95}))
            assert apart(pixels, RGB) <= LOSSY.get(form, 0)


FORMATS = {
    "PNG": {},
    "JPEG": {"quality": 95},
    "progressive": {"format": "JPEG", "progressive": True, "quality": 95},
    "WEBP": {"quality": 95},
    "lossless": {"format": "WEBP", "lossless": True},
    "AVIF": {"quality": 95},
    "JPEG2000": {},
    "TIFF": {},
    "deflated": {"format": "TIFF", "compression": "tiff_deflate"},
    "lzw": {"format": "TIFF", "compression": "tiff_lzw"},
    "BMP": {},
    "DIB": {},
    "ICO": {"sizes": [(WIDTH, HEIGHT)]},
    "PPM": {},
    "TGA": {},
    "PCX": {},
    "SGI": {},
    "DDS": {},
    "QOI": {},
    "IM": {},
    "MPO": {"quality": 95},
}
LOSSY |= {"progressive": 2, "MPO": 2}


def in_format(name, image=RGB):
    options = {"format": name, **FORMATS[name]}
    if name == "MPO":
        options |= {"save_all": True, "append_images": [Image.new("RGB", image.size)]}
    return saved(image, options.pop("format"), **options)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_from_a_path_bytes_and_a_file(name, tmp_path):
    data = in_format(name)
    path = tmp_path / "picture"
    path.write_bytes(data)
    pixels, size = read_image(path)
    assert size == (WIDTH, HEIGHT)
    assert apart(pixels, RGB) <= LOSSY.get(name, 0)
    with path.open("rb") as file, Image.open(path) as lazy:
        file.seek(7)
        sources = str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), file, lazy
        for source in sources:
            again, _ = read_image(source)
            np.testing.assert_array_equal(again, pixels)
        assert not file.closed
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == data


def test_jpeg_of_printers(tmp_path):
    data = saved(RGB.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data  # whose inks are stored inverted
    assert apart(read_image(data)[0], RGB) < 3


def test_sixteen_bits_a_channel():
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    wide = np.asarray(RGB).astype(">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    data = png_of((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    assert apart(read_image(data)[0], RGB) == 0
    assert apart(read_image(png(Image.fromarray(WIDE_GREY)))[0], GREY) == 0
    assert apart(read_image(saved(Image.fromarray(WIDE_GREY), "TIFF"))[0], GREY) == 0


def png_of(*chunks):
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_frames_and_pages_the_first_counts(form):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue", "lime")]
    data = saved(
        frames[0],
        form,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if form == "WEBP" else {}),
    )
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
        assert apart(read_image(data)[0], frames[0]) == 0
        image.seek(1)
        assert apart(read_image(image)[0], frames[1]) == 0  # that the caller chose


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (2, 3), (1334, 5), (5, 2667)])
def test_extreme_sizes(form, size):
    data = saved(Image.new("RGB", size, (10, 200, 30)), form)
    pixels, found = read_image(data)
    assert found == size
    assert max(pixels.shape[:2]) == min(LONGEST, max(size)) and min(pixels.shape[:2]) >= 1
    np.testing.assert_allclose(pixels.reshape(-1, 3), [[10, 200, 30]] * (pixels.size // 3), atol=2)
    found = get_extractor()(data)
    sane(found, size)


def sane(found, size):
    """Regions as every consumer expects them: the whole image first, all boxes inside it."""
    assert isinstance(found, Regions) and 2 <= len(found) <= blobs.MOST
    assert found.image_size == size and found.provenance == "blobs"
    assert found.features.shape == (len(found), 573) and np.isfinite(found.features).all()
    np.testing.assert_allclose(found.boxes[0], [0, 0, *size], rtol=1e-6)
    x1, y1, x2, y2 = found.boxes.T
    assert (x1 >= 0).all() and (y1 >= 0).all() and (x1 < x2).all() and (y1 < y2).all()
    assert (x2 <= size[0] + 1e-2).all() and (y2 <= size[1] + 1e-2).all()
    assert ((found.scores >= 0) & (found.scores <= 1)).all()


@pytest.mark.parametrize("name", ["RGB", "P", "I of 31 bits", "I;16B", "F to 1", "CMYK", "RGBA"])
def test_strips_do_not_show(name):
    """An image so large that it is converted in strips looks as its small self does."""
    small = RGB.convert("RGBA") if name == "RGBA" else MODES[name][0]
    large = small.resize((61 * 70, 43 * 70), Image.Resampling.NEAREST)
    pixels, size = read_image(large)
    assert size == (61 * 70, 43 * 70) and pixels.shape == (940, LONGEST, 3)
    again = Image.fromarray(read_image(small)[0]).resize((LONGEST, 940), Image.Resampling.NEAREST)
    assert apart(pixels, again) < 1


ARRAYS = {
    "bytes": (np.asarray(RGB), RGB, 0),
    "grey": (np.asarray(GREY), GREY, 0),
    "one channel": (np.asarray(GREY)[..., None], GREY, 0),
    "alpha": (np.asarray(RGB.convert("RGBA")), RGB, 0),
    "16 bits": (np.asarray(RGB).astype(np.uint16) * 257, RGB, 0),
    "big-endian": (np.asarray(RGB).astype(">u2") * 257, RGB, 0),
    "float64": (np.asarray(RGB) / 255, RGB, 1),
    "float16": ((np.asarray(RGB) / 255).astype(np.float16), RGB, 1),
    "booleans": (np.asarray(GREY.convert("1")), GREY.convert("1"), 0),
    "backwards": (np.asarray(RGB)[::-1], RGB.transpose(Image.Transpose.FLIP_TOP_BOTTOM), 0),
    "read-only": (np.broadcast_to(np.uint8(7), (HEIGHT, WIDTH)), Image.new("L", RGB.size, 7), 0),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name):
    array, shown, most = ARRAYS[name]
    before = array.copy()
    pixels, size = read_image(array)
    assert size == (WIDTH, HEIGHT)
    assert apart(pixels, shown) <= most
    np.testing.assert_array_equal(array, before)


WANTED = (
    "expected (height, width), (height, width, 3) or (height, width, 4) of uint8, uint16, "
    "booleans, or floats from 0 to 1"
)


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.zeros((0, 5), np.uint8), "shape (0, 5) and type uint8"),
        (np.zeros((3, 40, 50), np.uint8), "shape (3, 40, 50) and type uint8"),
        (np.zeros((1, 40, 50, 3), np.uint8), "shape (1, 40, 50, 3) and type uint8"),
        (np.zeros(7, np.uint8), "shape (7,) and type uint8"),
        (np.float32(0.5), "shape () and type float32"),
        (np.zeros((4, 5, 2), np.uint8), "shape (4, 5, 2) and type uint8"),
        (np.zeros((4, 5), np.int64), "shape (4, 5) and type int64"),
        (np.zeros((4, 5), np.int8), "shape (4, 5) and type int8"),
        (np.zeros((4, 5), np.uint32), "shape (4, 5) and type uint32"),
        (np.zeros((4, 5), complex), "shape (4, 5) and type complex128"),
        (np.full((4, 5), None), "shape (4, 5) and type object"),
        (np.full((4, 5), "a"), "shape (4, 5) and type <U1"),
        (np.zeros((4, 5), "datetime64[s]"), "shape (4, 5) and type datetime64[s]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_that_are_no_images(array, what):
    assert refused(array) == f"the image has {what}, {WANTED}"


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([0, np.nan], "nan to nan"),
        ([0, np.inf], "0 to inf"),
        ([-0.5, 1], "-0.5 to 1"),
        ([0, 255], "0 to 255"),
    ],
)
def test_floats_beyond_their_range(values, what):
    assert refused(np.array([values], float)) == (
        f"the image has floats from {what}, expected 0 to 1; divide them by 255 if they are "
        "bytes, or clip them"
    )


def test_an_array_of_too_many_pixels():
    array = np.broadcast_to(np.uint8(0), (1 << 20, 1 << 20))
    assert refused(array) == "the image: more than 134217728 pixels; scale it down"


@pytest.mark.parametrize(
    "framework", ["torch", pytest.param("tensorflow", marks=pytest.mark.slow), "jax.numpy"]
)
def test_tensors(framework):
    module = pytest.importorskip(framework)
    make = {"torch": "tensor", "tensorflow": "constant", "jax.numpy": "asarray"}[framework]
    tensor = getattr(module, make)(np.array(RGB))
    assert apart(read_image(tensor)[0], RGB) == 0
    assert refused(getattr(module, make)(np.zeros((3, 40, 50), np.uint8))) == (
        f"the image has shape (3, 40, 50) and type uint8, {WANTED}"
    )


def test_a_tensor_that_wants_gradients():
    torch = pytest.importorskip("torch")
    message = refused(torch.zeros(4, 5, requires_grad=True))
    assert message.startswith("the image: no array can be made of it (Can't call numpy() on Tensor")


@pytest.mark.parametrize("source", [None, 3, ["a.png"], {}, object(), lambda: 0])
def test_things_that_are_no_images(source):
    assert refused(source) == (
        "an image is a path, the bytes of a file, an open file, a PIL image or an array; "
        f"got {type(source).__name__}"
    )


def test_paths_that_lead_nowhere(tmp_path):
    missing = tmp_path / "nothing.png"
    assert refused(missing) == f"{missing}: cannot be read: No such file or directory"
    assert refused(str(tmp_path)) == f"{tmp_path}: not a file"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert refused(pipe) == f"{pipe}: not a file"
    empty = tmp_path / "empty.png"
    empty.touch()
    assert refused(empty) == f"{empty}: not an image of a known format"
    text = tmp_path / "text.png"
    text.write_text("hello " * 999)
    assert refused(text) == f"{text}: not an image of a known format"
    with text.open() as file:
        assert refused(file) == ('the image: the file is open as text; open it with mode "rb"')
    assert refused(b"") == "the image: not an image of a known format"
    assert refused("x" * 9999) == f"{'x' * 200}: cannot be read: File name too long"
    assert refused("") == ": cannot be read: No such file or directory"


@pytest.mark.parametrize(
    "address", ["https://host/a.png", "HTTP://host/a", "s3://b/a.png", "data:image/png;base64,iV"]
)
def test_addresses_are_not_downloaded(address):
    assert refused(address) == (f"{address}: addresses are not downloaded; give the path of a file")


def test_a_closed_or_damaged_pil_image():
    image = Image.open(io.BytesIO(png(RGB)[:300]))
    assert refused(image).startswith("the image: the image is damaged (")
    image = Image.open(io.BytesIO(png(RGB)))
    image.close()
    assert refused(image).startswith("the image: the image is damaged (")


def test_programs_are_not_run():
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    assert refused(data) == (
        "the image: PostScript is a program, which is not run; give its picture"
    )


def test_importing_leaves_the_bomb_check_of_pillow_alone():
    code = (
        "from PIL import Image; before = Image.MAX_IMAGE_PIXELS; import visualbert.regions.blobs; "
        "assert before is not None and Image.MAX_IMAGE_PIXELS == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


WORKER = """
import resource, warnings
from visualbert.regions import get_extractor

warnings.simplefilter("ignore")
extract = get_extractor()

def attempt(path):
    return {"outcome": "regions", "text": str(len(extract(path)))}

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""


class Worker:
    """The process that opens what the tests give it, and may write nothing."""

    def __init__(self, folder):
        self.path = folder / "picture"
        self.opener = Opener(
            WORKER, "regions", seconds=SECONDS, patience=8 * SECONDS, megabytes=MEGABYTES
        )

    def open(self, data, name):
        self.path.write_bytes(data)
        answer = self.opener.ask(str(self.path), name)
        assert len(answer["text"]) < 300 + len(str(self.path)), (name, answer)
        return answer


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    made = Worker(tmp_path_factory.mktemp("worker"))
    yield made
    made.opener.stop()
    assert list(made.path.parent.iterdir()) == [made.path]


@pytest.mark.parametrize("name", FORMATS)
def test_truncated_anywhere(name, worker):
    data = in_format(name)
    refusals = 0
    for share in range(0, 100, 5):
        answer = worker.open(data[: len(data) * share // 100], f"{share} % of a {name}")
        refusals += answer["outcome"] == "refused"
    assert refusals >= 13  # the rest decodes without its end
    assert worker.open(data, name)["outcome"] == "regions"


@pytest.mark.parametrize("name", FORMATS)
def test_flipped_bits(name, worker):
    rng = random.Random(name)
    whole = in_format(name)
    for attempt in range(30):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4, 30])):
            at = rng.randrange(rng.choice([64, len(data)]))
            data[at % len(data)] ^= 1 << rng.randrange(8)
        worker.open(bytes(data), f"{name} {attempt}")


def header(width, height):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def bmp(width, height):
    data = bytearray(in_format("BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def jpeg(width, height, **options):
    data = saved(RGB, "JPEG", **options)
    at = data.index(b"\xff\xc2" if options else b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def gif(width, height):
    data = bytearray(saved(RGB, "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def icon(width, height):
    """An icon of 16 × 16 pixels by its directory, and of more by the picture in it."""
    data = png_of(header(width, height), (b"IDAT", zlib.compress(b"\0" * 999)), (b"IEND", b""))
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(data), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + data


BOMBS = {
    "PNG": png_of(header(20000, 20000), (b"IDAT", zlib.compress(b"\0" * 60_000_000, 9))),
    "PNG of 2^62": png_of(header((1 << 31) - 1, (1 << 31) - 1), (b"IDAT", b"")),
    "BMP": bmp(20000, 20000),
    "PPM": b"P6 20000 20000 255\n" + bytes(99),
    "PPM of many digits": b"P6 " + b"9" * 5000 + b" 1 255\n",
    "JPEG": jpeg(20000, 20000),
    "progressive": jpeg(65500, 65500, progressive=True),
    "GIF": gif(20000, 20000),
    "ICO": icon(20000, 20000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_of_huge_pictures_are_refused(name, worker):
    answer = worker.open(BOMBS[name], name)
    assert answer["outcome"] == "refused" and answer["megabytes"] < 100
    if not name.endswith("digits"):
        assert answer["text"] == (f"{worker.path}: more than 134217728 pixels; scale it down")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "size"), [("RGBA", (20000, 6700)), ("P", (6700, 20000)), ("F", (20000, 1500))]
)
def test_the_largest_pictures_fit(mode, size, worker):
    form = "TIFF" if mode == "F" else "PNG"
    options = {"compression": "tiff_lzw"} if mode == "F" else {"compress_level": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = saved(Image.new(mode, size), form, **options)
    answer = worker.open(data, mode)
    assert answer["outcome"] == "regions", answer
    assert answer["megabytes"] < 4 * np.prod(size) / 2**20 + 100, answer


def test_text_that_inflates(worker):
    text = b"k\0\0" + zlib.compress(bytes(200_000_000), 9)
    data = png(RGB)
    bomb = png_of((b"zTXt", text))[8:]
    answer = worker.open(data[:33] + bomb + data[33:], "zTXt")
    assert answer["megabytes"] < 100


@pytest.mark.parametrize("kind", ["noise", "checks", "dust"])
def test_busy_pictures_are_bounded(kind, worker):
    rng = np.random.default_rng(0)
    pixels = {
        "noise": rng.integers(0, 256, (1000, 1300, 3)),
        "checks": np.indices((1000, 1300)).sum(0) % 2 * 255,
        "dust": (rng.random((1000, 1300)) < 0.05) * 255,
    }[kind].astype(np.uint8)
    answer = worker.open(png(Image.fromarray(pixels)), kind)
    assert answer["outcome"] == "regions" and answer["seconds"] < 2


def photographs():
    """Those that scikit-image and scikit-learn carry."""
    import skimage.data
    import sklearn.datasets

    folders = Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"
    found = (path for folder in folders for path in folder.glob("*.[jp][pn]g"))
    return {path.stem: path for path in found}


PHOTOGRAPHS = photographs()


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs(name):
    with Image.open(PHOTOGRAPHS[name]) as image:
        size = image.size
    found = get_extractor()(PHOTOGRAPHS[name])
    sane(found, size)
    share = np.prod(found.boxes[1:, 2:] - found.boxes[1:, :2], axis=1) / np.prod(size)
    assert (np.diff(share) < 0.01).all()  # largest first, up to the rounding of a grid
    assert len({tuple(box) for box in found.boxes.tolist()}) == len(found)


def test_a_flower_on_leaves_is_one_region():
    boxes = get_extractor()(PHOTOGRAPHS["flower"]).boxes
    np.testing.assert_allclose(boxes[1], [168, 85, 469, 427], atol=6)
    assert len(boxes) < 8


@pytest.mark.parametrize("name", ["brick", "chelsea", "motorcycle_left"])
def test_a_grid_where_one_blob_is_most_of_the_picture(name):
    found = get_extractor()(PHOTOGRAPHS[name])
    width, height = found.image_size
    edges = np.linspace(0, 1, 4)
    for x, y in np.ndindex(3, 3):
        cell = [edges[x] * width, edges[y] * height, edges[x + 1] * width, edges[y + 1] * height]
        assert np.abs(found.boxes - cell).max(axis=1).min() < 2


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (10, 200, 30)])
def test_a_grid_where_there_is_nothing(colour):
    found = get_extractor()(Image.new("RGB", (90, 60), colour))
    assert found.boxes[1:].tolist() == [
        [x, y, x + 30, y + 20] for y in (0, 20, 40) for x in (0, 30, 60)
    ]
    assert (found.scores == 0).all()


@pytest.mark.parametrize(("contrast", "regions"), [(22, 10), (26, 2)])
def test_how_faint_a_blob_may_be(contrast, regions):
    image = Image.new("RGB", (90, 60), (120, 120, 120))
    image.paste((120, 120 + contrast, 120), (7, 9, 30, 31))
    found = get_extractor()(image)
    assert len(found) == regions
    assert (found.boxes[1].tolist() == [7, 9, 30, 31]) == (regions == 2)


def test_boxes_are_in_pixels_of_the_whole_image():
    image = Image.new("RGB", (6000, 3000), "white")
    image.paste("navy", (1500, 600, 2700, 2100))
    image.paste("red", (4200, 300, 4800, 900))
    found = get_extractor()(image)
    expected = [[0, 0, 6000, 3000], [1500, 600, 2700, 2100], [4200, 300, 4800, 900]]
    np.testing.assert_allclose(found.boxes, expected, atol=12)


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(number, 5, "test") for number in range(20)]


def test_every_digit_of_a_scene_is_a_region(scenes):
    for scene in scenes:
        boxes = get_extractor()(paint(scene)).boxes[1:].astype(int).tolist()
        assert len(boxes) >= len(scene.things)
        for thing in scene.things:
            assert max(overlap(box, thing.box) for box in boxes) > 0.6, (scene.number, thing)


def overlap(a, b):
    """Intersection over union."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(0, width) * max(0, height)
    return shared / (sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - shared)


def test_the_numbers_that_the_shipped_checkpoint_was_trained_on():
    """Boxes to the pixel; of the vectors a projection and some entries. Another release of Pillow
    or NumPy may round otherwise (the mean colour of a whole image is summed in float32, to 0.002),
    another filter, cell or scale moves them by ten times the tolerance.
    """
    found = get_extractor()(paint(make_scene(3, 0, "test")))
    assert found.boxes.tolist() == [
        [0, 0, 640, 480],
        [41, 44, 121, 155],
        [345, 74, 419, 191],
        [389, 417, 421, 465],
    ]
    assert found.features.shape == (4, 573) and found.features.dtype == np.float32
    projected = found.features @ np.cos(np.arange(573))
    np.testing.assert_allclose(projected, [-1.9873, 2.4175, 2.7200, -2.0177], atol=0.005)
    sums = found.features.sum(1)
    np.testing.assert_allclose(sums, [50.3496, 134.7758, 114.7195, 131.8053], atol=0.02)
    entries = found.features[1, [0, 100, 130, 256, 300, 400, 500, 544, 547, 560, 572]]
    expected = [0, 0.78894, 0.01005, 0.37943, 0.33394, 0.3012, 0.00197, 0.17416, 0.06406, 0.79534]
    np.testing.assert_allclose(entries, [*expected, 0.47716], atol=0.004)
    scores = [0.0330, 0.3967, 0.3751, 0.4165]
    np.testing.assert_allclose(found.scores, scores, atol=0.001)


def test_threads_see_what_one_sees(scenes):
    files = [png(paint(scene)) for scene in scenes[:8]]
    extract = get_extractor()
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(map(extract, files), pool.map(extract, files), strict=True):
            np.testing.assert_array_equal(one.features, other.features)
            np.testing.assert_array_equal(one.boxes, other.boxes)


def test_the_embedded_extractor():
    extract = get_extractor()
    assert extract is get_extractor("blobs") and isinstance(extract, RegionExtractor)
    assert (extract.name, extract.width) == ("blobs", 573)


THEIRS = """
import numpy as np
from visualbert.inputs.regions import Regions
from visualbert.regions.image import read_image

class Whole:
    name, width = "whole", 3

    def __call__(self, image):
        pixels, size = read_image(image)
        return Regions(pixels.mean((0, 1))[None], [[0, 0, *size]], None, None, size, self.name)

whole = Whole()
number = 3
"""


@pytest.fixture
def installed(tmp_path):
    """A package with extractors, as pip would have put it there."""
    (tmp_path / "their_detectors.py").write_text(THEIRS)
    (tmp_path / "their_broken.py").write_text("raise RuntimeError('no\\n driver')")
    (tmp_path / "their_needy.py").write_text("import a_library_that_is_not_there.inside")
    (tmp_path / "their_old.py").write_text("from visualbert.regions import NotThere")
    information = tmp_path / "their_detectors-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: their-detectors\nVersion: 1"
    )
    points = {
        "whole": "their_detectors:whole",
        "kind": "their_detectors:Whole",
        "number": "their_detectors:number",
        "nothing": "their_detectors:nothing",
        "broken": "their_broken:whole",
        "needy": "their_needy:whole",
        "old": "their_old:whole",
        "blobs": "their_broken:whole",
    }
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (information / "entry_points.txt").write_text(f"[visualbert.extractors]\n{lines}")
    get_extractor.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        yield
    get_extractor.cache_clear()


def test_an_extractor_of_another_package(installed):
    extract = get_extractor("whole")
    assert isinstance(extract, RegionExtractor) and extract.width == 3
    assert extract(Image.new("RGB", (8, 4), (1, 2, 3))).features.tolist() == [[1, 2, 3]]
    assert get_extractor("blobs").width == 573  # which no other package replaces


ORDER = "it has to be an object with a name and a width that is called with an image"
BROKEN = {
    "broken": (UsageError, "(their_broken:whole) cannot be loaded: RuntimeError: no driver"),
    "nothing": (
        UsageError,
        "(their_detectors:nothing) cannot be loaded: AttributeError: module 'their_detectors' has "
        "no attribute 'nothing'",
    ),
    "number": (UsageError, f"(their_detectors:number) is no extractor but 3; {ORDER}"),
    "kind": (
        UsageError,
        "(their_detectors:Whole) is no extractor but <class 'their_detectors.Whole'>; " + ORDER,
    ),
    "needy": (
        MissingBackendError,
        "(their_needy:whole) needs a_library_that_is_not_there: pip install their-detectors",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_extractor_of_another_package(name, installed):
    kind, text = BROKEN[name]
    with pytest.raises(kind) as caught:
        get_extractor(name)
    assert str(caught.value) == f"extractor {name!r} {text}"


def test_an_extractor_for_another_release(installed):
    with pytest.raises(UsageError) as caught:
        get_extractor("old")
    assert "(their_old:whole) cannot be loaded: ImportError: cannot import name" in str(
        caught.value
    )


def test_an_unknown_extractor():
    with pytest.raises(UsageError) as caught:
        get_extractor("frcnn")
    assert str(caught.value) == "unknown extractor 'frcnn'; expected one of blobs"


@pytest.mark.parametrize("library", ["skimage", "PIL", "scipy"])
def test_a_library_that_is_missing(library):
    code = f"""
import sys
sys.modules[{library!r}] = None
from visualbert.errors import MissingBackendError
from visualbert.regions import get_extractor
try:
    get_extractor()
except MissingBackendError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"extractor 'blobs' (visualbert.regions.blobs:extractor) needs {library}: "
        "pip install visualbert[images]\n"
    )
