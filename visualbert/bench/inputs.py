"""The batches of the workloads: the same for the same seed, for every implementation."""

from typing import Any

import numpy as np

from visualbert.bench.workloads import Lengths, Workload
from visualbert.config import VisualBertConfig

MASKED = 0.15  # of the real word pieces, in pretraining
_MASK = 103  # the id of [MASK] in BERT's vocabulary
_SCORES = 1.0, 0.6, 0.3  # of a question's answers


def make_inputs(workload: Workload, config: VisualBertConfig) -> dict[str, np.ndarray]:
    """A batch as the processor makes them: padding on the right, masks given, zeros at padding.

    Labels are there for a training step. The regions of a multiple choice have no choice axis.
    """
    rng = np.random.default_rng(workload.seed)
    images = (workload.batch,)
    texts = images if workload.choices == 1 else (*images, workload.choices)
    attention_mask = _mask(rng, texts, workload.text)
    words = rng.integers(min(1000, config.vocab_size // 2), config.vocab_size, attention_mask.shape)
    visual_mask = _mask(rng, images, workload.regions)
    features = rng.standard_normal(
        (*visual_mask.shape, config.visual_embedding_dim), dtype=np.float32
    )
    inputs = {
        "input_ids": words * attention_mask,
        "attention_mask": attention_mask,
        "token_type_ids": np.zeros_like(attention_mask),
        "visual_embeds": features * visual_mask[..., None].astype(np.float32),
        "visual_attention_mask": visual_mask,
        "visual_token_type_ids": np.zeros_like(visual_mask),
    }
    return (
        inputs if workload.kind != "step" else _LABELS[workload.architecture](rng, config, inputs)
    )


def _mask(rng: Any, rows: tuple[int, ...], lengths: Lengths) -> np.ndarray:
    drawn = rng.integers(lengths.low, lengths.high + 1, rows)
    return (np.arange(lengths.padded) < drawn[..., None]).astype(np.int64)


def _answers(rng: Any, config: VisualBertConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """Three answers a question, with VQA's soft scores."""
    batch = len(inputs["input_ids"])
    labels = np.zeros((batch, config.num_labels), np.float32)
    for row in labels:
        row[rng.choice(config.num_labels, len(_SCORES), replace=False)] = _SCORES
    return {**inputs, "labels": labels}


def _masked_words(rng: Any, config: VisualBertConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """Words to be predicted, -1 elsewhere, and whether each text belongs to its image."""
    ids = inputs["input_ids"]
    real = np.flatnonzero(inputs["attention_mask"])
    chosen = rng.choice(real, round(MASKED * real.size), replace=False)
    labels, masked = np.full_like(ids, -1), ids.copy()
    labels.flat[chosen] = ids.flat[chosen]
    masked.flat[chosen] = _MASK
    match = rng.integers(0, 2, len(ids))
    return {**inputs, "input_ids": masked, "labels": labels, "sentence_image_labels": match}


_LABELS = {
    "VisualBertForQuestionAnswering": _answers,
    "VisualBertForPreTraining": _masked_words,
}
