"""What every backend owes, run on each of them unchanged: the protocol, the files, the
behaviours.
"""

import numpy as np
import pytest
from native_helpers import numbers
from tiny import BACKENDS, make_model, random_tensors, tiny_config

from visualbert import CheckpointError, MissingBackendError, get_backend, load
from visualbert.backend import native_name
from visualbert.checkpoint.initial import InitialValues
from visualbert.checkpoint.read import read_weights
from visualbert.errors import ConfigError, UsageError
from visualbert.parity import CASES, differing_bits, make_inputs
from visualbert.pretrained import ModelTensors
from visualbert.schema import ARCHITECTURES, Kind, parameters

PLAIN = CASES[1]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def outputs(backend, model, inputs):
    return get_backend(backend).call(model, inputs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_protocol(backend, architecture):
    chosen = get_backend(backend)
    config = tiny_config(bypass_transformer=True)
    assert set(chosen.leaves) == set(Kind)
    assert set(chosen.models) == set(ARCHITECTURES)
    model = chosen.create(architecture, config, "float16")
    handles = chosen.variables(model)
    assert set(handles) == {native_name(chosen, p) for p in parameters(architecture, config)}
    name, handle = next(iter(handles.items()))
    array = np.random.default_rng(0).standard_normal(chosen.shape(handle)).astype(np.float16)
    chosen.push(handle, array)
    pulled = chosen.pull(chosen.variables(model)[name])
    assert pulled.dtype == np.float16 and np.array_equal(pulled, array)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_framework_writes_the_same_file(backend, architecture, tmp_path):
    config = tiny_config()
    make_model(backend, architecture, config).save_pretrained(tmp_path / backend)
    make_model("pt", architecture, config).save_pretrained(tmp_path / "reference")
    for name in ("model.safetensors", "config.json"):
        ours, reference = ((tmp_path / d / name).read_bytes() for d in (backend, "reference"))
        assert ours == reference


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_types_survive_loading_and_saving(backend, dtype, tmp_path):
    config = tiny_config()
    model = make_model("pt", "VisualBertForPreTraining", config, dtype)
    model.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a", backend)
    assert {s.dtype for s in ModelTensors(get_backend(backend), again).specs.values()} == {dtype}
    again.save_pretrained(tmp_path / "b")
    assert not differing_bits(read_weights(tmp_path / "a"), read_weights(tmp_path / "b"))
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


def test_asked_type_wins(backend, tmp_path):
    make_model("pt", "VisualBertModel", tiny_config()).save_pretrained(tmp_path)
    model = load(tmp_path, backend, dtype="bfloat16")
    specs = ModelTensors(get_backend(backend), model).specs
    assert {s.dtype for s in specs.values()} == {"bfloat16"}


def test_constructors_start_from_the_same_values(backend):
    chosen = get_backend(backend)
    config = tiny_config()
    for architecture in ARCHITECTURES:
        model = chosen.models[architecture](config, seed=5)
        values = InitialValues(architecture, config, seed=5)
        assert not differing_bits(ModelTensors(chosen, model), values)


def test_a_loaded_model_is_in_evaluation_mode(backend, tmp_path):
    config = tiny_config(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    make_model("pt", "VisualBertModel", config).save_pretrained(tmp_path)
    model = load(tmp_path, backend)
    inputs = make_inputs(PLAIN, "VisualBertModel", config)
    first, second = (outputs(backend, model, inputs) for _ in range(2))
    assert np.array_equal(first["last_hidden_state"], second["last_hidden_state"])


def test_body_out_of_a_head_and_a_new_head_on_a_body(backend, tmp_path):
    chosen, config = get_backend(backend), tiny_config()
    make_model("pt", "VisualBertForPreTraining", config).save_pretrained(tmp_path / "pre")
    body = chosen.models["VisualBertModel"].from_pretrained(tmp_path / "pre")
    body.save_pretrained(tmp_path / "body")
    original = read_weights(tmp_path / "pre")
    saved = read_weights(tmp_path / "body")
    assert all(
        np.array_equal(saved.read(name), original.read("visual_bert." + name))
        for name in saved.specs
    )
    answering = chosen.models["VisualBertForQuestionAnswering"]
    for folder in ("pre", "body"):
        with pytest.raises(CheckpointError, match="pass new_head=True"):
            answering.from_pretrained(tmp_path / folder)
        model = answering.from_pretrained(tmp_path / folder, new_head=True, num_labels=7, seed=2)
        tensors = ModelTensors(chosen, model)
        fresh = InitialValues("VisualBertForQuestionAnswering", model.config, seed=2)
        assert np.array_equal(tensors.read("cls.weight"), fresh.read("cls.weight"))
        name = "visual_bert.pooler.dense.weight"
        assert np.array_equal(tensors.read(name), original.read(name))
    assert load(tmp_path / "body", backend).architecture == "VisualBertModel"


HEAD = "VisualBertForVisualReasoning"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reasoning")
    make_model("pt", HEAD, tiny_config()).save_pretrained(path)
    return path


def refused(error, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return str(caught.value)


DEFAULT_DEVICE = "model.to(device); TensorFlow and Flax use their default device"
TRANSFORMERS_KEYWORDS = {
    "add_pooling_layer": (False, "every model has its pooler; leave pooler_output unread"),
    "cache_dir": ("/tmp", "set HF_HUB_CACHE in the environment"),
    "device_map": ("auto", f"move the model afterwards: {DEFAULT_DEVICE}"),
    "force_download": (True, "remove the repository from the Hub's cache first: hf cache rm"),
    "ignore_mismatched_sizes": (True, "pass new_head=True, which draws the head anew"),
    "load_in_8bit": (True, "quantised models are transformers', which loads the same folders"),
    "local_files_only": (
        True,
        "set HF_HUB_OFFLINE=1 in the environment, or pass a local folder",
    ),
    "output_loading_info": (True, "a load that succeeds has nothing to report: it is strict"),
    "proxies": ({"https": "x"}, "set HTTPS_PROXY in the environment"),
    "return_dict": (False, "pass return_dict=False when you call the model"),
    "subfolder": ("a", "pass the path of that folder in a local copy of the repository"),
    "token": ("hf_x", "set HF_TOKEN in the environment, or log in: hf auth login"),
    "variant": ("fp16", "pass the path of that weight file, and its config.json as config"),
    "num_head": (2, "did you mean 'num_attention_heads'?"),
    "newhead": (True, "did you mean 'new_head'?"),
    "qwertz": (1, "its other keywords are fields of VisualBertConfig"),
}


@pytest.mark.parametrize("name", TRANSFORMERS_KEYWORDS)
def test_keywords_of_transformers_are_refused_with_the_way_out(backend, name, folder):
    value, way = TRANSFORMERS_KEYWORDS[name]
    cls = get_backend(backend).models[HEAD]
    for function, load_it in (
        ("from_pretrained", lambda: cls.from_pretrained(folder, **{name: value})),
        ("from_bert", lambda: cls.from_bert(folder, **{name: value})),
        ("load", lambda: load(folder, backend, **{name: value})),
    ):
        if (function, name) == ("from_bert", "newhead"):  # a BERT's head is always new
            way = TRANSFORMERS_KEYWORDS["qwertz"][1]
        assert refused(UsageError, load_it) == f"{function}() takes no {name!r}; {way}"
        way = TRANSFORMERS_KEYWORDS[name][1]


def test_keywords_of_transformers_that_mean_the_same_or_nothing(backend, folder):
    cls = get_backend(backend).models[HEAD]
    nothing = {
        "use_safetensors": True,
        "low_cpu_mem_usage": True,
        "trust_remote_code": True,
        "weights_only": False,
        "from_pt": True,
        "device_map": None,
        "token": True,
        "subfolder": "",
        "add_pooling_layer": True,
        "return_dict": True,
        "ignore_mismatched_sizes": False,
    }
    for dtype, found in (("auto", "float32"), ("float16", "float16"), (None, "float32")):
        for name in ("dtype", "torch_dtype"):
            for model in (
                cls.from_pretrained(folder, **{name: dtype}, **nothing),
                load(folder, backend, **{name: dtype}, **nothing),
            ):
                specs = ModelTensors(get_backend(backend), model).specs
                assert {s.dtype for s in specs.values()} == {found}
    names = {i: f"name {i}" for i in range(5)}
    numbers = {name: i for i, name in names.items()}
    for given in ({"id2label": names, "label2id": numbers}, {"label2id": numbers}):
        model = cls.from_pretrained(folder, num_labels=5, **given)
        assert (model.config.id2label, model.config.extra.get("label2id")) == (names, None)
    for wrong in ({"x": 0}, [1], {}, {"name 0": 0, "b": 0}):
        assert refused(UsageError, cls.from_pretrained, folder, id2label=names, label2id=wrong) == (
            "from_pretrained() takes no 'label2id' but the inverse of id2label; give id2label alone"
        )


def test_what_is_no_checkpoint_or_no_config(backend, folder):
    cls = get_backend(backend).models[HEAD]
    lead = "config is of type {}, expected visualbert.VisualBertConfig{}"
    convert = "; convert it: VisualBertConfig.from_dict(config)"
    fields = tiny_config().to_dict()
    for make in (cls, lambda config: cls.from_pretrained(folder, config=config)):
        assert refused(ConfigError, make, fields) == lead.format("dict", convert)
        assert refused(ConfigError, make, 3) == lead.format("int", "")
    assert refused(ConfigError, cls, None) == lead.format("NoneType", "")
    read = "; read it: VisualBertConfig.from_pretrained(config)"
    assert refused(ConfigError, cls, "a/b") == lead.format("str", read)
    needs = "{}() needs a folder, a file or a Hub id, got {}"
    for source, words in ((None, "None"), (b"a", "a bytes"), ({}, "a dict")):
        found = refused(UsageError, cls.from_pretrained, source)
        assert found == needs.format("from_pretrained", words)
        assert refused(UsageError, cls.from_bert, source) == needs.format("from_bert", words)
        assert refused(UsageError, load, source, backend) == needs.format("load", words)
    assert refused(UsageError, cls.from_bert, folder, config=tiny_config()) == (
        "from_bert() takes the file of a BERT's configuration as config, got a VisualBertConfig; "
        "pass the fields to change as keywords"
    )


def test_a_config_of_transformers_is_converted_by_hand(backend):
    transformers = pytest.importorskip("transformers")
    cls, theirs = get_backend(backend).models[HEAD], transformers.VisualBertConfig()
    assert refused(ConfigError, cls, theirs) == (
        "config is of type transformers.VisualBertConfig, expected visualbert.VisualBertConfig; "
        "convert it: VisualBertConfig.from_dict(config.to_dict())"
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_number_of_parameters(backend, architecture):
    transformers = pytest.importorskip("transformers")
    model = make_model(backend, architecture, tiny_config())
    theirs = transformers.VisualBertConfig(**tiny_config().to_dict())
    reference = getattr(transformers, architecture)(theirs)
    assert model.num_parameters() == reference.num_parameters() > 10_000
    for excluded in (False, True):  # as transformers' `Trainer` asks
        expected = reference.num_parameters(exclude_embeddings=excluded)
        assert model.num_parameters(exclude_embeddings=excluded) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tuple_instead_of_a_mapping(backend, architecture):
    model = make_model(backend, architecture, tiny_config())
    inputs = make_inputs(PLAIN, architecture, tiny_config())
    output = model(**inputs, return_dict=True)
    found = model(**inputs, return_dict=False, output_hidden_states=True)
    assert type(found) is tuple and type(found[-1]) is tuple
    assert type(model(**inputs)) is type(output) is not tuple
    assert len(found) == len(output) + 1
    for value, expected in zip(found[:-1], output.to_tuple(), strict=True):
        # without hidden states, the last layer runs at the head's positions alone
        assert np.abs(numbers(value) - numbers(expected)).max() < 1e-5
    assert output[0] is next(iter(output.values()))


def test_a_subclass_loads_as_itself(backend, tmp_path):
    cls = get_backend(backend).models["VisualBertForVisualReasoning"]
    mine = type("Mine", (cls,), {})
    make_model("pt", "VisualBertForVisualReasoning", tiny_config()).save_pretrained(tmp_path)
    assert type(mine.from_pretrained(tmp_path)) is mine


def test_defaults_are_transformers(backend):
    """Masks left out are ones, visual segments left out are ones, text segments zeros."""
    config = tiny_config()
    model = make_model(backend, "VisualBertModel", config)
    inputs = make_inputs(CASES[0], "VisualBertModel", config)
    del inputs["token_type_ids"], inputs["visual_token_type_ids"]
    ids, regions = inputs["input_ids"], inputs["visual_embeds"].shape[:2]
    spelled = {
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.arange(ids.shape[1])[None].repeat(len(ids), 0),
        "visual_attention_mask": np.ones(regions, np.int64),
        "visual_token_type_ids": np.ones(regions, np.int64),
    }
    left_out = outputs(backend, model, inputs)["last_hidden_state"]
    full = outputs(backend, model, {**inputs, **spelled})["last_hidden_state"]
    assert np.abs(left_out - full).max() < 1e-5
    zeros = {"visual_token_type_ids": np.zeros(regions, np.int64)}
    other = outputs(backend, model, {**inputs, **zeros})["last_hidden_state"]
    assert np.abs(left_out - other).max() > 0.01


@pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if a != "VisualBertForRegionToPhraseAlignment"]
)
def test_left_padding_gives_what_right_padding_gives(backend, architecture):
    config = tiny_config()
    model = make_model(backend, architecture, config, "float64")
    right = make_inputs(PLAIN, architecture, config)
    right = {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in right.items()}
    length = right["input_ids"].shape[-1]
    right["position_ids"] = np.broadcast_to(np.arange(length), right["input_ids"].shape).copy()
    right.pop("labels", None)
    left = dict(right)
    shifts = length - right["attention_mask"].sum(-1)
    for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids"):
        rows = right[name].reshape(-1, length)
        moved = [np.roll(row, k) for row, k in zip(rows, shifts.reshape(-1), strict=True)]
        left[name] = np.stack(moved).reshape(right[name].shape)
    assert not np.array_equal(left["attention_mask"], right["attention_mask"])
    a, b = outputs(backend, model, left), outputs(backend, model, right)
    for name in ("pooler_output", "logits", "seq_relationship_logits"):
        if name in a:
            assert np.abs(a[name] - b[name]).max() < 1e-12


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_logits_stay_logits_when_labels_are_given(backend, architecture):
    config = tiny_config()
    model = make_model(backend, architecture, config)
    inputs = make_inputs(PLAIN, architecture, config)
    with_labels = outputs(backend, model, inputs)
    assert next(iter(with_labels)) == "loss"
    for name in ("labels", "sentence_image_labels"):
        inputs.pop(name, None)
    without = outputs(backend, model, inputs)
    assert set(with_labels) == {"loss", *without}
    assert all(np.array_equal(with_labels[name], x) for name, x in without.items())


def test_pretraining_labels_in_every_form(backend):
    config = tiny_config()
    model = make_model(backend, "VisualBertForPreTraining", config)
    inputs = make_inputs(PLAIN, "VisualBertForPreTraining", config)
    words, match = inputs.pop("labels"), inputs.pop("sentence_image_labels")

    def loss(**labels):
        return float(outputs(backend, model, {**inputs, **labels})["loss"])

    regions = inputs["visual_embeds"].shape[1]
    full = np.pad(words, ((0, 0), (0, regions)), constant_values=-100)
    assert loss(labels=words) == pytest.approx(loss(labels=full), abs=1e-6)
    hundreds = np.where(words == -1, -100, words)
    assert loss(labels=words) == pytest.approx(loss(labels=hundreds), abs=1e-6)
    both = loss(labels=words, sentence_image_labels=match)
    alone = loss(sentence_image_labels=match)
    assert both == pytest.approx(loss(labels=words) + alone, abs=1e-5)
    assert loss(sentence_image_labels=match[:, None]) == pytest.approx(alone, abs=1e-6)
    assert loss(labels=np.full_like(words, -1)) == 0  # nothing to predict is no loss, not a NaN


def test_choices_share_regions_or_have_their_own(backend):
    config = tiny_config()
    model = make_model(backend, "VisualBertForMultipleChoice", config)
    inputs = make_inputs(CASES[3], "VisualBertForMultipleChoice", config)
    choices = inputs["input_ids"].shape[1]
    repeated = {
        name: np.repeat(x[:, None], choices, 1) if name.startswith(("visual", "image")) else x
        for name, x in inputs.items()
    }
    a, b = outputs(backend, model, inputs), outputs(backend, model, repeated)
    assert a["logits"].shape == (len(inputs["labels"]), choices)
    assert np.abs(a["logits"] - b["logits"]).max() < 1e-6  # features are projected once, or each


def test_alignment_is_a_mean_and_may_be_too_long(backend):
    config = tiny_config()
    model = make_model(backend, "VisualBertModel", config)
    inputs = make_inputs(CASES[3], "VisualBertModel", config)
    alignment = inputs["image_text_alignment"]
    doubled = np.concatenate([alignment, alignment], axis=2)
    longer = np.pad(alignment, ((0, 0), (0, 3), (0, 0)), constant_values=4)
    want = outputs(backend, model, inputs)["last_hidden_state"]
    for other in (doubled, longer):
        found = outputs(backend, model, {**inputs, "image_text_alignment": other})
        assert np.abs(found["last_hidden_state"] - want).max() < 1e-5
    none = np.full_like(alignment, -1)
    del inputs["image_text_alignment"]
    a = outputs(backend, model, inputs)["last_hidden_state"]
    b = outputs(backend, model, {**inputs, "image_text_alignment": none})["last_hidden_state"]
    assert np.abs(a - b).max() < 1e-6 < np.abs(a - want).max()


def test_embeddings_instead_of_ids(backend):
    config = tiny_config()
    for architecture in ("VisualBertModel", "VisualBertForMultipleChoice"):
        tensors = random_tensors(architecture, config)
        model = make_model(backend, architecture, config)
        inputs = make_inputs(PLAIN, architecture, config)
        inputs.pop("labels", None)
        prefix = "" if architecture == "VisualBertModel" else "visual_bert."
        table = tensors.arrays[f"{prefix}embeddings.word_embeddings.weight"]
        embedded = {**inputs, "inputs_embeds": table[inputs["input_ids"]]}
        del embedded["input_ids"]
        a, b = outputs(backend, model, inputs), outputs(backend, model, embedded)
        assert all(np.abs(a[name] - b[name]).max() < 1e-5 for name in a)


def test_late_fusion_reads_text_alone_until_the_last_layer(backend):
    config = tiny_config(bypass_transformer=True, packing="never")
    model = make_model(backend, "VisualBertModel", config)
    inputs = make_inputs(PLAIN, "VisualBertModel", config)
    asked = {"output_hidden_states": True, "output_attentions": True}
    found = outputs(backend, model, {**inputs, **asked})
    text, regions = inputs["input_ids"].shape[1], inputs["visual_embeds"].shape[1]
    lengths = [found[f"hidden_states.{i}"].shape[1] for i in range(4)]
    assert lengths == [text, text, text, text + regions]
    assert [found[f"attentions.{i}"].shape[-1] for i in range(3)] == [text, text, text + regions]
    text_only = {n: x for n, x in inputs.items() if not n.startswith("visual")}
    plain = make_model(backend, "VisualBertModel", tiny_config(), tensors=None)
    alone = outputs(backend, model, text_only)["last_hidden_state"]
    assert alone.shape[1] == text
    assert np.abs(alone - found["hidden_states.2"]).max() < 1e-5
    del plain


def test_attention_forms_agree(backend):
    inputs = make_inputs(PLAIN, "VisualBertModel", tiny_config())
    found = [
        outputs(
            backend,
            make_model(
                backend, "VisualBertModel", tiny_config(attn_implementation=form), "float32"
            ),
            inputs,
        )["last_hidden_state"]
        for form in ("sdpa", "eager")
    ]
    assert 0 <= np.abs(found[0] - found[1]).max() < 1e-5


def test_no_row_of_the_word_table_is_frozen(backend):
    chosen = get_backend(backend)
    for pad in (0, 1):
        config = tiny_config(pad_token_id=pad)
        model = make_model(backend, "VisualBertForVisualReasoning", config)
        inputs = make_inputs(CASES[0], "VisualBertForVisualReasoning", config)
        inputs["input_ids"][:, 3] = pad
        p = parameters("VisualBertForVisualReasoning", config)[0]
        gradient = chosen.gradients(model, inputs)[native_name(chosen, p)]
        assert gradient[pad].any()


def test_a_row_without_anything_visible_stays_finite(backend):
    config = tiny_config()
    model = make_model(backend, "VisualBertModel", config, "float64")
    inputs = make_inputs(PLAIN, "VisualBertModel", config)
    inputs["attention_mask"][1] = 0
    inputs["visual_attention_mask"][1] = 0
    inputs["visual_embeds"] = inputs["visual_embeds"].astype(np.float64)
    found = outputs(backend, model, inputs)["last_hidden_state"]
    reference = make_model("pt", "VisualBertModel", config, "float64")
    want = outputs("pt", reference, inputs)["last_hidden_state"]
    assert np.isfinite(found).all() and np.abs(found - want).max() < 1e-9


def test_unknown_and_missing_backends(backend, monkeypatch):
    with pytest.raises(UsageError, match="unknown backend 'mxnet'; expected one of pt, tf, flax"):
        get_backend("mxnet")
    names = {"pt": ["torch", "PyTorch"], "tf": ["tensorflow", "keras"], "flax": ["jax", "Flax"]}
    for name in names[backend]:
        assert refused(UsageError, get_backend, name) == (
            f"unknown backend {name!r}; did you mean {backend!r}?"
        )
    import importlib.util

    get_backend.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingBackendError, match=rf"pip install visualbert\[{backend}\]"):
        get_backend(backend)
    monkeypatch.undo()
    get_backend.cache_clear()


def test_a_backend_of_another_package(backend, monkeypatch):
    from visualbert import backend as registry

    class Point:
        name = "fourth"

        def load(self):
            return get_backend(backend)

    get_backend.cache_clear()
    monkeypatch.setattr(registry, "entry_points", lambda group: [Point()])
    assert "fourth" in registry.backend_names()
    assert get_backend("fourth") is get_backend(backend)
    get_backend.cache_clear()


def test_starting_from_a_bert(backend, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {
        k: v for k, v in tiny_config().to_dict().items() if k.endswith(("size", "layers", "heads"))
    }
    bert = transformers.BertModel(
        transformers.BertConfig(**sizes, max_position_embeddings=36, initializer_range=0.2)
    ).eval()
    bert.save_pretrained(tmp_path)
    cls = get_backend(backend).models["VisualBertModel"]
    model = cls.from_bert(tmp_path, visual_embedding_dim=20, packing="never")  # as BERT computes
    tensors = ModelTensors(get_backend(backend), model)
    for name in ("token_type_embeddings", "position_embeddings"):
        text = tensors.read(f"embeddings.{name}.weight")
        assert np.array_equal(text, tensors.read(f"embeddings.visual_{name}.weight"))
    inputs = make_inputs(CASES[4], "VisualBertModel", model.config)
    import torch

    with torch.no_grad():
        want = bert(**{n: torch.as_tensor(x) for n, x in inputs.items()}).last_hidden_state.numpy()
    found = outputs(backend, model, inputs)["last_hidden_state"]
    assert np.abs(found - want).max() < 1e-5
