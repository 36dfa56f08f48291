"""Run one checkpoint in several backends on the same inputs, and compare everything that comes out.

A case is a set of inputs. For each, every output, every hidden state, every attention, the loss and
the gradient of every parameter are compared between every two backends; then each backend saves the
model and the tensors are compared bit for bit with those that were loaded.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from visualbert.backend import Backend, get_backend, native_name, to_native
from visualbert.checkpoint.read import read_weights
from visualbert.checkpoint.tensors import DTYPES, Tensors, cast
from visualbert.config import VisualBertConfig
from visualbert.errors import CheckpointError, InputError, UsageError
from visualbert.inputs.contract import INPUTS, is_floating
from visualbert.packing import flat_masks, joint_visibility
from visualbert.pretrained import Checkpoint, ModelTensors, load_model, save_model
from visualbert.schema import BODY, parameters

# Largest difference between two backends, by the type they compute in. float64 is the proof: a
# wrong activation or epsilon stands far above its rounding, while float32's can hide one.
TOLERANCES = {"float64": 1e-9, "float32": 1e-5}
REFERENCE = "transformers"
_HIDDEN = -1e30  # scores of masked regions: any number below means "not visible"


@dataclass(frozen=True)
class Case:
    """What a batch looks like; sizes are three examples of `text` tokens and `regions` regions."""

    name: str
    padding: str | None = "right"  # side; None: no masks are passed at all
    regions: bool = True
    alignment: bool = False


CASES = (
    Case("no masks", padding=None),
    Case("right padding"),
    Case("left padding", padding="left"),
    Case("alignment", alignment=True),
    Case("text only", regions=False),
)
BATCH, CHOICES, PHRASES, ALIGNMENTS = 3, 4, 2, 3


def make_inputs(
    case: Case, architecture: str, config: VisualBertConfig, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random inputs and labels of `architecture` for a case, reproducible from `seed`."""
    rng = np.random.default_rng(seed)
    text, regions = min(11, config.max_position_embeddings), 7
    inputs = {
        "input_ids": rng.integers(min(3, config.vocab_size - 1), config.vocab_size, (BATCH, text)),
        "token_type_ids": rng.integers(0, config.type_vocab_size, (BATCH, text)),
    }
    if case.padding is not None:
        inputs["attention_mask"] = _ragged(BATCH, text, case.padding)
        inputs["input_ids"] *= inputs["attention_mask"]
    if case.regions:
        features = rng.standard_normal((BATCH, regions, config.visual_embedding_dim))
        inputs["visual_embeds"] = features.astype(np.float32)
        inputs["visual_token_type_ids"] = rng.integers(0, config.type_vocab_size, (BATCH, regions))
        if case.padding is not None:
            inputs["visual_attention_mask"] = _ragged(BATCH, regions, "right")[::-1].copy()
    if case.alignment:
        inputs["image_text_alignment"] = rng.integers(-1, text, (BATCH, regions, ALIGNMENTS))
        inputs["image_text_alignment"][0, 0] = -1  # a region that belongs to no word
    labels = _LABELS.get(architecture, lambda *_: {})(rng, config, inputs)
    if architecture == "VisualBertForMultipleChoice":
        inputs = _with_choices(rng, config, inputs)
    return {**inputs, **labels}


def _ragged(batch: int, length: int, side: str) -> np.ndarray:
    mask = np.ones((batch, length), np.int64)
    for row in range(1, batch):
        hidden = min(2 * row, length - 2)
        mask[row, -hidden:] = 0
    return mask if side == "right" else mask[:, ::-1].copy()


def _with_choices(rng: Any, config: VisualBertConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """Text with a choice axis; regions stay without one, as they are the same for every choice."""
    out = {
        name: x if name.startswith(("visual", "image")) else np.stack([x] * CHOICES, axis=1)
        for name, x in inputs.items()
    }
    low = min(3, config.vocab_size - 1)
    out["input_ids"] = rng.integers(low, config.vocab_size, out["input_ids"].shape)
    return out


def _pretraining_labels(rng: Any, config: VisualBertConfig, inputs: Any) -> dict[str, np.ndarray]:
    ids = inputs["input_ids"]
    chosen = (rng.random(ids.shape) < 0.4) & (inputs.get("attention_mask", 1) == 1)
    chosen[0, 1] = True
    words = rng.integers(0, config.vocab_size, ids.shape)
    return {
        "labels": np.where(chosen, words, -1),
        "sentence_image_labels": rng.integers(0, 2, BATCH),
    }


def _phrase_labels(rng: Any, config: VisualBertConfig, inputs: Any) -> dict[str, np.ndarray]:
    tokens = inputs.get("attention_mask", np.ones_like(inputs["input_ids"]))
    positions = np.stack([rng.choice(np.flatnonzero(row), PHRASES) for row in tokens])
    positions[0, -1] = -1
    shape = (BATCH, PHRASES, inputs["visual_embeds"].shape[1])
    targets = rng.random(shape) * inputs.get("visual_attention_mask", np.ones((BATCH, 1)))[:, None]
    targets *= (positions >= 0)[..., None]
    return {"region_to_phrase_position": positions, "labels": targets.astype(np.float32)}


_LABELS: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "VisualBertForPreTraining": _pretraining_labels,
    "VisualBertForMultipleChoice": lambda rng, *_: {"labels": rng.integers(0, CHOICES, BATCH)},
    "VisualBertForQuestionAnswering": lambda rng, config, _: {
        "labels": rng.random((BATCH, config.num_labels)).astype(np.float32) / config.num_labels
    },
    "VisualBertForVisualReasoning": lambda rng, config, _: {
        "labels": rng.integers(0, config.num_labels, BATCH)
    },
    "VisualBertForRegionToPhraseAlignment": _phrase_labels,
}


def applicable(case: Case, architecture: str) -> bool:
    """Whether `architecture` can take such a batch at all."""
    return case.regions or architecture != "VisualBertForRegionToPhraseAlignment"


def run(
    backend: Backend,
    model: Any,
    architecture: str,
    config: VisualBertConfig,
    inputs: Mapping[str, Any],
    dtype: str,
) -> dict[str, np.ndarray]:
    """Everything that a call gives, by name; gradients as `gradient NAME` in the canonical layout.

    Hidden states and words at padding, which mean nothing, are zero. Attentions come from a call of
    their own, since asking for them switches to the plain form.
    """
    inputs = _cast_inputs(architecture, inputs, dtype)
    found = backend.call(model, {**inputs, "output_hidden_states": True})
    found = {name: without_padding(name, x, inputs) for name, x in found.items()}
    plain = backend.call(model, {**inputs, "output_attentions": True})
    found |= {name: x for name, x in plain.items() if name.startswith("attentions")}
    if "loss" in found:
        gradients = backend.gradients(model, inputs)
        for p in parameters(architecture, config):
            gradient = gradients[native_name(backend, p)]
            found[f"gradient {p.name}"] = to_native(backend, p, gradient)
    return found


def without_padding(name: str, x: np.ndarray, inputs: Mapping[str, Any]) -> np.ndarray:
    """An output in which what a batch's padding gives is zero, as in a batch that was packed."""
    if name.partition(".")[0] not in ("last_hidden_state", "hidden_states", "prediction_logits"):
        return x
    masks = [inputs.get("attention_mask"), inputs.get("visual_attention_mask")]
    if masks[0] is None:
        return x
    text, regions, index = flat_masks(*masks)
    visible = joint_visibility(text, regions, index)[:, : x.shape[1]]  # text alone, late fusion
    return np.where(visible[..., None], x, 0)


def _cast_inputs(architecture: str, inputs: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    own = INPUTS[architecture]
    return {
        name: cast(np.asarray(x), dtype)
        if is_floating(architecture if name in own else BODY, name)
        else x
        for name, x in inputs.items()
    }


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference between two arrays of the same name."""

    name: str
    error: float
    size: float  # largest absolute value

    @property
    def scaled(self) -> float:
        """The error, by the array's largest value where that is above one, as rounding goes."""
        return self.error / max(1.0, self.size)


def compare(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> list[Difference]:
    """One `Difference` for each name, the worst first; infinite where one side lacks it or is
    NaN.
    """
    rows = []
    for name in sorted(set(a) | set(b)):
        if name not in a or name not in b or a[name].shape != b[name].shape:
            rows.append(Difference(name, float("inf"), 0.0))
            continue
        x, y = a[name].astype(np.float64), b[name].astype(np.float64)
        hidden = (x < _HIDDEN) & (y < _HIDDEN)
        errors = np.where(hidden, 0.0, np.abs(x - y))
        error = float(errors.max(initial=0.0))
        size = float(np.abs(np.where(hidden, 0.0, x)).max(initial=0.0))
        rows.append(Difference(name, float("inf") if np.isnan(error) else error, size))
    return sorted(rows, key=lambda d: -d.scaled)


@dataclass(frozen=True)
class Row:
    """One comparison: two backends on one case, or one backend's saved tensors with the loaded
    ones.
    """

    case: str
    pair: str
    compared: int
    worst: str
    error: float
    passed: bool
    skipped: str = ""


@dataclass
class Report:
    """The outcome of `verify`."""

    source: str
    architecture: str
    dtype: str
    tolerance: float
    backends: list[str]
    rows: list[Row] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing differs by more than the tolerance."""
        compared = [row for row in self.rows if not row.skipped]
        return bool(compared) and all(row.passed for row in compared)


def verify(
    checkpoint: Checkpoint,
    architecture: str,
    backends: list[str],
    *,
    against: str | None = None,
    dtype: str = "float64",
    tolerance: float | None = None,
    cases: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[str], object] = lambda step: None,
) -> Report:
    """Load a checkpoint in every backend and compare everything (see the module).

    Args:
        checkpoint: what is to be verified.
        architecture: the class to load it into.
        backends: names; two of them, or one and a reference.
        against: "transformers", to compare with its own class as well.
        dtype: the type to compute in, whatever the file holds: "float64" or "float32".
        tolerance: largest `Difference.scaled` that passes; `TOLERANCES[dtype]` when left out.
        cases: inputs by name of the case; random ones for each of `CASES` when left out.
        progress: told what is being done.

    Raises:
        CheckpointError: a backend cannot load the checkpoint.
        UsageError: `dtype` is another type.
    """
    if dtype not in TOLERANCES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(TOLERANCES)}")
    names = [*backends, *([against] if against else [])]
    report = Report(checkpoint.label, architecture, dtype, tolerance or TOLERANCES[dtype], names)
    models = {}
    for name in names:
        progress(f"loading in {name}")
        models[name] = _load(name, architecture, checkpoint, dtype)
    if cases is None:
        cases = {
            case.name: make_inputs(case, architecture, checkpoint.config)
            for case in CASES
            if applicable(case, architecture)
        }
    for case, inputs in cases.items():
        report.rows += _compare_case(case, inputs, models, report, checkpoint.config, progress)
    for name in backends:
        progress(f"saving from {name}")
        report.rows.append(_compare_saved(name, models[name], checkpoint.tensors))
    return report


def _load(name: str, architecture: str, checkpoint: Checkpoint, dtype: str) -> Any:
    backend = get_backend(name)
    if name == REFERENCE:
        return backend.load(checkpoint.folder, architecture, dtype)  # type: ignore[attr-defined]
    return load_model(backend, architecture, checkpoint, dtype=dtype)


def _compare_case(
    case: str,
    inputs: Mapping[str, Any],
    models: Mapping[str, Any],
    report: Report,
    config: VisualBertConfig,
    progress: Callable[[str], object],
) -> Iterator[Row]:
    found: dict[str, dict[str, np.ndarray] | str] = {}
    for name, model in models.items():
        progress(f"{case} in {name}")
        backend = get_backend(name)
        try:
            found[name] = run(backend, model, report.architecture, config, inputs, report.dtype)
        except InputError:
            raise
        except Exception as error:
            if type(error).__name__ != "NotComparable":
                raise
            found[name] = str(error)
    for a, b in itertools.combinations(models, 2):
        pair = f"{a} – {b}"
        left, right = found[a], found[b]
        if isinstance(left, str) or isinstance(right, str):
            reason = left if isinstance(left, str) else right
            yield Row(case, pair, 0, "", 0.0, True, f"{REFERENCE}: {reason}")
            continue
        differences = compare(left, right)
        worst = differences[0]
        passed = worst.scaled <= report.tolerance
        yield Row(case, pair, len(differences), worst.name, worst.scaled, passed)


def _compare_saved(name: str, model: Any, loaded: Tensors) -> Row:
    backend = get_backend(name)
    with tempfile.TemporaryDirectory(prefix="visualbert-verify-") as folder:
        save_model(backend, model, folder)
        different = differing_bits(ModelTensors(backend, model), read_weights(Path(folder)))
        again = load_model(
            backend,
            model.architecture,
            Checkpoint(folder, model.config, read_weights(Path(folder)), Path(folder)),
        )
        different += differing_bits(ModelTensors(backend, model), ModelTensors(backend, again))
        different += _differing_from_file(ModelTensors(backend, model), loaded)
        count = len(parameters(model.architecture, model.config))
    worst = different[0] if different else ""
    return Row("save and reload", name, count, worst, float(len(different)), not different)


def differing_bits(a: Tensors, b: Tensors) -> list[str]:
    """Names of tensors that are not the same bit for bit, or that only one side has."""
    names = sorted(set(a.specs) | set(b.specs))
    return [name for name in names if not _same_bits(a, b, name)]


def _same_bits(a: Tensors, b: Tensors, name: str) -> bool:
    if a.specs.get(name) != b.specs.get(name):
        return False
    x, y = (np.ascontiguousarray(t.read(name)).reshape(-1).view(np.uint8) for t in (a, b))
    return bool(np.array_equal(x, y))


def _differing_from_file(model: Tensors, loaded: Tensors) -> list[str]:
    """Names, common to both, whose values are not the file's in the model's type."""
    common = [n for n in model.specs if n in loaded.specs and loaded.specs[n].dtype in DTYPES]
    return [
        name
        for name in common
        if not np.array_equal(
            cast(loaded.read(name), model.specs[name].dtype), model.read(name), equal_nan=True
        )
    ]


def read_cases(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Inputs that a user wrote to a safetensors file, as one case called after the file.

    Raises:
        CheckpointError: the file is not a safetensors file.
        InputError: it holds a name that is no input.
    """
    from visualbert.checkpoint.read import SafetensorsFiles

    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: expected a .safetensors file of inputs")
    tensors = SafetensorsFiles(str(path), [path])
    known = {name for table in INPUTS.values() for name in table}
    unknown = sorted(set(tensors.specs) - known)
    if unknown:
        raise InputError(
            f"{path}: {unknown[0]} is not an input of VisualBERT; known are "
            f"{', '.join(sorted(known))}"
        )
    return {path.stem: {name: np.array(tensors.read(name)) for name in tensors.specs}}
