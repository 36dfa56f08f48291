"""The PyTorch models do what PyTorch users expect: autocast, Trainer, pickle; tests/test_compile.py
is for compilation and export.
"""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

# ruff: noqa: E402
from native_helpers import (
    ANSWERS,
    BODY,
    CHOICE,
    DROPOUT,
    HEADS,
    PRETRAINING,
    B,
    S,
    batch,
    difference,
    largest,
    tiny_config,
    with_masked_row,
)

import visualbert
from visualbert.errors import UsageError
from visualbert.outputs import KEYS, ModelOutput, model_output
from visualbert.schema import ARCHITECTURES

LOW = {torch.bfloat16: 0.25, torch.float16: 0.05}
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_head = pytest.mark.parametrize("architecture", HEADS)


@pytest.fixture(autouse=True)
def one_thread():
    """Operations this small wait for their threads more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(architecture, seed=0, **changes):
    return getattr(visualbert, architecture)(tiny_config(**changes), seed=seed).eval()


def tensors(inputs):
    return {name: torch.as_tensor(value) for name, value in inputs.items()}


def loss_and_gradients(model, inputs, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


class TestPrecision:
    @each_architecture
    @pytest.mark.parametrize("dtype", LOW)
    def test_autocast_and_cast_models_stay_close(self, architecture, dtype):
        model, inputs = build(architecture), batch(architecture)
        expected = model(**inputs)
        with torch.autocast("cpu", dtype=dtype):
            autocast = model(**inputs)
        cast = copy.deepcopy(model).to(dtype)(**inputs)
        for found in (autocast, cast):
            assert 1e-5 < difference(found, expected) < LOW[dtype]
            assert found.loss is None or found.loss.dtype == torch.float32
        assert all(value.dtype == dtype for key, value in cast.items() if key != "loss")

    @pytest.mark.parametrize("dtype", LOW)
    def test_autocast_training_with_checkpoints(self, dtype):
        model, inputs = build(ANSWERS, **DROPOUT).train(), batch(ANSWERS)
        with torch.autocast("cpu", dtype=dtype):
            expected = loss_and_gradients(model, inputs)
            model.gradient_checkpointing_enable()
            assert largest(loss_and_gradients(model, inputs), expected) == 0

    def test_half(self):
        assert build(BODY).half().dtype == torch.float16

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_a_row_that_shows_nothing_is_finite(self, attention, dtype):
        model, inputs = build(BODY, attn_implementation=attention), with_masked_row()
        expected = model(**inputs)
        found = model.to(dtype)(**inputs)
        assert all(value.isfinite().all() for value in found.values())
        if dtype != torch.float16:  # its lowest number does not swallow a score
            assert difference(found, expected) < 0.25
            probs = model(**inputs, output_attentions=True).attentions[0]
            assert (probs[1] - 1 / S).abs().max() < 1e-3


class TestTraining:
    @each_head
    def test_checkpointing_changes_no_gradient(self, architecture):
        model, inputs = build(architecture, **DROPOUT).train(), batch(architecture)
        runs = []
        for layer in model.visual_bert.encoder.layer:
            layer.register_forward_pre_hook(lambda *_: runs.append(1))
        expected = loss_and_gradients(model, inputs)
        assert len(runs) == 2
        model.gradient_checkpointing_enable()
        assert largest(loss_and_gradients(model, inputs), expected) == 0
        assert len(runs) == 2 + 4
        assert largest(loss_and_gradients(model, inputs, seed=1), expected) > 1e-3
        model.gradient_checkpointing_disable()
        loss_and_gradients(model, inputs)
        assert len(runs) == 2 + 4 + 4 + 2

    def test_checkpointing_keeps_the_optional_outputs(self):
        model, inputs = build(BODY, **DROPOUT).train(), batch(BODY)
        asked = {"output_hidden_states": True, "output_attentions": True}
        torch.manual_seed(0)
        expected = model(**inputs, **asked)
        model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        assert difference(model(**inputs, **asked), expected) == 0

    @each_architecture
    def test_dropout_in_training_alone(self, architecture):
        model, inputs = build(architecture, **DROPOUT), batch(architecture)
        assert difference(model(**inputs), model(**inputs)) == 0
        model.train()
        assert difference(model(**inputs), model(**inputs)) > 1e-3
        torch.manual_seed(0)
        first = model(**inputs)
        torch.manual_seed(0)
        assert difference(model(**inputs), first) == 0

    def test_gradients_of_each_example(self):
        from torch.func import functional_call, grad, vmap

        model, inputs = build(ANSWERS), tensors(batch(ANSWERS))
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, inputs):
            inputs = {name: value[None] for name, value in inputs.items()}
            return functional_call(model, parameters, kwargs=inputs).loss

        each = vmap(grad(loss), in_dims=(None, 0))(parameters, inputs)
        _, *expected = loss_and_gradients(model, inputs)
        names = [name for name, p in model.named_parameters() if p.grad is not None]
        assert largest([each[name].mean(0) for name in names], expected) < 1e-5


class TestTrainer:
    @pytest.mark.parametrize("architecture", [ANSWERS, PRETRAINING])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_trains_evaluates_saves_and_resumes(self, architecture, checkpointing, tmp_path):
        model = build(architecture, **DROPOUT)
        before = copy.deepcopy(model)
        options = {"gradient_checkpointing": checkpointing, "save_steps": 8}
        trainer = make_trainer(model, tmp_path, max_steps=16, **options)
        untrained = trainer.evaluate()["eval_loss"]
        trainer.train()
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] < 0.95 * untrained
        assert difference(model(**batch(architecture)), before(**batch(architecture))) > 0.1
        assert model.visual_bert.encoder.gradient_checkpointing is checkpointing

        predicted = trainer.predict(trainer.eval_dataset)
        assert predicted.metrics["test_loss"] == pytest.approx(metrics["eval_loss"])
        first = predicted.predictions[0] if architecture == PRETRAINING else predicted.predictions
        assert first.shape == ((12, S, 113) if architecture == PRETRAINING else (12, 5))

        resumed = make_trainer(before, tmp_path, max_steps=16, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        assert resumed.state.global_step == 16
        assert largest(before.eval().parameters(), model.parameters()) < 1e-6

    def test_a_tokenizer_with_other_special_tokens_leaves_the_config_alone(self, tmp_path):
        model = build(ANSWERS)
        config = dataclasses.replace(model.config)
        trainer = make_trainer(model, tmp_path, max_steps=2, processing_class=tokenizer())
        trainer.train()
        trainer.save_model()
        assert model.config == config
        assert (tmp_path / "tokenizer.json").exists()
        model.save_pretrained(tmp_path)
        again = visualbert.VisualBertForQuestionAnswering.from_pretrained(
            tmp_path, packing=config.packing
        )
        assert difference(again(**batch(ANSWERS)), model.eval()(**batch(ANSWERS))) == 0

    def test_the_config_stays_frozen_otherwise(self):
        config = tiny_config()
        config.use_cache = True  # as Trainer does
        assert not hasattr(config, "use_cache")
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.hidden_size = 48

    def test_partial_checkpointing_is_refused(self):
        with pytest.raises(UsageError, match="every layer"):
            build(BODY).activation_checkpointing_enable(every_n_layers=2)


class Examples(torch.utils.data.Dataset):
    def __init__(self, architecture, size=12):
        self.inputs = tensors(batch(architecture, size))
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.inputs.items()}


def make_trainer(model, folder, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    processing_class = options.pop("processing_class", None)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=6,
        learning_rate=3e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    examples = Examples(model.architecture)
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=examples,
        processing_class=processing_class,
    )


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(108))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    special = {"pad_token": "[PAD]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


class TestModule:
    @each_architecture
    @pytest.mark.parametrize("act", ["gelu", "gelu_new"])
    def test_copies_and_pickles(self, architecture, act):
        model, inputs = build(architecture, hidden_act=act), batch(architecture)
        expected = model(**inputs)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert difference(again(**inputs), expected) == 0
            assert again.config == model.config

    @each_architecture
    def test_a_state_dict_carries_everything(self, architecture):
        model, other = build(architecture), build(architecture, seed=1)
        inputs = batch(architecture)
        assert difference(other(**inputs), model(**inputs)) > 0.1
        other.load_state_dict(model.state_dict(), strict=True)
        assert difference(other(**inputs), model(**inputs)) == 0

    @each_architecture
    def test_numpy_inputs(self, architecture):
        model, inputs = build(architecture), batch(architecture)
        assert difference(model(**inputs), model(**tensors(inputs))) == 0

    @each_architecture
    def test_hidden_states_and_attentions(self, architecture):
        model, inputs = build(architecture), batch(architecture)
        found = model(**inputs, output_hidden_states=True, output_attentions=True)
        rows = B * 4 if architecture == CHOICE else B
        assert [tuple(x.shape) for x in found.hidden_states] == [(rows, S, 24)] * 3
        assert [tuple(x.shape) for x in found.attentions] == [(rows, 3, S, S)] * 2
        assert all((x.sum(-1) - 1).abs().max() < 1e-5 for x in found.attentions)
        assert difference({k: found[k] for k in model(**inputs)}, model(**inputs)) < 1e-5


class TestOutput:
    def output(self):
        return model_output(logits=torch.ones(2, 3), loss=torch.tensor(0.5))

    def test_is_a_mapping_a_tuple_and_a_namespace(self):
        output = self.output()
        assert list(output) == ["loss", "logits"]
        assert output[0] is output.loss is output["loss"] is output.to_tuple()[0]
        assert output[-1] is output[1:][0] is output.logits
        assert {**output} == dict(output)

    def test_absent_keys_are_none_and_unknown_ones_an_error(self):
        output = self.output()
        assert all(getattr(output, key) is None for key in KEYS if key not in output)
        with pytest.raises(AttributeError, match="no 'logit'; present: loss, logits"):
            _ = output.logit
        with pytest.raises(KeyError):
            output["attentions"]

    def test_an_assigned_attribute_is_an_item(self):
        output = self.output()
        output.loss = 2.0
        assert output["loss"] == output[0] == output.loss == 2.0

    @pytest.mark.parametrize(
        "again",
        [copy.copy, copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output))],
        ids=["copy", "deepcopy", "pickle"],
    )
    def test_copies_are_of_its_type(self, again):
        found = again(self.output())
        assert type(found) is ModelOutput
        assert difference(found, self.output()) == 0

    def test_is_a_pytree(self):
        found = torch.utils._pytree.tree_map(lambda x: x * 2, self.output())
        assert type(found) is ModelOutput
        assert np.allclose(found.logits, 2)


def test_a_row_that_shows_nothing_is_equal_in_every_framework():
    names = visualbert.backend_names(installed=True)
    if len(names) < 2:
        pytest.skip("only one framework is installed")
    inputs, outputs = with_masked_row(), []
    for name in names:
        backend = visualbert.get_backend(name)
        outputs.append(backend.call(backend.models[BODY](tiny_config(), seed=0), inputs))
    assert all(difference(output, outputs[0]) < 1e-5 for output in outputs)
