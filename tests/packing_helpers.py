"""Batches with padding of every kind, models for them, and how two of their outputs are compared:
what the tests of packing and of predictors share.
"""

import functools

import numpy as np
import pytest
from native_helpers import (
    ANSWERS,
    BODY,
    CHOICE,
    PHRASES,
    PRETRAINING,
    REASONING,
    numbers,
    tiny_config,
)
from tiny import BACKENDS, REST, make_model

from visualbert import get_backend
from visualbert.backend import native_name, to_native
from visualbert.packing import plan_packing
from visualbert.schema import parameters

B, T, V, A, E, H, F, L = 4, 16, 10, 3, 2, 24, 20, 5
EXACT = 1e-12
QUICKLY = {"xla_backend_optimization_level": 0}  # what runs once needs no fast code
each_backend = pytest.mark.parametrize("backend", BACKENDS)
flax_later = pytest.mark.parametrize(
    "backend", ["pt", "tf", pytest.param("flax", marks=pytest.mark.slow)]
)


def rows(names, *rows, **first):
    """Each row with every backend. Of a backend that is named, which takes its time, some rows are
    run at first, and the others are the rest of a product.
    """
    return pytest.mark.parametrize(
        f"backend, {names}",
        [
            pytest.param(b, *row, marks=REST if row not in first.get(b, rows) else ())
            for row in rows
            for b in BACKENDS
        ],
    )


def filled(lengths, width, side="right"):
    """Masks of so many ones each, on the other side of the padding."""
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    return mask if side == "right" else mask[:, ::-1].copy()


def with_holes(width, seed):
    mask = (np.random.default_rng(seed).random((B, width)) < 0.35).astype(np.int64)
    mask[:, [3, width - 2]] = 1
    return mask


# Masks of text and regions, and what else a batch of the case carries.
CASES = {
    "right": (filled([7, 2, 5, 3], T), filled([4, 6, 1, 2], V), "alignment"),
    "left": (filled([3, 6, 2, 8], T, "left"), filled([2, 5, 3, 1], V), "one row of positions"),
    "holes": (with_holes(T, 1), with_holes(V, 2), "embeddings, alignment, positions"),
    "text masked": (filled([3, 2, 4, 6], T), None, "segments"),
    "regions masked": (None, filled([2, 1, 3, 10], V, "left"), ""),
    "text alone": (filled([3, 9, 2, 7], T), None, "text alone, segments"),
}
HEADS = ("right", "left", "holes")  # cases that heads are run with


def make_batch(architecture, case):
    """Inputs of the case as numpy. Choices are made of the four examples, two each."""
    rng = np.random.default_rng(0)
    text_mask, visual_mask, what = CASES[case]
    batch = {
        "input_ids": rng.integers(1, 113, (B, T)),
        "token_type_ids": rng.integers(0, 2, (B, T)),
        "attention_mask": text_mask,
        "visual_embeds": rng.standard_normal((B, V, F)),
        "visual_token_type_ids": rng.integers(0, 2, (B, V)),
        "visual_attention_mask": visual_mask,
    }
    if "alignment" in what:
        batch["image_text_alignment"] = rng.integers(-1, T, (B, V, A))
    if "positions" in what:
        rows = 1 if "one row" in what else B
        batch["position_ids"] = rng.integers(0, 36, (rows, T))
    if "embeddings" in what:
        del batch["input_ids"]
        batch["inputs_embeds"] = rng.standard_normal((B, T, H))
    if "text alone" in what:
        batch = {k: x for k, x in batch.items() if not k.startswith("visual")}
    seen = [np.ones((B, T)) if text_mask is None else text_mask, visual_mask]
    batch |= targets(architecture, rng, *seen)
    if architecture == PHRASES:
        of_text = [rng.choice(np.flatnonzero(row), E) for row in seen[0]]
        batch["region_to_phrase_position"] = np.stack(of_text)
    if architecture == CHOICE:
        own = ("visual", "labels") if case == "left" else ("labels",)
        batch = {k: x if x is None else halved(k, x, own) for k, x in batch.items()}
    return {k: x for k, x in batch.items() if x is not None}


def halved(name, x, own):
    """(2, 2, …) of (4, …), or, where all choices share it, the first two."""
    if name == "position_ids":
        x = x.repeat(B // len(x), 0)
    return x[:2] if name.startswith(own) else x.reshape(2, 2, *x.shape[1:])


def targets(architecture, rng, text, regions):
    words = np.where((rng.random((B, T)) < 0.4) & (text > 0), rng.integers(0, 113, (B, T)), -100)
    match = rng.integers(0, 2, B)
    return {
        BODY: {},
        PRETRAINING: {"labels": words, "sentence_image_labels": match},
        CHOICE: {"labels": match},
        ANSWERS: {"labels": rng.dirichlet(np.ones(L), B)},
        REASONING: {"labels": rng.integers(0, L, B)},
        PHRASES: {} if regions is None else {"labels": regions[:, None] * rng.random((B, E, V))},
    }[architecture]


@functools.cache
def build(backend, architecture, late=False, dtype="float64", **changes):
    """A model that gives what is computed with its padding, unless `packing` is changed."""
    changes = {"packing": "never", **changes}
    return make_model(backend, architecture, tiny_config(bypass_transformer=late, **changes), dtype)


def call(backend, model, batch, training=False, **options):
    """Every output as numpy, in training mode or not."""
    if backend == "tf":
        options["training"] = training
    else:
        model.train() if training else model.eval()
    return get_backend(backend).call(model, {**batch, **options})


def gradients(backend, model, batch, training=False, **options):
    """Of the loss by every parameter, in the canonical layout, in training mode or not."""
    if backend == "tf":
        options["training"] = training
    else:
        model.train() if training else model.eval()
    chosen = get_backend(backend)
    # In Flax one compilation, where a call compiles each operation.
    run = flax_gradients if backend == "flax" else chosen.gradients
    found = run(model, {**batch, **options})
    return {
        p.name: np.asarray(to_native(chosen, p, found[native_name(chosen, p)]))
        for p in parameters(model.architecture, model.config)
    }


def flax_gradients(model, inputs):
    jax, nnx = pytest.importorskip("jax"), pytest.importorskip("flax.nnx")
    with jax.enable_x64(True):
        structure, state, others = nnx.split(model, nnx.Param, ...)

        def loss(state, inputs):
            return nnx.merge(structure, state, others)(**inputs).loss

        found = jax.jit(jax.grad(loss), compiler_options=QUICKLY)(state, inputs)
        return {".".join(map(str, k)): x.get_value() for k, x in nnx.to_flat_state(found)}


def plan(batch, late=False, **options):
    """The packing of a batch, or of `batch` with masks where they were left out."""
    text = batch["inputs_embeds" if "inputs_embeds" in batch else "input_ids"]
    lead = text.shape[:-1] if "inputs_embeds" in batch else text.shape
    masks = [batch.get("attention_mask", np.ones(lead))]
    if "visual_embeds" in batch:
        shape = batch["visual_embeds"].shape[:-1]
        masks.append(batch.get("visual_attention_mask", np.ones(shape)))
    late = late and len(masks) > 1
    return plan_packing(*masks, late_fusion=late, image_index=batch.get("image_index"), **options)


def real(outputs, packing):
    """Outputs with the values of tokens and regions that a batch shows, and not of its padding."""
    found = dict(outputs)
    for name, x in outputs.items():
        if name.startswith(("last_hidden_state", "hidden_states", "prediction_logits")):
            found[name] = x[packing.places[:, : x.shape[1]] >= 0]
    return found


def error(found, expected, packing=None):
    """The largest difference; of a packed batch where something is real, and infinite unless it is
    zero elsewhere.

    Scores of masked regions are left out: they are as low as the type allows.
    """
    if packing is not None:
        hidden = [x for name, x in found.items() if name.startswith(("last_", "hidden_"))]
        if any(x[packing.places[:, : x.shape[1]] < 0].any() for x in map(numbers, hidden)):
            return np.inf
        found, expected = real(found, packing), real(expected, packing)
    worst = 0.0
    for name, x in found.items():
        x, y = numbers(x), numbers(expected[name])
        assert x.shape == y.shape and np.isfinite(x).all() and np.isfinite(y).all(), name
        seen = (x > -1e4) | (y > -1e4)
        worst = max(worst, np.abs(x[seen] - y[seen]).max(initial=0))
    return worst


INDEX = np.array([1, 0, 1, 1])


def about_two_images(architecture, case="right"):
    """Four texts about two images, and the same with the images repeated by hand."""
    batch = make_batch(architecture, case)
    names = [k for k in batch if k.startswith("visual")]
    few = {**batch, **{k: batch[k][:2] for k in names}, "image_index": INDEX}
    repeated = {**batch, **{k: batch[k][:2][INDEX] for k in names}}
    if architecture == PHRASES:
        few["labels"] = repeated["labels"] = (
            np.ones((B, E, 1)) * repeated["visual_attention_mask"][:, None] / 7
        )
    return few, repeated
