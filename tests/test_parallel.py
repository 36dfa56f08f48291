"""The three modeling files are twins, and the check that says so sees every kind of departure."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "check_parallel.py"
PT, TF, FLAX = (f"visualbert/{name}/modeling.py" for name in ("pt", "tf", "flax"))
TF_BACKEND, FLAX_BACKEND = "visualbert/tf/backend.py", "visualbert/flax/backend.py"

spec = importlib.util.spec_from_file_location("check_parallel", TOOL)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture(scope="module")
def sources():
    return tool.read_sources()


def edited(sources, path, old, new):
    """`sources` with the first `old` of `path` replaced."""
    assert old in sources[path], f"{path} no longer has {old!r}: write this control anew"
    return sources | {path: sources[path].replace(old, new, 1)}


def swapped(sources, path, first, second):
    """`sources` with two definitions, `name` or `Class.name`, in each other's place."""
    text = sources[path]
    a, b = (ast.get_source_segment(text, definition(ast.parse(text), n)) for n in (first, second))
    return sources | {path: text.replace(a, "\0").replace(b, a).replace("\0", b)}


def definition(tree, name):
    for part in name.split("."):
        tree = next(node for node in tree.body if getattr(node, "name", None) == part)
    return tree


def reported(found, path, title):
    """Whether a sentence of `found` is about `title` in `path`."""
    return any(sentence.startswith(f"{path}: {title}: expected ") for sentence in found)


def test_the_files_are_twins(sources):
    assert tool.problems(sources) == []


def test_without_problems_the_tool_says_how_much_it_compared(sources, monkeypatch, capsys):
    monkeypatch.setattr(tool, "problems", lambda sources: [])
    assert tool.main() == 0
    said = re.fullmatch(
        r"(\d+) classes, (\d+) submodules, (\d+) methods and (\d+) functions compared in "
        r"pt, tf, flax; (\d+) methods in each backend\n",
        capsys.readouterr().out,
    )
    assert said
    assert all(int(n) >= least for n, least in zip(said.groups(), (20, 50, 40, 8, 7), strict=True))


def test_the_tool_fails_on_every_kind_of_problem(sources, monkeypatch, capsys):
    broken = sources | {TF: sources[TF].replace("self.output_", "self.output")}
    broken = edited(broken, TF, "  # B S H", "  # B S Q")
    broken = edited(broken, TF, "self.seq_relationship = ", "self.match = ")
    broken = edited(broken, TF_BACKEND, "def pull(self, variable:", "def pull(self, handle:")
    monkeypatch.setattr(tool, "read_sources", lambda: broken)
    assert tool.main() == 1
    found = capsys.readouterr().out
    assert f"{TF}: submodules of PreTrainingHeads: expected 'seq_relationship = Linear(" in found
    assert f"{TF}: shapes of Embeddings.call: expected letters of the legend, B C T " in found
    assert f"{TF_BACKEND}: methods of the backend: expected 'pull(self, variable)' " in found
    assert "PERMITTED: no longer needed in tf: source of the file: " in found


def test_a_sentence_says_where_what_was_expected_and_what_was_found(sources):
    fields = "config.hidden_size, config.intermediate_size"
    broken = edited(sources, FLAX, fields, "config.h, 4")
    (sentence,) = set(tool.differences(broken)) - set(tool.differences(sources))
    line, twin = (1 + sources[p][: sources[p].index(fields)].count("\n") for p in (FLAX, PT))
    assert sentence == (
        f"{FLAX}: submodules of Intermediate: expected 'dense = Linear({fields}, **extras)' "
        f"({PT}:{twin}), found 'dense = Linear(config.h, 4, **extras)' (line {line})"
    )


@pytest.mark.parametrize(
    ("path", "first", "second", "title"),
    [
        (TF, "Pooler", "PredictionHeadTransform", "classes of the file"),
        (FLAX, "Intermediate", "Output", "classes of the file"),
        (FLAX, "Embeddings.embed_regions", "Embeddings.aligned_positions", "methods of Embeddings"),
        (
            TF,
            "SelfAttention.split_heads",
            "SelfAttention.plain_attention",
            "methods of SelfAttention",
        ),
        (TF, "gather", "cross_entropy", "names of the file"),
        (FLAX, "joint_mask", "divergence", "names of the file"),
    ],
)
def test_another_order_is_reported(sources, path, first, second, title):
    assert reported(tool.differences(swapped(sources, path, first, second)), path, title)


CONTROLS = {
    "class renamed": (FLAX, "class Pooler(", "class Pool(", "classes of the file"),
    "class added": (
        TF,
        "class Pooler(",
        "class A:\n    pass\n\n\nclass Pooler(",
        "classes of the file",
    ),
    "prefix lost": (TF, "class TFVisualBertModel(", "class VisualBert(", "classes of the file"),
    "base changed": (
        FLAX,
        "class FlaxVisualBertForPreTraining(PreTrainedModel)",
        "class FlaxVisualBertForPreTraining(nnx.Module)",
        "classes of the file",
    ),
    "submodule renamed": (
        TF,
        'self.pooler = Pooler(config, name="pooler"',
        'self.pool = Pooler(config, name="pool"',
        "submodules of VisualBertModel",
    ),
    "submodules swapped": (
        FLAX,
        "self.encoder = Encoder(config, **kw)\n        self.pooler = Pooler(config, **kw)",
        "self.pooler = Pooler(config, **kw)\n        self.encoder = Encoder(config, **kw)",
        "submodules of VisualBertModel",
    ),
    "submodule dropped": (
        FLAX,
        "        self.pooler = Pooler(config, **kw)\n",
        "",
        "submodules of VisualBertModel",
    ),
    "submodule of another class": (
        FLAX,
        "self.predictions = LMPredictionHead(",
        "self.predictions = PredictionHeadTransform(",
        "submodules of PreTrainingHeads",
    ),
    "another config field": (
        TF,
        "config.attention_probs_dropout_prob",
        "config.hidden_dropout_prob",
        "submodules of SelfAttention",
    ),
    "another keyword": (
        TF,
        "eps=config.layer_norm_eps",
        "eps=1e-12",
        "submodules of Embeddings",
    ),
    "condition lost": (
        FLAX,
        "if config.bypass_transformer:",
        "if True:",
        "submodules of VisualBertModel",
    ),
    "Keras name that is not the attribute's": (
        TF,
        'name="transform"',
        'name="transformation"',
        "submodules of LMPredictionHead",
    ),
    "Keras name left out": (TF, 'name="transform", ', "", "submodules of LMPredictionHead"),
    "constructor extras left out": (
        FLAX,
        "self.pooler = Pooler(config, **kw)",
        "self.pooler = Pooler(config)",
        "submodules of VisualBertModel",
    ),
    "architecture changed": (
        FLAX,
        'architecture = "VisualBertForPreTraining"',
        'architecture = "VisualBertModel"',
        "submodules of VisualBertForPreTraining",
    ),
    "default changed": (
        TF,
        "seed: int | None = 0",
        "seed: int | None = 1",
        "methods of VisualBertModel",
    ),
    "parameter dropped": (FLAX, "        position_ids=None,\n", "", "methods of Embeddings"),
    "parameter renamed": (
        TF,
        "(self, phrases, regions",
        "(self, phrase, regions",
        "methods of RegionToPhraseAttention",
    ),
    "method renamed": (TF, "def embed_regions(", "def embed_boxes(", "methods of Embeddings"),
    "forward method by another name": (FLAX, "def __call__(", "def call(", "methods of Embeddings"),
    "function renamed": (FLAX, "def mask_bias(", "def mask_add(", "names of the file"),
    "function with another parameter": (
        TF,
        "def gather(hidden_states, ",
        "def gather(x, ",
        "names of the file",
    ),
    "table without a key": (TF, '    "swish": ops.silu,\n', "", "names of the file"),
    "docstring of a class": (FLAX, "The stack of layers.", "Layers.", "docstrings of Encoder"),
    "docstring of a forward method": (
        TF,
        "; longer than V is cut",
        "",
        "docstrings of VisualBertModel.forward",
    ),
    "docstring dropped": (TF, '    """The stack of layers."""\n', "", "docstrings of Encoder"),
    "legend of one file": (FLAX, "  W words", "  W word pieces", "docstrings of the file"),
    "call dropped": (
        FLAX,
        "self.dropout(self.LayerNorm(embeddings))",
        "self.LayerNorm(embeddings)",
        "calls of Embeddings.forward",
    ),
    "call of another submodule": (
        TF,
        "self.key(hidden_states)",
        "self.query(hidden_states)",
        "calls of SelfAttention.project",
    ),
    "calls in another order": (
        TF,
        "self.LayerNorm(ACTIVATIONS[self.hidden_act](self.dense(hidden_states)))",
        "self.dense(ACTIVATIONS[self.hidden_act](self.LayerNorm(hidden_states)))",
        "calls of PredictionHeadTransform.forward",
    ),
    "arguments swapped": (
        FLAX,
        "self.attention(phrases, regions",
        "self.attention(regions, phrases",
        "calls of VisualBertForRegionToPhraseAlignment.forward",
    ),
    "shared function not called": (
        FLAX,
        "features: Any = require(self.architecture, visual_embeds=visual_embeds)",
        "features: Any = visual_embeds",
        "calls of VisualBertForRegionToPhraseAlignment.forward",
    ),
    "shape comment changed": (
        TF,
        "(first)\n        )  # B V H",
        "(first)\n        )  # B H V",
        "shapes of Embeddings.embed_regions",
    ),
}


@pytest.mark.parametrize(("path", "old", "new", "title"), CONTROLS.values(), ids=CONTROLS)
def test_a_departure_is_reported(sources, path, old, new, title):
    assert reported(tool.differences(edited(sources, path, old, new)), path, title)


@pytest.mark.parametrize("path", [TF, FLAX])
def test_a_change_of_the_first_file_is_reported_in_its_twins(sources, path):
    broken = edited(sources, PT, "self.pooler = Pooler(", "self.pool = Pooler(")
    assert reported(tool.differences(broken), path, "submodules of VisualBertModel")


def test_a_docstring_may_be_wrapped_anew(sources):
    wrapped = edited(sources, TF, "(VCR, paper section 4.2)", "(VCR,\n    paper section 4.2)")
    assert tool.differences(wrapped) == tool.differences(sources)


@pytest.mark.parametrize(
    ("old", "new", "symbol"),
    [
        ("  # B T H", "  # B T Q", "Q"),
        ("  # B T H", "  # B T Hidden", "Hidden"),
        ("(B, V, F) region features", "(B, V, G) region features", "G"),
        ("A aligned positions  ", "", "A"),
    ],
)
def test_a_symbol_without_legend_is_reported_though_all_files_have_it(sources, old, new, symbol):
    broken = sources
    for path in (PT, TF, FLAX):
        broken = edited(broken, path, old, new)
    assert tool.differences(broken) == tool.differences(sources)
    found = list(tool.unexplained(broken))
    assert {sentence.split(":")[0] for sentence in found} == {PT, TF, FLAX}
    assert all(f"found '{symbol}' in" in sentence for sentence in found)


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (TF_BACKEND, "def pull(self, variable:", "def pull(self, handle:"),
        (FLAX_BACKEND, "def gradients(", "def grads("),
        (TF_BACKEND, 'dtype: str = "float32"', 'dtype: str = "float16"'),
        (FLAX_BACKEND, "    def shape(", "    def size(self):\n        ...\n\n    def shape("),
    ],
)
def test_a_backend_that_departs_from_the_protocol_is_reported(sources, path, old, new):
    broken = edited(sources, path, old, new)
    assert reported(tool.backend_departures(broken), path, "methods of the backend")


def test_backend_methods_in_another_order_are_reported(sources):
    broken = swapped(sources, TF_BACKEND, "TensorFlowBackend.pull", "TensorFlowBackend.push")
    assert reported(tool.backend_departures(broken), TF_BACKEND, "methods of the backend")


def test_a_row_of_the_table_that_matches_nothing_is_reported(sources):
    row = tool.Permit("tf", "methods", "Pooler", "^never", "", "made up")
    assert tool.needless(sources, (*tool.PERMITTED, row)) == [
        "PERMITTED: no longer needed in tf: methods of Pooler: '^never' for '' (made up)"
    ]


def test_a_row_is_reported_once_the_files_no_longer_differ_there(sources):
    aligned = edited(sources, FLAX, "nnx.List([", "([")
    aligned = edited(aligned, PT, "nn.ModuleList([", "([")
    found = [sentence.partition(" (")[0] for sentence in tool.needless(aligned)]
    assert found == [
        r"PERMITTED: no longer needed in pt: submodules of Encoder: 'nn\\.ModuleList\\((.*)\\)' "
        r"for '\\1'",
        r"PERMITTED: no longer needed in flax: submodules of Encoder: 'nnx\\.List\\((.*)\\)' "
        r"for '\\1'",
    ]
