"""Every family of published checkpoints, from files made the way its users' files were made: names,
shapes and values arrive whole, and the models compute what their authors' code computed.
"""

import collections
import contextlib
import itertools
import json
import shutil
import sys
import threading
import types
import warnings

import numpy as np
import pytest
import safetensors.numpy
import test_files
import torch
from family_files import (
    HEADS,
    canonical,
    detector_state,
    mmf_checkpoint,
    mmf_config,
    mmf_head,
    mmf_state,
    original_state,
    pack,
    save,
    tensors_of,
    training_state,
    write_yaml,
)
from golden_cases import CASES, TOLERANCE, golden, output_errors, prepared
from mmf_reference import mmf_logits
from tiny import BACKENDS

from visualbert import CheckpointError, ConfigError, VisualBertConfig, get_backend, load
from visualbert.checkpoint.families import (
    BERT,
    GOOGLE,
    HUGGING_FACE,
    MMF,
    ORIGINAL,
    rename,
)
from visualbert.checkpoint.mapped import leaves_of
from visualbert.checkpoint.match import check_ties, match
from visualbert.checkpoint.open import open_checkpoint
from visualbert.checkpoint.read import SafetensorsFiles
from visualbert.cli import main
from visualbert.parity import differing_bits
from visualbert.pretrained import ModelTensors
from visualbert.schema import ARCHITECTURES, parameters

BODY, PRETRAINING, CHOICE, ANSWERS, REASONING, PHRASES = ARCHITECTURES
SET = ["--set", "num_attention_heads=3"]


def refused(function, *args, error=CheckpointError, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    return text


def loaded(checkpoint, architecture):
    """Every array that a load would put into a model."""
    found = match(checkpoint.tensors, architecture, checkpoint.config)
    check_ties(checkpoint.tensors, found)
    return {name: checkpoint.tensors.read(source) for name, source in found.sources.items()}


def same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


# The authors' own files


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """One `.th` of every golden model, with what published files differ in going around."""
    folder = tmp_path_factory.mktemp("original")
    variants = itertools.cycle(itertools.product([False, True], ["", "module."]))
    return {
        case: save(folder / f"{case}.th", original_state(case, "bert.", wrapper), legacy)
        for case, (legacy, wrapper) in zip(CASES, variants, strict=False)
    }


@pytest.fixture(scope="session")
def converted(originals, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    for case, path in originals.items():
        assert main(["convert", str(path), str(folder / case), *SET]) == 0
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_original_outputs(case, backend, originals, converted):
    architecture = canonical(case)[0]
    chosen = get_backend(backend)
    direct = chosen.models[architecture].from_pretrained(originals[case], **HEADS)
    output_errors(case, chosen, direct)
    again = load(converted / case, backend)
    assert type(again) is type(direct)
    assert again.config.replace(extra={}) == direct.config.replace(extra={})
    assert not differing_bits(ModelTensors(chosen, again), ModelTensors(chosen, direct))
    if backend == "pt":
        output_errors(case, chosen, again)


def test_a_wrong_tensor_is_found(originals, tmp_path):
    """The comparison above on a file with one table in another's place."""
    state = torch.load(originals["nlvr"])
    visual, text = (f"bert.bert.embeddings.position_embeddings{x}.weight" for x in ("_visual", ""))
    key = next(name for name in state if name.endswith(visual))
    other = next(name for name in state if name.endswith(text))
    path = save(tmp_path / "wrong.th", {**state, key: state[other], other: state[key]})
    model = load(path, **HEADS)
    with pytest.raises(AssertionError, match="loss"):
        output_errors("nlvr", get_backend("pt"), model)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("outer", ["bert.", ""])
@pytest.mark.parametrize("wrapper", ["", "module.", "module.module.", "model.", "module.model."])
def test_original_spellings(wrapper, outer, legacy, tmp_path):
    for case in CASES:
        path = save(tmp_path / f"{case}.th", original_state(case, outer, wrapper), legacy)
        checkpoint = open_checkpoint(path, **HEADS)
        architecture, config, arrays = canonical(case)
        assert checkpoint.family is (MMF if "model." in wrapper else ORIGINAL)
        same(loaded(checkpoint, architecture), arrays)
        assert checkpoint.config == config


def test_gamma_beta_and_positions(tmp_path):
    state = original_state("vqa")
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for name, x in state.items()
    }
    older["bert.bert.embeddings.position_ids"] = torch.arange(36)[None]
    assert any("gamma" in name for name in older)
    checkpoint = open_checkpoint(save(tmp_path / "x.th", older, legacy=True), **HEADS)
    same(loaded(checkpoint, ANSWERS), canonical("vqa")[2])


def test_what_shapes_show(run, originals, tmp_path):
    lines = (
        "architecture=VisualBertForQuestionAnswering (a classifier of 3129 rows; if not, "
        "--architecture CLASS)",
        "num_hidden_layers=2",
        "vocab_size=113",
        "hidden_size=24",
        "max_position_embeddings=36",
        "type_vocab_size=2",
        "visual_embedding_dim=20",
        "intermediate_size=40",
        "num_labels=3129",
    )
    path = originals["vqa"]
    assert open_checkpoint(path, **HEADS).notes == {"inferred": lines}
    inferred = f"inferred: {', '.join(lines)}"
    status, out, _ = run("inspect", path, *SET)
    assert status == 0 and inferred in out.splitlines()
    assert "read as: the original authors' VisualBERT (torch)" in out.splitlines()
    status, out, _ = run("convert", path, tmp_path / "out", *SET)
    assert status == 0 and f"  {inferred}" in out.splitlines()
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert record["inferred"] == list(lines)
    assert record["family"] == "the original authors' VisualBERT"
    asked = [*SET, "--architecture", ANSWERS]  # which is nothing to infer any more
    status, out, _ = run("inspect", path, *asked)
    assert status == 0 and f"inferred: {', '.join(lines[1:])}" in out.splitlines()
    status, out, _ = run("convert", path, tmp_path / "out", *asked, "--force")
    assert status == 0 and f"  inferred: {', '.join(lines[1:])}" in out.splitlines()
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert record["inferred"] == list(lines[1:])


def test_late_fusion_and_heads_show(originals, tmp_path):
    notes = open_checkpoint(originals["pretraining_late_fusion"], **HEADS).notes["inferred"]
    assert "bypass_transformer=True" in notes
    assert notes[0] == (
        f"architecture={PRETRAINING} (it has a language-model head; if not, --architecture CLASS)"
    )
    notes = open_checkpoint(originals["pretraining"], **HEADS).notes["inferred"]
    assert "bypass_transformer=True" not in notes
    checkpoint = open_checkpoint(originals["flickr"])  # one of its modules is a head wide
    assert checkpoint.config.num_attention_heads == 3
    assert checkpoint.notes["inferred"][-1] == (
        "num_attention_heads=3 (hidden_size / rows of attention.query)"
    )
    assert refused(open_checkpoint, originals["nlvr"]) == (
        f"'{originals['nlvr']}': hidden_size=24 is no multiple of 64, so the number of attention "
        "heads cannot be guessed; give it as num_attention_heads (--set num_attention_heads=N)"
    )
    wide = VisualBertConfig(
        vocab_size=9,
        hidden_size=128,
        num_attention_heads=2,
        visual_embedding_dim=7,
        num_hidden_layers=1,
        intermediate_size=3,
        max_position_embeddings=5,
    )
    arrays = {p.name: np.zeros(p.shape(wide), np.float32) for p in parameters(CHOICE, wide)}
    state = {
        name.replace("visual_bert.", "bert.bert.")
        .replace("cls.", "bert.classifier.")
        .replace("embeddings.visual_projection", "embeddings.projection"): x
        for name, x in arrays.items()
    }
    checkpoint = open_checkpoint(save(tmp_path / "wide.th", tensors_of(state)))
    assert checkpoint.config.num_attention_heads == 2
    assert checkpoint.notes["inferred"][-1] == (
        "num_attention_heads=2 (hidden_size / 64, as shapes do not show it; if not, --set "
        "num_attention_heads=N)"
    )
    assert checkpoint.notes["inferred"][0] == (
        f"architecture={CHOICE} (a classifier of 1 row; if not, --architecture CLASS)"
    )


def test_overrides(run, originals, tmp_path):
    path, out = originals["nlvr"], tmp_path / "out"
    status, text, _ = run("convert", path, out, *SET, "--architecture", ANSWERS)
    assert status == 0 and f": {ANSWERS}, 45 tensors" in text
    assert load(out).architecture == ANSWERS
    config = canonical("nlvr")[1]
    for architectures in (None, [ANSWERS]):
        values = {**config.to_dict(), "architectures": architectures, "hidden_dropout_prob": 0.25}
        (tmp_path / "mine.json").write_text(json.dumps(values))
        status, text, _ = run("convert", path, out, "--config", tmp_path / "mine.json", "--force")
        assert status == 0 and f": {ANSWERS if architectures else REASONING}," in text
        assert load(out).config.hidden_dropout_prob == 0.25
        assert ("inferred" in text) == (architectures is None)
    status, text, _ = run(
        "convert",
        path,
        out,
        *SET,
        "--set",
        "layer_norm_eps=1e-6",
        "--set",
        "hidden_act=relu",
        "--force",
    )
    assert (load(out).config.layer_norm_eps, load(out).config.hidden_act) == (1e-6, "relu")
    folder = tmp_path / "no config"  # whose file is what the command line names
    folder.mkdir()
    state = tensors_of(canonical("nlvr")[2])
    save(folder / "pytorch_model.bin", state)
    arguments = ["convert", folder, out, "--config", tmp_path / "mine.json", "--force"]
    assert run(*arguments)[0] == 0 and load(out).config.hidden_dropout_prob == 0.25
    status, _, err = run(*arguments[:3], "--force")
    assert status == 2 and err.endswith(
        f"{folder}/config.json: no such file; a checkpoint folder needs one\n"
    )
    status, _, err = run("convert", path, out, *SET, "--set", "heads=3", "--force")
    assert status == 2 and err == (
        "visualbert convert: --set heads: the configuration has no such field; did you mean "
        "'num_attention_heads'?\n"
    )
    status, _, err = run("convert", path, out, *SET, "--set", "visual_embedding_dim=21", "--force")
    assert status == 2 and "visual_embedding_dim is 21, the file says 20" in err
    model = load(path, config=config, num_labels=7, new_head=True, hidden_dropout_prob=0.5)
    assert (model.config.num_labels, model.config.hidden_dropout_prob) == (7, 0.5)


# The detector of VCR's files


@pytest.fixture(scope="session")
def vcr(tmp_path_factory):
    path = tmp_path_factory.mktemp("vcr") / "vcr_fine_tune.th"
    return save(path, original_state("multichoice_alignment") | detector_state(), legacy=True)


def detector_arrays(wrapper=""):
    return {name: x.numpy() for name, x in detector_state(wrapper).items()}


@pytest.mark.parametrize("to", ["safetensors", "bin", "keras"])
def test_detector_is_kept(to, run, vcr, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    status, out, _ = run("convert", vcr, first, *SET, "--to", to, "--dtype", "float16")
    assert status == 0
    kept = f"  kept beside the model: {', '.join(detector_arrays())}"
    assert kept in out.splitlines()
    record = json.loads((first / "conversion.json").read_text())
    assert record["kept beside the model"] == list(detector_arrays())
    same(safetensors.numpy.load_file(first / "detector.safetensors"), detector_arrays())
    weights = next(p for p in first.iterdir() if "model" in p.name)
    for number, source in enumerate((first, weights)):
        target = second / str(number)
        assert run("convert", source, target)[0] == 0
        same(safetensors.numpy.load_file(target / "detector.safetensors"), detector_arrays())
        assert not any(
            name.startswith("detector")
            for name in SafetensorsFiles("x", [target / "model.safetensors"]).specs
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load(first).architecture == CHOICE
    with pytest.warns(UserWarning, match="18 tensors of the detector"):
        assert load(vcr, num_attention_heads=3).architecture == CHOICE
    status, out, _ = run("inspect", first)
    assert status == 0 and "beside the model: stored: 18 tensors (16 float32, 2 int64)" in out


@pytest.mark.parametrize("names", ["module.", "Hub"])
def test_detector_under_other_names(names, run, vcr, tmp_path):
    """DataParallel's, and a file whose model was renamed but not its detector."""
    if names == "module.":
        state = original_state("multichoice_alignment", wrapper=names) | detector_state(names)
    else:
        state = tensors_of(canonical("multichoice_alignment")[2]) | detector_state()
    path = save(tmp_path / "x.bin", state)
    assert run("convert", path, tmp_path / "out", *SET)[0] == 0
    same(safetensors.numpy.load_file(tmp_path / "out/detector.safetensors"), detector_arrays())


def test_no_detector_no_file(run, originals, tmp_path):
    status, out, _ = run("convert", originals["nlvr"], tmp_path, *SET)
    assert status == 0 and "beside" not in out
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "conversion.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("legacy", [False, True])
def test_training_state(legacy, tmp_path):
    path = save(
        tmp_path / "training_state_epoch_3.th", training_state(original_state("vqa")), legacy
    )
    sentence = (
        f"{path}: it is the state of an optimizer, without the model; open the model's own file"
    )
    assert refused(open_checkpoint, path) == sentence
    save(tmp_path / "model_state_epoch_3.th", original_state("vqa"))
    assert refused(open_checkpoint, tmp_path) == (
        f"{tmp_path}: holds more than one weight file, model_state_epoch_3.th, "
        "training_state_epoch_3.th; name the one you mean"
    )
    more = [path.with_name(f"{path.stem}{n}.th") for n in (1, 2, 3)]
    for other in more:
        other.hardlink_to(path)
    assert refused(open_checkpoint, tmp_path) == (
        f"{tmp_path}: holds more than one weight file, model_state_epoch_3.th, "
        "training_state_epoch_3.th, training_state_epoch_31.th, training_state_epoch_32.th and 1 "
        "more; name the one you mean"
    )
    for other in (path, *more):
        other.unlink()
    (tmp_path / "._model_state_epoch_3.th").write_bytes(b"\0\5\26\7")  # as macOS leaves it
    assert open_checkpoint(tmp_path, **HEADS).family is ORIGINAL


# MMF

TASKS = {  # rows of the classifier, and whether the configuration says pooler_strategy: vqa
    "vqa2": (3129, True),
    "vqa2 before pooler_strategy": (3129, False),
    "hateful memes": (2, False),
    "vizwiz": (7371, False),
    "visual entailment": (3, False),
    "mm-imdb": (23, False),
}


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmf")
    made = {}
    for task, (labels, second_last) in TASKS.items():
        strategy = {"pooler_strategy": "vqa"} if second_last else {}
        home = folder / task.replace(" ", "_")
        home.mkdir()
        weights = save(home / "visual_bert.pth", mmf_state("vqa", labels=labels))
        config = write_yaml(home / "config.yaml", mmf_config(labels, **strategy))
        made[task] = pack(folder / f"{home.name}.tar.gz", weights, config)
    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("task", TASKS)
def test_mmf_logits(task, backend, tasks):
    labels, second_last = TASKS[task]
    model = load(tasks[task], backend)
    architecture = ANSWERS if second_last else REASONING
    assert (model.architecture, model.config.num_labels) == (architecture, labels)
    assert (model.config.classifier_head, model.config.hidden_dropout_prob) == ("mlp", 0.2)
    _, _, tensors, inputs, groups = prepared("vqa")
    found = get_backend(backend).call(
        model, {name: x for name, x in inputs.items() if name != "labels"}
    )
    values = tensors.arrays | {
        name.replace("0.", "cls.transform.", 1).replace("1.", "cls.decoder.", 1): x
        for name, x in mmf_head(labels).items()
    }
    values = {name: x.astype(np.float64) for name, x in values.items()}
    states = groups["outputs"]["hidden_states.2"].astype(np.float64)
    errors = {
        read: np.abs(mmf_logits(states, inputs["attention_mask"], read, values) - found["logits"])
        for read in (ANSWERS, REASONING)
    }
    assert errors.pop(architecture).max() <= TOLERANCE
    assert errors.popitem()[1].max() > 1000 * TOLERANCE


def test_mmf_without_its_configuration(run, tmp_path):
    path = save(tmp_path / "x.pth", mmf_state("vqa", labels=3129))
    checkpoint = open_checkpoint(path, **HEADS)
    assert checkpoint.notes["inferred"][0] == (
        f"architecture={REASONING} (nothing says which state the classifier reads: MMF's default "
        "is the pooled one; if not, --architecture CLASS)"
    )
    assert run("convert", path, tmp_path / "out", *SET, "--architecture", ANSWERS)[0] == 0
    assert load(tmp_path / "out").architecture == ANSWERS
    yaml = write_yaml(tmp_path / "vqa2.yml", mmf_config(3129, pooler_strategy="vqa"))
    for where in (yaml, tmp_path / "elsewhere.yml"):
        if where != yaml:
            yaml.rename(where)
        assert load(path, config=where).architecture == ANSWERS
    strange = write_yaml(tmp_path / "strange.yaml", {"model_config": {"vilbert": {}}})
    assert refused(load, path, config=strange, error=ConfigError) == (
        f"{strange}: its configuration has no model_config.visual_bert, as MMF's has"
    )
    wrong = write_yaml(tmp_path / "strange.yaml", mmf_config(3129, num_attention_heads="many"))
    assert refused(load, path, config=wrong, error=ConfigError) == (
        f"{wrong}: num_attention_heads must be an integer, got 'many'"
    )


@pytest.mark.parametrize("wrapper", ["model.", "module.model.", ""])
@pytest.mark.parametrize("nest", ["model", "state_dict", None])
def test_mmf_nests_and_wrappers(nest, wrapper, tmp_path):
    state = mmf_state("vqa", wrapper, labels=23)
    expected = loaded(open_checkpoint(save(tmp_path / "plain.pth", state), **HEADS), REASONING)
    same(
        {n: x for n, x in expected.items() if not n.startswith("cls.")},
        {n: x for n, x in canonical("vqa")[2].items() if not n.startswith("cls.")},
    )
    checkpoint = mmf_checkpoint(state)
    value = state if nest is None else checkpoint | {nest: state}
    if nest == "state_dict":
        del value["model"]
    for legacy in (False, True):
        path = save(tmp_path / "best.ckpt", value, legacy)
        opened = open_checkpoint(path, **HEADS)
        assert opened.family is MMF
        same(loaded(opened, REASONING), expected)


@pytest.mark.parametrize("models", ["model_config", "model_attributes"])
def test_where_mmfs_configuration_is(models, tmp_path):
    config = mmf_config(3129, models, pooler_strategy="vqa")
    state = mmf_state("vqa", labels=3129)

    def opens(path):
        return load(path).architecture == ANSWERS

    inside = tmp_path / "inside"
    inside.mkdir()
    assert opens(save(inside / "best.ckpt", mmf_checkpoint(state, config)))
    assert opens(inside)
    beside = tmp_path / "beside"
    beside.mkdir()
    weights = save(beside / "visual_bert_final.pth", state)
    yaml = write_yaml(beside / "config.yaml", config)
    assert opens(weights) and opens(beside)
    for suffix in (".tar", ".tar.gz", ".tgz"):
        assert opens(pack(tmp_path / f"zoo{suffix}", weights, yaml))
        assert opens(pack(tmp_path / f"turned{suffix}", yaml, weights))
    write_yaml(beside / "other.yaml", {"a": 1})  # two of them, so none is the file's
    assert refused(load, weights).startswith(f"'{weights}': hidden_size=24")
    yaml.rename(beside / "visual_bert_final.yaml")
    assert opens(weights)


def test_pythias_configuration_is_an_object(monkeypatch, tmp_path):
    """Pythia pickled its own class; no Pythia is needed to read it, nor is one imported."""

    class ConfigNode(collections.OrderedDict):
        pass

    def nodes(value):
        if not isinstance(value, dict):
            return value
        return ConfigNode((key, nodes(x)) for key, x in value.items())

    ConfigNode.__module__, ConfigNode.__qualname__ = "pythia.utils.configuration", "ConfigNode"
    module = types.ModuleType(ConfigNode.__module__)
    module.ConfigNode = ConfigNode
    config = nodes(mmf_config(3129, "model_attributes", pooler_strategy="vqa"))
    with monkeypatch.context() as patch:
        for name in ("pythia", "pythia.utils", ConfigNode.__module__):
            patch.setitem(sys.modules, name, module)
        path = save(
            tmp_path / "best.ckpt", mmf_checkpoint(mmf_state("vqa", labels=3129), config), True
        )
    assert b"pythia.utils.configuration" in path.read_bytes()
    model = load(path)
    assert (model.architecture, model.config.hidden_dropout_prob) == (ANSWERS, 0.2)
    assert "pythia" not in sys.modules


def test_a_configuration_of_something_else(originals, tmp_path):
    """A YAML that happens to lie there is no reason to refuse a file."""
    path = shutil.copy(originals["nlvr"], tmp_path / "x.th")
    write_yaml(tmp_path / "compose.yaml", {"services": {}})
    assert load(path, **HEADS).architecture == REASONING
    (tmp_path / "compose.yaml").write_text("a: &a {b: 1}\nc: {<<: *a}\n")
    assert load(path, **HEADS).architecture == REASONING
    mmf = save(tmp_path / "y.pth", mmf_state("vqa", labels=2))
    write_yaml(tmp_path / "compose.yaml", {"services": {}})
    assert load(mmf, **HEADS).architecture == REASONING
    named = write_yaml(tmp_path / "y.yaml", {"services": {}})
    assert refused(load, mmf, **HEADS, error=ConfigError) == (
        f"{named}: its configuration has no model_config.visual_bert, as MMF's has"
    )


def test_mmfs_nlvr2_is_refused(run, tmp_path):
    path = save(tmp_path / "nlvr2.pth", mmf_state("nlvr", labels=2, pairs=True))
    sentence = (
        f"'{path}' is MMF's NLVR2 model, which runs once for each image and joins the two; this "
        f"package's {REASONING} reads both at once, as the original"
    )
    assert refused(load, path) == sentence
    assert refused(load, path, config=canonical("nlvr")[1]) == sentence
    assert run("convert", path, tmp_path / "out")[1:] == ("", f"visualbert convert: {sentence}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["pretraining", "pretraining_late_fusion"])
def test_mmf_pretraining(case, backend, tmp_path):
    weights = save(tmp_path / "model_11000.ckpt", mmf_checkpoint(mmf_state(case)))
    yaml = write_yaml(tmp_path / "config.yaml", mmf_config())
    archive = pack(tmp_path / "visual_bert.pretrained.coco.tar.gz", weights, yaml)
    model = load(archive, backend)
    assert model.architecture == PRETRAINING
    output_errors(case, get_backend(backend), model)


# transformers' own folders


def transformers_model(case):
    transformers = pytest.importorskip("transformers")
    architecture, config, arrays = canonical(case)
    values = config.to_dict()
    model = getattr(transformers, architecture)(transformers.VisualBertConfig(**values)).eval()
    missing, unexpected = model.load_state_dict(tensors_of(arrays), strict=False)
    assert not unexpected and all("decoder" in n or "position_ids" in n for n in missing)
    model.tie_weights()
    return model


def old_state(model, tied):
    """What transformers 4 put into pytorch_model.bin."""
    state = dict(model.state_dict())
    state["visual_bert.embeddings.position_ids"] = torch.arange(36)[None]
    decoders = [name for name in state if name.startswith("cls.predictions.decoder.")]
    assert decoders
    return {n: x for n, x in state.items() if tied or n not in decoders}


def write_sharded(folder, state):
    names = list(state)
    places = {}
    for i in range(3):
        name = f"pytorch_model-{i + 1:05}-of-00003.bin"
        save(folder / name, {n: state[n] for n in names[i::3]})
        places |= dict.fromkeys(names[i::3], name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


FOLDERS = {
    "today": lambda folder, model: model.save_pretrained(folder),
    "today, shards": lambda folder, model: model.save_pretrained(folder, max_shard_size="50KB"),
    "bin": lambda folder, model: save(folder / "pytorch_model.bin", old_state(model, True)),
    "legacy bin, untied": lambda folder, model: save(
        folder / "pytorch_model.bin", old_state(model, False), legacy=True
    ),
    "shards of bin": lambda folder, model: write_sharded(folder, old_state(model, True)),
    "gamma and beta": lambda folder, model: save(
        folder / "pytorch_model.bin",
        {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): x
            for n, x in old_state(model, True).items()
        },
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_transformers_folders(kind, run, tmp_path):
    model = transformers_model("pretraining")
    folder = tmp_path / "in"
    folder.mkdir()
    FOLDERS[kind](folder, model)
    if "today" not in kind:
        values = {**canonical("pretraining")[1].to_dict(), "torch_dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(values))
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (kind == "today, shards")
    assert run("convert", folder, tmp_path / "out")[0] == 0
    assert run("inspect", folder)[0] == 0
    for source in (folder, tmp_path / "out"):
        checkpoint = open_checkpoint(source)
        assert checkpoint.family is HUGGING_FACE
        same(loaded(checkpoint, PRETRAINING), canonical("pretraining")[2])
    output_errors("pretraining", get_backend("pt"), load(folder))
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["dtype"] == "float32" and "torch_dtype" not in written


def test_halves_stay_halves(run, tmp_path):
    """`torch_dtype` is what the file was meant to be loaded as; the tensors say what it holds."""
    folder = tmp_path / "in"
    transformers_model("pretraining").half().save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps({**values, "torch_dtype": "float16"}))
    assert run("convert", folder, tmp_path / "out")[0] == 0
    arrays = {n: x.astype(np.float16) for n, x in canonical("pretraining")[2].items()}
    same(safetensors.numpy.load_file(tmp_path / "out/model.safetensors"), arrays)


# Names


def names_of(family):
    """Every name that files of a family are known to have."""
    if family is GOOGLE:
        bert = names_of(BERT)
        tables = (
            "word_embeddings.weight",
            "position_embeddings.weight",
            "token_type_embeddings.weight",
        )
        return {n.removesuffix(".weight") if n.endswith(tables) else n for n in bert} | {
            "cls.predictions.output_bias",
            "cls.seq_relationship.output_weights",
            "cls.seq_relationship.output_bias",
            "bert.encoder.layer.0.output.dense.kernel",
        }
    if family in (HUGGING_FACE, BERT):
        found = {n for case in CASES for n in canonical(case)[2]}
        found |= {"cls.transform.dense.weight", "cls.decoder.weight"}
        if family is BERT:
            found = {n.replace("visual_bert.", "bert.") for n in found if ".visual_" not in n}
        return found | {n.replace("LayerNorm.weight", "LayerNorm.gamma") for n in found}
    original = {n for case in CASES for n in golden(case)[1]["weights"]}
    if family is MMF:
        original |= {f"classifier.{n}" for n in mmf_head(2)}
    return original


PREFIXES = {
    HUGGING_FACE: ("",),
    BERT: ("",),
    GOOGLE: ("",),
    ORIGINAL: ("", "bert."),
    MMF: ("", "model."),
}


@pytest.mark.parametrize("family", PREFIXES, ids=lambda family: family.title)
def test_renaming_twice_changes_nothing(family):
    wrappers = ("", "module.", "model.", "module.model.", "model.module.", "module.module.")
    names = {w + p + n for n in names_of(family) for p in PREFIXES[family] for w in wrappers}
    assert len(names) > 200
    once = {name: rename(name, family.rules) for name in names}
    for name, new in once.items():
        assert rename(new, family.rules) == new, name
    short = once.values() if family.rules else {n for w, n in once.items()}
    assert not any(n.startswith(("module.", "model.")) for n in short)


def test_renaming_is_complete():
    """All of a golden file's names become the table's, and the table's stay as they are."""
    for case in CASES:
        architecture, config, arrays = canonical(case)
        for outer in ("", "bert."):
            names = {rename(outer + n, ORIGINAL.rules) for n in golden(case)[1]["weights"]}
            assert names - {"cls.predictions.decoder.weight"} == set(arrays)
        table = {p.name for p in parameters(architecture, config)}
        assert {rename(n, ORIGINAL.rules) for n in table} == table


NEAR_MISSES = (
    "bertx.bert.embeddings.word_embeddings.weight",
    "my.bert.bert.embeddings.projection.weight",
    "mybert.cls.predictions.bias",
    "bert_classifier.weight",
    "classifiers.0.weight",
    "my.classifier.weight",
    "embeddings_projection.weight",
    "visual_bert.embeddings.projections.weight",
    "visual_bert.embeddings.projection_weight",
    "visual_bert.encoder.embeddings.projection.weight",
    "visual_bert.encoder.layer.0.position_embeddings_visual.weight",
    "visual_bert.bert.bert.pooler.dense.weight",
    "modules.visual_bert.pooler.dense.bias",
    "remodel.bert.pooler.dense.bias",
    "flickr_attention_2.query.weight",
    "my.flickr_attention.query.weight",
    "detector.module.bert.weight",
    "module",
    "",
)


@pytest.mark.parametrize("family", PREFIXES, ids=lambda family: family.title)
def test_near_misses_are_untouched(family):
    assert [rename(name, family.rules) for name in NEAR_MISSES] == list(NEAR_MISSES)


def test_google_names_end_where_they_end():
    rules = GOOGLE.rules
    assert rename("embeddings.word_embeddings", rules) == "embeddings.word_embeddings.weight"
    for name in ("embeddings.word_embeddings.extra", "my.embeddings.word_embeddings"):
        assert rename(name, rules) == name


@pytest.mark.parametrize("prefix", ["bertx.", "my.", "xmodule.", "model_1."])
def test_unknown_prefixes_are_refused(prefix, tmp_path):
    path = save(tmp_path / "x.th", original_state("vqa", "bert.", prefix))
    first = f"{prefix}bert.bert.embeddings.LayerNorm.bias"
    sentence = refused(open_checkpoint, path)
    assert sentence == refused(load, path)
    assert sentence.startswith(
        f"'{path}' is none of the known families of weights: it holds {first}, "
    )
    assert sentence.endswith(
        "; looked for embeddings.visual_projection.weight (VisualBERT under transformers' names), "
        "embeddings.projection.weight (the original authors', MMF's), "
        "embeddings.word_embeddings.weight (a BERT) behind visual_bert., bert., bert.bert. or "
        "nothing, and behind module. or model., or for bert/embeddings/word_embeddings (Google's)"
    )


NEIGHBOURS = {
    "lxrt": (
        ["bert.embeddings.word_embeddings.weight", "bert.encoder.visn_fc.visn_fc.weight"],
        "an LXMERT, which reads the two modalities apart",
    ),
    "LXMERT without its projection": (
        [
            "module.bert.embeddings.word_embeddings.weight",
            "module.bert.encoder.x_layers.0.visual_attention.att.query.weight",
        ],
        "an LXMERT, which reads the two modalities apart",
    ),
    "UNITER": (
        [
            "uniter.embeddings.word_embeddings.weight",
            "uniter.img_embeddings.img_linear.weight",
            "uniter.encoder.layer.0.attention.self.query.weight",
        ],
        "a UNITER, whose regions have boxes and norms of their own",
    ),
    "ViLBERT": (
        [
            "bert.embeddings.word_embeddings.weight",
            "bert.v_embeddings.image_embeddings.weight",
            "bert.encoder.v_layer.0.attention.self.query.weight",
        ],
        "a ViLBERT, which reads the two modalities apart",
    ),
    "MMF's ViLBERT": (
        [
            "model.bert.embeddings.word_embeddings.weight",
            "model.bert.encoder.v_layer.0.attention.self.query.weight",
        ],
        "a ViLBERT, which reads the two modalities apart",
    ),
    "Unsupervised VisualBERT": (
        [
            "bert.embeddings.word_embeddings.weight",
            "bert.embeddings.symbolic_embedding.weight",
            "bert.embeddings.token_type_embeddings_visual.weight",
            "bert.embeddings.visn_fc.weight",
            "bert.encoder.visn_fc.visn_fc.weight",
        ],
        "an Unsupervised VisualBERT (LXMERT's code), whose embeddings have other tables and norms",
    ),
    "OSCAR": (
        ["bert.embeddings.word_embeddings.weight", "bert.img_embedding.weight"],
        "an OSCAR or VinVL, whose regions come in without a segment or a position",
    ),
    "MMBT": (
        [
            "model.bert.mmbt.transformer.embeddings.word_embeddings.weight",
            "model.bert.mmbt.modal_encoder.encoder.model.0.weight",
        ],
        "an MMBT, whose image comes from a network of its own",
    ),
    "ViLT": (
        ["vilt.embeddings.text_embeddings.word_embeddings.weight"],
        "a ViLT, which reads patches of the image",
    ),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_are_refused(name, run, tmp_path):
    names, what = NEIGHBOURS[name]
    path = save(tmp_path / "x.pth", {n: torch.zeros(2, 2) for n in names})
    sentence = f"'{path}' is {what}; it cannot become a VisualBERT"
    assert refused(load, path) == sentence
    for command in (["inspect", path], ["convert", path, tmp_path / "out"]):
        status, out, err = run(*command)
        assert (status, out, err) == (2, "", f"visualbert {command[0]}: {sentence}\n")


@pytest.mark.parametrize(
    "name",
    [
        "roberta.embeddings.word_embeddings.weight",
        "distilbert.embeddings.word_embeddings.weight",
        "vlbert.word_embeddings.weight",
        "clip.text_model.embeddings.weight",
    ],
)
def test_strangers_are_refused(name, tmp_path):
    path = save(tmp_path / "x.bin", {name: torch.zeros(2, 2)})
    assert "is none of the known families of weights: it holds " + name in refused(load, path)


def test_two_families_in_one_file(originals, tmp_path):
    mixed = original_state("vqa") | tensors_of(canonical("vqa")[2])
    path = save(tmp_path / "x.th", mixed)
    assert refused(load, path) == (
        f"'{path}' holds the names of VisualBERT under transformers' names and of the original "
        "authors' VisualBERT; remove the tensors of one of the two"
    )
    twice = original_state("vqa") | {"module.bert.bert.pooler.dense.bias": torch.zeros(24)}
    path = save(tmp_path / "y.th", twice)
    assert refused(load, path) == (
        f"'{path}': bert.bert.pooler.dense.bias and module.bert.bert.pooler.dense.bias both "
        "become visual_bert.pooler.dense.bias"
    )
    path = save(tmp_path / "z.th", {})
    assert "expected a dictionary of tensors by name" in refused(load, path)


def test_what_is_no_parameter_is_said(originals, tmp_path):
    state = original_state("vqa") | {"bert.bert.adapter.weight": torch.zeros(2)}
    del state["bert.bert.pooler.dense.bias"]
    with pytest.raises(CheckpointError) as caught:
        load(save(tmp_path / "x.th", state), **HEADS)
    lines = str(caught.value).splitlines()
    assert "  missing     visual_bert.pooler.dense.bias" in lines
    assert "  unexpected  visual_bert.adapter.weight" in lines


def test_leaves():
    """What native readers ask of the table."""
    for architecture in ARCHITECTURES:
        for head in ("linear", "mlp"):
            config = VisualBertConfig(
                num_hidden_layers=2, bypass_transformer=True, classifier_head=head
            )
            with contextlib.suppress(ConfigError):
                for p in parameters(architecture, config):
                    module, _, leaf = p.name.rpartition(".")
                    assert leaves_of(module)[leaf] is p.kind
    for module in (
        "encoder.layer.0",
        "my.pooler.dense",
        "layer",
        "",
        "encoder.layer.x.output.dense",
        "encoder.layer.00000.output.dense",
    ):
        assert leaves_of(module) == {}


# What opening costs, and what a file is called


MAPS = []
sys.addaudithook(lambda event, args: MAPS.append(args) if event == "mmap.__new__" else None)


@pytest.mark.parametrize("kind", ["original", "mmf", "archive", "folder", "safetensors"])
def test_opening_reads_no_tensor(kind, originals, converted, tasks, tmp_path):
    path = {
        "original": lambda: originals["vqa"],
        "mmf": lambda: save(tmp_path / "x.ckpt", mmf_checkpoint(mmf_state("vqa", labels=2))),
        "archive": lambda: tasks["vqa2"],
        "folder": lambda: converted / "vqa",
        "safetensors": lambda: converted / "vqa/model.safetensors",
    }[kind]()
    MAPS.clear()
    checkpoint = open_checkpoint(path, **HEADS)
    assert not MAPS
    checkpoint.tensors.read(next(iter(checkpoint.tensors.specs)))
    assert len(MAPS) == 1


def test_a_header_that_begins_as_a_pickle_does(tmp_path):
    """The length that a safetensors file starts with may be 128, 384, …: 0x80, as protocol 2."""
    arrays = canonical("vqa")[2]
    for padding in range(0, 256, 8):
        path = tmp_path / "weights.safetensors"
        safetensors.numpy.save_file(arrays, path, {"padding": " " * padding})
        if path.read_bytes()[0] == 0x80:
            break
    else:
        raise AssertionError("no padding gave it that length")
    same(loaded(open_checkpoint(path, **HEADS), ANSWERS), arrays)


@pytest.mark.parametrize(
    "name", ["none.th", "none.tar.gz", "none.tgz", "none.PTH", "a/none.ckpt", "./none", "a/b/c"]
)
def test_missing_files_are_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(load, name) == f"{name}: no such file or folder"


HUB_CLIENT = """
import json, sys
from visualbert.checkpoint.open import open_bert, open_checkpoint

for name, architecture in json.loads(sys.argv[1]):
    if architecture:
        found = open_bert(name, architecture)
    else:
        found = open_checkpoint(name)
    aside = found.aside and len(found.aside.specs)
    print(json.dumps([found.format, found.config.hidden_size, aside]))
"""


def test_what_lies_beside_on_the_hub(vcr, tmp_path, monkeypatch):
    """A detector and a BERT's configuration are fetched with the weights."""
    monkeypatch.setattr(test_files, "HUB_CLIENT", HUB_CLIENT)
    root = tmp_path / "hub"
    for to in ("bin", "safetensors"):
        assert main(["convert", str(vcr), str(root / "me" / to), *SET, "--to", to]) == 0
    old = root / "me" / "bert"
    old.mkdir()
    state = {n: x for n, x in original_state("vqa", "").items() if "classifier" not in n}
    text = {n: x for n, x in state.items() if "visual" not in n and "projection" not in n}
    save(old / "pytorch_model.bin", text)
    config = canonical("vqa")[1].to_dict()
    values = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    (old / "bert_config.json").write_text(json.dumps(values))
    with test_files.Hub(root) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asked = [["me/bin", None], ["me/safetensors", None], ["me/bert", BODY]]
        found = test_files.ask_hub(asked, tmp_path, server.endpoint)
        server.shutdown()
    assert found == [["torch", 24, 18], ["safetensors", 24, 18], ["torch", 24, None]]
