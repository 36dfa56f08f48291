"""VCR's questions and choices as the published checkpoints were trained on them.

Tags become words, people neutral names; only objects that are mentioned are regions, behind the
whole image; and the alignment of regions with text is the original's, which counts words where it
means wordpieces. Source: dataloaders/vcr.py and vcr_data_utils.py of uclanlp/visualbert.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from visualbert.errors import InputError
from visualbert.inputs.processor import VisualBertProcessor
from visualbert.inputs.text import truncated

NAMES = (
    *("Casey", "Riley", "Jessie", "Jackie", "Avery", "Jaime", "Peyton", "Kerry", "Jody", "Kendall"),
    *("Peyton", "Skyler", "Frankie", "Pat", "Quinn"),
)
_ALL_PEOPLE = ("everyone", "everyones")
_PERSON = "person"

Tokens = Sequence[str | Sequence[int]]


class Problem(NamedTuple):
    """A question with its choices, ready for the processor.

    `objects` are those whose regions are seen, in order, behind the whole image; `alignment` is
    (C, 1 + objects, A), -1 where there is nothing.
    """

    text: str
    choices: list[str]
    objects: list[int]
    alignment: np.ndarray


def vcr_problem(
    processor: VisualBertProcessor,
    question: Tokens,
    choices: Sequence[Tokens],
    objects: Sequence[str],
    also_seen: Sequence[Tokens] = (),
) -> Problem:
    """A problem of VCR: question and answers, or question with its answer and rationales.

    Args:
        processor: of a VCR checkpoint.
        question: words, and lists of objects' numbers; for rationales, with the answer behind it.
        choices: of the same form.
        objects: what each object is.
        also_seen: texts whose objects are regions too: the fine-tuned checkpoints saw those of the
            question, the answers and the rationales (add_all_features).

    Raises:
        InputError: a tag is no object's number.
    """
    words, names = _named(question, objects, {})
    rows = [_named(choice, objects, names)[0] for choice in choices]
    seen = _seen([question, *choices, *also_seen], objects)
    places = [
        list(_places(processor, [words, row], [question, choice]))
        for row, choice in zip(rows, choices, strict=True)
    ]
    counts = [Counter(thing for thing, _ in found) for found in places]
    most = max((n for count in counts for n in count.values()), default=1)
    alignment = np.full((len(rows), 1 + len(seen), max(1, most)), -1, np.int64)
    for row, found in zip(alignment, places, strict=True):
        for thing, position in found:
            at = row[1 + seen.index(thing)]
            at[np.argmax(at < 0)] = position
    return Problem(" ".join(words), [" ".join(row) for row in rows], seen, alignment)


def _tags(tokens: Tokens, objects: Sequence[str]) -> Iterator[int]:
    """The objects that are mentioned, in order."""
    for token in tokens:
        if not isinstance(token, (str, list, tuple)):
            raise InputError(f"{token!r} is neither a word nor a list of objects' numbers")
        for tag in () if isinstance(token, str) else token:
            if not isinstance(tag, (int, np.integer)) or not 0 <= tag < len(objects):
                raise InputError(f"the tag {tag!r} is not one of {len(objects)} objects")
            yield int(tag)


def _named(
    tokens: Tokens, objects: Sequence[str], names: Mapping[int, str]
) -> tuple[list[str], dict[int, str]]:
    """The words of a text, and what its objects are called; people are numbered anew in every text,
    as in the original.
    """
    found, people = dict(names), 0
    for tag in _tags(tokens, objects):
        if tag not in found:
            person = objects[tag] == _PERSON
            found[tag] = NAMES[people % len(NAMES)] if person else objects[tag]
            people += person
    words: list[str] = []
    for token in tokens:
        words += [token] if isinstance(token, str) else [found[tag] for tag in token]
    return words, found


def _seen(texts: Sequence[Tokens], objects: Sequence[str]) -> list[int]:
    """The objects that are regions: those mentioned, or all people."""
    people = {n for n, name in enumerate(objects) if name == _PERSON}
    seen = {tag for text in texts for tag in _tags(text, objects)}
    if any(isinstance(w, str) and w.lower() in _ALL_PEOPLE for text in texts for w in text):
        seen |= people
    return sorted(seen or people)


def _places(
    processor: VisualBertProcessor, words: Sequence[Sequence[str]], tokens: Sequence[Tokens]
) -> Iterator[tuple[int, int]]:
    """`object, position` of every mention of which truncation left a wordpiece.

    The position is 1 + the number of the word, for the second text behind the wordpieces of the
    first one and `[SEP]`.
    """
    pieces = [[len(processor.tokenizer.pieces(word)) for word in text] for text in words]
    kept = truncated(processor.recipe, [sum(text) for text in pieces])
    offset = 1
    for text, sizes, (start, end) in zip(tokens, pieces, kept, strict=True):
        ends = np.cumsum(sizes)
        number = 0
        for token in text:
            for tag in [-1] if isinstance(token, str) else token:
                if tag >= 0 and sizes[number] and ends[number] > start:
                    yield tag, number + offset
                number += 1
        offset += end - start + 1
