"""The golden cases: what the original authors' code computed, under this package's names, and the
comparison of a model with it.
"""

import functools
from pathlib import Path

import numpy as np
from safetensors import safe_open

from visualbert import VisualBertConfig
from visualbert.checkpoint.tensors import ArrayTensors
from visualbert.parity import without_padding

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


def output_errors(case, backend, model):
    """How far every output of `model` is from the original's, once none is too far.

    What the original gives at padding is compared with models that do not leave it out.
    """
    _, config, _, inputs, groups = prepared(case)
    want = groups["outputs"]
    packs = model.config.packing != "never"

    def compared_at(name, array):
        return without_padding(name, np.ones(array.shape), inputs) > 0 if packs else True

    found = backend.call(model, {**inputs, "output_hidden_states": True})
    found |= {
        name: x
        for name, x in backend.call(model, {**inputs, "output_attentions": True}).items()
        if name.startswith("attentions")
    }
    errors = [check("loss", found["loss"], want["loss"])]
    if case == "flickr":
        visible = inputs["visual_attention_mask"][:, None].astype(bool)
        visible = visible & (inputs["region_to_phrase_position"] >= 0)[..., None]
        errors.append(check("logits", found["logits"], want["logits"], visible))
    else:
        name = "prediction_logits" if "prediction_logits" in found else "logits"
        array = want["logits"].reshape(found[name].shape)
        errors.append(check(name, found[name], array, compared_at(name, array)))
    if "seq_relationship_score" in want:
        score = want["seq_relationship_score"]
        errors.append(check("match", found["seq_relationship_logits"], score))
    compared = 0
    for name, array in want.items():
        kind, _, index = name.partition(".")
        if index:
            there = compared_at(f"{kind}.{index}", array)
            errors.append(check(name, found[f"{kind}.{index}"], array, there))
            compared += 1
    assert compared == (0 if config.bypass_transformer else 2 * config.num_hidden_layers)
    return errors
