"""The frameworks give the same numbers, and the comparison that says so can fail.

float64: outputs, hidden states, attentions, losses and every gradient within 1e-9; float32 within
    1e-5,
both absolute.
"""

import functools
import itertools

import numpy as np
import pytest
from tiny import BACKENDS, make_model, random_tensors, tiny_config

from visualbert import get_backend
from visualbert.checkpoint.tensors import ArrayTensors
from visualbert.parity import CASES, TOLERANCES, applicable, compare, make_inputs, run
from visualbert.schema import ARCHITECTURES

CASE = {case.name: case for case in CASES}


@functools.lru_cache(maxsize=8)
def outcome(backend, architecture, late_fusion, dtype, case):
    config = tiny_config(bypass_transformer=late_fusion)
    model = make_model(backend, architecture, config, dtype)
    inputs = make_inputs(CASE[case], architecture, config)
    return run(get_backend(backend), model, architecture, config, inputs, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("late_fusion", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASE)
def test_backends_agree(architecture, late_fusion, dtype, case):
    if not applicable(CASE[case], architecture):
        pytest.skip("this head needs regions")
    found = {b: outcome(b, architecture, late_fusion, dtype, case) for b in BACKENDS}
    for a, b in itertools.combinations(BACKENDS, 2):
        worst = max(compare(found[a], found[b]), key=lambda d: d.error)
        assert worst.error <= TOLERANCES[dtype], f"{a} – {b}: {worst}"
        assert worst.size < 1e4  # an exploding tensor would make the bound meaningless
    names = set(found["pt"])
    assert {"hidden_states.0", "attentions.0"} <= names
    if architecture != "VisualBertModel":
        assert "loss" in names
        assert any(np.any(x) for n, x in found["pt"].items() if n.startswith("gradient"))


def swapped(names):
    def change(config, tensors):
        arrays = dict(tensors.arrays)
        for a, b in names:
            arrays[a], arrays[b] = arrays[b], arrays[a]
        return config, ArrayTensors("swapped", arrays)

    return change


def transposed(name):
    def change(config, tensors):
        arrays = {**tensors.arrays, name: np.ascontiguousarray(tensors.arrays[name].T)}
        return config, ArrayTensors("transposed", arrays)

    return change


LAYER = "visual_bert.encoder.layer.1."
FAULTS = {
    "query and key swapped": swapped(
        [
            (f"{LAYER}attention.self.{a}", f"{LAYER}attention.self.{b}")
            for a, b in (("query.weight", "key.weight"), ("query.bias", "key.bias"))
        ]
    ),
    "kernel not transposed": transposed(f"{LAYER}attention.output.dense.weight"),
    "gelu with tanh": lambda config, tensors: (config.replace(hidden_act="gelu_new"), tensors),
    "wrong epsilon": lambda config, tensors: (config.replace(layer_norm_eps=1e-6), tensors),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", [*FAULTS, "alignment dropped"])
def test_a_fault_in_one_backend_is_found(fault, backend):
    architecture, case = "VisualBertForPreTraining", "alignment"
    other = "tf" if backend == "pt" else "pt"
    config, tensors = tiny_config(), random_tensors(architecture, tiny_config())
    inputs = make_inputs(CASE[case], architecture, config)
    if fault == "alignment dropped":
        del inputs["image_text_alignment"]
    else:
        config, tensors = FAULTS[fault](config, tensors)
    model = make_model(backend, architecture, config, "float64", tensors)
    found = run(get_backend(backend), model, architecture, config, inputs, "float64")
    worst = compare(found, outcome(other, architecture, False, "float64", case))[0]
    assert worst.error > 1000 * TOLERANCES["float64"]


def test_compare_reports_what_is_missing_and_what_is_no_number():
    a = {"x": np.array([1.0, np.nan]), "y": np.zeros(3)}
    b = {"x": np.array([1.0, 2.0]), "z": np.zeros(3)}
    errors = {d.name: d.error for d in compare(a, b)}
    assert errors == {"x": np.inf, "y": np.inf, "z": np.inf}
