"""From a picture and a question to answers: model, processor, extractor and answers in one object.

answer = visualbert.pipeline("vqa")
answer("scene.png", "what digit is red?")
"""

import operator
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from visualbert.backend import backend_names, get_backend
from visualbert.errors import InputError, MissingBackendError, UsageError
from visualbert.inputs.answers import as_answers, choose_answers
from visualbert.inputs.processor import Batch, VisualBertProcessor, as_texts
from visualbert.inputs.regions import Regions

if TYPE_CHECKING:
    from visualbert.inputs.recipes import Recipe
    from visualbert.pretrained import Checkpoint

TASKS = ("vqa", "visual-question-answering")  # the second is transformers' name for it
EMBEDDED = "scenes"  # the name of the model that comes with the package
_ARCHITECTURE = "VisualBertForQuestionAnswering"
_NO_ANSWERS = ("<unk>", "")  # labels that the original never gives as an answer


class Answer(NamedTuple):
    """An answer and its probability."""

    answer: str
    probability: float


@dataclass(frozen=True)
class Answered:
    """What a model makes of a question.

    Args:
        question: as it was asked.
        answers: the most probable first.
        regions: what the model saw.
        words: of the text, as `(word, first, end)` of their wordpieces.
        attentions: (layers, heads, S, S) where asked for, the text's wordpieces first, without
            padding; None otherwise.
    """

    question: str
    answers: tuple[Answer, ...]
    regions: Regions | None
    words: tuple[tuple[str, int, int], ...]
    attentions: np.ndarray | None = None

    @property
    def answer(self) -> str:
        """The most probable answer."""
        return self.answers[0].answer


def embedded() -> Path:
    """The folder of the model that comes with the package."""
    return Path(__file__).parent / "scenes" / "model"


def find_model(model: Any | None) -> Any:
    """What `pipeline` takes for a model: the embedded one's folder for None and for its name."""
    if model is None or (model == EMBEDDED and not os.path.exists(EMBEDDED)):
        return embedded()
    return model


def pipeline(
    task: str = "vqa",
    model: str | os.PathLike | Any | None = None,
    *,
    backend: str | None = None,
    processor: VisualBertProcessor | None = None,
    recipe: "Recipe | str | None" = None,
    vocabulary: str | os.PathLike | None = None,
    answers: str | os.PathLike | Sequence[str] | None = None,
    dtype: str = "float32",
    revision: str | None = None,
) -> "QuestionAnswering":
    """Something to ask questions about pictures.

    Args:
        task: "vqa", or transformers' "visual-question-answering".
        model: a folder, file or Hub id of a `VisualBertForQuestionAnswering`, or a loaded model of
            any framework; the model that comes with the package when left out.
        backend: "pt", "tf" or "flax"; the first that is installed when left out.
        processor: in place of the one that belongs to the model.
        recipe, vocabulary: as for `VisualBertProcessor.from_pretrained`.
        answers: what the labels mean: a list, a file, or one on the Hub; needed where the model's
            configuration has no names.
        dtype: in which the model computes, whatever its file holds.
        revision: branch, tag or commit on the Hub.

    Returns:
        `QuestionAnswering`, which is called with an image and a question.

    Raises:
        UsageError: the task or the backend is none.
        InputError: the answers are not those of the model, or the processor does not fit it.
        CheckpointError, ConfigError, HubError: as for a model's `from_pretrained`.
    """
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
    source = find_model(model)
    stored = isinstance(source, (str, os.PathLike))
    if processor is None:
        if not stored:
            raise UsageError("a model in memory needs its processor too: processor=…")
        processor = VisualBertProcessor.from_pretrained(
            source, recipe=recipe, vocabulary=vocabulary, revision=revision
        )
    given = None if answers is None else as_answers(answers)
    opened = _open(source, revision) if stored else source
    name = type(source).__name__
    if stored:
        name = EMBEDDED if source == embedded() else os.fspath(source)
    _check_recipe(processor.recipe)
    processor.check(opened.config, name)
    words = choose_answers(opened.config, processor.recipe.answers, given, name).words
    return QuestionAnswering(_load(opened, backend, dtype) if stored else source, processor, words)


def _open(source: Any, revision: str | None) -> "Checkpoint":
    from visualbert.pretrained import architecture_of, open_checkpoint

    checkpoint = open_checkpoint(source, revision=revision)
    found = _ARCHITECTURE
    if checkpoint.config.architectures:
        found = architecture_of(checkpoint.config, str(source))
    if found != _ARCHITECTURE:
        raise InputError(
            f"{source} is a {found}, which answers no questions; expected a {_ARCHITECTURE}"
        )
    return checkpoint


def _check_recipe(recipe: "Recipe") -> None:
    if recipe.architecture != _ARCHITECTURE:
        raise InputError(
            f"the recipe {recipe.name!r} is for a {recipe.architecture}, which answers no "
            "questions; pass another one: recipe=…, or --recipe on the command line"
        )


def _load(checkpoint: "Checkpoint", backend: str | None, dtype: str) -> Any:
    from visualbert.pretrained import load_model

    if backend is None:
        installed = backend_names(installed=True)
        if not installed:
            raise MissingBackendError(
                "no framework is installed; pip install visualbert[pt], [tf] or [flax]"
            )
        backend = installed[0]
    return load_model(get_backend(backend), _ARCHITECTURE, checkpoint, dtype=dtype)


class QuestionAnswering:
    """Answers questions about pictures; made by `pipeline`.

    Args:
        model: a `VisualBertForQuestionAnswering` of any framework.
        processor: of the model.
        answers: what its labels mean.
    """

    def __init__(self, model: Any, processor: VisualBertProcessor, answers: Sequence[str]) -> None:
        self.model, self.processor, self.answers = model, processor, tuple(answers)
        self._backend = get_backend(model.framework)
        self._predictors: dict[bool, Any] = {}
        self._given = np.array([word not in _NO_ANSWERS for word in self.answers])

    def __call__(
        self,
        image: Any = None,
        question: str | Sequence[str] | None = None,
        *,
        regions: Regions | np.ndarray | None = None,
        top: int = 5,
        attentions: bool = False,
    ) -> Any:
        """What there is to say about one image.

        Args:
            image: a path, the bytes of a file, a PIL image, or an array.
            question: one, or several about the same image.
            regions: in place of the image: what a detector saw in it.
            top: how many answers.
            attentions: whether to keep them.

        Returns:
            `Answered`, or a list of them.

        Raises:
            InputError: the image is none, a question is empty, or regions do not fit the model.
        """
        if question is None:
            raise InputError("pass a question about the image: (image, question)")
        if isinstance(image, Regions):
            raise InputError("these are regions, and no image; pass them as regions=…")
        if isinstance(image, (list, tuple)):
            raise InputError("one image is looked at in a call; ask about each of them")
        if (image is None) == (regions is None):
            raise InputError("pass an image, or the regions of one")
        single = isinstance(question, str)
        questions = as_texts(question)
        seen = self.look(image) if regions is None else regions
        found = self.ask(questions, [seen] * len(questions), top=top, attentions=attentions)
        return found[0] if single else found

    def __repr__(self) -> str:
        model, recipe = type(self.model).__name__, self.processor.recipe.name
        return (
            f"<{len(self.answers)} answers of {model} by the recipe {recipe!r}: (image, question)>"
        )

    def look(self, image: Any) -> Regions:
        """The regions of an image, as the model's recipe wants them."""
        return self.processor.extractor(image)

    def ask(
        self,
        questions: Sequence[str],
        regions: Sequence[Any],
        *,
        top: int = 5,
        attentions: bool = False,
    ) -> list[Answered]:
        """Answers to many questions in one batch.

        Args:
            questions: B questions.
            regions: of each the regions of its image.
            top: how many answers each.
            attentions: whether to keep them.

        Raises:
            InputError: as for a call.
        """
        top = _at_least_1("top", top)
        batch = self.processor(questions, regions=regions)
        self._tell_unknown(batch)
        inputs = _shared(batch, regions)
        output = self._run(inputs, attentions)
        scores = output["logits"].astype(np.float64)
        probabilities = _PROBABILITIES[self.processor.recipe.scores](scores)
        ranked = np.where(self._given, probabilities, -1).argsort(axis=1, kind="stable")[:, ::-1]
        return [
            Answered(
                question,
                tuple(
                    Answer(self.answers[n], float(probabilities[row, n]))
                    for n in ranked[row, : min(top, int(self._given.sum()))]
                ),
                batch.regions[row],
                tuple(batch.encoded[row].words),
                _attentions(output, batch, row, inputs["input_ids"].shape[1])
                if attentions
                else None,
            )
            for row, question in enumerate(questions)
        ]

    def _tell_unknown(self, batch: Batch) -> None:
        """Warn of words that the model's vocabulary does not have."""
        unknown = self.processor.tokenizer.special["[UNK]"]
        words = {
            word: None
            for encoded in batch.encoded
            if unknown in encoded.ids
            for word, first, end in encoded.words
            if unknown in encoded.ids[first:end]
        }
        if words:
            warnings.warn(
                f"the model's vocabulary does not hold {', '.join(map(repr, words))}; what it says "
                "of them is guessed",
                stacklevel=4,
            )

    def _run(self, inputs: dict[str, np.ndarray], attentions: bool) -> Mapping[str, np.ndarray]:
        if attentions not in self._predictors:
            options = {"output_attentions": True} if attentions else {}
            self._predictors[attentions] = self._backend.predictor(self.model, **options)
        return self._predictors[attentions](inputs)

    def stream(
        self, items: Iterable[tuple[str, Any]], *, top: int = 5, batch_size: int = 32
    ) -> Iterator[list[Answered]]:
        """Answers to any number of `(question, regions)`, batch by batch, in order."""
        batch_size = _at_least_1("batch_size", batch_size)
        held: list[tuple[str, Any]] = []
        for item in items:
            held.append(item)
            if len(held) == batch_size:
                yield self.ask(*zip(*held, strict=True), top=top)
                held = []
        if held:
            yield self.ask(*zip(*held, strict=True), top=top)


def _shared(batch: Batch, regions: Sequence[Any]) -> dict[str, np.ndarray]:
    """The inputs of a batch, with the regions of each image once."""
    first: dict[int, int] = {}
    rows = [first.setdefault(id(seen), row) for row, seen in enumerate(regions)]
    inputs = dict(batch)
    if len(first) == len(rows) or "visual_embeds" not in inputs:
        return inputs
    images = list(first.values())
    for name in inputs:
        if name.startswith("visual_"):
            inputs[name] = inputs[name][images]
    return {**inputs, "image_index": np.array([images.index(row) for row in rows], np.int32)}


def _softmax(scores: np.ndarray) -> np.ndarray:
    grown = np.exp(scores - scores.max(axis=1, keepdims=True))
    return grown / grown.sum(axis=1, keepdims=True)


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(scores / 2)) / 2


_PROBABILITIES = {"softmax": _softmax, "sigmoid": _sigmoid}


def _at_least_1(name: str, value: Any) -> int:
    try:
        if operator.index(value) >= 1:
            return operator.index(value)
    except TypeError:
        pass
    raise UsageError(f"{name}={value!r} must be at least 1")


def _attentions(output: Mapping[str, np.ndarray], batch: Batch, row: int, start: int) -> np.ndarray:
    """(layers, heads, S, S) of one example, without what was padded; regions begin at `start`."""
    layers = [array for name, array in output.items() if name.startswith("attentions.")]
    text = len(batch.encoded[row].ids)
    seen = batch.regions[row]
    kept = np.r_[0:text, start : start + (0 if seen is None else len(seen))]
    return np.stack([layer[row] for layer in layers])[:, :, kept][:, :, :, kept]
