"""Attacks on every reader but torch's pickles (`test_torch_files.py`): each file is loaded right or
refused in one sentence, within five seconds and a few megabytes, and no file appears anywhere.

All of them are opened in a process of their own, which may not grow and is not allowed to crash.
"""

import contextlib
import gzip
import importlib.util
import io
import json
import os
import random
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from opener import Opener
from tiny import random_tensors, tiny_config

from visualbert import VisualBertError
from visualbert.checkpoint.archives import read_yaml
from visualbert.checkpoint.flax_files import write_msgpack
from visualbert.checkpoint.keras_files import write_keras
from visualbert.checkpoint.tensors import ArrayTensors
from visualbert.checkpoint.tf_bundle import _masked_crc32c
from visualbert.checkpoint.write import write_folder
from visualbert.cli.convert import _native
from visualbert.schema import parameters

CHOICE = "VisualBertForMultipleChoice"
CONFIG = tiny_config(num_labels=2, architectures=(CHOICE,), num_hidden_layers=1)
PARAMS = parameters(CHOICE, CONFIG)
SECONDS = 5  # of the processor
MEGABYTES = 300  # that opening and reading may add to a process of about as many

WORKER = """
import hashlib, os, resource, signal
from pathlib import Path
from visualbert import VisualBertConfig
from visualbert.checkpoint import archives, flax_files, keras_files, read, tf_bundle, torch_files
from visualbert.checkpoint.open import open_checkpoint
from visualbert.config import read_json_object
import tensorstore

def archive(path):
    found = archives.open_archive(path)
    return torch_files.TorchFiles("x", [Path(found.name)], [found.weights])

READERS = {
    "safetensors": lambda path: read.SafetensorsFiles("x", [path]),
    "keras": lambda path: keras_files.KerasFile("x", path),
    "msgpack": lambda path: flax_files.MsgpackFile("x", path),
    "orbax": lambda path: flax_files.OrbaxFolder("x", path),
    "bundle": lambda path: tf_bundle.BundleFiles("x", path),
    "folder": read.read_weights,
    "archive": archive,
    "yaml": archives.read_yaml,
    "json": read_json_object,
    "config": VisualBertConfig.from_pretrained,
    "open": lambda path: open_checkpoint(path).tensors,
    "a crash": lambda path: os.kill(os.getpid(), signal.SIGSEGV),
    "another error": lambda path: {}["x"],
    "a file": lambda path: Path(os.environ["TMPDIR"], "left").touch(),
}

def digest(found):
    if not hasattr(found, "specs"):
        return {}
    arrays = {name: found.read(name) for name in found.specs}
    return {
        name: [a.dtype.name, list(a.shape), hashlib.sha1(a.tobytes()).hexdigest()]
        for name, a in arrays.items()
    }

def attempt(request):
    reader, path = request
    return {"outcome": "loaded", "text": "", "digest": digest(READERS[reader](Path(path)))}

resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
"""


class Worker:
    """The process that opens what the tests give it, and may leave no file."""

    def __init__(self, folder):
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.opener = Opener(
            WORKER,
            "loaded",
            seconds=SECONDS,
            patience=4 * SECONDS,
            megabytes=MEGABYTES,
            cwd=folder,
            env={**os.environ, "TMPDIR": str(self.temporary)},
        )

    def open(self, reader, path):
        """What came of it: "loaded" or "refused", the text, and a digest of every tensor."""
        answer = self.opener.ask([reader, str(path)], f"{path} ({reader})")
        text = answer["text"]
        assert text.isprintable() and len(text) < 700 + 3 * len(str(path)), text
        assert os.listdir(self.temporary) == []
        return answer

    def refuse(self, reader, path):
        answer = self.open(reader, path)
        assert answer["outcome"] == "refused"
        return answer["text"]

    def load(self, reader, path):
        answer = self.open(reader, path)
        assert answer["outcome"] == "loaded", answer["text"]
        return answer["digest"]


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    made = Worker(folder)
    yield made
    made.opener.stop()
    assert os.listdir(folder) == ["temporary"]


def random_arrays():
    tensors = random_tensors(CHOICE, CONFIG)
    return ArrayTensors("x", {name: tensors.read(name) for name in tensors.specs})


def native(write):
    return lambda path: write(path, random_arrays(), PARAMS, lambda size: None)


def torch_bytes():
    import torch

    file = io.BytesIO()
    torch.save({n: torch.from_numpy(a) for n, a in random_arrays().arrays.items()}, file)
    return file.getvalue()


def member(name, data=b"", **fields):
    made = tarfile.TarInfo(name)
    made.size = len(data)
    for key, value in fields.items():
        setattr(made, key, value)
    return made, data


def tar(*members, form=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for made, data in members:
            archive.addfile(made, io.BytesIO(data))
    return file.getvalue()


def write_bundle(prefix):
    import tensorflow as tf

    arrays = random_arrays().arrays
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(arrays),
        shape_and_slices=[""] * len(arrays),
        tensors=[tf.constant(array) for array in arrays.values()],
    )


YAML = b"model_config:\n  visual_bert:\n    num_attention_heads: 3\n    hidden_act: gelu\n"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One whole file, or folder, of every format."""
    root = tmp_path_factory.mktemp("originals")
    write_folder(root / "canonical", random_arrays(), CONFIG)
    shutil.copy(root / "canonical" / "model.safetensors", root / "safetensors")
    native(write_keras)(root / "keras")
    native(write_msgpack)(root / "msgpack")
    native(_native("flax")[1])(root / "orbax")
    whole = tar(member("m/model.pth", torch_bytes()), member("m/config.yaml", YAML))
    (root / "tar").write_bytes(whole)
    (root / "tar.gz").write_bytes(gzip.compress(whole))
    (root / "bundle").mkdir()
    write_bundle(root / "bundle" / "x")
    return root


# Damage

FILES = {  # format: how it is opened, and where
    "keras": ("keras", "keras"),
    "msgpack": ("msgpack", "msgpack"),
    "tar": ("archive", "tar"),
    "tar.gz": ("archive", "tar.gz"),
}


def damaged(path, data):
    path.unlink(missing_ok=True)  # an array may still be mapped on the old file
    path.write_bytes(data)


def cuts(data):
    return [data[: len(data) * percent // 100] for percent in range(100)]


@pytest.mark.parametrize("kind", FILES)
def test_truncated_files(kind, worker, originals, tmp_path):
    reader, name = FILES[kind]
    data = (originals / name).read_bytes()
    whole = worker.load(reader, originals / name)
    assert len(whole) == len(PARAMS)
    refusals = 0
    for cut in cuts(data):
        damaged(tmp_path / "x", cut)
        answer = worker.open(reader, tmp_path / "x")
        refusals += answer["outcome"] == "refused" and f"{tmp_path}/x: " in answer["text"]
        padding = (
            kind == "tar" and len(cut) > len(data.rstrip(b"\0")) and answer.get("digest") == whole
        )
        assert answer["outcome"] == "refused" or padding, len(cut)
    assert refusals >= (80 if kind == "tar" else 100)


def copies(kind, originals, tmp_path):
    """A copy of a format of several files, how it is opened, and its files."""
    folder = shutil.copytree(originals / kind, tmp_path / kind)
    path = folder / "x" if kind == "bundle" else folder
    return path, [p for p in sorted(folder.rglob("*")) if p.is_file()]


@pytest.mark.parametrize("kind", ["bundle", "orbax"])
def test_truncated_folders(kind, worker, originals, tmp_path):
    """Every file that is read; what Orbax keeps for itself makes no difference."""
    path, files = copies(kind, originals, tmp_path)
    whole = worker.load(kind, path)
    refusals = 0
    for file in files:
        data = file.read_bytes()
        for cut in cuts(data):
            damaged(file, cut)
            answer = worker.open(kind, path)
            refusals += answer["outcome"] == "refused"
            assert answer["outcome"] == "refused" or answer["digest"] == whole, (file, len(cut))
        damaged(file, data)
    assert refusals >= 200
    assert worker.load(kind, path) == whole


def flips(data, places, per_kilobyte):
    """Copies of `data` with one bit changed, some for every kilobyte of `places`."""
    draw = random.Random(0)
    for at in range(0, len(places), 1024):
        for place in draw.choices(places[at : at + 1024], k=per_kilobyte):
            changed = bytearray(data)
            changed[place] ^= 1 << draw.randrange(8)
            yield place, bytes(changed)


def outside_arrays(data, arrays):
    """The places of all bytes that belong to no array."""
    inside = bytearray(len(data))
    for array in arrays:
        content = np.ascontiguousarray(array).tobytes()
        at = data.find(content)
        assert at >= 0
        inside[at : at + len(content)] = b"\1" * len(content)
    return [place for place, taken in enumerate(inside) if not taken]


def stored_arrays():
    from visualbert.schema import Kind

    arrays = random_arrays().arrays
    linear = {p.name for p in PARAMS if p.kind is Kind.LINEAR}
    return [array.T if name in linear else array for name, array in arrays.items()]


def h5_addresses(path, data):
    """The places of every array's address."""
    import h5py

    found = set()
    with h5py.File(path) as file:
        arrays = []
        file.visititems(lambda _, item: arrays.append(item) if hasattr(item, "dtype") else None)
        for item in arrays:
            at = data.find(b"\x03\x01" + struct.pack("<2Q", item.id.get_offset(), item.nbytes))
            found |= set(range(at + 2, at + 10))
    return found


@pytest.mark.parametrize("kind", FILES)
def test_flipped_bits(kind, worker, originals, tmp_path):
    """Outside the arrays of a file, and the files of a tar; anywhere in a gzipped one.

    Where an array starts in HDF5 is left out: nothing in such a file could tell a wrong place that
    overlaps no other part.
    """
    reader, name = FILES[kind]
    data = (originals / name).read_bytes()
    damaged(tmp_path / "x", data)
    whole = worker.load(reader, tmp_path / "x")
    texts = [np.frombuffer(text, np.uint8) for text in (torch_bytes(), YAML)]
    arrays = {"tar": texts, "tar.gz": []}.get(kind, stored_arrays())
    places = outside_arrays(data, arrays)
    if kind == "keras":
        addresses = h5_addresses(originals / name, data)
        assert len(addresses) == 8 * len(PARAMS)
        places = [place for place in places if place not in addresses]
    found = {"loaded": 0, "refused": 0}
    for place, changed in flips(data, places, 40 if kind == "tar" else 6):
        damaged(tmp_path / "x", changed)
        answer = worker.open(reader, tmp_path / "x")
        found[answer["outcome"]] += 1
        assert answer["outcome"] == "refused" or answer["digest"] == whole, place
    assert found["refused"] > 10


@pytest.mark.parametrize("kind", ["bundle", "orbax"])
def test_flipped_bits_in_folders(kind, worker, originals, tmp_path):
    """A bit of an array may change its value, never its name, shape or type."""
    path, files = copies(kind, originals, tmp_path)
    whole = worker.load(kind, path)
    refusals = 0
    for file in files:
        data = file.read_bytes()
        for place, changed in flips(data, range(len(data)), 4 if file.suffix != ".index" else 40):
            damaged(file, changed)
            answer = worker.open(kind, path)
            refusals += answer["outcome"] == "refused"
            if answer["outcome"] == "loaded":
                described = {name: entry[:2] for name, entry in answer["digest"].items()}
                assert described == {name: entry[:2] for name, entry in whole.items()}, place
                if file.suffix == ".index" or file.name.startswith(("_", "manifest", "commit")):
                    assert answer["digest"] == whole, (file, place)
        damaged(file, data)
    assert refusals > 10


# safetensors


def sparse_safetensors(path, length, size):
    """A file of `size` bytes that takes none of the disk."""
    path.write_bytes(struct.pack("<Q", length) + b'{"')
    os.truncate(path, size)


def junk_header(path):
    junk = b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":[' + b"[]," * 30_000_000
    header = junk + b"0]}}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def raw_safetensors(header, data=b"\0" * 8):
    def write(path):
        path.write_bytes(struct.pack("<Q", len(header)) + header + data)

    return write


SAFETENSORS = {
    "a header of 4 GiB": (
        lambda path: sparse_safetensors(path, 2**32, 2**33),
        "not a whole safetensors file (its header claims 4294967296 bytes)",
    ),
    "a header of 90 MB of empty lists": (junk_header, "not a whole safetensors file (its header"),
    "a name of a tensor twice in its entry": (
        raw_safetensors(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"data_offsets":[0,8]}}'
        ),
        "not a whole safetensors file (",
    ),
    "an axis of minus nothing": (
        raw_safetensors(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""),
        "not a whole safetensors file (",
    ),
    "an axis with an exponent": (
        raw_safetensors(b'{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}'),
        "not a whole safetensors file (",
    ),
    "a BOM": (raw_safetensors(b"\xef\xbb\xbf{}", b""), "not a whole safetensors file ("),
    "a folder": (lambda path: path.mkdir(), "not a whole safetensors file (Is a directory"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(case, worker, tmp_path):
    write, expected = SAFETENSORS[case]
    write(tmp_path / "x")
    text = worker.refuse("safetensors", tmp_path / "x").replace("[Errno 21] ", "")
    assert text.startswith(f"{tmp_path}/x: {expected}"), text


def test_many_tensors(worker, tmp_path):
    """Names without end are no attack: 20,000 of them are read, 150,000 refused."""
    for count, outcome in ((20_000, "loaded"), (150_000, "refused")):
        entries = {
            f"{i:06}": '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' for i in range(count)
        }
        header = "{" + ",".join(f'"{n}":{e}' for n, e in entries.items()) + "}"
        raw_safetensors(header.encode(), b"")(tmp_path / "x")
        assert worker.open("safetensors", tmp_path / "x")["outcome"] == outcome


# Archives

DANGEROUS = {
    "..": "would lie outside the archive's folder",
    "../x.pth": "would lie outside the archive's folder",
    "a/../../x.pth": "would lie outside the archive's folder",
    "a\\..\\..\\x.pth": "would lie outside the archive's folder",
    "/tmp/x.pth": "would lie outside the archive's folder",
    "//x.pth": "would lie outside the archive's folder",
    "C:\\x.pth": "would lie outside the archive's folder",
    "a\nb.pth": "has a name that cannot be shown",
    "a\x1b[31m.pth": "has a name that cannot be shown",
}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", DANGEROUS)
def test_names_in_archives(name, form, worker, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar(member("m.pth", torch_bytes()), member(name, b"evil"), form=form))
    assert worker.refuse("archive", path) == (
        f"{path}: refused, because its member {name!r} {DANGEROUS[name]}"
    )


KINDS = {
    "symbolic link": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    "hard link": {"type": tarfile.LNKTYPE, "linkname": "../../etc/passwd"},
    "long link": {"type": tarfile.SYMTYPE, "linkname": "x" * 400},
    "character device": {"type": tarfile.CHRTYPE},
    "block device": {"type": tarfile.BLKTYPE},
    "pipe": {"type": tarfile.FIFOTYPE},
    "sparse": {"type": tarfile.GNUTYPE_SPARSE},
    "unknown": {"type": b"Z"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_members(kind, worker, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar(member("m.pth", torch_bytes()), member("evil", **KINDS[kind])))
    assert worker.refuse("archive", path) == (
        f"{path}: refused, because its member 'evil' is a link or a device, which no model archive "
        "needs"
    )


def header_of(name, size, kind=b"0", magic=b"ustar\x0000"):
    """A header with a size of our own, and the right checksum."""
    made = bytearray(512)
    made[: len(name)] = name
    made[100:108], made[156:157], made[257:265] = b"0000644\0", kind, magic
    made[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


def record(key, value):
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length += 1
    return b"%d" % length + body


def pax(*records):
    body = b"".join(records)
    return header_of(b"pax", len(body), b"x") + body + b"\0" * (-len(body) % 512)


END = b"\0" * 1024
BOMB = "unpacks to more than weights could; it is refused as an archive bomb"
BROKEN = "not a whole tar archive ("
TERABYTE = b"\x80" + (2**40).to_bytes(11, "big")


def bomb():
    """A gzip of 250 KB that unpacks to 256 MB."""
    packer = zlib.compressobj(9, wbits=31)
    block = b"\0" * 2**20
    start = header_of(b"m.pth", 2**28)
    return (
        packer.compress(start)
        + b"".join(packer.compress(block) for _ in range(256))
        + (packer.flush())
    )


TARS = {
    "a bomb": (bomb, BOMB),
    "a bomb behind the end": (
        lambda: gzip.compress(tar(member("m.pth", b"x")) + b"\0" * 2**28, 9),
        BOMB,
    ),
    "a bomb in a second stream": (
        lambda: gzip.compress(tar(member("m.pth", b"x"))) + gzip.compress(b"\0" * 2**28),
        BOMB,
    ),
    "one terabyte": (lambda: header_of(b"m.pth", TERABYTE) + END, BOMB),
    "one terabyte, gzipped": (lambda: gzip.compress(header_of(b"m.pth", TERABYTE) + END), BOMB),
    "one terabyte in PAX": (
        lambda: pax(record(b"size", b"%d" % 2**40)) + header_of(b"m.pth", 0) + END,
        BOMB,
    ),
    "more than it holds": (lambda: header_of(b"m.pth", 4096) + END, BROKEN + "it ends too early"),
    "a negative size": (lambda: header_of(b"m.pth", b"\xff" * 12) + END, BROKEN + "a size is no"),
    "a negative size in text": (
        lambda: header_of(b"m.pth", b"-0000000777\0") + END,
        BROKEN + "a size is no number from 0 up)",
    ),
    "a negative size in PAX": (
        lambda: pax(record(b"size", b"-512")) + header_of(b"m.pth", 0) + END,
        BROKEN,
    ),
    "a size of 5000 digits in PAX": (
        lambda: pax(record(b"size", b"9" * 5000)) + header_of(b"m.pth", 0) + END,
        BROKEN,
    ),
    "a sparse file in PAX": (
        lambda: pax(record(b"GNU.sparse.major", b"1")) + header_of(b"m.pth", 0) + END,
        "refused, because its member 'm.pth' is sparse, which no model archive needs",
    ),
    "PAX records of a terabyte": (
        lambda: header_of(b"pax", TERABYTE, b"x") + END,
        BROKEN + "it has a header of 1099511627776 bytes)",
    ),
    "a name of a terabyte": (lambda: header_of(b"l", TERABYTE, b"L") + END, BROKEN + "it has a"),
    "a PAX record longer than its header": (
        lambda: header_of(b"pax", 512, b"x") + b"999999 a=b\n".ljust(512, b"\0") + END,
        BROKEN + "a PAX record is broken)",
    ),
    "PAX records of digits": (
        lambda: header_of(b"pax", 2**16, b"x") + b"1" * 2**16 + header_of(b"m.pth", 0) + END,
        BROKEN + "a PAX record is broken)",
    ),
    "a PAX record of length 0": (
        lambda: header_of(b"pax", 512, b"x") + b"0 a=b\n".ljust(512, b"\0") + END,
        BROKEN + "a PAX record is broken)",
    ),
    "headers upon headers": (
        lambda: pax(record(b"a", b"b")) * 20_000 + END,
        "holds more than 10000 members, as no model archive",
    ),
    "100,000 members": (
        lambda: gzip.compress(header_of(b"a", 0) * 100_000 + END, 1),
        "holds more than 10000 members, as no model archive",
    ),
    "a wrong checksum": (
        lambda: b"x" + header_of(b"m.pth", 0)[1:] + END,
        BROKEN + "a header's checksum does not match)",
    ),
    "no end": (lambda: header_of(b"m.pth", 0), BROKEN + "it ends too early)"),
    "empty gzip": (lambda: gzip.compress(b""), BROKEN + "it ends too early)"),
    "an endless name of a gzip": (
        lambda: b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"a" * 30_000_000,
        BROKEN + "it ends within a gzip stream)",
    ),
    "empty gzip streams": (
        lambda: gzip.compress(b"") * 300_000,
        BROKEN + "it is made of too many gzip streams)",
    ),
    "rubbish behind a gzip": (
        lambda: gzip.compress(tar(member("m.pth", torch_bytes()))) + b"rubbish",
        BROKEN,
    ),
    "nothing": (lambda: END, "holds no weights; looked for a file ending in .pth, "),
    "no weights": (
        lambda: tar(member("a/._m.pth", b"x"), member("m.pth", type=tarfile.DIRTYPE)),
        "holds no weights; looked for a file ending in .pth, .ckpt, .pt, .th, .bin",
    ),
    "two weights": (
        lambda: tar(member("a.pth", b"x"), member("b.ckpt", b"x")),
        "holds two weight files, 'a.pth' and 'b.ckpt'; unpack it and name one",
    ),
    "a YAML of a megabyte": (
        lambda: tar(member("m.pth", torch_bytes()), member("m.yaml", b"a: b\n" * 200_000)),
        "m.yaml: a YAML file of more than 128 KiB is not a configuration",
    ),
    "a YAML that runs code": (
        lambda: tar(member("m.yaml", b"a: !!python/object/apply:os.system [id]")),
        "m.yaml: not readable as plain YAML: could not determine a constructor for the tag",
    ),
}


@pytest.mark.parametrize("case", TARS)
def test_archives(case, worker, tmp_path):
    make, expected = TARS[case]
    (tmp_path / "x").write_bytes(make())
    assert worker.refuse("archive", tmp_path / "x").startswith(f"{tmp_path}/x: {expected}")


def test_archives_that_are_well(worker, originals, tmp_path):
    """Several gzip streams, padding behind them, and every form of header."""
    whole, expected = (originals / "tar").read_bytes(), worker.load("archive", originals / "tar")
    halves = gzip.compress(whole[:5000]) + b"\0" * 9 + gzip.compress(whole[5000:])
    (tmp_path / "x").write_bytes(halves + b"\0" * 70_000)
    assert worker.load("archive", tmp_path / "x") == expected
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        long = "d" * 90 + "/" + "e" * 60 + "/model.pth"
        folder = member("d" * 90, type=tarfile.DIRTYPE)
        (tmp_path / "x").write_bytes(tar(folder, member(long, torch_bytes()), form=form))
        assert worker.load("archive", tmp_path / "x") == expected


# HDF5

ROOT = "layers/tf_visual_bert_model/embeddings/visual_projection/vars"
KEPT_ELSEWHERE = "is chunked, compressed or kept elsewhere, which Keras never does; only plain"
NEWER = "is a group in HDF5's newer form, which Keras never writes"


def h5(build, **options):
    def write(path):
        import h5py

        with h5py.File(path, "w", **options) as file:
            file[f"{ROOT}/1"] = np.zeros(24, np.float32)
            build(file, h5py)

    return write


def compact(file, h5py):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple((2,))
    h5py.h5d.create(file[ROOT].id, b"0", h5py.h5t.IEEE_F32LE, space, properties)


def virtual(file, h5py):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
    file.create_virtual_dataset(f"{ROOT}/0", layout)


def external(file, h5py):
    file.create_dataset(f"{ROOT}/0", (20, 24), "f4", external=[("/etc/passwd", 0, 1920)])


def cyclic(file, h5py):
    file["layers/tf_visual_bert_model/embeddings/loop"] = file["layers"]


def deep(file, h5py):
    file["/".join("g" * 200) + "/vars/0"] = np.zeros(2)


def many_groups(file, h5py):
    for number in range(40_000):
        file.create_group(f"g{number}")


HDF5 = {
    "an external link": (
        h5(lambda f, h: f[ROOT].__setitem__("0", h.ExternalLink("/etc/passwd", "/"))),
        NEWER,
    ),
    "a soft link": (
        h5(lambda f, h: f[ROOT].__setitem__("0", h.SoftLink("/layers"))),
        "is a link to another place; only plain arrays are read",
    ),
    "a dangling soft link": (
        h5(lambda f, h: f[ROOT].__setitem__("0", h.SoftLink("/nowhere"))),
        "is a link to another place; only plain arrays are read",
    ),
    "external storage": (h5(external), KEPT_ELSEWHERE),
    "a virtual dataset": (h5(virtual), KEPT_ELSEWHERE),
    "a compressed dataset": (
        h5(lambda f, h: f.create_dataset(f"{ROOT}/0", data=np.zeros((20, 24)), compression="gzip")),
        KEPT_ELSEWHERE,
    ),
    "a bomb of chunks": (
        h5(
            lambda f, h: f.create_dataset(
                f"{ROOT}/0", (2**20, 2**20), "f4", chunks=(1024, 1024), compression="gzip"
            )
        ),
        KEPT_ELSEWHERE,
    ),
    "a compact dataset": (h5(compact), KEPT_ELSEWHERE),
    "a terabyte that takes no disk": (
        h5(lambda f, h: f.create_dataset(f"{ROOT}/0", (2**20, 2**18), "f4")),
        "was never written",
    ),
    "a cyclic hard link": (h5(cyclic), "leads back into the file's own groups"),
    "a second hard link": (
        h5(lambda f, h: f[ROOT].__setitem__("0", f[f"{ROOT}/1"])),
        "leads back into the file's own groups",
    ),
    "200 groups deep": (h5(deep), "leads back into the file's own groups"),
    "40,000 groups": (h5(many_groups), "not a whole HDF5 file (it holds more structures than"),
    "object references": (
        h5(lambda f, h: f[ROOT].__setitem__("0", np.array([f.ref, f.ref], h.ref_dtype))),
        "has the type reference, which is not one of float64",
    ),
    "texts": (
        h5(lambda f, h: f[ROOT].__setitem__("0", ["a", "b"])),
        "has the type variable, which is not one of float64",
    ),
    "a compound type": (
        h5(lambda f, h: f[ROOT].__setitem__("0", np.zeros(2, "f4,i4"))),
        "has the type compound, which is not one of float64",
    ),
    "an enumeration": (
        h5(lambda f, h: f[ROOT].__setitem__("0", np.zeros(2, bool))),
        "has the type enum, which is not one of float64",
    ),
    "the other byte order": (
        h5(lambda f, h: f[ROOT].__setitem__("0", np.zeros((20, 24), ">f4"))),
        "has the type big-endian or padded float, which is not one of float64",
    ),
    "a shared type": (
        h5(
            lambda f, h: (
                f.__setitem__("type", np.dtype("f4")),
                f.create_dataset(f"{ROOT}/0", (2,), f["type"]),
            )
        ),
        "",
    ),
    "a text at the root": (h5(lambda f, h: f.__setitem__("a\nb", np.zeros(2))), "'a\\nb' is no"),
    "a name of 600 letters": (h5(lambda f, h: f.create_group("x" * 600)), "not a whole HDF5 file"),
    "the newest form": (
        h5(lambda f, h: None, libver="latest"),
        "it is HDF5 of the superblock version 3, which Keras never writes; save it with Keras's",
    ),
    "creation order": (h5(lambda f, h: None, track_order=True), ""),
    "a user block": (h5(lambda f, h: None, userblock_size=512), "not a whole HDF5 file"),
    "no file": (lambda path: None, "cannot be read: No such file or directory"),
    "an empty file": (lambda path: path.touch(), "not a whole HDF5 file (cannot mmap an empty"),
    "a folder": (lambda path: path.mkdir(), "not a file, so there is nothing to read"),
    "a pipe": (os.mkfifo, "not a file, so there is nothing to read"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "not a file, so there is nothing"),
}


@pytest.mark.parametrize("case", HDF5)
def test_hdf5(case, worker, tmp_path):
    write, expected = HDF5[case]
    write(tmp_path / "x")
    text = worker.refuse("keras", tmp_path / "x")
    assert text.startswith(f"{tmp_path}/x: ") and expected in text, text


# msgpack


def text_of(name):
    return bytes([0xA0 | len(name)]) + name


def array_of(shape, dtype=b"float32", data=b"", count=None, axes=None):
    sizes = b"".join(b"\xcf" + n.to_bytes(8, "big") for n in shape)
    size = len(data) if count is None else count
    body = b"\x93" + bytes([0x90 | (axes if axes is not None else len(shape))]) + sizes
    body += text_of(dtype) + b"\xc6" + size.to_bytes(4, "big") + data
    return b"\xc9" + len(body).to_bytes(4, "big") + b"\1" + body


def at_bias(value):
    """`value` where a bias of the pooler belongs."""
    path = (b"visual_bert", b"pooler", b"dense", b"bias")
    return b"".join(b"\x81" + text_of(name) for name in path) + value


MSGPACK = {
    "a map of 2^32 entries": (b"\xdf\xff\xff\xff\xff", "it ends too early"),
    "a map of empty maps": (
        b"\xdf\xff\xff\xff\xff" + b"\xa0\x80" * 2_000_000,
        "it holds more than any model has",
    ),
    "maps without end": (b"\x81\xa1a" * 100_000, "it holds more than any model has"),
    "a name of 4 GB": (b"\x81\xdb\xff\xff\xff\xff", "expected a name"),
    "a name of 60 KB": (b"\x81\xda\xff\x00" + b"a" * 0xFF00, "a name is longer than 500 bytes"),
    "names that add up": ((b"\x81\xd9\xc8" + b"a" * 200) * 9, "a name is longer than 500 letters"),
    "a name that is no UTF-8": (b"\x81\xa1\xff\x80", "codec can't decode"),
    "a number for a name": (b"\x81\x01\x80", "expected a name"),
    "nothing for a name": (b"\x81\xc0\x80", "expected a name"),
    "an array of 4 GB": (at_bias(array_of((2**30,), count=2**32 - 4)), "it ends too early"),
    "an extension of 4 GB": (at_bias(b"\xc9\xff\xff\xff\xff\1"), "it ends too early"),
    "an extension of no bytes": (at_bias(b"\xc7\0\1"), "it ends too early"),
    "an extension of another type": (at_bias(b"\xc7\x01\x03a"), "'visual_bert.pooler.dense.bias'"),
    "a time": (at_bias(b"\xd6\xff\0\0\0\0"), "'visual_bert.pooler.dense.bias' is no array"),
    "a list": (at_bias(b"\x91\xc0"), "'visual_bert.pooler.dense.bias' is no array"),
    "a float": (at_bias(b"\xcb" + b"\0" * 8), "'visual_bert.pooler.dense.bias' is no array"),
    "more data than the shape": (
        at_bias(array_of((2,), data=b"\0" * 12)),
        "'visual_bert.pooler.dense.bias' has 12 bytes for the shape (2,)",
    ),
    "a product beyond 64 bits": (
        at_bias(array_of((2**63, 2**63), data=b"\0" * 8)),
        "'visual_bert.pooler.dense.bias' has 8 bytes for the shape (9223372036854775808, ",
    ),
    "nothing of an endless axis": (
        at_bias(array_of((0, 2**63))),
        "visual_bert.pooler.dense.bias has the impossible shape (0, 9223372036854775808)",
    ),
    "more axes than sizes": (at_bias(array_of((2,), data=b"\0" * 8, axes=3)), "expected a size"),
    "an unknown type": (
        at_bias(array_of((2,), b"object", b"\0" * 8)),
        "visual_bert.pooler.dense.bias has the type object, which is not one of float64",
    ),
    "a type with a comma": (at_bias(array_of((2,), b"f4,f4", b"\0" * 8)), "has the type f4,f4"),
    "the same name twice": (
        b"\x82" + at_bias(array_of((2,), data=b"\0" * 8))[1:] * 2,
        "'visual_bert.pooler.dense.bias' occurs twice",
    ),
    "something behind its end": (b"\x80\x80", "something follows its end"),
    "no map": (b"\x90", "byte 0 is 0x90, expected a map of arrays by name"),
    "no file": (b"", "cannot mmap an empty file"),
}


@pytest.mark.parametrize("case", MSGPACK)
def test_msgpack(case, worker, tmp_path):
    data, expected = MSGPACK[case]
    (tmp_path / "x").write_bytes(data)
    text = worker.refuse("msgpack", tmp_path / "x")
    assert text.startswith(f"{tmp_path}/x: ") and expected in text, text


# Orbax


def with_metadata(change):
    def attack(path):
        metadata = json.loads((path / "_METADATA").read_text())
        (path / "_METADATA").write_text(json.dumps(change(metadata) or metadata))

    return attack


def renamed(*keys):
    """The first entry under another name."""

    def change(metadata):
        first = next(iter(metadata["tree_metadata"].values()))
        first["key_metadata"] = [{"key": key, "key_type": 2} for key in keys]

    return with_metadata(change)


def zarr_metadata(**changes):
    """Lies of zarr's about an array that is not there: ".zarray" in the same database."""

    def attack(path):
        import tensorstore as ts

        base = {"driver": "file", "path": f"{path}/"}
        name = "visual_bert.pooler.dense.bias/.zarray"
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        found = json.loads(store.read(name).result().value)
        store.write(name, json.dumps({**found, **changes}).encode()).result()

    return attack


def linked(target):
    def attack(path):
        (path / "manifest.ocdbt").unlink()
        (path / "manifest.ocdbt").symlink_to(target)

    return attack


def piped(path):
    (path / "manifest.ocdbt").unlink()
    os.mkfifo(path / "manifest.ocdbt")


def linked_folder(path):
    shutil.move(path / "d", path.parent / "elsewhere")
    (path / "d").symlink_to("../elsewhere")


HUGE = {"shape": [2**40], "chunks": [2**40]}
ORBAX = {
    "a way out": (renamed("..", "..", "x"), "'......x' is no parameter of a VisualBERT"),
    "slashes": (renamed("../../etc/passwd"), "its _METADATA names what no model has"),
    "an absolute path": (renamed("/etc/passwd"), "its _METADATA names what no model has"),
    "a name that is not there": (
        renamed("visual_bert", "encoder", "layer", "7", "output", "dense", "bias"),
        "not a whole Orbax checkpoint (",
    ),
    "a list for a tree": (
        with_metadata(lambda m: {"tree_metadata": [1]}),
        "not a whole Orbax checkpoint (",
    ),
    "a number for an entry": (
        with_metadata(lambda m: {"tree_metadata": {"a": 1}}),
        "not a whole Orbax checkpoint (",
    ),
    "no tree": (with_metadata(lambda m: {"x": 1}), "not a whole Orbax checkpoint (its _METADATA"),
    "100,001 names": (
        with_metadata(
            lambda m: {"tree_metadata": {str(i): {"key_metadata": []} for i in range(100_001)}}
        ),
        "its _METADATA names what no model has",
    ),
    "deep JSON": (
        lambda path: (path / "_METADATA").write_text('{"a":' * 100_000),
        "_METADATA: not readable as JSON: ",
    ),
    "no metadata": (
        lambda path: (path / "_METADATA").unlink(),
        "not an Orbax checkpoint: it has no _METADATA",
    ),
    "metadata that is a pipe": (
        lambda path: ((path / "_METADATA").unlink(), os.mkfifo(path / "_METADATA")),
        "_METADATA: not a file, so there is no JSON to read",
    ),
    "a link out of the folder": (linked("/etc/passwd"), "'manifest.ocdbt' is a link to another"),
    "a device": (linked("/dev/zero"), "'manifest.ocdbt' is a link to another place"),
    "a pipe": (piped, "'manifest.ocdbt' is neither a file nor a folder"),
    "a folder that is a link": (linked_folder, "'d' is a link to another place"),
    "a chunk of a terabyte": (zarr_metadata(**HUGE), "visual_bert.pooler.dense.bias"),
    "a terabyte in small chunks": (
        zarr_metadata(shape=[2**40], chunks=[24]),
        "visual_bert.pooler.dense.bias and those before it are far larger than the files",
    ),
    "a chunk larger than its array": (
        zarr_metadata(shape=[24], chunks=[2**30]),
        "visual_bert.pooler.dense.bias is stored in chunks larger than itself",
    ),
    "a negative shape": (zarr_metadata(shape=[-5]), "not a whole Orbax checkpoint ("),
    "a shape beyond 64 bits": (zarr_metadata(shape=[2**70]), "not a whole Orbax checkpoint ("),
    "an unknown compressor": (
        zarr_metadata(compressor={"id": "evil"}),
        "not a whole Orbax checkpoint (",
    ),
    "another compressor than the data's": (
        zarr_metadata(compressor={"id": "zlib", "level": 1}),
        "not a whole Orbax checkpoint (",
    ),
    "no compressor": (zarr_metadata(compressor=None), "not a whole Orbax checkpoint ("),
    "texts": (zarr_metadata(dtype="|S4", fill_value=None), "visual_bert.pooler.dense.bias"),
    "objects": (zarr_metadata(dtype="|O"), "not a whole Orbax checkpoint ("),
    "a structure": (
        zarr_metadata(dtype=[["a", "<f4"], ["b", "<f4"]], fill_value=None),
        "not a whole Orbax checkpoint (",
    ),
    "no JSON": (zarr_metadata(zarr_format=9), "not a whole Orbax checkpoint ("),
}


@pytest.mark.parametrize("case", ORBAX)
def test_orbax(case, worker, originals, tmp_path):
    attack, expected = ORBAX[case]
    path = shutil.copytree(originals / "orbax", tmp_path / "orbax")
    assert len(worker.load("orbax", path)) == len(PARAMS)
    attack(path)
    text = worker.refuse("orbax", path)
    assert str(path) in text and expected in text, text


# TensorFlow


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number_field(number, value):
    return varint(number << 3) + varint(value)


def bytes_field(number, value):
    return varint(number << 3 | 2) + varint(len(value)) + value


def entry(dtype=1, shape=(2,), shard=0, offset=0, size=8, **extra):
    dims = b"".join(bytes_field(2, number_field(1, n)) for n in shape)
    body = number_field(1, dtype) + bytes_field(2, dims) + number_field(3, shard)
    return body + number_field(4, offset) + number_field(5, size) + extra.get("more", b"")


def block(pairs):
    """A block without shared beginnings, one restart, and its trailer."""
    body = b"".join(
        b"\0" + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs
    )
    return sealed(body + struct.pack("<2I", 0, 1))


def sealed(body):
    return body + b"\0" + struct.pack("<I", _masked_crc32c(body + b"\0"))


HEADER = number_field(1, 1) + bytes_field(3, number_field(1, 1))


def index(*pairs, header=HEADER, data=None, handles=None):
    """An index with honest checksums over what it is told to hold."""
    first = block([(b"", header), *pairs]) if data is None else data
    size = len(first) - 5
    handle = varint(0) + varint(size)
    second = block(handles(size) if handles else [(b"~", handle)])
    start = len(first)
    third = block([])
    footer = varint(start + len(second)) + varint(len(third) - 5)
    footer += varint(start) + varint(len(second) - 5)
    tail = footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    return first + second + third + tail


def one(**changes):
    return index((b"a", entry(**changes)))


def footer_of(*numbers):
    tail = b"".join(map(varint, numbers)).ljust(40, b"\0")
    return b"\0" * 100 + tail[:40] + struct.pack("<Q", 0xDB4775248B80FB57)


def broken_entry(data):
    return index(data=sealed(data + struct.pack("<2I", 0, 1)))


BUNDLES = {
    "an index of 17 MB": (b"\0" * (17 << 20), "its index is longer than 16 MiB"),
    "no index": (b"\0" * 100, "it does not end as an index does"),
    "an empty index": (b"", "it does not end as an index does"),
    "a size of a terabyte": (one(size=2**40), "a has 1099511627776 bytes for the shape (2,)"),
    "a shape of a terabyte": (one(shape=(2**38,), size=2**40), "a reaches beyond the end of"),
    "a product beyond 64 bits": (one(shape=(2**40, 2**40)), "a has the impossible shape"),
    "a negative axis": (one(shape=(2**64 - 2,)), "a field is no number from 0 up"),
    "a negative offset": (one(offset=2**64 - 8), "a field is no number from 0 up"),
    "an offset beyond the file": (one(offset=57), "a reaches beyond the end of the file"),
    "another shard": (one(shard=1), "a is in data file 1 of 1"),
    "an unknown type": (one(dtype=20), "a has the type number 20, which is not one of"),
    "no type": (one(dtype=0), "a has the type number 0, which is not one of"),
    "a slice": (one(more=bytes_field(7, b"")), "'a' is saved in slices; save the variable whole"),
    "a text for a type": (index((b"a", bytes_field(1, b"x"))), "a field is no number from 0 up"),
    "a number for a shape": (
        index((b"a", number_field(1, 1) + number_field(2, 5) + number_field(5, 4))),
        "not a whole TensorFlow checkpoint (",
    ),
    "a number for an axis": (
        index((b"a", number_field(1, 1) + bytes_field(2, number_field(2, 5)))),
        "not a whole TensorFlow checkpoint (",
    ),
    "a field beyond its end": (index((b"a", b"\x12\x7f")), "a field reaches beyond its end"),
    "an unknown kind of field": (index((b"a", b"\x0b")), "a field of the unknown kind 3"),
    "a number without end": (index((b"a", b"\x08" + b"\xff" * 30)), "a number is longer than 64"),
    "a number that stops": (index((b"a", b"\x08\xff")), "not a whole TensorFlow checkpoint ("),
    "no shards": (index(header=b""), "it claims 0 data files"),
    "2^40 shards": (index(header=number_field(1, 2**40)), "it claims 1099511627776 data files"),
    "10,000 shards": (index(header=number_field(1, 10_000)), "cannot be read: No such file"),
    "a big machine": (index(header=HEADER + number_field(2, 1)), "on a big-endian machine"),
    "no header": (index(data=block([(b"a", entry())])), "it has no header"),
    "keys out of order": (index((b"b", entry()), (b"a", entry())), "its keys are out of order"),
    "a key twice": (index((b"a", entry()), (b"a", entry())), "its keys are out of order"),
    "a key that shares what is not there": (
        broken_entry(b"\x05\x01\x01ab"),
        "an entry reaches beyond its block",
    ),
    "a value of a terabyte": (
        broken_entry(b"\0\x01" + varint(2**40) + b"a"),
        "an entry reaches beyond its block",
    ),
    "a key of a megabyte": (
        broken_entry(b"\0" + varint(2**20) + b"\0" + b"a" * 2**20),
        "an entry reaches beyond its block",
    ),
    "restarts without end": (
        index(data=sealed(b"\0" * 8 + struct.pack("<I", 2**32 - 1))),
        "a block reaches beyond its end",
    ),
    "a wrong checksum": (
        one()[:20] + b"\xff" + one()[21:],
        "a checksum does not match: it has changed since it was written",
    ),
    "a compressed block": (
        index(data=block([(b"", HEADER)])[:-5] + b"\1" + b"\0" * 4),
        "it is compressed, which TensorFlow never does",
    ),
    "the same block again and again": (
        index(
            handles=lambda size: [(b"%06d" % i, varint(0) + varint(size)) for i in range(50_000)]
        ),
        "its blocks overlap",
    ),
    "an index that is its own block": (footer_of(0, 0, 0, 2**40), "a block reaches beyond its end"),
    "an index of no block": (footer_of(0, 0, 0, 0), "a block reaches beyond its end"),
    "a place beyond 64 bits": (
        b"\0" * 60 + b"\xff" * 40 + struct.pack("<Q", 0xDB4775248B80FB57),
        "a number is longer than 64 bits",
    ),
    "a name that is no UTF-8": (index((b"\xff\xfe", entry())), ""),
    "a name of 900 letters": (index((b"a" * 900, entry())), "is not a tensor's name"),
    "control characters": (index((b"a\x1b[31m", entry())), "'a\\x1b[31m' is not a tensor's name"),
}


@pytest.mark.parametrize("case", BUNDLES)
def test_bundles(case, worker, tmp_path):
    data, expected = BUNDLES[case]
    (tmp_path / "x.index").write_bytes(data)
    (tmp_path / "x.data-00000-of-00001").write_bytes(b"\0" * 64)
    answer = worker.open("bundle", tmp_path / "x")
    if case == "a name that is no UTF-8":
        assert answer["outcome"] == "loaded" and list(answer["digest"]) == ["\\xff\\xfe"]
    else:
        assert answer["text"].startswith(f"{tmp_path}/x.") and expected in answer["text"]


def test_an_honest_bundle(worker, tmp_path):
    """What the attacks change is read when it is not changed."""
    (tmp_path / "x.index").write_bytes(index((b"a", entry()), (b"b", entry(dtype=7, size=99))))
    (tmp_path / "x.data-00000-of-00001").write_bytes(b"\0" * 64)
    assert {name: e[:2] for name, e in worker.load("bundle", tmp_path / "x").items()} == {
        "a": ["float32", [2]]
    }
    (tmp_path / "x.data-00000-of-00001").unlink()
    os.mkfifo(tmp_path / "x.data-00000-of-00001")
    assert worker.refuse("bundle", tmp_path / "x") == (
        f"{tmp_path}/x.data-00000-of-00001: not a file, so there is nothing to read"
    )


# YAML

LAUGHS = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (i + 1, i + 1, b", ".join([b"*%c" % i] * 9))
    for i in range(ord("a"), ord("q"))
)
MERGES = b"a0: &a0 {x: 1, y: 2}\n" + b"".join(
    b"a%d: &a%d {<<: [*a%d, *a%d, *a%d]}\n" % (i, i, i - 1, i - 1, i - 1) for i in range(1, 40)
)
NOT_PLAIN = "not readable as plain YAML: "
YAMLS = {
    "python's system": (b"a: !!python/object/apply:os.system ['touch x']", NOT_PLAIN),
    "python's names": (b"a: !!python/name:os.system", NOT_PLAIN),
    "python's modules": (b"a: !!python/module:os", NOT_PLAIN),
    "python's objects": (b"a: !!python/object/new:os.system ['touch x']", NOT_PLAIN),
    "python's tuples": (b"a: !!python/tuple [1]", NOT_PLAIN),
    "an own tag": (b"a: !evil b", NOT_PLAIN),
    "merge keys": (MERGES, NOT_PLAIN + "merge keys (<<) are not read"),
    "a value that its tag is not": (b"a: !!bool maybe", NOT_PLAIN),
    "no time": (b"a: !!timestamp soon", NOT_PLAIN),
    "no number": (b"a: !!int ''", NOT_PLAIN),
    "an impossible day": (b"a: 2001-99-99", NOT_PLAIN),
    "a number of 100,000 digits": (b"a: " + b"9" * 100_000, NOT_PLAIN),
    "a number of 100,000 hexadecimal digits": (b"a: 0x" + b"f" * 100_000, NOT_PLAIN),
    "a number to the base of 60": (b"a: 1" + b":59" * 30_000, NOT_PLAIN),
    "lists in lists": (b"a: " + b"[" * 100_000, NOT_PLAIN),
    "maps in maps": (b"{a: " * 20_000, NOT_PLAIN),
    "dashes in dashes": (b"- " * 60_000, NOT_PLAIN),
    "a list for a key": (b"[1]: 2", NOT_PLAIN),
    "an alias of nothing": (b"a: *b", NOT_PLAIN),
    "itself for a key": (b"&a {*a : 1}", NOT_PLAIN),
    "two documents": (b"a: 1\n---\nb: 2\n", NOT_PLAIN),
    "a version of the future": (b"%YAML 9.9\n---\na: 1", NOT_PLAIN),
    "no UTF-8": (b"a: \xff\xfe", NOT_PLAIN),
    "control characters": (b"a: \x1b[31m", NOT_PLAIN),
    "a list": (b"- 1", "expected a YAML mapping, found a list"),
    "nothing": (b"", "expected a YAML mapping, found a NoneType"),
    "a text": (b"hello", "expected a YAML mapping, found a str"),
    "a megabyte": (b"a: b\n" * 200_000, "a YAML file of more than 128 KiB is not a configuration"),
}


@pytest.mark.parametrize("case", YAMLS)
def test_yaml(case, worker, tmp_path):
    data, expected = YAMLS[case]
    (tmp_path / "x.yaml").write_bytes(data)
    text = worker.refuse("yaml", tmp_path / "x.yaml")
    assert text.startswith(f"{tmp_path}/x.yaml: {expected}"), text


def test_numbers_in_yaml(tmp_path):
    """As OmegaConf reads them, with which MMF writes them."""
    (tmp_path / "x.yaml").write_text("a: 1e-12\nb: 1.0e-5\nc: 3\nd: 1e5x\ne: '1e-12'\nf: -2E+3")
    found = {"a": 1e-12, "b": 1e-5, "c": 3, "d": "1e5x", "e": "1e-12", "f": -2000.0}
    assert read_yaml(tmp_path / "x.yaml") == found


def test_yaml_that_takes_time(worker, tmp_path):
    """A billion laughs are one list by many names, and the longest file is read in time."""
    (tmp_path / "x.yaml").write_bytes(LAUGHS)
    worker.load("yaml", tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_bytes(b"a:\n" + b"- b\n" * 32_000)
    worker.load("yaml", tmp_path / "x.yaml")
    for name, make in {"pipe": os.mkfifo, "folder": os.mkdir}.items():
        make(tmp_path / name)
        assert worker.refuse("yaml", tmp_path / name) == (
            f"{tmp_path / name}: not a file, so there is nothing to read"
        )


# config.json and index.json

FIELDS = json.dumps(CONFIG.to_dict())[:-1]
CONFIGS = {
    "1e400": (FIELDS + ', "layer_norm_eps": 1e400}', "not readable as JSON: 'layer_norm_eps'"),
    "an infinite epsilon": ('{"layer_norm_eps": 1e400}', "layer_norm_eps=inf must be a positive"),
    "no number": ('{"layer_norm_eps": NaN}', "layer_norm_eps=nan must be a positive number"),
    "an infinite size": ('{"hidden_size": Infinity}', "hidden_size must be an integer, got inf"),
    "a fractional size": ('{"hidden_size": 768.0}', "hidden_size must be an integer, got 768.0"),
    "a size of 5000 digits": (
        '{"hidden_size": 1' + "0" * 5000 + "}",
        "not readable as JSON: Exceeds the limit (4300 digits) for integer string conversion",
    ),
    "a size of 4000 digits": (
        '{"hidden_size": 1' + "0" * 4000 + "}",
        "hidden_size must be an integer of at most 64 bits",
    ),
    "a size of 2^62": (
        '{"hidden_size": 4611686018427387904}',
        "hidden_size=4611686018427387904 must lie between 1 and 2147483647",
    ),
    "a negative size": ('{"vocab_size": -1}', "vocab_size=-1 must lie between 1 and 2147483647"),
    "a million layers": ('{"num_hidden_layers": 1000000}', "num_hidden_layers=1000000 must lie"),
    "a text for a size": ('{"hidden_size": "768"}', "hidden_size must be an integer, got '768'"),
    "a list for a text": ('{"hidden_act": [[]]}', "hidden_act must be a string, got [[]]"),
    "a map for a flag": ('{"bypass_transformer": {}}', "bypass_transformer must be true or false"),
    "a key twice": (FIELDS + ', "vocab_size": 7}', "not readable as JSON: 'vocab_size' occurs"),
    "a key twice below": (
        '{"x": [{"a": 1, "a": 2}]}',
        "not readable as JSON: 'a' occurs twice",
    ),
    "two million labels": (
        '{"num_labels": 2000000}',
        "num_labels=2000000 must lie between 1 and 1048576",
    ),
    "labels that are no map": ('{"id2label": [1]}', "id2label must map label numbers to names"),
    "labels with a gap": ('{"id2label": {"0": "a", "5": "b"}}', "id2label must name every label"),
    "lists in lists": ('{"a":' + "[" * 100_000, "not readable as JSON: "),
    "maps in maps": ('{"a":' * 100_000, "not readable as JSON: "),
    "a BOM": ("\ufeff{}", "not readable as JSON: Unexpected UTF-8 BOM"),
    "no UTF-8": (b'{"a": "\xff"}', "not readable as JSON: 'utf-8' codec can't decode byte 0xff"),
    "UTF-16": ("{}".encode("utf-16"), "not readable as JSON: 'utf-8' codec can't decode"),
    "nothing": ("", "not readable as JSON: Expecting value"),
    "zeros": (b"\0" * 1000, "not readable as JSON: Expecting value"),
    "a list": ("[]", "expected a JSON object, found a list"),
    "ten million empty lists": (
        '{"a":[' + "[]," * 10_000_000 + "0]}",
        "holds more values than any configuration has",
    ),
    "another model": ('{"model_type": "\\u001b[31m"}', "model_type is '\\x1b[31m', expected"),
    "half a letter": ('{"model_type": "\\ud800"}', "model_type is '\\ud800', expected"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config(case, worker, tmp_path):
    text, expected = CONFIGS[case]
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = worker.refuse("config", tmp_path)
    assert found.startswith(f"{path}: {expected}"), found


SPECIAL = {
    "a folder": (os.mkdir, "not a file, so there is no JSON to read"),
    "a pipe": (os.mkfifo, "not a file, so there is no JSON to read"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "not a file, so there is no JSON"),
    "a link to itself": (lambda path: path.symlink_to(path), "cannot be read: "),
    "a link to nothing": (lambda path: path.symlink_to("gone"), "no such file; a checkpoint"),
    "an endless file": (
        lambda path: (path.touch(), os.truncate(path, 2**40)),
        "a JSON file of more than 64 MiB is not a configuration",
    ),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_config_that_is_no_file(case, worker, tmp_path):
    make, expected = SPECIAL[case]
    make(tmp_path / "config.json")
    assert worker.refuse("config", tmp_path).startswith(f"{tmp_path}/config.json: {expected}")


def test_unknown_fields_are_no_attack(worker, tmp_path):
    """transformers writes what it likes; nothing of it is looked into."""
    deep = '{"x":' + "[" * 500 + "]" * 500 + ', "y": [NaN, -Infinity, 1e400], "z": "\\ud800"}'
    (tmp_path / "config.json").write_text(deep)
    worker.load("config", tmp_path)


SHARDS = {
    "a name of 5000 letters": ("x" * 5000 + ".safetensors", "is missing from the folder"),
    "a name with a zero": ("a\0.safetensors", "is missing from the folder"),
    "half a letter": ("\ud800.safetensors", "is missing from the folder"),
    "a name of control characters": ("\x1b[31m.safetensors", "is missing from the folder"),
    "a folder": ("folder.safetensors", "is missing from the folder"),
    "a pipe": ("pipe.safetensors", "is missing from the folder"),
    "a device": ("/dev/zero", "lies outside the folder"),
    "a way out": ("a/../../x.safetensors", "lies outside the folder"),
    "itself": ("model.safetensors.index.json", "is not a .safetensors file"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_index(case, worker, tmp_path):
    name, expected = SHARDS[case]
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    assert worker.refuse("folder", tmp_path) == f"{path}: shard {name[:200]!r} {expected}"


def test_index_of_names_that_cannot_be_shown(worker, originals, tmp_path):
    shutil.copy(originals / "safetensors", tmp_path / "a.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    for name in ("a\x1b[31m", "x" * 5000):
        path.write_text(json.dumps({"weight_map": {name: "a.safetensors"}}))
        assert worker.refuse("folder", tmp_path) == (
            f"{path}: {name[:200]!r} is in none of its shards; fetch the checkpoint again"
        )


# The fuzzers


@pytest.fixture(scope="module")
def fuzzers():
    path = Path(__file__).parents[1] / "tools" / "fuzz" / "targets.py"
    spec = importlib.util.spec_from_file_location("targets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TARGETS = ("safetensors", "torch-zip", "torch-stream", "pickles", "msgpack", "keras", "archive")
TARGETS += ("yaml", "tf-bundle", "orbax", "config", "index")


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_of_the_fuzzers(target, fuzzers, tmp_path):
    """tools/fuzz starts from files that a reader gets through, and from a few that it refuses."""
    assert set(fuzzers.TARGETS) == set(TARGETS)
    run, seeds = fuzzers.TARGETS[target]
    loaded = 0
    for data in seeds():
        with contextlib.suppress(VisualBertError):
            run(tmp_path, data)
            loaded += 1
    assert loaded


# The worker itself


def test_the_worker_notices(worker, originals, tmp_path):
    """What the other tests rely on: a crash, an error of another class, a file, and memory."""
    with pytest.raises(pytest.fail.Exception, match=r"crashed on .* \(a crash\)"):
        worker.open("a crash", tmp_path)
    with pytest.raises(AssertionError, match="KeyError"):
        worker.open("another error", tmp_path)
    with pytest.raises(AssertionError, match="left"):
        worker.open("a file", tmp_path)
    (worker.temporary / "left").unlink()
    answer = worker.open("keras", originals / "keras")
    assert answer["outcome"] == "loaded" and answer["megabytes"] < 50
    text = '{"x":[' + "1.5," * 3_000_000 + "0]}"
    (tmp_path / "config.json").write_text(text)
    assert 60 < worker.open("json", tmp_path / "config.json")["megabytes"] < MEGABYTES
