"""What each word looked at: attention from words to regions, by head, on average, or rolled up.

Rollout: Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928).

L layers  B batch  N heads  T text  V regions  S=T+V  W words
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from visualbert.errors import InputError
from visualbert.explain.attentions import attentions_of, seen_regions


class Word(NamedTuple):
    """A word and the positions of its wordpieces, `first` to `end - 1`.

    The words of `visualbert.inputs.text.encode` are such triples too.
    """

    text: str
    first: int
    end: int


def merge_pieces(pieces: Sequence[str]) -> list[Word]:
    """The words of a sequence of BERT's wordpieces, special tokens included: `##` goes on."""
    words: list[Word] = []
    for at, piece in enumerate(pieces):
        if piece.startswith("##") and len(piece) > 2 and words:
            words[-1] = Word(words[-1].text + piece[2:], words[-1].first, at + 1)
        else:
            words.append(Word(piece, at, at + 1))
    return words


def head_grounding(
    attentions: Any, words: Sequence[tuple[str, int, int]], text_length: int, example: int = 0
) -> np.ndarray:
    """(L, N, W, V): the attention of every word to every region, by layer and head.

    A word's attention is the mean over its wordpieces; its sum is the mass that goes to regions.

    Args:
        attentions: as for `attentions_of`.
        words: `(text, first, end)`, as `merge_pieces` gives them.
        text_length: T, the padded length of the text.
        example: which of the batch.

    Returns:
        NaN in layers that saw no regions (late fusion), 0 at padded regions.

    Raises:
        InputError: a word or the example is not in the attentions.
    """
    attentions, _ = _one(attentions, text_length, example)
    return _merge(attentions[..., text_length:], words, text_length)


def grounding(
    attentions: Any,
    words: Sequence[tuple[str, int, int]],
    text_length: int,
    example: int = 0,
    layer: int | None = None,
    head: int | None = None,
) -> np.ndarray:
    """(W, V): the attention of every word to every region, of one layer and head, or the mean over
    the layers that saw regions and over the heads where none is named.

    Args:
        attentions, words, text_length, example: as for `head_grounding`.
        layer, head: counted from 0, or from -1 backwards.

    Raises:
        InputError: there is no such layer or head, or no region that it saw.
    """
    attentions, seen = _one(attentions, text_length, example)
    for name, number, count in (
        ("layer", layer, len(attentions)),
        ("head", head, attentions.shape[1]),
    ):
        if number is not None and not -count <= number < count:
            raise InputError(f"{name}={number} is not one of {count}, counted from 0")
    chosen = seen if layer is None else np.arange(len(seen)) == layer % len(seen)
    if not seen[chosen].any():
        if not seen.any():
            raise InputError("the model saw no regions: there is nothing to ground words in")
        others = ", ".join(map(str, np.flatnonzero(seen)))
        raise InputError(f"layer {layer} saw no regions (late fusion); of those that did: {others}")
    heads = slice(None) if head is None else [head]
    rows = attentions[chosen][:, heads, :, text_length:]
    return _merge(rows, words, text_length).mean((0, 1))


def rollout(attentions: Any, text_length: int) -> np.ndarray:
    """(B, S, S): how much each position of the last layer draws on each position of the input.

    The product over layers of 0.5 A + 0.5 I, A being the mean over heads and I the residual
    connection (Abnar & Zuidema 2020). A layer that saw no regions left them as they were: its A is
    the identity there.

    Args:
        attentions: as for `attentions_of`.
        text_length: T, the padded length of the text.

    Returns:
        rows that sum to 1; those of padded positions mean nothing.

    Raises:
        InputError: `text_length` does not fit.
    """
    attentions = attentions_of(attentions)
    seen_regions(attentions, text_length)
    identity = np.eye(attentions.shape[-1])
    rolled = np.broadcast_to(identity, (attentions.shape[1], *identity.shape))
    for layer in attentions:
        mixed = layer.mean(1, dtype=np.float64)  # B S S
        mixed = np.where(np.isnan(mixed), identity, mixed)
        rolled = (0.5 * mixed + 0.5 * identity) @ rolled
    return rolled


def rolled_grounding(
    attentions: Any, words: Sequence[tuple[str, int, int]], text_length: int, example: int = 0
) -> np.ndarray:
    """(W, V): how much each word draws on each region, through all layers; see `rollout`.

    Args:
        attentions, words, text_length, example: as for `head_grounding`.

    Raises:
        InputError: a word or the example is not in the attentions.
    """
    attentions, _ = _one(attentions, text_length, example)
    rolled = rollout(attentions[:, None], text_length)[0]
    return _merge(rolled[:, text_length:], words, text_length)


def _one(attentions: Any, text_length: int, example: int) -> tuple[np.ndarray, np.ndarray]:
    """One example's attentions (L, N, S, S), and which layers saw regions."""
    attentions = attentions_of(attentions)
    if not 0 <= example < attentions.shape[1]:
        raise InputError(
            f"example={example} is not in a batch of {attentions.shape[1]}, counted from 0"
        )
    return attentions[:, example], seen_regions(attentions[:, example], text_length)


def _merge(rows: np.ndarray, words: Sequence[tuple[str, int, int]], text_length: int) -> np.ndarray:
    """(..., W, V) of rows (..., S, V): the mean over the wordpieces of each word."""
    for text, first, end in words:
        if not 0 <= first < end <= text_length:
            raise InputError(
                f"the word {text!r} has wordpieces {first} to {end - 1}, the text {text_length}"
            )
    merged = [rows[..., first:end, :].mean(-2, dtype=np.float64) for _, first, end in words]
    return np.stack(merged, -2) if merged else np.empty((*rows.shape[:-2], 0, rows.shape[-1]))
