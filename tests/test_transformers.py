"""Against transformers in both directions: its folders load here, ours load there, the numbers
agree.
"""

import json

import pytest
from tiny import BACKENDS, make_model, tiny_config

from visualbert import get_backend, load
from visualbert.parity import CASES, TOLERANCES, applicable, compare, make_inputs, run
from visualbert.schema import ARCHITECTURES

transformers = pytest.importorskip("transformers")


def reference():
    return get_backend("transformers")


def agree(backend, model, theirs, architecture, config, dtype):
    from visualbert.pt.transformers import NotComparable

    compared = 0
    for case in CASES:
        if not applicable(case, architecture):
            continue
        inputs = make_inputs(case, architecture, config)
        try:
            want = run(reference(), theirs, architecture, config, inputs, dtype)
        except NotComparable:
            continue
        found = run(get_backend(backend), model, architecture, config, inputs, dtype)
        worst = max(compare(found, want), key=lambda d: d.error)
        assert worst.error <= TOLERANCES[dtype], f"{case.name}: {worst}"
        compared += 1
    return compared


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_their_folder_loads_here(architecture, tmp_path):
    import torch

    torch.manual_seed(0)
    config = tiny_config(initializer_range=0.2)
    theirs = getattr(transformers, architecture)(
        transformers.VisualBertConfig.from_dict(config.to_dict())
    ).eval()
    theirs.save_pretrained(tmp_path)
    for backend, dtype in (("pt", "float32"), *((x, "float64") for x in BACKENDS)):
        model = load(tmp_path, backend, dtype=dtype)
        theirs = reference().load(tmp_path, architecture, dtype)
        assert agree(backend, model, theirs, architecture, model.config, dtype) >= 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_folder_loads_there(architecture, backend, tmp_path):
    config = tiny_config()
    model = make_model(backend, architecture, config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [architecture]
    theirs, info = getattr(transformers, architecture).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    assert agree(backend, model, theirs.eval(), architecture, config, "float32") >= 3


def test_late_fusion_cannot_be_compared():
    import torch

    from visualbert.pt.transformers import NotComparable

    config = tiny_config(bypass_transformer=True)
    theirs = reference().create("VisualBertModel", config)
    inputs = make_inputs(CASES[1], "VisualBertModel", config)
    with pytest.raises(NotComparable, match="bypass_transformer"):
        reference().call(theirs, inputs)
    # The day transformers mends it, this comparison can begin.
    inputs = {name: torch.as_tensor(x) for name, x in inputs.items()}
    with pytest.raises(IndexError):
        theirs(**inputs)
