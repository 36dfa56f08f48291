"""MMF's classifier of two layers: its table, its numbers in every framework, its files, and what
refuses it.
"""

import functools
import itertools
import json

import numpy as np
import pytest
from mmf_reference import gelu, layer_norm, mmf_logits, tanh_gelu
from tiny import BACKENDS, make_model, random_tensors, tiny_config

from visualbert import CheckpointError, ConfigError, get_backend, load
from visualbert.checkpoint.initial import InitialValues
from visualbert.checkpoint.match import match
from visualbert.checkpoint.read import read_weights
from visualbert.parity import CASES, TOLERANCES, compare, differing_bits, make_inputs, run, verify
from visualbert.pretrained import ModelTensors, open_checkpoint
from visualbert.schema import ARCHITECTURES, BODY, is_head, owner_of, owners_of, parameters

ANSWERS, REASONING = "VisualBertForQuestionAnswering", "VisualBertForVisualReasoning"
CLASSIFIERS = (ANSWERS, REASONING)
OTHERS = [a for a in ARCHITECTURES if a not in (BODY, *CLASSIFIERS)]
LINEAR, MLP = tiny_config(), tiny_config(classifier_head="mlp")
CASE = {case.name: case for case in CASES if case.name != "alignment"}
HEAD = {
    "cls.transform.dense.weight": (24, 24),
    "cls.transform.dense.bias": (24,),
    "cls.transform.LayerNorm.weight": (24,),
    "cls.transform.LayerNorm.bias": (24,),
    "cls.decoder.weight": (5, 24),
    "cls.decoder.bias": (5,),
}
TOLERANCE = TOLERANCES["float64"]


# The table


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_the_table(architecture):
    linear, mlp = (
        {p.name: p.shape(config) for p in parameters(architecture, config)}
        for config in (LINEAR, MLP)
    )
    body = {p.name: p.shape(MLP) for p in parameters(architecture, MLP) if not is_head(p)}
    assert mlp == {**body, **HEAD}
    assert linear == {**body, "cls.weight": (5, 24), "cls.bias": (5,)}


def test_whose_head_it_is():
    for name in HEAD:
        assert owners_of(name) == CLASSIFIERS and owner_of(name) == ANSWERS
    assert owners_of("cls.weight") == ("VisualBertForMultipleChoice", *CLASSIFIERS)
    assert owners_of("cls.predictions.bias") == ("VisualBertForPreTraining",)
    assert owners_of("cls.transform.dense") == () and owner_of("pooler.dense.bias") is None


def test_a_body_ignores_it():
    assert parameters(BODY, MLP) == parameters(BODY, LINEAR)


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_heads_refuse_it(architecture):
    sentence = (
        f"classifier_head='mlp' is no head of {architecture}, only of {ANSWERS} and {REASONING}; "
        "set it to 'linear'"
    )
    with pytest.raises(ConfigError) as caught:
        parameters(architecture, MLP)
    assert str(caught.value) == sentence
    for backend in BACKENDS:
        with pytest.raises(ConfigError) as caught:
            get_backend(backend).models[architecture](MLP)
        assert str(caught.value) == sentence


# The numbers


@functools.lru_cache(maxsize=8)
def outcome(backend, architecture, case, config=MLP):
    model = make_model(backend, architecture, config, "float64")
    inputs = make_inputs(CASE[case], architecture, config)
    return run(get_backend(backend), model, architecture, config, inputs, "float64")


@pytest.mark.parametrize("architecture", CLASSIFIERS)
@pytest.mark.parametrize("case", CASE)
def test_backends_agree(case, architecture):
    found = {b: outcome(b, architecture, case) for b in BACKENDS}
    for a, b in itertools.combinations(BACKENDS, 2):
        worst = max(compare(found[a], found[b]), key=lambda d: d.error)
        assert worst.error <= TOLERANCE, f"{a} – {b}: {worst}"
    for name, shape in {"loss": (), "logits": (3, 5)}.items():
        assert found["pt"][name].shape == shape
    for name in HEAD:
        assert np.abs(found["pt"][f"gradient {name}"]).max() > 1e-6


def rebuilt(backend, architecture, case, config=MLP, **fault):
    """How far a backend's logits are from numpy's on its own hidden states."""
    found = outcome(backend, architecture, case, config)
    tensors = random_tensors(architecture, MLP)
    values = {name: tensors.read(name).astype(np.float64) for name in tensors.specs}
    inputs = make_inputs(CASE[case], architecture, MLP)
    mask = inputs.get("attention_mask", np.ones_like(inputs["input_ids"]))
    logits = mmf_logits(found["hidden_states.2"], mask, architecture, values, **fault)
    return np.abs(logits - found["logits"]).max()


@pytest.mark.parametrize("architecture", CLASSIFIERS)
@pytest.mark.parametrize("case", CASE)
def test_it_is_mmfs(case, architecture):
    for backend in BACKENDS:
        assert rebuilt(backend, architecture, case) <= TOLERANCE


FAULTS = {
    "gelu with tanh": {"activation": tanh_gelu},
    "no LayerNorm": {"norm": lambda x, values, name: x},
    "LayerNorm before the activation": {
        "activation": lambda x: x,
        "norm": lambda x, values, name: gelu(layer_norm(x, values, name)),
    },
    "last token": {"back": 1},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_another_head_is_found(fault, backend):
    for architecture in CLASSIFIERS[: 1 if fault == "last token" else 2]:
        error = rebuilt(backend, architecture, "right padding", **FAULTS[fault])
        assert error > 1000 * TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_follows_the_config(backend):
    """Activation and epsilon are the config's, as in MMF."""
    config = MLP.replace(hidden_act="relu", layer_norm_eps=1e-3)
    norm = functools.partial(layer_norm, eps=1e-3)
    for architecture in CLASSIFIERS:
        error = functools.partial(rebuilt, backend, architecture, "right padding", config)
        assert error(activation=lambda x: np.maximum(x, 0), norm=norm) <= TOLERANCE
        assert error(activation=gelu, norm=norm) > 1000 * TOLERANCE
        assert error(activation=lambda x: np.maximum(x, 0)) > 1000 * TOLERANCE


# Files


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_round_trip(architecture, backend, tmp_path):
    model = make_model(backend, architecture, MLP)
    model.save_pretrained(tmp_path / "a")
    written = json.loads((tmp_path / "a/config.json").read_text())
    assert (written["classifier_head"], written["architectures"]) == ("mlp", [architecture])
    assert not differing_bits(read_weights(tmp_path / "a"), random_tensors(architecture, MLP))
    for other in BACKENDS:
        load(tmp_path / "a", other).save_pretrained(tmp_path / other)
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


@pytest.fixture
def folders(tmp_path):
    """A checkpoint with each head, of the same body."""
    for config in (LINEAR, MLP):
        make_model("pt", ANSWERS, config).save_pretrained(tmp_path / config.classifier_head)
    return {name: tmp_path / name for name in ("linear", "mlp")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["mlp", "linear"])
def test_a_new_head_on_the_other(wanted, backend, folders):
    source = folders["linear" if wanted == "mlp" else "mlp"]
    chosen = get_backend(backend)
    for architecture in CLASSIFIERS:
        cls = chosen.models[architecture]
        model = cls.from_pretrained(
            source, new_head=True, classifier_head=wanted, num_labels=7, seed=4
        )
        assert (model.config.classifier_head, model.config.num_labels) == (wanted, 7)
        tensors, file = ModelTensors(chosen, model), read_weights(source)
        fresh = InitialValues(architecture, model.config, seed=4)
        for p in parameters(architecture, model.config):
            expected = (fresh if is_head(p) else file).read(p.name)
            assert np.array_equal(tensors.read(p.name), expected), p.name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_body_from_its_folder(backend, folders, tmp_path):
    cls = get_backend(backend).models[BODY]
    body = cls.from_pretrained(folders["mlp"])
    assert not any("cls" in name for name in ModelTensors(get_backend(backend), body).specs)
    body.save_pretrained(tmp_path / "body")
    again = get_backend(backend).models[ANSWERS].from_pretrained(tmp_path / "body", new_head=True)
    assert again.config.classifier_head == "mlp"


def test_another_architecture_from_its_folder(folders):
    cls = get_backend("pt").models["VisualBertForMultipleChoice"]
    with pytest.raises(ConfigError, match="is no head of VisualBertForMultipleChoice"):
        cls.from_pretrained(folders["mlp"], new_head=True)
    assert cls.from_pretrained(folders["mlp"], new_head=True, classifier_head="linear")


@pytest.mark.parametrize(("asked", "held"), [("linear", "mlp"), ("mlp", "linear")])
def test_the_wrong_head_is_one_problem(asked, held, folders):
    for backend in BACKENDS:
        cls = get_backend(backend).models[ANSWERS]
        with pytest.raises(CheckpointError) as caught:
            cls.from_pretrained(folders[held], classifier_head=asked)
        assert str(caught.value) == (
            f"cannot load {ANSWERS} ({backend}) from {str(folders[held])!r}: 1 problem\n"
            f"  mismatched  cls: the file has the {held} head;\n"
            f"              classifier_head is {asked!r}, the file says {held!r}\n"
            "To train a new head on this body, pass new_head=True."
        )


def report(architecture, config, tensors):
    with pytest.raises(CheckpointError) as caught:
        match(tensors, architecture, config)
    return str(caught.value).splitlines()[1:]


def test_what_another_classifier_head_would_not_mend():
    """The field is blamed only where its other value is a head of this class and all there is."""
    hint = "To train a new head on this body, pass new_head=True."
    mlp = random_tensors(ANSWERS, MLP)
    owners = f"the head of {ANSWERS} or {REASONING}"
    unexpected = f"  unexpected  cls.transform.dense.{{weight, bias}} and 4 more: {owners}"
    assert report("VisualBertForMultipleChoice", LINEAR, mlp) == [
        "  missing     cls.{weight, bias}",
        unexpected,
        hint,
    ]
    both = random_tensors(ANSWERS, LINEAR)
    both.arrays.update({name: mlp.arrays[name] for name in HEAD})
    both = type(both)("both", both.arrays)
    assert report(ANSWERS, LINEAR, both) == [unexpected, hint]
    assert report(ANSWERS, MLP, both) == [
        "  unexpected  cls.{weight, bias}: the head of VisualBertForMultipleChoice or "
        f"{ANSWERS} or {REASONING}",
        hint,
    ]
    part = type(mlp)("part", {n: a for n, a in mlp.arrays.items() if n != "cls.decoder.bias"})
    assert report(ANSWERS, MLP, part) == ["  missing     cls.decoder.bias", hint]
    assert report(REASONING, MLP, random_tensors("VisualBertForPreTraining", LINEAR)) == [
        "  missing     cls.transform.dense.{weight, bias} and 4 more",
        "  unexpected  cls.predictions.bias and 6 more: the head of VisualBertForPreTraining",
        hint,
    ]
    assert report(ANSWERS, MLP.replace(num_labels=9), mlp) == [
        "  mismatched  cls.decoder.weight: file (5, 24), config (9, 24);",
        "              num_labels is 9, the file says 5",
        hint,
    ]


# transformers


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_transformers_cannot_run_it(architecture, tmp_path):
    pytest.importorskip("transformers")
    make_model("pt", architecture, MLP).save_pretrained(tmp_path)
    inputs = {"right padding": make_inputs(CASE["right padding"], architecture, MLP)}
    found = verify(
        open_checkpoint(tmp_path), architecture, ["pt"], against="transformers", cases=inputs
    )
    assert [(row.case, row.skipped) for row in found.rows] == [
        (
            "right padding",
            f"transformers: its {architecture} has no classifier_head but the linear one",
        ),
        ("save and reload", ""),
    ]


def test_transformers_runs_the_body(folders):
    pytest.importorskip("transformers")
    inputs = {"right padding": make_inputs(CASE["right padding"], BODY, MLP)}
    found = verify(
        open_checkpoint(folders["mlp"]), BODY, ["pt"], against="transformers", cases=inputs
    )
    assert found.passed and not any(row.skipped for row in found.rows)
