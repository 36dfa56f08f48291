"""The command line: every direction of a conversion bit for bit, and every mistake one sentence and
exit status 2, with nothing left behind.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from tiny import random_tensors, tiny_config

from visualbert import VisualBertConfig, __version__
from visualbert.checkpoint.read import read_weights
from visualbert.checkpoint.tensors import DTYPES, ArrayTensors, cast
from visualbert.checkpoint.write import write_folder
from visualbert.cli import COMMANDS
from visualbert.parity import CASES, TOLERANCES, differing_bits, make_inputs
from visualbert.schema import ARCHITECTURES

BODY = "VisualBertModel"
ANSWERS = "VisualBertForQuestionAnswering"
PRETRAINING = "VisualBertForPreTraining"
WEIGHTS = "model.safetensors"
RECORD = "conversion.json"
FORMATS = ("bin", "keras", "flax")
CONFIG = tiny_config(num_hidden_layers=1)


def checkpoint(folder, architecture=ANSWERS, dtype="float32", config=CONFIG, **replaced):
    tensors = random_tensors(architecture, config)
    arrays = {name: cast(tensors.read(name), dtype) for name in tensors.specs}
    arrays |= replaced
    config = config.replace(architectures=(architecture,), extra={"dtype": dtype})
    write_folder(folder, ArrayTensors("arrays", arrays), config)
    return folder


@pytest.fixture
def source(tmp_path):
    return checkpoint(tmp_path / "source")


@pytest.fixture
def refused(run):
    """The sentence of a command that ends with status 2 and prints nothing else."""

    def call(*arguments, lines=1):
        status, out, err = run(*arguments)
        assert (status, out) == (2, ""), (status, out, err)
        assert len(err.splitlines()) == lines, err
        lead = f"visualbert {arguments[0]}: "
        assert err.startswith(lead)
        return err.removeprefix(lead).rstrip("\n")

    return call


@pytest.fixture
def misused(run):
    """The sentence below the usage of a command that argparse refuses."""

    def call(*arguments):
        status, out, err = run(*arguments)
        assert (status, out) == (2, ""), (status, out, err)
        *usage, sentence = err.splitlines()
        commands = [*{*arguments} & {*COMMANDS}]
        prog = " ".join(["visualbert", *commands])
        assert usage[0].startswith(f"usage: {prog} [-h] "), err
        assert sentence.startswith(f"{prog}: ")
        return sentence.removeprefix(f"{prog}: ")

    return call


def process(*arguments, **options):
    """The same in a process of its own, as a user has it."""
    env = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, "-m", "visualbert", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        **{"env": env, **options},
    )


# Help


FRAMEWORKS = ["torch", "tensorflow", "keras", "jax", "flax", "transformers"]
HEAVY = [*FRAMEWORKS, "numpy", "rich"]
HEAVY += ["safetensors", "huggingface_hub", "tokenizers", "ml_dtypes", "h5py", "difflib"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["convert", "--help"], ["verify", "--help"]]
)
def test_help_imports_nothing(arguments):
    code = (
        "import sys\nfrom visualbert.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit as e: assert e.code == 0\n"
        f"sys.exit(', '.join(m for m in {HEAVY} if m in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: visualbert" if "--help" in arguments else "visualbert ")


def test_version(run):
    assert run("--version") == (0, f"visualbert {__version__}\n", "")


KNOWN = ", ".join(COMMANDS)
LISTED = ", ".join(ARCHITECTURES)
MISUSES = {
    "": f"expected a command: {KNOWN}",
    "verfy x": f"COMMAND 'verfy' is not one of {KNOWN}; did you mean 'verify'?",
    "train x": f"COMMAND 'train' is not one of {KNOWN}",
    "--verson": "there is no option --verson; did you mean '--version'?",
    "inspect x --shema": "there is no option --shema; did you mean '--schema'?",
    "convert a --froce b": "there is no option --froce; did you mean '--force'?",
    "convert a b --tto=bin": "there is no option --tto; did you mean '--to'?",
    "verify x -q": "there is no option -q; --help lists them",
    "verify x y": "'y' is one argument too many",
    "convert a": "the following arguments are required: dst",
    "convert a b --to kera": (
        "--to 'kera' is not one of safetensors, keras, flax, msgpack, bin; did you mean 'keras'?"
    ),
    "convert a b --dtype flot16": (
        "--dtype 'flot16' is not one of float32, float64, float16, bfloat16; did you mean "
        "'float16'?"
    ),
    "convert a b --dtype int8": (
        "--dtype 'int8' is not one of float32, float64, float16, bfloat16"
    ),
    "verify x --dtype=": "--dtype '' is not one of float64, float32",
    "verify x --dtype double": "--dtype 'double' is not one of float64, float32",
    "verify x --against transfomers": (
        "--against 'transfomers' is not one of transformers; did you mean 'transformers'?"
    ),
    "inspect x --architecture Bert": (
        f"argument --architecture: unknown architecture 'Bert'; expected one of {LISTED}"
    ),
    "inspect x --architecture VisualBertForPretraining": (
        "argument --architecture: unknown architecture 'VisualBertForPretraining'; expected one "
        f"of {LISTED}; did you mean 'VisualBertForPreTraining'?"
    ),
}


@pytest.mark.parametrize("line", MISUSES)
def test_misuses(line, misused):
    assert misused(*line.split()) == MISUSES[line]


def test_choices_are_what_the_library_takes():
    from visualbert.cli import convert, verify

    assert set(convert.DTYPES) == set(DTYPES)
    assert tuple(TOLERANCES) == verify.DTYPES


def test_settings(refused, source, tmp_path):
    """A field that does not exist, the nearest that do, and a file that is not there."""
    lead = "the configuration has no such field"
    for entry, sentence in (
        ("num_head=3", f"{lead}; did you mean 'num_attention_heads' or 'num_labels'?"),
        ("heads=3", f"{lead}; did you mean 'num_attention_heads'?"),
        ("vocabsize=9", f"{lead}; did you mean 'vocab_size' or 'type_vocab_size'?"),
    ):
        key = entry.partition("=")[0]
        assert refused("inspect", source, "--set", entry) == f"--set {key}: {sentence}"
    assert refused("inspect", source, "--set", "extra={}").startswith(f"--set extra: {lead}; ")
    fields = [f.name for f in dataclasses.fields(VisualBertConfig) if f.name != "extra"]
    for command in (["inspect", source], ["convert", source, tmp_path / "x"], ["verify", source]):
        assert (
            refused(*command, "--set", "foo=1") == f"--set foo: {lead}; it has {', '.join(fields)}"
        )
        assert refused(*command, "--set", "foo") == "--set 'foo' is not of the form KEY=VALUE"
        assert refused(*command, "--config", tmp_path / "nope.json") == (
            f"--config {tmp_path}/nope.json: no such file"
        )


# inspect


def test_inspect(run, source):
    status, out, err = run("inspect", source)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{source}  {ANSWERS}"
    assert lines[1] == "read as: VisualBERT under transformers' names (safetensors)"
    assert lines[2] == (
        "1 layer, hidden 24, 3 heads, feed-forward 40, 113 words, 36 positions, region features "
        "20 wide, 5 labels"
    )
    assert lines[-2:] == ["stored: 29 tensors (29 float32), 0.0 MB", "nothing is wrong with it"]
    total = sum(a.size for a in safetensors.numpy.load_file(source / WEIGHTS).values())
    assert any(line.split() == ["all", "29", f"{total:,}"] for line in lines)


def test_one_of_a_kind(run, tmp_path):
    config = CONFIG.replace(num_attention_heads=1, num_labels=1)
    bias = np.array([np.inf], np.float32)
    status, out, _ = run(
        "inspect", checkpoint(tmp_path / "one", config=config, **{"cls.bias": bias})
    )
    assert status == 1 and out.splitlines()[2] == (
        "1 layer, hidden 24, 1 head, feed-forward 40, 113 words, 36 positions, region features 20 "
        "wide, 1 label"
    )
    assert out.splitlines()[-1] == "wrong  cls.bias holds 1 value that is not finite"


def test_inspect_schema(run, source):
    status, out, _ = run("inspect", source, "--schema")
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    name = "visual_bert.embeddings.visual_projection.weight"
    expected = [name, "H", "F", "=", "24,", "20", "linear", "kernel", "(transposed)"]
    assert [*expected, "kernel", "(transposed)"] in rows
    assert sum(row[:1] != [] and row[0].startswith(("visual_bert.", "cls.")) for row in rows) == 29


DEFECTS = {
    "nan": (
        {"cls.bias": np.array([0, np.nan, 1, np.inf, 2], np.float32)},
        "wrong  cls.bias holds 2 values that are not finite",
    ),
    "shape": (
        {"cls.bias": np.zeros(6, np.float32)},
        "  mismatched  cls.bias: file (6,), config (5,);",
    ),
    "unexpected": ({"extra.weight": np.zeros(1, np.float32)}, "  unexpected  extra.weight"),
    "integers": ({"cls.bias": np.zeros(5, np.int64)}, "  mismatched  cls.bias: file int64, "),
    "markup": ({"[red]x[/": np.zeros(1, np.float32)}, "  unexpected  [red]x[/"),
}


@pytest.mark.parametrize("case", DEFECTS)
def test_inspect_defects(case, run, tmp_path):
    replaced, line = DEFECTS[case]
    status, out, err = run("inspect", checkpoint(tmp_path / "bad", **replaced))
    assert (status, err) == (1, "")
    assert any(found.startswith(line) for found in out.splitlines()), out
    assert "nothing is wrong" not in out


def test_large_float64_is_finite(run, tmp_path):
    bias = np.array([1e300] * 5)
    status, out, err = run(
        "inspect", checkpoint(tmp_path / "x", dtype="float64", **{"cls.bias": bias})
    )
    assert (status, err) == (0, "") and out.endswith("nothing is wrong with it\n")


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_damage_is_found(run, refused, source, tmp_path):
    """A flipped bit: inspect says so, verify refuses, and convert does not launder it."""
    flip_last_byte(source / WEIGHTS)
    status, out, _ = run("inspect", source)
    sentence = f"{source / WEIGHTS}: the data has changed since it was written (CRC-32 "
    assert status == 1 and f"wrong  {sentence}" in out
    assert refused("verify", source, "--backends", "pt,flax").startswith(sentence)
    assert refused("convert", source, tmp_path / "new").startswith(sentence)
    assert not (tmp_path / "new").exists()


def test_wrong_class(run, source):
    status, out, _ = run("inspect", source, "--architecture", PRETRAINING)
    assert status == 1
    assert out.splitlines()[-4:] == [
        f"wrong  cannot load {PRETRAINING} from '{source}': 2 problems",
        "  missing     cls.predictions.bias and 6 more",
        "  unexpected  cls.{bias, weight}: the head of VisualBertForMultipleChoice or "
        "VisualBertForQuestionAnswering or VisualBertForVisualReasoning",
        "To train a new head on this body, convert it with --new-head.",
    ]


@pytest.mark.parametrize("name", ["a[red]b[/]", "[/bold]", "[b", "ü – 可", "a\x1b[31mb", "back\\"])
def test_names_are_shown_as_they_are(name, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / name)
    shown = name.replace("\x1b", "\\x1b")
    status, out, err = run("inspect", name)
    assert (status, err) == (0, "") and out.startswith(f"{shown}  {ANSWERS}\n")
    status, out, err = run("convert", name, f"{name}2")
    assert (status, err) == (0, "") and out.startswith(f"{shown} → {shown}2 (safetensors): ")


# convert


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("to", FORMATS)
def test_there_and_back(to, dtype, run, tmp_path):
    """Bit for bit, denormals, infinities and NaN included."""
    odd = np.array([1e-45, np.inf, -np.inf, np.nan, -0.0], np.float32)
    source = checkpoint(tmp_path / "source", dtype=dtype)
    safetensors_bias = cast(odd, dtype)
    checkpoint(source, dtype=dtype, **{"cls.bias": safetensors_bias})
    status, out, err = run("convert", source, tmp_path / to, "--to", to)
    assert (status, err) == (0, "")
    assert out.startswith(f"{source} → {tmp_path / to} ({to}): {ANSWERS}, 29 tensors, ")
    native = {"bin": "pytorch_model.bin", "keras": "model.weights.h5", "flax": "orbax"}[to]
    assert sorted(os.listdir(tmp_path / to)) == sorted(["config.json", RECORD, native])
    assert run("convert", tmp_path / to, tmp_path / "back")[0] == 0
    assert sorted(os.listdir(tmp_path / "back")) == ["config.json", RECORD, WEIGHTS]
    back = read_weights(tmp_path / "back")
    assert differing_bits(read_weights(source), back) == []
    assert back.verify_checksum()
    configs = [json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back")]
    assert configs[0] == configs[1] and configs[0]["dtype"] == dtype


def test_what_a_conversion_records(run, source, tmp_path):
    """Beside the weights and inside them: where they come from, to the byte."""
    assert run("convert", source, tmp_path / "bin", "--to", "bin")[0] == 0
    assert run("convert", tmp_path / "bin", tmp_path / "new")[0] == 0
    record = json.loads((tmp_path / "new" / RECORD).read_text())
    digest = hashlib.sha256((tmp_path / "bin" / "pytorch_model.bin").read_bytes()).hexdigest()
    assert record == {
        "source": str(tmp_path / "bin"),
        "family": "VisualBERT under transformers' names",
        "format": "torch",
        "sha256": {"pytorch_model.bin": digest},
        "tool": f"visualbert {__version__}",
        "architecture": ANSWERS,
        "dtype": "float32",
    }
    metadata = read_weights(tmp_path / "new").metadata
    assert metadata["format"] == "pt"
    for name, value in record.items():
        assert metadata[f"conversion.{name}"] in (value, json.dumps(value))


def test_through_every_format(run, tmp_path):
    source = checkpoint(tmp_path / "0", PRETRAINING, "bfloat16")
    chain = ["keras", "flax", "bin", "flax", "keras", "safetensors"]
    for i, to in enumerate(chain):
        assert run("convert", tmp_path / str(i), tmp_path / str(i + 1), "--to", to)[0] == 0
    assert differing_bits(read_weights(source), read_weights(tmp_path / str(len(chain)))) == []
    assert run("inspect", tmp_path / "1")[0] == 0
    assert run("inspect", tmp_path / "2")[0] == 0


def test_dtype(run, tmp_path):
    source = checkpoint(tmp_path / "source", dtype="float32")
    for dtype in ("float16", "bfloat16", "float64"):
        assert run("convert", source, tmp_path / dtype, "--dtype", dtype)[0] == 0
        found, original = read_weights(tmp_path / dtype), read_weights(source)
        for name in original.specs:
            assert np.array_equal(found.read(name), cast(original.read(name), dtype))
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
    assert run("convert", tmp_path / "float64", tmp_path / "again", "--dtype", "float32")[0] == 0
    assert differing_bits(read_weights(source), read_weights(tmp_path / "again")) == []


def test_new_head_and_body(run, refused, tmp_path):
    source = checkpoint(tmp_path / "source", PRETRAINING)
    new = tmp_path / "new"
    assert refused("convert", source, new, "--architecture", ANSWERS, lines=4) == (
        f"cannot load {ANSWERS} from '{source}': 2 problems\n"
        "  missing     cls.{weight, bias}\n"
        f"  unexpected  cls.predictions.bias and 6 more: the head of {PRETRAINING}\n"
        "To train a new head on this body, convert it with --new-head."
    )
    assert not new.exists()
    status, out, _ = run("convert", source, new, "--architecture", ANSWERS, "--new-head")
    assert status == 0
    _, read_as, not_needed, fresh = out.splitlines()
    assert read_as == "  read as: VisualBERT under transformers' names (safetensors)"
    lead, _, names = not_needed.partition(": ")
    assert lead == "  not needed" and len(names.split(", ")) == 7
    assert all(name.startswith("cls.") for name in names.split(", "))
    assert fresh == "  drawn anew: cls.weight, cls.bias"
    record = json.loads((new / RECORD).read_text())
    assert record["drawn anew"] == ["cls.weight", "cls.bias"]
    assert record["not needed"] == names.split(", ")
    seeded = ["--architecture", ANSWERS, "--new-head", "--seed", 1]
    assert run("convert", source, tmp_path / "seeded", *seeded)[0] == 0
    assert differing_bits(read_weights(new), read_weights(tmp_path / "seeded")) == ["cls.weight"]
    assert run("convert", new, tmp_path / "body", "--architecture", BODY)[0] == 0
    assert json.loads((tmp_path / "body" / "config.json").read_text())["architectures"] == [BODY]
    assert len(read_weights(tmp_path / "body").specs) == 27


@pytest.fixture
def bert(tmp_path):
    """A tiny BERT as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    fields = {k: getattr(CONFIG, k) for k in ("vocab_size", "hidden_size", "num_hidden_layers")}
    fields |= {"num_attention_heads": 3, "intermediate_size": 40, "max_position_embeddings": 36}
    transformers.BertForPreTraining(transformers.BertConfig(**fields)).save_pretrained(
        tmp_path / "bert"
    )
    return tmp_path / "bert"


def test_bert(run, refused, bert, tmp_path):
    new = tmp_path / "new"
    assert refused("convert", bert, new) == (
        f"{bert} is a BERT; say with --architecture which VisualBERT it shall become"
    )
    to = ["--architecture", PRETRAINING]
    assert refused("convert", bert, new, *to, "--visual-embedding-dim", 0) == (
        f"{bert}/config.json: visual_embedding_dim=0 must lie between 1 and 2147483647"
    )
    huge = refused("convert", bert, new, *to, "--visual-embedding-dim", 2**31 - 1)
    assert "not enough memory" in huge or "the disk has" in huge
    assert not new.exists()
    status, out, _ = run("convert", bert, new, *to, "--visual-embedding-dim", 20)
    assert status == 0
    lines = out.splitlines()
    assert lines[1] == "  read as: a BERT (safetensors)"
    assert lines[2] == (
        "  copied from the text tables: "
        "visual_bert.embeddings.visual_token_type_embeddings.weight, "
        "visual_bert.embeddings.visual_position_embeddings.weight"
    )
    assert "assumed" not in out
    assert lines[3].startswith("  drawn anew: visual_bert.embeddings.visual_projection.weight, ")
    found, theirs = read_weights(new), read_weights(bert)
    for name in ("encoder.layer.0.output.dense.weight", "embeddings.word_embeddings.weight"):
        assert np.array_equal(found.read(f"visual_bert.{name}"), theirs.read(f"bert.{name}"))
    assert run("inspect", new)[0] == 0
    assert refused("inspect", bert) == (
        f"{bert}/config.json: model_type is 'bert', expected 'visual_bert'; a VisualBERT starts "
        "from a BERT with from_bert (on the command line, convert --architecture CLASS)"
    )
    assert refused("convert", new, tmp_path / "x", "--visual-embedding-dim", 20) == (
        f"--visual-embedding-dim is for a BERT; {new} is a VisualBERT"
    )


def test_force(run, refused, source, tmp_path):
    """Replacing means that nothing of what was there is left to be read by mistake."""
    target = checkpoint(tmp_path / "target", PRETRAINING)
    (target / "notes.txt").write_text("mine")
    assert refused("convert", source, target) == (
        f"{target} already holds config.json, model.safetensors; pass --force to replace it"
    )
    assert len(read_weights(target).specs) == 34
    for to in ("bin", "keras", "flax", "safetensors", "flax", "bin"):
        assert run("convert", source, target, "--to", to, "--force")[0] == 0
        assert run("inspect", target)[0] == 0
        assert len(os.listdir(target)) == 4
    (target / "pytorch_model.bin").rename(target / "pytorch_model-00001-of-00001.bin")
    index = {
        "weight_map": dict.fromkeys(
            random_tensors(ANSWERS, CONFIG).specs, "pytorch_model-00001-of-00001.bin"
        )
    }
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert run("inspect", target)[0] == 0
    assert run("convert", source, target, "--force")[0] == 0
    assert sorted(os.listdir(target)) == ["config.json", RECORD, WEIGHTS, "notes.txt"]


def test_onto_itself(refused, source, tmp_path):
    before = (source / WEIGHTS).read_bytes()
    (tmp_path / "link").symlink_to(source)
    for target in (source, f"{source}/", tmp_path / "link", source / ".." / source.name):
        for force in ([], ["--force"]):
            text = refused("convert", source, target, *force)
            assert text.endswith(" is the source itself; write to another folder")
    assert (source / WEIGHTS).read_bytes() == before


# Broken files in the frameworks' own formats


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(folder):
    path = folder / "model.weights.h5"
    os.truncate(path, path.stat().st_size // 2)


def flip_index(folder):
    path = folder / "orbax" / "manifest.ocdbt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def halve_data(folder):
    for path in (folder / "orbax" / "d").iterdir():
        os.truncate(path, path.stat().st_size // 2)


def empty(folder):
    shutil.rmtree(folder / "orbax")
    (folder / "orbax").mkdir()


DAMAGE = {
    "keras": [
        (truncate, "{0}/model.weights.h5: not a whole HDF5 file ("),
        (
            lambda folder: (folder / "model.weights.h5").write_text("hello"),
            "{0}/model.weights.h5: not a whole HDF5 file (",
        ),
    ],
    "flax": [
        (empty, "{0}/orbax: not an Orbax checkpoint: it has no _METADATA"),
        (flip_index, "{0}/orbax: not a whole Orbax checkpoint ("),
        (halve_data, "{0}/orbax: not a whole Orbax checkpoint ("),
    ],
}
MISFITS = [
    (
        {"num_hidden_layers": 2},
        ["encoder: the file has 1 layer;", "num_hidden_layers is 2, the file says 1"],
    ),
    (
        {"num_hidden_layers": 0},
        ["encoder: the file has 1 layer;", "num_hidden_layers is 0, the file says 1"],
    ),
    (
        {"vocab_size": 114},
        [
            "visual_bert.embeddings.word_embeddings.weight: file (113, 24), config (114, 24);",
            "vocab_size is 114, the file says 113",
        ],
    ),
]


@pytest.mark.parametrize("to", DAMAGE)
def test_broken_native_files(to, run, refused, source, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run("convert", source, whole, "--to", to)[0] == 0
    for i, (damage, sentence) in enumerate(DAMAGE[to]):
        broken = shutil.copytree(whole, tmp_path / f"damaged{i}")
        damage(broken)
        text = refused("convert", broken, out)
        assert text.startswith(sentence.format(broken)) and len(text) < 600
        assert not out.exists()
    for i, (changes, (problem, blame)) in enumerate(MISFITS):
        other = shutil.copytree(whole, tmp_path / f"misfit{i}")
        edit_config(other, **changes)
        assert refused("convert", other, out, lines=3) == (
            f"cannot load {ANSWERS} from '{other}': 1 problem\n"
            f"  mismatched  {problem}\n              {blame}"
        )
        assert not out.exists()
    edit_config(whole, architectures=[PRETRAINING])
    text = refused("convert", whole, out, lines=4)
    assert text.startswith(f"cannot load {PRETRAINING} from '{whole}': 2 problems\n  missing ")
    assert not out.exists()


@pytest.mark.parametrize("to", DAMAGE)
def test_what_the_file_says_counts(to, run, source, tmp_path):
    """A native file states its own types; a body is taken from the file of a head."""
    whole, body = tmp_path / "whole", tmp_path / "body"
    assert run("convert", source, whole, "--to", to)[0] == 0
    edit_config(whole, dtype="int8", architectures=[BODY])
    status, out, _ = run("convert", whole, body)
    assert status == 0 and out.splitlines()[2] == "  not needed: cls.bias, cls.weight"
    assert json.loads((body / "config.json").read_text())["dtype"] == "float32"
    found, original = read_weights(body), read_weights(source)
    assert len(found.specs) == 27
    for name in found.specs:
        assert np.array_equal(found.read(name), original.read(f"visual_bert.{name}"))


# verify


@pytest.fixture
def inputs(tmp_path):
    path = tmp_path / "batch.safetensors"
    safetensors.numpy.save_file(make_inputs(CASES[1], BODY, CONFIG), path)
    return path


STEPS = ("importing", "loading in", "batch in", "saving from")


def test_verify(run, inputs, tmp_path):
    source, report = checkpoint(tmp_path / "body", BODY), tmp_path / "report.json"
    options = ["--backends", "pt,flax", "--inputs", inputs, "--json", report]
    status, out, err = run("verify", source, *options)
    steps = [*(f"{step} {name}" for step in STEPS for name in ("pt", "flax"))]
    assert (status, err.splitlines()) == (0, [f"verifying: {step}" for step in steps])
    assert out.startswith(f"{source}  {BODY}, float64\n")
    assert out.endswith("pt, flax agree within 1e-09\n")
    found = json.loads(report.read_text())
    assert found["passed"] is True and found["backends"] == ["pt", "flax"]
    assert [row["case"] for row in found["rows"]] == ["batch", "save and reload", "save and reload"]
    status, out, _ = run("verify", source, *options, "--tolerance", 1e-30)
    assert status == 1 and out.endswith("pt, flax do not agree within 1e-30\n")
    assert json.loads(report.read_text())["passed"] is False
    status, out, _ = run("verify", source, "--backends", "pt,pt", "--inputs", inputs)
    assert status == 0 and out.endswith("pt was compared with nothing but its own files\n")


@pytest.mark.slow
def test_verify_everything(run, source, tmp_path):
    """All backends, in an order that imports TensorFlow first, and transformers."""
    done = process("verify", source, "--backends", "tf, pt ,flax,tf", "--against", "transformers")
    assert done.returncode == 0
    assert all(line.startswith("verifying: ") for line in done.stderr.splitlines())
    assert "tf, pt, flax, transformers agree within 1e-09" in done.stdout
    keras = tmp_path / "keras"
    assert run("convert", source, keras, "--to", "keras")[0] == 0
    assert run("verify", keras, "--dtype", "float32", "--backends", "tf,pt")[0] == 0
    status, _, err = run("verify", keras, "--backends", "pt", "--against", "transformers")
    assert status == 2 and f"{keras}: no weights found; looked for model.safetensors" in err


def test_verify_refusals(refused, source, inputs, tmp_path):
    both = ["--backends", "pt,flax"]
    unknown = "unknown backend 'mxnet'; expected one of pt, tf, flax"
    assert refused("verify", source, "--backends", "pt,mxnet") == unknown
    assert refused("verify", source, "--backends", "pt,").startswith("unknown backend ''; ")
    for tolerance in ("0", "-1", "nan", "inf"):
        text = refused("verify", source, f"--tolerance={tolerance}")
        assert text.startswith("--tolerance ") and text.endswith(" must be a positive number")
    for path in (tmp_path, tmp_path / "no" / "x.json"):
        assert refused("verify", source, *both, "--json", path) == (
            f"--json {path}: not a file in a folder that exists"
        )
    arrays = safetensors.numpy.load_file(inputs)
    for name, changed, sentence in (
        ("x.npz", {}, f"{tmp_path}/x.npz: expected a .safetensors file of inputs"),
        ("missing.safetensors", None, f"{tmp_path}/missing.safetensors: no such file"),
        (
            "unknown.safetensors",
            {"pixels": np.zeros(1)},
            f"{tmp_path}/unknown.safetensors: pixels is not an input of VisualBERT; known are ",
        ),
        (
            "other.safetensors",
            {"sentence_image_labels": np.zeros(3, np.int64)},
            f"{tmp_path}/other.safetensors: sentence_image_labels is not an input of {ANSWERS}; "
            "leave it out",
        ),
    ):
        path = tmp_path / name
        if changed is not None:
            safetensors.numpy.save_file({**arrays, **changed}, path)
        assert refused("verify", source, *both, "--inputs", path).startswith(sentence)


def test_inputs_that_do_not_fit(run, source, inputs, tmp_path):
    """What a model says of its inputs, below the steps that came before."""
    arrays = safetensors.numpy.load_file(inputs)
    for name, changed, sentence in (
        (
            "wide.safetensors",
            {"visual_embeds": np.zeros((3, 7, 12), np.float32)},
            "visual_embeds: the features are 12 wide, the model reads visual_embedding_dim=20",
        ),
        (
            "words.safetensors",
            {"input_ids": np.full((3, 11), 113)},
            "input_ids[0, 0] is 113, expected 0 to 112 (vocab_size = 113)",
        ),
    ):
        path = tmp_path / name
        safetensors.numpy.save_file({**arrays, **changed}, path)
        status, out, err = run("verify", source, "--backends", "pt", "--inputs", path)
        assert (status, out) == (2, "")
        assert err.splitlines()[-1].startswith(f"visualbert verify: {sentence}")
        assert err.splitlines()[-2] == f"verifying: {path.stem} in pt"


def test_mistakes_cost_no_import(source, tmp_path):
    """Whatever can be wrong with a command line is said before a framework is imported."""
    misfit = shutil.copytree(source, tmp_path / "misfit")
    edit_config(misfit, num_labels=6, id2label=None)
    mistakes = {
        ("none/x/y",): "none/x/y: no such file or folder",
        (source, "--backends", "pt,mxnet"): "unknown backend 'mxnet'",
        (source, "--inputs", "no.safetensors"): "no.safetensors: no such file",
        (source, "--set", "heads=3"): "--set heads: the configuration has no such field; ",
        (source, "--json", tmp_path): f"--json {tmp_path}: not a file in a folder that exists",
        (misfit,): f"cannot load {ANSWERS} from '{misfit}': ",
    }
    code = (
        "import json, sys\nfrom visualbert.cli import main\n"
        "for line in json.loads(sys.argv[1]): assert main(['verify', *line]) == 2, line\n"
        f"sys.exit(', '.join(m for m in {FRAMEWORKS} if m in sys.modules) or None)"
    )
    lines = json.dumps([[*map(str, line)] for line in mistakes])
    done = subprocess.run(
        [sys.executable, "-c", code, lines], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    said = [x for x in done.stderr.splitlines() if x.startswith("visualbert verify: ")]
    assert len(said) == len(mistakes)
    for sentence, line in zip(mistakes.values(), said, strict=True):
        assert line.startswith(f"visualbert verify: {sentence}")


# Mistakes


@pytest.mark.parametrize("command", ["inspect", "convert", "verify"])
def test_no_checkpoint(command, refused, tmp_path):
    new = tmp_path / "new"
    rest = [new] if command == "convert" else []

    def say(source):
        text = refused(command, source, *rest)
        assert not new.exists()
        return text

    assert say(tmp_path / "none") == f"{tmp_path}/none: no such file or folder"
    assert say("") == "the checkpoint's name is empty; expected a folder or a Hub id"
    for data in (b"x", b"\x89PNG\r\n\x1a\n" + bytes(99)):  # a picture begins as a mapping does
        (tmp_path / "file").write_bytes(data)
        assert say(tmp_path / "file") == (
            f"{tmp_path}/file: none of the formats that are read: torch's (zip or older), "
            "safetensors, HDF5, msgpack, a tar archive, or a TensorFlow checkpoint (give its name "
            "without .index)"
        )
    (tmp_path / "empty").mkdir()
    empty = say(tmp_path / "empty")
    assert empty.startswith(f"{tmp_path}/empty: no weights found; ") or (
        empty == f"{tmp_path}/empty/config.json: no such file; a checkpoint folder needs one"
    )
    broken = checkpoint(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    assert say(broken).startswith(f"{broken}/config.json: not readable as JSON: ")
    edit = {"hidden_size": 770}
    (broken / "config.json").write_text(json.dumps(edit))
    assert say(broken) == (
        f"{broken}/config.json: hidden_size=770 must be a multiple of num_attention_heads=12"
    )
    (broken / "config.json").unlink()
    assert say(broken) == f"{broken}/config.json: no such file; a checkpoint folder needs one"
    nameless = checkpoint(tmp_path / "nameless")
    edit_config(nameless, architectures=[])
    assert say(nameless) == (
        f"{nameless}: config.json names no architecture; load it with the class you mean, or pass "
        "--architecture on the command line"
    )
    edit_config(nameless, architectures=["BertModel"])
    assert say(nameless).startswith("unknown architecture 'BertModel'; expected one of ")
    cut = checkpoint(tmp_path / "cut")
    os.truncate(cut / WEIGHTS, 3000)
    assert say(cut).startswith(f"{cut}/{WEIGHTS}: not a whole safetensors file (")
    absurd = checkpoint(tmp_path / "absurd")
    (absurd / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert say(absurd).startswith(f"{absurd}/{WEIGHTS}: not a whole safetensors file (")


def test_malicious_pickle(refused, source, tmp_path):
    import torch

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/canary",)

    (source / WEIGHTS).unlink()
    torch.save({"cls.bias": Evil()}, source / "pytorch_model.bin")
    for command in (["inspect", source], ["convert", source, tmp_path / "new"]):
        text = refused(*command)
        assert text.startswith(f"{source}/pytorch_model.bin: refused, because it is not weights")
    assert not (tmp_path / "canary").exists() and not (tmp_path / "new").exists()


def test_targets(refused, source, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert refused("convert", source, tmp_path / "file") == (
        f"{tmp_path}/file is a file; DST must be a folder"
    )
    below = tmp_path / "file" / "below"
    assert refused("convert", source, below).startswith(f"cannot write {below}: ")
    assert refused("convert", source, "/proc/x/y").startswith("cannot write /proc/x/y: ")
    assert "File name too long" in refused("convert", source, tmp_path / ("x" * 300))
    new = tmp_path / "new" / "deep"
    for options, sentence in (
        (["--seed", "-1"], "seed=-1 must be an integer from 0 up"),
        (["--set", "=1"], "--set '=1' is not of the form KEY=VALUE"),
    ):
        assert refused("convert", source, new, *options) == sentence
    assert sorted(os.listdir(tmp_path)) == ["file", "source"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("to", ["safetensors", "bin", "keras", "flax"])
def test_full_disk(to, refused, source, tmp_path, monkeypatch):
    target = checkpoint(tmp_path / "target", PRETRAINING)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    text = refused("convert", source, target, "--to", to, "--force")
    assert text.startswith(f"cannot write {target}: it needs 0.1 MB and the disk has 0.0 MB left; ")
    assert f"cannot write {tmp_path}/new/x: " in refused("convert", source, tmp_path / "new" / "x")
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


def test_hub(source):
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(source / "cache")}
    done = process("inspect", "uclanlp/visualbert-vqa", env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "visualbert inspect: uclanlp/visualbert-vqa: no such folder here, and the Hub did not give "
        "it (it cannot be reached, and nothing is in the cache); check the name and the "
        "connection, or pass a local folder\n"
    )


def test_interrupt_and_memory(run, source, monkeypatch):
    from visualbert.cli import inspect

    for error, status, sentence in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("8 GiB for an array"), 2, "not enough memory (8 GiB for an array)"),
        (OSError(5, "Input/output error"), 2, "[Errno 5] Input/output error"),
    ):

        def fail(args, error=error):
            raise error

        monkeypatch.setattr(inspect, "run", fail)
        assert run("inspect", source) == (status, "", f"visualbert inspect: {sentence}\n")


# As a process


def test_tensorflow_keeps_quiet(source, tmp_path):
    done = process("convert", source, tmp_path / "keras", "--to", "keras")
    assert (done.returncode, done.stderr) == (0, "")
    code = (
        "from visualbert.cli import common\nimport os, visualbert.backend\n"
        "def broken(name): os.write(2, b'the reason'); raise ImportError\n"
        "visualbert.backend.get_backend = broken\ncommon.load_backend('tf')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("the reason")


def test_closed_and_narrow_streams(source):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "wide"}
    done = process("convert", source, source.parent / "ascii", env=env)
    assert done.returncode == 0 and f"{source} \\u2192 {source.parent}/ascii" in done.stdout
    done = process("inspect", source, "--schema", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "visualbert", "inspect", str(source), "--schema"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    convert = f"{sys.executable} -m visualbert convert {source} {source.parent}/closed"
    for i, redirect in enumerate(("2>&-", ">&-", ">&- 2>&-")):
        done = subprocess.run(f"{convert}{i} --to bin {redirect}", shell=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")


def test_control_c(source, tmp_path):
    """In the middle of a conversion: 130, one word, and nothing at the target."""
    code = (
        "import os, signal, sys\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGINT)\n"
        "from visualbert.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    for to in ("safetensors", "bin", "keras"):
        options = ["convert", source, tmp_path / "a" / "b", "--to", to]
        command = [sys.executable, "-c", code, *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (130, "visualbert convert: interrupted\n")
        assert os.listdir(tmp_path) == ["source"]
