"""`visualbert answer`: questions about pictures, one or ten thousand."""

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from visualbert.errors import InputError, MissingBackendError, UsageError

if TYPE_CHECKING:
    from visualbert.answering import Answered, QuestionAnswering
    from visualbert.inputs.regions import Regions

_BATCH = 32
_PICTURES = (".png", ".pdf", ".svg")
_DRAWN_WITH = {"matplotlib": "plots", "PIL": "images"}
_BREAKS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}  # lines, to str.splitlines


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "answer",
        help="answer questions about pictures",
        description="Answer questions about pictures, with the model that comes with the package "
        "or any VisualBERT for question answering. Exits 1 if a line of --questions failed.",
    )
    add = parser.add_argument
    add("--image", action="append", default=[], help="picture, or its id in --features; repeatable")
    add("--question", action="append", default=[], help="asked about every picture; repeatable")
    add(
        "--questions",
        metavar="FILE",
        help='JSON lines of {"image": …, "question": …}; one line out for every line in; pictures '
        "are looked for from the folder of this file on",
    )
    add("--out", metavar="FILE", help="where answers to --questions go; goes on where it ended")
    add("--model", help="folder, file or Hub id; the package's own if left out")
    add("--backend", help="pt, tf or flax; the first that is installed if left out")
    add("--features", metavar="FILE", help="region features by image id, in any format")
    add(
        "--features-index",
        metavar="FILE",
        help="which image is in which row of an HDF5 file, if its name does not lead there",
    )
    add("--answers", metavar="FILE", help="what the labels mean, such as answers_vqa.txt")
    add("--recipe", help="inputs that the model was trained with, if its folder does not say")
    add("--vocabulary", metavar="FILE", help="vocab.txt, if the model's folder has none")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--top", type=int, default=5, metavar="K", help="answers to show (5)")
    add("--explain", metavar="FILE", help="draw what the model looked at: .png, .pdf or .svg")
    add("--json", action="store_true", help="print JSON lines")
    parser.set_defaults(run=run)


class Asked(NamedTuple):
    """A question about an image, which is a file, an id, or the only one there is."""

    image: str | None
    question: str


def run(args: argparse.Namespace) -> int:
    """Answer, print or write, and return 1 if a line failed."""
    _check_options(args)
    with _warnings_in_one_line():
        if args.questions is not None:
            from visualbert.cli.bulk import answer_file

            return answer_file(args, prepare)
        pipeline, look = prepare(args)
        images: list[str | None] = list(args.image) or [None]
        asked = [Asked(image, question) for image in images for question in args.question]
        for (image, _), found in zip(asked, _answers(asked, pipeline, look, args), strict=True):
            if args.json:
                print(as_line(as_json(found, image), sys.stdout))
            else:
                _show(found, image)
            if args.explain is not None:
                _explain(args, image, found)
    return 0


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """What the library warns of, once each, as this command says what it has to say."""
    from visualbert.cli.common import worded

    said = set()

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            print(f"visualbert answer: {worded(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning, module="visualbert")
        warnings.showwarning = show
        yield


def _check_options(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself before anything is loaded."""
    bulk = args.questions is not None
    if bulk and (args.image or args.question):
        raise UsageError("--questions brings its own images and questions; leave the others out")
    if not bulk and not args.question:
        raise UsageError("nothing is asked; pass --question, or --questions with a file")
    if not bulk and not args.image and args.features is None:
        raise UsageError("no picture is given; pass --image")
    if args.features_index is not None and args.features is None:
        raise UsageError("--features-index belongs to --features")
    if args.out is not None and not bulk:
        raise UsageError("--out is for --questions; answers to --question are printed")
    if args.top < 1:
        raise UsageError(f"--top {args.top} must be at least 1")
    if args.explain is not None:
        if bulk or len(args.image) * len(args.question) != 1:
            raise UsageError("--explain draws one question about one picture")
        if not args.explain.lower().endswith(_PICTURES):
            raise UsageError(f"--explain {args.explain!r} must end in .png, .pdf or .svg")
        if not Path(args.explain).absolute().parent.is_dir():
            raise UsageError(f"--explain {args.explain!r}: there is no such folder")
        if args.features is not None and not os.path.isfile(args.image[0]):
            raise UsageError("--explain needs the picture itself: pass its file with --image")
        for library, extra in _DRAWN_WITH.items():
            if importlib.util.find_spec(library) is None:
                raise MissingBackendError(
                    f"--explain needs {library}: pip install visualbert[{extra}]"
                )
    for name in ("features", "features_index", "vocabulary", "questions"):
        value = getattr(args, name)
        if value is not None and not os.path.exists(value):
            raise UsageError(f"--{name.replace('_', '-')} {value!r}: no such file")
    if bulk and not os.path.isfile(args.questions):
        raise UsageError(f"--questions {args.questions!r} must be a file: it is read twice")
    if args.features is None:
        for image in args.image:
            if not os.path.isfile(image):
                raise UsageError(f"--image {image!r}: no such file")


def prepare(args: argparse.Namespace) -> tuple["QuestionAnswering", Any]:
    """The model, and a function from an image to its regions; what takes long comes last."""
    from visualbert.answering import find_model, pipeline
    from visualbert.backend import backend_names
    from visualbert.cli.common import load_backend, quiet_stderr
    from visualbert.inputs.processor import VisualBertProcessor

    model = find_model(args.model)
    processor = VisualBertProcessor.from_pretrained(
        model, recipe=args.recipe, vocabulary=args.vocabulary, revision=args.revision
    )
    look = processor.extractor if args.features is None else _looker(args)
    backend = args.backend or next(iter(backend_names(installed=True)), None)
    if backend is not None:
        load_backend(backend)
    with quiet_stderr(), warnings.catch_warnings(record=True) as caught:
        made = pipeline(
            "vqa",
            model,
            backend=backend,
            processor=processor,
            answers=args.answers,
            revision=args.revision,
        )
    for warning in caught:
        warnings.warn(warning.message, stacklevel=1)
    return made, look


def _looker(args: argparse.Namespace) -> Any:
    """A function from an image's id, or a file named so, to its regions in --features."""
    from visualbert.inputs.features import open_features

    store = open_features(args.features, index=args.features_index)

    def look(image: str | None) -> "Regions":
        if image is None:
            if len(store) != 1:
                raise InputError(
                    f"{args.features} holds {len(store)} images; say with --image which one"
                )
            return store[next(iter(store))]
        stem = Path(image).stem
        return store[stem if image not in store and stem in store else image]

    return look


def _answers(
    asked: list[Asked], pipeline: "QuestionAnswering", look: Any, args: argparse.Namespace
) -> Iterator["Answered"]:
    attentions = args.explain is not None
    regions = {image: look(image) for image in dict.fromkeys(item.image for item in asked)}
    for at in range(0, len(asked), _BATCH):
        part = asked[at : at + _BATCH]
        yield from pipeline.ask(
            [item.question for item in part],
            [regions[item.image] for item in part],
            top=args.top,
            attentions=attentions,
        )


def as_json(found: "Answered", image: str | None) -> dict[str, Any]:
    """What is written of an answered question."""
    return {
        "image": image,
        "question": found.question,
        "answer": found.answer,
        "answers": [
            {"answer": text, "probability": round(probability, 6)}
            for text, probability in found.answers
        ],
    }


def as_line(record: dict[str, Any], stream: Any) -> str:
    """A record as JSON, in characters that the stream has, and in one line for every reader."""
    plain = "utf" not in (getattr(stream, "encoding", None) or "utf-8").lower()
    return json.dumps(record, ensure_ascii=plain).translate(_BREAKS)


def _show(found: "Answered", image: str | None) -> None:
    from visualbert.cli.common import console, table

    print(f"{found.question} ({image})" if image else found.question)
    made = table("answer", "probability", right=("probability",))
    for text, probability in found.answers:
        made.add_row(text, f"{probability:.1%}")
    console().print(made)


def _explain(args: argparse.Namespace, image: str | None, found: "Answered") -> None:
    from visualbert.explain import explain_answer, save_picture

    save_picture(explain_answer(image, found), args.explain)
    print(f"what it looked at: {args.explain}")
