"""Inputs that do not fit: one sentence, the same word for word in every framework, before anything
is computed; and unusual inputs that do fit.
"""

import functools

import numpy as np
import pytest
from tiny import BACKENDS, make_model, tiny_config

from visualbert import InputError, get_backend
from visualbert.schema import ARCHITECTURES

BODY, PRETRAINING, CHOICE, ANSWERS, REASONING, PHRASES = ARCHITECTURES
B, C, T, V, A, E = 3, 4, 9, 5, 2, 2
CONFIG = tiny_config()
INT, FLOAT = np.int64, np.float32


@functools.cache
def model_of(backend, architecture):
    return make_model(backend, architecture, CONFIG)


def batch(architecture):
    rng = np.random.default_rng(0)
    lead = (B, C) if architecture == CHOICE else (B,)
    inputs = {
        "input_ids": rng.integers(0, 113, (*lead, T)),
        "attention_mask": np.ones((*lead, T), INT),
        "token_type_ids": rng.integers(0, 2, (*lead, T)),
        "visual_embeds": rng.standard_normal((B, V, 20)).astype(FLOAT),
        "visual_attention_mask": np.ones((B, V), INT),
        "visual_token_type_ids": rng.integers(0, 2, (B, V)),
        "image_text_alignment": rng.integers(-1, T, (B, V, A)),
    }
    if architecture == PHRASES:
        inputs["region_to_phrase_position"] = rng.integers(-1, T + V, (B, E))
    return inputs


def call(backend, architecture, changes):
    inputs = batch(architecture) | changes
    inputs = {name: x for name, x in inputs.items() if x is not None}
    return get_backend(backend).call(model_of(backend, architecture), inputs)


def full(value, *shape, dtype=INT):
    return np.full(shape, value, dtype)


def one_wrong(value, *shape, at=-1, dtype=INT):
    """Zeros but for one value."""
    array = np.zeros(shape, dtype)
    array.flat[at] = value
    return array


WITHOUT_MASKS = {"attention_mask": None, "token_type_ids": None, "image_text_alignment": None}
NO_REGIONS = {
    "visual_embeds": None,
    "visual_attention_mask": None,
    "visual_token_type_ids": None,
    "image_text_alignment": None,
}
POSITIONS = "region_to_phrase_position"

REFUSED = [
    # What has to be there, and what excludes what.
    (BODY, {"input_ids": None}, "the text is missing; pass input_ids or inputs_embeds"),
    (ANSWERS, {"input_ids": None}, "the text is missing; pass input_ids or inputs_embeds"),
    (CHOICE, {"input_ids": None}, f"{CHOICE} needs input_ids or inputs_embeds"),
    (
        BODY,
        {"inputs_embeds": full(0, B, T, 24, dtype=FLOAT)},
        "input_ids and inputs_embeds are the same text twice; pass one of them",
    ),
    *(
        (
            BODY,
            {**NO_REGIONS, name: batch(BODY)[name]},
            f"{name} describes regions, but visual_embeds was not passed; pass both or neither",
        )
        for name in ("visual_attention_mask", "visual_token_type_ids", "image_text_alignment")
    ),
    (PHRASES, {POSITIONS: None}, f"{PHRASES} needs {POSITIONS}"),
    (PHRASES, NO_REGIONS, f"{PHRASES} needs visual_embeds"),
    # What is no array, or one of something else.
    *(
        (
            architecture,
            {name: batch(architecture)[name].tolist()},
            f"{name} is a list, expected an array of the framework or of numpy; convert it, as "
            "with numpy.asarray",
        )
        for architecture, name in [
            *((BODY, name) for name in batch(BODY)),
            *((CHOICE, name) for name in ("input_ids", "attention_mask", "visual_embeds")),
            *((ANSWERS, name) for name in ("input_ids", "attention_mask")),
            *((PHRASES, name) for name in (POSITIONS, "visual_embeds", "visual_attention_mask")),
        ]
    ),
    (
        REASONING,
        {"labels": [0, 1, 2]},
        "labels is a list, expected an array of the framework or of "
        "numpy; convert it, as with numpy.asarray",
    ),
    *(
        (
            architecture,
            {name: batch(architecture)[name].astype(dtype)},
            f"{name} is of type {dtype}, expected integers; convert it",
        )
        for architecture, name, dtype in [
            (BODY, "input_ids", "float32"),
            (BODY, "input_ids", "float64"),
            (BODY, "input_ids", "object"),
            (BODY, "token_type_ids", "float64"),
            (BODY, "visual_token_type_ids", "float32"),
            (BODY, "image_text_alignment", "float32"),
            (CHOICE, "input_ids", "float32"),
            (PHRASES, POSITIONS, "float32"),
        ]
    ),
    *(
        (
            BODY,
            {name: batch(BODY)[name].astype(object)},
            f"{name} is of type object, expected numbers; convert it",
        )
        for name in ("visual_embeds", "attention_mask")
    ),
    (
        REASONING,
        {"labels": np.zeros(B)},
        "labels is of type float64, expected integers; convert it",
    ),
    # Features of another width: the mistake that everybody makes.
    (
        BODY,
        {"visual_embeds": full(0, B, V, 12, dtype=FLOAT)},
        "visual_embeds: the features are 12 wide, the model reads visual_embedding_dim=20; use "
        "features of the detector that the checkpoint was trained with, or a model of that width",
    ),
    (
        CHOICE,
        {"visual_embeds": full(0, B, V, 12, dtype=FLOAT)},
        "visual_embeds: the features are 12 wide, the model reads visual_embedding_dim=20; use "
        "features of the detector that the checkpoint was trained with, or a model of that width",
    ),
    # Sizes.
    (
        BODY,
        {"input_ids": full(1, B, 40), **WITHOUT_MASKS},
        "input_ids has 40 tokens, expected at most 36, the rows of the position table "
        "(max_position_embeddings); truncate the text",
    ),
    (
        BODY,
        {"input_ids": None, "inputs_embeds": full(0, B, 37, 24, dtype=FLOAT), **WITHOUT_MASKS},
        "inputs_embeds has 37 tokens, expected at most 36, the rows of the position table "
        "(max_position_embeddings); truncate the text",
    ),
    (
        BODY,
        {"input_ids": full(1, B, 0), **WITHOUT_MASKS},
        "input_ids has shape (3, 0), expected at least one example and one token",
    ),
    (
        BODY,
        {name: x[:0] for name, x in batch(BODY).items()},
        "input_ids has shape (0, 9), expected at least one example and one token",
    ),
    (BODY, {"input_ids": full(1, T)}, "input_ids has shape (9,), expected (batch, text)"),
    (
        BODY,
        {"input_ids": full(1, B, C, T)},
        "input_ids has shape (3, 4, 9), expected (batch, text)",
    ),
    (
        BODY,
        {"input_ids": None, "inputs_embeds": full(0, B, T, dtype=FLOAT)},
        "inputs_embeds has shape (3, 9), expected (batch, text, hidden_size)",
    ),
    (
        BODY,
        {"input_ids": None, "inputs_embeds": full(0, B, T, 25, dtype=FLOAT)},
        "inputs_embeds has shape (3, 9, 25), expected (batch, text, hidden_size) with "
        "hidden_size = 24",
    ),
    (
        BODY,
        {"attention_mask": full(1, B, T - 1)},
        "attention_mask has shape (3, 8), expected (batch, text) with text = 9 as in input_ids",
    ),
    (
        BODY,
        {"attention_mask": full(1, B - 1, T)},
        "attention_mask has shape (2, 9), expected (batch, text) with batch = 3 as in input_ids",
    ),
    (
        BODY,
        {"attention_mask": full(1, B, 1, 1, T)},
        "attention_mask has shape (3, 1, 1, 9), expected (batch, text)",
    ),
    (
        BODY,
        {"token_type_ids": full(0, B, T + V)},
        "token_type_ids has shape (3, 14), expected (batch, text) with text = 9 as in input_ids",
    ),
    (
        BODY,
        {"position_ids": full(0, 2, T)},
        "position_ids has shape (2, 9), expected (batch, text) or (1, text) with batch = 3 as in "
        "input_ids",
    ),
    (
        BODY,
        {"position_ids": full(0, T)},
        "position_ids has shape (9,), expected (batch, text) or (1, text)",
    ),
    (
        BODY,
        {"visual_embeds": full(0, B, 20, dtype=FLOAT)},
        "visual_embeds has shape (3, 20), expected (batch, regions, visual_embedding_dim)",
    ),
    (
        BODY,
        {"visual_embeds": full(0, 1, V, 20, dtype=FLOAT)},
        "visual_embeds has shape (1, 5, 20), expected (batch, regions, visual_embedding_dim) with "
        "batch = 3 as in input_ids",
    ),
    (
        BODY,
        {"visual_attention_mask": full(1, B, V + 1)},
        "visual_attention_mask has shape (3, 6), expected (batch, regions) with regions = 5 as in "
        "visual_embeds",
    ),
    (
        BODY,
        {"image_text_alignment": full(0, B, V - 1, A)},
        "image_text_alignment has shape (3, 4, 2), expected (batch, regions, alignments) with "
        "regions = 5 as in visual_embeds",
    ),
    (
        BODY,
        {"image_text_alignment": full(0, B, V)},
        "image_text_alignment has shape (3, 5), expected (batch, regions, alignments)",
    ),
    # Values.
    (
        BODY,
        {"input_ids": one_wrong(113, B, T)},
        "input_ids[2, 8] is 113, expected 0 to 112 (vocab_size = 113)",
    ),
    (
        BODY,
        {"input_ids": one_wrong(-1, B, T, at=1)},
        "input_ids[0, 1] is -1, expected 0 to 112 (vocab_size = 113)",
    ),
    (BODY, {"attention_mask": full(2, B, T)}, "attention_mask[0, 0] is 2, expected 0 or 1"),
    (
        BODY,
        {"attention_mask": one_wrong(-10000.0, B, T, dtype=FLOAT)},
        "attention_mask[2, 8] is -10000, expected 0 or 1",
    ),
    (
        BODY,
        {"token_type_ids": full(2, B, T)},
        "token_type_ids[0, 0] is 2, expected 0 or 1 (type_vocab_size = 2)",
    ),
    (
        BODY,
        {"position_ids": full(36, 1, T)},
        "position_ids[0, 0] is 36, expected 0 to 35 (max_position_embeddings = 36)",
    ),
    (
        BODY,
        {"visual_attention_mask": one_wrong(3, B, V)},
        "visual_attention_mask[2, 4] is 3, expected 0 or 1",
    ),
    (
        BODY,
        {"visual_token_type_ids": full(-1, B, V)},
        "visual_token_type_ids[0, 0] is -1, expected 0 or 1 (type_vocab_size = 2)",
    ),
    (
        BODY,
        {"image_text_alignment": one_wrong(36, B, V, A)},
        "image_text_alignment[2, 4, 1] is 36, expected 0 to 35 (max_position_embeddings = 36), or "
        "-1 to be ignored",
    ),
    (
        BODY,
        {"image_text_alignment": full(-2, B, V, A)},
        "image_text_alignment[0, 0, 0] is -2, expected 0 to 35 (max_position_embeddings = 36), or "
        "-1 to be ignored",
    ),
    # Pretraining.
    (
        PRETRAINING,
        {"labels": full(-1, B, T + 1)},
        "labels has shape (3, 10), expected (batch, text) or (batch, text + regions) with text = 9",
    ),
    (
        PRETRAINING,
        {"labels": full(-1, B)},
        "labels has shape (3,), expected (batch, text) or (batch, text + regions)",
    ),
    (
        PRETRAINING,
        {"labels": one_wrong(113, B, T)},
        "labels[2, 8] is 113, expected 0 to 112 (vocab_size = 113), or -100 or -1 to be ignored",
    ),
    (
        PRETRAINING,
        {"labels": full(-2, B, T + V)},
        "labels[0, 0] is -2, expected 0 to 112 (vocab_size = 113), or -100 or -1 to be ignored",
    ),
    (
        PRETRAINING,
        {"sentence_image_labels": np.array([0, 1, 2])},
        "sentence_image_labels[2] is 2, expected 0 or 1, or -100 or -1 to be ignored",
    ),
    (
        PRETRAINING,
        {"sentence_image_labels": full(0, 2)},
        "sentence_image_labels has shape (2,), expected (batch,) with batch = 3",
    ),
    # Multiple choice.
    (
        CHOICE,
        {"input_ids": full(1, B, T)},
        "input_ids has shape (3, 9), expected (batch, choices, text)",
    ),
    (
        CHOICE,
        {"input_ids": full(1, B)},
        "input_ids has shape (3,), expected (batch, choices, text)",
    ),
    (
        CHOICE,
        {"input_ids": None, "inputs_embeds": full(0, B, T, 24, dtype=FLOAT)},
        "inputs_embeds has shape (3, 9, 24), expected (batch, choices, text, hidden_size)",
    ),
    (
        CHOICE,
        {"attention_mask": full(1, B, T)},
        "attention_mask has shape (3, 9), expected (batch, choices, text) with batch = 3 and "
        "choices = 4",
    ),
    (
        CHOICE,
        {"token_type_ids": full(0, B, C - 1, T)},
        "token_type_ids has shape (3, 3, 9), expected (batch, choices, text) with batch = 3 and "
        "choices = 4",
    ),
    (
        CHOICE,
        {"visual_embeds": full(0, 2, V, 20, dtype=FLOAT)},
        "visual_embeds has shape (2, 5, 20), expected (batch, choices, regions, "
        "visual_embedding_dim) with batch = 3 and choices = 4",
    ),
    (
        CHOICE,
        {"labels": np.array([0, 4, 1])},
        "labels[1] is 4, expected 0 to 3 (choices = 4), or -100 or -1 to be ignored",
    ),
    (CHOICE, {"labels": full(0, B, 2)}, "labels has shape (3, 2), expected (batch, 1)"),
    # Question answering.
    (
        ANSWERS,
        {"labels": full(0, B, 4, dtype=FLOAT)},
        "labels has shape (3, 4), expected (batch, num_labels) with num_labels = 5",
    ),
    (
        ANSWERS,
        {"labels": full(0, B)},
        "labels has shape (3,), expected (batch, num_labels) or (batch, 1, num_labels) or "
        "(1, batch, num_labels)",
    ),
    (
        ANSWERS,
        {"labels": one_wrong(-0.5, B, 5, dtype=FLOAT)},
        "labels[2, 4] is -0.5, expected at least 0",
    ),
    (
        ANSWERS,
        {"labels": one_wrong(np.nan, B, 5, dtype=FLOAT)},
        "labels[2, 4] is nan, expected at least 0",
    ),
    (
        ANSWERS,
        {"input_ids": full(1, B, 1), **WITHOUT_MASKS},
        f"the text is 1 token long, expected at least 2: {ANSWERS} answers at the second-last one",
    ),
    (
        ANSWERS,
        {"attention_mask": np.array([[1] * T, [1] + [0] * (T - 1), [1] * T])},
        f"attention_mask[1] shows 1 of 9 tokens, expected at least 2: {ANSWERS} answers at the "
        "second-last one",
    ),
    # Visual reasoning.
    (
        REASONING,
        {"labels": np.array([0, 5, 0])},
        "labels[1] is 5, expected 0 to 4 (num_labels = 5), or -100 or -1 to be ignored",
    ),
    (
        REASONING,
        {"labels": full(0, 1, B)},
        "labels has shape (1, 3), expected (batch, 1) with batch = 3",
    ),
    # Phrases.
    (
        PHRASES,
        {POSITIONS: one_wrong(T + V, B, E)},
        "region_to_phrase_position[2, 1] is 14, expected 0 to 13 (text + regions = 14), or -1 to "
        "be ignored",
    ),
    (
        PHRASES,
        {"labels": full(0, B, E + 1, V, dtype=FLOAT)},
        "labels has shape (3, 3, 5), expected (batch, phrases, regions) with phrases = 2 as in "
        "region_to_phrase_position",
    ),
    (
        PHRASES,
        {"labels": full(0, B, E, V + 1, dtype=FLOAT)},
        "labels has shape (3, 2, 6), expected (batch, phrases, regions) with regions = 5",
    ),
    (
        PHRASES,
        {"labels": one_wrong(-1, B, E, V, dtype=FLOAT)},
        "labels[2, 1, 4] is -1.0, expected at least 0",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("architecture", "changes", "sentence"),
    REFUSED,
    ids=[f"{i}-{architecture[13:]}" for i, (architecture, *_) in enumerate(REFUSED)],
)
def test_refused(backend, architecture, changes, sentence):
    with pytest.raises(InputError) as caught:
        call(backend, architecture, changes)
    assert str(caught.value) == sentence


ALIKE = {
    "float masks": lambda i: {n: x.astype(FLOAT) for n, x in i.items() if n.endswith("mask")},
    "bool masks": lambda i: {n: x.astype(bool) for n, x in i.items() if n.endswith("mask")},
    "no masks": lambda i: {n: None for n in i if n.endswith("mask")},
    "int32": lambda i: {n: x.astype(np.int32) for n, x in i.items() if x.dtype == INT},
    "uint8 ids": lambda i: {"input_ids": i["input_ids"].astype(np.uint8)},
    "float64 features": lambda i: {"visual_embeds": i["visual_embeds"].astype(np.float64)},
    "longer alignment": lambda i: {
        "image_text_alignment": np.concatenate([i["image_text_alignment"], full(3, B, 2, A)], 1)
    },
    "wider alignment": lambda i: {
        "image_text_alignment": np.concatenate([i["image_text_alignment"], full(-1, B, V, 1)], 2)
    },
    "positions (1, T)": lambda i: {"position_ids": np.arange(T)[None]},
    "positions (B, T)": lambda i: {"position_ids": np.arange(T)[None].repeat(B, 0)},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ALIKE)
def test_unusual_but_the_same(backend, case):
    expected = call(backend, BODY, {})["last_hidden_state"]
    found = call(backend, BODY, ALIKE[case](batch(BODY)))["last_hidden_state"]
    assert np.abs(found - expected).max() < 1e-6


def labels_to_be_ignored(architecture, value):
    lm = full(value, B, T)
    lm[0, 1] = 7
    labels = {
        PRETRAINING: {"labels": lm, "sentence_image_labels": np.array([1, value, 0])},
        CHOICE: {"labels": np.array([3, value, 0])},
        REASONING: {"labels": np.array([4, value, 0])},
    }
    return labels[architecture]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", [PRETRAINING, CHOICE, REASONING])
def test_labels(backend, architecture):
    """-100 and -1 are the same, (B, 1) is (B,), and a label that is ignored has no part in it."""
    losses = []
    for value in (-100, -1):
        labels = labels_to_be_ignored(architecture, value)
        losses.append(call(backend, architecture, labels)["loss"])
        columns = {n: x[:, None] if x.ndim == 1 else x for n, x in labels.items()}
        losses.append(call(backend, architecture, columns)["loss"])
        if architecture == PRETRAINING:
            whole = np.concatenate([labels["labels"], full(value, B, V)], 1)
            losses.append(call(backend, architecture, {**labels, "labels": whole})["loss"])
    assert np.isfinite(losses).all() and len({float(x) for x in losses}) == 1
    everything = {n: full(-1, *x.shape) for n, x in labels.items()}
    assert call(backend, architecture, everything)["loss"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_targets(backend):
    targets = np.random.default_rng(0).random((B, 5)).astype(FLOAT)
    losses = [
        call(backend, ANSWERS, {"labels": labels})["loss"]
        for labels in (targets, targets[:, None], targets[None])
    ]
    assert len({float(x) for x in losses}) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        (BODY, NO_REGIONS),
        (
            BODY,
            {
                "visual_embeds": full(0, B, 0, 20, dtype=FLOAT),
                "visual_attention_mask": full(1, B, 0),
                "visual_token_type_ids": None,
                "image_text_alignment": None,
            },
        ),
        (BODY, {"attention_mask": full(0, B, T), "visual_attention_mask": full(0, B, V)}),
        (BODY, {"input_ids": full(112, B, T)}),
        (BODY, {"image_text_alignment": full(-1, B, V, A)}),
        (BODY, {"image_text_alignment": full(35, B, V, A)}),
        (BODY, {"input_ids": full(1, B, 40), **WITHOUT_MASKS, "position_ids": full(35, 1, 40)}),
        (CHOICE, {"visual_embeds": full(1, B, C, V, 20, dtype=FLOAT)}),
        (PHRASES, {POSITIONS: full(T + V - 1, B, E)}),
        (PHRASES, {POSITIONS: full(-1, B, E), "labels": full(0, B, E, V, dtype=FLOAT)}),
    ],
)
def test_accepted(backend, architecture, changes):
    for name, array in call(backend, architecture, changes).items():
        assert np.isfinite(array).all(), name


# Inside a compiled function


def compiled(backend, model):
    """The model as a compiled function of named arrays, giving `last_hidden_state` as numpy."""
    if backend == "pt":
        import torch

        run = torch.compile(model, backend="eager", fullgraph=True)
        return lambda **inputs: run(
            **{n: torch.as_tensor(x) for n, x in inputs.items()}
        ).last_hidden_state.detach()
    if backend == "tf":
        import tensorflow as tf

        run = tf.function(lambda inputs: model(**inputs).last_hidden_state)
        return lambda **inputs: run({n: tf.convert_to_tensor(x) for n, x in inputs.items()})
    from flax import nnx

    run = nnx.jit(lambda model, inputs: model(**inputs).last_hidden_state)
    return lambda **inputs: run(model, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend):
    """Values are not looked at there: a mask of twos, which eager mode refuses, means visible."""
    inputs = batch(BODY)
    eager = call(backend, BODY, {})["last_hidden_state"]
    run = compiled(backend, model_of(backend, BODY))
    for factor in (1, 2):
        masks = {n: x * factor for n, x in inputs.items() if n.endswith("mask")}
        found = np.asarray(run(**{**inputs, **masks}))
        assert np.abs(found - eager).max() < 1e-5
    with pytest.raises(InputError, match=r"attention_mask\[0, 0\] is 2, expected 0 or 1"):
        call(backend, BODY, masks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tuple_out_of_a_compiled_function(backend):
    model, inputs = model_of(backend, BODY), batch(BODY)
    if backend == "pt":
        import torch

        run = torch.compile(model, backend="eager", fullgraph=True)
        found = run(**{n: torch.as_tensor(x) for n, x in inputs.items()}, return_dict=False)
        found = [x.detach() for x in found]
    elif backend == "tf":
        import tensorflow as tf

        found = tf.function(lambda inputs: model(**inputs, return_dict=False))(inputs)
    else:
        from flax import nnx

        found = nnx.jit(lambda model, inputs: model(**inputs, return_dict=False))(model, inputs)
    expected = call(backend, BODY, {})
    for x, name in zip(found, ("last_hidden_state", "pooler_output"), strict=True):
        assert np.abs(np.asarray(x) - expected[name]).max() < 1e-5


@pytest.mark.parametrize("backend", ["tf", "flax"])
def test_kinds_are_checked_while_tracing(backend):
    run = compiled(backend, model_of(backend, BODY))
    with pytest.raises(InputError) as caught:
        run(**{**batch(BODY), "input_ids": full(1, B, T, dtype=FLOAT)})
    assert str(caught.value) == "input_ids is of type float32, expected integers; convert it"


@pytest.mark.parametrize("backend", ["tf", "flax"])
def test_shapes_are_checked_while_tracing(backend):
    run = compiled(backend, model_of(backend, BODY))
    with pytest.raises(InputError, match="the features are 12 wide, the model reads"):
        run(**{**batch(BODY), "visual_embeds": full(0, B, V, 12, dtype=FLOAT)})


def test_unknown_sizes_are_no_mistake():
    """A tf.function of unknown batch and lengths is traced with None for them."""
    import tensorflow as tf

    model = model_of("tf", BODY)
    spec = {
        name: tf.TensorSpec([None] * (x.ndim - 1) + [20 if "embeds" in name else None], x.dtype)
        for name, x in batch(BODY).items()
    }
    run = tf.function(lambda inputs: model(**inputs).last_hidden_state, input_signature=[spec])
    expected = call("tf", BODY, {})["last_hidden_state"]
    assert np.abs(run(batch(BODY)).numpy() - expected).max() < 1e-5
