"""All three frameworks against numbers computed by the original authors' code, late fusion
included.
"""

import functools
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tiny import BACKENDS, make_model

from visualbert import VisualBertConfig, get_backend
from visualbert.backend import native_name, to_native
from visualbert.checkpoint.tensors import ArrayTensors
from visualbert.schema import parameters

FOLDER = Path(__file__).parent / "golden"
ARCHITECTURE = {
    "pretraining": "VisualBertForPreTraining",
    "vqa": "VisualBertForQuestionAnswering",
    "multichoice": "VisualBertForMultipleChoice",
    "nlvr": "VisualBertForVisualReasoning",
    "flickr": "VisualBertForRegionToPhraseAlignment",
}
# The original's names, whole components, and ours.
COMPONENTS = {
    "bert": "visual_bert",
    "classifier": "cls",
    "flickr_attention": "attention",
    "token_type_embeddings_visual": "visual_token_type_embeddings",
    "position_embeddings_visual": "visual_position_embeddings",
    "projection": "visual_projection",
}
INPUTS = {
    "input_ids": "input_ids",
    "token_type_ids": "token_type_ids",
    "input_mask": "attention_mask",
    "visual_embeddings": "visual_embeds",
    "image_mask": "visual_attention_mask",
    "visual_embeddings_type": "visual_token_type_ids",
    "image_text_alignment": "image_text_alignment",
    "masked_lm_labels": "labels",
    "label": "labels",
    "is_random_next": "sentence_image_labels",
    "flickr_position": "region_to_phrase_position",
}
TOLERANCE = 1e-5


def renamed(name):
    return ".".join(COMPONENTS.get(part, part) for part in name.split("."))


@functools.cache
def golden(case):
    with safe_open(FOLDER / f"{case}.safetensors", "np") as file:
        groups = {}
        for key in file.keys():  # noqa: SIM118
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = file.get_tensor(key)
        return file.metadata(), groups


def prepared(case):
    meta, groups = golden(case)
    architecture = ARCHITECTURE[meta["head"]]
    fields = {
        k: int(v) for k, v in meta.items() if k in VisualBertConfig.__annotations__ and v.isdigit()
    }
    tensors = {renamed(name): x for name, x in groups["weights"].items()}
    tensors.pop("cls.predictions.decoder.weight", None)
    labels = tensors["cls.weight"].shape[0] if "cls.weight" in tensors else 2
    config = VisualBertConfig(
        **fields,
        num_labels=labels,
        layer_norm_eps=float(meta["layer_norm_eps"]),
        bypass_transformer=meta["bypass_transformer"] == "True",
    )
    inputs = {INPUTS[name]: x for name, x in groups["inputs"].items()}
    ones = inputs["visual_attention_mask"]
    inputs.setdefault("visual_token_type_ids", np.zeros_like(ones))  # the original's default
    return architecture, config, ArrayTensors(case, tensors), inputs, groups


CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def check(name, found, want, where=True):
    assert found.shape == want.shape, name
    error = float(np.abs(np.where(where, found - want, 0)).max())
    assert error <= TOLERANCE, f"{name}: {error}"
    return error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_original_outputs(case, backend, record_property):
    architecture, config, tensors, inputs, groups = prepared(case)
    want = groups["outputs"]
    chosen = get_backend(backend)
    model = make_model(chosen, architecture, config, "float32", tensors)
    found = chosen.call(model, {**inputs, "output_hidden_states": True})
    found |= {
        name: x
        for name, x in chosen.call(model, {**inputs, "output_attentions": True}).items()
        if name.startswith("attentions")
    }
    errors = [check("loss", found["loss"], want["loss"])]
    if case == "flickr":
        visible = inputs["visual_attention_mask"][:, None].astype(bool)
        visible = visible & (inputs["region_to_phrase_position"] >= 0)[..., None]
        errors.append(check("logits", found["logits"], want["logits"], visible))
    else:
        logits = found.get("prediction_logits", found.get("logits"))
        errors.append(check("logits", logits, want["logits"].reshape(logits.shape)))
    if "seq_relationship_score" in want:
        score = want["seq_relationship_score"]
        errors.append(check("match", found["seq_relationship_logits"], score))
    compared = 0
    for name, array in want.items():
        kind, _, index = name.partition(".")
        if index:
            errors.append(check(name, found[f"{kind}.{index}"], array))
            compared += 1
    assert compared == (0 if config.bypass_transformer else 2 * config.num_hidden_layers)
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
