"""The paper's measure of entity grounding: which heads find what a phrase names.

Source: arXiv 1908.03557 section 5.1 and Fig. 3. For each head and each entity, attention to words
is set to zero and the strongest region is compared with the annotation. The paper does not say
which wordpiece stands for a phrase; this is the last one of its last word, as in the original's
Flickr30K head.

L layers  N heads  S positions  V regions  E entities
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from visualbert.errors import InputError
from visualbert.explain.attentions import attentions_of, seen_regions
from visualbert.inputs.regions import overlap

LIGHT = 0.2  # of the attention: heads that give less to regions are drawn light
LEAST_OVERLAP = 0.5  # intersection over union, as in the task


class Annotated(NamedTuple):
    """One picture with phrases whose boxes are known; a plain tuple in this order will do.

    Fields:
        attentions: a model's output for this picture alone, or an array (L, N, S, S).
        positions: E positions in the text, of each phrase's last wordpiece.
        boxes: (V, 4) of the regions, x1, y1, x2, y2. Padded regions after them are left out.
        gold: E arrays (K, 4), the boxes that each phrase may mean, in the units of `boxes`. Phrases
            without any are not counted.
        text_length: T, the padded length of the text, where the regions begin.
        scores: (V,) confidences of the detections, for the baseline; None where unknown.
    """

    attentions: Any
    positions: Sequence[int]
    boxes: Any
    gold: Sequence[Any]
    text_length: int
    scores: Any = None


@dataclass(frozen=True, eq=False)
class EntityGrounding:
    """What `entity_grounding` measured; shares are between 0 and 1.

    Fields:
        accuracy: (L, N) share of entities whose strongest region is right; NaN in layers that saw
            no regions.
        mass: (L, N) mean attention from entities to regions.
        baseline: the share where the most confident detection is right; NaN without scores.
        bound: the share of entities that any region shows, which no head can surpass.
        count: entities.
    """

    accuracy: np.ndarray
    mass: np.ndarray
    baseline: float
    bound: float
    count: int

    @property
    def light(self) -> np.ndarray:
        """(L, N) the heads that give less than a fifth of their attention to regions."""
        return ~(self.mass >= LIGHT)

    @property
    def best(self) -> tuple[int, int]:
        """Layer and head of the highest accuracy, counted from 0."""
        layer, head = np.unravel_index(np.nanargmax(self.accuracy), self.accuracy.shape)
        return int(layer), int(head)

    def table(self) -> str:
        """Each layer's best head with its accuracy and mass, and the mean over heads, as text;
        layers and heads are counted from 1, as in the paper's figures.
        """
        lines = ["layer  best head  accuracy    mean  to regions"]
        for layer, row in enumerate(self.accuracy):
            if np.isnan(row).all():
                lines.append(f"{layer + 1:5}  saw no regions")
                continue
            head = int(np.nanargmax(row))
            lines.append(
                f"{layer + 1:5}  {head + 1:9}  {row[head]:8.1%}  {row.mean():6.1%}  "
                f"{self.mass[layer, head]:10.1%}"
            )
        baseline = "unknown" if np.isnan(self.baseline) else f"{self.baseline:.1%}"
        lines.append(
            f"{self.count} entities; most confident detection {baseline}; "
            f"no head can surpass {self.bound:.1%}"
        )
        return "\n".join(lines)


def entity_grounding(
    annotated: Iterable[Annotated | tuple], least_overlap: float = LEAST_OVERLAP
) -> EntityGrounding:
    """How often each head's strongest region is the one that a phrase names.

    Args:
        annotated: pictures, read one at a time: as `Annotated`, or tuples in its order.
        least_overlap: intersection over union with any gold box from which on a region is right.

    Raises:
        InputError: a picture's parts do not fit each other, by its number; or there is no entity.
    """
    hits: Any = 0
    mass: Any = 0
    baseline, bound, count = 0.0, 0, 0
    for number, item in enumerate(annotated):
        try:
            picture = _checked(Annotated(*item))
            attentions = _only(picture.attentions)
            kept = [e for e, gold in enumerate(picture.gold) if len(gold)]
            if not kept:
                continue
            right = np.stack([_right(picture, e, least_overlap) for e in kept])  # E V
            rows = _rows(attentions, picture, kept)  # L N E V
            if np.shape(hits) not in ((), rows.shape[:2]):
                raise InputError(f"{rows.shape[:2]} layers and heads, {hits.shape} before it")
        except InputError as error:
            raise InputError(f"picture {number}: {error}") from None
        hits = hits + _hits(rows, right)
        mass = mass + rows.sum((2, 3))
        bound += int(right.any(1).sum())
        baseline += np.nan if picture.scores is None else _first(picture, right)
        count += len(kept)
    if not count:
        raise InputError("no entity with a gold box: there is nothing to measure")
    return EntityGrounding(hits / count, mass / count, baseline / count, bound / count, count)


def _checked(picture: Annotated) -> Annotated:
    """With arrays, each of the shape that it should have."""
    boxes = _boxes("boxes", picture.boxes)
    if not len(boxes):
        raise InputError("it has no regions")
    gold = [_boxes(f"gold[{e}]", g) for e, g in enumerate(picture.gold)]
    if len(picture.positions) != len(gold):
        raise InputError(f"{len(picture.positions)} positions, but {len(gold)} lists of gold boxes")
    for position in picture.positions:
        if not 0 <= position < picture.text_length:
            raise InputError(f"position {position} is not in a text of {picture.text_length}")
    scores = None if picture.scores is None else np.asarray(picture.scores)
    if scores is not None and scores.shape != boxes.shape[:1]:
        raise InputError(f"scores has shape {scores.shape}, expected {boxes.shape[:1]}")
    return picture._replace(boxes=boxes, gold=gold, scores=scores)


def _boxes(name: str, boxes: Any) -> np.ndarray:
    array = np.asarray(boxes, np.float64)
    array = array.reshape(0, 4) if not array.size else array
    if array.ndim != 2 or array.shape[1] != 4:
        raise InputError(f"{name} has shape {array.shape}, expected (boxes, 4)")
    return array


def _only(attentions: Any) -> np.ndarray:
    """(L, N, S, S)."""
    if getattr(attentions, "ndim", 0) == 4:
        attentions = attentions[:, None]
    whole = attentions_of(attentions)
    if whole.shape[1] != 1:
        raise InputError(
            f"the attentions are of {whole.shape[1]} examples; pass one at a time: "
            "attentions_of(output)[:, i]"
        )
    return whole[:, 0]


def _rows(attentions: np.ndarray, picture: Annotated, kept: list[int]) -> np.ndarray:
    """(L, N, E, V) attention of the entities to the regions."""
    seen_regions(attentions, picture.text_length)
    room = attentions.shape[-1] - picture.text_length
    if len(picture.boxes) > room:
        raise InputError(f"{len(picture.boxes)} boxes, but attention to {room} regions")
    positions = [int(picture.positions[e]) for e in kept]
    columns = slice(picture.text_length, picture.text_length + len(picture.boxes))
    return attentions[:, :, positions, columns].astype(np.float64)


def _right(picture: Annotated, entity: int, least: float) -> np.ndarray:
    """(V,) whether a region overlaps one of the entity's boxes enough."""
    return np.any(overlap(picture.boxes, picture.gold[entity]) >= least, axis=1)


def _hits(rows: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(L, N) entities whose strongest region is right; NaN where no region was seen."""
    strongest = rows.argmax(-1)  # L N E
    hit = right[np.arange(len(right)), strongest].sum(-1)
    return np.where(np.isnan(rows).any((2, 3)), np.nan, hit)


def _first(picture: Annotated, right: np.ndarray) -> int:
    """Entities that the most confident detection shows."""
    return int(right[:, int(np.argmax(picture.scores))].sum())
