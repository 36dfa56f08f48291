"""`visualbert bench`: batches are what the workloads say, useful operations are those of a count by
hand, every framework's outputs and gradients are compared with transformers' before anything is
timed, and whatever cannot run is told without a traceback and without a process left behind.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tiny import BACKENDS

from visualbert import VisualBertConfig
from visualbert.bench import workloads
from visualbert.bench.inputs import make_inputs
from visualbert.bench.limit import Limit
from visualbert.bench.operations import real_tokens, useful_operations
from visualbert.bench.run import (
    BenchmarkError,
    Broken,
    Different,
    Settings,
    agreement,
    compare,
    measure,
    paired,
)
from visualbert.bench.sweep import run_sweep
from visualbert.bench.worker import ROLES, Job, to_json
from visualbert.bench.workloads import (
    IMPLEMENTATIONS,
    REFERENCE,
    SIZES,
    SWEEP,
    WORKLOADS,
    Implementation,
    Lengths,
    Workload,
    exactly,
    read_workload,
)

TINY = VisualBertConfig(**SIZES["tiny"])
VQA = "VisualBertForQuestionAnswering"
EVERYTHING = ("call", "step", "load")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """One thread, which is enough for tiny models."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Settings(tmp_path_factory.mktemp("bench"), SIZES["tiny"], threads=1, runs=1)
    torch.set_num_threads(before)


def play(settings, role, backend, workload, told, dtype="float32", options=None):
    """The answers of a worker that runs in this process, and the outputs that it leaves."""
    implementation = Implementation(backend, dtype, EVERYTHING, options=options or {})
    job = settings.job(role, implementation, workload)
    answers = list(ROLES[role](job, iter(told)))
    return answers, dict(np.load(job.out)) if Path(job.out).exists() else {}


def quiet(step):
    """Progress that nobody watches."""


# Batches


def test_the_workloads_are_those_of_the_documentation():
    sizes = {
        "single": (1, exactly(20), exactly(36)),
        "full": (16, exactly(20), exactly(36)),
        "ragged": (16, Lengths(6, 24, 128), Lengths(10, 100, 100)),
        "vcr": (8, Lengths(12, 36, 36), exactly(20)),
        "train-vqa": (16, Lengths(6, 24, 128), Lengths(10, 100, 100)),
        "pretrain": (16, Lengths(6, 24, 128), Lengths(10, 100, 100)),
        "load": (1, exactly(20), exactly(36)),
    }
    assert {x.name: (x.batch, x.text, x.regions) for x in WORKLOADS.values()} == sizes
    base = VisualBertConfig(**SIZES["base"])
    assert (base.hidden_size, base.num_hidden_layers, base.vocab_size) == (768, 12, 30522)
    assert (base.visual_embedding_dim, base.num_labels) == (2048, 3129)


@pytest.mark.parametrize("name", WORKLOADS)
def test_batches(name):
    workload = WORKLOADS[name]
    inputs = make_inputs(workload, TINY)
    texts = (workload.batch,) if workload.choices == 1 else (workload.batch, workload.choices)
    mask, visual_mask = inputs["attention_mask"], inputs["visual_attention_mask"]
    assert mask.shape == (*texts, workload.text.padded)
    assert visual_mask.shape == (workload.batch, workload.regions.padded)
    for lengths, given in ((workload.text, mask), (workload.regions, visual_mask)):
        counts = given.sum(-1)
        assert lengths.low <= counts.min() and counts.max() <= lengths.high
        assert np.array_equal(given, np.sort(given)[..., ::-1])  # padding on the right
    assert np.array_equal(inputs["input_ids"] > 0, mask == 1)
    assert np.array_equal((inputs["visual_embeds"] != 0).any(-1), visual_mask == 1)
    again, other = make_inputs(workload, TINY), make_inputs(workload._replace(seed=9), TINY)
    assert all(np.array_equal(again[key], x) for key, x in inputs.items())
    assert not np.array_equal(other["visual_embeds"], inputs["visual_embeds"])


def test_labels_of_pretraining():
    inputs = make_inputs(WORKLOADS["pretrain"], TINY)
    plain = make_inputs(WORKLOADS["ragged"], TINY)
    chosen = inputs["labels"] >= 0
    assert chosen.sum() == round(0.15 * inputs["attention_mask"].sum())
    assert (inputs["attention_mask"][chosen] == 1).all()
    assert np.array_equal(inputs["labels"][chosen], plain["input_ids"][chosen])
    assert np.array_equal(inputs["input_ids"] != plain["input_ids"], chosen)
    assert set(inputs["sentence_image_labels"]) == {0, 1}


def test_labels_of_questions_are_soft():
    labels = make_inputs(WORKLOADS["train-vqa"], TINY)["labels"]
    assert labels.shape == (16, 7)
    assert all(sorted(row[row > 0]) == pytest.approx([0.3, 0.6, 1.0]) for row in labels)


def test_a_workload_survives_json(settings):
    job = settings.job("turns", IMPLEMENTATIONS[1], WORKLOADS["vcr"])
    values = json.loads(to_json(job))
    assert Job(**values | {"workload": read_workload(values["workload"])}) == job


# Operations

_SMALL = {"vocab_size": 11, "hidden_size": 4, "visual_embedding_dim": 3, "num_hidden_layers": 2,
          "num_attention_heads": 2, "intermediate_size": 6, "num_labels": 5}  # fmt: skip


def product(m, k, n):
    """Operations of (m, k) × (k, n)."""
    return 2 * m * k * n


def layer(s, read=None):
    """A layer on s positions, of which the last one needs to give only some."""
    read = s if read is None else read
    keys_values = product(s, 4, 8)
    attention = product(read, 4, s) + product(read, s, 4)  # all heads together
    return keys_values + product(read, 4, 4) + attention + product(read, 4, 4) + (
        product(read, 4, 6) + product(read, 6, 4)
    )  # fmt: skip


def inputs_of(words, regions, **labels):
    """Masks with so many ones in each row, and something at padding."""
    widest = max(words) + 2, max(regions) + 3
    masks = [
        np.arange(wide) < np.array(x)[:, None]
        for wide, x in zip(widest, (words, regions), strict=True)
    ]
    return {"attention_mask": masks[0] * 1, "visual_attention_mask": masks[1] * 1, **labels}


def test_operations_of_an_answer():
    workload = Workload("x", VQA, exactly(1), exactly(1), batch=2)
    inputs = inputs_of([3, 5], [2, 4])
    want = product(6, 3, 4)  # six regions are projected
    want += layer(5) + layer(9)
    want += layer(5, 1) + layer(9, 1)
    want += 2 * product(1, 4, 5)
    config = VisualBertConfig(**_SMALL)
    assert useful_operations(workload, config, inputs) == want
    assert useful_operations(workload._replace(kind="step"), config, inputs) == 3 * want
    assert real_tokens(workload, inputs) == (14, 6)


def test_operations_of_choices_that_share_an_image():
    workload = Workload("x", "VisualBertForMultipleChoice", exactly(1), exactly(1), 1, choices=2)
    inputs = inputs_of([3, 5], [4])
    inputs["attention_mask"] = inputs["attention_mask"][None]
    want = product(4, 3, 4)  # once for both
    want += layer(7) + layer(9) + layer(7, 1) + layer(9, 1)
    want += 2 * (product(1, 4, 4) + product(1, 4, 1))
    assert useful_operations(workload, VisualBertConfig(**_SMALL), inputs) == want
    assert real_tokens(workload, inputs) == (16, 4)


def test_operations_of_pretraining():
    workload = Workload("x", "VisualBertForPreTraining", exactly(1), exactly(1), 2, kind="step")
    labels = np.full((2, 7), -1)
    labels[0, 1] = labels[1, 0] = labels[1, 3] = (
        6  # the first position of the second is read anyway
    )
    inputs = inputs_of([3, 5], [2, 4], labels=labels)
    want = product(6, 3, 4)
    want += layer(5) + layer(9)
    want += layer(5, 2) + layer(9, 2)
    want += 2 * (product(1, 4, 4) + product(1, 4, 2))
    want += 3 * (product(1, 4, 4) + product(1, 4, 11))
    assert useful_operations(workload, VisualBertConfig(**_SMALL), inputs) == 3 * want


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_limit_multiplies_what_the_model_multiplies(dtype):
    limit = Limit(TINY, 30, 20, "cpu", dtype)
    linear = sum(product(30, k, n) for k, n in ((24, 72), (24, 24), (24, 40), (40, 24)))
    assert limit.operations == 2 * linear + product(20, 20, 24)
    assert [len(ways[0]) for ways in limit.products] == [2, 2, 2, 2, 1]
    assert limit() > 0


# Every framework


SLOW = {"marks": pytest.mark.slow}
BATCHES = ("vcr", pytest.param("ragged", **SLOW), pytest.param("train-vqa", **SLOW), "pretrain")


@pytest.fixture(scope="module", params=BATCHES)
def reference(request, settings):
    """A workload, and what transformers gives for it."""
    workload = WORKLOADS[request.param]._replace(batch=3)
    answers, found = play(settings, "turns", REFERENCE, workload, ["go", "memory"])
    assert answers[0] == "ready" and answers[1] > 0 and isinstance(answers[2], int)
    return workload, found


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_framework_gives_the_numbers_of_transformers(backend, reference, settings):
    workload, want = reference
    answers, found = play(settings, "turns", backend, workload, ["go", "go"])
    assert answers[0] == "ready" and min(answers[1:]) > 0
    step = workload.kind == "step"
    if step:
        assert found.keys() == want.keys() and len(found) == 6
    else:
        assert {*want} == {"logits"} <= {*found}
    assert compare(found, want, relative=step)[1] < 1e-5


def test_tensors_that_lie_on_a_device(settings):
    """What is timed of ours on a GPU."""
    from visualbert.bench.engines import load_model, torch_call, torch_inputs

    workload = WORKLOADS["ragged"]._replace(batch=3)
    model = load_model("pt", str(settings.checkpoint(VQA)), workload, "float32", {}, "cpu")
    _, want = play(settings, "turns", REFERENCE, workload, [])
    found = torch_call(model, torch_inputs(model, make_inputs(workload, TINY)))()
    assert compare(found, want, relative=False)[1] < 1e-5


def test_a_wrong_model_is_told_apart(reference, settings):
    workload, want = reference
    wrong = {"layer_norm_eps": 0.01}
    _, found = play(settings, "turns", "pt", workload, [], options=wrong)
    assert compare(found, want, relative=workload.kind == "step")[1] > workloads.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_learns(backend, settings, monkeypatch):
    """The update is one: the loss falls, and dropout makes every step another."""
    from visualbert.bench import engines
    from visualbert.bench.engines import load_model, make_step

    monkeypatch.setattr(engines, "LEARNING_RATE", 1e-3)  # quicker than dropout's noise
    workload = WORKLOADS["train-vqa"]._replace(batch=3)
    folder = str(settings.checkpoint(VQA))
    model = load_model(backend, folder, workload, "float32", {}, "cpu")
    step = make_step(backend, model, workload, make_inputs(workload, TINY))
    before = step.check()["loss"]
    losses = [step() for _ in range(30)]
    assert len(set(losses)) > 25
    assert losses[0] == pytest.approx(float(before), rel=0.2)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_answers(backend, settings):
    _, want = play(settings, "first", REFERENCE, WORKLOADS["load"], [])
    (answer,), found = play(settings, "first", backend, WORKLOADS["load"], [])
    assert 0 < answer["load"] < answer["answer"]
    assert compare(found, want, relative=False)[1] < 1e-5
    (parts,), _ = play(settings, "parts", backend, WORKLOADS["load"], [])
    assert parts["layers"] > 0 and parts["copy"] > 0


# Comparisons


def test_compare():
    one = {"a": np.float32([1, 2]), "b": np.float32([4, 8]), "mine": np.float32([5])}
    two = {"a": np.float32([1, 2.5]), "b": np.float32([4, 7]), "theirs": np.float32([5])}
    assert compare(one, two, relative=False) == ("b", 1)
    assert compare(one, two, relative=True) == ("a", pytest.approx(0.2))
    assert compare(one, {"c": two["a"]}, relative=False) == ("nothing", np.inf)
    assert compare(one, {"a": np.float32([1])}, relative=False) == ("a", np.inf)
    assert compare(one, {"a": np.float32([1, np.nan])}, relative=False) == ("a", np.inf)
    rows = {"logits": np.float32([[0, 1], [1, 0], [3, 2], [0, 9]])}
    assert agreement(rows, {"logits": np.float32([[0, 1], [0, 1], [3, 2], [0, 9]])}) == 0.75


def test_ratios_are_of_the_same_turn():
    assert paired([1, 2, 4], [2, 2, 2]) == (1, 0.5, 2)


# Processes


REFERENCE_ROW = IMPLEMENTATIONS[0]
WRONG = Implementation("pt", "float32", EVERYTHING, options={"layer_norm_eps": 0.01})
SENTENCE = (
    r"pt float32 on {}: {} differs from transformers by \d\.\de-0\d{}, expected at most 1.0e-04"
)


def test_a_result(settings):
    chosen = [
        REFERENCE_ROW,
        Implementation("pt", "bfloat16", EVERYTHING),
        Implementation("pt", "float32", EVERYTHING, options={"dtype": "float32"}),
        Implementation("pt", "float64x", EVERYTHING),
    ]
    workload = WORKLOADS["ragged"]
    result = measure(workload, chosen, settings, quiet)
    first, half, twice, unknown = result.rows
    assert result.tokens == real_tokens(workload, make_inputs(workload, TINY))[0]
    assert first.error == 0 and first.agreement == 1 and result.ratio(first) == (1, 1, 1)
    assert 1e-6 < half.error < 0.1 and 0 < half.agreement <= 1 and half.memory > 0
    share = result.operations / half.seconds[0] / result.rates["bfloat16"][0]
    assert result.share(half).median == pytest.approx(share)
    assert twice.failed == (
        "it ended with status 1: TypeError: visualbert.pretrained.load() got multiple values for "
        "keyword argument 'dtype'"
    )
    assert unknown.failed.startswith("dtype 'float64x' is not one of ")


@pytest.mark.slow
def test_nothing_is_timed_that_gives_other_numbers(settings):
    words = SENTENCE.format("ragged", "logits", "")
    with pytest.raises(Different, match=words + "; nothing was timed"):
        measure(WORKLOADS["ragged"], [REFERENCE_ROW, WRONG], settings, quiet)
    words = SENTENCE.format("load", "logits", "")
    with pytest.raises(Different, match=words + "; nothing was timed"):
        measure(WORKLOADS["load"], [REFERENCE_ROW, WRONG], settings, quiet)
    words = SENTENCE.format("2 × ", "logits", "").replace("2 × :", "2 × .*:")
    with pytest.raises(Different, match=words):
        run_sweep([REFERENCE_ROW, WRONG], [SWEEP[2]], settings, quiet)


@pytest.mark.slow
def test_a_reference_of_another_type_is_held_against_float32(settings):
    """As on a GPU: transformers in bfloat16 is the measure of speed, and of what is near enough."""
    workload = WORKLOADS["full"]._replace(batch=2)
    half = [x for x in IMPLEMENTATIONS if x.dtype == "bfloat16" and "cuda" in x.devices]
    result = measure(workload, half, settings, quiet)
    assert [row.implementation.name for row in result.rows] == [
        "transformers bfloat16",
        "pt bfloat16",
    ]
    assert all(1e-6 < row.error < 0.1 for row in result.rows)
    wrong = half[1]._replace(options={"layer_norm_eps": 1.0})
    with pytest.raises(Different, match="pt bfloat16 on full: logits differs from transformers"):
        measure(workload, [half[0], wrong], settings, quiet)


@pytest.mark.slow
def test_without_the_reference_there_is_no_result(settings):
    broken = REFERENCE_ROW._replace(dtype="float32x")
    with pytest.raises(BenchmarkError) as caught:
        run_sweep([broken], [], settings, quiet)
    assert str(caught.value) == (
        "transformers float32x, with which all is compared, cannot run the sweep: it ended with "
        "status 1: AttributeError: module 'torch' has no attribute 'float32x'"
    )


def test_a_worker_ends_with_its_parent(settings):
    with closing(settings.start("limit", REFERENCE_ROW, WORKLOADS["single"])) as worker:
        worker.hear()
        worker.process.stdin.close()
        assert worker.process.wait(60) == 0
        with pytest.raises(Broken, match=r"^it ended with status 0$"):
            worker.hear()


@pytest.mark.slow
def test_loads(run, tmp_path):
    path = tmp_path / "p.json"
    options = ("--workload", "load", "--backend", "pt", "--runs", 1, "--json", path)
    status, out, err = run("bench", "--size", "tiny", *options)
    assert status == 0, err
    assert "first answer, s" in out
    theirs, ours = json.loads(path.read_text())["workloads"]["load"]["rows"]
    assert theirs["ratio"]["median"] == 1 and ours["difference"] < 1e-5
    for row in (theirs, ours):
        assert 0 < row["load"][0] < row["seconds"][0] and row["peak_memory"] > 0
    assert len(ours["layers"]) == len(ours["copy"]) == 1


@pytest.mark.slow
def test_a_sweep(settings):
    chosen = [REFERENCE_ROW, Implementation("pt", "float32", EVERYTHING)]
    points = [SWEEP[0], SWEEP[-1]]
    found = run_sweep(chosen, points, settings, quiet)
    assert [point.workload for point in found.points] == points
    assert found.points[0].tokens == found.points[0].padded == 56
    assert found.points[1].tokens < found.points[1].padded == 13 * (9 + 97)
    for point in found.points:
        assert {*point.first} == {*point.second} == {"transformers float32", "pt float32"}


def test_the_sweep_spans_what_it_claims():
    assert {x.batch for x in SWEEP} >= {1, 2, 4, 8, 16, 32}
    assert {x.text.padded for x in SWEEP} >= {8, 128}
    assert {x.regions.padded for x in SWEEP} >= {10, 100}
    assert len({(x.batch, x.text.padded, x.regions.padded) for x in SWEEP}) == len(SWEEP) / 2
    assert len({x.name for x in SWEEP}) == len(SWEEP)


# The command


def test_the_command(run, tmp_path):
    values, picture = tmp_path / "p.json", tmp_path / "p.png"
    status, out, err = run(
        "bench", "--size", "tiny", "--workload", "single", "--backend", "pt", "--runs", 2,
        "--threads", 1, "--batch", 4, "--json", values, "--plot", picture,
    )  # fmt: skip
    assert status == 0, err
    assert "single  VisualBertForQuestionAnswering: 1 × (20 tokens + 36 regions), 56 real" in out
    found = json.loads(values.read_text())
    assert found["machine"]["threads"] == 1 and found["reference"] == "transformers"
    theirs, ours = found["workloads"]["single"]["rows"]
    assert (theirs["backend"], ours["backend"]) == ("transformers", "pt")
    assert len(theirs["seconds"]) == len(ours["seconds"]) == 2 and ours["peak_memory"] > 0
    ratios = sorted(b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True))
    assert [ours["ratio"]["low"], ours["ratio"]["high"]] == ratios
    assert f"{ours['ratio']['median']:.2f} ({ratios[0]:.2f}–{ratios[1]:.2f})" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_differs(run, monkeypatch, tmp_path):
    chosen = (REFERENCE_ROW, WRONG)
    monkeypatch.setattr("visualbert.cli.bench.IMPLEMENTATIONS", chosen)
    path = tmp_path / "p.json"
    status, out, _ = run("bench", "--size", "tiny", "--workload", "single", "--json", path)
    assert status == 1
    assert out.splitlines()[-1].startswith("pt float32 on single: logits differs from transformers")
    assert not path.exists()


@pytest.mark.slow
def test_the_command_draws_a_sweep(run, monkeypatch, tmp_path):
    monkeypatch.setattr("visualbert.cli.bench.SWEEP", SWEEP[:2])
    values, picture = tmp_path / "p.json", tmp_path / "p.svg"
    status, out, err = run(
        "bench", "--size", "tiny", "--sweep", "--backend", "pt", "--json", values, "--plot", picture
    )
    assert status == 0, err
    assert "µs a real token" in out and "1.00 (1.00–1.00)" in out  # of the reference
    assert json.loads(values.read_text())["points"][0]["real_tokens"] == 56
    assert "first call" in picture.read_text() and "pt float32" in picture.read_text()


MISUSES = {
    "--workload singel": "--workload 'singel' is not one of single, full, ragged, vcr, train-vqa, "
    "pretrain, load; did you mean 'single'?",
    "--backend pt,torch": "--backend 'torch' is not one of pt, tf, flax",
    "--dtype float64": "--dtype 'float64' is not one of float32, bfloat16, float16, int8; did you "
    "mean 'float16'?",
    "--runs 0": "--runs 0 must be at least 1",
    "--threads -1": "--threads -1 must be at least 1",
    "--plot a.jpg": "--plot 'a.jpg' must end in .png, .pdf or .svg",
    "--json no/a.json": "--json no/a.json: not a file in a folder that exists",
    "--sweep --workload full": "--sweep has batches of its own; leave --workload out",
    "--backend tf --dtype int8": "nothing of --backend tf and --dtype int8 runs on cpu",
    "--device cuda --backend flax": "nothing of --backend flax and --dtype bfloat16 runs on cuda",
}


@pytest.mark.parametrize("options", MISUSES)
def test_misuses(run, options):
    assert run("bench", *options.split()) == (2, "", f"visualbert bench: {MISUSES[options]}\n")


def test_without_a_gpu(run):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    status, _, err = run("bench", "--size", "tiny", "--device", "cuda")
    assert status == 2
    assert err.splitlines()[-1] == (
        "visualbert bench: transformers float32, with which all is compared, cannot run single: "
        "--device cuda: PyTorch finds no such device here; leave it out"
    )


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, **SLOW)])
def test_an_interrupt_leaves_nothing_behind(sent, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "visualbert",
            "bench",
            "--size",
            "tiny",
            "--backend",
            "pt",
            "--runs",
            "1000000",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    with closing(process.stderr), closing(process.stdout):
        while "turn 1 of" not in process.stderr.readline():
            assert process.poll() is None
        assert len(workers_of(tmp_path)) > 2
        process.send_signal(sent)
        rest = process.stderr.read()
        assert process.wait(60) == 130
    assert rest.splitlines()[-1] == "visualbert bench: interrupted"
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 10
    while workers_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers_of(tmp_path) == []


def workers_of(folder):
    """Processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in text and "visualbert.bench.worker" in text:
            found.append(path.parent.name)
    return found
