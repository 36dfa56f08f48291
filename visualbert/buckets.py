"""Few shapes for a framework that compiles for each: batches are packed into rows or kept as they
are, axes are rounded up, and what comes out is cut back.

The first shapes that a predictor sees are kept exactly, so that a program whose batches all look
alike loses nothing. After that, a batch takes the cheapest shape that an earlier one had if that
costs at most a quarter more than a shape of its own.
"""

from bisect import insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from visualbert.config import VisualBertConfig
from visualbert.inputs.contract import BODY_INPUTS, INPUTS
from visualbert.packing import (
    LEAST_SAVED,
    STEP,
    Packing,
    best_rows,
    cost_of_rows,
    flat_masks,
    joint_visibility,
    lay_out,
    round_up,
    rows_needed,
)

EXACT = 4  # shapes that are kept
SLACK = 1.25  # what a shape may cost that need not be compiled, relative to one of a batch's own
_FINE, _LARGE = 16, 512  # the step of rows, which pays from so many real positions on
_STEPS = {"T": 32, "V": 32, "I": 8, "E": 8, "A": 8}
_NO_LIMIT = 2**31
_FILL = {"image_text_alignment": -1, "region_to_phrase_position": -1}
_POSITIONS = ("positions", "region_to_phrase_position")  # in text and regions
_OF_TEXTS = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
# Of a padded position beside one that is computed on, at base size: moving its features, and the
# words that pretraining predicts there.
_PADDED, _PREDICTED = 0.003, 0.3


class Shape(NamedTuple):
    """What is compiled for.

    Args:
        sizes: of the axes, by letter.
        rows: (R, L) of a packing and, with late fusion, of the text alone; none without a packing.
    """

    sizes: dict[str, int]
    rows: tuple[tuple[int, int], ...] = ()


class Fitted(NamedTuple):
    """A batch in the shape in which it is run."""

    inputs: dict[str, Any]
    before: dict[str, int]  # the sizes of its axes, by letter
    after: dict[str, int]


class Buckets:
    """The shapes of one predictor's batches.

    Args:
        architecture: whose inputs they are.
        config: the model's.
        packs: whether batches may be packed.
    """

    def __init__(self, architecture: str, config: VisualBertConfig, packs: bool) -> None:
        self.table = {**BODY_INPUTS, **INPUTS[architecture]}
        self.config = config
        self.packs = packs and config.packing != "never"
        self.late = config.bypass_transformer
        predicts = architecture == "VisualBertForPreTraining"
        self.padded = _PREDICTED if predicts else _PADDED
        self.exact: set[Any] = set()
        self.known: dict[Any, list[Shape]] = defaultdict(list)

    def fit(self, inputs: Mapping[str, Any]) -> Fitted:
        """A batch in a shape that was seen, or in a bucket; with a packing where one saves work."""
        arrays = {name: x for name, x in inputs.items() if x is not None}
        if "packing" in arrays:
            return Fitted(arrays, {}, {})
        if "image_text_alignment" in arrays:
            count = arrays["visual_embeds"].shape[-2]
            arrays["image_text_alignment"] = arrays["image_text_alignment"][..., :count, :]
        before = self._sizes(arrays)
        text_mask = arrays.get("attention_mask")
        bare = text_mask is not None and not text_mask.any(-1).all()  # an example without text
        if bare or any("labels" in name for name in arrays):  # filling would change what comes out
            return Fitted(arrays, before, before)
        masks = [arrays.pop(f"{kind}attention_mask", None) for kind in ("", "visual_")]
        if all(mask is None or mask.all() for mask in masks) and self._kept(arrays):
            return Fitted(arrays, before, before)
        arrays = _with_masks(arrays, masks)
        shape = self._shape(arrays, before)
        filled = self._filled(arrays, before, shape.sizes)
        if shape.rows:
            planned = zip(self._visible(filled), shape.rows, strict=True)
            joint, *text = [Packing(*lay_out(visible, rows)) for visible, rows in planned]
            filled["packing"] = joint._replace(text=text[0]) if text else joint
        return Fitted(filled, before, shape.sizes)

    def cut(self, outputs: Mapping[str, np.ndarray], fitted: Fitted) -> dict[str, np.ndarray]:
        """What came out for `fitted`, as if the batch had been run as it was."""
        if fitted.before == fitted.after:
            return dict(outputs)
        return {name: self._cut(name, x, *fitted[1:]) for name, x in outputs.items()}

    def _cut(
        self, name: str, x: np.ndarray, before: dict[str, int], after: dict[str, int]
    ) -> np.ndarray:
        kind = name.partition(".")[0]
        texts = before["B"] * (before.get("C", 1) if kind in _OF_TEXTS else 1)
        x = x[:texts]
        if kind == "last_hidden_state" and "E" in before:
            x = x[:, : before["E"]]
        elif kind in ("last_hidden_state", "prediction_logits", "hidden_states", "attentions"):
            for axis in (2, 3) if kind == "attentions" else (1,):
                text = np.arange(before["T"])
                regions = after["T"] + np.arange(before.get("V", 0))
                joint = x.shape[axis] > after["T"]
                x = x.take(np.concatenate([text, regions]) if joint else text, axis)
        if kind == "logits" and "E" in before:
            x = x[:, : before["E"], : before["V"]]
        return x

    def _axes(self, name: str, x: np.ndarray, shared: bool) -> list[str]:
        """The letters of an array's axes; regions are of images where texts share them."""
        axes = self.table[name].axes.split("|")[0].replace("+", "").split()
        axes = ["B" if axis == "I" and not shared else axis for axis in axes]
        return axes if x.ndim == len(axes) else [axes[0], "C", *axes[1:]]

    def _sizes(self, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        shared = "image_index" in arrays
        for name, x in arrays.items():
            for axis, size in zip(self._axes(name, x, shared), x.shape, strict=True):
                if axis in ("B", "C", *_STEPS):
                    sizes[axis] = max(size, sizes.get(axis, 0))  # position_ids may have one row
        return sizes

    def _rounded(self, axis: str, size: int) -> int:
        if axis == "B":
            return round_up(size, 8) if size > 8 else 1 << (size - 1).bit_length()
        longest = self.config.max_position_embeddings if axis == "T" else _NO_LIMIT
        return size if axis == "C" else max(size, min(round_up(size, _STEPS[axis]), longest))

    def _kept(self, arrays: Mapping[str, np.ndarray]) -> bool:
        """Whether a batch without padding keeps its shape."""
        key = tuple((name, x.shape) for name, x in arrays.items())
        if len(self.exact) < EXACT:
            self.exact.add(key)
        return key in self.exact

    def _shape(self, arrays: Mapping[str, np.ndarray], before: dict[str, int]) -> Shape:
        """One that has room for a batch: a known one, or else a new one, which may leave as much
        room around the rows as any other has.
        """
        lengths = [visible.sum(1) for visible in self._visible(arrays)] if self.packs else []
        rounded = {axis: self._rounded(axis, size) for axis, size in before.items()}
        own = Shape(rounded)
        if lengths:
            rows = tuple(best_rows(of, _FINE if of.sum() >= _LARGE else STEP) for of in lengths)
            own = min(own, Shape(rounded, rows), key=self._cost)
        most = SLACK * self._cost(own)
        kind = before.get("C"), *((name, x.dtype) for name, x in sorted(arrays.items()))
        known = self.known[kind]
        for shape in takewhile(lambda x: self._cost(x) <= most, known):  # the cheapest first
            if _holds(shape, before, lengths):
                return shape
        room = {
            axis: max([size, *(x.sizes[axis] for x in known)]) for axis, size in rounded.items()
        }
        if self._cost(own._replace(sizes=room)) <= most:
            own = own._replace(sizes=room)
        insort(known, own, key=self._cost)
        return own

    def _cost(self, shape: Shape) -> float:
        """Of running a batch in a shape, in positions."""
        examples = shape.sizes["B"] * shape.sizes.get("C", 1)
        text, length = shape.sizes["T"], shape.sizes["T"] + shape.sizes.get("V", 0)
        late = self.late and "V" in shape.sizes
        padded = [(examples, length), (examples, text)][: 1 + late]
        computed = sum(cost_of_rows(*rows) for rows in shape.rows or padded)
        return computed * (1 + LEAST_SAVED * bool(shape.rows)) + self.padded * examples * length

    def _visible(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """(B, S), true where there is something; with late fusion also (B, T). An example without
        text fills a batch up, and does not see an image that it shares either.
        """
        text, regions, index = flat_masks(
            arrays["attention_mask"], arrays.get("visual_attention_mask"), arrays.get("image_index")
        )
        joint = joint_visibility(text, regions, index) & text.any(1, keepdims=True)
        return [joint, text] if self.late and regions is not None else [joint]

    def _filled(
        self, arrays: Mapping[str, np.ndarray], before: dict[str, int], after: dict[str, int]
    ) -> dict[str, Any]:
        """Every array with its axes rounded up, behind their ends."""
        found: dict[str, Any] = {}
        for name, x in arrays.items():
            axes = self._axes(name, x, "image_index" in arrays)
            room = [
                (0, after[axis] - size if before.get(axis) == size else 0)
                for axis, size in zip(axes, x.shape, strict=True)
            ]
            if name in _POSITIONS:
                x = x + (x >= before["T"]) * (after["T"] - before["T"])
            found[name] = np.pad(x, room, constant_values=_FILL.get(name, 0))
        return found


def _holds(shape: Shape, sizes: Mapping[str, int], lengths: Sequence[np.ndarray]) -> bool:
    """Whether a batch of such sizes, with examples of such lengths, has room in a shape."""
    return all(size <= shape.sizes[axis] for axis, size in sizes.items()) and all(
        found.max() <= length and rows_needed(found, length) <= count
        for found, (count, length) in zip(lengths, shape.rows, strict=False)
    )


def _with_masks(
    arrays: Mapping[str, np.ndarray], masks: list[np.ndarray | None]
) -> dict[str, np.ndarray]:
    """Inputs with both masks, ones where they were left out."""
    text = arrays.get("input_ids")
    shape = arrays["inputs_embeds"].shape[:-1] if text is None else text.shape
    found = dict(arrays)
    found["attention_mask"] = np.ones(shape, np.int32) if masks[0] is None else masks[0]
    if "visual_embeds" in arrays:
        shape = arrays["visual_embeds"].shape[:-1]
        found["visual_attention_mask"] = np.ones(shape, np.int32) if masks[1] is None else masks[1]
    return found
