"""`visualbert answer`: one question or thousands, from pictures or from feature files, resumable,
and with one clear sentence for whatever is wrong.
"""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

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
        "": "the line is empty",
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


COMMAND = [sys.executable, "-m", "visualbert", "answer"]


@pytest.fixture(scope="module")
def long(lines, tmp_path_factory):
    """A file of 3,500 questions and more."""
    path = tmp_path_factory.mktemp("long") / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) * (3500 // len(lines) + 1))
    return path


def children(process):
    """The processes that a process started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not path.exists():
        pytest.skip("the system does not list a process's children")
    return [int(pid) for pid in path.read_text().split()]


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def started(path, out, size=2_000):
    """A run that has written a few answers."""
    command = [*COMMAND, "--questions", path, "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and (not out.exists() or out.stat().st_size < size):
        time.sleep(0.02)
    return process


def ended(pids):
    """Whether processes end within ten seconds."""
    until = time.monotonic() + 10
    while any(map(running, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(running, pids))


@pytest.mark.slow
def test_a_process_that_is_killed_is_replaced(long, tmp_path):
    out = tmp_path / "out.jsonl"
    process = started(long, out)
    killed = [
        pid
        for pid in children(process)
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert killed
    os.kill(killed[0], signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    total = len(long.read_text().splitlines())
    assert (process.returncode, err) == (0, f"{total} questions, 0 failed → {out}\n")
    assert [f["line"] for f in read(out)] == list(range(1, total + 1))


@pytest.mark.slow
def test_processes_are_replaced_when_all_were_idle(scenes):
    from visualbert.cli.bulk import _Eyes

    images, extract = list(scenes), get_extractor()
    with _Eyes(extract, Path(), 1) as eyes:
        for _ in range(3):
            eyes.begin(images[0])
            want = extract(images[0]).features
            np.testing.assert_array_equal(eyes.regions(images[0]).features, want)
            for child in multiprocessing.active_children():
                child.kill()
                child.join()
            time.sleep(0.5)
            eyes.begin(images[1])  # refused by the broken pool, and looked at here
            want = extract(images[1]).features
            np.testing.assert_array_equal(eyes.regions(images[1]).features, want)
            eyes.begin(images[2])
            assert multiprocessing.active_children()
            want = extract(images[2]).features
            np.testing.assert_array_equal(eyes.regions(images[2]).features, want)
            eyes._kept.clear()
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_running(long, tmp_path, how):
    process = started(long, tmp_path / "out.jsonl")
    pids = children(process)
    assert len(pids) > 1
    # Ctrl-C comes to every process of a terminal; a kill to one.
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert err == "visualbert answer: interrupted\n"
    assert ended(pids)


@pytest.mark.slow
def test_two_runs_do_not_write_the_same_file(long, tmp_path, run):
    out = tmp_path / "out.jsonl"
    process = started(long, out)
    assert run("answer", "--questions", long, "--out", out) == (
        2, "", f"visualbert answer: --out {str(out)!r}: another run is writing there\n"
    )  # fmt: skip
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert [f["line"] for f in read(out)] == list(range(1, len(read(out)) + 1))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk(run, asked):
    assert run("answer", "--questions", asked, "--out", "/dev/full") == (
        2, "", "visualbert answer: --out '/dev/full': cannot be written: No space left on device; "
        "the same command goes on from there\n",
    )  # fmt: skip


def test_where_nothing_can_be_written(run, asked, tmp_path):
    status, _, err = run("answer", "--questions", asked, "--out", tmp_path)
    assert status == 2
    assert err == f"visualbert answer: --out '{tmp_path}': cannot be written: Is a directory\n"


def test_who_reads_may_stop(asked):
    process = subprocess.Popen(
        [*COMMAND, "--questions", asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert json.loads(process.stdout.readline())["line"] == 1
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(60), err) in [(141, ""), (0, f"{len(read(asked))} questions, 0 failed\n")]


def test_an_unfinished_line_of_something_else_is_left_alone(run, asked, tmp_path):
    out = tmp_path / "notes.txt"
    for held in ("my notes, without a newline", '{"line": 2, "ima', '{"lime'):
        out.write_text(held)
        status, _, err = run("answer", "--questions", asked, "--out", out)
        assert status == 2 and "does not hold answers" in err
        assert out.read_text() == held


def test_lines_beyond_the_questions_are_left_alone(run, asked, tmp_path):
    out = tmp_path / "out.jsonl"
    run("answer", "--questions", asked, "--out", out)
    asked.write_text("".join(asked.read_text().splitlines(keepends=True)[:3]))
    before = out.read_bytes()
    status, _, err = run("answer", "--questions", asked, "--out", out)
    assert status == 2 and "does not hold answers" in err
    assert out.read_bytes() == before


def test_earlier_failures_count_and_other_images_are_other_questions(run, lines, tmp_path):
    path, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
    path.write_text("{\n" + json.dumps(lines[0]) + "\n")
    assert run("answer", "--questions", path, "--out", out)[0] == 1
    status, _, err = run("answer", "--questions", path, "--out", out)
    assert (status, err) == (1, f"2 questions, 2 of them earlier, 1 failed → {out}\n")
    path.write_text("{\n" + json.dumps({**lines[0], "image": "other.png"}) + "\n")
    status, _, err = run("answer", "--questions", path, "--out", out)
    assert status == 2 and "does not hold answers" in err


def test_odd_files(run, lines, tmp_path):
    # A byte order mark, Windows' line ends, a key twice, half a character, wrong bytes, no end.
    image = json.dumps(lines[0]["image"])
    path, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
    rows = [
        f'\ufeff{{"image": {image}, "question": "why"}}\r',
        f'{{"image": "none.png", "question": "who", "image": {image}}}\r',
        f'{{"image": {image}, "question": "half \\ud800", "id": "\\udc80"}}',
        f'{{"image": {image}, "question": "BYTE"}}',
        f'{{"image": {image}, "question": "é 中 \\u2028"}}',
    ]
    path.write_bytes("\n".join(rows).encode().replace(b"BYTE", b"\xff"))
    status, _, err = run("answer", "--questions", path, "--out", out)
    found = read(out)
    assert status == 1
    assert [f["line"] for f in found if "error" in f] == [3, 4]
    assert found[1]["image"] == lines[0]["image"]
    assert (found[2]["question"], found[2]["id"]) == ("half \ud800", "\udc80")
    assert found[2]["error"].startswith("the question holds '\\ud800', half of a character")
    assert found[3]["error"].startswith("not readable as JSON: 'utf-8' codec can't decode")
    assert found[4]["question"] == "é 中 \u2028"
    status, _, err = run("answer", "--questions", path, "--out", out)
    assert (status, err) == (1, f"5 questions, 5 of them earlier, 2 failed → {out}\n")


def test_pictures_are_looked_for_beside_the_questions(run, tmp_path, monkeypatch):
    folder = tmp_path / "größe – 絵"
    (folder / "in").mkdir(parents=True)
    shutil.copy(EXAMPLE, folder / "in" / "ein bild.png")
    rows = [{"image": name, "question": "why"} for name in ("in/ein bild.png", "no.png")]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for where, name in ((tmp_path, folder / "q.jsonl"), (folder, "q.jsonl")):
        monkeypatch.chdir(where)
        status, out, _ = run("answer", "--questions", name)
        first, second = map(json.loads, out.splitlines())
        assert status == 1 and first["image"] == "in/ein bild.png" and first["answer"]
        missing = (folder if where == tmp_path else Path()) / "no.png"
        assert second["error"].startswith(f"{missing}: cannot be read")


def test_what_is_warned_of_names_the_line_and_comes_once(run, lines, tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [lines[0], {**lines[0], "question": "red " * 70}, lines[1]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, err = run("answer", "--questions", path)
    assert status == 0
    assert err.splitlines() == [
        "visualbert answer: line 2: the question is too long; 10 of its wordpieces were left out "
        "to keep 64, as in the original",
        "3 questions, 0 failed",
    ]
    store = tmp_path / "features.safetensors"
    regions = get_extractor()(EXAMPLE)
    write_features(store, [("a", dataclasses.replace(regions, provenance="butd-r101"))])
    path.write_text('{"image": "a", "question": "is there a 3"}\n' * 70)
    status, _, err = run("answer", "--questions", path, "--features", store)
    assert status == 0
    assert len(err.splitlines()) == 2
    assert err.startswith("visualbert answer: the regions: features of bottom-up attention's")


def test_output_that_is_not_unicode(lines, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({**lines[0], "question": "é 😀"}) + "\n")
    found = subprocess.run(
        [*COMMAND, "--questions", path],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        check=True,
    )
    assert json.loads(found.stdout.decode("ascii"))["question"] == "é 😀"


BLOCK = """
import importlib.util, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in {blocked} else found(name, package)
)
from visualbert.cli import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules, "something slow came first"
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("blocked", "more", "sentence"),
    [
        (
            ["skimage"], [],
            "extractor 'blobs' (visualbert.regions.blobs:extractor) needs skimage: pip install "
            "visualbert[images]",
        ),
        (
            ["PIL"], [],
            "extractor 'blobs' (visualbert.regions.blobs:extractor) needs PIL: pip install "
            "visualbert[images]",
        ),
        (
            ["matplotlib"], ["--explain", "a.png"],
            "--explain needs matplotlib: pip install visualbert[plots]",
        ),
        (
            ["PIL"], ["--explain", "a.png"],
            "--explain needs PIL: pip install visualbert[images]",
        ),
        (
            ["torch", "tensorflow", "keras", "jax", "flax"], [],
            "no framework is installed; pip install visualbert[pt], [tf] or [flax]",
        ),
        (
            ["torch"], ["--backend", "pt"],
            "backend 'pt' needs torch: pip install visualbert[pt]",
        ),
    ],
    ids=["skimage", "PIL", "matplotlib", "drawn", "none", "torch"],
)  # fmt: skip
def test_what_is_not_installed(blocked, more, sentence, tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked), "answer", "--image", EXAMPLE,
         "--question", "why", *more],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (found.returncode, found.stdout, found.stderr) == (
        2, "", f"visualbert answer: {sentence}\n"
    )  # fmt: skip


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom visualbert.cli import main\ntry:\n    main(['answer', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'numpy', 'PIL', 'rich', 'tokenizers', 'huggingface_hub', 'torch'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


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
        (
            ["--features", "f", "--image", "x", "--question", "a", "--explain", "e.png"],
            "--explain needs the picture itself: pass its file with --image",
        ),
        (["--questions", "-"], "--questions '-': no such file"),
        (
            ["--questions", os.devnull],
            f"--questions {os.devnull!r} must be a file: it is read twice",
        ),
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
