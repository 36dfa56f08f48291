"""Files that Keras, Orbax, Flax and TensorFlow write themselves come back from the readers that
need none of them bit for bit, and what this package writes comes back from the frameworks so.
"""

import json
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny import REST, make_model, random_tensors, read_all, same, tiny_config

from visualbert import CheckpointError, get_backend
from visualbert.checkpoint.flax_files import MsgpackFile, OrbaxFolder, write_msgpack
from visualbert.checkpoint.keras_files import KerasFile, write_keras
from visualbert.checkpoint.open import open_checkpoint
from visualbert.checkpoint.tensors import STORED, ArrayTensors, cast
from visualbert.checkpoint.tf_bundle import BundleFiles
from visualbert.cli.convert import _native
from visualbert.pretrained import ModelTensors
from visualbert.schema import ARCHITECTURES, VARIANTS, parameters

BODY, ANSWERS = ARCHITECTURES[0], ARCHITECTURES[3]
DTYPES = ("float32", "float16", "bfloat16")
HEADS = [(a, "linear") for a in ARCHITECTURES]
HEADS += [(a, "mlp") for a, head in VARIANTS["mlp"].items() if head]
STRUCTURES = [(*head, late) for head in HEADS for late in (False, True)]
CASES = [(*structure, DTYPES[i // 2 % 3]) for i, structure in enumerate(STRUCTURES)]
CASES += [
    pytest.param(*structure, DTYPES[(i // 2 + 1) % 3], marks=REST)
    for i, structure in enumerate(STRUCTURES)
]
every_case = pytest.mark.parametrize(("architecture", "head", "late", "dtype"), CASES)


def make(architecture, head="linear", late=False, dtype="float32", **changes):
    """A configuration and arrays for it."""
    config = tiny_config(classifier_head=head, bypass_transformer=late, **changes)
    tensors = random_tensors(architecture, config)
    return config, {name: cast(tensors.read(name), dtype) for name in tensors.specs}


def model_of(backend, architecture, config, arrays, dtype):
    tensors = ArrayTensors("arrays", arrays)
    return make_model(backend, architecture, config, dtype, tensors)


def weights_of(backend, model):
    return read_all(ModelTensors(get_backend(backend), model))


def differs(found, expected):
    return any(found[name].tobytes() != expected[name].tobytes() for name in expected)


def ignore(size):
    pass


def refused(function, *args):
    with pytest.raises(CheckpointError) as caught:
        function(*args)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


# Keras


@every_case
def test_keras_both_ways(architecture, head, late, dtype, tmp_path):
    config, arrays = make(architecture, head, late, dtype)
    model = model_of("tf", architecture, config, arrays, dtype)
    theirs, ours = tmp_path / "theirs.weights.h5", tmp_path / "ours.weights.h5"
    model.save_weights(theirs)
    same(read_all(KerasFile("x", theirs)), arrays)
    other = {name: array + 1 for name, array in arrays.items()}
    write_keras(ours, ArrayTensors("x", other), parameters(architecture, config), ignore)
    same(read_all(KerasFile("x", ours)), other)
    assert differs(weights_of("tf", model), other)
    model.load_weights(ours)
    same(weights_of("tf", model), other)


def test_keras_of_many_layers(tmp_path):
    """`layer_10` stands before `layer_2` in a file, and groups need more than one leaf."""
    config, arrays = make(BODY, num_hidden_layers=11)
    path = tmp_path / "x.weights.h5"
    model_of("tf", BODY, config, arrays, "float32").save_weights(path)
    same(read_all(KerasFile("x", path)), arrays)


def test_keras_of_a_trained_model(tmp_path):
    """Keras writes the optimizer's state into the same file."""
    import h5py
    import keras

    config, arrays = make(ANSWERS)
    model = model_of("tf", ANSWERS, config, arrays, "float32")
    model.compile(optimizer=keras.optimizers.Adam(), metrics=["accuracy"])
    model.optimizer.build(model.trainable_variables)
    path = tmp_path / "x.weights.h5"
    model.save_weights(path)
    with h5py.File(path) as file:
        assert len(file["optimizer/vars"]) > len(arrays)
    same(read_all(KerasFile("x", path)), arrays)


def test_keras_of_another_model(tmp_path):
    import keras

    path = tmp_path / "x.weights.h5"
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save_weights(path)
    assert refused(KerasFile, "x", path).endswith(" is no parameter of a VisualBERT")


def test_a_keras_archive(tmp_path):
    """What model.save writes holds a program; the way out is in the sentence, and works."""
    config, arrays = make(ANSWERS)
    model = model_of("tf", ANSWERS, config, arrays, "float32")
    path = tmp_path / "x.keras"
    model.save(path)
    for source in (path, tmp_path):
        assert refused(open_checkpoint, source) == (
            f"{path}: a Keras archive, as model.save writes it: it holds a program beside the "
            'weights; load it with Keras, write model.save_weights("model.weights.h5") and give '
            "that file"
        )
    path.rename(tmp_path / "pytorch_model.bin")  # known by what it holds
    assert "/pytorch_model.bin: a Keras archive, " in refused(
        open_checkpoint, tmp_path / "pytorch_model.bin"
    )
    model.save_weights(tmp_path / "model.weights.h5")
    found = open_checkpoint(tmp_path / "model.weights.h5", num_attention_heads=3)
    same(read_all(found.tensors), arrays)


# Flax


def flax_state(model, kind):
    from flax import nnx

    return {
        "all": lambda: nnx.state(model),
        "parameters": lambda: nnx.state(model, nnx.Param),
        "pure": lambda: nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    }[kind]()


def write_orbax(path, arrays, architecture, config):
    _native("flax")[1](path, ArrayTensors("x", arrays), parameters(architecture, config), ignore)


def restored_model(architecture, config, dtype, pure):
    """A fresh model with what a framework restored."""
    from flax import nnx

    model = get_backend("flax").create(architecture, config, dtype)
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(model, state)
    return model


def numbered(tree):
    """A list's keys as integers, as NNX has them."""
    return {
        int(key) if key.isdecimal() else key: numbered(value) if isinstance(value, dict) else value
        for key, value in tree.items()
    }


@every_case
def test_orbax_both_ways(architecture, head, late, dtype, tmp_path):
    import orbax.checkpoint as ocp

    config, arrays = make(architecture, head, late, dtype)
    model = model_of("flax", architecture, config, arrays, dtype)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", flax_state(model, "parameters"))
        write_orbax(tmp_path / "ours", arrays, architecture, config)
        checkpointer.wait_until_finished()
        same(read_all(OrbaxFolder("x", tmp_path / "theirs")), arrays)
        same(read_all(OrbaxFolder("x", tmp_path / "ours")), arrays)
        restored = checkpointer.restore(tmp_path / "ours")
    found = restored_model(architecture, config, dtype, numbered(restored))
    same(weights_of("flax", found), arrays)


@pytest.mark.parametrize("kind", ["all", "pure"])
def test_orbax_of_a_whole_state(kind, tmp_path):
    """With the random state of dropout, and with or without NNX's `.value`."""
    import orbax.checkpoint as ocp

    config, arrays = make(ANSWERS, hidden_dropout_prob=0.1)
    model = model_of("flax", ANSWERS, config, arrays, "float32")
    path = tmp_path / "with space, #1 and 20%"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, flax_state(model, kind))
    assert ("rngs" in (path / "_METADATA").read_text()) == (kind == "all")
    same(read_all(OrbaxFolder("x", path)), arrays)


@pytest.mark.parametrize("options", [{"use_zarr3": True}, {"use_ocdbt": True}])
def test_orbax_of_other_layouts(options, tmp_path):
    import orbax.checkpoint as ocp

    config, arrays = make(BODY)
    model = model_of("flax", BODY, config, arrays, "float32")
    handler = ocp.PyTreeCheckpointHandler(**options)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "x", flax_state(model, "pure"))
    same(read_all(OrbaxFolder("x", tmp_path / "x")), arrays)


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import orbax.checkpoint as ocp

arrays = dict(np.load(sys.argv[1]))
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
assert len(jax.devices()) == 4
tree, split = {}, 0
for name, array in arrays.items():
    *parents, leaf = name.split(".")
    at = tree
    for parent in parents:
        at = at.setdefault(parent, {})
    axes = [axis if n % 2 == 0 else None for n, axis in zip(array.shape, ("x", "y"))]
    at[leaf] = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
    split += len({str(shard.index) for shard in at[leaf].addressable_shards}) > 1
assert split > 20, split
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[2], tree)
"""


def test_orbax_of_a_model_on_several_devices(tmp_path):
    from visualbert.checkpoint.flax_files import _to_flax
    from visualbert.schema import Kind

    config, arrays = make(ANSWERS, vocab_size=114)
    params = parameters(ANSWERS, config)
    native = {
        _to_flax(p): arrays[p.name].T if p.kind is Kind.LINEAR else arrays[p.name] for p in params
    }
    np.savez(tmp_path / "arrays.npz", **native)
    run(
        SHARDED,
        tmp_path / "arrays.npz",
        tmp_path / "x",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    same(read_all(OrbaxFolder("x", tmp_path / "x")), arrays)


def test_orbax_through_links_of_the_hub(tmp_path):
    """The Hub's cache links every file of a snapshot to a blob; a link elsewhere is refused."""
    config, arrays = make(BODY)
    path, blobs = tmp_path / "snapshots" / "orbax", tmp_path / "blobs"
    path.parent.mkdir()
    write_orbax(path, arrays, BODY, config)
    blobs.mkdir()
    for number, file in enumerate([p for p in path.rglob("*") if p.is_file()]):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    same(read_all(OrbaxFolder("x", path)), arrays)
    blobs.rename(tmp_path / "elsewhere")
    for file in [p for p in path.rglob("*") if p.is_symlink()]:
        target = tmp_path / "elsewhere" / file.readlink().name
        file.unlink()
        file.symlink_to(target)
    assert refused(OrbaxFolder, "x", path).endswith(" is a link to another place")


@every_case
def test_msgpack_both_ways(architecture, head, late, dtype, tmp_path):
    from flax import serialization

    config, arrays = make(architecture, head, late, dtype)
    model = model_of("flax", architecture, config, arrays, dtype)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.write_bytes(serialization.to_bytes(flax_state(model, "pure")))
    same(read_all(MsgpackFile("x", theirs)), arrays)
    theirs.write_bytes(serialization.to_bytes({"params": flax_state(model, "pure")}))
    same(read_all(MsgpackFile("x", theirs)), arrays)
    write_msgpack(ours, ArrayTensors("x", arrays), parameters(architecture, config), ignore)
    same(read_all(MsgpackFile("x", ours)), arrays)
    restored = serialization.msgpack_restore(ours.read_bytes())
    found = restored_model(architecture, config, dtype, numbered(restored))
    same(weights_of("flax", found), arrays)


# TensorFlow


def save_v2(prefix, arrays, **texts):
    """What `tf.train.Saver` calls."""
    import tensorflow as tf

    values = [tf.constant(a) for a in arrays.values()] + [tf.constant(t) for t in texts.values()]
    names = [*arrays, *texts]
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=names, shape_and_slices=[""] * len(names), tensors=values
    )
    return BundleFiles("x", prefix)


def every_type():
    rng = np.random.default_rng(0)
    made = {}
    for name, dtype in STORED.items():
        if name in ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"):  # not TensorFlow's
            continue
        numbers = rng.integers(0, 2, (3, 5)) if name == "bool" else rng.integers(0, 99, (3, 5))
        made[f"of/{name}"] = numbers.astype(dtype)
    return made


def test_bundle_of_every_type(tmp_path):
    arrays = {**every_type(), "scalar": np.float32(3), "empty": np.zeros((0, 4), np.float32)}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    tensors = save_v2(tmp_path / "model.ckpt-7", arrays, text=["a", "bc"], one="x" * 1000)
    same(read_all(tensors), arrays)
    assert tensors.read("of/bfloat16").dtype == ml_dtypes.bfloat16
    assert [p.name for p in tensors.paths] == [
        "model.ckpt-7.index",
        "model.ckpt-7.data-00000-of-00001",
    ]


def test_bundle_of_many_variables(tmp_path):
    """Keys share their beginnings, so the table has restarts and more than one block."""
    rng = np.random.default_rng(0)
    names = [f"bert/encoder/layer_{i}/{k}/kernel" for i in range(300) for k in "abcdefghij"]
    names += [name + "/adam_m" for name in names[::2]] + ["a", "aa", "b" * 300, "\u00e9t\u00e9"]
    arrays = {n: rng.standard_normal(rng.integers(1, 9, 2)).astype(np.float32) for n in names}
    tensors = save_v2(tmp_path / "x", arrays)
    assert (tmp_path / "x.index").stat().st_size > 20 * 4096
    same(read_all(tensors), arrays)


def saver(prefix, build, devices=1, **options):
    """`tf.train.Saver` over the variables that `build` makes in a graph, with their values."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default():
        build(tf)
        config = v1.ConfigProto(device_count={"CPU": devices})
        with v1.Session(config=config) as session:
            session.run(v1.global_variables_initializer())
            v1.train.Saver(**options).save(session, str(prefix), global_step=12)
            return {v.op.name: session.run(v) for v in v1.global_variables()}


def scattered(count, devices):
    def build(tf):
        for i in range(count):
            with tf.device(f"/cpu:{i % devices}"):
                value = np.random.default_rng(i).standard_normal((i % 5 + 1, 3)).astype(np.float32)
                tf.compat.v1.get_variable(f"layer_{i}/kernel", initializer=value)

    return build


def test_bundle_of_a_saver(tmp_path):
    values = saver(tmp_path / "model.ckpt", scattered(7, 1))
    same(read_all(BundleFiles("x", tmp_path / "model.ckpt-12")), values)


def test_bundle_of_many_shards(tmp_path):
    values = saver(tmp_path / "model.ckpt", scattered(40, 6), devices=6, sharded=True)
    tensors = BundleFiles("x", tmp_path / "model.ckpt-12")
    assert len(tensors.paths) == 1 + 6
    same(read_all(tensors), values)
    tensors.paths[3].unlink()
    assert refused(BundleFiles, "x", tmp_path / "model.ckpt-12") == (
        f"{tensors.paths[3]}: cannot be read: No such file or directory"
    )


def test_bundle_of_objects(tmp_path):
    """`tf.train.Checkpoint` adds a graph of objects and counters, which are no weights."""
    import tensorflow as tf

    variable = tf.Variable(np.arange(6, dtype=np.float32).reshape(2, 3))
    path = tf.train.Checkpoint(kernel=variable).save(str(tmp_path / "x"))
    assert b"_CHECKPOINTABLE_OBJECT_GRAPH" in (tmp_path / "x-1.index").read_bytes()
    tensors = BundleFiles("x", tmp_path / "x-1")
    assert set(tensors.specs) == {
        "kernel/.ATTRIBUTES/VARIABLE_VALUE",
        "save_counter/.ATTRIBUTES/VARIABLE_VALUE",
    }
    kernel = tensors.read("kernel/.ATTRIBUTES/VARIABLE_VALUE")
    assert np.array_equal(kernel, variable.numpy()) and path.endswith("x-1")


def test_partitioned_variables_are_refused(tmp_path):
    def build(tf):
        v1 = tf.compat.v1
        with v1.variable_scope("bert"):
            v1.get_variable("table", (8, 3), partitioner=v1.fixed_size_partitioner(2))

    saver(tmp_path / "x", build)
    assert refused(BundleFiles, "x", tmp_path / "x-12") == (
        f"{tmp_path}/x-12.index: 'bert/table' is saved in slices; save the variable whole"
    )


# Without the frameworks

FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "jaxlib", "flax", "orbax", "transformers")
BLOCKED = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in json.loads(sys.argv[-1]):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Blocked())
from pathlib import Path
import numpy as np
from visualbert import VisualBertError
"""
READ = """
from visualbert.checkpoint.open import open_checkpoint

for path in sys.argv[1:-1]:
    try:
        tensors = open_checkpoint(path).tensors
        bias = tensors.read("visual_bert.pooler.dense.weight")
        print(json.dumps(["read", len([tensors.read(n) for n in tensors.specs]), bias.tolist()]))
    except VisualBertError as error:
        print(json.dumps([type(error).__name__, str(error)]))
loaded = {name.split(".")[0] for name in sys.modules} & set(json.loads(sys.argv[-1]))
assert not loaded, loaded
"""
WRITE = """
from visualbert.checkpoint.keras_files import write_keras
try:
    write_keras(Path(sys.argv[1]), None, (), print)
except VisualBertError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def run(code, *args, **env):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """One model as each framework wrote it, with its config.json."""
    import orbax.checkpoint as ocp
    from flax import serialization

    root = tmp_path_factory.mktemp("native")
    config, arrays = make(ANSWERS)
    for name in ("keras", "flax", "msgpack"):
        config.replace(architectures=(ANSWERS,)).save_pretrained(root / name)
    model = model_of("tf", ANSWERS, config, arrays, "float32")
    model.save_weights(root / "keras" / "model.weights.h5")
    model = model_of("flax", ANSWERS, config, arrays, "float32")
    pure = flax_state(model, "pure")
    (root / "msgpack" / "flax_model.msgpack").write_bytes(serialization.to_bytes(pure))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(root / "flax" / "orbax", pure)
    return root, arrays


def test_folders(native):
    root, arrays = native
    for name in ("keras", "flax", "msgpack"):
        same(read_all(open_checkpoint(root / name).tensors), arrays)


def test_an_orbax_folder_alone(native, tmp_path, monkeypatch):
    """By its _METADATA; config.json and detector are those of the folder that it lies in."""
    root, arrays = native
    shutil.copytree(root / "flax", tmp_path / "whole")
    detector = {"detector.x": np.ones(2, np.float32)}
    safetensors.numpy.save_file(detector, tmp_path / "whole" / "detector.safetensors")
    expected = open_checkpoint(tmp_path / "whole")
    orbax = (tmp_path / "whole" / "orbax").rename(tmp_path / "whole" / "step 7")
    monkeypatch.chdir(orbax)
    for path in (orbax, "."):
        found = open_checkpoint(path)
        same(read_all(found.tensors), arrays)
        assert (found.config, found.notes, found.format) == (expected.config, {}, "Orbax")
        assert found.folder.resolve() == expected.folder.resolve()
        same(read_all(found.aside), detector)
    (tmp_path / "whole" / "config.json").rename(tmp_path / "mine.json")
    assert open_checkpoint(orbax, config=tmp_path / "mine.json").config == expected.config
    found = open_checkpoint(orbax, num_attention_heads=3)
    assert found.config.architectures == (ANSWERS,)
    assert found.notes["inferred"][0] == (
        f"architecture={ANSWERS} (a classifier of 5 rows; if not, --architecture CLASS)"
    )
    assert refused(open_checkpoint, orbax) == (
        f"'{orbax}': hidden_size=24 is no multiple of 64, so the number of attention heads cannot "
        "be guessed; give it as num_attention_heads (--set num_attention_heads=N)"
    )


def test_reading_needs_no_framework(native):
    root, arrays = native
    paths = [root / name for name in ("keras", "flax", "msgpack")]
    found = run(BLOCKED + READ, *paths, json.dumps([*FRAMEWORKS, "h5py"]))
    expected = ["read", len(arrays), arrays["visual_bert.pooler.dense.weight"].tolist()]
    assert [json.loads(line) for line in found] == [expected] * 3


def test_what_a_format_needs(native, tmp_path):
    root, _ = native
    blocked = json.dumps([*FRAMEWORKS, "h5py", "tensorstore"])
    (line,) = run(BLOCKED + READ, root / "flax", blocked)
    assert json.loads(line) == [
        "MissingBackendError",
        f"{root}/flax/orbax: this format needs tensorstore: pip install visualbert[flax]",
    ]
    (line,) = run(BLOCKED + WRITE, tmp_path / "x.h5", blocked)
    assert json.loads(line) == [
        "MissingBackendError",
        f"{tmp_path}/x.h5: this format needs h5py: pip install visualbert[tf]",
    ]


def test_bundle_without_tensorflow(tmp_path):
    arrays = {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
    save_v2(tmp_path / "x", arrays)
    code = """
from visualbert.checkpoint.tf_bundle import BundleFiles
print(json.dumps(BundleFiles("x", Path(sys.argv[1])).read("a/kernel").tolist()))
"""
    (line,) = run(BLOCKED + code, tmp_path / "x", json.dumps(FRAMEWORKS))
    assert json.loads(line) == arrays["a/kernel"].tolist()
