"""What the tests share: a configuration whose sizes all differ, and values without zeros or
ones.
"""

import numpy as np
import pytest

from visualbert import VisualBertConfig, get_backend
from visualbert.checkpoint.tensors import ArrayTensors
from visualbert.pretrained import fill
from visualbert.schema import Kind, parameters

BACKENDS = ("pt", "tf", "flax")
SIZES = {
    "vocab_size": 113,
    "hidden_size": 24,
    "visual_embedding_dim": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 36,
}
# Of the rest of a product of cases, whose first ones stand for it in CI.
REST = (pytest.mark.slow, pytest.mark.exhaustive)


def tiny_config(**changes):
    return VisualBertConfig(**{**SIZES, "num_labels": 5, **changes})


def random_tensors(architecture, config, seed=0):
    """Every parameter drawn, biases and scales too, so that none can hide."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for p in parameters(architecture, config):
        values = rng.standard_normal(p.shape(config)) * (0.3 if p.kind is Kind.EMBEDDING else 0.15)
        arrays[p.name] = (values + (p.kind is Kind.SCALE)).astype(np.float32)
    return ArrayTensors("random values", arrays)


def make_model(backend, architecture, config, dtype="float32", tensors=None):
    backend = get_backend(backend) if isinstance(backend, str) else backend
    model = backend.create(architecture, config, dtype)
    fill(backend, model, tensors or random_tensors(architecture, config))
    return model


def read_all(tensors):
    """Every array by its name."""
    return {name: tensors.read(name) for name in tensors.specs}


def same(found, expected):
    """Names, types, shapes and bits agree."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name
