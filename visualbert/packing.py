"""How a padded batch becomes few rows of real tokens: planned here in numpy, the same for every
framework.

Each example's visible text and regions are put together, text first, and several examples into one
row, where attention keeps them apart. A model computes on the rows alone and gives back what it
would have given for the padded batch, zeros at padding.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from visualbert.errors import InputError

LEAST_SAVED = 0.05  # of the padded batch, below which packing costs more than it saves
_MASKS = ("attention_mask", "visual_attention_mask")
STEP = 64  # lengths of rows are multiples of it, so that few shapes are compiled


class Packing(NamedTuple):
    """Where every position comes from, and where it goes to; int32 arrays of any framework.

    Args:
        source: (R, L) flat index into the padded batch, (B, S), of each position of the rows; -1
            where a row is empty.
        places: (B, S) flat index into the rows, (R, L), of each position of the padded batch; -1 at
            padding.
        labelled: (B, E) positions with a label, -1 behind them; None where `labels` were not
            planned for.
        text: the rows of the text alone, which late fusion runs through its encoder; None with
            early fusion.
    """

    source: Any
    places: Any
    labelled: Any = None
    text: Any = None


def plan_packing(
    attention_mask: Any,
    visual_attention_mask: Any = None,
    *,
    labels: Any = None,
    image_index: Any = None,
    late_fusion: bool = False,
    step: int | None = STEP,
    allow_empty: bool = False,
) -> Packing:
    """The rows for a batch, to be passed to a model as `packing`.

    Plan outside of compiled functions, where the masks have values. Rows are as long as the longest
    example or up to twice as long, whichever is the cheapest.

    Args:
        attention_mask: (B, T), 1 where there is a token; (B, C, T) with choices.
        visual_attention_mask: (B, V), or (I, V) with `image_index`, 1 where there is a region; text
            alone when left out. With choices it may be (B, C, V).
        labels: (B, T) or (B, S) labels of masked language modelling, for `sparse_prediction`.
        image_index: (B,) row of `visual_attention_mask` that each text asks about.
        late_fusion: also plan for the text alone, as `bypass_transformer` needs it.
        step: of the lengths of rows; 1 for the fewest positions, None for one row that holds all.
        allow_empty: whether examples may show nothing, as do those that fill up a batch; what a
            model says of them means nothing.

    Raises:
        InputError: an example shows nothing, or something has another shape.
    """
    check_plannable(attention_mask, visual_attention_mask, labels, image_index, step)
    text, regions, image_index = flat_masks(attention_mask, visual_attention_mask, image_index)
    visible = joint_visibility(text, regions, image_index)
    for example in np.flatnonzero(~visible.any(1))[: not allow_empty]:
        raise InputError(
            f"example {example} has no visible token and no visible region, expected at least one; "
            "leave it out of the batch"
        )
    source, places = _rows(visible, step)
    return Packing(
        source,
        places,
        None if labels is None else labelled_positions(np.asarray(labels), step or 1),
        plan_packing(text, step=step, allow_empty=True) if late_fusion else None,
    )


def plan_batch(
    inputs: Mapping[str, Any], *, late_fusion: bool = False, step: int | None = STEP
) -> dict[str, Any]:
    """A batch with a packing where one saves work, and without masks where nothing is masked.

    Args:
        inputs: a model's, in numpy.
        late_fusion, step: as in `plan_packing`.
    """
    arrays = {name: x for name, x in inputs.items() if x is not None}
    masks = {name: np.asarray(arrays[name]) for name in _MASKS if name in arrays}
    if "packing" in arrays:
        return arrays
    if all(mask.all() for mask in masks.values()):
        return {name: x for name, x in arrays.items() if name not in masks}
    shapes = {_MASKS[0]: "input_ids" if "input_ids" in arrays else "inputs_embeds"}
    shapes |= {_MASKS[1]: "visual_embeds"} if "visual_embeds" in arrays else {}
    for name, of in shapes.items():
        rank = 2 + (arrays[of].ndim - (2 if of == "input_ids" else 3))
        masks.setdefault(name, np.ones(arrays[of].shape[:rank], np.int32))
    text, regions, index = flat_masks(
        masks[_MASKS[0]], masks.get(_MASKS[1]), arrays.get("image_index")
    )
    if not text.any(1).all():
        return arrays  # an example without text
    late = late_fusion and regions is not None
    packing = plan_packing(text, regions, image_index=index, late_fusion=late, step=step)
    arrays |= masks
    return {**arrays, "packing": packing} if saved(packing) >= LEAST_SAVED else arrays


def check_plannable(
    text: Any, regions: Any, labels: Any, image_index: Any, step: int | None
) -> None:
    """Refuse what no rows can be planned for: arguments of `plan_packing`.

    Raises:
        InputError: the first that does not fit.
    """
    if step is not None and (not isinstance(step, int | np.integer) or step < 1):
        raise InputError(f"step is {step!r}, expected a whole number from 1, or None for one row")
    shape = np.shape(text)
    if len(shape) not in (2, 3) or 0 in shape:
        raise InputError(
            f"attention_mask has shape {shape}, expected (batch, text) or (batch, choices, text), "
            "at least one example and one token"
        )
    found, texts, length = np.shape(regions), math.prod(shape[:-1]), shape[-1]
    same = f"with batch = {shape[0]} as in attention_mask"
    if len(found) == len(shape) == 3:
        fits = found[:2] == shape[:2]
    else:
        fits = len(found) == 2 and (found[0] == shape[0] or image_index is not None)
    if regions is not None and not fits:
        choices = " or (batch, choices, regions)" * (len(shape) == 3)
        raise InputError(
            f"visual_attention_mask has shape {found}, expected (batch, regions){choices} {same}"
        )
    if image_index is not None:
        _check_index(np.asarray(image_index), shape[0], found)
    wide = length + (found[-1] if found else 0)
    if labels is not None and np.shape(labels) not in ((texts, length), (texts, wide)):
        raise InputError(
            f"labels has shape {np.shape(labels)}, expected (batch, text) or (batch, text + "
            f"regions) {same}, text = {length} and text + regions = {wide}"
        )


def _check_index(index: np.ndarray, batch: int, regions: tuple[int, ...]) -> None:
    """Refuse an `image_index` that is not of rows of the regions' mask, of shape `regions`."""
    if len(regions) != 2:
        raise InputError(
            "image_index says which row of visual_attention_mask, (images, regions), each example "
            f"is about, but that has shape {regions}; leave one of the two out"
        )
    if index.shape != (batch,) or index.dtype.kind not in "iu":
        raise InputError(
            f"image_index has shape {index.shape} and type {index.dtype}, expected (batch,) with "
            f"batch = {batch} as in attention_mask, and integers"
        )
    for at in np.flatnonzero((index < 0) | (index >= regions[0]))[:1]:
        raise InputError(
            f"image_index[{at}] is {index[at]}, expected 0 to {regions[0] - 1} (images = "
            f"{regions[0]})"
        )


def flat_masks(text: Any, regions: Any, image_index: Any = None) -> tuple[Any, Any, Any]:
    """Masks without a choice axis, true where there is something, and the image of each text where
    several share one.
    """
    text = np.asarray(text) != 0
    regions = None if regions is None else np.asarray(regions) != 0
    if text.ndim == 3:
        batch, choices, length = text.shape
        text = text.reshape(-1, length)
        if regions is not None and regions.ndim == 3:
            return text, regions.reshape(-1, regions.shape[2]), None
        index = np.arange(batch) if image_index is None else np.asarray(image_index)
        image_index = np.repeat(index, choices)
    return text, regions, image_index


def joint_visibility(text: Any, regions: Any, image_index: Any) -> np.ndarray:
    """(B, S), true where there is a token or a region, of boolean masks."""
    if regions is None:
        return text
    if image_index is not None:
        regions = regions[np.asarray(image_index)]
    return np.concatenate([text, regions], axis=1)


def labelled_positions(labels: np.ndarray, step: int = 1) -> np.ndarray:
    """(B, E), the positions with a label of each example, -1 behind them; E is the largest number
    of them, at least 1, rounded up to a multiple of `step` or to 8, whichever is less.
    """
    labelled = labels >= 0
    widest = max(1, int(labelled.sum(1).max(initial=1)))
    width = min(round_up(widest, min(step, 8)), labels.shape[1])
    order = np.argsort(~labelled, axis=1, kind="stable")[:, :width].astype(np.int32)
    return np.where(np.take_along_axis(labelled, order, 1), order, np.int32(-1))


def saved(packing: Packing) -> float:
    """The share of the padded batch that needs no work."""
    return 1 - packing.source.size / packing.places.size


def runs(source: np.ndarray, length: int) -> list[int]:
    """Lengths of the stretches of one example each, and of nothing, in the order of the rows.

    Args:
        source: as in `Packing`.
        length: S of the padded batch.
    """
    examples = source.ravel() // length
    starts = np.flatnonzero(np.diff(examples, prepend=examples[0] - 1))
    return np.diff(starts, append=examples.size).tolist()


def round_up(size: int, step: int) -> int:
    """The smallest multiple of `step` that is no less than `size`."""
    return -(-size // step) * step


def rows_needed(lengths: np.ndarray, length: int) -> int:
    """How many rows of `length` hold examples of these lengths, none of which is longer."""
    return _best_fit(lengths, length)[2]


def best_rows(lengths: np.ndarray, step: int) -> tuple[int, int]:
    """(R, L) of the cheapest rows that hold examples of these lengths."""
    candidates = _row_lengths(max(int(lengths.max()), 1), step)
    return min(((rows_needed(lengths, x), x) for x in candidates), key=lambda x: cost_of_rows(*x))


def cost_of_rows(count: int, length: int) -> float:
    """Of computing on rows, in positions; attention beside the rest as measured at base size."""
    return count * length * (1 + length / 2048)


def lay_out(visible: np.ndarray, rows: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """`source` and `places` of a `Packing` into so many rows of such a length.

    Args:
        visible: (B, S), true where there is something.
        rows: (R, L), which hold it.
    """
    row, start, _ = _best_fit(visible.sum(1), rows[1])
    return _placed(visible, row, start, rows)


def _rows(visible: np.ndarray, step: int | None) -> tuple[np.ndarray, np.ndarray]:
    """`source` and `places` of the cheapest layout."""
    lengths = visible.sum(1)
    if step is not None:
        return lay_out(visible, best_rows(lengths, step))
    start = np.cumsum(lengths) - lengths
    return _placed(visible, np.zeros_like(lengths), start, (1, int(lengths.sum())))


def _placed(
    visible: np.ndarray, row: np.ndarray, start: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """`source` and `places`, with every example in its row from its start on."""
    lengths = visible.sum(1)
    example, position = np.nonzero(visible)
    within = np.arange(example.size) - (np.cumsum(lengths) - lengths)[example]
    target = row[example] * shape[1] + start[example] + within
    source = np.full(shape[0] * shape[1], -1, np.int32)
    source[target] = example * visible.shape[1] + position
    places = np.full(visible.shape, -1, np.int32)
    places[example, position] = target
    return source.reshape(shape), places


def _row_lengths(longest: int, step: int) -> Iterable[int]:
    """Lengths to try: multiples of `step` from one example up to twice as long, some eight."""
    first = round_up(longest, step)
    return range(first, 2 * first + 1, round_up(max(first // 8, 1), step))


def _best_fit(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Longest first, each into the fullest row that has room."""
    used = np.zeros(len(lengths), np.int64)
    row, start, count = np.zeros_like(lengths), np.zeros_like(lengths), 0
    for example in np.argsort(-lengths, kind="stable"):
        room = used[:count] + lengths[example] <= length
        chosen = int(np.where(room, used[:count], -1).argmax()) if room.any() else count
        count = max(count, chosen + 1)
        row[example], start[example] = chosen, used[chosen]
        used[chosen] += lengths[example]
    return row, start, count
