"""PyTorch models compile and export in one piece, for any batch, text and regions, padded or
packed; what fits no device is one sentence; a predictor's graphs and laid-out weights change
nothing but the time; and JAX finds on disk what it has compiled before.
"""

import copy
import gc
import io
import re
import subprocess
import sys
import threading
import types
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

# ruff: noqa: E402
from native_helpers import (
    ANSWERS,
    BODY,
    CHOICE,
    HEADS,
    PHRASES,
    PRETRAINING,
    batch,
    difference,
    largest,
    tiny_config,
)
from packing_helpers import error, plan, real
from tiny import REST
from torch.export import Dim

import visualbert
from visualbert import get_backend
from visualbert.errors import InputError, UsageError
from visualbert.outputs import ModelOutput
from visualbert.packing import plan_packing, runs
from visualbert.pt import modeling, stretches
from visualbert.pt.predictor import (
    GRAPHS,
    CudaRecorder,
    Graphs,
    Predictor,
    PrepackedLinear,
    Recording,
    has_layout,
    prepacked,
)
from visualbert.pt.products import _has_product
from visualbert.schema import ARCHITECTURES

LOW = (torch.bfloat16, torch.float16)
ROUNDED = {torch.bfloat16: 1.0, torch.float16: 0.1}  # of logits up to 10; other models: above 2
SIZES = ((7, 9, 6), (9, 8, 10), (16, 12, 7))  # batch, text, regions; packed, several rows
ONE = (1, 9, 6)  # the single question
SHALLOW = {"num_hidden_layers": 1}
gpu = pytest.mark.gpu
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def fresh_compiler_and_one_thread():
    """Operations this small wait for their threads more than they compute."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def build(architecture, kind="padded", seed=0, dtype=torch.float64, **changes):
    """A model that runs the inputs of a kind."""
    settings = {"bypass_transformer": "late" in kind, "sparse_prediction": "sparse" in kind}
    config = tiny_config(**{**settings, **changes})
    return getattr(visualbert, architecture)(config, seed=seed).eval().to(dtype)


def make(architecture, kind, size, text, regions):
    """Inputs of a kind as tensors, and the packing among them."""
    choices = 3 + text % 4 if architecture == CHOICE else 1
    shared = "shared" in kind
    given = batch(
        BODY if architecture == CHOICE else architecture,
        size * choices, text, regions, alignment=not shared, labels=not shared,
    )  # fmt: skip
    if architecture == CHOICE:
        given = {
            k: x[:size] if k.startswith("visual") else x.reshape(size, choices, *x.shape[1:])
            for k, x in given.items()
        } | ({} if shared else {"labels": np.arange(size) % choices})
    if "region_to_phrase_position" in given:
        given["region_to_phrase_position"] %= text - 2  # no padding
    if shared:
        images = size // 2 + 2
        for name in [k for k in given if k.startswith("visual")]:
            given[name] = np.resize(given[name], (images, *given[name].shape[1:]))
        given["image_index"] = np.arange(size) % images
    if architecture == PRETRAINING and not shared:
        seen = np.concatenate([given["attention_mask"], given["visual_attention_mask"]], 1)
        given["labels"] = np.where(seen, given["labels"], -100)
    if "positions" in kind:
        given["positions"] = np.arange(2 * size).reshape(size, 2) % (text - 2)
    packing = None
    if "packed" in kind:
        labels = given.get("labels") if "sparse" in kind else None
        packing = plan(given, "late" in kind, labels=labels, step=8)
    if "bare" in kind:
        given = {k: x for k, x in given.items() if not k.endswith("attention_mask")}
    tensors = {name: torch.as_tensor(x) for name, x in given.items()}
    return tensors | ({} if packing is None else {"packing": packing}), packing


def check(found, model, inputs, packing, other=None):
    """`found` is what `model` gives for the batch with its padding, and not what `other` gives."""
    padded = {k: x for k, x in inputs.items() if k != "packing"}
    with torch.no_grad():
        assert error(found, model(**padded), packing) < 1e-9
        if other is not None:
            assert error(found, other(**padded), packing) > 0.1


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def some(*at_first):
    """Every kind of input with two architectures and every architecture with two kinds, `at_first`
    before the slow run and the second ones not in CI.
    """
    kinds = ("padded", "packed", "packed, late", "shared", "packed, shared", "bare")
    turned = (*ARCHITECTURES[3:], *ARCHITECTURES[:3])
    rows = [(PRETRAINING, "sparse"), (PRETRAINING, "packed, sparse"), (BODY, "packed, positions")]
    rows += zip(ARCHITECTURES, kinds, strict=True)
    marks = dict.fromkeys(zip(turned, kinds, strict=True), REST)
    marks |= dict.fromkeys(rows, (pytest.mark.slow,)) | dict.fromkeys(at_first, ())
    return pytest.mark.parametrize(
        ("architecture", "kind"),
        [pytest.param(*row, marks=chosen) for row, chosen in marks.items()],
    )


class TestCompile:
    @some(
        (ANSWERS, "padded"), (CHOICE, "packed"), (PRETRAINING, "packed, sparse"),
        (PHRASES, "packed, shared"), (BODY, "positions"),
    )  # fmt: skip
    def test_one_graph_for_all_sizes(self, architecture, kind):
        """`backend="eager"` runs the captured graph as it is: what is tested is the capture."""
        model, other = build(architecture, kind), build(architecture, kind, seed=1)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
        with torch.fx.experimental._config.patch(use_duck_shape=False):
            for sizes in SIZES:
                inputs, packing = make(architecture, kind, *sizes)
                with torch.no_grad():
                    found = compiled(**inputs)
                assert type(found) is ModelOutput
                check(found, model, inputs, packing, other)
        assert graphs() == 1

    def test_few_graphs_where_nothing_is_said(self):
        """The first size, all others, and batches of one."""
        model = build(ANSWERS, **SHALLOW)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for sizes, most in ((SIZES[0], 1), (SIZES[1], 2), (SIZES[2], 2), (ONE, 3), (SIZES[1], 3)):
            inputs, _ = make(ANSWERS, "padded", *sizes)
            check(compiled(**inputs), model, inputs, None)
            assert graphs() <= most

    def test_axes_may_be_marked(self):
        model = build(ANSWERS, **SHALLOW)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for sizes in SIZES:
            inputs, _ = make(ANSWERS, "padded", *sizes)
            for name, x in inputs.items():
                for axis in free_axes(name, x):
                    torch._dynamo.mark_dynamic(x, axis)
            check(compiled(**inputs), model, inputs, None)
        assert graphs() == 1

    def test_numpy_goes_in_too(self):
        model = build(ANSWERS, **SHALLOW)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        inputs = batch(ANSWERS)
        assert difference(compiled(**inputs), model(**inputs)) < 1e-9

    @pytest.mark.parametrize("architecture", [BODY, pytest.param(ANSWERS, marks=pytest.mark.slow)])
    def test_optional_outputs_and_missing_inputs(self, architecture):
        model = build(architecture, **SHALLOW)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        inputs, _ = make(architecture, "bare", *SIZES[0])
        asked = inputs | {"output_hidden_states": True, "output_attentions": True}
        del asked["token_type_ids"]
        assert difference(compiled(**asked), model(**asked)) < 1e-9

    @pytest.mark.parametrize("dtype", LOW)
    def test_in_low_precision(self, dtype):
        model, (inputs, _) = build(ANSWERS, **SHALLOW).to(dtype), make(ANSWERS, "padded", *SIZES[0])
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert difference(compiled(**inputs), model(**inputs)) < 1e-3

    @pytest.mark.parametrize(
        ("kind", "backend"),
        [
            ("packed", "eager"),
            pytest.param("packed", "aot_eager", marks=pytest.mark.slow),
            pytest.param("padded", "aot_eager", marks=pytest.mark.slow),
        ],
    )
    def test_a_training_step_has_the_same_gradients(self, kind, backend):
        model, (inputs, _) = build(ANSWERS, kind).train(), make(ANSWERS, kind, *SIZES[0])
        padded = {k: x for k, x in inputs.items() if k != "packing"}
        expected = loss_and_gradients(model, padded)
        compiled = copy.deepcopy(model)
        compiled.compile(fullgraph=True, dynamic=True, backend=backend)
        found = loss_and_gradients(compiled, inputs)
        assert largest(found, expected) < 1e-9
        assert (
            largest(found, loss_and_gradients(build(ANSWERS, kind, seed=1).train(), padded)) > 0.1
        )

    @pytest.mark.parametrize(
        ("architecture", "kind"),
        [
            pytest.param(x, ("padded", "packed")[n % 2], marks=pytest.mark.slow if n < 3 else REST)
            for n, x in enumerate(ARCHITECTURES)
        ],
    )
    def test_inductor_equals_eager(self, architecture, kind, compiler):
        model, other = (build(architecture, kind, seed, torch.float32) for seed in (0, 1))
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        with torch.fx.experimental._config.patch(use_duck_shape=False):
            for sizes in SIZES[:2]:
                inputs, packing = make(architecture, kind, *sizes)
                with torch.no_grad():
                    found = compiled(**inputs)
                    padded = {k: x for k, x in inputs.items() if k != "packing"}
                    assert error(found, model(**padded), packing) < 1e-4
                    assert error(found, other(**padded), packing) > 0.1
        assert graphs() == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_inductor_trains(self, checkpointing, compiler):
        model, (inputs, _) = (
            build(ANSWERS, dtype=torch.float32).train(),
            make(ANSWERS, "padded", *SIZES[0]),
        )
        expected = loss_and_gradients(model, inputs)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.compile(fullgraph=True)
        assert largest(loss_and_gradients(model, inputs), expected) < 1e-4


@pytest.fixture
def compiler():
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as reason:
        pytest.skip(f"no C++ compiler: {reason}")


class TestExport:
    @some((ANSWERS, "padded"), (CHOICE, "padded"), (PRETRAINING, "packed, sparse"))
    def test_one_program_for_all_sizes(self, architecture, kind):
        """Strictly or not, and for the single question too."""
        model, other = build(architecture, kind), build(architecture, kind, seed=1)
        inputs, _ = make(architecture, kind, *SIZES[0])
        shapes = dynamic_shapes(inputs)
        program = torch.export.export(
            model, (), tensors(inputs), dynamic_shapes=shapes, strict=False
        )
        run = reloaded(program).module()
        for sizes in (*SIZES, ONE):
            inputs, packing = make(architecture, kind, *sizes)
            found = run(**tensors(inputs))
            assert type(found) is ModelOutput
            check(found, model, inputs, packing, other)

    @pytest.mark.parametrize(
        "architecture", [ANSWERS, *(pytest.param(x, marks=pytest.mark.slow) for x in HEADS[:2])]
    )
    def test_strictly(self, architecture):
        model, (inputs, _) = build(architecture, **SHALLOW), make(architecture, "padded", *SIZES[0])
        shapes = dynamic_shapes(inputs)
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=True)
        inputs, _ = make(architecture, "padded", *ONE)
        check(program.module()(**inputs), model, inputs, None)

    @pytest.mark.parametrize(
        "architecture",
        [BODY, *(pytest.param(x, marks=pytest.mark.slow) for x in (PRETRAINING, CHOICE, ANSWERS))],
    )
    def test_text_alone(self, architecture):
        model = build(architecture, **SHALLOW)
        inputs = tensors(batch(architecture, *SIZES[0][:2], 0))
        shapes = dynamic_shapes(inputs)
        program = torch.export.export(
            model, (), inputs, dynamic_shapes=shapes, strict=False
        ).module()
        inputs = tensors(batch(architecture, 4, 7, 0))
        assert difference(program(**inputs), model(**inputs)) < 1e-9

    def test_masks_that_are_left_out_are_no_part_of_a_program(self):
        model, (inputs, _) = build(ANSWERS, **SHALLOW), make(ANSWERS, "bare", *SIZES[0])
        program = torch.export.export(
            model, (), inputs, dynamic_shapes=dynamic_shapes(inputs), strict=False
        )
        inputs, _ = make(ANSWERS, "bare", 4, 7, 6)
        found = program.module()(**inputs)
        check(found, model, inputs, None)
        assert difference(found, model(**make(ANSWERS, "padded", 4, 7, 6)[0])) > 0.1


def tensors(inputs):
    """What `torch.export` takes: no array of numpy."""
    return torch.utils._pytree.tree_map(lambda x: x if x is None else torch.as_tensor(x), inputs)


def free_axes(name, x):
    """All but the width of features, and the number of answers."""
    fixed = name == "visual_embeds" or (name == "labels" and x.is_floating_point() and x.ndim == 2)
    return range(x.ndim - fixed)


def dynamic_shapes(inputs):
    return torch.utils._pytree.tree_map_with_path(
        lambda path, x: x if x is None else dict.fromkeys(free_axes(path[0].key, x), Dim.DYNAMIC),
        tensors(inputs),
    )


def reloaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


FLASH = {
    "pt": "attn_implementation='flash' needs a GPU of compute capability 8, float16 or bfloat16, "
    "heads of a multiple of 8 up to 256, PyTorch 2.10, and in training "
    "attention_probs_dropout_prob=0; this model is on cpu in float32 with heads of 8: pass "
    "attn_implementation='sdpa'",
    "tf": "attn_implementation='flash' is PyTorch's, on a GPU; pass attn_implementation='sdpa', "
    "which takes what TensorFlow has",
    "flax": "attn_implementation='flash' is PyTorch's, on a GPU; pass attn_implementation='sdpa', "
    "which takes what Flax has",
}


class TestFlash:
    @pytest.mark.parametrize("backend", FLASH)
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_a_device_that_cannot_says_so(self, backend, architecture):
        if backend not in visualbert.backend_names(installed=True):
            pytest.skip(f"{backend} is not installed")
        chosen = get_backend(backend)
        config = tiny_config(attn_implementation="flash_attention_2", num_hidden_layers=1)
        model = chosen.models[architecture](config, seed=0)
        with pytest.raises(UsageError) as refused:
            chosen.call(model, batch(architecture))
        assert str(refused.value) == FLASH[backend]

    def test_dropout_is_among_the_reasons(self):
        model = build(BODY, attn_implementation="flash", attention_probs_dropout_prob=0.1).train()
        with pytest.raises(UsageError) as refused:
            model(**batch(BODY))
        assert " with heads of 8 and dropout: pass " in str(refused.value)

    @pytest.mark.parametrize("step", [None, 1, 8, 64])
    @pytest.mark.parametrize("seed", range(5))
    def test_stretches_are_found_without_looking(self, step, seed):
        """Examples and empty places, in as many stretches as there can be, none too long."""
        masks = [np.random.default_rng(seed).random((9, n)) < 0.4 for n in (12, 7)]
        masks[0][:, 0] = True
        packing = plan_packing(*masks, step=step)
        source, (examples, length) = packing.source, packing.places.shape
        starts = stretches.starts_of(torch.tensor(source), examples, length)
        assert starts.dtype == torch.int32 and starts[0] == 0 and starts[-1] == source.size
        assert len(starts) == 1 + examples + len(source) * (source.shape[1] // length + 2)
        lengths = starts.diff().numpy()
        assert lengths.min() >= 0 and lengths.max() <= length
        ends = np.cumsum(runs(source, length))
        assert set(ends) <= set(starts.tolist())
        cut = set(starts[:-1][lengths > 0].tolist()) - {0, *ends.tolist()}
        assert all(source.ravel()[list(cut)] == -1)

    def test_shapes_on_a_gpu_that_is_not_there(self):
        """PyTorch's own description of the kernel takes what it is given."""
        if stretches.varlen_attn is None:
            pytest.skip("this PyTorch has no variable-length attention")
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            query = torch.empty(3, 64, 12, 64, dtype=torch.bfloat16, device="cuda")
            arrays = [
                torch.empty(n, m, dtype=torch.long, device="cuda") for n, m in ((3, 64), (5, 30))
            ]
            where = stretches.make_stretches(visualbert.packing.Packing(*arrays), flash=True)
            assert where.starts.shape == (1 + 5 + 3 * (2 + 2),) and where.longest == 30
            assert where.starts.dtype == torch.int32 and where.starts.device.type == "cuda"
            context = stretches.attend_apart(None, query, query, query, where)
            assert context.shape == query.shape and context.dtype == query.dtype

    @pytest.mark.parametrize(
        ("architecture", "late"),
        [
            (ANSWERS, False),
            (ANSWERS, True),
            *(
                pytest.param(x, n % 2 == 0, marks=pytest.mark.slow)
                for n, x in enumerate(x for x in ARCHITECTURES if x != ANSWERS)
            ),
        ],
    )
    def test_equals_attention_with_padding(self, architecture, late, flash_on_a_cpu):
        """Planned by itself, by the caller, and in one compiled graph."""
        kind = "packed, late" if late else "packed"
        flash = build(architecture, kind, packing="inference", attn_implementation="flash")
        plain, other = build(architecture, kind), build(architecture, kind, seed=1)
        compiled = torch.compile(flash, fullgraph=True, dynamic=True, backend="eager")
        with torch.fx.experimental._config.patch(use_duck_shape=False), torch.no_grad():
            for sizes in SIZES[:2]:
                inputs, packing = make(architecture, kind, *sizes)
                masked = {k: x for k, x in inputs.items() if k != "packing"}
                for run, given in ((flash, masked), (flash, inputs), (compiled, inputs)):
                    flash_on_a_cpu.clear()
                    check(run(**given), plain, inputs, packing, other)
                    every = architecture in (BODY, PRETRAINING)  # position is read
                    assert len(flash_on_a_cpu) == 1 + late + every, given.keys()
        assert graphs() == 1


@pytest.fixture
def flash_on_a_cpu(monkeypatch):
    """Variable-length attention from the definition; the calls of it."""
    if stretches.varlen_attn is None:
        pytest.skip("this PyTorch has no variable-length attention")
    from torch.nn.attention import varlen

    def attend(query, key, value, starts, _, longest, *rest):
        calls.append(longest)
        out = torch.full_like(query, float("nan"))
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            out[start : min(end, start + longest)] = torch.einsum(
                "nqk,knd->qnd",
                torch.einsum("qnd,knd->nqk", query[start:end], key[start:end])
                .div(query.shape[-1] ** 0.5)
                .softmax(-1),
                value[start:end],
            )
        sums = query.new_zeros(query.shape[1], len(query), dtype=torch.float32)
        return out, sums, torch.zeros(2, dtype=torch.uint64)

    calls = []
    varlen._varlen_attn.register_kernel("cpu")(attend)
    monkeypatch.setattr(modeling, "flash_serves", lambda *what: True)
    return calls


def replayed(run, given):
    """What a CUDA graph does, on a CPU: the same memory is read and written at every call."""
    inputs = {name: x.clone() for name, x in given.items()}
    outputs = {name: x.clone() for name, x in run(inputs).items()}

    def replay():
        for name, x in run(inputs).items():
            outputs[name].copy_(x)

    return Recording(inputs, replay, outputs)


@pytest.fixture(scope="module")
def ask():
    """A model as it is called by a predictor."""
    model = build(ANSWERS)

    def run(given):
        with torch.inference_mode():
            return dict(model(**given))

    return run


def question(seed, size=2, kind=torch.int64):
    given = tensors(batch(ANSWERS, size, labels=False, seed=seed))
    return {k: x if x.is_floating_point() else x.to(kind) for k, x in given.items()}


class TestGraphs:
    def test_a_call_is_recorded_when_it_comes_again(self, ask):
        graphs, found = Graphs(ask, replayed), []
        for seed in range(4):
            found.append(graphs(question(seed)))
            assert len(graphs.recordings) == (seed > 0)
        for seed, x in enumerate(found):  # which later calls have not overwritten
            assert difference(x, ask(question(seed))) == 0
            assert difference(x, ask(question(seed + 1))) > 0.1

    def test_other_types_sizes_and_names_are_other_calls(self, ask):
        graphs = Graphs(ask, replayed)
        fewer = {k: x for k, x in question(0).items() if k != "image_text_alignment"}
        for given in (question(0), question(0, 3), question(0, kind=torch.int32), fewer) * 3:
            assert difference(graphs(given), ask(given)) == 0
        assert len(graphs.recordings) == 4

    def test_no_more_than_so_many(self, ask):
        graphs = Graphs(ask, replayed)
        for size in range(1, GRAPHS + 4):
            for seed in range(3):
                given = question(seed, size)
                assert difference(graphs(given), ask(given)) == 0
        assert len(graphs.recordings) == GRAPHS
        assert len(graphs.seen) == GRAPHS

    def test_what_cannot_be_recorded_is_run_as_it_is(self, ask):
        tried = []

        def fail(run, given):
            tried.append(1)
            raise RuntimeError("operation not permitted when stream is capturing")

        graphs = Graphs(ask, fail)
        graphs(question(0))
        sentence = (
            "a CUDA graph could not be recorded (operation not permitted when stream is "
            "capturing); small batches of other shapes are run without one, which is slower and "
            "gives the same"
        )
        with pytest.warns(RuntimeWarning) as warned:
            found = graphs(question(1))
        assert [str(w.message) for w in warned] == [sentence]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for seed in (1, 2):
                found = graphs(question(seed))
                assert difference(found, ask(question(seed))) == 0
                graphs(question(seed, 3))
        assert len(tried) == 1

    def test_what_the_model_refuses_is_not_recorded(self, ask):
        graphs = Graphs(ask, replayed)
        wrong = question(0) | {"attention_mask": torch.ones(2, 8, dtype=torch.long)}
        for _ in range(3):
            with pytest.raises(InputError, match=r"attention_mask has shape \(2, 8\)"):
                graphs(wrong)
        assert not graphs.seen and not graphs.recordings

    def test_one_at_a_time(self, ask):
        graphs, wrong = Graphs(ask, replayed), []
        expected = [ask(question(seed)) for seed in range(3)]

        def work(seed):
            for _ in range(20):
                if difference(graphs(question(seed)), expected[seed]) > 0:
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed % 3,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and len(graphs.recordings) == 1

    @pytest.mark.parametrize("late", [False, True])
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_single_questions_of_every_length(self, architecture, late):
        """As on a GPU: few shapes, each recorded, and what is large is not."""
        kind = "padded, late" if late else "padded"
        model, other = (build(architecture, kind, seed) for seed in (0, 1))
        predictor = Predictor(model)
        predictor.graphs = Graphs(predictor.run, replayed)
        sizes = [
            (1, n, m) for n, m in ((9, 6), (7, 6), (12, 3), (21, 8), (8, 33), (30, 40), (5, 2))
        ]
        for size in [s for s in sizes for _ in "ab"]:
            given, _ = make(architecture, kind, *size)
            given = {k: x.numpy() for k, x in given.items() if "labels" not in k}
            found = predictor(given)
            assert difference(found, get_backend("pt").call(model, given)) < 1e-9
            assert difference(found, get_backend("pt").call(other, given)) > 0.1
        shapes = len(predictor.graphs.recordings)
        assert 0 < shapes < len(sizes)
        large, _ = make(architecture, kind, 40, 12, 9)
        for _ in range(2):
            predictor({k: x.numpy() for k, x in large.items()})
        assert len(predictor.graphs.recordings) == shapes

    def test_the_steps_of_a_recording(self, monkeypatch):
        """Without a GPU, what it says to PyTorch: warm up on a stream of its own, with masks that
        hide everything, record there, and come back also when that fails.
        """
        said = []

        class Context:
            def __init__(self, *what, **more):
                self.what = what[0] if what else self

            def __enter__(self):
                said.append(("in", type(self).__name__))

            def __exit__(self, *error):
                said.append(("out", type(self).__name__))

        class Stream(Context):
            device = torch.device("cpu")

            def wait_stream(self, other):
                said.append("wait")

        class Graph(Context):
            replay = "replay"

        stream = Stream()
        for name, value in {
            "Stream": lambda device: stream,
            "graph_pool_handle": lambda: "pool",
            "current_stream": lambda device: Stream(),
            "stream": type("Stream", (Context,), {}),
            "CUDAGraph": Graph,
            "graph": type("Recording", (Context,), {}),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

        def run(given):
            said.append(int(given["attention_mask"].sum()))
            if len(said) > 40:
                raise RuntimeError("no")
            return {"x": given["input_ids"] + 1}

        given = question(0)
        record = CudaRecorder(torch.device("cpu"))
        made = record(run, given)
        assert made.inputs["input_ids"] is not given["input_ids"] and made.replay == "replay"
        assert said == [
            "wait", ("in", "Stream"), 0, 0, 0, ("in", "Recording"), 0, ("out", "Recording"),
            ("out", "Stream"), "wait",
        ]  # fmt: skip
        said[:] = ["…"] * 40
        with pytest.raises(RuntimeError, match="no"):
            record(run, given)
        assert said[-1] == ("out", "Stream")
        assert given["attention_mask"].sum() > 0


@pytest.fixture
def laid_out():
    if not has_layout(torch.float32):
        pytest.skip("oneDNN has no layout for this CPU")


class TestPrepacked:
    def test_nothing_of_the_model_is_kept(self, laid_out):
        """As a memory-mapped file's pages must not be, beside what was laid out."""
        model, given = build(ANSWERS, dtype=torch.float32), batch(ANSWERS, labels=False)
        expected = get_backend("pt").call(model, given)
        known = [weakref.ref(p) for p in model.parameters()]
        run = Predictor(model)
        assert all(p() is not None for p in known)
        del model
        gc.collect()
        assert [p() for p in known if p() is not None] == []
        assert difference(run(given), expected) < 1e-5

    def test_every_weight_is_there_once(self, laid_out):
        for architecture in ARCHITECTURES:
            model = build(architecture, "late", dtype=torch.float32, num_hidden_layers=3)
            twin = prepacked(model)
            found = sum(p.numel() for p in twin.parameters())
            for layer in twin.modules():
                if isinstance(layer, PrepackedLinear):
                    found += layer.weight.numel() + layer.bias.numel()
            assert found == model.num_parameters()

    @pytest.mark.parametrize(
        "operations",
        [
            {},
            {"_reorder_linear_weight": "refuses"},
            {"_reorder_linear_weight": "kept", "_linear_pointwise": "refuses"},
            {"_reorder_linear_weight": "kept", "_linear_pointwise": "wrong"},
        ],
        ids=lambda row: ", ".join(" ".join(item) for item in row.items()) or "missing",
    )
    def test_without_the_operations_products_are_plain(self, operations, monkeypatch):
        def refuses(*what):
            raise RuntimeError("fp16 path needs the cpu support")

        does = {
            "refuses": refuses,
            "kept": lambda weight, _: weight,
            "wrong": lambda x, weight, *rest: x @ weight.T,
        }
        namespace = types.SimpleNamespace(**{k: does[v] for k, v in operations.items()})
        monkeypatch.setattr(torch.ops, "mkldnn", namespace)
        found = has_layout, _has_product
        for whether in found:
            whether.cache_clear()
        try:
            model, given = build(ANSWERS, dtype=torch.float32), batch(ANSWERS, labels=False)
            twin, run = prepacked(model), Predictor(model)
            assert not has_layout(torch.float32) and not _has_product()
            assert not any(isinstance(x, PrepackedLinear) for x in twin.modules())
            joint = twin.visual_bert.encoder.layer[0].attention.self.joint
            assert joint.weight.shape == (72, 24)
            assert difference(run(given), get_backend("pt").call(model, given)) < 1e-6
        finally:
            for whether in found:
                whether.cache_clear()

    def test_types_that_have_no_layout(self):
        assert not has_layout(torch.float64)

    def test_autocast_does_not_reach_it(self):
        model, given = build(ANSWERS, dtype=torch.float32), batch(ANSWERS, labels=False)
        run = Predictor(model)
        expected = run(given)
        with torch.autocast("cpu", torch.bfloat16):
            assert difference(run(given), expected) == 0
            assert difference(get_backend("pt").call(model, given), expected) > 1e-3


@gpu
@on_gpu
class TestGpu:
    @pytest.mark.parametrize("dtype", ROUNDED)
    @pytest.mark.parametrize("kind", ["bare", "padded", "packed", "packed, late", "packed, shared"])
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_flash_attention(self, architecture, kind, dtype):
        """Without masks, planned by itself, and by the caller."""
        plain, other = build(architecture, kind), build(architecture, kind, seed=1)
        settings = {"packing": "inference", "attn_implementation": "flash"}
        flash = build(architecture, kind, **settings).to("cuda", dtype)
        for sizes in SIZES:
            inputs, packing = make(architecture, kind, *sizes)
            padded = {k: x for k, x in inputs.items() if k != "packing"}
            with torch.no_grad():
                found, *others = flash(**inputs), plain(**padded), other(**padded)
            where = packing or plan(padded)
            found, right, wrong = (real(x, where) for x in (found, *others))
            assert error(found, right) < ROUNDED[dtype] < error(found, wrong)

    @pytest.mark.parametrize("kind", ["packed", "packed, late"])
    def test_flash_attention_trains(self, kind):
        inputs, _ = make(ANSWERS, kind, *SIZES[2])
        model = build(ANSWERS, kind, attn_implementation="flash").cuda().bfloat16().train()
        plain = build(ANSWERS, kind, attn_implementation="eager").cuda().bfloat16().train()
        found = loss_and_gradients(model, inputs)
        padded = {k: x for k, x in inputs.items() if k != "packing"}
        expected = loss_and_gradients(plain, padded)
        assert all(x.isfinite().all() for x in found)
        assert largest(found, expected) < 0.1 * max(x.abs().max() for x in expected)

    @pytest.mark.parametrize("dtype", [torch.float32, *ROUNDED])
    def test_a_mask_keeps_an_efficient_kernel(self, dtype):
        """No other is allowed here, and PyTorch would say that none is left."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        model = build(ANSWERS).to("cuda", dtype)
        inputs, _ = make(ANSWERS, "padded", *SIZES[0])
        with torch.no_grad(), sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            found = model(**inputs)
        assert difference(found, build(ANSWERS)(**inputs)) < ROUNDED.get(dtype, 1e-3)

    @pytest.mark.parametrize("kind", ["padded", "packed"])
    def test_compiled(self, kind):
        model = build(ANSWERS, kind, attn_implementation="flash").cuda().bfloat16()
        plain = build(ANSWERS, kind)
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        with torch.fx.experimental._config.patch(use_duck_shape=False), torch.no_grad():
            for sizes in SIZES:
                inputs, packing = make(ANSWERS, kind, *sizes)
                padded = {k: x for k, x in inputs.items() if k != "packing"}
                assert error(compiled(**inputs), plain(**padded), packing) < ROUNDED[torch.bfloat16]
        assert graphs() == 1

    @pytest.mark.parametrize("dtype", [torch.float32, *ROUNDED])
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_a_predictor_with_graphs(self, architecture, dtype):
        model, other = build(architecture), build(architecture, seed=1)
        predictor = Predictor(copy.deepcopy(model).to("cuda", dtype))
        tolerance = ROUNDED.get(dtype, 1e-3)
        for size in [(1, n, m) for n, m in ((9, 6), (7, 6), (21, 8), (30, 40)) for _ in "abc"]:
            given, _ = make(architecture, "padded", *size)
            given = {k: x.numpy() for k, x in given.items() if "labels" not in k}
            found = predictor(given)
            assert difference(found, get_backend("pt").call(model, given)) < tolerance
            assert difference(found, get_backend("pt").call(other, given)) > tolerance
        assert predictor.graphs.recordings and predictor.graphs.open

    def test_what_cannot_be_recorded_leaves_the_device_usable(self):
        """`item` waits for the device."""
        device = torch.device("cuda")
        graphs = Graphs(lambda given: {"x": given["x"].cuda() * given["x"].sum().item()},
                        CudaRecorder(device))  # fmt: skip
        stream = torch.cuda.current_stream()
        graphs({"x": torch.ones(3)})
        with pytest.warns(RuntimeWarning, match="could not be recorded"):
            assert graphs({"x": torch.ones(3)})["x"].tolist() == [3, 3, 3]
        assert torch.cuda.current_stream() == stream and not graphs.open
        assert torch.ones(2, device=device).sum() == 2


SECOND_PROCESS = """
import sys
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
import numpy as np
from visualbert import VisualBertConfig, get_backend
config = VisualBertConfig(vocab_size=50, hidden_size=24, visual_embedding_dim=20,
    num_hidden_layers=1, num_attention_heads=3, intermediate_size=40)
flax = get_backend("flax")
model = flax.models["VisualBertForQuestionAnswering"](config, seed=int(sys.argv[2]))
text, regions = map(int, sys.argv[3:])
found = flax.predictor(model)({"input_ids": np.ones((1, text), int),
    "visual_embeds": np.ones((1, regions, 20), np.float32)})
print(float(found["logits"].sum()))
"""


@pytest.mark.slow
def test_jax_finds_on_disk_what_it_compiled_before(tmp_path):
    """With JAX's own setting; weights are no part of what is compiled."""
    pytest.importorskip("flax")

    def ask(seed, *sizes):
        command = [sys.executable, "-c", SECOND_PROCESS, tmp_path, seed, *sizes]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        written = {path.name for path in tmp_path.iterdir() if "jit_run" in path.name}
        return float(done.stdout), {name for name in written if not name.endswith("-atime")}

    first, written = ask(0, 5, 4)
    assert len(written) == 1
    again, still = ask(0, 5, 4)
    assert again == pytest.approx(first) and still == written
    other, still = ask(1, 5, 4)
    assert abs(other - first) > 1e-3 and still == written
    _, more = ask(0, 6, 4)
    assert len(more) == 2


@pytest.mark.slow
@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("architecture", [ANSWERS, CHOICE])
def test_tensorflow_traces_packed_batches_once_for_all_sizes(architecture, xla):
    """A second time, when the sizes change for the first time."""
    tf = pytest.importorskip("tensorflow")
    from visualbert.tf.predictor import as_tensors

    kind, chosen = "packed, late", get_backend("tf")
    config = tiny_config(bypass_transformer=True)
    model, other = (chosen.models[architecture](config, seed=seed) for seed in (0, 1))
    run = tf.function(lambda x: dict(model(**x)), jit_compile=xla, reduce_retracing=True)
    for sizes in SIZES:
        inputs, packing = make(architecture, kind, *sizes)
        arrays = {k: x.numpy() if torch.is_tensor(x) else x for k, x in inputs.items()}
        padded = {k: x for k, x in arrays.items() if k != "packing"}
        found = run({name: as_tensors(x) for name, x in arrays.items()})
        assert error(found, chosen.call(model, padded), packing) < 1e-4
        assert error(found, chosen.call(other, padded), packing) > 0.1
    assert run.experimental_get_tracing_count() == 2


@pytest.mark.slow
def test_the_documentation_runs(tmp_path, monkeypatch):
    tf, jax = pytest.importorskip("tensorflow"), pytest.importorskip("jax")
    page = (Path(__file__).parents[1] / "docs" / "compilation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    arrays = batch(ANSWERS, *SIZES[0], labels=False, alignment=False)
    names = {
        "arrays": arrays,
        "batch": tensors(arrays),
        "model": build(ANSWERS, dtype=torch.float32),
    }
    int32 = {k: x.astype(np.int32) if x.dtype.kind == "i" else x for k, x in arrays.items()}
    names["tensors"] = {name: tf.constant(x) for name, x in int32.items()}
    for backend in ("tf", "flax"):
        names[f"{backend}_model"] = get_backend(backend).models[ANSWERS](tiny_config(), seed=0)
    lines = "\n".join(blocks).replace("/var/cache/jax", str(tmp_path)).splitlines()
    kept = jax.config.jax_compilation_cache_dir
    try:
        exec(
            "\n".join(lines).replace(
                "torch.compile(model, ", 'torch.compile(model, backend="eager", '
            ),
            names,
        )
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
    assert {path.name for path in tmp_path.iterdir()} >= {"vqa.pt2", "saved"}
