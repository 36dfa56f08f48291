"""Computed without its padding, a batch gives the numbers that it gives with it: at every real
position, in every output, loss and gradient, in every framework; zeros at padding. What plans the
rows is held against a plain second writing of it, and what a plan cannot serve is refused.
"""

import functools
import importlib
from collections import Counter

import numpy as np
import pytest
from native_helpers import (
    ANSWERS,
    BODY,
    CHOICE,
    DROPOUT,
    PHRASES,
    PRETRAINING,
    numbers,
    tiny_config,
)
from packing_helpers import (
    CASES,
    EXACT,
    HEADS,
    INDEX,
    QUICKLY,
    B,
    H,
    T,
    V,
    about_two_images,
    build,
    call,
    each_backend,
    error,
    filled,
    flax_later,
    gradients,
    make_batch,
    plan,
    rows,
)
from tiny import make_model

from visualbert import InputError, get_backend
from visualbert.backend import flatten_outputs
from visualbert.packing import (
    Packing,
    joint_visibility,
    labelled_positions,
    plan_batch,
    plan_packing,
    round_up,
    runs,
    saved,
)
from visualbert.schema import ARCHITECTURES

STEPS = (None, 1, 8, 64)


class TestPlan:
    """`plan_packing` and what it is made of, in numpy."""

    @staticmethod
    def ragged(seed):
        """A batch of up to 40 examples, whose masks have their padding anywhere."""
        rng = np.random.default_rng(seed)
        batch, text, regions = rng.integers(1, 41), rng.integers(8, 129), rng.integers(1, 101)
        masks = rng.random((batch, text)), rng.random((batch, regions))
        masks = [(mask < rng.random((batch, 1))).astype(int) for mask in masks]
        masks[0][:, 0] = 1
        return masks

    @staticmethod
    def check(packing, visible):
        """Every real token has one place, every place its token, and examples are whole."""
        source, places = packing.source, packing.places
        assert source.dtype == places.dtype == np.int32
        assert places.shape == visible.shape
        assert np.array_equal(places >= 0, visible)
        wanted = np.flatnonzero(visible)
        assert np.array_equal(source.ravel()[places[visible]], wanted)
        assert np.array_equal(np.sort(source[source >= 0]), wanted)
        for example, row in enumerate(places):
            at = row[row >= 0]
            assert np.array_equal(at, at[:1] + np.arange(at.size)), example  # text before regions
            assert len(set(at // source.shape[1])) <= 1, example  # in one row

    @staticmethod
    def rows_again(lengths, step):
        """R and K, written once more: the longest first, each into the fullest row with room."""
        first = -(-max(lengths) // step) * step
        best = None
        apart = -(-max(first // 8, 1) // step) * step
        for width in range(first, 2 * first + 1, apart):
            rows = []
            for length in sorted(lengths, reverse=True):
                fits = [i for i, used in enumerate(rows) if used + length <= width]
                if fits:
                    rows[max(fits, key=lambda i: (rows[i], -i))] += length
                else:
                    rows.append(length)
            cost = len(rows) * width * (1 + width / 2048)
            if best is None or cost < best[0]:
                best = cost, (len(rows), width)
        return best[1]

    def test_ragged_batches(self):
        positions, tokens, shapes, wastes = 0, 0, Counter(), []
        for seed in range(200):
            text, regions = self.ragged(seed)
            packing = plan_packing(text, regions)
            visible = np.concatenate([text, regions], 1) > 0
            self.check(packing, visible)
            assert packing.source.shape == self.rows_again(list(visible.sum(1)), 64)
            assert packing.source.shape[1] % 64 == 0
            shapes[packing.source.shape] += 1
            positions, tokens = positions + packing.source.size, tokens + visible.sum()
            wastes.append(1 - visible.sum() / packing.source.size)
        waste = 1 - tokens / positions
        found = f"{waste:.1%} of the positions are empty, in {len(shapes)} shapes of 200 batches"
        assert waste < 0.2, found
        assert len(shapes) < 80, found

    @pytest.mark.parametrize("step", [None, 1, 8])
    def test_other_steps(self, step):
        for seed in range(50):
            text, regions = self.ragged(seed)
            packing = plan_packing(text, regions, step=step)
            visible = np.concatenate([text, regions], 1) > 0
            self.check(packing, visible)
            rows, length = packing.source.shape
            if step is None:
                assert (rows, length) == (1, visible.sum())
            elif step == 8:
                assert (rows, length) == self.rows_again(list(visible.sum(1)), 8)
            else:
                longest = visible.sum(1).max()
                assert longest <= length <= 2 * longest
                assert packing.source.size < 1.2 * visible.sum() + longest

    def test_late_fusion_plans_for_the_text_too(self):
        text, regions = self.ragged(0)
        text[1] = 0  # of which there may be none
        regions[1, 0] = 1
        packing = plan_packing(text, regions, late_fusion=True)
        self.check(packing, np.concatenate([text, regions], 1) > 0)
        self.check(packing.text, text > 0)
        assert packing.text.text is None and plan_packing(text, regions).text is None

    def test_masks_of_any_type_and_shape(self):
        text, regions = self.ragged(3)
        text, regions = text[:6], regions[:6]
        expected = plan_packing(text, regions)
        as_choices = text.reshape(3, 2, -1), regions.reshape(3, 2, -1)
        for masks in (
            (text > 0, regions > 0),
            (text.astype(np.float32), regions.astype(np.uint8)),
            (text.tolist(), regions.tolist()),
            as_choices,
        ):
            self.same(plan_packing(*masks), expected)
        shared = plan_packing(as_choices[0], regions[:3])  # regions of an image, two texts each
        self.same(shared, plan_packing(text, regions[[0, 0, 1, 1, 2, 2]]))
        chosen = plan_packing(as_choices[0], regions[:2], image_index=np.array([1, 0, 1]))
        self.same(chosen, plan_packing(text, regions[[1, 1, 0, 0, 1, 1]]))
        index = np.array([0, 0, 2, 1, 1, 0])
        self.same(
            plan_packing(text, regions[:3], image_index=index), plan_packing(text, regions[index])
        )
        self.check(plan_packing(text), text > 0)

    @staticmethod
    def same(a, b):
        for x, y in zip(a, b, strict=True):
            assert x is y is None or np.array_equal(x, y)

    def test_one_example_and_no_padding(self):
        one = plan_packing(filled([3], 9), filled([2], 4), step=8)
        assert one.source.tolist() == [[0, 1, 2, 9, 10, -1, -1, -1]]
        assert one.places[0].tolist() == [0, 1, 2, -1, -1, -1, -1, -1, -1, 3, 4, -1, -1]
        full = plan_packing(np.ones((3, 8)), step=8)
        assert np.array_equal(full.source.ravel()[full.places], np.arange(24).reshape(3, 8))
        assert saved(full) == 0 and saved(one) == 1 - 8 / 13

    def test_examples_without_anything(self):
        text, regions = filled([3, 0, 2, 0], 5), filled([1, 0, 0, 2], 3)
        sentence = (
            "example 1 has no visible token and no visible region, expected at least one; leave it "
            "out of the batch"
        )
        for step in STEPS:
            with pytest.raises(InputError) as error:
                plan_packing(text, regions, step=step)
            assert str(error.value) == sentence
            packing = plan_packing(text, regions, step=step, allow_empty=True)
            self.check(packing, np.concatenate([text, regions], 1) > 0)
            nothing = plan_packing(np.zeros((2, 5)), step=step, allow_empty=True)
            assert (nothing.places == -1).all() and (nothing.source == -1).all()

    ONES = np.ones((4, 5), int)
    MASK = (
        "attention_mask has shape {}, expected (batch, text) or (batch, choices, text), at least "
    )
    INDEX = "image_index has shape {} and type {}, expected (batch,) with batch = 4 as in "
    FAULTS = [
        ({"text": ONES[0]}, MASK.format("(5,)") + "one example and one token"),
        ({"text": ONES[:0]}, MASK.format("(0, 5)") + "one example and one token"),
        ({"regions": ONES[:3]}, "visual_attention_mask has shape (3, 5), expected (batch, regions) "
         "with batch = 4 as in attention_mask"),
        ({"text": ONES.reshape(2, 2, 5), "regions": ONES.reshape(4, 1, 5)}, "visual_attention_mask "
         "has shape (4, 1, 5), expected (batch, regions) or (batch, choices, regions) with batch = "
         "2 as in attention_mask"),
        ({"image_index": [0, 1]}, INDEX.format("(2,)", "int64") + "attention_mask, and integers"),
        ({"image_index": np.zeros(4)}, INDEX.format("(4,)", "float64") + "attention_mask, and "
         "integers"),
        ({"regions": ONES[:2], "image_index": [0, 1, 2, 0]}, "image_index[2] is 2, expected 0 to 1 "
         "(images = 2)"),
        ({"image_index": [0, 1, 2, -1]}, "image_index[3] is -1, expected 0 to 3 (images = 4)"),
        ({"regions": None, "image_index": [0, 1, 2, 3]}, "image_index says which row of "
         "visual_attention_mask, (images, regions), each example is about, but that has shape (); "
         "leave one of the two out"),
        ({"labels": ONES[:3]}, "labels has shape (3, 5), expected (batch, text) or (batch, text + "
         "regions) with batch = 4 as in attention_mask, text = 5 and text + regions = 10"),
        ({"step": 0}, "step is 0, expected a whole number from 1, or None for one row"),
        ({"step": 1.5}, "step is 1.5, expected a whole number from 1, or None for one row"),
    ]  # fmt: skip

    @pytest.mark.parametrize(("fault", "sentence"), FAULTS)
    def test_what_cannot_be_planned_for(self, fault, sentence):
        given = {"text": self.ONES, "regions": self.ONES, **fault}
        with pytest.raises(InputError) as error:
            plan_packing(given.pop("text"), given.pop("regions"), **given)
        assert str(error.value) == sentence

    @pytest.mark.parametrize(
        ("step", "width"), [(None, 3), (1, 3), (8, 7), (64, 7)], ids=["none", "1", "8", "64"]
    )
    def test_labelled_positions(self, step, width):
        labels = np.full((3, 7), -100)
        labels[0, [1, 4, 5]], labels[2, 6] = (0, 9, 3), 7
        labels[1] = -1
        found = plan_packing(np.ones((3, 7)), labels=labels, step=step).labelled
        assert found.dtype == np.int32 and found.shape == (3, width)
        assert [row[row >= 0].tolist() for row in found] == [[1, 4, 5], [], [6]]
        assert (found[:, 3:] == -1).all()
        assert labelled_positions(np.full((2, 4), -1)).tolist() == [[-1], [-1]]

    def test_small_parts(self):
        assert [round_up(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]
        assert runs(np.array([[0, 1, 7, 8], [14, -1, -1, -1]]), 7) == [2, 2, 1, 3]
        text, regions = np.array([[1, 0]]) > 0, np.array([[0], [1]]) > 0
        assert joint_visibility(text, None, None).tolist() == [[True, False]]
        assert joint_visibility(text, regions, [1]).tolist() == [[True, False, True]]

    def test_a_batch(self):
        ids, features = np.ones((4, 20), int), np.zeros((4, 12, 3))
        text, regions = filled([5, 6, 7, 8], 20), filled([1, 2, 3, 4], 12)
        batch = {"input_ids": ids, "attention_mask": text, "visual_embeds": features}
        found = plan_batch(batch, step=1)
        self.same(found["packing"], plan_packing(text, np.ones((4, 12)), step=1))
        assert np.array_equal(found["visual_attention_mask"], np.ones((4, 12)))
        batch["visual_attention_mask"] = regions
        assert "packing" not in plan_batch(batch, step=128)  # which would save nothing
        assert plan_batch(batch, step=1, late_fusion=True)["packing"].text is not None
        made = {**batch, "packing": plan_packing(text, regions)}
        assert plan_batch(made).keys() == made.keys()  # the masks are read all the same
        nothing_masked = {**batch, "attention_mask": text * 0 + 1, "visual_attention_mask": None}
        assert plan_batch(nothing_masked).keys() == {"input_ids", "visual_embeds"}
        without_text = {**batch, "attention_mask": text * (np.arange(4) != 2)[:, None]}
        assert plan_batch(without_text).keys() == batch.keys()


EVERYTHING = [
    *((BODY, case, late) for case in CASES for late in (False, True)[: 1 + (case in HEADS)]),
    *((head, case, case == "left") for head in ARCHITECTURES[1:] for case in HEADS),
]


@functools.cache
def padded(backend, architecture, case, late=False):
    """What a batch of the case gives with its padding."""
    model = build(backend, architecture, late)
    return call(backend, model, make_batch(architecture, case), output_hidden_states=True)


@functools.cache
def padded_gradients(backend, architecture, late=False):
    """Gradients of the case "right" with its padding; those of Flax are PyTorch's, as they take
    less.
    """
    backend = "pt" if backend == "flax" else backend
    model = build(backend, architecture, late, num_hidden_layers=2 - late)
    return gradients(backend, model, make_batch(architecture, "right"))


def largest(a, b):
    """The largest difference between two sets of gradients, of which most are not zero."""
    assert a.keys() == b.keys()
    assert sum(bool(x.any()) for x in a.values()) > 0.6 * len(a)
    return max(np.abs(x - b[name]).max() for name, x in a.items())


class TestEquality:
    """A packed batch against the same one with its padding."""

    @rows(
        "architecture, case, late",
        *EVERYTHING,
        tf=[x for x in EVERYTHING if BODY in x or "left" in x],
        flax=[
            *((BODY, case, False) for case in CASES if case != "regions masked"),
            *((x, "left", True) for x in (BODY, ANSWERS, CHOICE)),
        ],
    )
    def test_outputs(self, backend, architecture, case, late):
        model, batch = build(backend, architecture, late), make_batch(architecture, case)
        packing, expected = plan(batch, late), padded(backend, architecture, case, late)
        found = call(backend, model, batch, packing=packing, output_hidden_states=True)
        assert found.keys() == expected.keys() and len(found) > 4 - (architecture == CHOICE)
        assert error(found, expected, packing) < EXACT
        if architecture != BODY:  # only the positions that the head reads are computed
            found = call(backend, model, batch, packing=packing)
            assert "hidden_states.0" not in found
            assert error(found, expected, packing) < EXACT

    @rows("late, step", (True, None), (False, 1), (True, 8), flax=[])
    def test_every_step(self, backend, late, step):
        model, batch = build(backend, BODY, late), make_batch(BODY, "holes")
        packing = plan(batch, late, step=step)
        found = call(backend, model, batch, packing=packing)
        assert error(found, padded(backend, BODY, "holes", late), packing) < EXACT

    @rows("architecture", *((x,) for x in ARCHITECTURES[1:]), flax=[])
    def test_gradients(self, backend, architecture):
        late = architecture in (CHOICE, ANSWERS)
        model = build(backend, architecture, late, num_hidden_layers=2 - late)
        batch = make_batch(architecture, "right")
        found = gradients(backend, model, batch, packing=plan(batch, late))
        assert largest(found, padded_gradients(backend, architecture, late)) < EXACT

    @rows("architecture", (ANSWERS,), (PRETRAINING,), flax=[(ANSWERS,)])
    def test_gradients_of_activations_computed_again(self, backend, architecture):
        late, batch = architecture == ANSWERS, make_batch(architecture, "right")
        expected = padded_gradients(backend, architecture, late)
        config = tiny_config(bypass_transformer=late, num_hidden_layers=2 - late)
        model = make_model(backend, architecture, config, "float64")
        model.gradient_checkpointing_enable()
        found = gradients(backend, model, batch, training=True, packing=plan(batch, late))
        assert largest(found, expected) < EXACT

    @rows(
        "dtype, tolerance",
        *(("float32", 1e-5), ("float16", 0.03), ("bfloat16", 0.3)),
        flax=[("float32", 1e-5), ("bfloat16", 0.3)],
    )
    def test_other_types(self, backend, dtype, tolerance):
        model, batch = build(backend, BODY, dtype=dtype), make_batch(BODY, "right")
        packing = plan(batch)
        if backend == "flax":  # where a compiled function takes least
            found = traced(backend, model, batch, packing)
        else:
            found = call(backend, model, batch, packing=packing)
        assert str(found["last_hidden_state"].dtype).endswith(dtype)
        assert error(found, padded(backend, BODY, "right"), packing) < tolerance


class TestWhen:
    """When a batch is packed: hidden states at padding are zero then, and only then."""

    @staticmethod
    def is_packed(outputs, case="right"):
        hidden = numbers(outputs["last_hidden_state"])
        there = plan(make_batch(BODY, case)).places >= 0
        assert np.abs(hidden[there]).min(axis=-1).max() > 0
        return not hidden[~there].any()

    @each_backend
    @pytest.mark.parametrize(
        ("setting", "training", "expected"),
        [
            ("inference", False, True),
            ("inference", True, False),
            ("always", False, True),
            ("always", True, True),
            ("never", False, False),
        ],
    )
    def test_setting(self, backend, setting, training, expected):
        model, batch = build(backend, BODY, packing=setting), make_batch(BODY, "right")
        found = call(backend, model, batch, training)
        assert self.is_packed(found) is expected
        packing = plan(batch) if expected else None
        assert error(found, padded(backend, BODY, "right"), packing) < EXACT

    @rows("architecture", *((x,) for x in ARCHITECTURES[1:]), flax=[(ANSWERS,), (CHOICE,)])
    def test_every_head_in_inference(self, backend, architecture):
        model = build(backend, architecture, True, packing="inference")
        batch = make_batch(architecture, "left")
        found = call(backend, model, batch, output_hidden_states=True)
        assert self.is_packed({"last_hidden_state": found["hidden_states.3"]}, "left") is (
            architecture != CHOICE
        )  # whose choices share regions here
        assert error(found, padded(backend, architecture, "left", True), plan(batch)) < EXACT

    @each_backend
    def test_not_with_attentions(self, backend):
        model, batch = build(backend, BODY, packing="always"), make_batch(BODY, "right")
        found = call(backend, model, batch, output_attentions=True)
        assert not self.is_packed(found)
        probabilities = found["attentions.1"]
        assert probabilities.shape == (B, 3, T + V, T + V)
        assert np.abs(probabilities.sum(-1) - 1).max() < EXACT
        assert not probabilities.transpose(0, 3, 1, 2)[plan(batch).places < 0].any()
        packed = call(backend, model, batch)
        assert self.is_packed(packed) and error(packed, found, plan(batch)) < EXACT

    @each_backend
    def test_no_mask_where_nothing_is_masked(self, backend, monkeypatch):
        module = importlib.import_module(get_backend(backend).models[BODY].__module__)
        made, calls = module.mask_bias, []
        monkeypatch.setattr(module, "mask_bias", lambda *a: calls.append(a) or made(*a))
        model, batch = build(backend, BODY), make_batch(BODY, "right")
        full = {**batch, **{k: np.ones_like(x) for k, x in batch.items() if "mask" in k}}
        without = {k: x for k, x in batch.items() if "mask" not in k}
        found, expected = call(backend, model, full), call(backend, model, without)
        assert not calls
        assert all(np.array_equal(found[k], expected[k]) for k in expected)
        masked = call(backend, model, batch)
        assert len(calls) == 2  # one for each layer
        assert np.abs(masked["pooler_output"] - found["pooler_output"]).max() > 0.01

    @each_backend
    @pytest.mark.parametrize("hidden", ["text", "everything"])
    def test_not_where_an_example_shows_no_text(self, backend, hidden):
        batch = make_batch(BODY, "right")
        batch["attention_mask"] = batch["attention_mask"] * (np.arange(B) != 2)[:, None]
        if hidden == "everything":
            masked = batch["visual_attention_mask"] * (np.arange(B) != 2)[:, None]
            batch["visual_attention_mask"] = masked
        expected = call(backend, build(backend, BODY), batch)
        found = call(backend, build(backend, BODY, packing="always"), batch)
        assert all(np.array_equal(found[k], expected[k]) for k in expected)

    @each_backend
    def test_training_with_dropout(self, backend):
        config = tiny_config(packing="always", **DROPOUT)
        model, batch = make_model(backend, ANSWERS, config, "float64"), make_batch(ANSWERS, "right")
        first, second = (
            call(backend, model, batch, training=True, output_hidden_states=True) for _ in range(2)
        )
        assert self.is_packed({"last_hidden_state": first["hidden_states.2"]})
        assert np.isfinite(first["loss"]) and np.isfinite(second["loss"])
        assert first["loss"] != second["loss"]

    @rows("architecture", (BODY,), (ANSWERS,), (PHRASES,), flax=[(BODY,), (ANSWERS,)])
    def test_masks_that_are_left_out_are_those_of_the_plan(self, backend, architecture):
        batch = make_batch(architecture, "left")
        packing = plan(batch, late=True)
        without = {k: x for k, x in batch.items() if "mask" not in k}
        found = call(backend, build(backend, architecture, True), without, packing=packing)
        assert error(found, padded(backend, architecture, "left", True), packing) < EXACT


def traced(backend, model, batch, packing):
    """The outputs of a function that is compiled with the plan among its arguments."""
    if backend == "pt":
        torch = pytest.importorskip("torch")
        torch._dynamo.reset()
        arguments = {k: torch.as_tensor(x) for k, x in batch.items()}
        made = Packing(*(x if x is None else torch.as_tensor(x) for x in packing[:3]), None)
        if packing.text is not None:
            text = [torch.as_tensor(x) for x in packing.text[:2]]
            made = made._replace(text=Packing(*text))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        return dict(flatten_outputs(compiled(**arguments, packing=made)))
    if backend == "tf":
        tf = pytest.importorskip("tensorflow")
        function = tf.function(lambda inputs, made: dict(model(**inputs, packing=made)))
        made = tf.nest.map_structure(lambda x: x if x is None else tf.constant(x), packing)
        return dict(flatten_outputs(function({k: tf.constant(x) for k, x in batch.items()}, made)))
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        function = jax.jit(
            lambda inputs, made: model(**inputs, packing=made), compiler_options=QUICKLY
        )
        return dict(flatten_outputs(function(batch, packing)))


class TestSparsePrediction:
    """Words are predicted where there is a label alone, and the loss does not notice."""

    @staticmethod
    def both(backend, late=False):
        return (
            build(backend, PRETRAINING, late),
            build(backend, PRETRAINING, late, sparse_prediction=True),
        )

    @flax_later
    @pytest.mark.parametrize("packed", [False, True])
    def test_loss(self, backend, packed):
        _, sparse = self.both(backend)
        batch = make_batch(PRETRAINING, "right")
        found = call(backend, sparse, batch, **({"packing": plan(batch)} if packed else {}))
        assert set(found) == {"loss", "seq_relationship_logits"}
        assert error(found, padded(backend, PRETRAINING, "right")) < EXACT

    @flax_later
    def test_gradients(self, backend):
        _, sparse = self.both(backend)
        batch = make_batch(PRETRAINING, "right")
        expected = padded_gradients(backend, PRETRAINING)
        assert largest(gradients(backend, sparse, batch), expected) < EXACT
        packing = plan(batch, labels=batch["labels"])
        assert largest(gradients(backend, sparse, batch, packing=packing), expected) < EXACT

    @flax_later
    def test_other_labels(self, backend):
        """Labels over regions too, none in the whole batch, and none passed."""
        dense, sparse = self.both(backend)
        batch = make_batch(PRETRAINING, "right")
        words = batch["labels"]
        regions = np.where(batch["visual_attention_mask"] > 0, 7, -1)
        for labels in (np.concatenate([words, regions], 1), np.full_like(words, -1), words * 0 - 1):
            given = {**batch, "labels": labels}
            one, two = call(backend, dense, given)["loss"], call(backend, sparse, given)["loss"]
            assert abs(one - two) < EXACT
        del given["sentence_image_labels"]
        assert call(backend, sparse, given)["loss"] == call(backend, dense, given)["loss"] == 0
        del given["labels"]
        one, two = call(backend, dense, given), call(backend, sparse, given)
        assert set(one) == set(two) == {"prediction_logits", "seq_relationship_logits"}
        assert all(np.array_equal(one[k], two[k]) for k in one)

    @rows("planned", (True,), (False,), flax=[(True,)])
    def test_compiled(self, backend, planned):
        """With plan and labels as arguments; without planned labels every one is looked at."""
        _, sparse = self.both(backend, late=True)
        batch = make_batch(PRETRAINING, "left")
        labels = batch["labels"] if planned else None
        packing = plan(batch, late=True, labels=labels, step=8)
        found = traced(backend, sparse, batch, packing)
        assert set(found) == {"loss", "seq_relationship_logits"}
        expected = padded(backend, PRETRAINING, "left", True)
        assert error(found, expected) < EXACT

    @flax_later
    def test_a_plan_for_other_labels_is_noticed(self, backend):
        _, sparse = self.both(backend)
        batch = make_batch(PRETRAINING, "right")
        packing = plan(batch, labels=np.roll(batch["labels"], 1, axis=0), step=1)
        wrong = call(backend, sparse, batch, packing=packing)["loss"]
        assert abs(wrong - padded(backend, PRETRAINING, "right")["loss"]) > 0.01


@each_backend
class TestPositions:
    """Hidden states that are asked for at some positions alone."""

    AT = np.array([[0, 17, 1, 25], [1, 16, 0, 20], [4, 16, 2, 0], [2, 17, 0, 19]])

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("late", [False, True])
    def test_equal_the_whole(self, backend, late, packed):
        model, batch = build(backend, BODY, late), make_batch(BODY, "right")
        options = {"packing": plan(batch, late)} if packed else {}
        whole = call(backend, model, batch, **options)["last_hidden_state"]
        expected = np.take_along_axis(whole, self.AT[..., None], 1)
        found = call(backend, model, batch, positions=self.AT, **options)
        assert set(found) == {"last_hidden_state"}
        assert np.abs(found["last_hidden_state"] - expected).max() < EXACT
        found = call(backend, model, batch, positions=self.AT, output_hidden_states=True, **options)
        assert np.abs(found["last_hidden_state"] - expected).max() < EXACT
        assert np.abs(found[f"hidden_states.{2 + late}"] - whole).max() < EXACT
        assert bool((expected == 0).all(-1).any()) is packed  # one of them is padding

    @pytest.mark.parametrize(
        ("positions", "sentence"),
        [
            (AT + 1, "positions[0, 3] is 26, expected 0 to 25 (text + regions = 26)"),
            (AT[:3], "positions has shape (3, 4), expected (batch, phrases) with batch = 4 as in "
             "input_ids"),
            (AT[0], "positions has shape (4,), expected (batch, phrases)"),
            (AT * 1.0, "positions is of type float64, expected integers; convert it"),
        ],
    )  # fmt: skip
    def test_wrong_ones(self, backend, positions, sentence):
        with pytest.raises(InputError) as error:
            call(backend, build(backend, BODY), make_batch(BODY, "right"), positions=positions)
        assert str(error.value) == sentence


class TestImageIndex:
    """Many texts about few images."""

    @rows(
        "architecture, case, late",
        *((BODY, "right", False), (ANSWERS, "left", True), (PHRASES, "left", True)),
        flax=[(BODY, "right", False), (ANSWERS, "left", True)],
    )
    def test_equals_repeated_images(self, backend, architecture, case, late):
        few, repeated = about_two_images(architecture, case)
        model = build(backend, architecture, late)
        packing = plan(few, late)
        TestPlan.same(packing[:2], plan(repeated, late)[:2])
        expected = call(backend, model, repeated, output_hidden_states=True)
        found = call(backend, model, few, output_hidden_states=True)
        assert found.keys() == expected.keys() and error(found, expected) < EXACT
        for options in ({}, {"output_hidden_states": True}):
            found = call(backend, model, few, packing=packing, **options)
            assert error(found, expected, packing) < EXACT
        packs = build(backend, architecture, late, packing="inference")
        assert error(call(backend, packs, few), expected, packing) < EXACT
        wrong = call(backend, model, {**few, "image_index": 1 - INDEX}, output_hidden_states=True)
        last = f"hidden_states.{2 + late}"
        assert error({last: wrong[last]}, expected) > 0.01

    @flax_later
    def test_gradients(self, backend):
        few, repeated = about_two_images(ANSWERS)
        model = build(backend, ANSWERS, True)
        expected = gradients(backend, model, repeated)
        assert largest(gradients(backend, model, few), expected) < EXACT
        packing = plan(few, late=True)
        assert largest(gradients(backend, model, few, packing=packing), expected) < EXACT

    @each_backend
    def test_choices_share_their_image(self, backend):
        model, batch = build(backend, CHOICE), make_batch(CHOICE, "left")
        regions = [k for k in batch if k.startswith("visual")]
        assert batch["visual_embeds"].ndim == 3
        by_hand = {**batch, **{k: np.stack([batch[k]] * 2, 1) for k in regions}}
        expected = call(backend, model, by_hand)
        assert np.abs(call(backend, model, batch)["logits"] - expected["logits"]).max() < EXACT
        swapped = {**batch, **{k: batch[k][::-1].copy() for k in regions}}
        swapped["image_index"] = np.array([1, 0])
        for options in ({}, {"packing": plan(swapped)}):
            found = call(backend, model, swapped, **options)
            assert np.abs(found["logits"] - expected["logits"]).max() < EXACT
        del swapped["image_index"]
        wrong = call(backend, model, swapped)
        assert np.abs(wrong["logits"] - expected["logits"]).max() > 0.01

    WRONG = [
        (INDEX[None], "image_index has shape (1, 4), expected (batch,)"),
        (INDEX[:3], "image_index has shape (3,), expected (batch,) with batch = 4 as in input_ids"),
        (INDEX + 1, "image_index[0] is 2, expected 0 or 1 (images = 2)"),
        (-INDEX, "image_index[0] is -1, expected 0 or 1 (images = 2)"),
        (INDEX * 1.0, "image_index is of type float64, expected integers; convert it"),
        ([1, 0, 1, 1], "image_index is a list, expected an array of the framework or of numpy; "
         "convert it, as with numpy.asarray"),
    ]  # fmt: skip

    @each_backend
    @pytest.mark.parametrize(("index", "sentence"), WRONG)
    @pytest.mark.parametrize("architecture", [BODY, PHRASES])
    def test_wrong_ones(self, backend, architecture, index, sentence):
        few, _ = about_two_images(architecture)
        with pytest.raises(InputError) as error:
            call(backend, build(backend, architecture), {**few, "image_index": index})
        assert str(error.value) == sentence

    @each_backend
    def test_of_regions_that_are_not_there(self, backend):
        sentence = (
            "image_index describes regions, but visual_embeds was not passed; pass both or neither"
        )
        for architecture in (BODY, CHOICE):
            batch = make_batch(architecture, "right")
            batch = {k: x for k, x in batch.items() if not k.startswith(("visual", "image"))}
            index = INDEX[: len(batch["input_ids"])]
            with pytest.raises(InputError) as error:
                call(backend, build(backend, architecture), {**batch, "image_index": index})
            assert str(error.value) == sentence

    @each_backend
    @pytest.mark.parametrize(
        ("case", "index", "sentence"),
        [
            ("right", INDEX[:2], "visual_embeds has a choice axis, and image_index says which row "
             "of it each example is about; leave one of the two out"),
            ("left", INDEX, "image_index has shape (4,), expected (batch,) with batch = 2 as in "
             "the text"),
            ("left", INDEX[:2, None], "image_index has shape (2, 1), expected (batch,)"),
            ("left", [1, 0], "image_index is a list, expected an array of the framework or of "
             "numpy; convert it, as with numpy.asarray"),
        ],
    )  # fmt: skip
    def test_wrong_ones_with_choices(self, backend, case, index, sentence):
        batch = {**make_batch(CHOICE, case), "image_index": index}
        with pytest.raises(InputError) as error:
            call(backend, build(backend, CHOICE), batch)
        assert str(error.value) == sentence


THIS = "as in this batch, from whose masks it has to be planned"


def swapped_tokens(batch, packing):
    """The plan with the third token of two examples exchanged."""
    one, two = packing.places[0, 2], packing.places[2, 2]
    source = packing.source.copy().ravel()
    source[[one, two]] = source[[two, one]]
    return packing._replace(source=source.reshape(packing.source.shape))


def of_other_masks(batch, packing):
    names = [k for k in batch if "mask" in k]
    return plan({**batch, **{k: np.roll(batch[k], 1, axis=0) for k in names}})


@each_backend
class TestWrongPlans:
    """The comparison notices a wrong plan, and shapes that do not fit are refused."""

    @pytest.mark.parametrize("fault", [swapped_tokens, of_other_masks])
    def test_the_comparison_can_fail(self, backend, fault):
        batch = make_batch(BODY, "right")
        right = plan(batch)
        found = call(backend, build(backend, BODY), batch, packing=fault(batch, right))
        expected = padded(backend, BODY, "right")
        far = np.abs(found["last_hidden_state"] - expected["last_hidden_state"])
        assert far[right.places >= 0].max() > 1e10 * EXACT

    def test_examples_that_see_each_other_are_noticed(self, backend):
        """Text that is passed as one long example, so that the plan keeps nothing apart."""
        batch, model = make_batch(BODY, "text alone"), build(backend, BODY)
        right = plan(batch)
        joined = {k: x.reshape(1, -1) for k, x in batch.items()}
        joined["position_ids"] = np.tile(np.arange(T), B)[None]
        joined_up = call(backend, model, joined, packing=plan(joined))["last_hidden_state"]
        found = joined_up.reshape(B, T, H)
        expected = padded(backend, BODY, "text alone")["last_hidden_state"]
        assert not found[right.places < 0].any()
        assert np.abs(found - expected)[right.places >= 0].max() > 1e10 * EXACT

    @pytest.mark.parametrize(
        ("made", "sentence"),
        [
            (lambda p: list(p), "packing is a list, expected what plan_packing(attention_mask, "
             "visual_attention_mask) gives"),
            (lambda p: True, "packing is a bool, expected what plan_packing(attention_mask, "
             "visual_attention_mask) gives"),
            (lambda p: p._replace(places=p.places[:3]), "packing.places has shape (3, 26), "
             f"expected (batch, text + regions) with batch = 4 {THIS}"),
            (lambda p: p._replace(places=p.places[:, 1:]), "packing.places has shape (4, 25), "
             f"expected (batch, text + regions) with text + regions = 26 {THIS}"),
            (lambda p: p._replace(labelled=p.places[:2]), "packing.labelled has shape (2, 26), "
             f"expected (batch, phrases) with batch = 4 {THIS}"),
        ],
    )  # fmt: skip
    def test_shapes(self, backend, made, sentence):
        batch = make_batch(BODY, "right")
        with pytest.raises(InputError) as error:
            call(backend, build(backend, BODY), batch, packing=made(plan(batch)))
        assert str(error.value) == sentence

    def test_late_fusion(self, backend):
        batch, model = make_batch(BODY, "right"), build(backend, BODY, True)
        with pytest.raises(InputError) as error:
            call(backend, model, batch, packing=plan(batch))
        assert str(error.value) == (
            "packing has no rows of the text alone, which bypass_transformer needs; plan it with "
            "late_fusion=True"
        )
        packing = plan(batch, True)
        short = packing.text._replace(places=packing.text.places[:, 1:])
        with pytest.raises(InputError) as error:
            call(backend, model, batch, packing=packing._replace(text=short))
        assert str(error.value) == (
            f"packing.text.places has shape (4, 15), expected (batch, text) with text = 16 {THIS}"
        )

    def test_a_plan_for_late_fusion_serves_early_fusion(self, backend):
        batch = make_batch(BODY, "right")
        packing = plan(batch, True)
        found = call(backend, build(backend, BODY), batch, packing=packing)
        assert error(found, padded(backend, BODY, "right"), packing) < EXACT

    def test_attentions(self, backend):
        batch = make_batch(BODY, "right")
        for options in ({"output_attentions": True}, {}):
            model = build(backend, BODY, output_attentions=not options)
            with pytest.raises(InputError) as error:
                call(backend, model, batch, packing=plan(batch), **options)
            assert str(error.value) == (
                "attentions are asked for, which a packed batch does not have; leave packing out, "
                "or output_attentions"
            )

    def test_choices_that_were_forgotten(self, backend):
        batch = make_batch(CHOICE, "right")
        flat = plan_packing(batch["attention_mask"][:, 0], batch["visual_attention_mask"][:, 0])
        with pytest.raises(InputError) as error:
            call(backend, build(backend, CHOICE), batch, packing=flat)
        assert str(error.value) == (
            "packing.places has shape (2, 26), expected (batch, text + regions) with batch = 4 "
            f"{THIS}"
        )


def test_a_torch_training_loop_needs_no_change():
    """Batches of every size and padding, with dropout, through an optimizer."""
    torch = pytest.importorskip("torch")
    config = tiny_config(packing="always", **DROPOUT)
    model = make_model("pt", ANSWERS, config)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = {k: torch.as_tensor(x) for k, x in make_batch(ANSWERS, "right").items()}
    batches = [{k: x[:size] for k, x in batch.items()} for size in (4, 1, 3)]
    losses = []
    for given in batches * 8:
        loss = model(**given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
