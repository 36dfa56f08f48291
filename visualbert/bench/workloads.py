"""What `visualbert bench` measures, as data: sizes, workloads, implementations and tolerances.

Nothing is imported here, so that `--help` is quick.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

REFERENCE = "transformers"

# Fields of `VisualBertConfig`; what is not named is its default, BERT's base size.
SIZES: dict[str, dict[str, Any]] = {
    "base": {"visual_embedding_dim": 2048, "num_labels": 3129},
    "tiny": {
        "vocab_size": 211,
        "hidden_size": 24,
        "visual_embedding_dim": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 128,
        "num_labels": 7,
    },
}

# Largest difference from transformers in float32: of outputs, absolute; of a loss and gradients, by
# the largest value of each. Above it nothing is timed.
TOLERANCE = 1e-4

# What a gradient is compared of, where a model has it.
CHECKED = (
    "visual_bert.embeddings.word_embeddings.weight",
    "visual_bert.embeddings.visual_projection.weight",
    "visual_bert.encoder.layer.0.attention.self.query.weight",
    "visual_bert.encoder.layer.1.output.dense.bias",
    "cls.weight",
    "cls.predictions.bias",
)


class Lengths(NamedTuple):
    """How many tokens or regions the examples of a batch have, and what they are padded to."""

    low: int
    high: int
    padded: int


def exactly(length: int) -> Lengths:
    """The same for all, no padding."""
    return Lengths(length, length, length)


class Workload(NamedTuple):
    """A batch, and what is done with it.

    Args:
        name: on the command line.
        architecture: the class that does it.
        text: word pieces of each text.
        regions: regions of each image.
        batch: images.
        choices: texts for each image, which share its regions; more than one for a multiple choice.
        kind: "call" (the outputs of a batch), "step" (forward, backward and AdamW's update, dropout
            on) or "load" (a fresh process, from the file to the first answer).
        seed: of lengths and values.
    """

    name: str
    architecture: str
    text: Lengths
    regions: Lengths
    batch: int = 16
    choices: int = 1
    kind: str = "call"
    seed: int = 0


def read_workload(values: Sequence[Any]) -> Workload:
    """A workload that went through JSON."""
    name, architecture, text, regions, *others = values
    return Workload(name, architecture, Lengths(*text), Lengths(*regions), *others)


_VQA, _VCR = "VisualBertForQuestionAnswering", "VisualBertForMultipleChoice"
_RAGGED = Lengths(6, 24, 128), Lengths(10, 100, 100)

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("single", _VQA, exactly(20), exactly(36), batch=1),
        Workload("full", _VQA, exactly(20), exactly(36)),
        Workload("ragged", _VQA, *_RAGGED),
        Workload("vcr", _VCR, Lengths(12, 36, 36), exactly(20), batch=8, choices=4),
        Workload("train-vqa", _VQA, *_RAGGED, kind="step"),
        Workload("pretrain", "VisualBertForPreTraining", *_RAGGED, kind="step"),
        Workload("load", _VQA, exactly(20), exactly(36), batch=1, kind="load"),
    )
}

_SWEEP = (  # batch, text, regions
    *((batch, 20, 36) for batch in (1, 2, 4, 8, 16, 32)),
    *((8, text, 36) for text in (8, 16, 32, 64, 128)),
    *((8, 20, regions) for regions in (10, 18, 50, 75, 100)),
    *((1, 8, 10), (1, 128, 100), (32, 8, 10), (32, 128, 100)),
    *((3, 17, 29), (5, 41, 67), (11, 23, 53), (7, 101, 91), (13, 9, 97)),
)
SWEEP = tuple(
    Workload(
        f"{batch} × ({text} + {regions}) {'ragged' if ragged else 'full'}",
        _VQA,
        Lengths(max(text // 4, 4), text, text) if ragged else exactly(text),
        Lengths(max(regions // 4, 1), regions, regions) if ragged else exactly(regions),
        batch,
        seed=number,
    )
    for number, (batch, text, regions) in enumerate(_SWEEP)
    for ragged in (False, True)
)


class Device(NamedTuple):
    """How a device is measured.

    Args:
        dtypes: compared if none are asked for.
        workloads: measured if none are asked for.
        reference: the type that transformers computes in, whose speed is 1.
        batch: of what the workloads give as 16; the others in proportion, a single question aside.
        calls: batches in a turn, of which the mean counts, after one that does not: a batch comes
            after others like it; of a single question ten times as many.
    """

    dtypes: tuple[str, ...]
    workloads: tuple[str, ...]
    reference: str
    batch: int
    calls: int

    def calls_of(self, workload: Workload) -> int:
        """Batches in a turn."""
        return self.calls * (10 if workload.batch == 1 else 1)


DEVICES = {
    "cpu": Device(("float32",), tuple(WORKLOADS), "float32", 16, 1),
    "cuda": Device(
        ("bfloat16",), ("single", "full", "ragged", "vcr", "train-vqa"), "bfloat16", 256, 10
    ),
}


class Implementation(NamedTuple):
    """One way to run a model.

    Args:
        backend: its name in `visualbert.backend`.
        dtype: the type that it computes in.
        kinds: of workloads that it is measured on.
        devices: that it is measured on.
        options: what `visualbert.load` is told beside the type.
    """

    backend: str
    dtype: str
    kinds: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)
    options: Mapping[str, Any] = {}

    @property
    def name(self) -> str:
        """As tables and sentences call it."""
        return f"{self.backend} {self.dtype}"


_CPU_CUDA = ("cpu", "cuda")
IMPLEMENTATIONS = (
    Implementation(REFERENCE, "float32", ("call", "step", "load"), _CPU_CUDA),
    Implementation("pt", "float32", ("call", "step", "load"), _CPU_CUDA),
    Implementation("tf", "float32", ("call", "step", "load")),
    Implementation("flax", "float32", ("call", "step", "load")),
    Implementation(REFERENCE, "bfloat16", ("call",)),
    Implementation(REFERENCE, "bfloat16", ("call", "step"), ("cuda",)),
    Implementation("pt", "bfloat16", ("call",)),
    Implementation("pt", "bfloat16", ("call", "step"), ("cuda",)),
    Implementation("tf", "bfloat16", ("call",)),
    Implementation("flax", "bfloat16", ("call",)),
    Implementation(REFERENCE, "float16", ("call",), _CPU_CUDA),
    Implementation("pt", "float16", ("call",), _CPU_CUDA),
    Implementation("tf", "float16", ("call",)),
    Implementation("flax", "float16", ("call",)),
    Implementation("pt", "int8", ("call",)),
)
BACKENDS = tuple(dict.fromkeys(x.backend for x in IMPLEMENTATIONS if x.backend != REFERENCE))
DTYPES = tuple(dict.fromkeys(x.dtype for x in IMPLEMENTATIONS))

# What a model is loaded with for training, beside an implementation's own options.
TRAINING = {"packing": "always", "sparse_prediction": True}
