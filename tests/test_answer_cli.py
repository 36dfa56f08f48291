"""`visualbert answer`: one question or thousands, from pictures or from feature files, resumable,
and with one clear sentence for whatever is wrong.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from visualbert.answering import embedded, pipeline
from visualbert.inputs.features import write_features
from visualbert.regions import get_extractor
from visualbert.scenes import EXAMPLE
from visualbert.scenes.draw import make_scene, paint
from visualbert.scenes.questions import questions

SEED = 4_322


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Pictures by path, and the questions about each."""
    folder = tmp_path_factory.mktemp("scenes")
    found = {}
    for number in range(6):
        scene = make_scene(number, SEED, "test")
        path = folder / f"scene-{number}.png"
        paint(scene).save(path)
        found[str(path)] = [question.text for question in questions(scene)]
    return found


@pytest.fixture(scope="module")
def lines(scenes):
    """A file's lines: every question about every picture, as it stands there."""
    return [
        {"question_id": f"q{n}", "image": path, "question": text}
        for n, (path, text) in enumerate(
            (path, text) for path, texts in scenes.items() for text in texts
        )
    ]


@pytest.fixture
def asked(lines, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_question(run):
    status, out, err = run("answer", "--image", EXAMPLE, "--question", "How many digits are there?")
    assert (status, err) == (0, "")
    assert "How many digits are there?" in out and "probability" in out
    want = pipeline("vqa")(EXAMPLE, "How many digits are there?")
    assert f"{want.answer} " in out
    assert f"{want.answers[0].probability:.1%}" in out


def test_json(run):
    status, out, _ = run(
        "answer", "--image", EXAMPLE, "--question", "What digit is blue?", "--json", "--top", 2
    )
    found = json.loads(out)
    want = pipeline("vqa")(EXAMPLE, "What digit is blue?", top=2)
    assert status == 0
    assert found["image"] == str(EXAMPLE) and found["question"] == "What digit is blue?"
    assert found["answer"] == want.answer
    assert [(a["answer"], a["probability"]) for a in found["answers"]] == [
        (text, pytest.approx(p, abs=1e-6)) for text, p in want.answers
    ]


def test_several_images_and_questions(run, scenes):
    images = list(scenes)[:2]
    both = ["how many digits are there", "is there a red 3"]
    options = [x for image in images for x in ("--image", image)]
    options += [x for question in both for x in ("--question", question)]
    status, out, _ = run("answer", *options, "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [(f["image"], f["question"]) for f in found] == [(i, q) for i in images for q in both]


@pytest.mark.parametrize("backend", ["tf", "flax"])
def test_every_framework(run, backend):
    options = ("--image", EXAMPLE, "--question", "What digit is blue?", "--json")
    _, want, _ = run("answer", *options, "--backend", "pt")
    status, out, _ = run("answer", *options, "--backend", backend)
    assert status == 0
    for one, other in zip(json.loads(out)["answers"], json.loads(want)["answers"], strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_explain(run, tmp_path, suffix):
    path = tmp_path / f"answer.{suffix}"
    status, out, _ = run(
        "answer", "--image", EXAMPLE, "--question", "What digit is blue?", "--explain", path
    )
    assert status == 0
    assert out.splitlines()[-1] == f"what it looked at: {path}"
    if suffix == "png":
        assert min(Image.open(path).size) > 300
    if suffix == "svg":
        assert "What digit is blue?" in path.read_text()


def test_features_by_id_give_the_same_answers(run, scenes, tmp_path):
    extract = get_extractor()
    store = tmp_path / "features.safetensors"
    write_features(store, ((os.path.basename(path)[:-4], extract(path)) for path in scenes))
    path, texts = next(iter(scenes.items()))
    for image in (path, "scene-0"):
        _, out, _ = run(
            "answer", "--features", store, "--image", image, "--question", texts[0], "--json"
        )
        _, want, _ = run("answer", "--image", path, "--question", texts[0], "--json")
        assert json.loads(out)["answers"] == json.loads(want)["answers"]
    status, _, err = run(
        "answer", "--features", store, "--image", "scene-77", "--question", texts[0]
    )
    assert status == 2 and "scene-77" in err


# Many questions


def test_a_file_of_questions(run, asked, lines, tmp_path):
    out = tmp_path / "out.jsonl"
    status, text, err = run("answer", "--questions", asked, "--out", out)
    assert (status, text) == (0, "")
    assert err == f"{len(lines)} questions, 0 failed → {out}\n"
    found = read(out)
    assert [f["line"] for f in found] == list(range(1, len(lines) + 1))
    assert [f["question_id"] for f in found] == [line["question_id"] for line in lines]
    ask = pipeline("vqa")
    for at in (0, 7, len(lines) - 1):
        want = ask(lines[at]["image"], lines[at]["question"])
        assert found[at]["answer"] == want.answer
        assert found[at]["answers"][0]["probability"] == pytest.approx(
            want.answers[0].probability, abs=1e-5
        )


def test_standard_output(run, asked, lines):
    status, out, _ = run("answer", "--questions", asked)
    assert status == 0
    assert len([json.loads(line) for line in out.splitlines()]) == len(lines)


def test_bad_lines_are_reported_and_the_rest_goes_on(run, lines, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    image = lines[0]["image"]
    bad = {
        "{": "not readable as JSON: ",
        "[1]": 'expected an object such as {"image": …, "question": …}',
        json.dumps({"image": image}): "'question' is missing or not a string",
        json.dumps({"image": 3, "question": "why"}): "'image' is missing or not a string",
        json.dumps({"image": image, "question": ""}): "the question is empty",
        json.dumps({"image": "none.png", "question": "why"}): f"{tmp_path / 'none.png'}: cannot be",
        json.dumps({"image": str(tmp_path / "text.png"), "question": "why"}): str(tmp_path),
        json.dumps({"image": image, "question": "x" * 200_000}): "the question has 200000",
        json.dumps({"image": image, "question": "why" + " " * 2**20}): "1048",
        "": "not readable as JSON: ",
    }
    rows = [json.dumps(line) for line in lines[:20]]
    for number, row in enumerate(bad):
        rows.insert(2 * number + 1, row)
    path, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join(rows) + "\n")
    status, _, err = run("answer", "--questions", path, "--out", out)
    found = read(out)
    assert status == 1
    assert [f["line"] for f in found] == list(range(1, 31))
    errors = {rows[f["line"] - 1]: f["error"] for f in found if "error" in f}
    assert errors.keys() == bad.keys()
    for row, sentence in bad.items():
        assert errors[row].startswith(sentence), (row[:60], errors[row])
    assert err.splitlines()[-1] == f"30 questions, 10 failed → {out}"
    assert f"{path}, line 2: {errors['{']}" in err.splitlines()
    good = [f for f in found if "error" not in f]
    assert [g["question_id"] for g in good] == [line["question_id"] for line in lines[:20]]


def test_it_goes_on_where_it_ended(run, asked, lines, tmp_path):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    run("answer", "--questions", asked, "--out", whole)
    rows = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(rows[:9]) + rows[9][:17])  # killed while it wrote the tenth
    status, _, err = run("answer", "--questions", asked, "--out", part)
    assert status == 0
    assert err == f"{len(lines)} questions, 9 of them earlier, 0 failed → {part}\n"
    assert part.read_bytes().splitlines()[:9] == whole.read_bytes().splitlines()[:9]
    assert [f["answer"] for f in read(part)] == [f["answer"] for f in read(whole)]
    before = part.read_bytes()
    status, _, err = run("answer", "--questions", asked, "--out", part)
    assert status == 0 and part.read_bytes() == before


@pytest.mark.parametrize(
    "held",
    ["not JSON\n", '{"line": 5}\n', '{"line": 1, "question": "another"}\n', "x\ny\nz\n", "[]\n"],
)
def test_what_is_no_earlier_output_is_left_alone(run, asked, tmp_path, held):
    out = tmp_path / "out.jsonl"
    out.write_text(held)
    status, _, err = run("answer", "--questions", asked, "--out", out)
    assert status == 2
    assert err == (
        f"visualbert answer: {out} exists and does not hold answers to {asked}; remove it, or "
        "write elsewhere\n"
    )
    assert out.read_text() == held


def test_the_questions_are_not_overwritten(run, asked):
    before = asked.read_bytes()
    status, _, err = run("answer", "--questions", asked, "--out", asked)
    assert status == 2 and "is the file of the questions itself" in err
    assert asked.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_is_resumed(asked, lines, tmp_path, signal_, run):
    long = tmp_path / "long.jsonl"
    long.write_text(asked.read_text() * 12)
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "visualbert", "answer", "--questions", long, "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not out.exists() or out.stat().st_size < 20_000):
        time.sleep(0.02)
    process.send_signal(signal_)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGKILL, 130)
    assert "Traceback" not in err
    done = out.read_bytes().count(b"\n")
    assert 0 < done < 12 * len(lines)
    status, _, err = run("answer", "--questions", long, "--out", out)
    assert status == 0
    found = read(out)
    assert [f["line"] for f in found] == list(range(1, 12 * len(lines) + 1))
    assert len({f["answer"] for f in found if f["question_id"] == "q3"}) == 1


# What is refused


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "nothing is asked; pass --question, or --questions with a file"),
        (["--question", "why"], "no picture is given; pass --image"),
        (["--image", "a.png", "--question", "why"], "--image 'a.png': no such file"),
        (["--questions", "q.jsonl"], "--questions 'q.jsonl': no such file"),
        (
            ["--questions", "q.jsonl", "--question", "why"],
            "--questions brings its own images and questions; leave the others out",
        ),
        (
            ["--image", "x", "--question", "why", "--out", "o"],
            "--out is for --questions; answers to --question are printed",
        ),
        (["--image", "x", "--question", "why", "--top", "0"], "--top 0 must be at least 1"),
        (
            ["--image", "x", "--question", "a", "--question", "b", "--explain", "e.png"],
            "--explain draws one question about one picture",
        ),
        (
            ["--image", "x", "--question", "a", "--explain", "e.gif"],
            "--explain 'e.gif' must end in .png, .pdf or .svg",
        ),
        (
            ["--image", "x", "--question", "a", "--explain", "none/e.png"],
            "--explain 'none/e.png': there is no such folder",
        ),
        (["--features", "f", "--question", "a"], "--features 'f': no such file"),
    ],
)
def test_contradictions(run, options, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run("answer", *options) == (2, "", f"visualbert answer: {sentence}\n")


def test_what_is_no_picture_or_question(run, tmp_path):
    (tmp_path / "a.png").write_text("text")
    status, _, err = run("answer", "--image", tmp_path / "a.png", "--question", "why")
    assert status == 2 and "not an image" in err
    status, _, err = run("answer", "--image", EXAMPLE, "--question", " ")
    assert (status, err) == (2, "visualbert answer: text 0 is empty; there is nothing to read\n")


def test_features_of_another_width(run, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 2048), np.float32))
    status, _, err = run("answer", "--features", tmp_path, "--question", "why")
    assert status == 2
    assert err == (
        "visualbert answer: regions 0: features are 2048 wide, and the recipe 'scenes' reads 573: "
        "those of the embedded extractor of this package\n"
    )


def test_a_model_whose_recipe_needs_features(run, bert_vocabulary):
    status, _, err = run(
        "answer", "--image", EXAMPLE, "--question", "why", "--model", embedded(),
        "--recipe", "vqa", "--vocabulary", bert_vocabulary,
    )  # fmt: skip
    assert status == 2
    assert err.startswith(
        "visualbert answer: the recipe 'vqa' reads regions of Pythia's Faster R-CNN"
    )
