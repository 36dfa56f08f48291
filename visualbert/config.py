"""VisualBertConfig: one description of a model for every framework.

Field names, defaults and order are those of transformers' `VisualBertConfig`, with one exception:
`pad_token_id` is 0, BERT's, when a file does not say otherwise. `from_dict` keeps the keys it does
not know, so a config.json written by transformers comes back with nothing lost.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visualbert.errors import ConfigError

CONFIG_FILE = "config.json"
MODEL_TYPE = "visual_bert"
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")
ATTENTIONS = ("sdpa", "eager")

_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "visual_embedding_dim",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "num_labels",
)
_LARGEST = 2**31 - 1
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


@dataclass(frozen=True, kw_only=True)
class VisualBertConfig:
    """The architecture of a VisualBERT, immutable and validated.

    Args:
        vocab_size: rows of the word table.
        hidden_size: width of every hidden state; a multiple of `num_attention_heads`.
        visual_embedding_dim: width of one region's feature vector (2048 for VQA, 1024 for NLVR2,
            512 for VCR).
        num_hidden_layers: Transformer layers.
        num_attention_heads: attention heads per layer.
        intermediate_size: width of the feed-forward layer.
        hidden_act: activation of the feed-forward layer and of the language-model head, one of
            `visualbert.config.ACTIVATIONS`; "gelu" is the exact form with erf.
        hidden_dropout_prob: dropout after embeddings, projections and before the heads.
        attention_probs_dropout_prob: dropout of the attention probabilities.
        max_position_embeddings: longest text.
        type_vocab_size: rows of the text and of the visual segment table.
        initializer_range: standard deviation of freshly drawn weights.
        layer_norm_eps: epsilon of every LayerNorm.
        bypass_transformer: late fusion: the encoder reads text alone and one additional layer joins
            the regions ("w/o early fusion" in section 4.5 of the paper).
        special_visual_initialize: a fresh model's visual segment and position tables start as
            copies of the text tables.
        tie_word_embeddings: always true; the decoder of the language-model head is the word table.
        num_labels: size of the classification head; taken from `id2label` when that is given.
        id2label: names of the labels, by index.
        architectures: class names that wrote the checkpoint, as transformers records them.
        output_attentions, output_hidden_states: what a call returns when it does not say.
        attn_implementation: "sdpa" (the framework's fused attention where it has one) or "eager". A
            setting of this process: never written to a file.
        extra: keys of a config.json that this class does not know, kept for the way back.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or contradicts another.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    visual_embedding_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    bypass_transformer: bool = False
    special_visual_initialize: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: Any = field(default=None, hash=False)
    tie_word_embeddings: bool = True
    num_labels: int | None = None
    id2label: Mapping[int, str] | None = field(default=None, hash=False, repr=False)
    architectures: tuple[str, ...] | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    attn_implementation: str = field(default="sdpa", compare=True)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)

    def __post_init__(self) -> None:
        self._check_types()
        self._settle_labels()
        if self.architectures is not None:
            object.__setattr__(self, "architectures", tuple(self.architectures))
        self._check_values()

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **changes: Any) -> "VisualBertConfig":
        """The config that `values` (a parsed config.json) describes, with `changes` on top."""
        known = {f.name for f in dataclasses.fields(cls)} - {"extra", "attn_implementation"}
        fields = {key: value for key, value in values.items() if key in known}
        extra = {key: value for key, value in values.items() if key not in known}
        labels = fields.get("id2label")
        if isinstance(labels, Mapping):
            fields["id2label"] = _integer_keys(labels)
        if "num_labels" in changes and "id2label" not in changes:
            fields.pop("id2label", None)
            extra.pop("label2id", None)
        unknown = sorted(set(changes) - known - {"attn_implementation"})
        if unknown:
            raise ConfigError(f"VisualBertConfig has no field {', '.join(map(repr, unknown))}")
        return cls(**{**fields, **changes}, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **changes: Any) -> "VisualBertConfig":
        """Read `folder`/config.json (or the file itself), with `changes` on top.

        Raises:
            ConfigError: the file is missing, is not a JSON object, or describes another model.
        """
        path = Path(folder)
        path = path / CONFIG_FILE if path.is_dir() else path
        values = read_json_object(path)
        found = values.get("model_type", MODEL_TYPE)
        if found != MODEL_TYPE:
            raise ConfigError(f"{path}: model_type is {found!r}, expected {MODEL_TYPE!r}")
        try:
            return cls.from_dict(values, **changes)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """What belongs into a config.json, in plain JSON types."""
        values: dict[str, Any] = {"model_type": MODEL_TYPE}
        for f in dataclasses.fields(self):
            if f.name not in ("extra", "attn_implementation", "id2label", "num_labels"):
                values[f.name] = getattr(self, f.name)
        if self.architectures is None:
            del values["architectures"]
        else:
            values["architectures"] = list(self.architectures)
        for name in ("output_attentions", "output_hidden_states"):
            if not values[name]:
                del values[name]
        if self.id2label is not None:
            values["id2label"] = {str(index): name for index, name in self.id2label.items()}
            values["label2id"] = {name: index for index, name in self.id2label.items()}
        return {**values, **self.extra}

    def to_json_string(self) -> str:
        """`to_dict` as JSON text with sorted keys, as transformers writes it."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `folder`/config.json, atomically."""
        from visualbert.checkpoint.write import replace_files

        replace_files(folder, {CONFIG_FILE: lambda path: path.write_text(self.to_json_string())})

    def replace(self, **changes: Any) -> "VisualBertConfig":
        """A copy with some fields changed."""
        if "num_labels" in changes and "id2label" not in changes:
            changes["id2label"] = None
        elif "id2label" in changes and "num_labels" not in changes:
            changes["num_labels"] = None
        return dataclasses.replace(self, **changes)

    def _check_types(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            kinds = [kind for kind in (int, float, bool, str) if f.type in (kind, kind | None)]
            if not kinds or (value is None and f.type not in (int, float, bool, str)):
                continue
            kind = kinds[0]
            fits = isinstance(value, (int, float) if kind is float else kind)
            if not fits or (isinstance(value, bool) and kind is not bool):
                raise ConfigError(f"{f.name} must be {_WORDS[kind]}, got {value!r}")

    def _settle_labels(self) -> None:
        names = self.id2label
        if names is not None:
            if not isinstance(names, Mapping) or sorted(names) != list(range(len(names))):
                raise ConfigError("id2label must name every label from 0 up, without a gap")
            if self.num_labels not in (None, len(names)):
                raise ConfigError(
                    f"num_labels={self.num_labels} contradicts id2label, which names "
                    f"{len(names)} labels"
                )
            object.__setattr__(self, "id2label", dict(names))
            object.__setattr__(self, "num_labels", len(names))
        elif self.num_labels is None:
            object.__setattr__(self, "num_labels", 2)
        elif (
            self.num_labels != 2
            and isinstance(self.num_labels, int)
            and 0 < self.num_labels < 2**24
        ):
            object.__setattr__(self, "id2label", {i: f"LABEL_{i}" for i in range(self.num_labels)})

    def _check_values(self) -> None:
        for name in _AT_LEAST_ONE:
            if not 1 <= getattr(self, name) <= _LARGEST:
                raise ConfigError(f"{name}={getattr(self, name)} must lie between 1 and {_LARGEST}")
        if not 0 <= self.num_hidden_layers <= 1000:
            raise ConfigError(
                f"num_hidden_layers={self.num_hidden_layers} must lie between 0 and 1000"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("layer_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)} must be a positive number")
        for name, choices in (("hidden_act", ACTIVATIONS), ("attn_implementation", ATTENTIONS)):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}"
                )
        if not self.tie_word_embeddings:
            raise ConfigError(
                "tie_word_embeddings=False is not VisualBERT: the decoder of its language-model head "
                "is the word table; set it to true"
            )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ConfigError: the file is missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > 64 * 2**20:
            raise ConfigError(f"{path}: a JSON file of more than 64 MiB is not a configuration")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; a checkpoint folder needs a {path.name}"
        ) from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _integer_keys(labels: Mapping[Any, Any]) -> dict[int, Any]:
    try:
        return {int(key): value for key, value in labels.items()}
    except (TypeError, ValueError):
        raise ConfigError("id2label must map label numbers to names") from None
