"""Lower precision does what it says: int8 layers compute exact integer products of what they
rounded, a position's result depends on nothing but the position, and models in bfloat16 and
float16 run every matrix product in their type, near float32, with a finite loss, in every
framework.
"""

import copy
import functools
import gc
import importlib.util
import io
import itertools
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import BACKENDS, REST, make_model, random_tensors, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

import visualbert
from visualbert import get_backend, load
from visualbert.errors import UsageError
from visualbert.parity import CASES, make_inputs
from visualbert.pretrained import fill
from visualbert.pt.quantized import QuantizedLinear, levels, quantize
from visualbert.schema import ARCHITECTURES, Kind, parameters

ANSWERING = "VisualBertForQuestionAnswering"
PADDED = CASES[1]
TOOL = Path(__file__).parent.parent / "tools" / "measure_precision.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each architecture."""
    found = {}
    for architecture in ARCHITECTURES:
        found[architecture] = tmp_path_factory.mktemp(architecture)
        make_model("pt", architecture, tiny_config()).save_pretrained(found[architecture])
    return found


@pytest.fixture
def model(folders):
    return load(folders[ANSWERING], dtype="int8")


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOL.parent))
    try:
        spec = importlib.util.spec_from_file_location("measure_precision", TOOL)
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    finally:
        sys.path.remove(str(TOOL.parent))
    return found


def call(model, inputs):
    return get_backend("pt").call(model, inputs)


def inputs_of(architecture=ANSWERING, case=PADDED):
    return make_inputs(case, architecture, tiny_config())


def refused(call, *arguments, **keywords):
    with pytest.raises(UsageError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


def linear(in_features=48, out_features=40, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(in_features, out_features)


def rows(in_features=48):
    """Positions of very different sizes, one of them zero."""
    torch.manual_seed(1)
    x = torch.randn(3, 7, in_features) * torch.logspace(-6, 6, 21).reshape(3, 7, 1)
    x[0, 3] = 0
    return x


def by_hand(x, weight, bias, levels=127):
    """The layer in numpy, in float64: round weights by output and activations by position."""
    x, weight, bias = (a.detach().numpy().astype(np.float64) for a in (x, weight, bias))
    scale = np.abs(weight).max(1, keepdims=True) / 127
    largest = np.abs(x).max(-1, keepdims=True)
    whole = np.rint(np.divide(x * levels, largest, where=largest > 0, out=np.zeros_like(x)))
    product = whole @ np.rint(weight / scale).T
    return product * (largest / levels) * scale.T[0] + bias


def error(found, expected):
    """The worst of a position, by the position's size."""
    found = found.detach().numpy().astype(np.float64)
    return (np.abs(found - expected).max(-1) / np.abs(expected).max(-1)).max()


def test_a_layer_is_exact_on_what_it_rounded():
    layer, x = linear(), rows()
    made = QuantizedLinear.of(layer)
    expected = by_hand(x, layer.weight, layer.bias)
    assert made(x).dtype == torch.float32 and made(x).shape == (3, 7, 40)
    assert error(made(x), expected) < 1e-6
    assert 1e-3 < error(made(x), layer(x).detach().numpy()) < 2e-2
    made.scale[5] *= 1.05
    made.load_state_dict(made.state_dict())
    assert error(made(x), expected) > 5e-3
    assert torch.equal(made(torch.zeros(2, 48)), layer.bias.detach().expand(2, -1))


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48), (48,), (1, 48)])
def test_any_number_of_positions(shape):
    layer = linear()
    x = torch.ones(shape)
    found = QuantizedLinear.of(layer)(x)
    assert found.shape == layer(x).shape
    assert torch.allclose(found, layer(x), atol=0.03)


def test_a_position_depends_on_itself_alone():
    made, x = QuantizedLinear.of(linear()), rows()
    together = made(x)
    assert torch.equal(torch.stack([made(row) for row in x.flatten(0, 1)]), together.flatten(0, 1))
    x[2, 6] *= 1e3
    assert torch.equal(made(x).flatten(0, 1)[:-1], together.flatten(0, 1)[:-1])
    assert not torch.equal(made(x)[2, 6], together[2, 6])


def test_what_is_not_finite_shows():
    made, x = QuantizedLinear.of(linear()), rows()[1]
    x[1, 3], x[2, 4], x[4, 0] = float("nan"), float("inf"), -float("inf")
    finite = made(x).isfinite()
    assert finite[[0, 3, 5, 6]].all() and not finite[[1, 2, 4]].any()


def test_several_layers_in_one():
    layers = [linear(seed=seed) for seed in range(3)]
    x = rows()
    alone = torch.cat([QuantizedLinear.of(layer)(x) for layer in layers], -1)
    assert torch.equal(QuantizedLinear.of(*layers)(x), alone)
    mixed = QuantizedLinear.of(QuantizedLinear.of(layers[0]), *layers[1:])
    assert torch.equal(mixed(x), alone) and mixed.out_features == 120


WITHOUT_VNNI = """
import numpy as np, torch
from visualbert.pt.quantized import QuantizedLinear, levels
print(levels())
for size in (768, 40):
    x, weight = torch.ones(20, 48), torch.ones(size, 48)
    x[:10], weight[::2] = -x[:10], -weight[::2]
    made = QuantizedLinear(weight.to(torch.int8) * 127, torch.ones(size) / 127, torch.zeros(size))
    print(float((made(x) - x @ weight.T).abs().max()))
"""


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has nothing to leave out")
@pytest.mark.parametrize(
    "instructions", ["AVX2", pytest.param("AVX512_CORE", marks=pytest.mark.slow)]
)
def test_nothing_overflows_without_vnni(instructions):
    """The largest possible products of both signs: x86 without VNNI adds pairs in 16 bits."""
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_VNNI],
        env={"ONEDNN_MAX_CPU_ISA": instructions, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    first, *errors = found.stdout.split()
    assert (int(first), levels()) == (63, 127)
    assert all(float(x) < 1e-4 for x in errors) and len(errors) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(folders, architecture):
    made, full = (load(folders[architecture], dtype=d) for d in ("int8", "float32"))
    assert type(made) is not type(full) and isinstance(made, type(full))
    for case in CASES[1:3]:
        inputs = inputs_of(architecture, case)
        found, expected = call(made, inputs), call(full, inputs)
        assert set(found) == set(expected)
        for name, x in expected.items():
            visible = x > -1e30
            assert found[name].dtype == x.dtype and found[name].shape == x.shape
            assert np.array_equal(found[name] > -1e30, visible)
            difference = np.abs(found[name] - x)[visible]
            assert 0 < difference.max() < 0.05 * max(1, np.abs(x[visible]).max()), name


def test_only_linear_layers_are_int8(folders, model):
    full = load(folders[ANSWERING]).state_dict()
    state = model.state_dict()
    kinds = {p.name: p.kind for p in parameters(ANSWERING, model.config)}
    for name, kind in kinds.items():
        if kind is Kind.LINEAR:
            assert state[name].dtype == torch.int8 and state[name].shape == full[name].shape
            back = state[name] * state[name.replace("weight", "scale")][:, None]
            step = full[name].abs().amax(1, keepdim=True) / 127
            assert ((back - full[name]).abs() <= step / 2 * (1 + 1e-5)).all()
        else:
            assert torch.equal(state[name], full[name])
    scales = {name.replace("weight", "scale") for name in kinds if kinds[name] is Kind.LINEAR}
    assert set(state) == set(kinds) | scales
    assert "(query): QuantizedLinear(in_features=24, out_features=24, dtype=int8)" in repr(model)
    assert repr(model).startswith(f"{ANSWERING}(")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_from_any_floating_type(folders, tmp_path, dtype):
    load(folders[ANSWERING], dtype=dtype).save_pretrained(tmp_path)
    made = load(tmp_path, dtype=torch.int8)
    assert {x.dtype for x in made.parameters()} == {torch.float32} == {made.dtype}
    inputs = inputs_of()
    same = quantize(load(tmp_path, dtype="float32"))
    assert np.array_equal(call(made, inputs)["logits"], call(same, inputs)["logits"])


def test_float_weights_are_dropped(folders):
    full = load(folders[ANSWERING])
    weights = [weakref.ref(x.weight) for x in full.modules() if isinstance(x, torch.nn.Linear)]
    assert len(weights) == 15 and all(ref() is not None for ref in weights)
    quantize(full)
    gc.collect()
    assert all(ref() is None for ref in weights)


MEMORY = """
import pathlib, sys
import visualbert
def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
for folder in sys.argv[1:]:
    before = peak()
    model = visualbert.load(folder, dtype="int8")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is not told here")
@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.6), ("float16", 1.2)])
def test_one_layer_at_a_time(folders, tmp_path, dtype, share):
    """Int8 weights take a quarter or a half of the file; float32 ones would take all of it or twice
    that.
    """
    config = tiny_config(hidden_size=768, intermediate_size=3072, num_hidden_layers=5)
    made = visualbert.VisualBertModel(config)
    made.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, folders[ANSWERING], tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 70e6
    assert 0.2 * size < int(found.stdout) < share * size


def test_counts(folders, model):
    full = load(folders[ANSWERING])
    for ours, theirs in ((model, full), (model.visual_bert, full.visual_bert)):
        for exclude in (False, True):
            count = theirs.num_parameters(exclude_embeddings=exclude)
            assert ours.num_parameters(exclude_embeddings=exclude) == count > 0


def test_copies(model):
    expected = call(model, inputs_of())["logits"]
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for made in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stored, weights_only=False),
    ):
        assert type(made) is type(model) and made is not model
        assert np.array_equal(call(made, inputs_of())["logits"], expected)
        assert "cannot be trained" in refused(made.train)


def test_state(folders, model):
    other = make_model(
        "pt", ANSWERING, tiny_config(), tensors=random_tensors(ANSWERING, tiny_config(), 7)
    )
    float_state = other.state_dict()
    before = call(quantize(other), inputs_of())["logits"]
    with pytest.raises(RuntimeError) as caught:
        other.load_state_dict(float_state)
    text = str(caught.value)
    assert (
        "cls.weight is torch.float32 of shape (5, 24), expected torch.int8 of shape (5, 24)" in text
    )
    assert '"cls.scale"' in text and "Unexpected" not in text
    expected = call(model, inputs_of())["logits"]
    assert not np.allclose(before, expected, atol=0.1)
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored))
    assert np.array_equal(call(other, inputs_of())["logits"], expected)


def test_what_an_int8_model_is_not_for(model, tmp_path):
    before = call(model, inputs_of())["logits"]
    stays = (
        "a model in int8 stays on the CPU, and in float32 where it is not int8; load it in float32 "
        "there"
    )
    for part in (model, model.visual_bert):
        assert (
            refused(part.train) == "a model in int8 cannot be trained; load it in float32 for that"
        )
        for change in (part.half, part.bfloat16, part.double):
            assert refused(change) == stays
        assert refused(part.to, torch.float16) == refused(part.to, "meta") == stays
        assert part.eval() is part.float() is part.to("cpu") is part.train(False) is part
    kept = (
        "a model in int8 is neither saved nor filled, as its weights are rounded; use the "
        "checkpoint that it was loaded from"
    )
    assert refused(model.save_pretrained, tmp_path / "a") == kept
    assert not (tmp_path / "a").exists()
    assert refused(fill, get_backend("pt"), model, random_tensors(ANSWERING, model.config)) == kept
    gradients = "a model in int8 has no gradients; load it in float32 for that"
    inputs = inputs_of()
    features = torch.tensor(inputs["visual_embeds"], requires_grad=True)
    assert refused(model, **{**inputs, "visual_embeds": features}) == gradients
    assert not model(**inputs).loss.requires_grad
    model.requires_grad_(True)
    assert refused(model, **inputs) == gradients
    assert np.array_equal(call(model, inputs)["logits"], before)
    assert not model.training and model.dtype == torch.float32


def test_who_has_no_int8(folders):
    for backend in ("tf", "flax"):
        assert refused(load, folders[ANSWERING], backend, dtype="int8") == (
            f"dtype='int8' is for PyTorch on a CPU, not for backend {backend!r}; load the model "
            "with backend 'pt', or in bfloat16"
        )
    assert refused(load, folders[ANSWERING], dtype="int4") == (
        "dtype 'int4' is not one of float64, float32, float16, bfloat16, int8"
    )
    elsewhere = load(folders[ANSWERING]).to("meta")
    assert refused(quantize, elsewhere) == (
        "dtype='int8' is for the CPU, and the model is on meta; use bfloat16 or float16 there"
    )
    assert type(elsewhere) is visualbert.VisualBertForQuestionAnswering
    made = visualbert.VisualBertForQuestionAnswering.from_pretrained(
        folders[ANSWERING], torch_dtype="int8"
    )
    assert quantize(made) is made


def test_predictor_and_pipeline(model):
    expected = call(model, inputs_of())
    found = get_backend("pt").predictor(model)(inputs_of())
    assert np.array_equal(found["logits"], expected["logits"])
    answer = visualbert.pipeline("vqa", dtype="int8")
    image = Path(visualbert.__file__).parent / "scenes" / "example.png"
    question = "how many digits are there?"
    first, second = answer(image, question), visualbert.pipeline("vqa")(image, question)
    assert first.answer == second.answer
    assert first.answers[0].probability != second.answers[0].probability


def test_compiled(model):
    inputs = {name: torch.as_tensor(x) for name, x in inputs_of().items()}
    expected = model(**inputs).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs).logits, expected, atol=1e-5)


def test_the_measure_sees_a_wrong_scale(folders, model, tool):
    """Five percent in one layer must stand above what int8 itself costs."""
    batches = [make_inputs(PADDED, ANSWERING, tiny_config(), seed) for seed in range(8)]
    for inputs in batches:
        del inputs["labels"]
    task = tool.Task("tiny", str(folders[ANSWERING]), batches, None)
    reference = tool.run("pt", "float32", task)
    assert tool.compare(reference, reference) == (1.0, 0.0, 0.0)
    int8 = tool.compare(tool.run("pt", "int8", task), reference)
    assert 0 < int8.mean < int8.worst < 0.1
    state = model.state_dict()
    state["visual_bert.encoder.layer.1.output.dense.scale"] *= 1.05
    model.load_state_dict(state)
    predict = get_backend("pt").predictor(model)
    wrong = tool.compare(np.concatenate([predict(x)["logits"] for x in batches]), reference)
    assert wrong.mean > 2 * int8.mean
    printed = list(tool.rows(task, reference, ("pt",), ("float32", "int8")))
    assert printed[0] == ("pt", "float32", "", "100.00%", "0.0e+00", "0.0e+00")
    assert printed[1][4:] == (f"{int8.worst:.1e}", f"{int8.mean:.1e}")


class Products(TorchDispatchMode):
    """Notes the types that go into matrix products and fused attention."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm") or "attention" in name:
            self.types |= {
                str(x.dtype).removeprefix("torch.")
                for x in args
                if isinstance(x, torch.Tensor) and x.is_floating_point()
            }
        return function(*args, **(kwargs or {}))


def products_pt(model, inputs):
    with torch.no_grad(), Products() as found:
        model(**inputs)
    return found.types


def products_tf(model, inputs):
    import tensorflow as tf

    names = ("MatMul", "BatchMatMulV2", "Einsum")
    tensors = {name: tf.constant(x) for name, x in inputs.items()}
    graph = tf.function(lambda x: model(**x)).get_concrete_function(tensors).graph
    graphs = [graph, *graph._functions.values()] if hasattr(graph, "_functions") else [graph]
    operations = [op for g in graphs for op in getattr(g, "graph", g).get_operations()]
    return {x.dtype.name for op in operations if op.type in names for x in op.inputs}


def products_flax(model, inputs):
    import jax

    found = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.update(x.aval.dtype.name for x in equation.invars)
            for inner in jax.core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(lambda x: model(**x).to_tuple())(inputs).jaxpr)
    return found


PRODUCTS = {"pt": products_pt, "tf": products_tf, "flax": products_flax}


@pytest.fixture(scope="module")
def full():
    """What a framework gives in float32."""

    @functools.cache
    def outputs(backend, architecture, case):
        model = make_model(backend, architecture, tiny_config())
        return get_backend(backend).call(model, inputs_of(architecture, case))

    return outputs


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_are_seen(backend):
    model = make_model(backend, ANSWERING, tiny_config())
    assert PRODUCTS[backend](model, inputs_of()) == {"float32"}


HALVES = [("bfloat16", "sdpa", 0.03), ("float16", "eager", 0.004)]
SWAPPED = [("bfloat16", "eager", 0.03), ("float16", "sdpa", 0.004)]
QUICK = ("VisualBertForPreTraining", "VisualBertForRegionToPhraseAlignment")


def halves():
    """Every backend with every architecture; the ones that compile long are slow tests."""
    kinds = [*((architecture, HALVES) for architecture in ARCHITECTURES), (ANSWERING, SWAPPED)]
    for backend, (architecture, kind) in itertools.product(BACKENDS, kinds):
        later = backend != "pt" and architecture not in QUICK
        yield pytest.param(backend, architecture, kind, marks=REST if later else ())


@pytest.mark.parametrize(("backend", "architecture", "kinds"), halves())
def test_half_precision(backend, architecture, kinds, full):
    """Near float32, and not float32 in disguise; padding on either side."""
    for case, (dtype, attention, bound) in zip(CASES[1:3], kinds, strict=True):
        expected, inputs = full(backend, architecture, case), inputs_of(architecture, case)
        config = tiny_config(attn_implementation=attention)
        model = make_model(backend, architecture, config, dtype)
        assert PRODUCTS[backend](model, inputs) == {dtype}
        found = get_backend(backend).call(model, inputs)
        assert set(found) == set(expected)
        for name, x in found.items():
            assert x.dtype.name == ("float32" if name == "loss" else dtype)
            visible = expected[name] > -1e30
            x, y = (a.astype(np.float64)[visible] for a in (x, expected[name]))
            assert np.isfinite(x).all()
            assert 0 < np.abs(x - y).max() < bound * max(1, np.abs(y).max()), name
