"""Prove from their text alone that the three modeling files are twins, line by line.

A file is reduced to the lines that it must share with its twins: classes and bases, names, class
attributes and what constructors assign, signatures, calls, docstrings, shape comments, each list in
order. `PERMITTED` rewrites what one framework needs into a common form; then the lists must be
equal. A row that makes no difference is itself reported, so that the table holds no more than is
needed. The backend classes must have the methods of the protocol in `visualbert/backend.py`.

    python tools/check_parallel.py
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

MODELING = {name: f"visualbert/{name}/modeling.py" for name in ("pt", "tf", "flax")}
BACKENDS = {name: f"visualbert/{name}/backend.py" for name in MODELING}
PROTOCOL = "visualbert/backend.py"


class Permit(NamedTuple):
    """In `file`, where `rule` looks at `where`, the text `here` stands for `common`.

    Rule, where and here are regular expressions. A line of which nothing remains is left out. The
    rule "source" rewrites the file before it is read.
    """

    file: str
    rule: str
    where: str
    here: str
    common: str
    reason: str


LEAVES = "Linear|Embedding|LayerNorm"

# fmt: off
PERMITTED = tuple(Permit(file, *row) for files, *row in (
    ("tf", "source", "", r"\bTF(?=VisualBert)", "", "prefix of the public classes"),
    ("flax", "source", "", r"\bFlax(?=VisualBert)", "", "prefix of the public classes"),
    ("tf", "source", "", r"\bdef call\(", "def forward(", "Keras's name of the forward method"),
    ("flax", "source", "", r"\bdef __call__\(", "def forward(", "NNX's name of the forward method"),
    ("tf", "source", "", r"\bself\.output_\b", "self.output", "`output` is reserved in Keras"),
    ("tf", "source", "", r"\bops\.", "torch.", "alias of the operations"),
    ("flax", "source", "", r"\bjnp\.", "torch.", "alias of the operations"),

    ("pt", "classes", "", r"\bnn\.Module", "Module", "base class"),
    ("flax", "classes", "", r"\bnnx\.Module", "Module", "base class"),
    ("tf", "classes", "", r"\bkeras\.Model\b", "Module", "base class"),
    ("tf", "classes", "", r"^Module\(keras.*", "", "base class: builds its children"),
    ("pt tf flax", "classes", "", rf"^({LEAVES})\(.*", r"\1", "leaves: the framework's own"),
    ("pt tf flax", "methods|submodules", LEAVES, ".+", "", "leaves: the framework's own"),
    ("pt tf flax", "classes|names", "", r"^Dropout\b.*", "", "leaves: the framework's own"),

    ("tf", "names", "", r"^(Input|Usage)Error\..*", "", "keeps Keras from rewording our errors"),
    ("tf", "names", "", r"^gelu\(.*", "", "Keras's exact form is not exact in float64"),
    ("tf", "names", "", r"^(_replay|.* replayed\(.*)", "", "recomputation needs the same dropout"),
    ("flax", "names", "", r"^module_options\(.*", "", "NNX passes its options down"),
    ("flax", "classes", "", r"^Keys\(\)", "", "NNX passes its options down"),
    ("tf flax", "names", "", r"^unwritten\(.*", "", "torch.empty needs no such function"),
    ("pt", "names", "", r"^(as_(?:tensor|index|packing)\(\w+), device", r"\1",
     "torch tensors live on a device"),
    ("tf flax", "calls", "SelfAttention.forward", r"^plain_attention\(.*", "",
     "fused attention on a CPU is torch's"),
    ("pt", "calls", r"VisualBertModel\.flash", r"^flash_serves\(\)", "",
     "flash attention is torch's"),
    ("pt", "calls", "SelfAttention.forward", r"^attend_apart\(\)", "",
     "each example can attend to itself, where shapes need not be static"),
    ("pt", "calls", r"VisualBertModel\.(kept_apart|row_step)",
     r"^(flash|row_step|make_stretches)\(\)", "",
     "each example can attend to itself, where shapes need not be static"),
    ("pt", "docstrings", r"VisualBertModel\.(kept_apart|row_step)",
     "^Where each example can .*", "",
     "each example can attend to itself, where shapes need not be static"),
    ("pt", "calls", r"LMPredictionHead\.forward", r"^linear\(\)", "",
     "PyTorch's own product is not the fastest that it has"),
    ("pt", "calls", "values", r"^look\(\)", "", "torch functions may be transformed"),

    ("tf flax", "methods|names", ".*", r", \*\*kw", "", "constructor extras"),
    ("pt", "submodules", ".*", r"\b([A-Z]\w+|classifier)(\(config[^()]*)\)",
     r"\1\2, **extras)", "constructor extras"),
    ("flax", "submodules", ".*", r", \*\*kw\)", ", **extras)", "constructor extras"),
    ("tf", "submodules", ".*", r"\b(\w+) = (.*), name='\1', \*\*kw\)", r"\1 = \2, **extras)",
     "constructor extras; the name makes the path"),
    ("pt", "submodules", "Encoder", r"nn\.ModuleList\((.*)\)", r"\1", "list type"),
    ("flax", "submodules", "Encoder", r"nnx\.List\((.*)\)", r"\1", "list type"),
    ("tf", "submodules", "Encoder", r"name=f'layer\.{i}', \*\*kw(.*) for i ", r"**extras\1 for _ ",
     "list type"),
    ("pt tf flax", "submodules", "LMPredictionHead", "^(bias|vocab_size) = .*", "",
     "a bare parameter, which Keras makes in `build`"),
    ("pt", "submodules|methods|calls", r"SelfAttention(\.forward)?",
     r"^fused( = |_attention\().*", "", "fused attention on a CPU is torch's"),
    ("pt flax", "submodules|calls", r"SelfAttention(\.project)?", r"^joint(: Any = |\().*", "",
     "TensorFlow runs the three products side by side"),
    ("tf", "submodules", "SelfAttention", "^head_size = .*", "", "keeps the shape static"),
    ("pt tf flax", "submodules", "PreTrainedModel", r"^(framework = ).*", r"\1", "its own name"),

    ("tf", "methods", ".*", r"^build\(self, input_shape=None\)", "", "Keras's `build`"),
    ("tf", "methods", "PreTrainedModel", r"^(__call__|initialise)\(.*", "", "Keras's `build`"),
    ("tf", "methods", "PreTrainedModel",
     r"^(compute_loss|compute_metrics|train_step|test_step|labelled|compared|without_loss)\(.*", "",
     "Keras's `fit`"),
    ("tf", "methods", "PreTrainedModel",
     r"^(export|serving_signature|get_config|.* from_config)\(.*", "",
     "Keras's file formats"),
    ("tf", "methods|calls", ".*", r", training(=None)?\)$", ")", "train/eval convention"),
    ("tf", "calls", r"Encoder\.run", r"^replayed\(\)", "", "recomputation needs the same dropout"),
    ("pt", "methods", "PreTrainedModel", ", gradient_checkpointing_kwargs=None", "",
     "keyword of transformers' Trainer"),
    ("pt", "methods", "PreTrainedModel", r"^activation_checkpointing_enable\(.*", "",
     "name in transformers' Trainer"),
    ("pt flax", "methods", "PreTrainedModel", r"^@property (device|dtype)\(self\)", "",
     "Keras has its own dtype, torch alone a device"),

    ("pt tf flax", "docstrings", "", "^(VisualBERT in|Twin of) .*", "", "its own name"),
    ("tf flax", "docstrings", "Linear", "x @ kernel", "x @ weight.T", "leaves' own layout"),
    ("tf flax", "docstrings", "LayerNorm", "; two-pass variance", "",
     "not the frameworks' default"),
    ("tf flax", "docstrings", "VisualBertModel", "^(dtype|param_dtype|name|rngs): .*", "",
     "constructor extras"),
    ("tf", "docstrings", "VisualBertModel", "the model unbuilt", "the memory unwritten",
     "Keras's `build`"),
    ("pt flax", "docstrings", r"PreTrainedModel\.dtype", ".+", "", "NNX has two dtypes"),
    ("pt tf flax", "docstrings", r"as_tensor|as_index|as_packing|PreTrainedModel\.edge",
     r"\b(an? )?(tensor|array)", "tensor", "what the framework calls an array"),
    ("pt", "docstrings", r"as_tensor|PreTrainedModel\.edge", " on (`device`|the model's device)",
     "", "torch tensors live on a device"),
    ("flax", "docstrings", r"PreTrainedModel\.gradient_checkpointing_enable",
     "for the backward pass", "in training", "train/eval convention"),
    ("pt", "shapes", "gather", "^B E H$", "", "torch's gather wants the whole index"),
) for file in files.split())
# fmt: on


class Line(NamedTuple):
    """What a file says, and the number of the line that says so."""

    text: str
    number: int


Place = ast.ClassDef | ast.FunctionDef
# (rule, where) -> lines; where is "" for the file, else `Class`, `Class.method` or `function`.
Outline = dict[tuple[str, str], list[Line]]
# A shape: all of a shape comment, and what stands in brackets in a docstring, `(B, T+V)`.
SHAPES = {"shapes": r".+", "docstrings": r"\([A-Z](?:\W[^a-z)]*)?\)"}


@cache
def outline(source: str) -> Outline:
    """Every line of a file that its twins must share."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
    classes = {c.name: c for c in tree.body if isinstance(c, ast.ClassDef)}
    functions = {f.name: f for f in functions_of(tree)}
    methods = {f"{c}.{f.name}": f for c, node in classes.items() for f in functions_of(node)}
    found: Outline = {
        ("classes", ""): [
            Line(f"{name}({', '.join(map(ast.unparse, node.bases))})", node.lineno)
            for name, node in classes.items()
        ],
        ("names", ""): list(module_names(tree)),
    }
    for name, node in classes.items():
        found["submodules", name] = list(attributes(node))
        found["methods", name] = [Line(signature(f), f.lineno) for f in functions_of(node)]
    shared = {*functions, *imports_from_package(tree)}
    for name, function in (methods | functions).items():
        if not name.endswith("__init__"):
            found["calls", name] = list(calls(function, shared))
    places: dict[str, Place] = {**classes, **functions, **methods}
    for name, place in {"": tree, **places}.items():
        found["docstrings", name] = list(sentences(place))
        found["shapes", name] = []
    for line in shape_comments(source):
        found["shapes", innermost(places, line.number)].append(line)
    return found


def functions_of(node: ast.Module | ast.ClassDef) -> list[ast.FunctionDef]:
    return [f for f in node.body if isinstance(f, ast.FunctionDef)]


def imports_from_package(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("visualbert."):
            yield from (alias.name for alias in node.names)


def signature(node: ast.FunctionDef) -> str:
    """Decorators, name, parameters and defaults; types are the framework's own."""
    decorators = "".join(f"@{ast.unparse(d)} " for d in node.decorator_list)
    return f"{decorators}{node.name}({ast.unparse(node.args)})"


def module_names(tree: ast.Module) -> Iterator[Line]:
    """Functions, and what is assigned outside of classes; of a table its keys."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield Line(signature(node), node.lineno)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            keys = node.value.keys if isinstance(node.value, ast.Dict) else []
            table = "".join(f"[{ast.unparse(key)}]" for key in keys if key)
            yield Line(ast.unparse(target) + table, node.lineno)


def attributes(node: ast.ClassDef) -> Iterator[Line]:
    """What the class assigns, and what its constructor does to `self`, under which condition."""
    for statement in node.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            yield Line(ast.unparse(statement), statement.lineno)
        elif isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            for above, text, number in statements(statement.body):
                if text.startswith("self."):
                    yield Line(above + text.removeprefix("self."), number)


def statements(body: Iterable[ast.stmt], above: str = "") -> Iterator[tuple[str, str, int]]:
    """The headers that a simple statement stands under, its text and its line."""
    for node in body:
        text = ast.unparse(node)
        head = f"{above}{text.splitlines()[0]} "
        if not hasattr(node, "body"):
            yield above, text, node.lineno
        yield from statements(getattr(node, "body", []), head)
        yield from statements(getattr(node, "orelse", []), head + "else: ")


def calls(node: ast.AST, shared: set[str]) -> Iterator[Line]:
    """In the order of evaluation: `self.X(…)` with arguments, shared functions with keywords."""
    for child in ast.iter_child_nodes(node):
        yield from calls(child, shared)
    if isinstance(node, ast.Call):
        callee = ast.unparse(node.func)
        if re.fullmatch(r"self\.\w+", callee):
            yield Line(ast.unparse(node).removeprefix("self."), node.lineno)
        elif callee in shared:
            yield Line(f"{callee}({', '.join(k.arg or '**' for k in node.keywords)})", node.lineno)


def sentences(node: ast.Module | Place) -> Iterator[Line]:
    """The docstring, however it is wrapped."""
    text = " ".join((ast.get_docstring(node) or "").split())
    yield from (Line(part, node.body[0].lineno) for part in re.split(r"(?<=\.) ", text) if part)


def shape_comments(source: str) -> Iterator[Line]:
    """Comments behind code that have no lower-case word: `B T H`."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip():
            text = token.string.lstrip("# ")
            if not re.search(r"\b[a-z]", text):
                yield Line(text, token.start[0])


def innermost(places: Mapping[str, Place], number: int) -> str:
    """The smallest definition around a line."""
    around = [n for n, p in places.items() if p.lineno <= number <= (p.end_lineno or 0)]
    return max(around, key=lambda name: places[name].lineno, default="")


@cache
def applies(row: Permit, rule: str, where: str) -> bool:
    """Whether `row` is about this list of lines."""
    return bool(re.fullmatch(row.rule, rule) and re.fullmatch(row.where, where))


def rewritten(text: str, rows: Iterable[Permit]) -> str:
    """`text` as the three files share it."""
    for row in rows:
        text = re.sub(row.here, row.common, text)
    return text


def common_forms(sources: Mapping[str, str], rows: Sequence[Permit]) -> dict[str, Outline]:
    """What each modeling file must share, by framework."""
    forms: dict[str, Outline] = {}
    for file, path in MODELING.items():
        own = [row for row in rows if row.file == file]
        source = rewritten(sources[path], [row for row in own if row.rule == "source"])
        form = forms[file] = {}
        for key, lines in outline(source).items():
            apt = [row for row in own if applies(row, *key)]
            form[key] = [Line(t, n) for text, n in lines if (t := rewritten(text, apt))]
    return forms


def differences(sources: Mapping[str, str], permitted: Sequence[Permit] = PERMITTED) -> list[str]:
    """Where TensorFlow and Flax depart from PyTorch.

    A class, method or function that one of them lacks is reported by name, not by its contents.
    """
    forms = common_forms(sources, permitted)
    expected = forms.pop("pt")
    found: list[str] = []
    for key, lines in expected.items():
        for file, form in forms.items():
            if key in form:
                found += departures(key, lines, MODELING["pt"], form[key], MODELING[file])
    return found


def departures(
    key: tuple[str, str], expected: Sequence[Line], path: str, found: Sequence[Line], other: str
) -> Iterator[str]:
    """A sentence for every line in which `found`, of `other`, is not `expected`, of `path`."""
    matcher = SequenceMatcher(None, [e.text for e in expected], [f.text for f in found], False)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        if kind != "equal":
            for e, f in zip_longest(expected[i:i_end], found[j:j_end]):
                want = f"{e.text!r} ({path}:{e.number})" if e else f"nothing ({path})"
                have = f"{f.text!r} (line {f.number})" if f else "nothing"
                yield f"{other}: {title(*key)}: expected {want}, found {have}"


def title(rule: str, where: str) -> str:
    return f"{rule} of {where or 'the file'}"


def needless(sources: Mapping[str, str], permitted: Sequence[Permit] = PERMITTED) -> list[str]:
    """Rows of the table without which the files differ no more than with them."""
    known = differences(sources, permitted)
    return [
        f"PERMITTED: no longer needed in {row.file}: {title(row.rule, row.where)}: "
        f"{row.here!r} for {row.common!r} ({row.reason})"
        for row in permitted
        if differences(sources, [other for other in permitted if other is not row]) == known
    ]


def unexplained(sources: Mapping[str, str]) -> Iterator[str]:
    """Symbols in the shapes of a file that its legend lacks."""
    for path in MODELING.values():
        legend = (ast.get_docstring(ast.parse(sources[path])) or "").rpartition("\n\n")[2]
        letters = re.findall(r"\b([A-Z])(?:=| [a-z])", legend)
        for key, lines in outline(sources[path]).items():
            for text, number in lines:
                shapes = " ".join(re.findall(SHAPES.get(key[0], "(?!)"), text))
                for symbol in sorted(set(re.findall(r"[A-Z]\w*", shapes)) - set(letters)):
                    yield (
                        f"{path}: {title(*key)}: expected letters of the legend, "
                        f"{' '.join(letters)}, found {symbol!r} in {text!r} (line {number})"
                    )


def backend_departures(sources: Mapping[str, str]) -> list[str]:
    """Where a backend class departs from the public methods of the protocol."""
    expected = backend_methods(sources[PROTOCOL])
    found: list[str] = []
    for path in BACKENDS.values():
        methods = backend_methods(sources[path])
        found += departures(("methods", "the backend"), expected, PROTOCOL, methods, path)
    return found


def backend_methods(source: str) -> list[Line]:
    """Public methods of the class whose name ends with Backend."""
    return [
        line
        for (rule, where), lines in outline(source).items()
        for line in lines
        if rule == "methods" and where.endswith("Backend") and not line.text.startswith("_")
    ]


def problems(sources: Mapping[str, str]) -> list[str]:
    """Everything that is wrong with these files (path -> text), a sentence each."""
    return [
        *differences(sources),
        *needless(sources),
        *unexplained(sources),
        *backend_departures(sources),
    ]


def summary(sources: Mapping[str, str]) -> str:
    """How much was compared."""
    count: Counter[str] = Counter()
    for (rule, _), lines in common_forms(sources, PERMITTED)["pt"].items():
        count[rule] += len(lines)
        count["made"] += sum(rule == "submodules" and " = " in t and "(" in t for t, _ in lines)
        count["functions"] += sum(rule == "names" and "(" in t for t, _ in lines)
    return (
        f"{count['classes']} classes, {count['made']} submodules, {count['methods']} methods and "
        f"{count['functions']} functions compared in {', '.join(MODELING)}; "
        f"{len(backend_methods(sources[PROTOCOL]))} methods in each backend"
    )


def read_sources() -> dict[str, str]:
    """path -> text of every file that is compared."""
    root = Path(__file__).parents[1]
    paths = [*MODELING.values(), *BACKENDS.values(), PROTOCOL]
    return {path: (root / path).read_text(encoding="utf-8") for path in paths}


def main() -> int:
    sources = read_sources()
    found = problems(sources)
    print(*found, summary(sources), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
