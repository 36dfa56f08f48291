"""One tiny model and one batch for each architecture, with sizes that differ where it matters."""

import numpy as np

from visualbert.backend import flatten_outputs
from visualbert.config import VisualBertConfig
from visualbert.schema import ARCHITECTURES

B, T, V, C, E, A, L, F, H = 3, 9, 5, 4, 2, 3, 5, 20, 24
S = T + V
BODY, PRETRAINING, CHOICE, ANSWERS, REASONING, PHRASES = ARCHITECTURES
HEADS = ARCHITECTURES[1:]
# Batch, text and regions that a compiled or exported model is called with; in the first, no two
# axes are equal, or PyTorch would take them for one.
SIZES = ((7, 9, 6), (4, 7, 10), (2, 12, 3))
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}


def tiny_config(**changes):
    """24 wide, 3 heads, 2 layers; without dropout unless asked for."""
    fields = {
        "vocab_size": 113,
        "hidden_size": H,
        "visual_embedding_dim": F,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 36,
        "num_labels": L,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,  # with 0.02 the output would hardly depend on the input
        "packing": "never",  # zeros at padding would hide what is compared there
    }
    return VisualBertConfig(**{**fields, **changes})


def batch(architecture, size=B, text=T, regions=V, *, labels=True, alignment=True, seed=0):
    """Inputs as numpy: padding on the right, masks, segments; `regions=0` is text alone."""
    rng = np.random.default_rng(seed)
    lead = (size, C) if architecture == CHOICE else (size,)
    mask = np.ones((*lead, text), np.int64)
    mask.reshape(-1, text)[1::2, -2:] = 0
    inputs = {
        "input_ids": rng.integers(1, 113, (*lead, text)),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, (*lead, text)),
    }
    if regions:
        visual_mask = np.ones((size, regions), np.int64)
        visual_mask[0, -1] = 0
        inputs |= {
            "visual_embeds": rng.normal(size=(size, regions, F)).astype(np.float32),
            "visual_attention_mask": visual_mask,
            "visual_token_type_ids": rng.integers(0, 2, (size, regions)),
        }
    if regions and alignment:
        inputs["image_text_alignment"] = rng.integers(-1, text, (size, regions, A))
    if architecture == PHRASES:
        inputs["region_to_phrase_position"] = rng.integers(0, text, (size, E))
    if labels:
        inputs |= _labels(architecture, rng, inputs)
    return inputs


def _labels(architecture, rng, inputs):
    size, text = len(inputs["input_ids"]), inputs["input_ids"].shape[-1]
    if architecture == PRETRAINING:
        regions = inputs.get("visual_embeds", np.empty((size, 0))).shape[1]
        words = rng.integers(1, 113, (size, text + regions))
        words[:, ::2] = -100
        return {"labels": words, "sentence_image_labels": rng.integers(0, 2, size)}
    if architecture == PHRASES:
        targets = rng.random(inputs["visual_embeds"].shape[:2])[:, None].repeat(E, 1)
        targets *= inputs["visual_attention_mask"][:, None]
        return {"labels": (targets / targets.sum(-1, keepdims=True)).astype(np.float32)}
    return {
        BODY: {},
        CHOICE: {"labels": rng.integers(0, C, size)},
        ANSWERS: {"labels": rng.dirichlet(np.ones(L), size).astype(np.float32)},
        REASONING: {"labels": rng.integers(0, L, size)},
    }[architecture]


def numbers(x):
    """A tensor of any framework as float64."""
    x = x.detach().double() if hasattr(x, "detach") else x
    return np.asarray(x).astype(np.float64)


def difference(ours, theirs):
    """The largest one between two outputs; keys and shapes must be equal.

    The scores of masked regions are left out: they are as low as each type allows.
    """
    ours, theirs = (dict(flatten_outputs(output)) for output in (ours, theirs))
    assert sorted(ours) == sorted(theirs)
    worst = 0.0
    for name, x in ours.items():
        x, y = numbers(x), numbers(theirs[name])
        assert x.shape == y.shape, name
        assert np.isfinite(x).all() and np.isfinite(y).all(), name
        real = (x > -1e4) | (y > -1e4)
        worst = max(worst, np.abs(x - y)[real].max(initial=0))
    return worst


def largest(ours, theirs):
    """The largest difference between two lists of arrays."""
    pairs = zip(ours, theirs, strict=True)
    return max(np.abs(numbers(x) - numbers(y)).max() for x, y in pairs)


def with_masked_row():
    """A batch for the body whose second row shows nothing at all."""
    inputs = batch(BODY)
    inputs["attention_mask"][1] = 0
    inputs["visual_attention_mask"][1] = 0
    return inputs
