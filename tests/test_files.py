"""Weight files under attack: every file is either loaded right or refused in one error, and a save
that fails or is killed leaves what was there.
"""

import collections
import http.server
import json
import operator
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny import BACKENDS, make_model, random_tensors, read_all, same, tiny_config

from visualbert import CheckpointError, ConfigError, VisualBertError, get_backend
from visualbert.checkpoint import write as writing
from visualbert.checkpoint.initial import InitialValues
from visualbert.checkpoint.match import check_ties, match
from visualbert.checkpoint.open import find_source, open_bert, open_checkpoint
from visualbert.checkpoint.read import SafetensorsFiles, TorchFiles, read_weights
from visualbert.checkpoint.tensors import DTYPES, ArrayTensors, cast, common_dtype
from visualbert.checkpoint.warm_start import WarmStart, config_from_bert
from visualbert.checkpoint.write import replace_files, write_folder
from visualbert.errors import UsageError
from visualbert.pretrained import ModelTensors, fill, load_model
from visualbert.schema import parameters

BODY = "VisualBertModel"
PRETRAINING = "VisualBertForPreTraining"
ANSWERS = "VisualBertForQuestionAnswering"
CHOICE = "VisualBertForMultipleChoice"
CONFIG = tiny_config()
WEIGHTS = "model.safetensors"
BIN = "pytorch_model.bin"
WORDS = "visual_bert.embeddings.word_embeddings.weight"


def arrays_of(architecture, config=CONFIG, dtype="float32"):
    tensors = random_tensors(architecture, config)
    return {name: cast(tensors.read(name), dtype) for name in tensors.specs}


def save(folder, arrays, architecture=ANSWERS, config=CONFIG):
    config = config.replace(architectures=(architecture,))
    write_folder(folder, ArrayTensors("arrays", arrays), config)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save(tmp_path_factory.mktemp("files") / "original", arrays_of(ANSWERS))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoint")


def refused(function, *args, error=CheckpointError, lines=1, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert len(text.splitlines()) == lines, text
    return text


def load_whole(folder):
    """Everything that a load does short of building a model."""
    checkpoint = open_checkpoint(folder)
    found = match(checkpoint.tensors, ANSWERS, checkpoint.config)
    check_ties(checkpoint.tensors, found)
    return {name: checkpoint.tensors.read(source) for name, source in found.sources.items()}


# Formats


def torch_tensors(arrays):
    from visualbert.pt.convert import from_numpy

    return {name: from_numpy(array) for name, array in arrays.items()}


def write_safetensors_file(path, arrays):
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})


def write_zip(path, arrays):
    import torch

    torch.save(torch_tensors(arrays), path)


def write_legacy(path, arrays):
    import torch

    torch.save(torch_tensors(arrays), path, _use_new_zipfile_serialization=False)


def write_format(folder, kind, arrays):
    write, name = {
        "safetensors": (write_safetensors_file, WEIGHTS),
        "bin": (write_zip, BIN),
        "legacy bin": (write_legacy, BIN),
    }[kind.removeprefix("sharded ")]
    folder.mkdir(exist_ok=True)
    if not kind.startswith("sharded "):
        write(folder / name, arrays)
        return folder
    stem, suffix = os.path.splitext(name)
    names = list(arrays)
    weight_map = {}
    for i in range(3):
        shard = f"{stem}-{i + 1:05}-of-00003{suffix}"
        write(folder / shard, {n: arrays[n] for n in names[i::3]})
        weight_map |= dict.fromkeys(names[i::3], shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", ["safetensors", "sharded safetensors", "bin", "sharded bin", "legacy bin"]
)
def test_formats(kind, dtype, tmp_path):
    arrays = arrays_of(ANSWERS, dtype=dtype)
    tensors = read_weights(write_format(tmp_path / "x", kind, arrays))
    same(read_all(tensors), arrays)
    assert common_dtype(tensors) == dtype
    assert tensors.read("cls.bias").flags.writeable


def test_mixed_types(tmp_path):
    arrays = arrays_of(ANSWERS)
    arrays["cls.weight"] = arrays["cls.weight"].astype(np.float16)
    arrays["cls.bias"] = arrays["cls.bias"].astype(ml_dtypes.bfloat16)
    tensors = read_weights(save(tmp_path / "x", arrays))
    same(read_all(tensors), arrays)
    assert tensors.verify_checksum()
    assert common_dtype(tensors) == "float32"
    halves = {n: a for n, a in arrays.items() if a.dtype != np.float32}
    assert common_dtype(ArrayTensors("halves", halves)) == "float32"
    text = refused(common_dtype, ArrayTensors("ids/", {"a": np.zeros(1, np.int64)}))
    assert text == "'ids/' holds no floating-point tensors"


@pytest.mark.parametrize("backend", BACKENDS)
def test_model_from_each_format(backend, tmp_path):
    """One architecture through every file kind gives one and the same model."""
    arrays = arrays_of(PRETRAINING)
    CONFIG.replace(architectures=(PRETRAINING,)).save_pretrained(tmp_path)
    for kind in ("safetensors", "sharded bin"):
        write_format(tmp_path, kind, arrays)
        model = load_model(get_backend(backend), PRETRAINING, open_checkpoint(tmp_path))
        same(read_all(ModelTensors(get_backend(backend), model)), arrays)
        shutil.rmtree(tmp_path / WEIGHTS, ignore_errors=True)


def test_safetensors_are_preferred(tmp_path):
    write_format(tmp_path, "bin", {"a": np.zeros(1)})
    write_format(tmp_path, "safetensors", {"a": np.ones(1)})
    assert read_weights(tmp_path).read("a") == 1


def test_no_weights(tmp_path):
    assert refused(read_weights, tmp_path) == (
        f"{tmp_path}: no weights found; looked for model.safetensors and pytorch_model.bin, and "
        "for the index.json of either"
    )


@pytest.mark.parametrize("order", ["C", "F", "T", "slice", "reversed", "big-endian"])
def test_memory_order_is_not_written(order, tmp_path):
    """safetensors writes memory as it lies; ours has to come out by value."""
    arrays = arrays_of(ANSWERS)
    awkward = {
        "C": lambda a: a,
        "F": np.asfortranarray,
        "T": lambda a: np.ascontiguousarray(a.T).T,
        "slice": lambda a: np.repeat(a, 2, axis=0)[::2],
        "reversed": lambda a: a[::-1].copy()[::-1],
        "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    }[order]

    class Awkward(ArrayTensors):
        def read(self, name):
            return awkward(self.arrays[name])

    write_folder(tmp_path, Awkward("awkward", arrays), CONFIG)
    tensors = read_weights(tmp_path)
    same(read_all(tensors), arrays)
    assert tensors.verify_checksum()


# Names


def test_older_names_and_position_ids(tmp_path):
    arrays = arrays_of(ANSWERS)
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for name, array in arrays.items()
    }
    assert set(older) != set(arrays)
    older["visual_bert.embeddings.position_ids"] = np.arange(36)[None]
    same(load_whole(save(tmp_path, older)), arrays)


def test_tied_decoder(tmp_path):
    arrays = arrays_of(PRETRAINING)
    arrays["cls.predictions.decoder.weight"] = arrays[WORDS]
    arrays["cls.predictions.decoder.bias"] = arrays["cls.predictions.bias"]
    tensors = ArrayTensors("old/", arrays)
    found = match(tensors, PRETRAINING, CONFIG)
    check_ties(tensors, found)
    assert set(found.sources) == {p.name for p in parameters(PRETRAINING, CONFIG)}
    other = ArrayTensors(
        "old/", {**arrays, "cls.predictions.decoder.bias": arrays[WORDS][:, 0] + 1}
    )
    assert refused(check_ties, other, match(other, PRETRAINING, CONFIG)) == (
        "'old/': cls.predictions.decoder.bias differs from cls.predictions.bias, of which "
        "VisualBERT's tied decoder can keep only one; remove the one that was not trained from the "
        "file"
    )
    model = make_model("pt", PRETRAINING, CONFIG)
    before = read_all(ModelTensors(get_backend("pt"), model))
    refused(fill, get_backend("pt"), model, other)
    same(read_all(ModelTensors(get_backend("pt"), model)), before)


def test_only_copy_of_a_tied_tensor():
    """`safetensors.torch.save_model` keeps the first name of a shared tensor, the decoder's."""
    arrays = arrays_of(PRETRAINING)
    arrays["cls.predictions.decoder.weight"] = arrays.pop(WORDS)
    for architecture, new_head, name in (
        (PRETRAINING, False, WORDS),
        (BODY, False, WORDS.removeprefix("visual_bert.")),
        (ANSWERS, True, WORDS),
    ):
        found = match(ArrayTensors("x", arrays), architecture, CONFIG, new_head=new_head)
        assert found.sources[name] == "cls.predictions.decoder.weight"


def test_one_parameter_under_two_names():
    arrays = arrays_of(ANSWERS)
    gamma = "visual_bert.embeddings.LayerNorm.gamma"
    arrays[gamma] = arrays[gamma.replace("gamma", "weight")]
    text = refused(match, ArrayTensors("two/", arrays), ANSWERS, CONFIG, lines=2)
    assert text == (
        f"cannot load {ANSWERS} from 'two/': 1 problem\n"
        "  doubled     visual_bert.embeddings.LayerNorm.gamma and "
        "visual_bert.embeddings.LayerNorm.weight are the same parameter"
    )
    body = arrays_of(BODY)
    body["visual_bert.pooler.dense.bias"] = body["pooler.dense.bias"] + 1
    text = refused(match, ArrayTensors("two/", body), BODY, CONFIG, lines=2)
    assert "visual_bert.pooler.dense.bias and pooler.dense.bias are the same parameter" in text


def test_body_and_heads():
    body, answers = (ArrayTensors("x", arrays_of(a)) for a in (BODY, ANSWERS))
    pretraining = ArrayTensors("x", arrays_of(PRETRAINING))
    pretraining.arrays["cls.predictions.decoder.weight"] = pretraining.arrays[WORDS]
    found = match(answers, BODY, CONFIG)
    assert found.ignored == ("cls.bias", "cls.weight") and not found.fresh
    assert found.sources["pooler.dense.bias"] == "visual_bert.pooler.dense.bias"
    assert len(match(pretraining, BODY, CONFIG).ignored) == 7
    found = match(body, ANSWERS, CONFIG, new_head=True)
    assert found.fresh == ("cls.weight", "cls.bias")
    assert found.sources["visual_bert.pooler.dense.bias"] == "pooler.dense.bias"
    found = match(pretraining, ANSWERS, CONFIG, new_head=True)
    assert found.fresh == ("cls.weight", "cls.bias") and len(found.ignored) == 7
    wider = CONFIG.replace(num_labels=9)
    assert match(answers, ANSWERS, wider, new_head=True).fresh == ("cls.weight", "cls.bias")
    text = refused(match, body, ANSWERS, CONFIG, lines=3)
    assert text.splitlines()[1:] == [
        "  missing     cls.{weight, bias}",
        "To train a new head on this body, pass new_head=True.",
    ]


# The report


def report(arrays, architecture=ANSWERS, config=CONFIG, backend="tf", lines=2):
    tensors = ArrayTensors("vqa-pre/", arrays)
    return refused(match, tensors, architecture, config, backend=backend, lines=lines)


def test_report():
    """The example of DESIGN.md: every problem at once, the guilty field, and the way out."""
    arrays = arrays_of(PRETRAINING, tiny_config(visual_embedding_dim=12))
    assert report(arrays, lines=6) == (
        "cannot load VisualBertForQuestionAnswering (tf) from 'vqa-pre/': 3 problems\n"
        "  missing     cls.{weight, bias}\n"
        "  unexpected  cls.predictions.bias and 6 more: the head of VisualBertForPreTraining\n"
        "  mismatched  visual_bert.embeddings.visual_projection.weight: file (24, 12), config "
        "(24, 20);\n"
        "              visual_embedding_dim is 20, the file says 12\n"
        "To train a new head on this body, pass new_head=True."
    )


def without(*names):
    return lambda arrays: [arrays.pop(name) for name in names]


def replaced(name, change):
    return lambda arrays: arrays.update({name: change(arrays[name])})


def added(**new):
    return lambda arrays: arrays.update({k.replace("__", "."): v for k, v in new.items()})


ONE_PROBLEM = {
    "one missing": (
        without("visual_bert.pooler.dense.bias"),
        "missing     visual_bert.pooler.dense.bias",
    ),
    "leaves of one parent missing": (
        without("visual_bert.pooler.dense.bias", "visual_bert.pooler.dense.weight"),
        "missing     visual_bert.pooler.dense.{weight, bias}",
    ),
    "one unexpected": (
        added(visual_bert__pooler__scale=np.ones(1)),
        "unexpected  visual_bert.pooler.scale",
    ),
    "many unexpected": (
        lambda arrays: arrays.update({f"step{i}": np.ones(1) for i in range(9)}),
        "unexpected  {step0, step1, step2, step3} and 5 more",
    ),
    "wrong rank": (
        replaced("visual_bert.pooler.dense.bias", lambda a: a[None]),
        "mismatched  visual_bert.pooler.dense.bias: file (1, 24), config (24,)",
    ),
    "a scalar": (
        replaced("visual_bert.pooler.dense.bias", lambda a: a[0]),
        "mismatched  visual_bert.pooler.dense.bias: file (), config (24,)",
    ),
    "integers": (
        replaced("visual_bert.pooler.dense.bias", lambda a: a.astype(np.int64)),
        "mismatched  visual_bert.pooler.dense.bias: file int64, expected one of float64, float32, "
        "float16, bfloat16",
    ),
    "transposed": (
        replaced("visual_bert.embeddings.visual_projection.weight", lambda a: a.T),
        "mismatched  visual_bert.embeddings.visual_projection.weight: transposed; a file holds "
        "(out, in)",
    ),
}


@pytest.mark.parametrize("case", ONE_PROBLEM)
def test_one_problem(case):
    damage, line = ONE_PROBLEM[case]
    arrays = arrays_of(ANSWERS)
    damage(arrays)
    assert report(arrays) == (
        f"cannot load VisualBertForQuestionAnswering (tf) from 'vqa-pre/': 1 problem\n  {line}"
    )


@pytest.mark.parametrize(
    ("changes", "line", "blame"),
    [
        (
            {"hidden_size": 48},
            f"{WORDS}: file (113, 48), config (113, 24)",
            "hidden_size is 24, the file says 48",
        ),
        (
            {"vocab_size": 200},
            f"{WORDS}: file (200, 24), config (113, 24)",
            "vocab_size is 113, the file says 200",
        ),
        (
            {"max_position_embeddings": 64},
            "visual_bert.embeddings.position_embeddings.weight: file (64, 24), config (36, 24)",
            "max_position_embeddings is 36, the file says 64",
        ),
        (
            {"type_vocab_size": 3},
            "visual_bert.embeddings.token_type_embeddings.weight: file (3, 24), config (2, 24)",
            "type_vocab_size is 2, the file says 3",
        ),
        (
            {"intermediate_size": 41},
            "visual_bert.encoder.layer.0.intermediate.dense.weight: file (41, 24), config (40, 24)",
            "intermediate_size is 40, the file says 41",
        ),
        (
            {"num_hidden_layers": 3},
            "encoder: the file has 3 layers",
            "num_hidden_layers is 2, the file says 3",
        ),
        (
            {"num_hidden_layers": 1},
            "encoder: the file has 1 layer",
            "num_hidden_layers is 2, the file says 1",
        ),
        (
            {"bypass_transformer": True},
            "additional_layer: the file has one",
            "bypass_transformer is False, the file says True",
        ),
    ],
)
def test_one_wrong_field_is_one_problem(changes, line, blame):
    assert report(arrays_of(ANSWERS, tiny_config(**changes)), lines=3).splitlines()[1:] == [
        f"  mismatched  {line};",
        f"              {blame}",
    ]


def test_late_fusion_without_its_layer():
    text = report(arrays_of(ANSWERS), config=tiny_config(bypass_transformer=True), lines=3)
    assert "  mismatched  additional_layer: the file has none;\n" in text
    assert text.endswith("bypass_transformer is True, the file says False")


def test_wrong_head():
    wider = report(arrays_of(ANSWERS, tiny_config(num_labels=7)), lines=4)
    assert wider.splitlines()[1:] == [
        "  mismatched  cls.weight: file (7, 24), config (5, 24);",
        "              num_labels is 5, the file says 7",
        "To train a new head on this body, pass new_head=True.",
    ]
    heads = report(arrays_of(ANSWERS), "VisualBertForRegionToPhraseAlignment", lines=4)
    assert heads.splitlines()[2] == (
        "  unexpected  cls.{weight, bias}: the head of VisualBertForMultipleChoice or "
        "VisualBertForQuestionAnswering or VisualBertForVisualReasoning"
    )
    phrases = "VisualBertForRegionToPhraseAlignment"
    narrow = arrays_of(phrases, tiny_config(num_attention_heads=4))
    assert "hidden_size / num_attention_heads is 8, the file says 6" in report(
        narrow, phrases, lines=4
    )


def test_report_of_a_stranger_is_short():
    """Nothing fits: still a few lines."""
    rng = np.random.default_rng(0)
    shapes = {name: a.shape for name, a in arrays_of(ANSWERS).items()}
    text = report({f"h.{i}.w": np.zeros(3) for i in range(400)}, lines=4)
    assert "unexpected  h.0.w and 399 more" in text and "and 44 more" in text
    ranks = {n: np.zeros((*s, 1)) for n, s in shapes.items()}
    text = report(ranks, lines=8)
    assert text.endswith("  mismatched  and 39 more tensors of the wrong shape")
    integers = {n: rng.integers(0, 9, s) for n, s in shapes.items()}
    assert len(report(integers).splitlines()[1]) < 200


# A load that fails changes nothing


@pytest.mark.parametrize("backend", BACKENDS)
def test_failed_fill_changes_nothing(backend):
    chosen = get_backend(backend)
    model = make_model(backend, ANSWERS, CONFIG)
    before = read_all(ModelTensors(chosen, model))
    other = ArrayTensors("other", {n: a + 1 for n, a in arrays_of(ANSWERS).items()})

    class Breaking(ArrayTensors):
        def read(self, name):
            if name == "cls.bias":
                raise CheckpointError("the disk is gone")
            return super().read(name)

    refused(fill, chosen, model, Breaking("breaking", other.arrays))
    del other.arrays["cls.bias"]
    refused(fill, chosen, model, other, lines=3)
    same(read_all(ModelTensors(chosen, model)), before)


def test_file_that_vanishes(folder):
    tensors = read_weights(folder)
    os.truncate(folder / WEIGHTS, 6000)
    name = max(tensors.specs, key=lambda n: tensors._places[n][1])
    text = refused(tensors.read, name)
    assert text.startswith(f"{folder}/{WEIGHTS}: {name} cannot be read any more (")


# Damage


@pytest.mark.parametrize("kind", ["safetensors", "bin", "legacy bin"])
def test_truncation(kind, folder, tmp_path):
    broken = write_format(tmp_path / "broken", kind, arrays_of(ANSWERS))
    shutil.copy(folder / "config.json", broken)
    path = next(p for p in broken.iterdir() if p.name.startswith(("model", "pytorch")))
    data = path.read_bytes()
    for percent in range(0, 100, 2):
        path.unlink()
        path.write_bytes(data[: len(data) * percent // 100])
        text = refused(load_whole, broken)
        assert text.startswith(f"{path}: not a whole ") and "fetch or write it again" in text
    path.write_bytes(data)
    assert load_whole(broken)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.unlink()  # an array may still be mapped on the old file
    path.write_bytes(data)


def outcomes(folder, path, bits):
    """What becomes of loading with each bit flipped; anything but a VisualBertError is raised."""
    data = path.read_bytes()
    found = collections.Counter()
    for bit in bits:
        flip(path, bit)
        try:
            load_whole(folder)
            found["loaded"] += 1
        except VisualBertError:
            found["refused"] += 1
        path.unlink()
        path.write_bytes(data)
    return found


def test_flipped_bits_in_a_header(folder):
    path = folder / WEIGHTS
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    drawn = random.Random(0).sample(range(64, 64 + 8 * size), 400)
    found = outcomes(folder, path, [*range(64), *drawn])
    assert found["refused"] > 420 and found["loaded"] < 40  # what loads is the metadata


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_bit_of_a_header(folder):
    path = folder / WEIGHTS
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert outcomes(folder, path, range(64 + 8 * size))["loaded"] < 500


@pytest.mark.parametrize("kind", ["bin", "legacy bin"])
def test_flipped_bits_in_a_pickle(kind, folder, tmp_path):
    broken = write_format(tmp_path / "broken", kind, arrays_of(ANSWERS))
    shutil.copy(folder / "config.json", broken)
    drawn = random.Random(0).sample(range(8 * 5000), 250)
    assert outcomes(broken, broken / BIN, drawn)["refused"] > 50


@pytest.mark.parametrize("kind", [WEIGHTS, BIN])
def test_flipped_bits_in_the_data_are_found(kind, original, tmp_path):
    """For the files that this package writes: our CRC-32, and that of torch's zip."""
    arrays = arrays_of(ANSWERS)
    path = tmp_path / kind
    if kind == WEIGHTS:
        shutil.copy(original / kind, path)
        (size,) = struct.unpack("<Q", path.read_bytes()[:8])
        start, end, reader = 8 + size, path.stat().st_size, SafetensorsFiles
    else:
        write_zip(path, arrays)
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if "/data/" in e.filename]
            start, end, reader = entries[0].header_offset, entries[-1].header_offset, TorchFiles
    assert reader("x", [path]).verify_checksum()
    for byte in (start, end - 1, *random.Random(0).sample(range(start, end), 20)):
        flip(path, 8 * byte + 3)
        try:
            tensors = reader("x", [path])
        except CheckpointError:
            assert kind == BIN  # a bit of a zip's own structure
        else:
            differ = any((tensors.read(n) != a).any() for n, a in arrays.items())
            if differ or kind == WEIGHTS:
                assert f"{path}: the data has changed since it was written (CRC-32" in refused(
                    tensors.verify_checksum
                )
        flip(path, 8 * byte + 3)
    assert reader("x", [path]).verify_checksum()


def test_no_checksum_is_no_error(tmp_path):
    write_format(tmp_path, "safetensors", arrays_of(ANSWERS))
    assert read_weights(tmp_path).verify_checksum() is False
    write_format(tmp_path / "b", "legacy bin", arrays_of(ANSWERS))
    assert read_weights(tmp_path / "b").verify_checksum() is False


# Absurd headers

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = b"\0" * 8


def header_file(path, header, data=DATA, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return SafetensorsFiles("x", [path])


def entry(**changes):
    return {"a": {**ENTRY, **changes}}


ABSURD = {
    "length 2^63": ({"a": ENTRY}, DATA, 2**63),
    "length 2^64 - 1": ({"a": ENTRY}, DATA, 2**64 - 1),
    "length beyond the file": ({"a": ENTRY}, DATA, 10_000),
    "length zero": (b"", DATA),
    "cut header": ({"a": ENTRY}, DATA, 20),
    "not an object": (b"[]", b""),
    "NaN": (b'{"a":NaN}', DATA),
    "NaN in a shape": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', DATA),
    "not UTF-8": (b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', DATA),
    "deep": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, DATA),
    "too much data": ({"a": ENTRY}, DATA + b"\0"),
    "too little data": ({"a": ENTRY}, DATA[1:]),
    "negative offset": (entry(data_offsets=[-8, 0]), DATA),
    "offset beyond the file": (entry(data_offsets=[8, 16]), DATA),
    "reversed offsets": (entry(data_offsets=[8, 0]), DATA),
    "overlap": ({"a": ENTRY, "b": ENTRY}, DATA),
    "hole": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, b"\0" * 20),
    "product overflow": (entry(shape=[2**62, 2**62]), DATA),
    "product overflow to zero": (entry(shape=[2**32, 2**32]), DATA),
    "empty and huge": (entry(shape=[0, 2**62], data_offsets=[0, 0]), b""),
    "70 axes": (entry(shape=[1] * 70 + [2]), DATA),
    "negative axis": (entry(shape=[-2]), DATA),
    "fractional axis": (entry(shape=[2.0]), DATA),
    "unknown type": (entry(dtype="X9"), DATA),
    "unreadable type": (entry(dtype="F4", shape=[16]), DATA),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, DATA),
    "null": ({"a": None}, DATA),
    "metadata of numbers": ({"__metadata__": {"x": 5}, "a": ENTRY}, DATA),
    "metadata a list": ({"__metadata__": [], "a": ENTRY}, DATA),
    "the same name twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        DATA,
    ),
    "control characters": ({"a\x1b[31m": ENTRY}, DATA),
    "an endless name": ({"a" * 10_000: ENTRY}, DATA),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_headers(case, tmp_path):
    path = tmp_path / WEIGHTS
    text = refused(header_file, path, *ABSURD[case])
    assert text.startswith(f"{path}: ") and len(text) < len(str(path)) + 400
    assert text.isprintable()


@pytest.mark.parametrize("content", [b"", b"abc", b"\0" * 8, b"{}" * 100, b"\xff" * 100])
def test_not_safetensors(content, tmp_path):
    (tmp_path / WEIGHTS).write_bytes(content)
    assert "not a whole safetensors file (" in refused(read_weights, tmp_path)


def test_unusual_but_valid_headers(tmp_path):
    path = tmp_path / WEIGHTS
    assert header_file(path, {"__metadata__": None, "a": ENTRY}).read("a").tolist() == [0, 0]
    assert header_file(path, entry(shape=[0, 3], data_offsets=[0, 0]), b"").read("a").shape == (
        0,
        3,
    )
    assert header_file(path, entry(shape=[], data_offsets=[0, 4]), b"\0" * 4).read("a") == 0
    odd = {"a": {**ENTRY, "data_offsets": [1, 9]}, "b": {"dtype": "U8", "shape": [1]}}
    odd["b"]["data_offsets"] = [0, 1]
    assert header_file(path, odd, b"\0" * 9).read("a").flags.aligned
    assert header_file(path, {}, b"").specs == {}


# Index files


@pytest.fixture
def sharded(tmp_path):
    folder = write_format(tmp_path / "sharded", "sharded safetensors", arrays_of(ANSWERS))
    CONFIG.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda m: {"weight_map": {**m, "a": "../x.safetensors"}},
            "shard '../x.safetensors' lies outside the folder",
        ),
        (
            lambda m: {"weight_map": {**m, "a": "/etc/passwd"}},
            "shard '/etc/passwd' lies outside the folder",
        ),
        (
            lambda m: {"weight_map": {**m, "a": "x.safetensors"}},
            "shard 'x.safetensors' is missing from the folder",
        ),
        (lambda m: {"weight_map": {**m, "a": ".."}}, "shard '..' is not a .safetensors file"),
        (lambda m: {"weight_map": {**m, "a": ""}}, "shard '' is not a .safetensors file"),
        (
            lambda m: {"weight_map": {**m, "a": "config.json"}},
            "shard 'config.json' is not a .safetensors file",
        ),
        (
            lambda m: {"weight_map": {**m, "a": 5}},
            "its weight_map must give a file name for each tensor",
        ),
        (
            lambda m: {"weight_map": {**m, "a": [1]}},
            "its weight_map must give a file name for each tensor",
        ),
        (
            lambda m: {"weight_map": {**m, "a": m["cls.bias"]}},
            "a is in none of its shards; fetch the checkpoint again",
        ),
        (
            lambda m: {"weight_map": {**m, "a": m["cls.bias"], "b": m["cls.bias"]}},
            "a is in none of its shards, nor are 1 more; fetch the checkpoint again",
        ),
        (lambda m: {"weight_map": {}}, "has no weight_map, which says where each tensor is"),
        (lambda m: {"weight_map": [1]}, "has no weight_map, which says where each tensor is"),
        (lambda m: {}, "has no weight_map, which says where each tensor is"),
        (lambda m: [m], "expected a JSON object, found a list"),
        (lambda m: "}", "expected a JSON object, found a string"),
    ],
)
def test_broken_index(change, expected, sharded):
    index = sharded / (WEIGHTS + ".index.json")
    index.write_text(json.dumps(change(json.loads(index.read_text())["weight_map"])))
    assert refused(read_weights, sharded) == f"{index}: {expected}"


def test_unreadable_index(sharded):
    index = sharded / (WEIGHTS + ".index.json")
    index.write_bytes(b"{\xff")
    assert refused(read_weights, sharded).startswith(f"{index}: not readable as JSON: ")


def test_one_tensor_in_two_shards(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    shutil.copy(shards[0], shards[1])
    text = refused(read_weights, sharded)
    assert text.startswith(f"{shards[1]}: ") and text.endswith(" is in another shard already")


# Pickles


class Evil:
    """Runs a function of its choice when it is unpickled."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def evil_state(case, canary):
    import torch

    touch = f"open({str(canary)!r}, 'w').close()"
    evil = {
        "os.system": Evil(os.system, f"touch {canary}"),
        "eval": Evil(eval, touch),
        "exec": Evil(exec, touch),
        "popen": Evil(subprocess.Popen, ["touch", str(canary)]),
        "open": Evil(open, str(canary), "w"),
        "import": Evil(__import__, "this"),
        "torch.load": Evil(torch.load, str(canary)),
        "call": Evil(operator.methodcaller, "system"),
    }
    state = torch_tensors({"a": np.zeros(2, np.float32)})
    nested = {**state, "b": [{"c": (evil["os.system"],)}]}
    return {
        **{name: {**state, "b": thing} for name, thing in evil.items()},
        "bare": evil["os.system"],
        "nested": nested,
    }[case]


EVIL = ["os.system", "eval", "exec", "popen", "open", "import", "torch.load", "call"]
EVIL += ["bare", "nested"]


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", EVIL)
def test_malicious_pickles(case, modern, folder, tmp_path):
    import torch

    canary = tmp_path / "canary"
    (folder / WEIGHTS).unlink()
    torch.save(evil_state(case, canary), folder / BIN, _use_new_zipfile_serialization=modern)
    text = refused(load_whole, folder)
    assert text.startswith(f"{folder / BIN}: refused, because it is not weights alone: ")
    assert text.endswith("(such a file can run code when it is loaded)")
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bare_pickle(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    canary = tmp_path / "canary"
    for protocol in range(6):
        data = pickle.dumps({"a": Evil(os.system, f"touch {canary}")}, protocol=protocol)
        (folder / BIN).write_bytes(data)
        refused(load_whole, folder)
        assert not canary.exists()


EXPECTED = "expected a dictionary of tensors by name, as torch.save(model.state_dict()) writes it"
RUNS = (
    "refused, because it is not weights alone: it asks for {}; where its code is at hand and "
    "trusted, torch.save(model.state_dict(), FILE) writes the weights alone (such a file can run "
    "code when it is loaded)"
)


def not_weights():
    import torch

    a = torch.zeros(2)
    return {
        "a list": ([a], f"{EXPECTED}; it is of type list"),
        "a tensor": (a, f"{EXPECTED}; it is one tensor"),
        "nothing": ({}, EXPECTED),
        "a nest of nothing": ({"state_dict": {}}, EXPECTED),
        "two nests": ({"model": {"model": {"a": a}}}, f"{EXPECTED}; 'model' is of type dict"),
        "a number beside": ({"a": a, "epoch": 3}, f"{EXPECTED}; 'epoch' is of type int"),
        "numbered": ({0: a}, f"{EXPECTED}; 0 is not a name"),
        "an optimizer": (
            {"epoch": 3, "optimizer": torch.optim.Adam([a]).state_dict()},
            "it is the state of an optimizer, without the model; open the model's own file",
        ),
        "a module": (torch.nn.Linear(2, 2), RUNS.format("torch.nn.modules.linear.Linear")),
        "sparse": (
            {"a": torch.eye(3).to_sparse()},
            "only dense tensors are read, and it holds a sparse tensor; save a dense one",
        ),
        "meta": (
            {"a": torch.zeros(2, device="meta")},
            "only dense tensors are read, and it holds a tensor without data (meta); save a dense "
            "one",
        ),
        "conjugated": (
            {"a": torch.zeros(2, dtype=torch.complex64).conj()},
            "only dense tensors are read, and it holds a lazily conjugated or negated tensor; save "
            "tensor.resolve_conj()",
        ),
    }


@pytest.mark.parametrize("case", not_weights())
def test_pickles_that_are_no_weights(case, folder):
    import torch

    (folder / WEIGHTS).unlink()
    content, text = not_weights()[case]
    torch.save(content, folder / BIN)
    assert refused(load_whole, folder) == f"{folder / BIN}: {text}"


def test_nested_weights(folder):
    import torch

    (folder / WEIGHTS).unlink()
    arrays = arrays_of(ANSWERS)
    for nest in ("model", "state_dict", "model_state_dict"):
        torch.save({"epoch": 3, nest: torch_tensors(arrays)}, folder / BIN)
        same(load_whole(folder), arrays)


def test_types_that_are_no_weights(folder):
    import torch

    (folder / WEIGHTS).unlink()
    state = torch_tensors(arrays_of(ANSWERS))
    torch.save({**state, "cls.bias": state["cls.bias"].to(torch.complex64)}, folder / BIN)
    assert refused(load_whole, folder, lines=3).splitlines()[:2] == [
        f"cannot load {ANSWERS} from '{folder}': 1 problem",
        "  mismatched  cls.bias: file complex64, expected one of float64, float32, float16, "
        "bfloat16",
    ]


# Writing


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        save(tmp_path / "new", arrays_of(ANSWERS))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o777 & ~mask
    for path in (tmp_path / "new").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_unwritable_targets(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    arrays = arrays_of(ANSWERS)
    assert refused(save, file, arrays) == (
        f"cannot write {file}: it is not a folder; nothing was changed"
    )
    assert refused(save, file / "below", arrays) == (
        f"cannot write {file}/below: Not a directory; nothing there was changed"
    )
    assert refused(save, "/proc/nothing/here", arrays).endswith("nothing there was changed")
    assert "File name too long" in refused(save, tmp_path / "new" / ("x" * 300), arrays)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "it is not a folder" in refused(save, tmp_path / "link", arrays)
    assert file.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_new_parents_go_with_a_failure(tmp_path):
    def fail(path):
        path.write_text("half")
        raise RuntimeError("first line\nsecond line")

    target = tmp_path / "a" / "b" / "c"
    assert refused(replace_files, target, {"x": fail}) == (
        f"cannot write {target}: first line; nothing there was changed"
    )
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        replace_files(target, {"x": lambda path: signal.raise_signal(signal.SIGINT)})
    assert os.listdir(tmp_path) == []


def test_full_disk(folder):
    """A write that stops halfway, by the limit on the size of files."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        text = refused(save, folder, arrays_of(ANSWERS, CONFIG.replace(vocab_size=3000)))
        new = refused(save, folder / "new", arrays_of(ANSWERS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in text and text.endswith("; nothing there was changed")
    assert f"cannot write {folder}/new: " in new
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_too_small_a_disk(folder, monkeypatch):
    """Seen beforehand, since HDF5 crashes the process when the disk is full."""
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100_000, 0, 100_000))
    assert refused(save, folder, arrays_of(ANSWERS)) == (
        f"cannot write {folder}: it needs 0.1 MB and the disk has 0.1 MB left; nothing there was "
        "changed"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))  # unknown
    save(folder, arrays_of(ANSWERS))


@pytest.mark.parametrize("fails", ["model.safetensors", "config.json", "old.bin"])
def test_rename_that_fails_is_undone(fails, folder, monkeypatch):
    (folder / "old.bin").write_text("old")
    (folder / "orbax").mkdir()
    (folder / "orbax" / "x").write_text("x")
    before = {p.name: p.read_bytes() for p in folder.glob("**/*") if p.is_file()}
    rename, failures = os.replace, [fails]

    def replace(source, target):
        if os.path.basename(source) in failures and os.path.basename(target) in failures:
            raise OSError(5, failures.pop() and "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    writers = {
        "orbax": lambda path: (path.mkdir(), (path / "y").write_text("y")),
        "extra": lambda path: path.write_text("e"),
        WEIGHTS: lambda path: path.write_text("w"),
        "config.json": lambda path: path.write_text("c"),
    }
    text = refused(replace_files, folder, writers, remove=["old.bin", "absent"])
    assert text == f"cannot write {folder}: Input/output error; nothing there was changed"
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.glob("**/*") if p.is_file()} == before
    assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS, "old.bin", "orbax"]
    replace_files(folder, writers, remove=["old.bin", "absent"])
    assert sorted(os.listdir(folder)) == ["config.json", "extra", WEIGHTS, "orbax"]
    assert os.listdir(folder / "orbax") == ["y"]


def test_links_are_replaced_not_followed(folder, tmp_path):
    """As in the Hub's cache, whose blobs must stay as they are."""
    blob = tmp_path / "blob"
    os.replace(folder / WEIGHTS, blob)
    (folder / WEIGHTS).symlink_to(blob)
    before = blob.read_bytes()
    save(folder, {n: a + 1 for n, a in arrays_of(ANSWERS).items()})
    assert blob.read_bytes() == before and not (folder / WEIGHTS).is_symlink()


def test_saving_over_the_mapped_file(folder):
    """A loaded model's arrays lie in the file; the new file must not disturb them."""
    tensors = read_weights(folder)
    arrays = read_all(tensors)
    copies = {n: a.copy() for n, a in arrays.items()}
    save(folder, {n: a + 1 for n, a in arrays.items()})
    same(arrays, copies)


def test_two_writers_at_once(folder):
    versions = [{n: np.full_like(a, v) for n, a in arrays_of(ANSWERS).items()} for v in (1, 2)]

    def work(arrays):
        for _ in range(10):
            save(folder, arrays)

    threads = [threading.Thread(target=work, args=(arrays,)) for arrays in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({float(a.flat[0]) for a in load_whole(folder).values()}) == 1
    assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS]


SAVER = """
import sys
import numpy as np
from visualbert.checkpoint.tensors import ArrayTensors
from visualbert.checkpoint.write import write_folder
from visualbert.config import VisualBertConfig
from visualbert.pretrained import open_checkpoint
folder = sys.argv[1]
checkpoint = open_checkpoint(folder)
shapes = {name: spec.shape for name, spec in checkpoint.tensors.specs.items()}
version = int(checkpoint.tensors.read("cls.bias")[0])
print("ready", flush=True)
while True:
    version += 1
    arrays = {name: np.full(shape, version, np.float32) for name, shape in shapes.items()}
    write_folder(folder, ArrayTensors("arrays", arrays), checkpoint.config)
"""


def test_killed_while_saving(tmp_path):
    """kill -9 at ten moments or more: the old or the new checkpoint is there, whole; no litter
    stays.
    """
    config = CONFIG.replace(vocab_size=20_000)
    folder = tmp_path / "x"
    save(folder, {n: a * 0 for n, a in arrays_of(ANSWERS, config).items()}, config=config)
    draw = random.Random(0)
    versions, littered = [], 0
    while len(versions) < 10 or (len(versions) < 100 and not (littered and versions[-1] > 0)):
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(draw.uniform(0.0, 0.15) * (1 + len(versions) // 10))
            child.kill()
        found = {float(v) for a in load_whole(folder).values() for v in (a.min(), a.max())}
        assert len(found) == 1
        assert read_weights(folder).verify_checksum()
        versions.append(found.pop())
        littered += any(p.name.startswith(".writing-") for p in folder.iterdir())
    assert versions == sorted(versions) and versions[-1] > 0
    assert littered, "no kill hit a save: the test proves nothing"
    save(folder, arrays_of(ANSWERS, config), config=config)
    assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS]


def test_leftovers(folder):
    """What nobody holds goes, however young; what a live process holds stays, and so do links."""
    for name in (".writing-old", ".writing-live", ".writing-young"):
        (folder / name).mkdir()
        (folder / name / WEIGHTS).write_text("half")
    os.utime(folder / ".writing-old", (1, 1))
    (folder / ".writing-link").symlink_to(folder.parent)
    lock = writing._lock(folder / ".writing-live")
    try:
        save(folder, arrays_of(ANSWERS))
    finally:
        os.close(lock)
    assert {p.name for p in folder.glob(".*")} == {".writing-link", ".writing-live"}
    assert (folder / ".writing-live" / WEIGHTS).read_text() == "half"
    assert (folder.parent / folder.name / WEIGHTS).is_file()


# A BERT


def bert_arrays(config=CONFIG, prefix="bert.", head=True):
    arrays = arrays_of(PRETRAINING, config)
    return {
        name.replace("visual_bert.", prefix): array
        for name, array in arrays.items()
        if ".visual_" not in name and (head or not name.startswith("cls."))
    }


def bert_folder(folder, arrays, **changes):
    values = {k: v for k, v in CONFIG.to_dict().items() if not k.startswith(("visual", "special"))}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "bert", **changes}))
    write_format(folder, "safetensors", arrays)
    return folder


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_bert(prefix, tmp_path):
    arrays = bert_arrays(prefix=prefix)
    arrays[prefix + "embeddings.position_ids"] = np.arange(36)[None]
    arrays["cls.predictions.decoder.weight"] = arrays[prefix + "embeddings.word_embeddings.weight"]
    checkpoint = open_bert(bert_folder(tmp_path, arrays), PRETRAINING, visual_embedding_dim=20)
    start = checkpoint.tensors
    assert isinstance(start, WarmStart)
    assert start.ignored == (prefix + "embeddings.position_ids",)
    assert start.derived == (
        "visual_bert.embeddings.visual_token_type_embeddings.weight",
        "visual_bert.embeddings.visual_position_embeddings.weight",
    )
    assert start.fresh == (
        "visual_bert.embeddings.visual_projection.weight",
        "visual_bert.embeddings.visual_projection.bias",
    )
    found = match(start, PRETRAINING, checkpoint.config)
    check_ties(start, found)
    assert np.array_equal(start.read("cls.predictions.bias"), arrays["cls.predictions.bias"])
    untied = {**arrays, "cls.predictions.decoder.weight": arrays["cls.predictions.bias"][:, None]}
    bert_folder(tmp_path, untied)
    start = open_bert(tmp_path, PRETRAINING, visual_embedding_dim=20).tensors
    assert "differs from" in refused(check_ties, start, match(start, PRETRAINING, CONFIG))


def test_bert_refusals(tmp_path):
    arrays = bert_arrays(head=False)
    path = tmp_path / "config.json"
    bert_folder(tmp_path, arrays, position_embedding_type="relative_key", is_decoder=True)
    assert refused(open_bert, tmp_path, BODY, error=ConfigError) == (
        f"{path}: VisualBERT cannot start from a BERT with position_embedding_type='relative_key', "
        "is_decoder=True"
    )
    bert_folder(tmp_path, arrays)
    assert refused(open_bert, tmp_path, BODY, error=ConfigError, visual_embeding_dim=9) == (
        f"{path}: VisualBertConfig has no field 'visual_embeding_dim'; did you mean "
        "'visual_embedding_dim'?"
    )
    assert "unknown architecture 'Bert'" in refused(open_bert, tmp_path, "Bert", error=ConfigError)
    bert_folder(tmp_path, arrays, num_hidden_layers=4)
    assert refused(open_bert, tmp_path, BODY) == (
        f"'{tmp_path}' is not a BERT of 4 layers: it lacks "
        "encoder.layer.2.attention.self.query.weight and 31 more"
    )
    bert_folder(tmp_path, {k: v for k, v in arrays.items() if "position_emb" not in k})
    assert "it lacks embeddings.position_embeddings.weight" in refused(open_bert, tmp_path, BODY)
    bert_folder(tmp_path, {**arrays, "bert.adapter.weight": np.zeros(2)})
    assert refused(open_bert, tmp_path, BODY) == (
        f"'{tmp_path}' holds tensors that no BERT has: bert.adapter.weight"
    )
    gamma = {"bert.embeddings.LayerNorm.gamma": arrays["bert.embeddings.LayerNorm.weight"]}
    bert_folder(tmp_path, {**arrays, **gamma})
    assert "under two of its names" in refused(open_bert, tmp_path, BODY)
    bert_folder(tmp_path, arrays, model_type="roberta")
    assert refused(open_bert, tmp_path, BODY, error=ConfigError) == (
        f"{path}: model_type is 'roberta', expected 'bert'"
    )
    bert_folder(tmp_path, arrays, hidden_act="quick_gelu")
    assert f"{path}: hidden_act='quick_gelu' is not one of" in refused(
        open_bert, tmp_path, BODY, error=ConfigError
    )
    assert "attention" in config_from_bert({}).to_json_string()


@pytest.mark.parametrize("seed", [-1, 1.5, "a", True, None])
def test_seeds(seed):
    text = refused(InitialValues, BODY, CONFIG, seed, error=UsageError)
    assert text == f"seed={seed!r} must be an integer from 0 up"


# Names of checkpoints, and the Hub


def test_names_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    expected = {
        "": "the checkpoint's name is empty; expected a folder or a Hub id",
        "/nowhere": "/nowhere: no such file or folder",
        "./nowhere": "./nowhere: no such file or folder",
        "~/nowhere": "~/nowhere: no such file or folder",
        "a/b/c": "a/b/c: no such file or folder",
        "nowhere/": "nowhere/: no such file or folder",
        "best.th": "best.th: no such file or folder",
        "a b/c": "a b/c: no such folder, and not a Hub id of the form owner/name",
        "x" * 300: "x" * 300 + ": no such folder, and not a Hub id of the form owner/name",
    }
    for name, text in expected.items():
        assert refused(find_source, name) == text
    assert refused(find_source, "/" + "x" * 5000).endswith(": no such file or folder")
    assert find_source("file") == Path("file")
    assert refused(open_checkpoint, "file") == (
        "file: none of the formats that are read: torch's (zip or older), safetensors, HDF5, "
        "msgpack, a tar archive, or a TensorFlow checkpoint (give its name without .index)"
    )


HUB_CLIENT = """
import json, sys
from visualbert import VisualBertConfig, VisualBertError
from visualbert.pretrained import open_checkpoint
for name, revision, *rest in json.loads(sys.argv[1]):
    try:
        if rest:
            config = VisualBertConfig.from_pretrained(name, revision=revision, **rest[0])
            print(json.dumps(["read", config.hidden_size, config.num_labels]))
            continue
        checkpoint = open_checkpoint(name, revision=revision)
        bias = checkpoint.tensors.read("cls.bias")
        print(json.dumps(["loaded", len(checkpoint.tensors.specs), float(bias[0])]))
    except VisualBertError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def ask_hub(requests, tmp_path, endpoint, **env):
    """What `open_checkpoint` says to (name, revision) pairs in a process with an empty cache, and
    `VisualBertConfig.from_pretrained` to those with changes behind them.
    """
    done = subprocess.run(
        [sys.executable, "-c", HUB_CLIENT, json.dumps(requests)],
        env={
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hub-cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "*",
            **env,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


UNREACHABLE = (
    "{}: no such folder here, and the Hub did not give it{} (it cannot be reached, and nothing is "
    "in the cache); check the name and the connection, or pass a local folder"
)


@pytest.mark.parametrize("env", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["closed port", "offline"])
def test_unreachable_hub(env, tmp_path):
    name = "uclanlp/visualbert-vqa"
    started = time.monotonic()
    found = ask_hub([(name, None), (name, "v2")], tmp_path, "http://127.0.0.1:9", **env)
    assert found == [
        ["HubError", UNREACHABLE.format(name, "")],
        ["HubError", UNREACHABLE.format(name, " at revision v2")],
    ]
    assert time.monotonic() - started < 30


class Hub(http.server.ThreadingHTTPServer):
    """Answers the requests of huggingface_hub for the repositories in `root`."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.root, self.requests = root, []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class HubRequest(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        self.server.requests.append(f"{self.command} {self.path}")

    def do_GET(self):
        parts = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            self.repository("/".join(parts[2:4]), parts[4:])
        else:
            self.file("/".join(parts[:2]), parts[3], parts[4])

    do_HEAD = do_GET

    def repository(self, name, query):
        folder = self.server.root / name
        if name in ("me/gated", "me/broken"):
            code = {"me/gated": (403, "GatedRepo"), "me/broken": (200, "")}[name]
            self.answer(code[0], b"<html>", {"X-Error-Code": code[1]})
        elif not folder.is_dir():
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif query[1] not in ("main", self.server.commit):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif query[0] == "tree":
            listing = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name}
                for p in folder.iterdir()
            ]
            self.answer(200, json.dumps(listing).encode())
        else:
            siblings = [{"rfilename": p.name} for p in folder.iterdir()]
            content = {"id": name, "sha": self.server.commit, "siblings": siblings}
            self.answer(200, json.dumps(content).encode())

    def file(self, name, revision, file):
        data = (self.server.root / name / file).read_bytes()
        self.answer(200, data, {"ETag": f'"{file}"', "X-Repo-Commit": self.server.commit})

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "hub" / "me").mkdir(parents=True)
    with Hub(tmp_path / "hub") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_hub(hub, original, tmp_path):
    """The real client against a server that speaks the Hub's API."""
    shutil.copytree(original, hub.root / "me" / "safe")
    write_format(hub.root / "me" / "bin", "bin", arrays_of(ANSWERS))
    shutil.copy(original / "config.json", hub.root / "me" / "bin")
    write_format(hub.root / "me" / "shards", "sharded safetensors", arrays_of(ANSWERS))
    shutil.copy(original / "config.json", hub.root / "me" / "shards")
    (hub.root / "me" / "bare").mkdir()
    (hub.root / "me" / "bare" / "README.md").write_text("nothing")
    count, first = 45, float(arrays_of(ANSWERS)["cls.bias"][0])
    requests = [
        ("me/safe", None),
        ("me/safe", hub.commit),
        ("me/safe", "v9"),
        ("me/bin", None),
        ("me/shards", "main"),
        ("me/none", None),
        ("me/bare", None),
        ("me/gated", None),
        ("me/broken", None),
    ]
    found = ask_hub(requests, tmp_path, hub.endpoint)
    loaded = ["loaded", count, first]
    assert [found[i] for i in (0, 1, 3, 4)] == [loaded] * 4
    lead = "{}: no such folder here, and the Hub did not give it{} ({}); check the name and the "
    lead += "connection, or pass a local folder"
    assert found[2] == [
        "HubError",
        lead.format("me/safe", " at revision v9", "the repository has no such revision"),
    ]
    private = "no such repository, or it is private: hf auth login"
    assert found[5] == ["HubError", lead.format("me/none", "", private)]
    assert found[6] == [
        "CheckpointError",
        "me/bare: the repository holds no checkpoint; looked for config.json, model.safetensors "
        "and pytorch_model.bin",
    ]
    asked = "access to this repository has to be asked for there"
    assert found[7] == ["HubError", lead.format("me/gated", "", asked)]
    assert found[8][0] == "HubError"
    assert "/me/bin/resolve/" in " ".join(hub.requests)
    fetched = [r for r in hub.requests if r.startswith("GET") and "/resolve/" in r]
    assert not any("README" in r for r in fetched)


def test_a_config_of_the_hub(hub, original, tmp_path):
    """It alone is fetched, and errors are those of a model."""
    shutil.copytree(original, hub.root / "me" / "safe")
    (hub.root / "me" / "bare").mkdir()
    (hub.root / "me" / "bare" / "README.md").write_text("nothing")
    requests = [
        ("me/safe", None, {}),
        ("me/safe", hub.commit, {"num_labels": 7}),
        ("me/safe", "v9", {}),
        ("me/bare", None, {}),
        ("me/none", "main", {}),
        ("me/config.json", None, {}),
        ("./me", None, {}),
    ]
    found = ask_hub(requests, tmp_path, hub.endpoint)
    lead = "{}: no such folder here, and the Hub did not give it at revision {} ({}); check the "
    lead += "name and the connection, or pass a local folder"
    private = "no such repository, or it is private: hf auth login"
    absent = "{}: no such file; a checkpoint folder needs one"
    assert found == [
        ["read", 24, 5],
        ["read", 24, 7],
        ["HubError", lead.format("me/safe", "v9", "the repository has no such revision")],
        ["ConfigError", "me/bare: the repository holds no config.json"],
        ["HubError", lead.format("me/none", "main", private)],
        ["ConfigError", absent.format("me/config.json")],
        ["ConfigError", absent.format("me")],
    ]
    fetched = {r.rpartition("/")[2] for r in hub.requests if "/resolve/" in r}
    assert fetched == {"config.json"}
