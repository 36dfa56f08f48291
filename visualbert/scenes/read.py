"""Readers of the published tasks' files: VQA v2, NLVR2, VCR, Flickr30K Entities, COCO.

They read the files that these data sets come in, and a folder that `make_scenes` wrote. A file that
cannot be read ends in one sentence that names it, the line or the entry, and what was expected.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from visualbert.checkpoint.write import finish_commits
from visualbert.errors import InputError

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
Tokens = tuple[str | tuple[int, ...], ...]  # words, and indices of objects
PathLike = str | os.PathLike
_REQUIRED: Any = object()
_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}
_PLURALS = {str: "texts", list: "lists", float: "numbers"}


class VqaQuestion(NamedTuple):
    """A question of VQA v2: as many answers as people gave, none where they are kept back."""

    image_id: int
    question_id: int
    text: str
    answers: tuple[str, ...]
    kind: str  # `question_type`


class Nlvr2Statement(NamedTuple):
    """A sentence about the two `images`; the label is None where it is kept back."""

    identifier: str
    text: str
    label: bool | None
    images: tuple[str, str]  # file names, left and right


class VcrProblem(NamedTuple):
    """A question of VCR with its choices; labels are None where they are kept back."""

    annotation_id: str
    image: str  # path in the data set
    metadata: str  # path in the data set, for `read_vcr_metadata`
    objects: tuple[str, ...]
    question: Tokens
    answers: tuple[Tokens, ...]
    answer: int | None
    reasons: tuple[Tokens, ...]
    reason: int | None


class VcrMetadata(NamedTuple):
    """The objects in an image of VCR."""

    boxes: np.ndarray  # (N, 5) float32: x1, y1, x2, y2 in pixels, score
    outlines: tuple[tuple[np.ndarray, ...], ...]  # an object's polygons, each (points, 2)
    names: tuple[str, ...]
    size: tuple[int, int]  # width, height in pixels


class CocoCaption(NamedTuple):
    """A caption of COCO."""

    image_id: int
    caption_id: int
    text: str


class CocoInstance(NamedTuple):
    """A thing in an image of COCO; `attributes` is empty but in the embedded benchmark."""

    image_id: int
    category: str
    box: Box
    attributes: Mapping[str, Any]


class EntityPhrase(NamedTuple):
    """Words of a sentence that mean something; no boxes where it cannot be seen or is the scene."""

    entity: str
    kinds: tuple[str, ...]
    text: str
    first: int  # index of its first word
    last: int  # index of its last word, where the original reads the phrase
    boxes: tuple[Box, ...]


class EntitySentence(NamedTuple):
    """A sentence of Flickr30K Entities without its brackets."""

    image_id: str
    words: tuple[str, ...]
    phrases: tuple[EntityPhrase, ...]


def _text(path: PathLike) -> str:
    try:
        return Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text (byte {error.start})") from None


def _parsed(text: str, where: str, shift: int | None = None) -> dict[str, Any]:
    """The JSON object in a text; `where` names it, and a line is named where it has several."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if shift is not None else f", line {error.lineno}"
        raise InputError(f"{where}{line}: no JSON ({error.msg})") from None
    except (ValueError, RecursionError):
        raise InputError(f"{where}: no JSON (a number or its depth goes too far)") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object was expected, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _is(value: object, kind: type) -> bool:
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)  # type: ignore[arg-type]
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _field(record: object, name: str, kind: type, where: str, default: Any = _REQUIRED) -> Any:
    """An entry of a JSON object, of the type that it must have."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: an object was expected, got {_shown(record)}")
    value = record.get(name, default)
    if value is _REQUIRED:
        raise InputError(f"{where}: {name!r} is missing")
    if value is not default and not _is(value, kind):
        raise InputError(f"{where}: {name!r} must be {_KINDS[kind]}, got {_shown(value)}")
    return value


def _several(record: Any, name: str, kind: type, where: str) -> list[Any]:
    """A list of entries of one type."""
    values = _field(record, name, list, where)
    for value in values:
        if not _is(value, kind):
            raise InputError(f"{where}: {name!r} must hold {_PLURALS[kind]}, got {_shown(value)}")
    return values


def _entries(path: PathLike, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects in a list of a JSON file, each with the words for where it is."""
    for n, record in enumerate(_field(_parsed(_text(path), str(path)), name, list, str(path))):
        yield record, f"{path}, {name}[{n}]"


def _lines(path: PathLike) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects in a file of JSON lines, each with the words for where it is."""
    for n, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {n}"
            yield _parsed(line, where, n), where


def read_vqa(questions: PathLike, annotations: PathLike | None = None) -> list[VqaQuestion]:
    """VQA v2's questions, with the answers of its annotations where these are given.

    Raises:
        InputError: a file that is none of these, or a question that has no annotation.
    """
    given: dict[int, tuple[tuple[str, ...], str]] = {}
    for record, where in _entries(annotations, "annotations") if annotations is not None else ():
        answers = tuple(
            _field(answer, "answer", str, f"{where}, answers[{n}]")
            for n, answer in enumerate(_field(record, "answers", list, where))
        )
        kind = _field(record, "question_type", str, where, "")
        given[_field(record, "question_id", int, where)] = answers, kind
    found = []
    for record, where in _entries(questions, "questions"):
        number = _field(record, "question_id", int, where)
        if annotations is not None and number not in given:
            raise InputError(f"{where}: question_id {number} has no annotation in {annotations}")
        image = _field(record, "image_id", int, where)
        text = _field(record, "question", str, where)
        found.append(VqaQuestion(image, number, text, *given.get(number, ((), ""))))
    return found


def read_answers(path: PathLike) -> list[str]:
    """The answers of an `answers_vqa.txt`, one a line, in the order of their numbers.

    Raises:
        InputError: a file that is no text or holds none.
    """
    answers = _text(path).removesuffix("\n").split("\n")
    if answers == [""]:
        raise InputError(f"{path} holds no answers; expected one a line")
    return [answer.removesuffix("\r") for answer in answers]


_LABELS = {"true": True, "false": False}


def read_nlvr2(path: PathLike) -> list[Nlvr2Statement]:
    """The statements of an NLVR2 file of JSON lines.

    Raises:
        InputError: a line that is none, a label that is neither, or an identifier without a set.
    """
    found = []
    for record, where in _lines(path):
        identifier = _field(record, "identifier", str, where)
        pair, dash, _ = identifier.rpartition("-")
        if not dash or "-" not in pair:
            raise InputError(
                f"{where}: identifier {identifier!r} is not of the form split-set-pair-sentence"
            )
        given = _field(record, "label", str, where, None)
        if given is not None and given.lower() not in _LABELS:
            raise InputError(f'{where}: label must be "True" or "False", got {_shown(given)}')
        label = None if given is None else _LABELS[given.lower()]
        text = _field(record, "sentence", str, where)
        images = (f"{pair}-img0.png", f"{pair}-img1.png")
        found.append(Nlvr2Statement(identifier, text, label, images))
    return found


def read_vcr(path: PathLike) -> list[VcrProblem]:
    """The problems of a VCR file of JSON lines.

    Raises:
        InputError: a line that is none, a label without a choice, or a mention without an object.
    """
    found = []
    for record, where in _lines(path):
        objects = tuple(_several(record, "objects", str, where))
        choices = [
            tuple(
                _tokens(choice, len(objects), f"{where}, {name}[{n}]")
                for n, choice in enumerate(_field(record, name, list, where))
            )
            for name in ("answer_choices", "rationale_choices")
        ]
        found.append(
            VcrProblem(
                _field(record, "annot_id", str, where),
                _field(record, "img_fn", str, where),
                _field(record, "metadata_fn", str, where),
                objects,
                _tokens(_field(record, "question", list, where), len(objects), where),
                choices[0],
                _choice(record, "answer_label", len(choices[0]), where),
                choices[1],
                _choice(record, "rationale_label", len(choices[1]), where),
            )
        )
    return found


def _tokens(values: object, objects: int, where: str) -> Tokens:
    if not isinstance(values, list):
        raise InputError(f"{where}: a list of words was expected, got {_shown(values)}")
    for value in values:
        numbers = value if isinstance(value, list) else [0] if isinstance(value, str) else [""]
        if not all(_is(n, int) for n in numbers):
            raise InputError(
                f"{where}: a word or a list of object numbers was expected, got {_shown(value)}"
            )
        if isinstance(value, list) and not all(0 <= n < objects for n in value):
            raise InputError(f"{where}: {_shown(value)} is mentioned, of {objects} objects")
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def _choice(record: Any, name: str, choices: int, where: str) -> int | None:
    value = _field(record, name, int, where, None)
    if value is not None and not 0 <= value < choices:
        raise InputError(f"{where}: {name} is {value}, of {choices} choices")
    return value


def read_vcr_metadata(path: PathLike) -> VcrMetadata:
    """The boxes and outlines that VCR keeps beside an image.

    Raises:
        InputError: another file, or as many boxes as there are no outlines or names for.
    """
    where = str(path)
    record = _parsed(_text(path), where)
    boxes = _several(record, "boxes", list, where)
    for n, box in enumerate(boxes):
        if len(box) != 5 or not all(_is(value, float) for value in box):
            raise InputError(f"{where}, boxes[{n}]: five numbers were expected, got {_shown(box)}")
    names = tuple(_several(record, "names", str, where))
    outlines = _several(record, "segms", list, where)
    if not len(names) == len(outlines) == len(boxes):
        raise InputError(
            f"{where}: {len(boxes)} boxes, {len(outlines)} segms, {len(names)} names; expected as "
            "many of each"
        )
    try:
        polygons = tuple(
            tuple(np.array(polygon, np.float32).reshape(-1, 2) for polygon in outline)
            for outline in outlines
        )
    except (TypeError, ValueError):
        raise InputError(f"{where}: 'segms' must hold polygons as lists of [x, y]") from None
    size = (_field(record, "width", int, where), _field(record, "height", int, where))
    return VcrMetadata(np.array(boxes, np.float32).reshape(-1, 5), polygons, names, size)


def read_captions(path: PathLike) -> list[CocoCaption]:
    """The captions of a COCO file.

    Raises:
        InputError: a file that is none.
    """
    return [
        CocoCaption(
            _field(record, "image_id", int, where),
            _field(record, "id", int, where),
            _field(record, "caption", str, where),
        )
        for record, where in _entries(path, "annotations")
    ]


def read_instances(path: PathLike) -> list[CocoInstance]:
    """The things of a COCO file.

    Raises:
        InputError: a file that is none, or a category that it does not list.
    """
    record = _parsed(_text(path), str(path))
    names = {}
    for n, category in enumerate(_field(record, "categories", list, str(path))):
        where = f"{path}, categories[{n}]"
        names[_field(category, "id", int, where)] = _field(category, "name", str, where)
    found = []
    for n, thing in enumerate(_field(record, "annotations", list, str(path))):
        where = f"{path}, annotations[{n}]"
        category = _field(thing, "category_id", int, where)
        if category not in names:
            raise InputError(f"{where}: category_id {category} is not in 'categories'")
        values = _several(thing, "bbox", float, where)
        if len(values) != 4:
            raise InputError(f"{where}: 'bbox' must hold four numbers, got {_shown(values)}")
        x, y, width, height = values
        attributes = _field(thing, "attributes", dict, where, {})
        image = _field(thing, "image_id", int, where)
        box = (x, y, x + width, y + height)
        found.append(CocoInstance(image, names[category], box, attributes))
    return found


def read_entities(sentences: PathLike, annotation: PathLike | None = None) -> list[EntitySentence]:
    """The sentences about one image of Flickr30K Entities, with boxes where these are given.

    Args:
        sentences: `Sentences/<id>.txt`.
        annotation: `Annotations/<id>.xml`. Its corners are counted from 1 and belong to the box;
            here x2 and y2 lie behind it, as everywhere in this package.

    Raises:
        InputError: a bracket that is none, or XML that is not that of the data set.
    """
    boxes = {} if annotation is None else _entity_boxes(annotation)
    found = []
    for n, line in enumerate(_text(sentences).split("\n"), 1):
        if line.strip():
            words, phrases = _unbracketed(line, boxes, f"{sentences}, line {n}")
            found.append(EntitySentence(Path(sentences).stem, words, phrases))
    return found


def _unbracketed(
    line: str, boxes: Mapping[str, tuple[Box, ...]], where: str
) -> tuple[tuple[str, ...], tuple[EntityPhrase, ...]]:
    words: list[str] = []
    phrases = []
    head: list[str] | None = None  # of the bracket that is open
    first = 0
    for token in line.split():
        if token.startswith("[/"):
            parts = token.split("/")
            if head is not None or len(parts) < 3 or not parts[1].startswith("EN#"):
                raise InputError(f"{where}: {token!r} does not open a phrase as [/EN#id/type does")
            head, first = parts[1:], len(words)
            continue
        ends = head is not None and token.endswith("]")
        words.append(token[:-1] if ends else token)
        if ends and head is not None:
            entity, text = head[0].removeprefix("EN#"), " ".join(words[first:])
            place = (first, len(words) - 1, boxes.get(entity, ()))
            phrases.append(EntityPhrase(entity, tuple(head[1:]), text, *place))
            head = None
    if head is not None:
        raise InputError(f"{where}: the phrase [/{'/'.join(head)} is not closed by ]")
    return tuple(words), tuple(phrases)


def _entity_boxes(path: PathLike) -> dict[str, tuple[Box, ...]]:
    text = _text(path)
    if "<!" in text.replace("<!--", ""):
        raise InputError(f"{path}: XML with declarations of its own is not read")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InputError(
            f"{path}, line {error.position[0]}: no XML ({error.msg.partition(':')[0]})"
        ) from None
    boxes: dict[str, tuple[Box, ...]] = {}
    for n, item in enumerate(root.findall("object")):
        corners = item.find("bndbox")
        if corners is None:
            continue
        values = [corners.findtext(name, "") for name in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = map(int, values)
        except ValueError:
            raise InputError(
                f"{path}, object {n + 1}: bndbox must hold four whole numbers, got {values}"
            ) from None
        for name in item.findall("name"):
            entity = (name.text or "").strip()
            boxes[entity] = (*boxes.get(entity, ()), (x1 - 1, y1 - 1, x2, y2))
    return boxes


@dataclass(frozen=True)
class SceneFolder:
    """A benchmark that `make_scenes` wrote; every method reads its file anew."""

    folder: Path
    split: str
    seed: int
    images: int

    def image(self, image_id: int) -> Path:
        """Where the image of a scene is."""
        from visualbert.scenes.tasks import image_name

        return self.folder / "images" / image_name(self.split, image_id)

    def questions(self) -> list[VqaQuestion]:
        """Those about one image, with ten equal answers each."""
        vqa = self.folder / "vqa"
        return read_vqa(
            vqa / f"v2_OpenEnded_mscoco_{self.split}_questions.json",
            vqa / f"v2_mscoco_{self.split}_annotations.json",
        )

    def answers(self) -> list[str]:
        """Those that there are, in the order of their numbers."""
        return read_answers(self.folder / "vqa" / "answers_vqa.txt")

    def statements(self) -> list[Nlvr2Statement]:
        """Those about pairs; their images are in `nlvr2/images`."""
        return read_nlvr2(self.folder / "nlvr2" / f"{self.split}.json")

    def problems(self) -> list[VcrProblem]:
        """Questions with four answers and four reasons; their paths lead from the folder."""
        return read_vcr(self.folder / "vcr" / f"{self.split}.jsonl")

    def sentences(self, image_id: int) -> list[EntitySentence]:
        """Those about a scene, with phrases and boxes."""
        flickr = self.folder / "flickr30k"
        return read_entities(
            flickr / "Sentences" / f"{image_id}.txt", flickr / "Annotations" / f"{image_id}.xml"
        )

    def captions(self) -> list[CocoCaption]:
        """Five a scene."""
        return read_captions(self.folder / "annotations" / f"captions_{self.split}.json")

    def things(self) -> list[CocoInstance]:
        """What there is to see: digits, with colour, size and scan as attributes."""
        return read_instances(self.folder / "annotations" / f"instances_{self.split}.json")


def open_scenes(folder: PathLike) -> SceneFolder:
    """The benchmark in a folder.

    Raises:
        InputError: it holds none, or one of another version.
    """
    from visualbert.scenes.make import FORMAT, RECORD

    folder = Path(folder)
    finish_commits(folder)
    path = folder / RECORD
    if not path.is_file():
        raise InputError(
            f"{folder} holds no benchmark; `visualbert scenes make` writes one (no {RECORD} there)"
        )
    record, where = _parsed(_text(path), str(path)), str(path)
    version = _field(record, "format", int, where)
    if version != FORMAT:
        raise InputError(f"{where}: format {version}, this version of visualbert reads {FORMAT}")
    kinds = {"split": str, "seed": int, "images": int}
    return SceneFolder(
        folder, **{name: _field(record, name, k, where) for name, k in kinds.items()}
    )
