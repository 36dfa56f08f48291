"""`VisualBertProcessor`: text and regions in, a batch of model inputs out, by a recipe.

Masks and segment ids are always in the batch, so that nothing is left to a default of the model.
"""

import dataclasses
import importlib
import json
import operator
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visualbert.errors import (
    ConfigError,
    HubError,
    InputError,
    MissingBackendError,
    UsageError,
    VisualBertError,
)
from visualbert.inputs.recipes import DETECTORS, Recipe, get_recipe, guess_recipe
from visualbert.inputs.regions import Regions
from visualbert.inputs.text import (
    TOKENIZER,
    VOCABULARY,
    Encoded,
    WordPiece,
    encode,
    rewritten_span,
)

if TYPE_CHECKING:
    from visualbert.config import VisualBertConfig
    from visualbert.regions import RegionExtractor

CONFIG = "processor_config.json"
_THEIRS = "tokenizer_config.json"  # where transformers keeps whether a vocab.txt is lower-case
BERT = "google-bert/bert-base-uncased"  # whose vocabulary every published checkpoint has
IGNORED = -1  # a masked-LM label that is none, as in the original
_TENSORS = {"np": "numpy", "pt": "torch", "tf": "tensorflow", "jax": "jax"}
_EXTRAS = {"pt": "pt", "tf": "tf", "jax": "flax"}
_PADDING = 128  # rows that a trainer may have added to a table of words


class Batch(dict):
    """Model inputs by name, to be passed as keywords, and what else is known about them.

    Attributes:
        encoded: of every text its wordpieces and words, in order (choices one after the other).
        regions: of every example its regions, those of two images joined.
        mask_positions: (B,) position of the last `[MASK]` of every text, which is the template's
            where that has one; -1 where there is none.
    """

    encoded: list[Encoded]
    regions: list[Regions | None]
    mask_positions: np.ndarray


class VisualBertProcessor:
    """Prepares inputs as a checkpoint was trained with.

    Args:
        recipe: a `Recipe` or the name of one.
        vocabulary: a `vocab.txt` or `tokenizer.json`, or the words in the order of their ids.
        lowercase: whether a `vocab.txt` is of lower-case text.
    """

    def __init__(
        self,
        recipe: Recipe | str,
        vocabulary: str | os.PathLike | Sequence[str] | WordPiece,
        lowercase: bool = True,
    ) -> None:
        self.recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
        self.lowercase = lowercase
        if isinstance(vocabulary, WordPiece):
            self.tokenizer = vocabulary
        elif isinstance(vocabulary, (str, os.PathLike)):
            self.tokenizer = WordPiece.from_file(Path(vocabulary), lowercase)
        else:
            self.tokenizer = WordPiece.from_words(list(vocabulary), lowercase)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        recipe: Recipe | str | None = None,
        vocabulary: str | os.PathLike | None = None,
        revision: str | None = None,
    ) -> "VisualBertProcessor":
        """The processor that was saved with a checkpoint, or the one that it must have had.

        Args:
            source: a folder, a file of weights, or a Hub id, as for a model's `from_pretrained`.
            recipe: in place of the one that was saved or is guessed.
            vocabulary: in place of the one that was saved; BERT's from the Hub where there is none.
            revision: branch, tag or commit on the Hub.

        Raises:
            ConfigError: its files are broken.
            HubError: BERT's vocabulary is needed and cannot be fetched.
        """
        from visualbert.checkpoint.open import find_source

        folder = find_source(source, revision)
        folder = folder if folder.is_dir() else folder.parent
        saved = _json(folder / CONFIG)
        if recipe is None and "recipe" not in saved:
            from visualbert.checkpoint.open import open_checkpoint

            config = open_checkpoint(source, revision=revision).config
            recipe = guess_recipe(os.fspath(source), config)
        chosen = _read_recipe(folder / CONFIG, saved) if recipe is None else recipe
        if vocabulary is None:
            own = [folder / name for name in (TOKENIZER, VOCABULARY)]
            vocabulary = next((path for path in own if path.is_file()), None) or _bert_vocabulary()
        lowercase = saved.get("lowercase", _json(folder / _THEIRS).get("do_lower_case", True))
        if not isinstance(lowercase, bool):
            raise ConfigError(f"{folder}: lowercase={lowercase!r} must be true or false")
        return cls(chosen, vocabulary, lowercase)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the recipe and the vocabulary beside a model.

        Raises:
            CheckpointError: the folder cannot be written; what it held is untouched.
        """
        from visualbert.checkpoint.write import replace_files

        values = {
            "processor_class": type(self).__name__,
            "lowercase": self.lowercase,
            "recipe": dataclasses.asdict(self.recipe),
        }
        plain = self.tokenizer.is_plain(self.lowercase)
        name = VOCABULARY if plain else TOKENIZER
        words = "\n".join(self.tokenizer.vocabulary()) + "\n"
        texts = {
            CONFIG: json.dumps(values, indent=2, sort_keys=True) + "\n",
            name: words if plain else self.tokenizer.tokenizer.to_str(),
        }
        writers = {
            name: lambda path, text=text: path.write_text(text, encoding="utf-8")
            for name, text in texts.items()
        }
        replace_files(folder, writers, remove=[TOKENIZER if plain else VOCABULARY])

    def check(self, config: "VisualBertConfig", model: str) -> None:
        """Refuse a model that cannot read what this processor makes.

        Args:
            config: of the model.
            model: what messages call it.

        Raises:
            InputError: words, regions, positions or segments that it has no rows for.
        """
        recipe, words = self.recipe, self.tokenizer.size
        if words > config.vocab_size:
            raise InputError(
                f"the vocabulary holds {words} words, and {model} has vocab_size="
                f"{config.vocab_size}; pass its own: vocabulary=…, or --vocabulary on the command "
                "line"
            )
        if words <= config.vocab_size - _PADDING:
            warnings.warn(
                f"the vocabulary holds {words} words, and {model} has vocab_size="
                f"{config.vocab_size}; it is hardly the one of its training",
                stacklevel=3,
            )
        segments = max(*recipe.visual_segments, recipe.pieces[:-1].count("[SEP]"))
        for wrong, reads, has in (
            (
                recipe.width not in (None, config.visual_embedding_dim),
                f"regions {recipe.width} wide",
                f"visual_embedding_dim={config.visual_embedding_dim}",
            ),
            (
                recipe.max_length > config.max_position_embeddings,
                f"texts of max_length={recipe.max_length} wordpieces",
                f"max_position_embeddings={config.max_position_embeddings}",
            ),
            (
                segments >= config.type_vocab_size,
                f"segments up to {segments}",
                f"type_vocab_size={config.type_vocab_size}",
            ),
        ):
            if wrong:
                raise InputError(
                    f"the recipe {recipe.name!r} gives {reads}, and {model} has {has}; pass one "
                    "that fits: recipe=…, or --recipe on the command line"
                )

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        regions: Any = None,
        *,
        images: Any = None,
        phrases: Sequence[Sequence[str | tuple[int, int]]] | None = None,
        return_tensors: str = "np",
    ) -> Batch:
        """A padded batch of model inputs.

        Args:
            text: one text or B; for VQA the questions.
            text_pair: the second texts; for multiple choice the choices of every text.
            regions: for every text its `Regions`, an array (V, F), or those of two images; one for
                all, or none.
            images: in place of `regions`: images for the recipe's extractor.
            phrases: of every text the phrases to be found in it: their words, or where they start
                and end, in characters. Their positions become `region_to_phrase_position`, which is
                that of the last wordpiece.
            return_tensors: "np", "pt", "tf" or "jax".

        Returns:
            `input_ids`, `attention_mask`, `token_type_ids` (B, T), or (B, C, T) for multiple
            choice; with regions `visual_embeds` (B, V, F), `visual_attention_mask` and
            `visual_token_type_ids` (B, V).

        Raises:
            InputError: a text is empty, a phrase is not in it, or regions do not fit the recipe.
        """
        _check_kind(return_tensors)
        texts = as_texts(text)
        pairs = _pairs(text_pair, isinstance(text, str), len(texts), self.recipe)
        encoded = [self._encode(f"text {n}", a, b) for n, (a, b) in _numbered(texts, pairs)]
        seen = self._regions(regions, images, len(texts))
        choices = len(pairs[0]) if self.recipe.choices > 1 else 0
        batch = Batch(_text_arrays(encoded, choices))
        if any(item is not None for item in seen):
            batch.update(self._region_arrays(seen))
        if phrases is not None:
            if choices:
                raise UsageError(f"the recipe {self.recipe.name!r} has choices, and no phrases")
            batch["region_to_phrase_position"] = self._phrase_positions(texts, encoded, phrases)
        batch.encoded = encoded
        batch.regions = [_joined(parts) for parts in seen]
        mask = self.tokenizer.special["[MASK]"]
        found = [max((n for n, i in enumerate(e.ids) if i == mask), default=-1) for e in encoded]
        batch.mask_positions = np.array(found)
        for name, array in batch.items():
            batch[name] = _tensor(array, return_tensors)
        return batch

    def corrupt(
        self,
        batch: Batch,
        rng: np.random.Generator,
        probability: float = 0.15,
        *,
        return_tensors: str = "np",
    ) -> Batch:
        """A batch for masked language modelling: some wordpieces replaced, and `labels`.

        Every wordpiece is chosen with `probability`; of the chosen 80 % become `[MASK]`, 10 % any
        word of the vocabulary, and 10 % stay. Source: `random_word` in
        pytorch_pretrained_bert/fine_tuning.py, which the original's loaders call before they add
        special tokens.

        Args:
            batch: as `__call__` gives it.
            rng: where chance comes from.
            probability: of a wordpiece to be chosen.
            return_tensors: as for `__call__`.
        """
        _check_kind(return_tensors)
        if not 0 <= probability <= 1:
            raise UsageError(f"probability={probability!r} must be from 0 to 1")
        ids = np.array(batch["input_ids"])
        special = np.isin(ids, list(self.tokenizer.special.values()))
        chosen = (rng.random(ids.shape) < probability) & ~special
        fate = rng.random(ids.shape)
        words = rng.integers(0, self.tokenizer.tokenizer.get_vocab_size(), ids.shape)
        labels = np.where(chosen, ids, IGNORED)
        ids = np.where(chosen & (fate < 0.8), self.tokenizer.special["[MASK]"], ids)
        ids = np.where(chosen & (fate >= 0.9), words, ids)
        arrays = {**batch, "input_ids": ids, "labels": labels}
        made = Batch({name: _tensor(np.asarray(x), return_tensors) for name, x in arrays.items()})
        made.__dict__.update(batch.__dict__)
        return made

    def _encode(self, label: str, a: str, b: str | None) -> Encoded:
        found = encode(self.tokenizer, self.recipe, label, a, b)
        if found.cut:
            warnings.warn(
                f"{label} is too long; {found.cut} of its wordpieces were left out to keep "
                f"{self.recipe.max_length}, as in the original",
                stacklevel=4,
            )
        return found

    def _regions(self, regions: Any, images: Any, count: int) -> list[list[Regions] | None]:
        """Of every text the regions of each of its images."""
        if images is not None:
            if regions is not None:
                raise UsageError("regions and images exclude each other; pass one of them")
            look = self.extractor
            many = images if isinstance(images, (list, tuple)) else [images]
            regions = [
                [*map(look, item)] if isinstance(item, (list, tuple)) else look(item)
                for item in many
            ]
        if regions is None:
            return [None] * count
        if isinstance(regions, (str, bytes, os.PathLike)):
            raise InputError(f"regions={regions!r} are no regions; a picture is passed as images=…")
        if getattr(regions, "ndim", 2) == 1:
            raise InputError(f"regions have the shape {regions.shape}, expected (regions, width)")
        single = isinstance(regions, Regions) or getattr(regions, "ndim", None) == 2
        try:
            given = [regions] * count if single else list(regions)
        except TypeError:
            raise InputError(
                f"regions must be Regions, an array, or a list of them, got "
                f"{type(regions).__name__}"
            ) from None
        if len(given) == 1:
            given *= count
        if len(given) != count:
            texts, pictures = f"{count} text{'s' * (count != 1)}", len(given)
            raise InputError(
                f"{texts} and regions of {pictures} image{'s' * (pictures != 1)}; pass one for each"
            )
        return [self._fitting(f"regions {n}", item) for n, item in enumerate(given)]

    @property
    def extractor(self) -> "RegionExtractor":
        """What makes the recipe's regions of an image.

        Raises:
            UsageError: the recipe's detector is no part of this package and not registered.
        """
        from visualbert.regions import extractor_names, get_extractor

        name = self.recipe.detector
        if name not in extractor_names():
            made_by = DETECTORS.get(name, "a detector that it does not name")
            raise UsageError(
                f"the recipe {self.recipe.name!r} reads regions of {made_by}, which is no part of "
                "this package; pass its features: regions=…, or --features on the command line"
            )
        return get_extractor(name)

    def _fitting(self, label: str, item: Any) -> list[Regions] | None:
        """The regions of one example, checked against the recipe and cut to its number."""
        if item is None:
            return None
        parts = list(item) if isinstance(item, (list, tuple)) else [item]
        recipe, images = self.recipe, len(self.recipe.visual_segments)
        if len(parts) != images:
            raise InputError(
                f"{label}: of {len(parts)} image{'s' * (len(parts) != 1)}; the recipe "
                f"{recipe.name!r} takes {images}"
            )
        found = []
        for part in parts:
            part = part if isinstance(part, Regions) else Regions(part)
            check_regions(part, recipe, label)
            found.append(part if recipe.regions is None else part.first(recipe.regions))
        return found

    def _phrase_positions(
        self, texts: list[str], encoded: list[Encoded], phrases: Sequence[Sequence[Any]]
    ) -> np.ndarray:
        """(B, E) position of the last wordpiece of every phrase, -1 where a text has fewer."""
        if len(phrases) != len(texts):
            raise InputError(
                f"{len(texts)} texts and the phrases of {len(phrases)}; pass one for each"
            )
        found = np.full((len(texts), max(1, *map(len, phrases))), -1, np.int64)
        for row, (text, own) in enumerate(zip(texts, phrases, strict=True)):
            for column, phrase in enumerate(own):
                span = rewritten_span(self.recipe, text, *_span(row, text, phrase))
                places = encoded[row].places.items()
                inside = [at for at, (a, b) in places if a < span[1] and b > span[0]]
                if not inside:
                    why = "it was cut off" if encoded[row].cut else "it is no word"
                    raise InputError(f"text {row}: nothing of the phrase {phrase!r} is left; {why}")
                found[row, column] = max(inside)
        return found

    def _region_arrays(self, seen: list[list[Regions] | None]) -> dict[str, np.ndarray]:
        counts = [sum(map(len, parts or ())) for parts in seen]
        width = next(part.width for parts in seen if parts for part in parts)
        shape = (len(seen), max(counts))
        embeds = np.zeros((*shape, width), np.float32)
        segments = np.zeros(shape, np.int64)
        mask = (np.arange(shape[1]) < np.array(counts)[:, None]).astype(np.int64)
        for row, parts in enumerate(seen):
            at = 0
            for part, segment in zip(parts or (), self.recipe.visual_segments, strict=False):
                if part.width != width:
                    raise InputError(
                        f"regions {row} are {part.width} wide, and others of the batch {width}"
                    )
                embeds[row, at : at + len(part)] = part.features
                segments[row, at : at + len(part)] = segment
                at += len(part)
        return {
            "visual_embeds": embeds,
            "visual_attention_mask": mask,
            "visual_token_type_ids": segments,
        }


def check_regions(regions: Regions, recipe: Recipe, label: str) -> None:
    """Refuse regions of another width than the recipe's; warn of those of another detector.

    Raises:
        InputError: of the width, or of a feature that is NaN or infinite.
    """
    if not np.isfinite(regions.features).all():
        raise InputError(f"{label}: a feature is NaN or infinite")
    if recipe.width not in (None, regions.width):
        made_by = DETECTORS.get(recipe.detector, "the detector of its training")
        raise InputError(
            f"{label}: features are {regions.width} wide, and the recipe {recipe.name!r} reads "
            f"{recipe.width}: those of {made_by}"
        )
    if regions.provenance and recipe.detector and regions.provenance != recipe.detector:
        own, other = (DETECTORS.get(name, name) for name in (recipe.detector, regions.provenance))
        warnings.warn(
            f"{label}: features of {other}; the recipe {recipe.name!r} was trained with those of "
            f"{own}, and answers will be worse",
            stacklevel=4,
        )


def as_texts(text: Any) -> list[str]:
    """One text, or several, as a list.

    Raises:
        InputError: there is none.
    """
    if isinstance(text, str):
        return [text]
    if isinstance(text, (bytes, bytearray, Mapping)) or not isinstance(text, Iterable):
        raise InputError(f"a text must be a string, or a list of them, got {type(text).__name__}")
    texts = list(text)
    if not texts:
        raise InputError("there is no text; a batch has at least one")
    return texts


def _pairs(given: Any, single: bool, count: int, recipe: Recipe) -> list[Any]:
    """Of every text its second text, or its choices."""
    if given is None:
        if recipe.choices > 1:
            raise InputError(f"the recipe {recipe.name!r} needs {recipe.choices} choices a text")
        return [None] * count
    pairs = [given] if single else list(given)
    if len(pairs) != count:
        raise InputError(f"{count} texts and {len(pairs)} second texts; pass one for each")
    if recipe.choices > 1:
        sizes = {len(pair) if isinstance(pair, (list, tuple)) else 0 for pair in pairs}
        if len(sizes) != 1 or 0 in sizes:
            raise InputError("every text needs a list of choices, all of the same length")
    return pairs


def _numbered(texts: list[str], pairs: list[Any]) -> list[tuple[str, tuple[str, Any]]]:
    """Every text with its second text, or once with each of its choices, and what to call it."""
    found: list[tuple[str, tuple[str, Any]]] = []
    for number, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        if isinstance(pair, (list, tuple)):
            found += [(f"{number}, choice {n}", (text, one)) for n, one in enumerate(pair)]
        else:
            found.append((str(number), (text, pair)))
    return found


def _text_arrays(encoded: list[Encoded], choices: int) -> dict[str, np.ndarray]:
    shape = (len(encoded), max(len(e.ids) for e in encoded))
    ids, mask, segments = (np.zeros(shape, np.int64) for _ in range(3))
    for row, e in enumerate(encoded):
        ids[row, : len(e.ids)] = e.ids
        mask[row, : len(e.ids)] = 1
        segments[row, : len(e.ids)] = e.segments
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
    if not choices:
        return arrays
    return {name: array.reshape(-1, choices, shape[1]) for name, array in arrays.items()}


def _span(number: int, text: str, phrase: Any) -> tuple[int, int]:
    """Where a phrase is in its text: as whole words, if it comes so."""
    if isinstance(phrase, str):
        words = re.escape(phrase) if phrase.strip() else "(?!)"
        found = re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE)
        found = found or re.search(words, text, re.IGNORECASE)
        start, end = found.span() if found else (-1, -1)
    else:
        try:
            start, end = map(operator.index, phrase)
        except (TypeError, ValueError):
            raise InputError(
                f"text {number}: a phrase is its words, or where it starts and ends, not {phrase!r}"
            ) from None
    if not 0 <= start < end <= len(text):
        raise InputError(f"text {number}: there is no phrase {phrase!r} in {text!r}")
    return start, end


def _joined(parts: list[Regions] | None) -> Regions | None:
    """The regions of an example's images as one."""
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    return Regions(np.concatenate([part.features for part in parts]))


def _check_kind(kind: str) -> None:
    if kind not in _TENSORS:
        raise UsageError(f"return_tensors={kind!r} is not one of {', '.join(_TENSORS)}")


def _tensor(array: np.ndarray, kind: str) -> Any:
    if kind == "np":
        return array
    try:
        framework = importlib.import_module(_TENSORS[kind])
    except ImportError:
        raise MissingBackendError(
            f"return_tensors={kind!r} needs {_TENSORS[kind]}: pip install "
            f"visualbert[{_EXTRAS[kind]}]"
        ) from None
    if kind == "pt":
        return framework.from_numpy(array)
    if kind == "tf":
        return framework.constant(array)
    return framework.numpy.asarray(array if array.dtype.kind == "f" else array.astype(np.int32))


def _json(path: Path) -> dict[str, Any]:
    from visualbert.config import read_json_object

    return read_json_object(path) if path.is_file() else {}


def _read_recipe(path: Path, saved: Mapping[str, Any]) -> Recipe:
    values = saved["recipe"]
    try:
        if isinstance(values, str):
            return get_recipe(values)
        if not isinstance(values, dict):
            raise ConfigError("it must be a name, or an object of a recipe's fields")
        unknown = values.keys() - {field.name for field in dataclasses.fields(Recipe)}
        if unknown:
            raise ConfigError(f"there is no field {min(unknown)!r}")
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return Recipe(**{**values, **lists})
    except (TypeError, VisualBertError) as error:
        raise ConfigError(f"{path}: not a recipe ({error})") from None


def _bert_vocabulary() -> Path:
    """BERT's vocabulary, from the Hub."""
    from visualbert.hub import fetch

    try:
        return fetch(BERT, None, [VOCABULARY], "folder") / VOCABULARY
    except HubError as error:
        raise HubError(
            f"the checkpoint has no vocabulary of its own, and BERT's is not at hand ({error}); "
            "pass a vocab.txt: vocabulary=…, or --vocabulary on the command line"
        ) from None
