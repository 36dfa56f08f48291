"""Importing the package imports no framework, and each framework works with the other two
absent.
"""

import json
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
from tiny import BACKENDS, make_model, tiny_config

FRAMEWORKS = {
    "pt": ("torch",),
    "tf": ("tensorflow", "keras"),
    "flax": ("jax", "jaxlib", "flax"),
}

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocked())
import importlib.util
found = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name.split(".")[0] in {blocked} else found(name, package)
importlib.util.find_spec = find_spec
"""

WORK = """
import numpy as np
import visualbert
from visualbert.cli import main

model = visualbert.load({source!r}, {backend!r})
inputs = {{
    "input_ids": np.array([[2, 7, 9, 3]]),
    "visual_embeds": np.ones((1, 5, 20), np.float32),
    "labels": np.array([1]),
}}
backend = visualbert.get_backend({backend!r})
first = backend.call(model, inputs)["logits"]
backend.gradients(model, inputs)
model.save_pretrained({target!r})
again = visualbert.load({target!r}, {backend!r})
assert np.array_equal(first, backend.call(again, inputs)["logits"])
fresh = type(model)(model.config)
assert main(["inspect", {target!r}]) == 0
assert main(["verify", {target!r}, "--backends", {backend!r}]) == 0
assert visualbert.backend_names(installed=True) == [{backend!r}]
loaded = {{name.split(".")[0] for name in sys.modules}} & {blocked}
assert not loaded, loaded
print("done")
"""


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_framework_is_enough(backend, tmp_path):
    make_model("pt", "VisualBertForVisualReasoning", tiny_config()).save_pretrained(tmp_path / "a")
    blocked = {m for name, ms in FRAMEWORKS.items() if name != backend for m in ms}
    blocked |= {"transformers"}
    work = WORK.format(
        source=str(tmp_path / "a"), target=str(tmp_path / "b"), backend=backend, blocked=blocked
    )
    assert run(BLOCK.format(blocked=blocked) + work).endswith("done\n")


READ = """
from pathlib import Path

import numpy as np
import visualbert
from visualbert.checkpoint.read import read_weights

expected = read_weights(Path({safe!r}))
for source in {sources!r}:
    read = read_weights(Path(source))
    assert set(read.specs) == set(expected.specs)
    for name in expected.specs:
        assert read.read(name).tobytes() == expected.read(name).tobytes(), name
inputs = {{"input_ids": np.array([[2, 7, 9, 3]]), "visual_embeds": np.ones((1, 5, 20), np.float32)}}
for name in {backends!r}:
    backend = visualbert.get_backend(name)
    first, *others = (
        backend.call(visualbert.load(source, name), inputs)["logits"]
        for source in ({safe!r}, *{sources!r})
    )
    assert all(np.array_equal(first, other) for other in others), name
try:
    import torch
except ImportError:
    print("done")
"""


@pytest.mark.parametrize("backends", [(), ("tf",), ("flax",)], ids=["numpy", "tf", "flax"])
def test_torch_files_without_torch(backends, tmp_path):
    """Both formats of `pytorch_model.bin`, whole and in shards, where torch cannot be imported."""
    import torch

    make_model("pt", "VisualBertForVisualReasoning", tiny_config()).save_pretrained(tmp_path / "a")
    state = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")
    names, sources = list(state), []
    for kind, modern in (("zip", True), ("legacy", False)):
        for shards in (1, 3):
            folder = tmp_path / f"{kind}{shards}"
            folder.mkdir()
            shutil.copy(tmp_path / "a" / "config.json", folder)
            files = {
                "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i}.bin": names[i::shards]
                for i in range(shards)
            }
            for file, part in files.items():
                content = {name: state[name] for name in part}
                torch.save(content, folder / file, _use_new_zipfile_serialization=modern)
            if shards > 1:
                places = {name: file for file, part in files.items() for name in part}
                index = folder / "pytorch_model.bin.index.json"
                index.write_text(json.dumps({"weight_map": places}))
            sources.append(str(folder))
    blocked = {"torch", "transformers"}
    blocked |= {m for name, ms in FRAMEWORKS.items() if name not in backends for m in ms}
    work = READ.format(safe=str(tmp_path / "a"), sources=sources, backends=backends)
    assert run(BLOCK.format(blocked=blocked) + work).endswith("done\n")


def test_without_any_framework(tmp_path):
    make_model("pt", "VisualBertModel", tiny_config()).save_pretrained(tmp_path / "a")
    blocked = {m for ms in FRAMEWORKS.values() for m in ms} | {"transformers"}
    code = (
        BLOCK.format(blocked=blocked)
        + f"""
import visualbert
from visualbert.cli import main
assert main(["inspect", {str(tmp_path / "a")!r}]) == 0
source, target = {str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}
assert main(["convert", source, target, "--dtype", "bfloat16"]) == 0
for prefix, extra in (("", "pt"), ("TF", "tf"), ("Flax", "flax")):
    try:
        getattr(visualbert, prefix + "VisualBertModel")
    except ImportError as error:
        assert f"pip install visualbert[{{extra}}]" in str(error), error
    else:
        raise AssertionError(prefix)
print("done")
"""
    )
    assert run(code).endswith("done\n")


def test_importing_is_light():
    code = """
import json, sys
before = set(sys.modules)
import visualbert
visualbert.__all__, dir(visualbert)
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    heavy = {"torch", "tensorflow", "keras", "jax", "flax", "transformers", "numpy", "safetensors"}
    assert not heavy & set(json.loads(run(code)))


def test_every_public_name_exists():
    import visualbert

    for name in visualbert.__all__:
        assert getattr(visualbert, name) is not None
    for name, way in {
        "VisualBertModle": "; did you mean 'VisualBertModel'?",
        "TFVisualBertForPretraining": "; did you mean 'TFVisualBertForPreTraining'?",
        "get_backends": "; did you mean 'get_backend'?",
        "BertModel": "",
    }.items():
        with pytest.raises(AttributeError) as caught:
            getattr(visualbert, name)
        assert str(caught.value) == f"module 'visualbert' has no attribute {name!r}{way}"
