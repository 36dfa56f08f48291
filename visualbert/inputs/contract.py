"""What a model takes: every input's axes and values, as one table, and the check derived from it.

Shapes are checked on every call that is not being compiled; values only where they can be seen
without waiting for a device. All frameworks raise the same sentences.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from visualbert.config import VisualBertConfig
from visualbert.errors import InputError

# Axes: B batch, C choices, T text tokens, V regions, S = T + V, H hidden, F visual features,
# A aligned positions, E phrases, L labels. A "+" allows a longer axis, which is cut.
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
    "visual_embeds": Input("B V F"),
    "visual_attention_mask": Input("B V", 0, 2),
    "visual_token_type_ids": Input("B V", 0, "type_vocab_size"),
    "image_text_alignment": Input("B V+ A", 0, "max_position_embeddings", (-1,)),
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
    if where == "VisualBertModel":
        _check_presence(config, inputs)
    for name, expected in table.items():
        array = inputs.get(name)
        if array is not None:
            _check_shape(name, expected, tuple(array.shape), sizes)
            _check_values(name, expected, look(array), sizes, config)


def is_floating(where: str, name: str) -> bool:
    """Whether an input holds floating-point numbers rather than indices or a mask."""
    return INPUTS[where][name].high is None


def require(where: str, *one_of: Any, **named: Any) -> Any:
    """The input that is there.

    Args:
        where: the architecture that asks.
        *one_of: `input_ids` and `inputs_embeds`, of which one has to be there.
        **named: one input that has to be there.
    """
    present = [x for x in (*one_of, *named.values()) if x is not None]
    if not present:
        raise InputError(f"{where} needs {' or '.join(named) or 'input_ids or inputs_embeds'}")
    return present[0]


def flatten_choices(
    sizes: tuple[int | None, int],
    repeat: Callable[[Any], Any],
    merge: Callable[[Any], Any],
    **inputs: Any,
) -> dict[str, Any]:
    """Inputs of a multiple choice as (B·C, …).

    Args:
        sizes: B and C.
        repeat: gives a (B, …) array a choice axis.
        merge: makes one axis of the first two.
        **inputs: arrays of (B, C, …), or None. Those of regions may lack the choice axis.

    Raises:
        InputError: a text input without a choice axis, or an axis of another size.
    """
    batch, choices = sizes
    flat: dict[str, Any] = {}
    for name, x in inputs.items():
        if x is None:
            flat[name] = None
            continue
        axes = BODY_INPUTS[name].axes.split("|")[0].split()
        if len(x.shape) == len(axes) and "V" in axes[1]:
            x = repeat(x)
        agrees = len(x.shape) == len(axes) + 1 and all(
            None in (size, want) or size == want for size, want in zip(x.shape, sizes, strict=False)
        )
        if not agrees:
            raise InputError(
                f"{name} has shape {_shown(tuple(x.shape))}, expected "
                f"{_spelled(['B', 'C', *axes[1:]])} with batch = {batch} and choices = {choices}"
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
            "VisualBertForQuestionAnswering reads the second-last token: one is too few"
        )
    if mask is not None and mask.size and mask.sum(1).min() < 2:
        row = int(mask.sum(1).argmin())
        raise InputError(
            f"attention_mask[{row}] shows {int(mask[row].sum())} tokens, but "
            "VisualBertForQuestionAnswering reads the second-last one"
        )


def _check_presence(config: VisualBertConfig, inputs: Mapping[str, Any]) -> None:
    if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
        raise InputError("pass either input_ids or inputs_embeds, one of them and not both")
    if inputs.get("visual_embeds") is None:
        orphans = [
            name
            for name in ("visual_attention_mask", "visual_token_type_ids", "image_text_alignment")
            if inputs.get(name) is not None
        ]
        if orphans:
            raise InputError(f"{orphans[0]} was passed without visual_embeds")
    text = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    shape = tuple(text.shape)
    longest = config.max_position_embeddings
    if (
        len(shape) > 1
        and shape[1] is not None
        and inputs.get("position_ids") is None
        and shape[1] > longest
    ):
        raise InputError(
            f"{shape[1]} tokens of text are too many: the position table has {longest} rows "
            "(max_position_embeddings); truncate the text"
        )


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
            f"{name} has shape {_shown(shape)}, expected {len(alternatives[0])} axes: "
            f"{_spelled(alternatives[0])}"
        )
    wrong = [_first_wrong(axes, shape, sizes) for axes in same_rank]
    if all(wrong):
        axis, size, want, source = wrong[0]  # type: ignore[misc]
        raise InputError(_axis_error(name, axis, size, want, source, shape, same_rank[0]))
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
    axes: list[str],
) -> str:
    if axis == "F":
        return (
            f"{name}: the features are {size} wide, the model reads visual_embedding_dim={want}; "
            "use features of the detector that the checkpoint was trained with, or a model of that width"
        )
    reason = f" as in {source}" if source else f" ({AXES[axis]})" if axis in AXES else ""
    return (
        f"{name} has shape {_shown(shape)}, expected {_spelled(axes)} with "
        f"{AXES.get(axis, axis)} = {want}{reason if AXES.get(axis) not in reason else ''}"
    )


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
    limit = high if isinstance(high, int) or high is None else _limit(high, sizes, config)
    bad = values < expected.low
    if limit is not None:
        bad |= values >= limit
    if not bad.any():
        return
    for ignored in expected.ignored:
        bad &= values != ignored
    if not bad.any():
        return
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    also = f", or {' or '.join(map(str, expected.ignored))}" if expected.ignored else ""
    top = f" and below {limit}" + (
        f" ({high})" if isinstance(high, str) and high not in AXES else ""
    )
    raise InputError(
        f"{name}{list(at)} is {values[at]}, expected at least {expected.low}"
        f"{top if limit is not None else ''}{also}"
    )


def _limit(
    high: str, sizes: Mapping[str, tuple[int | None, str]], config: VisualBertConfig
) -> int | None:
    return sizes.get(high, (None, ""))[0] if high in AXES else getattr(config, high)


def _shown(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("?" if s is None else str(s) for s in shape) + ")"


def _spelled(axes: list[str]) -> str:
    return "(" + ", ".join(AXES.get(a.rstrip("+"), a) for a in axes) + ")"
