"""Text to wordpieces: the tokenizer, the templates of the recipes, and the original's truncation.

The tokenizer is BERT's WordPiece through the `tokenizers` library. Truncation follows
`InputExample.perform_truncate` of uclanlp/visualbert (dataloaders/bert_data_utils.py), down to the
pairs that it cuts from the front and shortens more than it would have to.
"""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from visualbert.errors import ConfigError, InputError
from visualbert.inputs.recipes import Recipe

VOCABULARY, TOKENIZER = "vocab.txt", "tokenizer.json"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LONGEST = 100_000  # characters of a text


class Encoded(NamedTuple):
    """One text as wordpieces.

    `words` are `(text, first, end)`: what was written and the positions of its wordpieces. `places`
    lead from a position to the characters of the first text, as the recipe rewrites it, that stand
    there.
    """

    ids: list[int]
    segments: list[int]
    words: list[tuple[str, int, int]]
    places: dict[int, tuple[int, int]]
    cut: int  # wordpieces that truncation took


class _Text(NamedTuple):
    """Wordpieces; of each its place in the text, in characters, and the number of its word."""

    ids: list[int]
    places: list[tuple[int, int]]
    word: list[int]
    text: str


class WordPiece:
    """BERT's tokenizer over a vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        known = tokenizer.get_vocab(with_added_tokens=True)
        missing = [token for token in SPECIAL if token not in known]
        if missing:
            raise ConfigError(f"the vocabulary lacks {', '.join(missing)}; it is not BERT's")
        self.special: dict[str, int] = {token: self.id_of(token) for token in SPECIAL}

    @classmethod
    def from_words(cls, words: Sequence[str], lowercase: bool = True) -> "WordPiece":
        """The tokenizer of a vocabulary in the order of its ids."""
        index = {word: number for number, word in enumerate(words)}
        if len(index) != len(words):
            twice = next(word for number, word in enumerate(words) if index[word] != number)
            raise ConfigError(f"the vocabulary holds {twice!r} twice")
        tokenizer = Tokenizer(models.WordPiece(index, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.add_special_tokens([token for token in SPECIAL if token in index])
        return cls(tokenizer)

    @classmethod
    def from_file(cls, path: Path, lowercase: bool = True) -> "WordPiece":
        """The tokenizer of a `vocab.txt` or a `tokenizer.json`.

        Raises:
            ConfigError: it is neither.
        """
        try:
            if path.suffix == ".json":
                tokenizer = Tokenizer.from_file(str(path))
                tokenizer.no_padding()
                tokenizer.no_truncation()
                return cls(tokenizer)
            words = path.read_text(encoding="utf-8-sig").split("\n")  # U+2028 may be a word
            return cls.from_words(words if words[-1] else words[:-1], lowercase)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise ConfigError(f"{path}: not a vocabulary ({error})") from None

    def id_of(self, token: str) -> int:
        """The id of a token of a template; that of `[UNK]` where the vocabulary lacks it."""
        found = self.tokenizer.token_to_id(token)
        return self.special["[UNK]"] if found is None else found

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def vocabulary(self) -> list[str]:
        """The words in the order of their ids."""
        found = self.tokenizer.get_vocab(with_added_tokens=True)
        return sorted(found, key=found.__getitem__)

    def is_plain(self, lowercase: bool) -> bool:
        """Whether a `vocab.txt` says all there is to say about it."""
        words = self.vocabulary()
        if any("\n" in word or "\r" in word for word in words):
            return False
        twin = self.from_words(words, lowercase).tokenizer
        return json.loads(self.tokenizer.to_str()) == json.loads(twin.to_str())

    def pieces(self, word: str) -> list[int]:
        """The wordpieces of a word, without special tokens."""
        return self.tokenizer.encode(word, add_special_tokens=False).ids

    def split(self, label: str, text: str) -> _Text:
        """The wordpieces of a text, without special tokens around it.

        Raises:
            InputError: the text is none, empty, or as long as a book.
        """
        if not isinstance(text, str):
            raise InputError(f"{label} must be a string, got {type(text).__name__}")
        if len(text) > _LONGEST:
            raise InputError(f"{label} has {len(text)} characters; at most {_LONGEST} are read")
        half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
        if half is not None:
            raise InputError(f"{label} holds {half!r}, half of a character; it was decoded wrongly")
        found = self.tokenizer.encode(text, add_special_tokens=False)
        if not found.ids:
            raise InputError(f"{label} is empty; there is nothing to read")
        numbers = [-1 - at if n is None else n for at, n in enumerate(found.word_ids)]
        return _Text(found.ids, found.offsets, numbers, text)


def pythia_words(question: str) -> str:
    """A question as Pythia's database spells it: lower case, without `,` and `?`, `'s` apart.

    Source: `tokenize` in dataloaders/vqa_dataset.py.
    """
    return question.lower().replace(",", "").replace("?", "").replace("'s", " 's")


def rewritten(recipe: Recipe, text: str) -> str:
    """A text as the recipe has it before it is cut into wordpieces."""
    return pythia_words(text) if recipe.words == "pythia" else text


def rewritten_span(recipe: Recipe, text: str, start: int, end: int) -> tuple[int, int]:
    """Where the characters `start` to `end` of a text are in it as it is rewritten."""
    behind = len(rewritten(recipe, text[end:]))
    return len(rewritten(recipe, text[:start])), len(rewritten(recipe, text)) - behind


def encode(tokenizer: WordPiece, recipe: Recipe, label: str, a: str, b: str | None) -> Encoded:
    """A text, or two, in the template of a recipe.

    Args:
        tokenizer: of the checkpoint.
        recipe: of the checkpoint.
        label: what messages call the text.
        a: what stands for `{a}`, not yet rewritten.
        b: what stands for `{b}`, where the template has it.

    Raises:
        InputError: a text is missing, too many, or empty.
    """
    pieces = recipe.pieces
    if ("{b}" in pieces) != (b is not None):
        asks = "two texts" if "{b}" in pieces else "one text"
        raise InputError(f"{label}: the recipe takes {asks} ({recipe.template})")
    a = rewritten(recipe, a) if isinstance(a, str) else a
    given = {"{a}": tokenizer.split(label, a)}
    if b is not None:
        given["{b}"] = tokenizer.split(f"the second text of {label}", b)
    starts = truncated(recipe, [len(text.ids) for text in given.values()])
    ids: list[int] = []
    segments: list[int] = []
    words: list[tuple[str, int, int]] = []
    places: dict[int, tuple[int, int]] = {}
    segment = 0
    for piece in pieces:
        if piece in given:
            start, end = starts[list(given).index(piece)]
            if piece == "{a}":
                places = dict(enumerate(given[piece].places[start:end], len(ids)))
            words += _words(given[piece], start, end, len(ids))
            new = given[piece].ids[start:end]
        else:
            words.append((piece, len(ids), len(ids) + 1))
            new = [tokenizer.id_of(piece)]
        ids += new
        segments += [segment] * len(new)
        segment += piece == "[SEP]"
    cut = sum(len(text.ids) for text in given.values()) - sum(end - at for at, end in starts)
    return Encoded(ids, segments, words, places, cut)


def truncated(recipe: Recipe, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """What stays of one text or of two, from where to where, in wordpieces.

    One loses its tail. Two lose their beginnings, and what is taken from the first one is taken
    from the second one too, in place of sparing it: as the original, whose checkpoints know it so.
    """
    room = recipe.max_length - (len(recipe.pieces) - len(lengths))
    if len(lengths) == 1:
        return [(0, min(lengths[0], room))]
    over = sum(lengths) - room
    if over <= 0:
        return [(0, length) for length in lengths]
    spare = 0 if recipe.context is None else max(lengths[0] - recipe.context, 0)
    first = min((over + 1) // 2, spare)
    second = over + first
    return [(first, lengths[0]), (min(second, lengths[1]), lengths[1])]


def _words(text: _Text, start: int, end: int, at: int) -> list[tuple[str, int, int]]:
    """The words of `text` whose wordpieces `start` to `end` stand at `at` in the sequence."""
    found = []
    for _, group in groupby(range(start, end), key=text.word.__getitem__):
        pieces = list(group)
        written = text.text[text.places[pieces[0]][0] : text.places[pieces[-1]][1]]
        found.append((written, at + pieces[0] - start, at + pieces[-1] - start + 1))
    return found
