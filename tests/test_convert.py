"""Conversions that are killed, interrupted, or short of disk: what was there before, or what comes
after, whole; and what a conversion records, splits and remembers.

Processes are killed for real, before every step that changes the target and at moments spread over
the run; a step is seen by an audit hook, which Python calls before each change to a file system.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors import safe_open
from tiny import random_tensors, tiny_config

from visualbert import CheckpointError, VisualBertConfig, __version__
from visualbert.checkpoint import write as writing
from visualbert.checkpoint.flax_files import MSGPACK, ORBAX
from visualbert.checkpoint.initial import InitialValues
from visualbert.checkpoint.keras_files import KERAS
from visualbert.checkpoint.open import DETECTOR, open_checkpoint
from visualbert.checkpoint.read import SafetensorsFiles, read_weights
from visualbert.checkpoint.tensors import DTYPES, ArrayTensors, Selected, cast, total_bytes
from visualbert.checkpoint.write import write_folder
from visualbert.cli.convert import RECORD
from visualbert.parity import differing_bits

ANSWERS = "VisualBertForQuestionAnswering"
PRETRAINING = "VisualBertForPreTraining"
OLD_CONFIG = tiny_config(num_hidden_layers=1)
NEW_CONFIG = tiny_config(num_hidden_layers=1, vocab_size=2000)  # 0.2 MB
WEIGHTS = "model.safetensors"
BIN = "pytorch_model.bin"

# Options of every target, the weights that it makes, and those that lie there before.
SHARDED = ("--max-shard-size", "150KB")
TARGETS = {
    "safetensors": ((), [WEIGHTS]),
    "sharded": (
        SHARDED,
        [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)] + [WEIGHTS + ".index.json"],
    ),
    "bin": (("--to", "bin"), [BIN]),
    "keras": (("--to", "keras"), [KERAS]),
    "msgpack": (("--to", "msgpack"), [MSGPACK]),
    "flax": (("--to", "flax"), [ORBAX]),
}
SLOW = ("keras", "msgpack")  # moved into place as the others are
FIRST = [pytest.param(to, marks=pytest.mark.slow) if to in SLOW else to for to in TARGETS]
BEFORE = {"safetensors": "bin", "sharded": "safetensors"}  # a target of another kind: sharded

RUNNER = """
import json, os, random, signal, sys, threading, time
import numpy, h5py, safetensors, tensorstore, yaml, logging, concurrent.futures
import visualbert.checkpoint.open, visualbert.checkpoint.orbax_write, visualbert.cli.common
import visualbert.checkpoint.torch_write, visualbert.checkpoint.initial, visualbert.cli.convert
from visualbert.cli import main

CHANGES = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")

def watch(target, number, signum, steps):
    def step(event):
        steps.append(event)
        if len(steps) == number:
            os.kill(os.getpid(), signum)
    def hook(event, args):
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if event in CHANGES and str(args[0]).startswith(target):
            step(event)
    sys.addaudithook(hook)
    flush = os.fsync
    def fsync(descriptor):
        step("fsync")
        flush(descriptor)
    os.fsync = fsync

def run(job):
    os.dup2(os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
    os.dup2(1, 2)
    steps = []
    if "target" in job:
        watch(job["target"], job.get("at"), job.get("signal", signal.SIGKILL), steps)
    if "after" in job:
        threading.Timer(job["after"], os.kill, (os.getpid(), signal.SIGKILL)).start()
    start = time.perf_counter()
    try:
        status = main(job["arguments"])
    except SystemExit as exit_:
        status = exit_.code
    sys.stdout.flush()
    with open(job["log"] + ".steps", "w") as file:
        json.dump([steps, time.perf_counter() - start], file)
    os._exit(status)

print("ready", flush=True)
for line in sys.stdin:
    children = []
    for job in json.loads(line):
        children.append(os.fork())
        if not children[-1]:
            run(job)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(ends), flush=True)
"""


class Runner:
    """Runs `visualbert` in processes forked from one that has imported everything."""

    def __init__(self, folder):
        self.log = str(folder / "log")
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout.readline() == "ready\n"

    def many(self, *jobs):
        jobs = [{**job, "log": f"{self.log}{i}"} for i, job in enumerate(jobs)]
        print(json.dumps(jobs), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def __call__(self, *arguments, **options):
        (status,) = self.many({"arguments": list(map(str, arguments)), **options})
        return status

    @property
    def said(self):
        with open(self.log + "0") as file:
            return file.read()

    @property
    def steps(self):
        """What the last one that ended by itself did to the target, and its seconds."""
        with open(self.log + "0.steps") as file:
            return json.load(file)

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def checkpoint(folder, architecture, config, seed=0):
    tensors = random_tensors(architecture, config, seed)
    write_folder(folder, tensors, config.replace(architectures=(architecture,)))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def runner(place):
    made = Runner(place)
    yield made
    made.close()


@pytest.fixture(scope="module")
def new(place):
    return checkpoint(place / "new", ANSWERS, NEW_CONFIG, seed=1)


@pytest.fixture(scope="module")
def old(place, runner):
    """A folder that a conversion made, in every format."""
    source = checkpoint(place / "old", PRETRAINING, OLD_CONFIG)
    made = {}
    for name, (options, _) in TARGETS.items():
        made[name] = place / f"old-{name}"
        options = ("--max-shard-size", "30KB") if name == "sharded" else options
        assert runner("convert", source, made[name], *options) == 0, runner.said
        (made[name] / "notes.txt").write_text("mine")
    return made


def content(folder):
    """Every visible file's bytes by its place."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
    return {name: data for name, data in found.items() if not name.startswith(".")}


def hidden(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


def weights(folder):
    tensors = open_checkpoint(folder).tensors
    return {name: tensors.read(name).tobytes() for name in tensors.specs}


class Versions:
    """Says which of two checkpoints, made by the same commands, a folder is."""

    def __init__(self, old, new, files):
        self.old, self.files = content(old), files
        self.records = [json.loads((f / RECORD).read_text()) for f in (old, new)]
        self.weights = [weights(f) for f in (old, new)]
        self.configs = [(f / "config.json").read_bytes() for f in (old, new)]

    def of_files(self, folder):
        """By the names and texts alone, as who knows nothing of commits sees it."""
        if content(folder) == self.old:
            return "old"
        names = {name.split("/")[0] for name in content(folder)}
        assert names == {*self.files, RECORD, "config.json", "notes.txt"}
        assert (folder / "config.json").read_bytes() == self.configs[1]
        return "new"

    def of(self, folder):
        """By everything that a reader gets, and with nothing left of the other."""
        found = weights(folder)
        assert found in self.weights, "neither the old nor the new weights"
        number = self.weights.index(found)
        assert (folder / "config.json").read_bytes() == self.configs[number]
        assert json.loads((folder / RECORD).read_text()) == self.records[number]
        assert self.of_files(folder) == ("old", "new")[number]
        assert not [name for name in hidden(folder) if name.startswith(".commit-")]
        return ("old", "new")[number]


@pytest.fixture(params=TARGETS)
def case(request, place, runner, old, new):
    """A target, the arguments that replace it, and who tells the versions apart."""
    options, files = TARGETS[request.param]
    before = old[BEFORE.get(request.param, "sharded")]
    target = place / "target"
    arguments = ("convert", new, target, *options, "--force")

    def reset():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(before, target)

    reset()
    assert runner(*arguments, target=str(target)) == 0, runner.said
    steps = runner.steps
    whole = place / f"new-{request.param}"
    if not whole.exists():
        shutil.copytree(target, whole)
    yield target, arguments, reset, Versions(before, whole, files), steps
    shutil.rmtree(target)


# Killed


@pytest.mark.parametrize("case", FIRST, indirect=True)
def test_killed_before_every_step(case, runner):
    """One of the two is there, whole, for whoever opens the folder first: a reader or a writer."""
    target, arguments, reset, versions, (steps, _) = case
    found, pending = [], 0
    last = len(steps) - steps[::-1].index("os.rename")
    important = [i for i, step in enumerate(steps, 1) if step in ("os.rename", "os.link")]
    after = [i + 1 for i in important if i < len(steps)]
    numbers = sorted({*important, *after, *range(1, last, 6)})
    for number in numbers:
        reset()
        if runner(*arguments, target=str(target), at=number) == 0:  # Orbax's files are not counted
            assert number > len(runner.steps[0])
            continue
        waits = any(name.startswith(".commit-") for name in hidden(target))
        pending += waits
        if (target / "config.json").exists():
            versions.of_files(target)
        else:
            assert waits
        if number % 2:
            found.append(versions.of(target))
        assert runner(*arguments) == 0, runner.said
        assert versions.of(target) == "new" and hidden(target) == []
    assert found == sorted(found, reverse=True) and set(found) == {"old", "new"}
    assert pending > 3, "no kill fell between the commit and its end: the test proves nothing"


@pytest.mark.slow
def test_killed_at_any_moment(case, runner):
    """Twenty of them, from the first to the last millisecond, while data are written too."""
    target, arguments, reset, versions, (_, seconds) = case
    states = ["new"]
    for number in range(20):
        if states[-1] == "new":
            reset()
        assert runner(*arguments, after=seconds * number / 18) in (-9, 0)
        states.append(versions.of(target))
    assert states.count("old") > 5
    assert runner(*arguments) == 0
    assert versions.of(target) == "new" and hidden(target) == []


@pytest.mark.parametrize("case", FIRST, indirect=True)
def test_interrupted(case, runner):
    """Ctrl-C before any step: one line, and not a byte has changed."""
    target, arguments, reset, versions, (steps, _) = case
    last = len(steps) - steps[::-1].index("os.rename")
    reset()
    for number in sorted({*range(1, last, 5), *range(last - 4, last + 1)}):
        assert runner(*arguments, target=str(target), at=number, signal=2) == 130
        assert runner.said == "visualbert convert: interrupted\n"
        assert content(target) == versions.old
        assert not any(name.startswith(".commit-") for name in hidden(target))
    assert versions.of(target) == "old"


def pending(case, runner):
    """A target whose conversion was killed between its first and its last move."""
    target, arguments, reset, versions, (steps, _) = case
    last = len(steps) - steps[::-1].index("os.rename")
    reset()
    assert runner(*arguments, target=str(target), at=last - 1) == -9
    assert any(name.startswith(".commit-") for name in hidden(target))
    return target, arguments, versions


@pytest.mark.parametrize("case", ["sharded", "flax"], indirect=True)
def test_reader_waits_for_a_writer(case, runner):
    """Of two that open the folder at once, one finishes what was committed; neither sees a mix."""
    target, _, versions = pending(case, runner)
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(weights(target))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [versions.weights[1]] * 4
    assert versions.of(target) == "new"


def test_foreign_commits(tmp_path, new):
    """A downloaded folder cannot have files moved that are none of a checkpoint's."""
    folder, outside = shutil.copytree(new, tmp_path / "x"), tmp_path / "precious"
    outside.write_text("mine")
    (folder / "notes.txt").write_text("mine")

    def plant(remove, **files):
        shutil.rmtree(folder / ".commit-x", ignore_errors=True)
        (folder / ".commit-x").mkdir()
        (folder / ".commit-x" / ".remove.json").write_text(remove)
        for name, text in files.items():
            (folder / ".commit-x" / name).write_text(text)

    expected = (
        f"{folder}/.commit-x: it is named like an interrupted write and is none of this package; "
        "remove it"
    )
    for remove, files in (
        (json.dumps([str(outside)]), {"extra": "x"}),
        (json.dumps(["../precious"]), {"extra": "x"}),
        (json.dumps(["notes.txt"]), {"extra": "x"}),
        (json.dumps([["config.json"]]), {"extra": "x"}),
        ("{}", {}),
        ("[" * 100_000, {}),
        ("[]", {"notes.txt": "theirs"}),
        ("[]", {".bashrc": "theirs"}),
    ):
        plant(remove, **files)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        assert str(caught.value) == expected
    plant("[]", extra="x")
    (folder / ".commit-x" / ".old").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="is none of this package"):
        open_checkpoint(folder)
    shutil.rmtree(folder / ".commit-x")
    (folder / ".commit-x").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="is none of this package"):
        open_checkpoint(folder)
    assert outside.read_text() == (folder / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["precious", "x"]


def test_names_of_checkpoint_files(tmp_path):
    """The table of what a commit may move covers what the formats are called."""
    names = [WEIGHTS, BIN, KERAS, MSGPACK, ORBAX, DETECTOR, RECORD, "config.json"]
    names += [f for _, files in TARGETS.values() for f in files]
    names += ["pytorch_model-00001-of-00002.bin", BIN + ".index.json"]
    beside = ["processor_config.json", "tokenizer_config.json", "vocab.txt", "features.safetensors"]
    assert all(map(writing._is_ours, names + beside))
    for name in (
        "notes.txt",
        "../config.json",
        "a/config.json",
        "config.json.bak",
        "special_tokens_map.json",
    ):
        assert not writing._is_ours(name)
    for name in [*names, *beside]:
        (tmp_path / name).touch()
    assert writing.held_files(tmp_path) == sorted(
        set(names)
    )  # what goes when another takes its place
    assert writing.RECORD == RECORD


@pytest.mark.parametrize("case", ["sharded", "flax"], indirect=True)
def test_a_killed_commit_is_not_repeated(case, runner):
    """When all has been moved, what another program writes afterwards stays."""
    target, _, _ = pending(case, runner)
    (commit,) = target.glob(".commit-*")
    for path in commit.iterdir():
        if not path.name.startswith("."):
            os.replace(path, target / path.name)
    gone = json.loads((commit / ".remove.json").read_text())
    later = next(name for name in gone if name not in content(target))
    (target / later).write_text("newer")
    writing.finish_commits(target)
    assert (target / later).read_text() == "newer"


# Two at once


def test_two_into_the_same_folder(case, runner, place, new):
    target, arguments, reset, versions, _ = case
    other = ["convert", new, target, "--to", "bin", "--force"]
    for round_ in range(4):
        reset()
        jobs = [{"arguments": list(map(str, a))} for a in (arguments, other)[:: (-1) ** round_]]
        assert runner.many(*jobs) == [0, 0]
        assert weights(target) == versions.weights[1]
        names = {name.split("/")[0] for name in content(target)} - {RECORD, "config.json"}
        assert names in ({*versions.files, "notes.txt"}, {BIN, "notes.txt"})
        assert hidden(target) == []
    shutil.rmtree(target)
    jobs = [[*a[:3], *(o for o in a[3:] if o != "--force")] for a in (arguments, other)]
    done = sorted(runner.many(*({"arguments": list(map(str, a))} for a in jobs)))
    assert done in ([0, 2], [0, 0]) and (done == [0, 2]), "the second replaced the first unasked"
    assert weights(target) == versions.weights[1] and hidden(target) == []


# No space, no permission


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, in memory: a function that mounts one of a size."""
    mounted = tmp_path / "disk"
    mounted.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mounted)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        return mounted

    yield mount
    subprocess.run(["umount", "-l", str(mounted)], capture_output=True)


FULL = """
import os, shutil, sys
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=2**40)  # it fills up later
from visualbert.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("to", TARGETS)
def test_full_disk(to, disk, old, new, runner):
    """Whether that is seen beforehand or in the middle of writing."""
    options, _ = TARGETS[to]
    before = old[BEFORE.get(to, "sharded")]
    mounted = disk(f"size={sum(map(len, content(before).values())) // 1024 + 150}k")
    target = shutil.copytree(before, mounted / "target")
    arguments = ["convert", str(new), str(target), *options, "--force"]
    assert runner(*arguments) == 2
    assert runner.said.startswith(f"visualbert convert: cannot write {target}: it needs 0.")
    assert content(target) == content(before) and hidden(target) == []
    done = subprocess.run(
        [sys.executable, "-c", FULL, *arguments], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"visualbert convert: cannot write {target}: ")
    assert "No space left on device" in done.stderr or to == "keras", done.stderr
    assert done.stderr.endswith("; nothing there was changed\n")
    assert content(target) == content(before) and hidden(target) == []


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from visualbert.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("to", TARGETS)
def test_file_too_large(to, old, new, tmp_path):
    options, _ = TARGETS[to]
    before = old[BEFORE.get(to, "sharded")]
    target = shutil.copytree(before, tmp_path / "target")
    arguments = ["convert", str(new), str(target), *options, "--force"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"visualbert convert: cannot write {target}: ")
    assert done.stderr.endswith("; nothing there was changed\n")
    assert content(target) == content(before) and hidden(target) == []


def test_read_only_target(disk, old, new, runner):
    mounted = disk("size=4m")
    target = shutil.copytree(old["bin"], mounted / "target")
    remount = ["mount", "-o", "remount,ro", str(mounted)]
    assert subprocess.run(remount, capture_output=True).returncode == 0
    for place in (target, mounted / "fresh" / "deep"):
        assert runner("convert", new, place, "--force") == 2
        assert runner.said == (
            f"visualbert convert: cannot write {place}: Read-only file system; nothing there was "
            "changed\n"
        )
    assert content(target) == content(old["bin"]) and sorted(os.listdir(mounted)) == ["target"]
    assert runner("inspect", target) == 0


@pytest.mark.parametrize("case", ["sharded", "flax"], indirect=True)
def test_read_only_with_a_pending_commit(case, disk, runner):
    target, _, _ = pending(case, runner)
    mounted = disk("size=8m")
    copy = shutil.copytree(target, mounted / "target")
    assert subprocess.run(["mount", "-o", "remount,ro", str(mounted)]).returncode == 0
    assert runner("inspect", copy) == 2
    assert runner.said == (
        f"visualbert inspect: {copy}: an interrupted write cannot be finished (Read-only file "
        "system); make the folder writable and try again\n"
    )
    assert subprocess.run(["mount", "-o", "remount,rw", str(mounted)]).returncode == 0
    assert runner("inspect", copy) == 0 and hidden(copy) == []


# Targets


def refused(runner, *arguments):
    assert runner("convert", *arguments) == 2, runner.said
    assert len(runner.said.splitlines()) == 1, runner.said
    return runner.said.removeprefix("visualbert convert: ").rstrip("\n")


def test_targets(new, old, runner, tmp_path):
    before = content(new)
    source = shutil.copytree(new, tmp_path / "source")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    text = refused(runner, source, tmp_path / "link")
    assert text == f"{tmp_path}/link is a file; DST must be a folder"
    (tmp_path / "folder").mkdir()
    assert runner("convert", source, tmp_path / "link") == 0
    assert sorted(os.listdir(tmp_path / "folder")) == ["config.json", RECORD, WEIGHTS]
    assert refused(runner, source, tmp_path / "link") == (
        f"{tmp_path}/link already holds config.json, {RECORD}, {WEIGHTS}; pass --force to replace "
        "it"
    )
    assert refused(runner, source, tmp_path / "file") == (
        f"{tmp_path}/file is a file; DST must be a folder"
    )
    same = " is the source itself; write to another folder"
    own = " is the source's own folder; write to another one"
    for options in ((), ("--force",)):
        assert refused(runner, source, source, *options) == f"{source}{same}"
        assert refused(runner, source / WEIGHTS, source, *options) == f"{source}{own}"
    assert runner("convert", source, tmp_path / "a" / "b" / "c") == 0
    assert runner("convert", source, source / "inside") == 0
    assert {name: data for name, data in content(source).items() if "/" not in name} == before
    assert (tmp_path / "file").read_text() == "mine"


def test_source_inside_the_target(new, runner, tmp_path):
    """A file that is read is never among those that go, by whatever path it was named."""
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    assert runner("convert", new, target, "--to", "bin") == 0
    before = content(target)
    elsewhere.mkdir()
    (elsewhere / BIN).symlink_to(target / BIN)
    shutil.copy(target / "config.json", elsewhere)
    said = f"{elsewhere / BIN} lies in {target}, where it would be replaced; write elsewhere"
    assert refused(runner, elsewhere, target, "--force") == said
    assert content(target) == before
    shutil.copytree(new, target / "sources")
    assert runner("convert", target / "sources", target, "--force") == 0
    assert content(target / "sources") == content(new)


# Records, shards, and equal bytes


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_record(new, runner, tmp_path, place):
    """The source by the name it was given, and the digest of every file that was read."""
    config = NEW_CONFIG.replace(architectures=(PRETRAINING,))
    arrays = dict(random_tensors(PRETRAINING, config).arrays)
    words = "visual_bert.embeddings.word_embeddings.weight"
    arrays["cls.predictions.decoder.weight"] = arrays[words]
    arrays["visual_bert.embeddings.position_ids"] = np.arange(36)[None]
    write_folder(tmp_path / "source", ArrayTensors("arrays", arrays), config)
    options = ("--architecture", ANSWERS, "--new-head")
    for to in TARGETS:
        target = tmp_path / to
        source = os.path.relpath(tmp_path / "source")
        assert runner("convert", source, target, *options, *TARGETS[to][0]) == 0, runner.said
        record = json.loads((target / RECORD).read_text())
        assert record.pop("not needed") == sorted(
            ["visual_bert.embeddings.position_ids"]
            + [n for n in arrays if n.startswith("cls.") and "decoder" not in n]
        )
        assert record == {
            "source": source,
            "family": "VisualBERT under transformers' names",
            "format": "safetensors",
            "sha256": {WEIGHTS: digest(tmp_path / "source" / WEIGHTS)},
            "tool": f"visualbert {__version__}",
            "architecture": ANSWERS,
            "dtype": "float32",
            "drawn anew": ["cls.weight", "cls.bias"],
            "tied, kept once": ["cls.predictions.decoder.weight"],
        }
    for path in (*tmp_path.glob("safetensors/*.safetensors"), *tmp_path.glob("sharded/*ors")):
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        for name, value in record.items():
            assert metadata[f"conversion.{name}"] in (value, json.dumps(value)), path


def test_record_of_every_shard_and_inner_file(old, runner, tmp_path):
    for name in ("sharded", "flax"):
        assert runner("convert", old[name], tmp_path / name) == 0
        found = json.loads((tmp_path / name / RECORD).read_text())["sha256"]
        files = [p for p in old[name].rglob("*") if p.suffix == ".safetensors" or ORBAX in p.parts]
        files = [path for path in files if path.is_file()]
        assert found == {p.relative_to(old[name]).as_posix(): digest(p) for p in files}
        assert len(files) > 1


def test_save_pretrained_ends_a_record(new, runner, tmp_path):
    """It is of other weights from then on."""
    assert runner("convert", new, tmp_path / "x") == 0
    checkpoint(tmp_path / "x", PRETRAINING, OLD_CONFIG)
    assert sorted(os.listdir(tmp_path / "x")) == ["config.json", WEIGHTS]


@pytest.mark.parametrize("to", TARGETS)
def test_equal_bytes(to, new, runner, tmp_path):
    """But for Orbax, whose storage draws the names of its files."""
    for name in ("1", "2"):
        assert runner("convert", new, tmp_path / name, *TARGETS[to][0]) == 0
    one, two = content(tmp_path / "1"), content(tmp_path / "2")
    if to == "flax":
        one, two = ({n: d for n, d in c.items() if "/" not in n} for c in (one, two))
        one["weights"], two["weights"] = (weights(tmp_path / name) for name in ("1", "2"))
    assert one == two
    assert runner("convert", new, tmp_path / "3", "--dtype", "float16", *TARGETS[to][0]) == 0
    assert content(tmp_path / "3") != one


def test_shard_sizes(new, runner, tmp_path):
    largest = max(spec_bytes(read_weights(new)).values())
    for size, number in (("150KB", 150_000), ("40000", 40_000), ("1KiB", 1024), ("0100 kb", 10**5)):
        folder = tmp_path / size
        assert runner("convert", new, folder, "--max-shard-size", size) == 0
        said = runner.said.splitlines()[0]
        index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
        shards = sorted(folder.glob("model-*.safetensors"))
        assert sorted(set(index["weight_map"].values())) == [path.name for path in shards]
        assert said.endswith(f"29 tensors, 0.2 MB in {len(shards)} shards")
        assert [path.name for path in shards] == [
            f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
        ]
        assert index["metadata"]["total_size"] == total_bytes(read_weights(new))
        for path in shards:
            sizes = spec_bytes(SafetensorsFiles("shard", [path]))
            assert sum(sizes.values()) <= number or len(sizes) == 1
            assert all(index["weight_map"][name] == path.name for name in sizes)
        assert differing_bits(read_weights(new), read_weights(folder)) == []
        assert read_weights(folder).verify_checksum()
    assert largest > 150_000, "no tensor is larger than a shard: the test proves less"
    for size in ("200MB", "1GiB", "1 gb", "99999999999"):
        assert runner("convert", new, tmp_path / "one", "--max-shard-size", size, "--force") == 0
        assert runner.said.splitlines()[0].endswith("29 tensors, 0.2 MB")
        assert sorted(os.listdir(tmp_path / "one")) == ["config.json", RECORD, WEIGHTS]
    for size in ("0", "0MB", "-1", "1.5GB", "MB", "", "10XB", "1e9", "9" * 30, "٣MB", "1\n2"):
        assert refused(runner, new, tmp_path / "no", f"--max-shard-size={size}").endswith(
            " is not a size such as 200MB"
        )
    assert refused(runner, new, tmp_path / "no", "--to", "bin", "--max-shard-size", "1MB") == (
        "--max-shard-size splits safetensors; --to bin has one file"
    )
    assert not (tmp_path / "no").exists()


def spec_bytes(tensors):
    return {n: total_bytes(Selected(tensors, [n])) for n in tensors.specs}


def test_transformers_loads_shards(new, runner, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert runner("convert", new, tmp_path / "x", *SHARDED) == 0
    model, info = transformers.VisualBertForQuestionAnswering.from_pretrained(
        tmp_path / "x", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    original = read_weights(new)
    for name in original.specs:
        assert np.array_equal(state[name], original.read(name)), name


# Formats written without their libraries


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_reads_what_is_written_without_it(dtype, new, runner, tmp_path):
    torch = pytest.importorskip("torch")
    assert runner("convert", new, tmp_path, "--to", "bin", "--dtype", dtype) == 0
    original = read_weights(new)
    for mapped in (False, True):
        state = torch.load(tmp_path / BIN, weights_only=True, mmap=mapped)
        assert sorted(state) == sorted(original.specs)
        for name, value in state.items():
            assert value.dtype == getattr(torch, dtype) and value.is_contiguous()
            array = cast(original.read(name), dtype)
            assert value.shape == array.shape and value.untyped_storage().data_ptr() % 64 == 0
            assert bytes(value.untyped_storage()) == array.tobytes()
            assert not value.requires_grad
    damaged = bytearray((tmp_path / BIN).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / BIN).write_bytes(damaged)
    with pytest.raises(CheckpointError, match="the data has changed since it was written"):
        open_checkpoint(tmp_path).tensors.verify_checksum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_orbax_reads_what_is_written_without_it(dtype, new, runner, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    assert runner("convert", new, tmp_path / "x", "--to", "flax", "--dtype", dtype) == 0
    found = ocp.StandardCheckpointer().restore(tmp_path / "x" / ORBAX)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", found)
    ours, theirs = (
        (p / "_METADATA").read_text() for p in (tmp_path / "x" / ORBAX, tmp_path / "theirs")
    )
    assert json.loads(ours) == json.loads(theirs)
    layer = found["visual_bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]
    original = read_weights(new)
    name = "visual_bert.encoder.layer.0.attention.self.query."
    kernel = np.asarray(layer["kernel"])
    assert kernel.dtype.name == dtype
    assert np.array_equal(kernel, cast(original.read(name + "weight"), dtype).T)
    assert np.array_equal(np.asarray(layer["bias"]), cast(original.read(name + "bias"), dtype))
    assert not [
        p for p in (tmp_path / "x").rglob("*") if p.is_file() and b".writing" in p.read_bytes()
    ]


def test_damage_is_not_written_anew(new, runner, tmp_path):
    """Checked while it is copied, and before anything is replaced."""
    for to in ("safetensors", "bin"):
        source = tmp_path / to
        assert runner("convert", new, source, *TARGETS[to][0]) == 0
        path = source / TARGETS[to][1][0]
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        for target in TARGETS:
            text = refused(runner, source, tmp_path / "out", *TARGETS[target][0])
            assert "the data has changed since it was written (CRC-32" in text
            assert not (tmp_path / "out").exists()


def test_damage_anywhere_in_a_bin(new, runner, tmp_path):
    """Writing safetensors compares each tensor that it writes, reading all the others."""
    source, target = tmp_path / "source", tmp_path / "out"
    assert runner("convert", new, source, "--to", "bin") == 0
    whole = (source / BIN).read_bytes()
    tensors = open_checkpoint(source).tensors
    names = [name for name in tensors.specs if tensors.recorded(name) is not None]
    assert len(names) == len(tensors.specs)
    places = {name: whole.find(tensors.read(name).tobytes()) for name in names[:: len(names) // 6]}
    assert min(places.values()) > 0
    for number, (name, at) in enumerate(places.items()):
        damaged = bytearray(whole)
        damaged[at + 1] ^= 16
        (source / BIN).write_bytes(damaged)
        for options in ((), SHARDED, ("--new-head",), ("--dtype", "float16"))[number % 2 :: 2]:
            text = refused(runner, source, target, *options)
            assert "the data has changed since it was written (CRC-32 of " in text
            assert not target.exists()
            assert name in text or options[-1:] == ("float16",) or "archive/data/" in text
    (source / BIN).write_bytes(whole)
    assert runner("convert", source, target, *SHARDED) == 0
    assert not differing_bits(read_weights(target), read_weights(new))


MEASURED = """
import sys
from visualbert.cli import main
status = main(sys.argv[1:])
heavy = [name for name in ("torch", "jax", "tensorflow", "orbax") if name in sys.modules]
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
print(status, peak // 1024, *heavy)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory(tmp_path):
    """Less than 600 MB for 450 MB, whatever the format, and no framework is imported."""
    torch = pytest.importorskip("torch")
    config = VisualBertConfig(visual_embedding_dim=2048, architectures=(PRETRAINING,))
    values = InitialValues(PRETRAINING, config)
    state = {name: torch.from_numpy(values.read(name)) for name in values.specs}
    source = tmp_path / "source"
    source.mkdir()
    torch.save(state, source / BIN)
    (source / "config.json").write_text(config.to_json_string())
    del state
    size = os.path.getsize(source / BIN) >> 20
    for command in [["inspect", source]] + [
        ["convert", source, tmp_path / to, *options] for to, (options, _) in TARGETS.items()
    ]:
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *map(str, command)], capture_output=True, text=True
        )
        status, peak, *heavy = done.stdout.splitlines()[-1].split()
        assert (status, heavy, done.stderr) == ("0", [], "")
        assert int(peak) < 600 and size > 420, command
        if command[0] == "convert":
            shutil.rmtree(command[2])
