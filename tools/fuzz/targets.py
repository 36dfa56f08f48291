"""What `run.py` runs: one fuzz target for each reader, and the seeds that its corpus starts from.

A target writes the fuzzer's bytes to a file and opens it as a user would. A `VisualBertError` is
the right answer to a broken file; every other exception is kept, with its input, once for each
place that it comes from. Crashes, five seconds and two gigabytes are libFuzzer's to notice.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CRASHES = Path(__file__).parent / "crashes"
_LARGEST = 1 << 26  # bytes of a tensor that is read
_TINY = {
    **{"vocab_size": 3, "hidden_size": 4, "visual_embedding_dim": 2, "num_hidden_layers": 1},
    **{"num_attention_heads": 1, "intermediate_size": 2, "max_position_embeddings": 3},
}
_HEAD = "VisualBertForMultipleChoice"

# Seeds


def _tensors(**changes: Any) -> tuple[Any, Any]:
    from visualbert.checkpoint.initial import InitialValues
    from visualbert.config import VisualBertConfig
    from visualbert.schema import parameters

    config = VisualBertConfig(**{**_TINY, "architectures": (_HEAD,), **changes})
    return InitialValues(_HEAD, config, 0), parameters(_HEAD, config)


def _written(write: Callable[..., None], **changes: Any) -> bytes:
    """What `write` makes of a tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seed")
        tensors, params = _tensors(**changes)
        write(path, tensors, params, lambda size: None)
        return path.read_bytes()


def _safetensors_seeds() -> Iterator[bytes]:
    from visualbert.checkpoint.write import write_safetensors

    yield _written(lambda path, tensors, *_: write_safetensors(path, tensors))


def _torch(summed: bool = True, **options: Any) -> bytes:
    import torch

    tensors, _ = _tensors(num_hidden_layers=0)
    state = {name: torch.from_numpy(tensors.read(name)) for name in tensors.specs}
    file = io.BytesIO()
    torch.serialization.set_crc32_options(summed)  # with it, every mutation ends at the checksum
    torch.save({"model": state, "epoch": 3}, file, **options)
    return file.getvalue()


def _pickle_seeds() -> Iterator[bytes]:
    import pickle
    import zipfile
    from collections import OrderedDict

    with zipfile.ZipFile(io.BytesIO(_torch())) as archive:
        yield archive.read("archive/data.pkl")
    value = {"a": [1, 2.5, None, True, (b"x", "y")], "b": OrderedDict(c=10**30), "d": {3, -4}}
    for protocol in range(6):
        yield pickle.dumps(value, protocol)


def _msgpack_seeds() -> Iterator[bytes]:
    from visualbert.checkpoint.flax_files import write_msgpack

    yield _written(write_msgpack)


def _keras_seeds() -> Iterator[bytes]:
    from visualbert.checkpoint.keras_files import write_keras

    yield _written(write_keras, num_hidden_layers=0)
    yield _written(lambda path, tensors, params, done: write_keras(path, tensors, params[:2], done))


def _yaml_seeds() -> Iterator[bytes]:
    yield b"model_config:\n  visual_bert: &a {hidden_act: gelu, layer_norm_eps: 1e-12, n: 0x1f}\n"
    yield b"model_attributes:\n  visual_bert:\n    - [1, 'b', \"c\", 2001-01-01]\n? |\n  x\n: *a\n"
    yield b"a: !!int 1\nb: !!float 1.5\nc: !!bool yes\nd: !!timestamp 2001-12-14t21:59:43Z\n"
    yield b"%YAML 1.1\n--- !!map {a: !!binary aGk=, b: !!set {c, d}, <<: {e: 1:30:00}}\n...\n"


def _archive_seeds() -> Iterator[bytes]:
    weights, yaml = _torch(), next(_yaml_seeds())
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            for name, data in (("m" * 90 + "/m.pth", weights), ("m/config.yaml", yaml)):
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(data), 1.5 if form == tarfile.PAX_FORMAT else 1
                archive.addfile(member, io.BytesIO(data))
        yield b"\0" + file.getvalue()
        yield b"\1" + file.getvalue()


def _bundle_seeds() -> Iterator[bytes]:
    import tensorflow as tf

    tensors, _ = _tensors(num_hidden_layers=0)
    with tempfile.TemporaryDirectory() as folder:
        names = [*tensors.specs, "text"]
        values = [*(tensors.read(name) for name in tensors.specs), ["a", "b"]]
        prefix = f"{folder}/x"
        tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=[tf.constant(value) for value in values],
        )
        yield Path(prefix + ".index").read_bytes()


def _orbax_seeds() -> Iterator[bytes]:
    """A folder as one text: the length and the name of every file, and what it holds."""
    from visualbert.checkpoint.orbax_write import write_orbax

    tensors, params = _tensors(num_hidden_layers=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x")
        write_orbax(path, tensors, params, lambda size: None)
        files = {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    for names in (sorted(files), sorted(files, reverse=True)):
        yield b"".join(b"%d %s\n%s" % (len(files[n]), bytes(n), files[n]) for n in names)


def _config_seeds() -> Iterator[bytes]:
    _, config = None, {**_TINY, "id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0}}
    yield json.dumps({"model_type": "visual_bert", "architectures": [_HEAD], **config}).encode()
    yield b'{"hidden_size": 1e400, "torch_dtype": null, "x": [NaN, -Infinity, "\\ud800"]}'


def _index_seeds() -> Iterator[bytes]:
    names = ("a.safetensors", "b.safetensors")
    yield json.dumps({"metadata": {}, "weight_map": {n[0]: n for n in names}}).encode()


# Targets


def _read_all(tensors: Any) -> None:
    from visualbert.checkpoint.tensors import STORED

    for name, spec in tensors.specs.items():
        size = STORED[spec.dtype].itemsize
        for axis in spec.shape:
            size *= axis
        if size <= _LARGEST:
            array = tensors.read(name)
            assert array.shape == spec.shape and array.dtype.name == spec.dtype, name
            array.sum()


def _put(path: Path, data: bytes) -> Path:
    """A new file: an array may be mapped on the old one, and some disks flush what is reused."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def _open(path: Path) -> None:
    from visualbert.checkpoint.open import open_checkpoint

    _read_all(open_checkpoint(path, num_attention_heads=1).tensors)


def _file(name: str) -> Callable[[Path, bytes], None]:
    def target(folder: Path, data: bytes) -> None:
        _open(_put(folder / name, data))

    return target


def _pickles(folder: Path, data: bytes) -> None:
    from visualbert.checkpoint import pickles, torch_files

    def storage(ident: Any) -> Any:
        return torch_files._storage(ident, 5)

    with contextlib.suppress(pickles.Broken, pickles.Refused):
        pickles.load(io.BytesIO(data), torch_files._TABLE, storage, torch_files._BESIDE)


def _keras(folder: Path, data: bytes) -> None:
    from visualbert.checkpoint.keras_files import KerasFile

    _read_all(KerasFile("x", _put(folder / "x.h5", data)))


def _archive(folder: Path, data: bytes) -> None:
    """A tar whose headers get the right checksums, or no mutation would pass them."""
    kind, blocks = data[:1], [bytearray(data[at : at + 512]) for at in range(1, len(data), 512)]
    for block in blocks:
        if len(block) == 512 and block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    whole = b"".join(blocks)
    _file("x.tar")(folder, gzip.compress(whole, 1) if kind == b"\1" else whole)


def _yaml(folder: Path, data: bytes) -> None:
    from visualbert.checkpoint.archives import parse_yaml
    from visualbert.checkpoint.open import _mmf_fields
    from visualbert.config import VisualBertConfig

    fields = _mmf_fields("x", parse_yaml("x", data))
    fields.pop("pooler_strategy", None)
    VisualBertConfig.from_dict(fields)


def _bundle(folder: Path, data: bytes) -> None:
    from visualbert.checkpoint.tf_bundle import BundleFiles

    _put(folder / "x.index", data)
    if not (folder / "x.data-00000-of-00001").exists():
        (folder / "x.data-00000-of-00001").write_bytes(bytes(4096))
    _read_all(BundleFiles("x", folder / "x"))


class _Anything(int):
    """A checksum that is always the right one."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def _orbax(folder: Path, data: bytes) -> None:
    from visualbert.checkpoint.flax_files import OrbaxFolder

    path = folder / "orbax"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    while found := re.match(rb"(\d{1,6}) (\w+(?:[./]\w+)*)\n", data):
        size, name = int(found[1]), path / found[2].decode()
        with contextlib.suppress(OSError):
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_bytes(data[found.end() : found.end() + size])
        data = data[found.end() + size :]
    _read_all(OrbaxFolder("x", path))


def _config(folder: Path, data: bytes) -> None:
    from visualbert.config import VisualBertConfig

    _put(folder / "config.json", data)
    config = VisualBertConfig.from_pretrained(folder)
    assert VisualBertConfig.from_dict(config.to_dict()).to_json_string() == config.to_json_string()


def _index(folder: Path, data: bytes) -> None:
    from safetensors.numpy import save_file

    from visualbert.checkpoint.read import read_weights

    for name in "ab":
        if not (folder / f"{name}.safetensors").exists():
            import numpy as np

            save_file({name: np.ones(2, np.float32)}, folder / f"{name}.safetensors")
    _put(folder / "model.safetensors.index.json", data)
    _read_all(read_weights(folder))


TARGETS: dict[str, tuple[Callable[[Path, bytes], None], Callable[[], Iterator[bytes]]]] = {
    "safetensors": (_file("x.safetensors"), _safetensors_seeds),
    "torch-zip": (_file("x.pth"), lambda: iter([_torch(summed=False), _torch()])),
    "torch-stream": (
        _file("x.th"),
        lambda: iter([_torch(_use_new_zipfile_serialization=False)]),
    ),
    "pickles": (_pickles, _pickle_seeds),
    "msgpack": (_file("x.msgpack"), _msgpack_seeds),
    "keras": (_keras, _keras_seeds),
    "archive": (_archive, _archive_seeds),
    "yaml": (_yaml, _yaml_seeds),
    "tf-bundle": (_bundle, _bundle_seeds),
    "orbax": (_orbax, _orbax_seeds),
    "config": (_config, _config_seeds),
    "index": (_index, _index_seeds),
}


def write_seeds(target: str, folder: Path) -> None:
    """The first corpus of a target."""
    for data in TARGETS[target][1]():
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)


def _keep(target: str, data: bytes, seen: set[str]) -> None:
    """Save the input of an exception, the first time that it comes from its place."""
    kind, error, trace = sys.exc_info()
    frames = [f for f in traceback.extract_tb(trace) if "visualbert" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    name = f"{target}-{getattr(kind, '__name__', kind)}-{place.replace(':', '-')}"
    if name in seen:
        return
    seen.add(name)
    CRASHES.mkdir(exist_ok=True)
    (CRASHES / name).write_bytes(data)
    print(f"FINDING {target}: {place}: {kind}: {str(error)[:200]!r}", flush=True)


def fuzz(target: str, arguments: list[str]) -> None:
    """Hand a target to libFuzzer, which ends the process."""
    import atheris

    watched = ["visualbert.checkpoint", "visualbert.config", "yaml", "pickletools", "zipfile"]
    with atheris.instrument_imports(include=watched):
        from visualbert import errors
        from visualbert.checkpoint import open, tf_bundle  # noqa: F401 (all of the readers)
    tf_bundle._masked_crc32c = lambda data: _Anything()
    folder, run, seen = Path(tempfile.mkdtemp()), TARGETS[target][0], set[str]()

    def once(data: bytes) -> None:
        try:
            run(folder, data)
        except errors.VisualBertError:
            pass
        except Exception:
            _keep(target, data, seen)

    atheris.Setup([sys.argv[0], *arguments], once)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if sys.argv[1] == "seeds":
        write_seeds(sys.argv[2], Path(sys.argv[3]))
    else:
        fuzz(sys.argv[2], sys.argv[3:])
