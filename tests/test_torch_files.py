"""torch's files read without torch: bit for bit what `torch.load` gives, in both formats and in
every layout that `torch.save` leaves; a file that attacks or is damaged ends in one sentence.
"""

import argparse
import collections
import io
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import pytest

from visualbert import CheckpointError
from visualbert.checkpoint import pickles
from visualbert.checkpoint.tensors import STORED
from visualbert.checkpoint.torch_files import TorchFiles, open_torch

torch = pytest.importorskip("torch")

FORMATS = {"zip": True, "legacy": False}
RUNS = (
    "refused, because it is not weights alone: it asks for {}; where its code is at hand and "
    "trusted, torch.save(model.state_dict(), FILE) writes the weights alone (such a file can run "
    "code when it is loaded)"
)
BROKEN = "not a whole PyTorch file ({}); fetch or write it again"


def save(path, value, kind="zip"):
    torch.save(value, path, _use_new_zipfile_serialization=FORMATS[kind])
    return path


def refused(path, lines=1):
    """What is said of a file; it takes neither long nor much, and is fit to be printed."""
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read_all(TorchFiles("x", [path]))
    assert time.process_time() - started < 5
    text = str(caught.value)
    assert len(text.splitlines()) == lines and text.isprintable() and len(text) < 700
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def read_all(tensors):
    return {name: tensors.read(name) for name in tensors.specs}


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes()


def torch_bits(tensor):
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def same(path, within=None, expected=None):
    """Our reading of a file is torch's own, bit for bit."""
    if expected is None:
        expected = torch.load(path, weights_only=True, map_location="cpu")
        expected = expected if within is None else expected[within]
    tensors = TorchFiles("x", [path])
    assert list(tensors.specs) == list(expected)
    for name, tensor in expected.items():
        array = tensors.read(name)
        assert array.dtype == STORED[str(tensor.dtype).removeprefix("torch.")], name
        assert tensors.specs[name] == (tuple(tensor.shape), array.dtype.name)
        assert array.shape == tuple(tensor.shape), name
        assert bits(array) == torch_bits(tensor), name
        assert array.flags.writeable and array.flags.c_contiguous and array.flags.aligned
    return tensors


def drawn(dtype, *shape):
    """Any bits at all, NaN, infinities and denormals among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = int(np.prod(shape)) * size
    raw = np.random.default_rng(count + size).integers(0, 256, count, dtype=np.uint8)
    if dtype is torch.bool:
        raw %= 2
    return torch.from_numpy(raw).view(dtype).reshape(shape)


# What torch saves


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", STORED)
def test_every_type(dtype, kind, tmp_path):
    a = drawn(getattr(torch, dtype), 5, 7)
    state = {
        "a": a,
        "one": a[0, 0].clone(),
        "transposed": a.T,
        "part": a[1:4, 2:5],
        "empty": torch.empty(0, 3, dtype=a.dtype),
    }
    path = save(tmp_path / "x", state, kind)
    same(path, expected=state)
    if kind == "zip" or not dtype.startswith(("float8", "uint1", "uint3", "uint6")):
        same(path)  # of the others torch reads only what it writes as a zip


class Model(torch.nn.Module):
    """Shares its embedding with its decoder, and has a buffer."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(11, 6)
        self.decoder = torch.nn.Linear(6, 11)
        self.decoder.weight = self.words.weight
        self.register_buffer("position_ids", torch.arange(9)[None])


def layouts():
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    flat = torch.arange(240.0)
    strange = torch.as_strided(torch.arange(12.0), (3, 1, 4), (4, 10**6, 1))
    tagged = torch.ones(3)
    tagged.note = "a program's own attribute"
    whole = Model().half()
    return {
        "tied": {"a": base, "b": base, "c": base.view(8, 6)},
        "offsets": {f"row{i}": base[i] for i in range(6)},
        "columns": {f"column{i}": base[:, i] for i in range(8)},
        "permuted": {"a": flat.view(2, 3, 4, 10).permute(3, 1, 0, 2)},
        "steps": {"a": flat[3::7], "b": flat.view(12, 20)[1::3, ::4]},
        "overlapping": {"a": flat.unfold(0, 5, 2)},
        "expanded": {"a": base[:1].expand(50, 8), "b": torch.tensor(2.0).expand(3, 4)},
        "channels last": {"a": flat.view(1, 5, 8, 6).to(memory_format=torch.channels_last)},
        "empty": {"a": torch.empty(0), "b": torch.empty(3, 0, 5), "c": base[6:]},
        "no axes": {"a": torch.tensor(1.5), "b": flat[7], "c": torch.tensor(True)},
        "an axis of one": {"a": strange, "b": base[:, None, :1]},
        "parameters": {"a": torch.nn.Parameter(base), "b": torch.nn.Parameter(base.T, False)},
        "module": whole.state_dict(),
        "module with its parameters": Model().state_dict(keep_vars=True),
        "ordered": collections.OrderedDict(b=base, a=base + 1),
        "attributes": {"a": tagged, "b": base},
        "unicode": {"größe.weight": base, "层": base},
    }


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("case", layouts())
def test_every_layout(case, kind, tmp_path):
    same(save(tmp_path / "x", layouts()[case], kind))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_changed_copy_leaves_the_others(kind, tmp_path):
    """Tied tensors share their bytes in the file, never what is handed out."""
    path = save(tmp_path / "x", layouts()["tied"], kind)
    tensors = TorchFiles("x", [path])
    tensors.read("a")[:] = 0
    assert bits(tensors.read("b")) == torch_bits(torch.load(path, weights_only=True)["b"])
    same(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("nest", ["model", "state_dict", "model_state_dict"])
def test_training_states_with_a_model(nest, kind, tmp_path):
    """MMF's, Lightning's and a usual loop's, with all that stands beside the weights."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    model.decoder(model.words(torch.arange(4))).sum().backward()
    optimizer.step()
    value = {
        "epoch": 3,
        nest: model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best_metric_value": torch.tensor(0.7),
        "fp16_scaler": None,
        "config": {"model_config": {"visual_bert": {"bert_model_name": "x", "layers": [1, 2.5]}}},
        "git/diff": "+ größer",
        "seen": {1, 2},
        "shape": torch.Size([1, 2]),
    }
    same(save(tmp_path / "x", value, kind), within=nest)


def test_allennlp(tmp_path):
    """What its trainer writes at the end of an epoch: two files, one of which holds the model."""
    model = Model()
    optimizer = torch.optim.Adam(model.parameters())
    same(save(tmp_path / "model_state_epoch_0.th", model.state_dict(), "legacy"))
    state = {
        "epoch": 0,
        "val_metric_per_epoch": [np.float64(0.5), np.float32(0.25)],
        "optimizer": optimizer.state_dict(),
    }
    assert refused(save(tmp_path / "training_state_epoch_0.th", state, "legacy")) == (
        "it is the state of an optimizer, without the model; open the model's own file"
    )


@pytest.fixture
def modules(monkeypatch):
    """Classes in modules of other programs, which are gone when the file is read."""

    def make(name, **members):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[0]))
        for member, value in members.items():
            value.__module__, value.__qualname__ = name, member
            setattr(sys.modules[name], member, value)
        return sys.modules[name]

    return make


@pytest.mark.parametrize("kind", FORMATS)
def test_configurations_of_other_programs(kind, modules, tmp_path, monkeypatch):
    """Pythia pickled its configuration beside the model, and early MMF that of OmegaConf."""

    class ConfigNode(collections.OrderedDict):
        def __init__(self, content=()):
            super().__init__(content)
            self.__dict__["__is_frozen"] = True

    class DictConfig:
        def __init__(self, **content):
            self.content, self.other = content, self
            self.types = collections.defaultdict(dict, a={}), dict, int

    modules("pythia.utils.configuration", ConfigNode=ConfigNode)
    modules("omegaconf.dictconfig", DictConfig=DictConfig)
    node = ConfigNode({"model_attributes": ConfigNode({"visual_bert": ConfigNode({"a": [1]})})})
    model = Model().state_dict()
    for config in (node, DictConfig(a=1), [DictConfig(), np.arange(3), np.int64(3)]):
        path = save(tmp_path / "x", {"model": model, "config": config}, kind)
        found = read_all(TorchFiles("x", [path]))
        assert {name: bits(array) for name, array in found.items()} == {
            name: torch_bits(tensor) for name, tensor in model.items()
        }
    kept = open_torch(save(tmp_path / "x", {"model": model, "config": node}, kind)).value["config"]
    assert kept == {"model_attributes": {"visual_bert": {"a": [1]}}}
    path = save(tmp_path / "x", {"model": DictConfig()}, kind)
    assert refused(path).endswith("'model' is an object of a class that is not read")


# What older and other versions of torch wrote, opcode by opcode


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    if 0 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tuple_of(*parts):
    return b"(" + b"".join(parts) + b"t"


def name_of(module, name):
    return f"c{module}\n{name}\n".encode()


def storage(key="0", kind="FloatStorage", size=4, view=None, device="cuda:0", module="torch"):
    parts = [text("storage"), name_of(module, kind), text(key), text(device), number(size)]
    return tuple_of(*parts, *([] if view is None else [view])) + b"Q"


def tensor(*, function="_rebuild_tensor_v2", of=None, offset=0, shape=(2, 2), strides=(2, 1)):
    """One tensor as a pickle describes it."""
    shape, strides = (tuple_of(*map(number, numbers)) for numbers in (shape, strides))
    parts = [storage() if of is None else of, number(offset), shape, strides]
    if function != "_rebuild_tensor":
        parts += [b"\x89", name_of("collections", "OrderedDict") + b")R"]
    return name_of("torch._utils", function) + tuple_of(*parts) + b"R"


def dictionary(**items):
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


def pickled(body):
    return b"\x80\x02" + body + b"."


DATA = np.arange(1, 5, dtype=np.float32).tobytes()


def write_zip(path, index, storages=(("0", DATA),), order=None, more=(), **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", index)
        if order is not None:
            archive.writestr("archive/byteorder", order)
        for key, data in storages:
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
        for name, data in more:
            archive.writestr(name, data)
    return path


def write_legacy(path, index, storages=(("0", 4, DATA),), keys=None):
    index = index.replace(number(4) + b"tQ", number(4) + b"NtQ")  # no view
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little": True})]
    listed = [key for key, *_ in storages] if keys is None else keys
    parts = [*head, index, pickle.dumps(listed, 2)]
    parts += [struct.pack("<q", count) + data for _, count, data in storages]
    path.write_bytes(b"".join(parts))
    return path


HALF = tuple_of(text("v"), number(2), number(2))
PARAMETER = name_of("torch._utils", "_rebuild_parameter")
OLD = {
    "0.1": tensor(function="_rebuild_tensor"),
    "0.4": tensor(),
    "a parameter": PARAMETER
    + tuple_of(tensor(), b"\x88", name_of("collections", "OrderedDict") + b")R")
    + b"R",
    "an offset": tensor(offset=1, shape=(3,), strides=(1,)),
    "a scalar": tensor(offset=2, shape=(), strides=()),
}


@pytest.mark.parametrize("case", OLD)
def test_older_tensors(case, tmp_path):
    same(write_zip(tmp_path / "x", pickled(dictionary(a=OLD[case]))))
    same(write_legacy(tmp_path / "y", pickled(dictionary(a=OLD[case]))))


def test_views_of_storages(tmp_path):
    """Before 0.4 a part of a storage was a storage of its own: (key, offset, size)."""
    index = dictionary(
        a=tensor(),
        b=tensor(of=storage(view=HALF), shape=(2,), strides=(1,)),
        c=tensor(of=storage(view=HALF), offset=1, shape=(1,), strides=(1,)),
    )
    path = write_legacy(tmp_path / "x", pickled(index))
    tensors = same(path)
    assert tensors.read("b").tolist() == [3, 4] and tensors.read("c").tolist() == [4]


def test_pickles_of_python_2(tmp_path):
    """Names as byte strings, decimals, and an ordered dictionary made of a list of pairs."""
    one = tensor(function="_rebuild_tensor", shape=(4,), strides=(1,))
    one = one.replace(text("0"), b"U\x010").replace(number(1), b"I1\n")
    pairs = b"](" + b"](U\x01a" + one + b"e" + b"](U\x01b" + one + b"e" + b"e"
    body = name_of("collections", "OrderedDict") + pairs + b"\x85R"
    for path in (
        write_zip(tmp_path / "x", pickled(body)),
        write_legacy(tmp_path / "y", pickled(body)),
    ):
        with open(path, "rb") as file:  # made here, and beyond what weights_only=True knows
            expected = torch.load(file, weights_only=False, map_location="cpu")
        assert same(path, expected=expected).read("b").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [n for n in STORED if not n.startswith(("float8", "uint"))])
def test_files_of_big_endian_machines(dtype, tmp_path):
    """torch swaps by the type of the storage, and so do we."""
    a = drawn(getattr(torch, dtype), 3, 5)
    path, other = save(tmp_path / "x", {"a": a, "b": a.T, "c": a[1, 2]}), tmp_path / "y"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("/byteorder"):
                assert data == b"little"
                data = b"big"
            target.writestr(info.filename, data)
    tensors = same(other)
    swapped = bits(tensors.read("a")) != torch_bits(a)
    assert swapped == (a.element_size() > 1)


def test_an_unknown_byte_order(tmp_path):
    path = write_zip(tmp_path / "x", pickled(dictionary(a=tensor())), order="middle")
    assert refused(path) == BROKEN.format("its byte order is b'middle'")


# Memory


MEASURE = """
import sys
from pathlib import Path
from visualbert.checkpoint.torch_files import TorchFiles

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = peak()
tensors = TorchFiles("x", [Path(sys.argv[1])])
opened = peak()
total = float(tensors.read("layer3.weight")[:].sum())
one = peak()
for name in tensors.specs:
    total += float(tensors.read(name).sum())
print(opened - before, one - opened, peak() - one, "torch" in sys.modules)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", FORMATS)
def test_memory(kind, tmp_path):
    """200 MB in twenty tensors: opening costs nothing, reading one costs its own pages."""
    state = {f"layer{i}.weight": torch.full((1280, 2048), float(i)) for i in range(20)}
    path = save(tmp_path / "x", state, kind)
    assert path.stat().st_size > 200_000_000
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    opened, one, rest, imported = done.stdout.split()
    assert int(opened) < 40_000 and imported == "False"
    assert 8_000 < int(one) < 25_000  # KiB; the tensor has 10 240
    assert int(rest) < 25_000  # one at a time; all of them would be 200 000


# Attacks


class Evil:
    """Runs a function of its choice when it is unpickled."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def system(command, start):
    """`os.system(command)`, each opcode that can call it in its turn."""
    return {
        "REDUCE": name_of("posix", "system") + tuple_of(text(command)) + b"R",
        "INST": b"(" + text(command) + b"iposix\nsystem\n",
        "OBJ": b"(" + name_of("posix", "system") + text(command) + b"o",
        "NEWOBJ": name_of("subprocess", "Popen") + tuple_of(text(command)) + b"\x81",
        "NEWOBJ_EX": name_of("subprocess", "Popen") + tuple_of(text(command)) + b"}\x92",
        "STACK_GLOBAL": text("posix") + text("system") + b"\x93" + tuple_of(text(command)) + b"R",
        "memo": name_of("posix", "system") + b"q\x010h\x01" + tuple_of(text(command)) + b"R",
        "getattr": name_of("builtins", "getattr")
        + tuple_of(name_of("builtins", "__import__") + tuple_of(text("os")) + b"R", text("system"))
        + b"R"
        + tuple_of(text(command))
        + b"R",
        "BUILD": name_of("builtins", "eval")
        + tuple_of(text(f"__import__('os').{start}"))
        + b"R"
        + b"}b",
    }


OPCODES = list(system("", ""))
NAMES = {
    "NEWOBJ": "subprocess.Popen",
    "NEWOBJ_EX": "subprocess.Popen",
    "getattr": "builtins.getattr",
    "BUILD": "builtins.eval",
}


def places(evil):
    """The same attack in every place of a file."""
    return {
        "bare": evil,
        "beside": dictionary(a=tensor(), b=evil),
        "nested": dictionary(model=dictionary(a=tensor()), optimizer=b"(l(l" + evil + b"aa"),
        "popped": evil + b"0" + dictionary(a=tensor()),
        "a parameter": PARAMETER + tuple_of(tensor(), b"\x88", evil) + b"R",
        "hooks": tensor().replace(name_of("collections", "OrderedDict") + b")R", evil),
        "a shape": tensor().replace(tuple_of(number(2), number(2)), evil),
        "a storage": storage(key="0").replace(text("0"), evil),
        "a persistent id": evil + b"Q",
    }


@pytest.mark.parametrize("place", places(b"N"))
@pytest.mark.parametrize("opcode", OPCODES)
def test_calls(opcode, place, tmp_path):
    canary = tmp_path / "canary"
    evil = system(f"touch {canary}", f"system('touch {canary}')")[opcode]
    index = pickled(places(evil)[place])
    sentence = RUNS.format(NAMES.get(opcode, "posix.system"))
    assert refused(write_zip(tmp_path / "x", index)) == sentence
    assert refused(write_legacy(tmp_path / "y", index)) == sentence
    (tmp_path / "z").write_bytes(pickled(evil))
    assert refused(tmp_path / "z") == sentence
    for where in ("magic", "version", "sizes", "keys"):
        data = (tmp_path / "y").read_bytes()
        parts = {
            "magic": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
            "version": pickle.dumps(1001, 2),
            "sizes": pickle.dumps({"little": True}, 2),
            "keys": pickle.dumps(["0"], 2),
        }
        clean = write_legacy(tmp_path / "y", pickled(dictionary(a=tensor())))
        data = clean.read_bytes()
        assert parts[where] in data
        (tmp_path / "w").write_bytes(data.replace(parts[where], pickled(evil), 1))
        assert refused(tmp_path / "w") == sentence
    assert not canary.exists()


@pytest.mark.parametrize("opcode", OPCODES)
def test_the_attacks_are_real(opcode, tmp_path):
    """The control: Python's own unpickler runs them."""
    canary = tmp_path / "canary"
    data = pickled(system(f"touch {canary}", f"system('touch {canary}')")[opcode])
    if "NEWOBJ" in opcode:
        data = data.replace(b"csubprocess\nPopen\n", b"c__main__\nRun\n")
        import __main__

        class Run:
            def __new__(cls, command):
                os.system(command)
                return super().__new__(cls)

        __main__.Run = Run
    try:
        pickle.loads(data)
    except Exception:
        pass  # BUILD on a number fails, after the fact
    finally:
        if "NEWOBJ" in opcode:
            del __main__.Run
    assert canary.exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_attacks_by_reduce(kind, tmp_path):
    """As anyone would write one, in a file that torch itself saves."""
    canary = tmp_path / "canary"
    touch = f"open({str(canary)!r}, 'w').close()"
    model = Model().state_dict()
    cases = {
        "posix.system": Evil(os.system, f"touch {canary}"),
        "__builtin__.eval": Evil(eval, touch),
        "__builtin__.exec": Evil(exec, touch),
        "__builtin__.getattr": Evil(getattr, Evil(__import__, "os"), "system"),
        "commands.Popen": Evil(subprocess.Popen, ["touch", str(canary)]),
        "io.open": Evil(open, str(canary), "w"),
        "torch.serialization.load": Evil(torch.load, str(canary)),
    }
    for name, evil in cases.items():
        for value in (evil, {**model, "b": evil}, {"model": model, "config": [{"c": (evil,)}]}):
            assert refused(save(tmp_path / "x", value, kind)) == RUNS.format(name)
    assert not canary.exists()


NO_FUNCTION = "a call of what is no function"
NO_BUILD = "the opcode BUILD on something other than a dictionary"
PERSISTENT = "a persistent object of the kind"
REFUSED = {
    "EXT1": (b"\x82\x01", "the opcode EXT1"),
    "EXT2": (b"\x83\x01\x00", "the opcode EXT2"),
    "EXT4": (b"\x84\x01\x00\x00\x00", "the opcode EXT4"),
    "PERSID": (b"Pabc\n", "the opcode PERSID"),
    "BYTEARRAY8": (b"\x96" + struct.pack("<Q", 1) + b"a", "the opcode BYTEARRAY8"),
    "NEXT_BUFFER": (b"\x97", "the opcode NEXT_BUFFER"),
    "DUP": (b"N2", "the opcode DUP"),
    "FROZENSET": (b"(\x91", "the opcode FROZENSET"),
    "a list called": (b"]" + b")R", NO_FUNCTION),
    "text called": (text("posix.system") + b")R", NO_FUNCTION),
    "a storage type called": (name_of("torch", "FloatStorage") + b")R", NO_FUNCTION),
    "arguments in a list": (name_of("collections", "OrderedDict") + b"]R", NO_FUNCTION),
    "BUILD of a tensor": (tensor() + b"}b", NO_BUILD),
    "BUILD with a list": (b"}]b", NO_BUILD),
    "BUILD with slots": (b"}}}\x86b", NO_BUILD),
    "another module": (name_of("torch.serialization", "load"), "torch.serialization.load"),
    "a near miss": (
        name_of("torch._utils", "_rebuild_tensor_v2.__globals__"),
        "torch._utils._rebuild_tensor_v2.__globals__",
    ),
    "a package like ours": (name_of("mmfs.x", "Y"), "mmfs.x.Y"),
    "builtins": (name_of("builtins", "globals"), "builtins.globals"),
    "no name": (text("") + text("") + b"\x93", "."),
    "control characters": (text("a\x1b[31m\n") + text("b") + b"\x93", r"a\x1b[31m\n.b"),
    "an endless name": (text("a" * 10**6) + text("b") + b"\x93", "a" * 200),
    "a persistent module": (tuple_of(text("module"), b"N", b"N") + b"Q", f"{PERSISTENT} module"),
    "a persistent number": (number(5) + b"Q", f"{PERSISTENT} NoneType"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, tmp_path):
    evil, what = REFUSED[case]
    index = pickled(dictionary(a=tensor(), b=evil))
    assert refused(write_zip(tmp_path / "x", index)) == RUNS.format(what)
    assert refused(write_legacy(tmp_path / "y", index)) == RUNS.format(what)


def laughs(levels=40):
    """A list of two lists of two lists…: 2^40 items in a few hundred bytes."""
    body = b"]q\x00"
    for level in range(levels):
        put, get = f"q{chr(level + 1)}".encode("latin-1"), f"h{chr(level)}".encode("latin-1")
        body += b"0](" + get + get + b"e" + put
    return body


def deep(opening, closing, depth=250_000):
    return opening * depth + b"N" + closing * depth


PAIR = b"X\x01\x00\x00\x00aN\x86q\x01"
MANY_PAIRS = b"](" + b"".join(text(str(i)) + b"N\x86" for i in range(40_000)) + b"eq\x02"
HARMLESS = {  # loads, holds nothing that is a weight, and must not be walked
    "billion laughs": dictionary(a=tensor(), b=laughs()),
    "billion laughs in a config": dictionary(model=dictionary(a=tensor()), config=laughs()),
    "a list in itself": dictionary(model=dictionary(a=tensor()), b=b"]q\x00h\x00a"),
    "deep tuples": dictionary(model=dictionary(a=tensor()), b=deep(b"", b"\x85")),
    "deep lists": dictionary(model=dictionary(a=tensor()), b=deep(b"]", b"a", 140_000)),
    "deep dictionaries": dictionary(
        model=dictionary(a=tensor()), b=deep(b"}X\x01\x00\x00\x00k", b"s", 90_000)
    ),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_large_values_are_not_walked(case, tmp_path):
    index = pickled(HARMLESS[case])
    for path in (
        write_zip(tmp_path / "x", index),
        write_legacy(tmp_path / "y", index),
    ):
        started = time.process_time()
        if case == "billion laughs":
            assert refused(path).endswith("; 'b' is of type list")
        else:
            assert TorchFiles("x", [path]).read("a").tolist() == [[1, 2], [3, 4]]
        assert time.process_time() - started < 5


TWICE = "a key occurs twice"
LONG = "a number in it is too long"
BOMBS = {
    "many parts": (b"]" * 350_000, "it has too many parts"),
    "many sets": (b"\x8f" * 350_000, "it has too many parts"),
    "pairs again and again": (
        MANY_PAIRS + (b"0" + name_of("collections", "OrderedDict") + b"h\x02\x85R") * 3000,
        "it has too many parts",
    ),
    "a long number": (b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6, LONG),
    "decimals": (b"L" + b"9" * 10**6 + b"L\n", "Exceeds the limit"),
    "a number of 400 digits": (b"L" + b"9" * 400 + b"L\n", LONG),
    "no decimals": (b"L" + b"x" * 10**6 + b"\n", "invalid literal"),
    "no fraction": (b"F" + b"x" * 10**6 + b"\n", "could not convert string to float: b'xxx"),
    "no quotes": (b"S" + b"x" * 10**6 + b"\n", "no string quotes around b'xxx"),
    "BINUNICODE beyond": (b"X\xff\xff\xff\xffabc", "expected 4294967295 bytes"),
    "BINUNICODE8 beyond": (b"\x8d" + b"\xff" * 7 + b"\x7f" + b"abc", "expected 9223372036"),
    "BINUNICODE8 absurd": (b"\x8d" + b"\xff" * 8 + b"abc", "byte count > sys.maxsize"),
    "BINBYTES8 beyond": (b"\x8e" + b"\xff" * 7 + b"\x7f" + b"abc", "expected 9223372036"),
    "LONG4 beyond": (b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a", "not enough data"),
    "LONG4 negative": (b"\x8b" + struct.pack("<i", -1) + b"a", "long4 byte count < 0"),
    "a far memo": (b"Nr\xff\xff\xff\xff" + b"h\x07", "7"),
    "unknown opcode": (b"\xff", "at position 2, opcode b'\\xff' unknown"),
    "future protocol": (b"\x80\x09", "pickle protocol 9 is unknown"),
    "empty stack": (b"0", "pop from empty list"),
    "a mark for a value": (b"(q\x01", "a mark stands where a value should"),
    "no mark": (b"Nt", "a mark is missing"),
    "a list as a key": (b"}]Ns", "a list cannot be a key"),
    "a key without a value": (b"}(Nu", "a key has no value"),
    "append to a dictionary": (b"}Na", "a dict stands where a list should"),
    "set an item of a list": (b"]NNs", "a list stands where a dict should"),
    "the same key twice": (b"}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu", TWICE),
    "the same key again": (b"}X\x01\x00\x00\x00aNsX\x01\x00\x00\x00aNs", TWICE),
    "the same pair twice": (
        name_of("collections", "OrderedDict") + b"]" + PAIR + b"ah\x01a\x85R",
        TWICE,
    ),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(case, tmp_path):
    body, what = BOMBS[case]
    index = pickled(body)
    for path in (write_zip(tmp_path / "x", index), write_legacy(tmp_path / "y", index)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = refused(path)
        assert found.startswith("not a whole PyTorch file (") and what in found
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def test_sentences_stay_short():
    for what in ("no fraction", "no quotes", "no decimals"):
        with pytest.raises(pickles.Broken) as caught:
            pickles.load(io.BytesIO(pickled(BOMBS[what][0])), {})
        assert len(str(caught.value)) <= 200


@pytest.mark.parametrize("body", [b"\x95" + b"\xff" * 8, b"](N", b""])
def test_indices_without_an_end(body, tmp_path):
    path = write_zip(tmp_path / "x", b"\x80\x02" + body)
    assert refused(path) == BROKEN.format("pickle exhausted before seeing STOP")


def test_an_endless_index(tmp_path):
    body = b"(" + (b"X" + struct.pack("<I", 2**20) + b"a" * 2**20) * 17 + b"l"
    path = write_zip(tmp_path / "x", pickled(body))
    assert refused(path) == BROKEN.format("its index is longer than 16777216 bytes")
    path = write_legacy(tmp_path / "y", pickled(body))
    assert refused(path) == BROKEN.format("its index is longer than 16777216 bytes")


@pytest.mark.parametrize("keys", [["0", "1"], [], "0", ["0", "0"], [0], {"0": 1}, 5])
def test_lists_of_storages(keys, tmp_path):
    index = pickled(dictionary(a=tensor()))
    same(write_legacy(tmp_path / "x", index))
    write_legacy(tmp_path / "x", index, keys=keys)
    assert refused(tmp_path / "x") == BROKEN.format(
        "its list of storages does not match its tensors"
    )


def test_laughs_in_the_list_of_storages(tmp_path):
    path = write_legacy(tmp_path / "x", pickled(dictionary(a=tensor())))
    data = path.read_bytes()
    for body in (laughs(), b"](" + laughs() + b"e", b"](" + deep(b"", b"\x85") + b"e"):
        path.write_bytes(data.replace(pickle.dumps(["0"], 2), pickled(body)))
        assert refused(path) == BROKEN.format("its list of storages does not match its tensors")
    path = write_legacy(tmp_path / "y", pickled(laughs() + b"\x85Q"))
    assert refused(path) == RUNS.format("a persistent object of the kind list")


# Tensors that are not in their storage


REACH = "a tensor of shape {} reaches beyond its storage of {} bytes"
NO_NUMBER = "a size or an offset is no number from 0 up"
WRONG = {
    "offset": (tensor(offset=1), REACH.format((2, 2), 16)),
    "negative offset": (tensor(offset=-1), NO_NUMBER),
    "huge offset": (tensor(offset=2**61), REACH.format((2, 2), 16)),
    "offset of 2^64": (tensor(offset=2**64), NO_NUMBER),
    "shape": (tensor(shape=(2, 3)), REACH.format((2, 3), 16)),
    "negative shape": (tensor(shape=(-2, 2)), NO_NUMBER),
    "huge shape": (tensor(shape=(2**61, 2)), REACH.format((2**61, 2), 16)),
    "stride": (tensor(strides=(3, 1)), REACH.format((2, 2), 16)),
    "negative stride": (tensor(strides=(2, -1)), NO_NUMBER),
    "huge stride": (tensor(strides=(2**61, 1)), REACH.format((2, 2), 16)),
    "strides that wrap": (tensor(strides=(2**61, 2**61)), REACH.format((2, 2), 16)),
    "axes": (tensor(shape=(2, 2, 1)), "a tensor has 3 axes and 2 strides"),
    "40 axes": (tensor(shape=(1,) * 40, strides=(1,) * 40), "a tensor has 40 axes and 40 strides"),
    "larger storage": (tensor(of=storage(size=5)), "storage '0' needs 20 bytes and has 16"),
    "negative storage": (tensor(of=storage(size=-4)), NO_NUMBER),
    "smaller storage": (tensor(of=storage(size=3)), "storage '0' needs 12 bytes and has 16"),
    "wider type": (
        tensor(of=storage(kind="DoubleStorage")),
        "storage '0' needs 32 bytes and has 16",
    ),
    "missing storage": (
        tensor(of=storage(key="9")),
        "storage '9' needs 16 bytes and is not there",
    ),
    "a way out": (
        tensor(of=storage(key="../data.pkl")),
        "storage '../data.pkl' needs 16 bytes and is not there",
    ),
    "no storage": (tensor(of=b"N"), "a tensor has no storage"),
    "a tensor for a storage": (tensor(of=tensor()), "a tensor has no storage"),
    "bytes for a type": (
        tensor(of=storage(kind="UntypedStorage", size=16), function="_rebuild_tensor_v3")[:-2]
        + name_of("torch", "UntypedStorage")
        + b"tR",
        "a tensor has no storage or no type",
    ),
    "too few arguments": (name_of("torch._utils", "_rebuild_tensor_v2") + b")R", "missing 4"),
    "too many arguments": (
        name_of("torch._utils", "_rebuild_tensor_v2") + b"(" + b"N" * 9 + b"tR",
        "takes from 4 to 7",
    ),
    "a parameter of nothing": (PARAMETER + b"N\x88N\x87R", "a parameter is no tensor"),
    "a size of text": (
        name_of("torch", "Size") + text("a") + b"\x85\x85R",
        NO_NUMBER,
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_outside_their_storage(case, tmp_path):
    index, what = WRONG[case]
    path = write_zip(tmp_path / "x", pickled(dictionary(a=index)))
    found = refused(path)
    assert found.startswith("not a whole PyTorch file (") and what in found


def test_an_axis_of_one_has_any_stride(tmp_path):
    index = dictionary(a=tensor(shape=(2, 1, 2), strides=(2, 2**61, 1)))
    for path in (
        write_zip(tmp_path / "x", pickled(index)),
        write_legacy(tmp_path / "y", pickled(index)),
    ):
        assert TorchFiles("x", [path]).read("a").tolist() == [[[1, 2]], [[3, 4]]]


def test_a_storage_that_is_larger_than_it_says(tmp_path):
    path = write_zip(tmp_path / "x", pickled(dictionary(a=tensor())), [("0", DATA + DATA)])
    assert refused(path) == BROKEN.format("storage '0' needs 16 bytes and has 32")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"storages": [("0", 5, DATA)]}, "storage '0' is not where it should be"),
        ({"storages": [("0", -4, DATA)]}, "storage '0' is not where it should be"),
        ({"storages": [("0", 2**62, DATA)]}, "storage '0' is not where it should be"),
        ({"storages": [("0", 4, DATA[1:])]}, "it ends before storage '0' does"),
        ({"storages": [("0", 4, b"")]}, "it ends before storage '0' does"),
    ],
)
def test_storages_of_the_older_format(change, what, tmp_path):
    index = pickled(dictionary(a=tensor()))
    assert refused(write_legacy(tmp_path / "x", index, **change)) == BROKEN.format(what)


@pytest.mark.parametrize(
    ("view", "what"),
    [
        (
            tuple_of(text("v"), number(3), number(2)),
            "a view reaches beyond its storage of 16 bytes",
        ),
        (tuple_of(text("v"), number(-1), number(2)), NO_NUMBER),
        (tuple_of(text("v"), number(2**61), number(2)), "a view reaches beyond its storage"),
        (tuple_of(text("v"), number(0), number(3)), "reaches beyond its storage of 12 bytes"),
        (tuple_of(text("v"), number(0)), "a view of a storage has no offset"),
        (number(1), "a view of a storage has no offset"),
    ],
)
def test_views_beyond_their_storage(view, what, tmp_path):
    path = write_legacy(tmp_path / "x", pickled(dictionary(a=tensor(of=storage(view=view)))))
    assert what in refused(path)


def test_one_storage_of_two_sizes(tmp_path):
    two = dictionary(
        a=tensor(),
        b=tensor(of=storage(size=3, view=b"N"), shape=(3,), strides=(1,)),
    )
    path = write_legacy(tmp_path / "x", pickled(two))
    assert refused(path) == BROKEN.format("storage '0' has two sizes")


def test_tensors_that_repeat_a_few_bytes(tmp_path):
    """Stride 0 makes a view of any size out of four bytes."""
    shape = (10**4, 10**4)
    path = write_zip(tmp_path / "x", pickled(dictionary(a=tensor(shape=shape, strides=(0, 0)))))
    assert refused(path) == (
        "a of shape (10000, 10000) repeats its 16 bytes to 400000000; save it contiguous"
    )
    path = write_zip(
        tmp_path / "x", pickled(dictionary(a=tensor(shape=(2**40,) * 3, strides=(0,) * 3)))
    )
    assert refused(path).startswith("a has the impossible shape ")
    same(write_zip(tmp_path / "x", pickled(dictionary(a=tensor(shape=(9, 9), strides=(0, 0))))))


@pytest.mark.parametrize("name", ["a\x1b[31m", "a" * 501, "a\nb", "\u202e"])
def test_names_that_are_none(name, tmp_path):
    path = write_zip(tmp_path / "x", pickled(dictionary(**{name: tensor()})))
    assert refused(path).endswith(" is not a tensor's name")


# Archives


INDEX = pickled(dictionary(a=tensor()))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("options", "what"),
    [
        (
            {"more": [("archive/data/0", DATA[::-1])]},
            "it has two members called 'archive/data/0'",
        ),
        (
            {"more": [("archive/data.pkl", INDEX)]},
            "it has two members called 'archive/data.pkl'",
        ),
        ({"more": [("other/data.pkl", INDEX)]}, "it is a zip archive without torch's data.pkl"),
        (
            {"compression": zipfile.ZIP_DEFLATED},
            "'archive/data.pkl' is compressed, which torch never does; unpack it and save it again",
        ),
    ],
)
def test_members(options, what, tmp_path):
    assert refused(write_zip(tmp_path / "x", INDEX, **options)) == BROKEN.format(what)
    same(write_zip(tmp_path / "x", INDEX))


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_modules(kind, tmp_path):
    """torch.save(model), and a program's arguments beside the weights."""
    module = torch.nn.Linear(2, 2)
    path = save(tmp_path / "x", module, kind)
    assert refused(path) == RUNS.format("torch.nn.modules.linear.Linear")
    state = {"model": module.state_dict(), "args": argparse.Namespace(seed=1)}
    assert refused(save(path, state, kind)) == RUNS.format("argparse.Namespace")
    same(save(path, module.state_dict(), kind))


def test_a_program(tmp_path):
    more = [("archive/constants.pkl", pickled(b"]")), ("archive/code/x.py", "import os")]
    path = write_zip(tmp_path / "x", INDEX, more=more)
    assert refused(path) == RUNS.format("a program: it is a TorchScript archive")
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    scripted.save(str(tmp_path / "y"))
    assert refused(tmp_path / "y") == RUNS.format("a program: it is a TorchScript archive")


def test_a_compression_bomb(tmp_path):
    """256 MB of zeros in 256 KB."""
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", INDEX, zipfile.ZIP_STORED)
        with archive.open("archive/data/0", "w") as member:
            for _ in range(16):
                member.write(bytes(2**24))
    assert (tmp_path / "x").stat().st_size < 500_000
    assert "'archive/data/0' is compressed" in refused(tmp_path / "x")


def central(path, name, start, layout, *values):
    """Change fields of a member's entry in the directory of an archive."""
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02", 0, data.rfind(name.encode()))
    struct.pack_into(layout, data, at + start, *values)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("start", "layout", "values", "what"),
    [
        (20, "<LL", (2**31, 2**31), "'archive/data/0' reaches beyond the end of the file"),
        (20, "<LL", (2, 16), "'archive/data/0' is compressed"),
        (10, "<H", (8,), "'archive/data/0' is compressed"),
        (42, "<L", (0,), "its members overlap"),
        (42, "<L", (5,), "'archive/data/0' is not where the archive says"),
        (42, "<L", (2**31,), "'archive/data/0' is not where the archive says"),
        (8, "<H", (1,), "'archive/data/0' is encrypted"),
        (6, "<H", (99,), "zip file version 9.9"),
        (20, "<LL", (2**32 - 1,) * 2, "'archive/data/0' reaches beyond the end of the file"),
    ],
)
def test_directories_that_lie(start, layout, values, what, tmp_path):
    path = write_zip(tmp_path / "x", INDEX)
    central(path, "archive/data/0", start, layout, *values)
    assert what in refused(path)


def test_members_that_overlap(tmp_path):
    """One storage that covers the other: the classic bomb without compression."""
    path = write_zip(tmp_path / "x", INDEX, [("0", DATA), ("1", DATA)])
    central(path, "archive/data/0", 20, "<LL", 70, 70)
    assert refused(path) == BROKEN.format("its members overlap")


def test_zip64(tmp_path):
    """Every size in its 64-bit field, as for files beyond 4 GiB; and sizes there that are lies."""
    path = tmp_path / "x"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", INDEX), ("data/0", DATA), ("version", b"3\n")):
            with archive.open(f"archive/{name}", "w", force_zip64=True) as member:
                member.write(data)
    same(path)
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02", 0, data.rfind(b"archive/data/0"))
    name = len(b"archive/data/0")
    for size in (2**40, 2**63, 2**64 - 1, 2**64 - 2**10):
        extra = struct.pack("<HHQQ", 1, 16, size, size)
        lying = data[: at + 46 + name] + extra + data[at + 46 + name :]
        struct.pack_into("<LL", lying, at + 20, 2**32 - 1, 2**32 - 1)
        struct.pack_into("<H", lying, at + 30, len(extra))
        end = lying.rfind(b"PK\x05\x06")
        struct.pack_into("<L", lying, end + 12, struct.unpack_from("<L", lying, end + 12)[0] + 20)
        path.write_bytes(lying)
        assert refused(path) == BROKEN.format("'archive/data/0' reaches beyond the end of the file")


def test_a_directory_of_millions(tmp_path):
    """`zipfile` makes an object of every entry; a file of entries alone would take the memory."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", *[0] * 18) + b"a"
    entry = entry[:28] + struct.pack("<H", 1) + entry[30:]
    count, path = 200_000, tmp_path / "x"
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, count * len(entry), 4, 0)
    path.write_bytes(b"PK\x03\x04" + entry * count + end)
    assert refused(path) == BROKEN.format("its zip directory is larger than any model's")


# Damage


def whole(kind):
    buffer = io.BytesIO()
    torch.save(
        {"model": Model().state_dict(), "config": {"a": [1, 2.5, None]}},
        buffer,
        _use_new_zipfile_serialization=FORMATS[kind],
    )
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_every_truncation(kind, tmp_path):
    data, path = whole(kind), tmp_path / "x"
    for length in range(0, len(data), 1 + len(data) // 400):
        path.write_bytes(data[:length])
        assert refused(path).startswith("not a whole PyTorch file (")
    path.write_bytes(data)
    same(path, within="model")


def outcomes(kind, path, count):
    """Random changes of random sizes; anything but a load or a `CheckpointError` is raised."""
    data, draw = whole(kind), random.Random(0)
    found = collections.Counter()
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            at = draw.randrange(len(data))
            changed[at : at + 1] = draw.randbytes(draw.choice((0, 1, 1, 1, 4)))
        path.write_bytes(changed)
        try:
            read_all(TorchFiles("x", [path]))
            said = None
        except CheckpointError as error:
            said = str(error)
        assert said is None or (len(said) < 700 and said.isprintable())
        found["refused" if said else "loaded"] += 1
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_random_damage(kind, tmp_path):
    assert outcomes(kind, tmp_path / "x", 800)["refused"] > 250


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", FORMATS)
def test_much_random_damage(kind, tmp_path):
    assert outcomes(kind, tmp_path / "x", 25_000)["refused"] > 8_000


def test_random_opcodes():
    """A stream of nothing but valid opcodes and arguments ends in a value or in one of two ways."""
    import pickletools

    draw, found = random.Random(0), collections.Counter()
    codes = [o.code.encode("latin-1") for o in pickletools.opcodes if o.code != "."]
    words = [name_of("posix", "system"), name_of("torch", "Size"), text("a"), tensor(), b"]", b"}"]
    for _ in range(3000):
        parts = [
            draw.choice(codes + words * 3) + draw.randbytes(draw.choice((0, 0, 1)))
            for _ in range(draw.randrange(1, 25))
        ]
        try:
            pickles.load(io.BytesIO(pickled(b"".join(parts))), {}, None)
            found["loaded"] += 1
        except (pickles.Refused, pickles.Broken) as error:
            found[type(error).__name__] += 1
    assert min(found["Refused"], found["Broken"]) > 300


def test_a_file_that_shrinks(tmp_path):
    for kind in FORMATS:
        path = save(tmp_path / kind, {"a": torch.zeros(5000), "b": torch.ones(5000)}, kind)
        tensors = TorchFiles("x", [path])
        os.truncate(path, 5000)
        with pytest.raises(CheckpointError) as caught:
            read_all(tensors)
        assert str(caught.value).startswith(f"{path}: cannot be read any more (")


def test_checksums(tmp_path):
    path = save(tmp_path / "x", Model().state_dict())
    tensors = TorchFiles("x", [path])
    assert tensors.verify_checksum()
    data = bytearray(path.read_bytes())
    at = data.find(bits(tensors.read("words.weight")))
    data[at + 5] ^= 1
    del tensors
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        TorchFiles("x", [path]).verify_checksum()
    assert "the data has changed since it was written (CRC-32 of " in str(caught.value)
    assert not TorchFiles("x", [save(path, Model().state_dict(), "legacy")]).verify_checksum()


# Checksums


@pytest.mark.parametrize("summed", [True, False])
def test_the_index_has_a_checksum(summed, tmp_path):
    """A flipped name in data.pkl is noticed on opening, unless torch was told to write no sums."""
    path = tmp_path / "a.bin"
    torch.serialization.set_crc32_options(summed)
    try:
        torch.save({"weight": torch.arange(6.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"weight", b"xeight", 1))
    if summed:
        with pytest.raises(CheckpointError, match="the CRC-32 differs"):
            TorchFiles("a", [path])
    else:
        tensors = TorchFiles("a", [path])
        assert list(tensors.specs) == ["xeight"] and not tensors.verify_checksum()
