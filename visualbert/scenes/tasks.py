"""The annotations of a scene in the published tasks' formats, and how what was seen matches them.

Field names and types are those of VQA v2, NLVR2, VCR, Flickr30K Entities and COCO, so that their
readers read the benchmark too; what is ours besides is `attributes` in COCO's instances.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np

from visualbert.inputs.regions import overlap
from visualbert.scenes.captions import Phrase, captions, text_of
from visualbert.scenes.choices import problems
from visualbert.scenes.draw import HEIGHT, WIDTH, Scene, outline
from visualbert.scenes.questions import questions
from visualbert.scenes.statements import statements

Record = dict[str, Any]


def matching(boxes: np.ndarray, scene: Scene, least: float = 0.5) -> list[int]:
    """For every region the thing that it shows, -1 where it overlaps none by `least`."""
    found = overlap(boxes, np.array([thing.box for thing in scene.things], float))
    return [int(row.argmax()) if row.max() >= least else -1 for row in found]


def image_name(split: str, number: int) -> str:
    """A scene's image, named as COCO's are."""
    return f"COCO_{split}_{number:012d}.png"


def vqa_records(scene: Scene) -> Iterator[tuple[Record, Record]]:
    """A scene's questions and annotations as VQA v2 has them; `question_type` is the kind."""
    asked = {question.text: question for question in questions(scene)}
    for n, question in enumerate(asked.values()):
        ids = {"image_id": scene.number, "question_id": scene.number * 1000 + n}
        given = [
            {"answer": question.answer, "answer_confidence": "yes", "answer_id": person}
            for person in range(1, 11)
        ]
        annotation = {
            "question_type": question.kind,
            "multiple_choice_answer": question.answer,
            "answers": given,
            "answer_type": _answer_type(question.answer),
            **ids,
        }
        yield {**ids, "question": f"{question.text}?"}, annotation


def _answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdecimal() else "other"


def nlvr2_records(scenes: Sequence[Scene]) -> Iterator[Record]:
    """The statements about four scenes, two pairs, as NLVR2 has them, a line for each pair."""
    number, split = scenes[0].number // 4, scenes[0].split
    first, second, third, fourth = scenes
    pairs = ((first, second), (third, fourth))
    for n, statement in enumerate(statements(*pairs)):
        for pair, label in enumerate(statement.labels):
            names = [image_name(split, scene.number) for scene in pairs[pair]]
            yield {
                "identifier": f"{split}-{number}-{pair}-{n}",
                "sentence": f"{statement.text}.",
                "label": str(label),
                "synset": statement.kind,
                "left_url": f"images/{names[0]}",
                "right_url": f"images/{names[1]}",
            }


def nlvr2_image(scene: Scene) -> str:
    """The name of a scene's image as NLVR2 has it: four scenes make a set, two a pair."""
    number, at = divmod(scene.number, 4)
    return f"{scene.split}-{number}-{at // 2}-img{at % 2}.png"


def vcr_records(scene: Scene) -> Iterator[Record]:
    """A scene's problems as VCR has them; paths lead from the benchmark's folder."""
    image = image_name(scene.split, scene.number)
    for n, problem in enumerate(problems(scene)):
        number = scene.number * 10 + n
        annotation = f"{scene.split}-{number}"
        yield {
            "movie": "scenes",
            "objects": ["digit"] * len(scene.things),
            "img_fn": f"images/{image}",
            "metadata_fn": f"vcr/metadata/{image.removesuffix('.png')}.json",
            "question_orig": problem.question,
            "answer_orig": problem.answers[problem.answer],
            "rationale_orig": problem.reasons[problem.reason],
            "question": _tokens(problem.question),
            "answer_choices": list(map(_tokens, problem.answers)),
            "answer_label": problem.answer,
            "rationale_choices": list(map(_tokens, problem.reasons)),
            "rationale_label": problem.reason,
            "answer_sources": [number] * 4,
            "rationale_sources": [number] * 4,
            "interesting_scores": [0],
            "answer_likelihood": "likely",
            "img_id": f"{scene.split}-{scene.number}",
            "question_number": n,
            "annot_id": annotation,
            "match_fold": f"{scene.split}-0",
            "match_index": number,
        }


def _tokens(text: str) -> list[str | list[int]]:
    """Words, and lists of indices for `[2]`."""
    return [[int(w[1:-1])] if w.startswith("[") else w for w in text.split()]


def vcr_metadata(scene: Scene) -> Record:
    """What VCR keeps beside an image: boxes with their score, outlines, classes."""
    return {
        "boxes": [[*map(float, thing.box), 1.0] for thing in scene.things],
        "segms": [[[[float(x), float(y)] for x, y in outline(t)]] for t in scene.things],
        "names": ["digit"] * len(scene.things),
        "width": WIDTH,
        "height": HEIGHT,
    }


def coco_instances(scene: Scene) -> Iterator[Record]:
    """The things of a scene as COCO has them, with `attributes` besides."""
    for n, thing in enumerate(scene.things):
        x1, y1, x2, y2 = thing.box
        points = outline(thing)
        yield {
            "id": scene.number * 10 + n,
            "image_id": scene.number,
            "category_id": thing.digit + 1,
            "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
            "segmentation": [[float(v) for point in points for v in point]],
            "area": _area(points),
            "iscrowd": 0,
            "attributes": {"colour": thing.colour, "size": thing.size, "scan": thing.scan},
        }


def _area(points: list[tuple[int, int]]) -> float:
    """Of a polygon, in square pixels."""
    x, y = np.array(points, float).T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def coco_captions(scene: Scene) -> Iterator[Record]:
    """A scene's captions as COCO has them."""
    for n, caption in enumerate(captions(scene, 0)):
        yield {"image_id": scene.number, "id": scene.number * 10 + n, "caption": text_of(caption)}


def flickr_records(scene: Scene) -> tuple[str, str]:
    """A scene's sentences and boxes, the text and the XML of Flickr30K Entities.

    Corners are counted from 1 and belong to the box, as there.
    """
    chains: dict[tuple[int, ...], int] = {(): 0}
    lines = []
    for caption in captions(scene, 1):
        for part in caption:
            if not isinstance(part, str):
                chains.setdefault(part.things, scene.number * 100 + len(chains))
        lines.append(" ".join(_bracketed(part, chains) for part in caption))
    size = {"width": WIDTH, "height": HEIGHT, "depth": 3}
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = image_name(scene.split, scene.number)
    _children(ElementTree.SubElement(root, "size"), size)
    for n, thing in enumerate(scene.things):
        names = [number for things, number in chains.items() if n in things]
        if names:
            item = ElementTree.SubElement(root, "object")
            for number in names:
                ElementTree.SubElement(item, "name").text = str(number)
            x1, y1, x2, y2 = thing.box
            corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
            _children(ElementTree.SubElement(item, "bndbox"), corners)
    ElementTree.indent(root)
    return "".join(f"{line}\n" for line in lines), ElementTree.tostring(root, "unicode") + "\n"


def _bracketed(part: str | Phrase, chains: Mapping[tuple[int, ...], int]) -> str:
    if isinstance(part, str):
        return part
    kind = "other" if part.things else "notvisual"
    return f"[/EN#{chains[part.things]}/{kind} {part.text}]"


def _children(parent: ElementTree.Element, values: Mapping[str, int]) -> None:
    for name, value in values.items():
        ElementTree.SubElement(parent, name).text = str(value)
