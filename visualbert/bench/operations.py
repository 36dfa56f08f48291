"""How many operations a batch needs at least: what a figure's share of the limit is counted from.

A product of (m, k) and (k, n) is 2·m·k·n operations. Look-ups, norms, softmax and activations are
not counted.
"""

from collections.abc import Mapping

import numpy as np

from visualbert.bench.workloads import Workload
from visualbert.config import VisualBertConfig

TRAINING = 3  # the backward pass takes two products for each of the forward's


def useful_operations(
    workload: Workload, config: VisualBertConfig, inputs: Mapping[str, np.ndarray]
) -> int:
    """Operations that no implementation can do without, from the masks and labels of a batch.

    With H hidden, I intermediate, F features, and s real tokens and regions in an example (padding
    earns nothing), they are, for each example:

    - the projection of its image's regions, 2·F·H each, once for all texts about one image;
    - every layer but the last: 2·s·(4H² + 2HI) for the linear layers, 4·s²·H for attention;
    - the last layer: keys and values everywhere, 4·s·H²; all else only at the p positions that the
      head reads, 2·p·(2H² + 2HI) and 4·p·s·H. p is 1 for an answer or a choice; in pretraining, the
      positions with a label and the first;
    - the head. Question answering: 2·H·L for L labels. Multiple choice: the pooler's 2H² and 2H.
      Pretraining: the pooler's 2H² and 4H, and 2H² + 2·H·W for each position with a label, W being
      the vocabulary.

    A training step is three times that.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    tokens = inputs["attention_mask"].reshape(-1, inputs["attention_mask"].shape[-1]).sum(1)
    regions = inputs["visual_attention_mask"].sum(1)
    lengths = tokens + regions.repeat(workload.choices)
    labelled = np.zeros_like(lengths)
    read = np.ones_like(lengths)
    if workload.architecture == "VisualBertForPreTraining":
        at_label = inputs["labels"] >= 0
        labelled, read = at_label.sum(1), at_label[:, 1:].sum(1) + 1

    linear = 4 * hidden**2 + 2 * hidden * inner
    projection = 2 * regions * config.visual_embedding_dim * hidden
    layer = 2 * lengths * linear + 4 * lengths**2 * hidden
    last = (
        4 * lengths * hidden**2 + 2 * read * (linear - 2 * hidden**2) + 4 * read * lengths * hidden
    )
    pooler = 2 * hidden**2
    head = {
        "VisualBertForQuestionAnswering": 2 * hidden * config.num_labels,
        "VisualBertForMultipleChoice": pooler + 2 * hidden,
        "VisualBertForPreTraining": pooler
        + 4 * hidden
        + labelled * (2 * hidden**2 + 2 * hidden * config.vocab_size),
    }[workload.architecture]
    each = (config.num_hidden_layers - 1) * layer + last + head
    total = int(projection.sum() + each.sum())
    return total * (TRAINING if workload.kind == "step" else 1)


def real_tokens(workload: Workload, inputs: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Word pieces and regions that the encoder has to read, and regions to be projected."""
    regions = int(inputs["visual_attention_mask"].sum())
    return int(inputs["attention_mask"].sum()) + regions * workload.choices, regions
