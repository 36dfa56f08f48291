"""`VisualBertProcessor`: text and regions in, a batch of model inputs out, by a recipe.

Masks and segment ids are always in the batch, so that nothing is left to a default of the model.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visualbert.errors import ConfigError, HubError, InputError, UsageError
from visualbert.inputs.recipes import DETECTORS, Recipe, get_recipe, guess_recipe
from visualbert.inputs.regions import Regions
from visualbert.inputs.text import TOKENIZER, VOCABULARY, Encoded, WordPiece, encode, pythia_words

if TYPE_CHECKING:
    from visualbert.regions import RegionExtractor

CONFIG = "processor_config.json"
BERT = "google-bert/bert-base-uncased"  # whose vocabulary every published checkpoint has
IGNORED = -1  # a masked-LM label that is none, as in the original
_TENSORS = ("np", "pt", "tf", "jax")


class Batch(dict):
    """Model inputs by name, to be passed as keywords, and what else is known about them.

    Attributes:
        encoded: of every text its wordpieces and words, in order (choices one after the other).
        regions: of every example its regions, those of two images joined.
        mask_positions: (B,) position of the first `[MASK]` of every text, -1 where it has none.
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
        saved = _saved(folder)
        if recipe is None and "recipe" not in saved:
            from visualbert.checkpoint.open import open_checkpoint

            config = open_checkpoint(source, revision=revision).config
            recipe = guess_recipe(os.fspath(source), config)
        chosen = _read_recipe(folder / CONFIG, saved) if recipe is None else recipe
        if vocabulary is None:
            own = [folder / name for name in (TOKENIZER, VOCABULARY)]
            vocabulary = next((path for path in own if path.is_file()), None) or _bert_vocabulary()
        return cls(chosen, vocabulary, saved.get("lowercase", True))

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
        if return_tensors not in _TENSORS:
            raise UsageError(f"return_tensors={return_tensors!r} is not one of np, pt, tf, jax")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise InputError("there is no text; a batch has at least one")
        pairs = _pairs(text_pair, isinstance(text, str), len(texts), self.recipe)
        encoded = [self._encode(f"text {n}", a, b) for n, (a, b) in _numbered(texts, pairs)]
        seen = self._regions(regions, images, len(texts))
        choices = len(pairs[0]) if self.recipe.choices > 1 else 0
        batch = Batch(_text_arrays(encoded, choices))
        if any(item is not None for item in seen):
            batch.update(self._region_arrays(seen))
        if phrases is not None:
            batch["region_to_phrase_position"] = _phrase_positions(texts, encoded, phrases)
        batch.encoded = encoded
        batch.regions = [_joined(parts) for parts in seen]
        mask = self.tokenizer.special["[MASK]"]
        found = [e.ids.index(mask) if mask in e.ids else -1 for e in encoded]
        batch.mask_positions = np.array(found)
        for name, array in batch.items():
            batch[name] = _tensor(array, return_tensors)
        return batch

    def corrupt(self, batch: Batch, rng: np.random.Generator, probability: float = 0.15) -> Batch:
        """A batch for masked language modelling: some wordpieces replaced, and `labels`.

        Every wordpiece is chosen with `probability`; of the chosen 80 % become `[MASK]`, 10 % any
        word of the vocabulary, and 10 % stay. Source: `random_word` in
        pytorch_pretrained_bert/fine_tuning.py, which the original's loaders call before they add
        special tokens.

        Args:
            batch: of numpy arrays, as `__call__` gives it.
            rng: where chance comes from.
            probability: of a wordpiece to be chosen.
        """
        ids = np.array(batch["input_ids"])
        special = np.isin(ids, list(self.tokenizer.special.values()))
        chosen = (rng.random(ids.shape) < probability) & ~special
        fate = rng.random(ids.shape)
        words = rng.integers(0, self.tokenizer.tokenizer.get_vocab_size(), ids.shape)
        labels = np.where(chosen, ids, IGNORED)
        ids = np.where(chosen & (fate < 0.8), self.tokenizer.special["[MASK]"], ids)
        ids = np.where(chosen & (fate >= 0.9), words, ids)
        made = Batch({**batch, "input_ids": ids, "labels": labels})
        made.__dict__.update(batch.__dict__)
        return made

    def _encode(self, label: str, a: str, b: str | None) -> Encoded:
        if self.recipe.words == "pythia" and isinstance(a, str):
            a = pythia_words(a)
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
        single = isinstance(regions, (Regions, np.ndarray)) and getattr(regions, "ndim", 2) == 2
        given = [regions] * count if single else list(regions)
        if len(given) == 1:
            given *= count
        if len(given) != count:
            raise InputError(f"{count} texts and regions of {len(given)} images; pass one for each")
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


def _phrase_positions(
    texts: list[str], encoded: list[Encoded], phrases: Sequence[Sequence[Any]]
) -> np.ndarray:
    """(B, E) position of the last wordpiece of every phrase, -1 where a text has fewer."""
    if len(phrases) != len(texts):
        raise InputError(f"{len(texts)} texts and the phrases of {len(phrases)}; pass one for each")
    found = np.full((len(texts), max(1, *map(len, phrases))), -1, np.int64)
    for row, own in enumerate(phrases):
        for column, phrase in enumerate(own):
            found[row, column] = _phrase_position(row, texts[row], encoded[row], phrase)
    return found


def _phrase_position(number: int, text: str, e: Encoded, phrase: Any) -> int:
    if isinstance(phrase, str):
        start = text.lower().find(phrase.lower()) if phrase.strip() else -1
        end = start + len(phrase)
    else:
        start, end = phrase
    if not 0 <= start < end <= len(text):
        raise InputError(f"text {number}: there is no phrase {phrase!r} in {text!r}")
    inside = [at for at, (first, last) in e.places.items() if first < end and last > start]
    if not inside:
        raise InputError(f"text {number}: the phrase {phrase!r} was cut off with the text's end")
    return max(inside)


def _joined(parts: list[Regions] | None) -> Regions | None:
    """The regions of an example's images as one."""
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    return Regions(np.concatenate([part.features for part in parts]))


def _tensor(array: np.ndarray, kind: str) -> Any:
    if kind == "np":
        return array
    if kind == "pt":
        import torch

        return torch.from_numpy(array)
    if kind == "tf":
        import tensorflow as tf

        return tf.constant(array)
    import jax.numpy as jnp

    return jnp.asarray(array if array.dtype.kind == "f" else array.astype(np.int32))


def _saved(folder: Path) -> dict[str, Any]:
    from visualbert.config import read_json_object

    path = folder / CONFIG
    return read_json_object(path) if path.is_file() else {}


def _read_recipe(path: Path, saved: Mapping[str, Any]) -> Recipe:
    values = saved["recipe"]
    if isinstance(values, str):
        return get_recipe(values)
    try:
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return Recipe(**{**values, **lists})
    except (TypeError, AttributeError) as error:
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
