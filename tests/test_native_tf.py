"""The Keras models do what Keras users expect: fit, predict, tf.function, export, save, dtypes."""

import copy
import os
import pickle

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

# ruff: noqa: E402
from native_helpers import (
    ANSWERS,
    BODY,
    CHOICE,
    DROPOUT,
    HEADS,
    PHRASES,
    PRETRAINING,
    REASONING,
    SIZES,
    B,
    C,
    L,
    S,
    batch,
    difference,
    largest,
    numbers,
    tiny_config,
    with_masked_row,
)
from tiny import REST

import visualbert
from visualbert.errors import InputError, UsageError
from visualbert.outputs import ModelOutput
from visualbert.schema import ARCHITECTURES

LOW = {"bfloat16": 0.25, "mixed_bfloat16": 0.25, "float16": 0.05, "mixed_float16": 0.05}


def each(architectures, at_first):
    """Parameters; those that are not in `at_first` are the rest of a product."""
    return [pytest.param(x, marks=() if x in at_first else REST) for x in architectures]


# Tracing and compiling take most of the time: of what needs them, a few are enough at first.
FEW = (BODY, PRETRAINING, ANSWERS)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_head = pytest.mark.parametrize("architecture", HEADS)
few_architectures = pytest.mark.parametrize("architecture", each(ARCHITECTURES, FEW))
few_heads = pytest.mark.parametrize("architecture", each(HEADS, FEW))
XLA = [pytest.param(True, *p.values, marks=p.marks) for p in each(ARCHITECTURES, [ANSWERS])]
pytestmark = pytest.mark.filterwarnings("ignore:Gradients do not exist", "ignore:`shuffle=True`")


@pytest.fixture(autouse=True)
def same_seed():
    keras.utils.set_random_seed(0)


def build(architecture, seed=0, dtype=None, **changes):
    kw = {} if dtype is None else {"dtype": dtype}
    return getattr(visualbert, "TF" + architecture)(tiny_config(**changes), seed=seed, **kw)


def tensors(inputs):
    return {name: tf.convert_to_tensor(value) for name, value in inputs.items()}


def signature(architecture, **kw):
    """Specs of `batch`'s inputs in which batch, text and regions are free."""
    (n, t, v), (m, u, w) = SIZES[1:]
    first = batch(architecture, **{"size": n, "text": t, "regions": v, **kw})
    second = batch(architecture, **{"size": m, "text": u, "regions": w, **kw})
    specs = {}
    for name, x in first.items():
        sizes = zip(x.shape, second[name].shape, strict=True)
        specs[name] = tf.TensorSpec([n if n == m else None for n, m in sizes], x.dtype)
    return specs


def loss_and_gradients(model, inputs, training=True, compiled=None):
    variables = [v.value for v in model.trainable_variables]

    def step():
        with tf.GradientTape() as tape:
            loss = model(**inputs, training=training).loss
        return [loss, *tape.gradient(loss, variables, unconnected_gradients="zero")]

    run = {None: step, "graph": tf.function(step), "xla": tf.function(step, jit_compile=True)}
    return [tf.convert_to_tensor(x).numpy() for x in run[compiled]()]


class TestFunction:
    @pytest.mark.parametrize(("xla", "architecture"), [(False, x) for x in ARCHITECTURES] + XLA)
    def test_one_trace_for_all_sizes(self, architecture, xla):
        model, other = build(architecture), build(architecture, seed=1)

        @tf.function(jit_compile=xla, input_signature=[signature(architecture)])
        def compiled(inputs):
            return model(**inputs)

        for sizes in SIZES[:2] if xla else SIZES:
            inputs = tensors(batch(architecture, *sizes))
            found = compiled(inputs)
            assert type(found) is ModelOutput
            assert difference(found, model(**inputs)) < 1e-4
            assert difference(found, other(**inputs)) > 0.1
        assert compiled.experimental_get_tracing_count() == 1

    @few_architectures
    def test_optional_outputs_and_missing_inputs(self, architecture):
        model = build(architecture)
        inputs = batch(architecture, labels=False, alignment=False)
        del inputs["attention_mask"], inputs["visual_attention_mask"], inputs["token_type_ids"]
        specs = {k: v for k, v in signature(architecture).items() if k in inputs}

        @tf.function(input_signature=[specs])
        def compiled(inputs):
            return model(**inputs, output_hidden_states=True, output_attentions=True)

        expected = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert difference(compiled(tensors(inputs)), expected) < 1e-4

    def test_text_alone(self):
        model, specs = build(ANSWERS), signature(ANSWERS, regions=0)
        compiled = tf.function(lambda x: model(**x), input_signature=[specs])
        inputs = tensors(batch(ANSWERS, regions=0))
        assert difference(compiled(inputs), model(**inputs)) < 1e-4

    @pytest.mark.parametrize("name", ["labels", "image_text_alignment"])
    def test_what_is_longer_or_shorter_is_cut_in_a_graph_too(self, name):
        """Slices up to an unknown size: `x[:, :None]` would not cut at all."""
        model, inputs = build(PRETRAINING), batch(PRETRAINING)
        if name == "labels":
            inputs[name] = inputs[name][:, : inputs["input_ids"].shape[1]]
        else:
            inputs[name] = np.concatenate([inputs[name], inputs[name]], axis=1)
        specs = signature(PRETRAINING)
        compiled = tf.function(lambda x: model(**x), input_signature=[specs])
        assert difference(compiled(tensors(inputs)), model(**inputs)) < 1e-4


class TestFit:
    @pytest.mark.parametrize("eagerly", [True, pytest.param(False, marks=pytest.mark.slow)])
    @few_heads
    def test_the_loss_falls(self, architecture, eagerly):
        model, inputs = build(architecture), batch(architecture, 12)
        compile_model(model, eagerly)
        before = mean_loss(model, inputs)
        history = model.fit(inputs, batch_size=6, epochs=2, verbose=0).history
        assert list(history) == ["loss"]
        after = model.evaluate(inputs, batch_size=6, verbose=0, return_dict=True)["loss"]
        assert after < 0.97 * before
        assert after == pytest.approx(mean_loss(model, inputs), rel=1e-4)

    @pytest.mark.parametrize("xla", [False, pytest.param(True, marks=REST)])
    def test_from_a_dataset_with_validation_and_checkpoints(self, xla):
        model = build(ANSWERS, **DROPOUT)
        model.gradient_checkpointing_enable()
        model.compile(optimizer=keras.optimizers.Adam(3e-3), jit_compile=xla)
        data = tf.data.Dataset.from_tensor_slices(batch(ANSWERS, 12)).batch(4)
        history = model.fit(data, validation_data=data, epochs=6, verbose=0).history
        assert history["val_loss"][-1] < 0.8 * history["val_loss"][0]

    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
    def test_in_mixed_precision(self, policy):
        model, inputs = build(ANSWERS, dtype=policy), batch(ANSWERS, 12)
        compile_model(model)
        losses = model.fit(inputs, batch_size=6, epochs=3, verbose=0).history["loss"]
        assert losses[-1] < 0.7 * losses[0]
        scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert scaled is (policy == "mixed_float16")

    @few_architectures
    def test_predict_gives_numpy_in_batches(self, architecture):
        model, inputs = build(architecture), batch(architecture, labels=False)
        found = model.predict(inputs, batch_size=2, verbose=0)
        assert type(found) is ModelOutput
        assert all(isinstance(value, np.ndarray) for value in found.values())
        assert difference(found, model(**inputs)) < 1e-4
        assert difference(found, model(inputs)) < 1e-4

    @pytest.mark.parametrize("architecture", HEADS)
    def test_labels_beside_the_batch_are_labels_in_it(self, architecture):
        inputs, labels = apart(architecture)
        losses = []
        for args in (({**inputs, **labels},), (inputs, labels), (inputs, labels["labels"])):
            model = build(architecture)
            compile_model(model)
            losses.append(model.evaluate(*args, batch_size=6, verbose=0))
        assert losses[0] == losses[1] == pytest.approx(mean_loss(model, {**inputs, **labels}))
        assert (losses[2] == losses[0]) is (len(labels) == 1)

    @pytest.mark.parametrize("eagerly", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_pairs_train(self, eagerly):
        inputs, labels = apart(REASONING)
        model = build(REASONING)
        compile_model(model, eagerly, metrics=["accuracy"])
        data = tf.data.Dataset.from_tensor_slices((inputs, labels["labels"])).batch(6)
        history = model.fit(data, validation_data=data, epochs=4, verbose=0).history
        assert history["loss"][-1] < 0.8 * history["loss"][0]
        right = model.predict(data, verbose=0).logits.argmax(-1) == labels["labels"]
        assert history["val_accuracy"][-1] == pytest.approx(right.mean())

    @pytest.mark.parametrize("beside", [True, False])
    @pytest.mark.parametrize("architecture", [CHOICE, ANSWERS, REASONING, PHRASES])
    def test_metrics_compare_labels_with_logits(self, architecture, beside):
        inputs, labels = apart(architecture)
        model = build(architecture)
        compile_model(model, metrics=["accuracy"])
        args = (inputs, labels["labels"]) if beside else ({**inputs, **labels},)
        found = model.evaluate(*args, batch_size=6, verbose=0, return_dict=True)
        right, wanted = model(**inputs).logits.numpy().argmax(-1), labels["labels"]
        wanted = wanted if wanted.ndim == 1 else wanted.argmax(-1)
        assert found["accuracy"] == pytest.approx((right == wanted).mean())
        assert set(found) == {"accuracy", "loss"}

    @pytest.mark.parametrize("length", [S, 9])
    def test_metrics_of_pretraining_go_by_output(self, length):
        inputs, labels = apart(PRETRAINING)
        labels["labels"] = labels["labels"][:, :length]
        model = build(PRETRAINING)
        metrics = {"prediction_logits": "accuracy", "seq_relationship_logits": "accuracy"}
        compile_model(model, metrics=metrics)
        found = model.evaluate({**inputs, **labels}, batch_size=6, verbose=0, return_dict=True)
        outputs = model(**inputs)
        words = outputs.prediction_logits.numpy().argmax(-1)[:, :length]
        match = outputs.seq_relationship_logits.numpy().argmax(-1)
        expected = {
            "prediction_logits_accuracy": (words == labels["labels"]).mean(),
            "seq_relationship_logits_accuracy": (match == labels["sentence_image_labels"]).mean(),
        }
        assert {k: found[k] for k in expected} == pytest.approx(expected)

    def test_a_compiled_loss_gets_what_lies_beside_the_batch(self):
        inputs, labels = apart(REASONING)
        entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        weights = np.arange(12.0)
        for loss, y in (
            (entropy, labels["labels"]),
            (entropy, labels),
            ({"logits": entropy}, {"logits": labels["labels"]}),
        ):
            model = build(REASONING)
            compile_model(model, loss=loss)
            expected = mean_loss(model, {**inputs, **labels})
            assert model.evaluate(inputs, y, batch_size=6, verbose=0) == pytest.approx(expected)
            weighed = model.evaluate(inputs, y, sample_weight=weights, batch_size=6, verbose=0)
            each = keras.ops.sparse_categorical_crossentropy(
                labels["labels"], model(**inputs).logits, from_logits=True
            )
            assert weighed == pytest.approx(np.mean(each * weights), rel=1e-5)
        body, targets = build(BODY), {"pooler_output": np.ones((12, 24), np.float32)}
        compile_model(body, loss="mse")
        inputs = batch(BODY, 12)
        found = body.evaluate(inputs, targets, batch_size=6, verbose=0)
        assert found == pytest.approx(np.mean((body(**inputs).pooler_output - 1) ** 2), rel=1e-5)

    @pytest.mark.parametrize("eagerly", [True, False])
    def test_what_cannot_be_trained_is_one_sentence(self, eagerly):
        inputs, labels = apart(REASONING)
        none = (
            "was given no labels, so that there is no loss; add them to the inputs as 'labels', or "
            "pass them to fit() as y"
        )
        body = (
            "TFVisualBertModel has no loss of its own; train a model with a head, or pass a loss "
            "to compile() and its targets to fit(), as y={'pooler_output': targets}"
        )
        weights = (
            "TFVisualBertForVisualReasoning computes its loss from labels, without sample_weight "
            "and class_weight; pass a loss that they shall weigh to compile(), and the labels to "
            "fit() as y"
        )
        output = (
            "TFVisualBertModel returns no 'logits' to compare targets with; name what they are "
            "for, one of last_hidden_state, pooler_output, as y={'last_hidden_state': targets}"
        )
        unknown = "TFVisualBertForVisualReasoning takes no input 'visual_embed'; did you mean "
        target = np.ones((12, 24), np.float32)
        for architecture, compiled, args, kw, error, sentence in (
            (REASONING, {}, (inputs,), {}, InputError, f"TF{REASONING} {none}"),
            (
                REASONING,
                {"metrics": ["accuracy"]},
                (inputs,),
                {},
                InputError,
                f"TF{REASONING} {none}",
            ),
            (REASONING, {"loss": "mse"}, (inputs,), {}, InputError, f"TF{REASONING} {none}"),
            (BODY, {}, (batch(BODY, 12),), {}, InputError, body),
            (BODY, {}, (batch(BODY, 12), target), {}, InputError, body),
            (BODY, {"loss": "mse"}, (batch(BODY, 12), target), {}, InputError, output),
            (
                REASONING,
                {},
                (inputs, labels["labels"]),
                {"sample_weight": np.ones(12)},
                UsageError,
                weights,
            ),
            (
                REASONING,
                {},
                ({**inputs, **labels, "visual_embed": target},),
                {},
                InputError,
                unknown + "'visual_embeds'?",
            ),
        ):
            model = build(architecture)
            compile_model(model, eagerly, **compiled)
            with pytest.raises(error) as caught:
                model.fit(*args, batch_size=6, verbose=0, **kw)
            assert str(caught.value) == sentence

    def test_predict_with_labels_gives_the_loss_of_each_batch(self):
        found = build(ANSWERS).predict(batch(ANSWERS, 5), batch_size=2, verbose=0)
        assert found.loss.shape == (3,)
        assert found.logits.shape == (5, L)


def compile_model(model, eagerly=True, **kw):
    """Tracing a training step takes most of the time of a short run."""
    optimizer = keras.optimizers.Adam(3e-3)
    model.compile(optimizer=optimizer, run_eagerly=eagerly, jit_compile=False, **kw)


def apart(architecture):
    """Twelve examples, and their labels."""
    inputs = batch(architecture, 12)
    names = ("labels", "sentence_image_labels")
    return inputs, {name: inputs.pop(name) for name in names if name in inputs}


def mean_loss(model, inputs):
    losses = []
    for start in range(0, 12, 6):
        part = {name: value[start : start + 6] for name, value in inputs.items()}
        losses.append(float(model(**part).loss))
    return np.mean(losses)


class TestExport:
    @each_architecture
    def test_a_saved_model_serves_all_sizes(self, architecture, tmp_path):
        model = build(architecture)
        model.export(tmp_path, verbose=False)
        served = tf.saved_model.load(tmp_path)
        for sizes in SIZES:
            inputs = batch(architecture, *sizes, labels=False, alignment=False)
            assert difference(served.serve(inputs), model(**inputs)) < 1e-4
        inputs = {k: x if x.dtype == np.float32 else x.astype(np.int32) for k, x in inputs.items()}
        found = served.signatures["serving_default"](**tensors(inputs))
        assert difference(found, model(**inputs)) < 1e-4

    def test_a_signature_of_ones_own(self, tmp_path):
        model = build(PRETRAINING)
        model.export(tmp_path, verbose=False, input_signature=[signature(PRETRAINING)])
        inputs = batch(PRETRAINING, *SIZES[1])
        served = tf.saved_model.load(tmp_path)
        found = served.serve(tensors(inputs))
        assert difference(found, model(**inputs)) < 1e-4
        assert difference(found, model(**batch(PRETRAINING, *SIZES[1], seed=1))) > 0.1


class TestPrecision:
    @pytest.mark.parametrize(
        ("policy", "architecture"),
        [(p, a) for p in ("bfloat16", "mixed_float16") for a in ARCHITECTURES]
        + [("float16", BODY), ("mixed_bfloat16", PRETRAINING)],
    )
    def test_policies_stay_close(self, architecture, policy):
        model, inputs = build(architecture), batch(architecture)
        low = build(architecture, dtype=policy)
        found = low(**inputs)
        assert 1e-5 < difference(found, model(**inputs)) < LOW[policy]
        width = policy.removeprefix("mixed_")
        stored = "float32" if "mixed" in policy else width
        assert {v.dtype for v in low.weights} == {stored}
        assert {v.dtype.name for k, v in found.items() if k != "loss"} == {width}
        assert found.loss is None or found.loss.dtype == "float32"

    @pytest.mark.parametrize("xla", [False, pytest.param(True, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
    def test_policies_in_a_graph(self, policy, xla):
        model, inputs = build(ANSWERS, dtype=policy), tensors(batch(ANSWERS))
        found = tf.function(lambda x: model(**x), jit_compile=xla)(inputs)
        assert difference(found, build(ANSWERS)(**inputs)) < LOW[policy]

    def test_the_global_policy_counts(self):
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
        try:
            model = build(ANSWERS)
        finally:
            keras.mixed_precision.set_global_policy("float32")
        expected = build(ANSWERS, dtype="mixed_bfloat16")(**batch(ANSWERS))
        assert difference(model(**batch(ANSWERS)), expected) == 0
        assert model(**batch(ANSWERS)).logits.dtype == "bfloat16"

    @pytest.mark.parametrize("policy", ["float64", "float32", *LOW])
    def test_a_row_that_shows_nothing_is_finite(self, policy):
        model, inputs = build(BODY, dtype=policy), with_masked_row()
        found = model(**inputs, output_attentions=True)
        assert all(np.isfinite(numbers(found[key])).all() for key in found if key != "attentions")
        if "float16" not in policy.replace("bfloat16", ""):  # its lowest number swallows no score
            expected = build(BODY)(**inputs, output_attentions=True)
            assert difference(found, expected) < 0.25
            assert np.abs(numbers(found.attentions[0])[1] - 1 / S).max() < 1e-3


class TestTraining:
    @each_head
    def test_checkpointing_changes_no_gradient(self, architecture):
        model, inputs = build(architecture), tensors(batch(architecture))
        expected = loss_and_gradients(model, inputs)
        runs = count_runs(model)
        model.gradient_checkpointing_enable()
        assert largest(loss_and_gradients(model, inputs), expected) == 0
        assert len(runs) == 4
        loss_and_gradients(model, inputs, training=False)
        model.gradient_checkpointing_disable()
        loss_and_gradients(model, inputs)
        assert len(runs) == 4 + 2 + 2

    @pytest.mark.parametrize(
        "compiled", [None, "graph", pytest.param("xla", marks=pytest.mark.slow)]
    )
    def test_dropout_is_the_same_with_checkpoints(self, compiled):
        inputs = tensors(batch(ANSWERS))

        def run(seed, checkpointing):
            keras.utils.set_random_seed(seed)
            model = build(ANSWERS, **DROPOUT)
            if checkpointing:
                model.gradient_checkpointing_enable()
            return loss_and_gradients(model, inputs, compiled=compiled)

        expected = run(1, checkpointing=False)
        assert largest(run(1, checkpointing=True), expected) < 1e-5
        if compiled is None:
            assert largest(run(2, checkpointing=True), expected) > 1e-2

    def test_gradients_through_recomputed_dropout_are_those_of_the_loss(self):
        """Against finite differences, in float64; every run draws the same masks."""
        model = build(ANSWERS, dtype="float64", **DROPOUT)
        model.gradient_checkpointing_enable()
        inputs = batch(ANSWERS)
        seeds = [v for v in model.variables if "seed_generator" in v.path]
        drawn = [v.numpy() for v in seeds]
        rng = np.random.default_rng(0)
        start = [v.numpy() for v in model.trainable_variables]
        direction = [rng.normal(size=x.shape) for x in start]

        def run(step):
            for v, x in zip(seeds, drawn, strict=True):
                v.assign(x)
            for v, x, d in zip(model.trainable_variables, start, direction, strict=True):
                v.assign(x + step * d)
            return loss_and_gradients(model, inputs)

        slope = sum((g * d).sum() for g, d in zip(run(0)[1:], direction, strict=True))
        assert slope == pytest.approx((run(1e-6)[0] - run(-1e-6)[0]) / 2e-6, rel=1e-6)
        assert run(0)[0] != build(ANSWERS, dtype="float64")(**inputs).loss.numpy()

    def test_checkpointing_keeps_the_optional_outputs(self):
        model, inputs = build(BODY), batch(BODY)
        asked = {"output_hidden_states": True, "output_attentions": True, "training": True}
        expected = model(**inputs, **asked)
        model.gradient_checkpointing_enable()
        assert difference(model(**inputs, **asked), expected) == 0

    def test_checkpointing_with_free_sizes(self):
        model = build(ANSWERS)
        variables = [v.value for v in model.trainable_variables]

        @tf.function(input_signature=[signature(ANSWERS)])
        def step(inputs):
            with tf.GradientTape() as tape:
                loss = model(**inputs, training=True).loss
            return [loss, *tape.gradient(loss, variables, unconnected_gradients="zero")]

        inputs = tensors(batch(ANSWERS, *SIZES[1]))
        expected = loss_and_gradients(model, inputs)
        model.gradient_checkpointing_enable()
        found = [tf.convert_to_tensor(x) for x in step(inputs)]
        assert largest(found, expected) < 1e-5

    @each_architecture
    def test_dropout_in_training_alone(self, architecture):
        model, inputs = build(architecture, **DROPOUT), batch(architecture)
        assert difference(model(**inputs), model(**inputs)) == 0
        assert difference(model(inputs), model(inputs, training=False)) == 0
        first = model(**inputs, training=True)
        assert difference(model(**inputs, training=True), first) > 1e-3
        assert difference(model(**inputs), first) > 1e-3


def count_runs(model):
    """A list that grows with every call of a layer of the encoder."""
    runs = []

    def counted(call):
        def call_and_count(*args, **kw):
            runs.append(1)
            return call(*args, **kw)

        return call_and_count

    for layer in model.visual_bert.encoder.layer:
        layer.call = counted(layer.call)
    return runs


class TestFiles:
    @each_architecture
    def test_a_keras_file_brings_everything_back(self, architecture, tmp_path):
        model, inputs = build(architecture, hidden_act="gelu_new"), batch(architecture)
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        assert type(again) is type(model)
        assert again.config == model.config
        assert difference(again(**inputs), model(**inputs)) == 0

    @pytest.mark.parametrize("architecture", [BODY, PRETRAINING])
    def test_a_weights_file_brings_the_weights_back(self, architecture, tmp_path):
        model, other = build(architecture), build(architecture, seed=1)
        inputs = batch(architecture)
        assert difference(other(**inputs), model(**inputs)) > 0.1
        model.save_weights(tmp_path / "model.weights.h5")
        other.load_weights(tmp_path / "model.weights.h5")
        assert difference(other(**inputs), model(**inputs)) == 0

    @pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
    def test_a_compiled_model_keeps_its_policy_and_optimizer(self, policy, tmp_path):
        model, inputs = build(ANSWERS, dtype=policy), batch(ANSWERS, 4)
        compile_model(model)
        model.fit(inputs, verbose=0)
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        assert again.dtype_policy.name == policy
        assert difference(again(**inputs), model(**inputs)) == 0
        assert int(again.optimizer.iterations) == 1
        again.fit(inputs, verbose=0)
        assert difference(again(**inputs), model(**inputs)) > 1e-3

    @pytest.mark.parametrize("architecture", [BODY, ANSWERS])
    def test_copies_and_pickles(self, architecture):
        model, inputs = build(architecture), batch(architecture)
        clone = keras.models.clone_model(model)
        clone.set_weights(model.get_weights())
        copies = (clone, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
        for again in copies:
            assert again.config == model.config
            assert difference(again(**inputs), model(**inputs)) == 0

    @each_architecture
    def test_summary(self, architecture):
        lines = []
        build(architecture).summary(print_fn=lambda text, **_: lines.append(text))
        assert "Total params" in "".join(lines)

    @each_architecture
    def test_hidden_states_and_attentions(self, architecture):
        model, inputs = build(architecture), batch(architecture)
        found = model(**inputs, output_hidden_states=True, output_attentions=True)
        rows = B * C if architecture == CHOICE else B
        assert [tuple(x.shape) for x in found.hidden_states] == [(rows, S, 24)] * 3
        assert [tuple(x.shape) for x in found.attentions] == [(rows, 3, S, S)] * 2
        assert difference({k: found[k] for k in model(**inputs)}, model(**inputs)) < 1e-5
