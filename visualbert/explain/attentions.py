"""Attentions of any framework as one numpy array, and how they divide between text and regions.

Late fusion (`bypass_transformer`): a layer that saw text alone is NaN wherever a region would be a
query or a key, so that it can be mistaken neither for one that ignored the regions nor for a zero.

L layers  B batch  N heads  T text  V regions  S=T+V
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from visualbert.errors import InputError

_NUMBERED = re.compile(r"attentions\.(\d+)")  # as `Backend.call` names them
_KEPT = (np.float32, np.float64)


class Split(NamedTuple):
    """Attention by where it comes from and where it goes, each (L, B, N).

    An entry is the mean, over the visible queries of the first kind, of the mass on the visible
    keys of the second, so that `text_to_text + text_to_region` and `region_to_text +
    region_to_region` are 1. Layers that saw no regions have `text_to_text` 1 and NaN elsewhere;
    an example without visible regions has NaN in its regions' rows.
    """

    text_to_text: np.ndarray
    text_to_region: np.ndarray
    region_to_text: np.ndarray
    region_to_region: np.ndarray


def attentions_of(output: Any) -> np.ndarray:
    """The attentions of a model's output as one array (L, B, N, S, S).

    Args:
        output: what a model of any framework returned, the dictionary of `Backend.call`, a sequence
            of one (B, N, S, S) a layer, or an array (L, B, N, S, S).

    Returns:
        float64 if the model computed in it, else float32. Layers that saw text alone (late fusion)
        fill the text's corner and are NaN elsewhere.

    Raises:
        InputError: there are no attentions in it, or their shapes do not fit each other.
    """
    if isinstance(output, np.ndarray) and output.ndim == 5 and output.dtype in _KEPT:
        return output
    layers = [_to_numpy(layer) for layer in _layers(output)]
    if any(x.ndim != 4 or x.shape[2] != x.shape[3] for x in layers):
        wrong = next(x.shape for x in layers if x.ndim != 4 or x.shape[2] != x.shape[3])
        raise InputError(
            f"a layer's attention has shape {wrong}, expected (batch, heads, positions, positions)"
        )
    longest = max(layers, key=lambda x: x.shape[2]).shape
    shorter = {x.shape for x in layers} - {longest}
    if len(shorter) > 1 or any(shape[:2] != longest[:2] for shape in shorter):
        shapes = ", ".join(map(str, sorted({longest} | shorter)))
        raise InputError(f"the layers' attentions have shapes {shapes}: not those of one call")
    whole = np.full((len(layers), *longest), np.nan, np.result_type(*layers))
    for number, layer in enumerate(layers):
        whole[number, :, :, : layer.shape[2], : layer.shape[2]] = layer
    return whole


def _layers(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        numbered = {int(m[1]): k for k in output if (m := _NUMBERED.fullmatch(str(k)))}
        found = output.get("attentions", [output[numbered[n]] for n in sorted(numbered)])
    elif hasattr(output, "attentions"):
        found = output.attentions
    else:
        found = output
    if found is None or (hasattr(found, "__len__") and not len(found)):
        raise InputError(
            "the output holds no attentions; call the model with output_attentions=True"
        )
    if not isinstance(found, (list, tuple)) and np.ndim(found) != 5:
        got = f"shape {tuple(found.shape)}" if hasattr(found, "shape") else type(found).__name__
        raise InputError(
            "attentions must be a model's output, one array a layer, or an array (layers, batch, "
            f"heads, positions, positions), got {got}"
        )
    return list(found)


def _to_numpy(x: Any) -> np.ndarray:
    """float32 or float64; 16-bit numbers become float32."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if "bfloat16" in str(x.dtype) else x  # numpy has no such type
    array = np.asarray(x)
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)


def split_attention(
    attentions: Any, attention_mask: Any, visual_attention_mask: Any = None
) -> Split:
    """How much of each head's attention goes from text to text, text to regions, and so on.

    Args:
        attentions: as for `attentions_of`.
        attention_mask: (B, T), 1 where there is a token, as the model got it; padding on either
            side. A choice axis is folded into the batch.
        visual_attention_mask: (B, V), 1 where there is a region; ones when left out.

    Raises:
        InputError: the masks do not fit the attentions.
    """
    attentions = attentions_of(attentions)
    batch, size = attentions.shape[1], attentions.shape[3]
    text = _mask("attention_mask", attention_mask, batch)
    length = text.shape[1]
    if visual_attention_mask is None:
        visual_attention_mask = np.ones((batch, max(size - length, 0)))
    regions = _mask("visual_attention_mask", visual_attention_mask, batch)
    if length + regions.shape[1] != size:
        raise InputError(
            f"the masks cover {length} tokens and {regions.shape[1]} regions, the attentions "
            f"{size} positions; pass the masks that the model got"
        )
    seen = seen_regions(attentions, length)
    parts = []
    for queries, rows in ((text, slice(0, length)), (regions, slice(length, None))):
        count = queries.sum(1, dtype=np.float64)[:, None]  # B 1
        for keys, columns in ((text, slice(0, length)), (regions, slice(length, None))):
            block = attentions[:, :, :, rows, columns].astype(np.float64)
            mass = np.einsum("lbnqk,bq,bk->lbn", block, queries, keys)
            parts.append(np.divide(mass, count, np.full_like(mass, np.nan), where=count > 0))
    for part in parts[1:]:
        part[~seen] = np.nan
    return Split(*parts)


def _mask(name: str, mask: Any, batch: int) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.ndim == 3:  # choices
        mask = mask.reshape(-1, mask.shape[2])
    if mask.ndim != 2 or mask.shape[0] != batch:
        raise InputError(
            f"{name} has shape {mask.shape}, the attentions are of {batch} examples; pass the mask "
            "that the model got"
        )
    return mask.astype(np.float64)


def seen_regions(attentions: np.ndarray, text_length: int) -> np.ndarray:
    """(L,) whether a layer saw regions, for `attentions` (L, B, N, S, S) or (L, N, S, S).

    Raises:
        InputError: the text is longer than the attentions, or not as long as the layers of a late
            fusion say.
    """
    size = attentions.shape[-1]
    if not 0 < text_length <= size:
        raise InputError(
            f"text_length={text_length} does not fit attentions over {size} positions; it is the "
            "padded length of the text, where the regions begin"
        )
    rows = attentions.reshape(len(attentions), -1, size)[:, 0]
    lengths = (~np.isnan(rows)).sum(1)
    for layer, length in enumerate(lengths):
        if length not in (text_length, size):
            raise InputError(
                f"text_length={text_length}, but layer {layer} saw {length} of {size} positions"
            )
    return (lengths == size) & (size > text_length)
