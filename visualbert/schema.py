"""The one table of VisualBERT's parameters: canonical name, symbolic shape, kind.

Names and layouts are those of transformers' PyTorch classes, so a canonical safetensors file is a
transformers file. Everything that has to know a parameter (strict loading, layouts of the
frameworks, initial values, error texts) is derived from this table; nothing is guessed from a name
or a shape.
"""

import enum
from dataclasses import dataclass
from functools import lru_cache

from visualbert.config import VisualBertConfig
from visualbert.errors import ConfigError

BODY = "VisualBertModel"
PREFIX = "visual_bert."


class Kind(enum.Enum):
    """What a parameter is; its canonical layout in brackets."""

    EMBEDDING = "embedding"  # (rows, features)
    LINEAR = "linear"  # (out, in)
    BIAS = "bias"
    SCALE = "scale"
    SHIFT = "shift"


# Letters of a symbolic shape, and the field of VisualBertConfig that each stands for.
DIMENSIONS = {
    "W": "vocab_size",
    "H": "hidden_size",
    "F": "visual_embedding_dim",
    "I": "intermediate_size",
    "P": "max_position_embeddings",
    "G": "type_vocab_size",
    "L": "num_labels",
    "D": "head_size",
}


@dataclass(frozen=True)
class Param:
    """One parameter: canonical dotted name, shape in letters of `DIMENSIONS` or digits, kind."""

    name: str
    symbols: str
    kind: Kind

    def shape(self, config: VisualBertConfig) -> tuple[int, ...]:
        """The shape under `config`, in the canonical layout."""
        return tuple(
            int(s) if s.isdigit() else getattr(config, DIMENSIONS[s]) for s in self.symbols.split()
        )


def _embedding(name: str, rows: str) -> list[Param]:
    return [Param(f"{name}.weight", f"{rows} H", Kind.EMBEDDING)]


def _linear(name: str, out: str, in_: str) -> list[Param]:
    return [
        Param(f"{name}.weight", f"{out} {in_}", Kind.LINEAR),
        Param(f"{name}.bias", out, Kind.BIAS),
    ]


def _norm(name: str) -> list[Param]:
    return [Param(f"{name}.weight", "H", Kind.SCALE), Param(f"{name}.bias", "H", Kind.SHIFT)]


_EMBEDDINGS = [
    *_embedding("embeddings.word_embeddings", "W"),
    *_embedding("embeddings.position_embeddings", "P"),
    *_embedding("embeddings.token_type_embeddings", "G"),
    *_norm("embeddings.LayerNorm"),
    *_embedding("embeddings.visual_token_type_embeddings", "G"),
    *_embedding("embeddings.visual_position_embeddings", "P"),
    *_linear("embeddings.visual_projection", "H", "F"),
]
_LAYER = [
    *_linear("attention.self.query", "H", "H"),
    *_linear("attention.self.key", "H", "H"),
    *_linear("attention.self.value", "H", "H"),
    *_linear("attention.output.dense", "H", "H"),
    *_norm("attention.output.LayerNorm"),
    *_linear("intermediate.dense", "I", "H"),
    *_linear("output.dense", "H", "I"),
    *_norm("output.LayerNorm"),
]
_POOLER = _linear("pooler.dense", "H", "H")
_PRETRAINING = [
    Param("cls.predictions.bias", "W", Kind.BIAS),
    *_linear("cls.predictions.transform.dense", "H", "H"),
    *_norm("cls.predictions.transform.LayerNorm"),
    *_linear("cls.seq_relationship", "2", "H"),
]

HEADS: dict[str, list[Param]] = {
    BODY: [],
    "VisualBertForPreTraining": _PRETRAINING,
    "VisualBertForMultipleChoice": _linear("cls", "1", "H"),
    "VisualBertForQuestionAnswering": _linear("cls", "L", "H"),
    "VisualBertForVisualReasoning": _linear("cls", "L", "H"),
    "VisualBertForRegionToPhraseAlignment": [
        *_PRETRAINING,
        *_linear("attention.query", "D", "H"),
        *_linear("attention.key", "D", "H"),
        *_linear("attention.value", "D", "H"),
    ],
}
ARCHITECTURES = tuple(HEADS)

_MLP = [  # MMF's classifier, mmf/models/visual_bert.py
    *_linear("cls.transform.dense", "H", "H"),
    *_norm("cls.transform.LayerNorm"),
    *_linear("cls.decoder", "L", "H"),
]
# The heads that there are under each value of `VisualBertConfig.classifier_head`.
VARIANTS: dict[str, dict[str, list[Param]]] = {
    "linear": HEADS,
    "mlp": {
        BODY: [],
        "VisualBertForQuestionAnswering": _MLP,
        "VisualBertForVisualReasoning": _MLP,
    },
}
_HEAD_NAMES = [
    (architecture, frozenset(p.name for p in head))
    for heads in VARIANTS.values()
    for architecture, head in heads.items()
]

# Tensors that files may carry a second time under another name, and the one they repeat.
TIED = {
    "cls.predictions.decoder.weight": "visual_bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# Tensors of older files that hold no information.
IGNORED = frozenset({"embeddings.position_ids", "visual_bert.embeddings.position_ids"})
# Older spellings of a leaf, and today's.
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# Tables that start as copies of another one (`special_visual_initialize`).
COPIED = {
    "embeddings.visual_token_type_embeddings.weight": "embeddings.token_type_embeddings.weight",
    "embeddings.visual_position_embeddings.weight": "embeddings.position_embeddings.weight",
}


def check_architecture(architecture: str) -> str:
    """`architecture` itself, if it is one.

    Raises:
        ConfigError: it is not, and the sentence lists those that are.
    """
    if architecture not in HEADS:
        raise ConfigError(
            f"unknown architecture {architecture!r}; expected one of {', '.join(ARCHITECTURES)}"
        )
    return architecture


@lru_cache(maxsize=64)
def _table(
    architecture: str, num_layers: int, late_fusion: bool, classifier_head: str
) -> tuple[Param, ...]:
    layers = [f"encoder.layer.{i}." for i in range(num_layers)]
    if late_fusion:
        layers.append("additional_layer.")
    body = [
        *_EMBEDDINGS,
        *(Param(layer + p.name, p.symbols, p.kind) for layer in layers for p in _LAYER),
        *_POOLER,
    ]
    prefix = "" if architecture == BODY else PREFIX
    head = VARIANTS[classifier_head][architecture]
    return tuple([Param(prefix + p.name, p.symbols, p.kind) for p in body] + head)


def parameters(architecture: str, config: VisualBertConfig) -> tuple[Param, ...]:
    """Every parameter of `architecture` under `config`, in the order of a forward pass.

    Raises:
        ConfigError: no such architecture, or `config.classifier_head` is none of its heads.
    """
    check_architecture(architecture)
    choice = config.classifier_head
    if architecture not in VARIANTS[choice]:
        able = " and ".join(name for name, head in VARIANTS[choice].items() if head)
        raise ConfigError(
            f"classifier_head={choice!r} is no head of {architecture}, only of {able}; set it to "
            "'linear'"
        )
    return _table(architecture, config.num_hidden_layers, config.bypass_transformer, choice)


def is_head(param: Param) -> bool:
    """Whether `param` belongs to a task head, not to the body below it."""
    return bool(owners_of(param.name))


def owners_of(name: str) -> tuple[str, ...]:
    """The architectures whose head is the smallest that has a parameter `name`, if any."""
    heads = [(architecture, head) for architecture, head in _HEAD_NAMES if name in head]
    smallest = min((head for _, head in heads), key=len, default=None)
    return tuple(architecture for architecture, head in heads if head == smallest)


def owner_of(name: str) -> str | None:
    """The first of `owners_of`."""
    return next(iter(owners_of(name)), None)
