"""All three frameworks against numbers computed by the original authors' code, late fusion
included.
"""

import pytest
from golden_cases import CASES, TOLERANCE, check, output_errors, prepared, renamed
from tiny import BACKENDS, make_model

from visualbert import get_backend
from visualbert.backend import native_name, to_native
from visualbert.schema import parameters


@pytest.mark.parametrize("packing", ["inference", "never"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_original_outputs(case, backend, packing, record_property):
    architecture, config, tensors, _, _ = prepared(case)
    chosen = get_backend(backend)
    config = config.replace(packing=packing)
    model = make_model(chosen, architecture, config, "float32", tensors)
    errors = output_errors(case, chosen, model)
    record_property("golden", [case, "outputs", backend, max(errors)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_original_gradients(case, backend, record_property):
    architecture, config, tensors, inputs, groups = prepared(case)
    chosen = get_backend(backend)
    model = make_model(chosen, architecture, config, "float32", tensors)
    gradients = chosen.gradients(model, inputs)
    want = {renamed(name): x for name, x in groups["grads"].items()}
    # The decoder is the word table: the original counts their gradients together.
    want.pop("cls.predictions.decoder.weight", None)
    table = {p.name: p for p in parameters(architecture, config)}
    assert set(want) <= set(table)
    errors = []
    for name, array in want.items():
        p = table[name]
        found = to_native(chosen, p, gradients[native_name(chosen, p)])
        errors.append(check(name, found, array))
    record_property("golden", [case, "gradients", backend, max(errors)])
    for name in set(table) - set(want):
        p = table[name]
        assert not gradients[native_name(chosen, p)].any(), f"{name} has a gradient here alone"


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_segment_is_found(case):
    """transformers' default of 1 for visual segments, on values that were computed with 0."""
    architecture, config, tensors, inputs, groups = prepared(case)
    inputs["visual_token_type_ids"] = 1 - inputs["visual_token_type_ids"]
    backend = get_backend("pt")
    model = make_model(backend, architecture, config, "float32", tensors)
    found = backend.call(model, inputs)
    assert abs(found["loss"] - groups["outputs"]["loss"]) > 10 * TOLERANCE
