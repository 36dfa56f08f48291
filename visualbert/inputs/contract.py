"""What a model takes: every input's axes and values, as one table, and the check derived from it.

Shapes are checked on every call that is not being compiled; values only where they can be seen
without waiting for a device. All frameworks raise the same sentences.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from visualbert.config import VisualBertConfig
from visualbert.errors import InputError, did_you_mean
from visualbert.packing import Packing

# Axes: B batch, C choices, T text tokens, V regions, S = T + V, H hidden, F visual features,
# A aligned positions, E phrases, L labels, I images (of which each text has one, B, without
# image_index). A "+" allows a longer axis, which is cut.
AXES = {
    "B": "batch",
    "C": "choices",
    "T": "text",
    "V": "regions",
    "S": "text + regions",
    "H": "hidden_size",
    "F": "visual_embedding_dim",
    "A": "alignments",
    "E": "phrases",
    "L": "num_labels",
    "I": "images",
}
IGNORED_LABELS = (-100, -1)


class Input(NamedTuple):
    """Axes of an input (alternatives behind a bar) and the half-open range of its values.

    Without a range it is floating-point features; with a low bound alone, floating-point targets.
    """

    axes: str
    low: int | None = None
    high: str | int | None = None  # a field of the config, an axis, or a number
    ignored: tuple[int, ...] = ()


BODY_INPUTS = {
    "input_ids": Input("B T", 0, "vocab_size"),
    "inputs_embeds": Input("B T H"),
    "attention_mask": Input("B T", 0, 2),
    "token_type_ids": Input("B T", 0, "type_vocab_size"),
    "position_ids": Input("B T|1 T", 0, "max_position_embeddings"),
    "visual_embeds": Input("I V F"),
    "visual_attention_mask": Input("I V", 0, 2),
    "visual_token_type_ids": Input("I V", 0, "type_vocab_size"),
    "image_text_alignment": Input("B V+ A", 0, "max_position_embeddings", (-1,)),
    "image_index": Input("B", 0, "I"),
    "positions": Input("B E", 0, "S"),
}
INPUTS = {
    "VisualBertModel": BODY_INPUTS,
    "VisualBertForPreTraining": {
        "labels": Input("B T|B S", 0, "vocab_size", IGNORED_LABELS),
        "sentence_image_labels": Input("B|B 1", 0, 2, IGNORED_LABELS),
    },
    "VisualBertForMultipleChoice": {"labels": Input("B|B 1", 0, "C", IGNORED_LABELS)},
    "VisualBertForQuestionAnswering": {"labels": Input("B L|B 1 L|1 B L", 0)},
    "VisualBertForVisualReasoning": {"labels": Input("B|B 1", 0, "num_labels", IGNORED_LABELS)},
    "VisualBertForRegionToPhraseAlignment": {
        "region_to_phrase_position": Input("B E", 0, "S", (-1,)),
        "labels": Input("B E V", 0),
    },
}


def check_inputs(
    config: VisualBertConfig,
    where: str,
    look: Callable[[Any], np.ndarray | None],
    inputs: Mapping[str, Any],
    known: Mapping[str, int],
) -> None:
    """Refuse inputs that do not fit the model or each other.

    Args:
        config: the model's.
        where: the architecture whose table applies.
        look: the values of an array as numpy, or None where they cannot be had now.
        inputs: arrays by name, None where left out.
        known: sizes of axes that are settled already, by letter.

    Raises:
        InputError: the first input that does not fit: what it is, what was expected, and why.
    """
    table = INPUTS[where]
    sizes: dict[str, tuple[int | None, str]] = {
        "H": (config.hidden_size, ""),
        "F": (config.visual_embedding_dim, ""),
        "L": (config.num_labels, ""),
    }
    sizes |= {axis: (size, "") for axis, size in known.items()}
    check_arrays(where, inputs)
    if where == "VisualBertModel":
        _check_presence(config, inputs)
    _settle_joint(sizes)
    for name, expected in table.items():
        array = inputs.get(name)
        if array is not None:
            if inputs.get("image_index") is None:
                expected = expected._replace(axes=expected.axes.replace("I", "B"))
            _check_shape(name, expected, tuple(array.shape), sizes)
            _settle_joint(sizes)
            _check_values(name, expected, look(array), sizes, config)


def _settle_joint(sizes: dict[str, tuple[int | None, str]]) -> None:
    """S, once T and V are known."""
    text, regions = (sizes.get(axis, (None, ""))[0] for axis in "TV")
    if text is not None and regions is not None:
        sizes["S"] = (text + regions, "")


def check_arrays(where: str, inputs: Mapping[str, Any]) -> None:
    """Refuse what is no array, or holds another kind of values than the input takes.

    Raises:
        InputError: the first such input.
    """
    for name, expected in (BODY_INPUTS | INPUTS[where]).items():
        array = inputs.get(name)
        if array is not None and not (name == "positions" and callable(array)):
            _check_array(name, array)
            _check_kind(name, expected, array)


def check_batch(config: VisualBertConfig, where: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch in numpy, refused where the model would refuse it, for a compiled function, which
    sees no values.

    Returns:
        What is there; whole numbers as int32, or each of their types would be compiled for.

    Raises:
        InputError: an unknown name, or the first input that does not fit.
    """
    table = BODY_INPUTS | INPUTS[where]
    given = {name: x for name, x in inputs.items() if x is not None}
    for name in given.keys() - table.keys() - {"packing"}:
        raise InputError(f"{where} takes no input {name!r}{did_you_mean(name, table)}")
    check_arrays(where, given)
    arrays = {name: np.asarray(x) for name, x in given.items() if name != "packing"}
    body = {name: arrays.get(name) for name in BODY_INPUTS}
    ids, embeds = body["input_ids"], body["inputs_embeds"]
    sizes = {}
    if where == "VisualBertForMultipleChoice":
        sizes["B"], sizes["C"] = batch, choices = require(where, ids, embeds).shape[:2]
        body = flatten_choices(
            (batch, choices),
            lambda x: np.repeat(x[:, None], choices, 1),
            lambda x: x.reshape(-1, *x.shape[2:]),
            np.arange(batch),
            **body,
        )
    check_inputs(config, "VisualBertModel", lambda x: x, body, {})
    text: Any = body["input_ids"] if body["inputs_embeds"] is None else body["inputs_embeds"]
    if where == "VisualBertForQuestionAnswering":
        check_answer_position(text.shape[1], body["attention_mask"])
    regions = body["visual_embeds"]
    count = 0 if regions is None else regions.shape[1]
    if "packing" in given:
        late = config.bypass_transformer and regions is not None
        check_packing(given["packing"], late, False, (*text.shape[:2], count))
    if where != "VisualBertModel":
        sizes = {"B": text.shape[0], "T": text.shape[1], "V": count, **sizes}
        check_inputs(config, where, lambda x: x, {k: arrays.get(k) for k in INPUTS[where]}, sizes)
    whole = {k for k, x in arrays.items() if x.dtype.kind in "iub" or k.endswith("_mask")}
    return {**given, **arrays, **{k: arrays[k].astype(np.int32) for k in whole}}


def check_packing(
    packing: Any,
    late_fusion: bool,
    attentions: bool,
    sizes: tuple[int | None, int | None, int | None],
) -> None:
    """Refuse a packing that is for another batch or another kind of model, by its shapes.

    Args:
        packing: what was passed.
        late_fusion: whether the text alone runs through the encoder.
        attentions: whether they are asked for.
        sizes: B, T and V, which is 0 for text alone; None where one is not known.

    Raises:
        InputError: it is no `Packing` or does not fit, or attentions are asked for.
    """
    if not isinstance(packing, Packing):
        raise InputError(
            f"packing is a {type(packing).__name__}, expected what plan_packing(attention_mask, "
            "visual_attention_mask) gives"
        )
    if attentions:
        raise InputError(
            "attentions are asked for, which a packed batch does not have; leave packing out, or "
            "output_attentions"
        )
    if late_fusion and packing.text is None:
        raise InputError(
            "packing has no rows of the text alone, which bypass_transformer needs; plan it with "
            "late_fusion=True"
        )
    batch, text, regions = sizes
    joint = None if text is None or regions is None else text + regions
    source = "this batch, from whose masks it has to be planned"
    known = {axis: (size, source) for axis, size in (("B", batch), ("T", text), ("S", joint))}
    parts = {"places": (packing.places, "B S"), "labelled": (packing.labelled, "B E")}
    if late_fusion:
        parts["text.places"] = packing.text.places, "B T"
    for name, (array, axes) in parts.items():
        if array is not None:
            _check_shape(f"packing.{name}", Input(axes), tuple(array.shape), known)


def is_floating(where: str, name: str) -> bool:
    """Whether an input holds floating-point numbers rather than indices or a mask."""
    return INPUTS[where][name].high is None


def require(where: str, *one_of: Any, **named: Any) -> Any:
    """The input that is there.

    Args:
        where: the architecture that asks.
        *one_of: `input_ids` and `inputs_embeds`, of which one has to be there, with a choice axis.
        **named: one input that has to be there.

    Raises:
        InputError: it is not there, or has no choice axis.
    """
    present = [x for x in (*one_of, *named.values()) if x is not None]
    if not present:
        raise InputError(f"{where} needs {' or '.join(named) or 'input_ids or inputs_embeds'}")
    for name, x in zip(("input_ids", "inputs_embeds")[: len(one_of)], one_of, strict=True):
        if x is not None:
            _check_array(name, x)
            batch, *rest = BODY_INPUTS[name].axes.split()
            _check_shape(name, Input(" ".join([batch, "C", *rest])), tuple(x.shape), {})
    return present[0]


def flatten_choices(
    sizes: tuple[int | None, int],
    repeat: Callable[[Any], Any],
    merge: Callable[[Any], Any],
    each: Any,
    image_index: Any,
    **inputs: Any,
) -> dict[str, Any]:
    """Inputs of a multiple choice as (B·C, …).

    Args:
        sizes: B and C.
        repeat: gives a (B, …) array a choice axis.
        merge: makes one axis of the first two.
        each: (B,) 0 … B-1.
        image_index: (B,) which row of the regions each example is about; `each` when left out.
        **inputs: arrays of (B, C, …), or None. Those of regions may lack the choice axis.

    Raises:
        InputError: a text input without a choice axis, or an axis of another size.
    """
    batch, choices = sizes
    per_image = ("visual_embeds", "visual_attention_mask", "visual_token_type_ids")
    ranks = {k: len(BODY_INPUTS[k].axes.split()) for k in per_image if inputs[k] is not None}
    split = [k for k, rank in ranks.items() if len(getattr(inputs[k], "shape", ())) != rank]
    shared = bool(ranks) and not split
    if image_index is None:
        shared = shared and all(
            x is None or x.shape[0] in (batch, None) or batch is None
            for x in map(inputs.get, per_image)
        )
    if image_index is not None:
        _check_array("image_index", image_index)
        known = {"B": (batch, "the text")}
        _check_shape("image_index", BODY_INPUTS["image_index"], tuple(image_index.shape), known)
        if split:
            raise InputError(
                f"{split[0]} has a choice axis, and image_index says which row of it each example "
                "is about; leave one of the two out"
            )
    elif shared:
        image_index = each
    flat: dict[str, Any] = {
        "image_index": None if image_index is None else merge(repeat(image_index))
    }
    for name, x in inputs.items():
        if x is None or (shared and name in per_image):
            flat[name] = x
            continue
        _check_array(name, x)
        axes = BODY_INPUTS[name].axes.split("|")[0].split()
        shape = tuple(x.shape)
        if len(shape) == len(axes) and "V" in axes[1]:
            x = repeat(x)
        pairs = zip(x.shape[:2], sizes[: len(x.shape)], strict=True)
        same = [None in pair or pair[0] == pair[1] for pair in pairs]
        agrees = len(x.shape) == len(axes) + 1 and all(same)
        if not agrees:
            want = _spelled(["B", "C", *axes[1:]])
            raise InputError(
                f"{name} has shape {_shown(shape)}, expected {want} with batch = {batch} and "
                f"choices = {choices}"
            )
        flat[name] = merge(x)
    return flat


def check_answer_position(text_length: int | None, mask: np.ndarray | None) -> None:
    """Refuse questions that have no second-last token.

    Raises:
        InputError: a text of fewer than two real tokens.
    """
    if text_length is not None and text_length < 2:
        raise InputError(
            f"the text is {text_length} token long, expected at least 2: "
            "VisualBertForQuestionAnswering answers at the second-last one"
        )
    if mask is not None and mask.size and mask.sum(1).min() < 2:
        row = int(mask.sum(1).argmin())
        raise InputError(
            f"attention_mask[{row}] shows {int(mask[row].sum())} of {text_length} tokens, expected "
            "at least 2: VisualBertForQuestionAnswering answers at the second-last one"
        )


def _check_presence(config: VisualBertConfig, inputs: Mapping[str, Any]) -> None:
    if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
        raise InputError("the text is missing; pass input_ids or inputs_embeds")
    if inputs.get("input_ids") is not None and inputs.get("inputs_embeds") is not None:
        raise InputError("input_ids and inputs_embeds are the same text twice; pass one of them")
    if inputs.get("visual_embeds") is None:
        orphans = [
            name
            for name in BODY_INPUTS
            if name.startswith(("visual_", "image_")) and inputs.get(name) is not None
        ]
        if orphans:
            raise InputError(
                f"{orphans[0]} describes regions, but visual_embeds was not passed; pass both or "
                "neither"
            )
    name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
    shape = tuple(inputs[name].shape)
    if 0 in shape[:2]:
        raise InputError(
            f"{name} has shape {_shown(shape)}, expected at least one example and one token"
        )
    longest = config.max_position_embeddings
    if (
        len(shape) > 1
        and shape[1] is not None
        and inputs.get("position_ids") is None
        and shape[1] > longest
    ):
        raise InputError(
            f"{name} has {shape[1]} tokens, expected at most {longest}, the rows of the position "
            "table (max_position_embeddings); truncate the text"
        )


def _check_array(name: str, x: Any) -> None:
    if not hasattr(x, "shape"):
        raise InputError(
            f"{name} is a {type(x).__name__}, expected an array of the framework or of numpy; "
            "convert it, as with numpy.asarray"
        )


def _check_kind(name: str, expected: Input, x: Any) -> None:
    """Masks and features may have any numbers; what is looked up in a table is an integer."""
    kind = str(getattr(x.dtype, "name", x.dtype)).rpartition(".")[2]  # torch.int64, 'int64'
    index = expected.high is not None and not name.endswith("_mask")
    words = "integers" if index else "numbers"
    if not kind.startswith(("int", "uint", "bool", *([] if index else ["float", "bfloat"]))):
        raise InputError(f"{name} is of type {kind}, expected {words}; convert it")


def _check_shape(
    name: str,
    expected: Input,
    shape: tuple[int | None, ...],
    sizes: dict[str, tuple[int | None, str]],
) -> None:
    alternatives = [option.split() for option in expected.axes.split("|")]
    same_rank = [axes for axes in alternatives if len(axes) == len(shape)]
    if not same_rank:
        raise InputError(
            f"{name} has shape {_shown(shape)}, expected {' or '.join(map(_spelled, alternatives))}"
        )
    wrong = [_first_wrong(axes, shape, sizes) for axes in same_rank]
    if all(wrong):
        axis, size, want, source = wrong[0]  # type: ignore[misc]
        raise InputError(_axis_error(name, axis, size, want, source, shape, same_rank))
    axes = same_rank[[bool(w) for w in wrong].index(False)]
    for axis, size in zip(axes, shape, strict=True):
        if axis in AXES and sizes.get(axis, (None, ""))[0] is None:
            sizes[axis] = (size, name)


def _first_wrong(
    axes: list[str], shape: tuple[int | None, ...], sizes: Mapping[str, tuple[int | None, str]]
) -> tuple[str, int, int, str] | None:
    for axis, size in zip(axes, shape, strict=True):
        want, source = (
            (int(axis), "") if axis.isdigit() else sizes.get(axis.rstrip("+"), (None, ""))
        )
        if size is None or want is None:
            continue
        if size != want and not (axis.endswith("+") and size > want):
            return axis.rstrip("+"), size, want, source
    return None


def _axis_error(
    name: str,
    axis: str,
    size: int,
    want: int,
    source: str,
    shape: tuple[int | None, ...],
    alternatives: list[list[str]],
) -> str:
    if axis == "F":
        return (
            f"{name}: the features are {size} wide, the model reads visual_embedding_dim={want}; "
            "use features of the detector that the checkpoint was trained with, or a model of that "
            "width"
        )
    sized = f" with {AXES[axis]} = {want}" if axis in AXES else ""
    reason = f" as in {source}" if source else ""
    expected = " or ".join(map(_spelled, alternatives))
    return f"{name} has shape {_shown(shape)}, expected {expected}{sized}{reason}"


def _check_values(
    name: str,
    expected: Input,
    values: np.ndarray | None,
    sizes: Mapping[str, tuple[int | None, str]],
    config: VisualBertConfig,
) -> None:
    if values is None or values.size == 0 or expected.low is None:
        return
    high = expected.high
    limit = _limit(high, sizes, config) if isinstance(high, str) else high
    bad = ~(values >= expected.low)  # also where it is not a number
    if high is not None and np.issubdtype(values.dtype, np.floating):
        bad |= values != np.floor(values)
    if limit is not None:
        bad |= values >= limit
    if not bad.any():
        return
    for ignored in expected.ignored:
        bad &= values != ignored
    if not bad.any():
        return
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    value = values[at].item()
    if high is not None and isinstance(value, float) and value.is_integer():
        value = int(value)
    raise InputError(f"{name}{list(at)} is {value}, expected {_range(expected, limit)}")


def _range(expected: Input, limit: int | None) -> str:
    """The values that an input may have, in words."""
    if limit is None:
        return f"at least {expected.low}"
    high = expected.high
    source = f" ({AXES.get(high, high)} = {limit})" if isinstance(high, str) else ""
    also = f", or {' or '.join(map(str, expected.ignored))} to be ignored"
    middle = "or" if limit == 2 else "to"
    return f"{expected.low} {middle} {limit - 1}{source}{also if expected.ignored else ''}"


def _limit(
    high: str, sizes: Mapping[str, tuple[int | None, str]], config: VisualBertConfig
) -> int | None:
    return sizes.get(high, (None, ""))[0] if high in AXES else getattr(config, high)


def _shown(shape: tuple[int | None, ...]) -> str:
    return _tuple("?" if size is None else str(size) for size in shape)


def _spelled(axes: list[str]) -> str:
    return _tuple(AXES.get(axis.rstrip("+"), axis) for axis in axes)


def _tuple(parts: Iterable[str]) -> str:
    parts = list(parts)
    return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
