"""VisualBertConfig: the way to transformers and back loses nothing, and a wrong value is one
sentence that names the field.
"""

import copy
import dataclasses
import json
import os
import pickle

import pytest
from tiny import tiny_config

from visualbert import ConfigError, UsageError, VisualBertConfig
from visualbert.config import read_json_object

NAMES = {"no": 0, "yes": 1, "perhaps": 2}


def write(folder, content):
    path = folder / "config.json"
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(data)
    return path


def message(function, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert len(text) < 400 and "\n" not in text
    return text


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_labels": 5},
        {"num_labels": 1},
        {"id2label": {i: name for name, i in NAMES.items()}, "label2id": NAMES},
        {"id2label": {0: "nein", 1: "ja – 可"}},
        {"output_attentions": True, "output_hidden_states": True},
        {"pad_token_id": None, "eos_token_id": [5, 7], "bos_token_id": 2},
        {"problem_type": "regression", "chunk_size_feed_forward": 2},
        {"a_key_of_tomorrow": {"nested": [1, {"x": None}]}, "architectures": ["VisualBertModel"]},
        {"dtype": "bfloat16", "bypass_transformer": True, "layer_norm_eps": 1e-5},
        {"classifier_head": "mlp", "num_labels": 7},
    ],
)
@pytest.mark.parametrize("written", [True, False], ids=["config.json", "to_dict"])
def test_round_trip_through_transformers(fields, written, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.VisualBertConfig(**fields)
    values = json.loads(theirs.to_json_string()) if written else theirs.to_dict()
    ours = VisualBertConfig.from_dict(values)
    assert ours.num_labels == theirs.num_labels
    assert ours.pad_token_id == theirs.pad_token_id
    ours.save_pretrained(tmp_path)
    again = VisualBertConfig.from_pretrained(tmp_path)
    assert again == ours
    back = transformers.VisualBertConfig.from_pretrained(tmp_path)
    expected = {**theirs.to_dict(), "_name_or_path": None}
    found = {**back.to_dict(), "_name_or_path": None}
    assert found == {**expected, "transformers_version": found["transformers_version"]}


def test_written_file(tmp_path):
    """Sorted, ASCII whatever the locale, and without what belongs to a process."""
    settings = {
        "attn_implementation": "eager",
        "packing": "always",
        "sparse_prediction": True,
    }
    config = tiny_config(id2label={0: "ä", 1: "\ud800"}, num_labels=2, **settings)
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_bytes().decode("ascii")
    values = json.loads(text)
    assert list(values) == sorted(values) and text.endswith("}\n")
    assert values["model_type"] == "visual_bert" and not settings.keys() & values.keys()
    again = VisualBertConfig.from_pretrained(tmp_path)
    assert again.id2label == {0: "ä", 1: "\ud800"}
    assert again != config and again.replace(**settings) == config
    assert os.listdir(tmp_path) == ["config.json"]


def test_classifier_head_is_written_where_it_is_not_the_default(tmp_path):
    """transformers does not know it, so that its own folders stay as they are."""
    assert "classifier_head" not in tiny_config().to_dict()
    config = tiny_config(classifier_head="mlp")
    assert config.to_dict() == {**tiny_config().to_dict(), "classifier_head": "mlp"}
    config.save_pretrained(tmp_path)
    assert VisualBertConfig.from_pretrained(tmp_path) == config
    assert VisualBertConfig.from_pretrained(tmp_path, classifier_head="linear") == tiny_config()
    assert VisualBertConfig.from_dict({"classifier_head": "linear"}) == VisualBertConfig()


def test_defaults():
    config = VisualBertConfig.from_dict({})
    assert config == VisualBertConfig()
    assert (config.pad_token_id, config.num_labels, config.id2label) == (0, 2, None)
    assert config.head_size == 64


def test_frozen_hashable_copyable():
    config = tiny_config(extra={"a": [1]}, eos_token_id=[1, 2])
    for name, value, shown in (("num_labels", 3, "num_labels=3"), ("label2id", {}, "…")):
        with pytest.raises(dataclasses.FrozenInstanceError) as caught:
            setattr(config, name, value)
        assert str(caught.value) == (
            f"{name!r} cannot be assigned, as a VisualBertConfig never changes; make a copy: "
            f"config = config.replace({shown})"
        )
    assert (config.num_labels, hasattr(config, "label2id")) == (5, False)
    assert hash(config) == hash(tiny_config(extra={"b": 2}, eos_token_id=3))
    assert len({config, config.replace(), tiny_config(hidden_size=48)}) == 2
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_replace():
    config = VisualBertConfig.from_dict(
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}, "later": 1}
    )
    assert config.id2label == {0: "no", 1: "yes"}
    wider = config.replace(num_labels=3)
    assert wider.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert wider.to_dict()["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert wider.to_dict()["later"] == 1
    named = wider.replace(id2label={0: "a"})
    assert (named.num_labels, named.to_dict()["label2id"]) == (1, {"a": 0})
    assert config.replace(num_labels=2).id2label == {0: "no", 1: "yes"}
    assert config.num_labels == 2  # the original is untouched
    assert message(config.replace, hidden_sise=1) == (
        "VisualBertConfig has no field 'hidden_sise'; did you mean 'hidden_size'?"
    )


def test_changes_on_top_of_a_file(tmp_path):
    write(tmp_path, {"num_labels": 2, "id2label": {"0": "no", "1": "yes"}, "hidden_act": "tanh"})
    load = VisualBertConfig.from_pretrained
    assert message(load, tmp_path).startswith(f"{tmp_path}/config.json: hidden_act='tanh' is not")
    mended = load(tmp_path, hidden_act="relu", num_labels=4)
    assert (mended.hidden_act, mended.num_labels, len(mended.id2label)) == ("relu", 4, 4)
    assert load(tmp_path, hidden_act="relu", id2label={0: "x"}).num_labels == 1
    assert load(tmp_path, hidden_act="relu", num_labels=2).id2label == {0: "no", 1: "yes"}
    assert "has no field 'foo'" in message(load, tmp_path, foo=1)
    assert load(tmp_path / "config.json", hidden_act="relu", attn_implementation="eager")


WRONG_TYPES = {
    int: ["768", 1.5, True, [1], {}],
    float: ["0.1", False, [0.1]],
    bool: ["true", 1, 0.0],
    str: [5, None, True, ["gelu"]],
}


def typed_fields():
    for f in dataclasses.fields(VisualBertConfig):
        for kind, values in WRONG_TYPES.items():
            if f.type in (kind, kind | None):
                yield from ((f.name, value) for value in values)


@pytest.mark.parametrize(("name", "value"), typed_fields())
def test_wrong_types(name, value):
    assert message(VisualBertConfig, **{name: value}).startswith(f"{name} must be ")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hidden_size": "768"}, "hidden_size must be an integer, got '768'"),
        ({"hidden_dropout_prob": "0"}, "hidden_dropout_prob must be a number, got '0'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"hidden_act": None}, "hidden_act must be a string, got None"),
        (
            {"hidden_size": 770},
            "hidden_size=770 must be a multiple of num_attention_heads=12",
        ),
        ({"vocab_size": 0}, "vocab_size=0 must lie between 1 and 2147483647"),
        ({"vocab_size": 2**31}, "vocab_size=2147483648 must lie between 1 and 2147483647"),
        ({"hidden_size": 10**5000}, "hidden_size must be an integer of at most 64 bits"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps must be a number of at most 64 bits"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan must be a positive number"),
        ({"initializer_range": float("inf")}, "initializer_range=inf must be a positive number"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob=1.0 must lie in [0, 1)"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 must lie between 0 and 1000"),
        ({"num_labels": 10**9}, "num_labels=1000000000 must lie between 1 and 1048576"),
        ({"num_labels": 0}, "num_labels=0 must lie between 1 and 1048576"),
        ({"id2label": {}}, "num_labels=0 must lie between 1 and 1048576"),
        (
            {"num_labels": 3, "id2label": {0: "a"}},
            "num_labels=3 contradicts id2label, which names 1 label; give one of the two",
        ),
        (
            {"id2label": {0: "a", 2: "b"}},
            "id2label must name every label from 0 up, each once and without a gap, got the "
            "numbers [0, 2]",
        ),
        ({"id2label": ["a"]}, "id2label must map label numbers to names, got ['a']"),
        ({"id2label": {0: None}}, "id2label must map label numbers to names, got {0: None}"),
        (
            {"architectures": "VisualBertModel"},
            "architectures must be a list of class names, got 'VisualBertModel'",
        ),
        ({"architectures": [3]}, "architectures must be a list of class names, got [3]"),
        ({"extra": [1]}, "extra must be a mapping, got [1]"),
        (
            {"extra": {"hidden_size": 24}},
            "extra holds 'hidden_size', which is a field of its own",
        ),
        (
            {"hidden_act": "tanh"},
            "hidden_act='tanh' is not one of gelu, gelu_new, gelu_pytorch_tanh, relu, silu, swish",
        ),
        (
            {"attn_implementation": "cudnn"},
            "attn_implementation='cudnn' is not one of sdpa, eager, flash",
        ),
        ({"packing": "training"}, "packing='training' is not one of inference, always, never"),
        ({"classifier_head": "Linear"}, "classifier_head='Linear' is not one of linear, mlp"),
        (
            {"tie_word_embeddings": False},
            "tie_word_embeddings=False is not VisualBERT, whose language-model head decodes with "
            "the word table; set it to true",
        ),
    ],
)
def test_sentences(fields, expected):
    assert message(VisualBertConfig, **fields) == expected


@pytest.mark.parametrize(
    "labels", [{"0": "a", "00": "b"}, {"1": "a"}, {"x": "a"}, {0.5: "a"}, {0: "a", "0": "b"}]
)
def test_label_numbers(labels):
    assert "each once and without a gap" in message(VisualBertConfig, id2label=labels)


def test_label_order():
    config = VisualBertConfig(
        id2label={"1": "b", "10": "k", **{str(i): "x" for i in range(10) if i != 1}}
    )
    assert list(config.id2label) == list(range(11))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not readable as JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"{", "not readable as JSON: Expecting property name enclosed in double quotes"),
        (b'{"hidden_size": 24', "not readable as JSON: Expecting ',' delimiter"),
        (b'{"a": "\xff"}', "not readable as JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'\xef\xbb\xbf{"a": 1}', "not readable as JSON: Unexpected UTF-8 BOM"),
        (b"[1]", "expected a JSON object, found a list"),
        (b"null", "expected a JSON object, found null"),
        (b'"visual_bert"', "expected a JSON object, found a string"),
        (b"12", "expected a JSON object, found a number"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not readable as JSON: maximum recursion"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not readable as JSON: Exceeds the limit"),
        (b'{"vocab_size": 1e400}', "vocab_size must be an integer, got inf"),
        (b'{"vocab_size": 30522.0}', "vocab_size must be an integer, got 30522.0"),
        (b'{"layer_norm_eps": NaN}', "layer_norm_eps=nan must be a positive number"),
        (
            b'{"model_type": "bert"}',
            "model_type is 'bert', expected 'visual_bert'; a VisualBERT starts from a BERT with "
            "from_bert (on the command line, convert --architecture CLASS)",
        ),
        (b'{"model_type": "lxmert"}', "model_type is 'lxmert', expected 'visual_bert'"),
        (b'{"model_type": null}', "model_type is None, expected 'visual_bert'"),
        (b'{"hidden_size": null}', "hidden_size must be an integer, got None"),
    ],
)
def test_broken_files(content, expected, tmp_path):
    path = write(tmp_path, content)
    assert message(VisualBertConfig.from_pretrained, tmp_path).startswith(f"{path}: {expected}")


def test_missing_files(tmp_path):
    load = VisualBertConfig.from_pretrained
    path = tmp_path / "config.json"
    assert message(load, tmp_path) == f"{path}: no such file; a checkpoint folder needs one"
    path.mkdir()
    assert message(load, tmp_path) == f"{path}: not a file, so there is no JSON to read"
    assert message(read_json_object, tmp_path / "config.json" / "x").endswith("needs one")
    assert "embedded null byte" in message(load, "a\0b")
    with pytest.raises(ConfigError, match="File name too long"):
        load("x" * 5000)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    assert "not a file" in message(load, tmp_path / "pipe")
    assert "not a file" in message(load, "/dev/zero")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(65 * 2**20)
    assert "more than 64 MiB" in message(load, tmp_path / "large")


def test_keywords_of_transformers(tmp_path):
    write(tmp_path, {})
    load = VisualBertConfig.from_pretrained
    assert load(tmp_path, local_files_only=False, token=None, trust_remote_code=True) == load(
        tmp_path
    )
    assert load(tmp_path, label2id=NAMES).id2label == {0: "no", 1: "yes", 2: "perhaps"}
    for function, sentence in (
        (
            lambda: load(tmp_path, cache_dir="x"),
            "from_pretrained() takes no 'cache_dir'; set HF_HUB_CACHE in the environment",
        ),
        (
            lambda: load(None),
            "from_pretrained() needs a folder, a file or a Hub id, got None",
        ),
    ):
        with pytest.raises(UsageError) as caught:
            function()
        assert str(caught.value) == sentence


def test_not_a_mapping():
    assert message(VisualBertConfig.from_dict, [1]) == "expected a mapping of fields, got [1]"
    assert message(VisualBertConfig.from_dict, None) == "expected a mapping of fields, got None"


def test_unwritable_extra(tmp_path):
    nested = []
    nested.append(nested)
    for extra in ({"x": object()}, {"x": nested}, {"x": {1, 2}}, {"x": {1: 2, "a": 3}}):
        config = tiny_config(extra=extra)
        assert "cannot be written as JSON" in message(config.save_pretrained, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_deepest_file_that_can_be_read_can_be_written(tmp_path):
    write(tmp_path, b'{"a":' * 900 + b"1" + b"}" * 900)
    config = VisualBertConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert VisualBertConfig.from_pretrained(tmp_path) == config
