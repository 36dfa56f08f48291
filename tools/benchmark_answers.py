"""How long `visualbert answer` takes, with the package's own model.

The start of the command until its answer; a question about a 640 × 480 picture after loading, in
each framework; and many questions about pictures and about a file of features. Cores busy is the
processor time of the command and its helpers over the time by the clock.

    python tools/benchmark_answers.py [--runs 9] [--questions 10000] [--scenes 1000]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
QUESTIONS = ("What digit is red?", "How many digits are there?", "What is the largest digit?")


def median(seconds: list[float]) -> str:
    """Median and range in milliseconds."""
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    return f"{middle * 1e3:.0f} ms ({low * 1e3:.0f}–{high * 1e3:.0f})"


def command(*words: object) -> tuple[float, float]:
    """Seconds by the clock, and of processors, of a command to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    arguments = [sys.executable, "-m", "visualbert", *map(str, words)]
    subprocess.run(arguments, check=True, capture_output=True)
    spent = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def time_start(runs: int) -> None:
    """From the command to the answer."""
    from visualbert.scenes import EXAMPLE

    asked = ("answer", "--image", EXAMPLE, "--question", QUESTIONS[0], "--backend", "pt")
    command(*asked)
    found = [command(*asked)[0] for _ in range(runs)]
    print(f"start of `visualbert answer` to its answer, PyTorch: {median(found)}")


def time_questions(runs: int) -> None:
    """A picture's file and a question to an answer, after loading."""
    import visualbert
    from visualbert.scenes import EXAMPLE

    for name in visualbert.backend_names(installed=True):
        answer = visualbert.pipeline("vqa", backend=name)
        for question in QUESTIONS:
            answer(EXAMPLE, question)
        found = []
        for at in range(10 * runs):
            start = time.perf_counter()
            answer(EXAMPLE, QUESTIONS[at % len(QUESTIONS)])
            found.append(time.perf_counter() - start)
        print(f"one question about a 640 × 480 picture, {name}: {median(found)}")


def time_many(scenes: int, count: int) -> None:
    """A file of questions, once about pictures, once about their features."""
    from visualbert.inputs.features import write_features
    from visualbert.regions import get_extractor
    from visualbert.scenes.draw import make_scene, paint
    from visualbert.scenes.questions import questions

    extract = get_extractor()
    with tempfile.TemporaryDirectory(prefix="visualbert-bench-") as made:
        folder = Path(made)
        asked, regions = [], []
        rounds = -(-count // (6 * scenes))
        for number in range(scenes):
            scene = make_scene(number, 5, "test")
            path = folder / f"{number}.png"
            paint(scene).save(path)
            regions.append((str(number), extract(path)))
            own = list(questions(scene, rounds))[: -(-count // scenes)]
            asked += [{"image": str(path), "question": q.text} for q in own]
        asked = asked[:count]
        features = folder / "features.safetensors"
        write_features(features, regions)
        lines = folder / "questions.jsonl"
        lines.write_text("".join(json.dumps(line) + "\n" for line in asked))
        for title, options in (("pictures", ()), ("a file of features", ("--features", features))):
            out = folder / f"{title}.jsonl"
            clock, busy = command("answer", "--questions", lines, "--out", out, *options)
            print(
                f"{len(asked)} questions about {scenes} {title}: {clock:.1f} s, "
                f"{len(asked) / clock:.0f} a second, {busy / clock:.2f} cores busy"
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--scenes", type=int, default=1000)
    args = parser.parse_args()
    time_start(args.runs)
    time_questions(args.runs)
    time_many(args.scenes, args.questions)


if __name__ == "__main__":
    main()
