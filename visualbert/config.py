"""VisualBertConfig: one description of a model for every framework.

Field names, defaults and order are those of transformers' `VisualBertConfig`, with two exceptions:
`pad_token_id` is 0, BERT's, when a file does not say otherwise, and transformers does not know
`classifier_head`, which is written only where it is not the default. `from_dict` keeps the keys it
does not know, so a config.json written by transformers comes back with nothing lost.
"""

import dataclasses
import json
import os
import re
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from visualbert.errors import ConfigError, did_you_mean
from visualbert.keywords import check_source, without_habits

CONFIG_FILE = "config.json"
MODEL_TYPE = "visual_bert"
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")
ATTENTIONS = ("sdpa", "eager", "flash")
PACKINGS = ("inference", "always", "never")
CLASSIFIER_HEADS = ("linear", "mlp")

_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "visual_embedding_dim",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_LARGEST = 2**31 - 1
_MOST_LABELS = 2**20
_MOST_VALUES = 2**22
_LABELS = ("num_labels", "id2label", "label2id")  # what goes when the labels change
_CHOICES = {
    "hidden_act": ACTIVATIONS,
    "attn_implementation": ATTENTIONS,
    "packing": PACKINGS,
    "classifier_head": CLASSIFIER_HEADS,
}
# What a process does, not what a model is: never read from a file or written to one.
SETTINGS = ("attn_implementation", "packing", "sparse_prediction")
_ALIASES = {"flash_attention_2": "flash", "flash_attention_3": "flash"}  # transformers' names
# Written only where they are not the default: transformers leaves them out, or does not know them.
_UNWRITTEN = {
    "output_attentions": False,
    "output_hidden_states": False,
    "classifier_head": "linear",
}
# The way out for checkpoints of other models.
_OTHER_MODELS = {
    "bert": "; a VisualBERT starts from a BERT with from_bert (on the command line, convert "
    "--architecture CLASS)"
}
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
_JSON_WORDS = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


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
        hidden_act: activation of the feed-forward layer, of the language-model head and of the
            "mlp" classifier, one of `visualbert.config.ACTIVATIONS`; "gelu" is the exact form with
            erf.
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
        classifier_head: the head of `VisualBertForQuestionAnswering` and
            `VisualBertForVisualReasoning`: "linear", the original's, or "mlp", MMF's, with a dense
            layer, `hidden_act` and LayerNorm before the linear one (mmf/models/visual_bert.py). A
            body ignores it.
        num_labels: size of the classification head; taken from `id2label` when that is given.
        id2label: names of the labels, by index.
        architectures: class names that wrote the checkpoint, as transformers records them.
        output_attentions, output_hidden_states: what a call returns when it does not say.
        attn_implementation: "sdpa" (the framework's fused attention where it has one), "eager", or
            "flash", variable-length flash attention on a GPU, refused elsewhere; transformers'
            "flash_attention_2" is understood. A setting of this process, as the next two: never
            written to a config.json.
        packing: when a batch is computed without its padding: in "inference", "always", in training
            too, or "never" (`visualbert.packing`).
        sparse_prediction: with labels, `VisualBertForPreTraining` predicts words where there is a
            label alone and returns the loss without `prediction_logits`.
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
    classifier_head: str = "linear"
    num_labels: int = None  # type: ignore[assignment]  # settled in __post_init__
    id2label: Mapping[int, str] | None = field(default=None, hash=False, repr=False)
    architectures: tuple[str, ...] | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    attn_implementation: str = "sdpa"
    packing: str = "inference"
    sparse_prediction: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)

    def __post_init__(self) -> None:
        name = self.attn_implementation
        if isinstance(name, str) and name in _ALIASES:
            object.__setattr__(self, "attn_implementation", _ALIASES[name])
        self._check_types()
        self._check_collections()
        self._settle_labels()
        self._check_values()

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **changes: Any) -> "VisualBertConfig":
        """The config that `values` (a parsed config.json) describes, with `changes` on top.

        Raises:
            ConfigError: as the class, or a change that is no field.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"expected a mapping of fields, got {reprlib.repr(values)}")
        known = _field_names() - {"extra", *SETTINGS}
        _refuse_unknown(changes, known | {*SETTINGS})
        labels = values.get("id2label")
        count = len(labels) if isinstance(labels, Mapping) else values.get("num_labels")
        stale = _LABELS if _relabels(changes, count) else ()
        fields = {key: x for key, x in values.items() if key in known and key not in stale}
        extra = {key: x for key, x in values.items() if key not in known and key not in stale}
        return cls(**{**fields, **changes}, extra=extra)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, revision: str | None = None, **changes: Any
    ) -> "VisualBertConfig":
        """Read a config.json, with `changes` on top.

        Args:
            source: a folder that holds one, the file itself, or a Hub id such as
                "uclanlp/visualbert-vqa", of which nothing else is fetched.
            revision: branch, tag or commit on the Hub.
            **changes: fields to change.

        Raises:
            HubError: the Hub id cannot be reached.
            ConfigError: the file is missing, is not a JSON object, or describes another model.
        """
        check_source("from_pretrained", source)
        changes = without_habits("from_pretrained", changes)
        path = _config_file(source, revision)
        values = read_json_object(path)
        found = values.get("model_type", MODEL_TYPE)
        if found != MODEL_TYPE:
            way = _OTHER_MODELS.get(found if isinstance(found, str) else "", "")
            raise ConfigError(f"{path}: model_type is {found!r}, expected {MODEL_TYPE!r}{way}")
        try:
            return cls.from_dict(values, **changes)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """What belongs into a config.json, in plain JSON types."""
        values: dict[str, Any] = {"model_type": MODEL_TYPE}
        for f in dataclasses.fields(self):
            if f.name not in ("extra", "id2label", "num_labels", *SETTINGS):
                values[f.name] = getattr(self, f.name)
        if self.architectures is None:
            del values["architectures"]
        else:
            values["architectures"] = list(self.architectures)
        for name, default in _UNWRITTEN.items():
            if values[name] == default:
                del values[name]
        if self.id2label is not None:
            values["id2label"] = {str(index): name for index, name in self.id2label.items()}
            values["label2id"] = _inverse(self.id2label)
        return {**values, **self.extra}

    def to_json_string(self) -> str:
        """`to_dict` as JSON text with sorted keys, as transformers writes it.

        Raises:
            ConfigError: `extra` holds what JSON cannot.
        """
        try:
            return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"the configuration cannot be written as JSON: {error}") from None

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `folder`/config.json, atomically."""
        from visualbert.checkpoint.write import replace_files

        text = self.to_json_string()
        replace_files(folder, {CONFIG_FILE: lambda path: path.write_text(text, encoding="utf-8")})

    def replace(self, **changes: Any) -> "VisualBertConfig":
        """A copy with some fields changed; the labels' names go where their number changes.

        Raises:
            ConfigError: as the class, or a change that is no field.
        """
        _refuse_unknown(changes, _field_names())
        if _relabels(changes, self.num_labels):
            extra = {key: value for key, value in self.extra.items() if key not in _LABELS}
            changes = {"num_labels": None, "id2label": None, "extra": extra, **changes}
        return dataclasses.replace(self, **changes)

    def get_text_config(self) -> SimpleNamespace:
        """Special tokens for transformers' `Trainer`, which overwrites them with its tokenizer's: a
        copy, as no model reads them.
        """
        ids = ("eos_token_id", "bos_token_id", "pad_token_id")
        return SimpleNamespace(**{name: getattr(self, name) for name in ids})

    def _check_types(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            kinds = [kind for kind in (int, float, bool, str) if f.type in (kind, kind | None)]
            optional = f.default is None or f.type not in (int, float, bool, str)
            if not kinds or (value is None and optional):
                continue
            kind = kinds[0]
            fits = isinstance(value, (int, float) if kind is float else kind)
            if not fits or (isinstance(value, bool) and kind is not bool):
                raise ConfigError(f"{f.name} must be {_WORDS[kind]}, got {reprlib.repr(value)}")
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ConfigError(f"{f.name} must be {_WORDS[kind]} of at most 64 bits")

    def _check_collections(self) -> None:
        names = self.architectures
        if names is not None:
            if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
                raise ConfigError(
                    f"architectures must be a list of class names, got {reprlib.repr(names)}"
                )
            object.__setattr__(self, "architectures", tuple(names))
        if not isinstance(self.extra, Mapping):
            raise ConfigError(f"extra must be a mapping, got {reprlib.repr(self.extra)}")
        twice = sorted(self.extra.keys() & (_field_names() - {"extra", *SETTINGS}))
        if twice:
            raise ConfigError(f"extra holds {twice[0]!r}, which is a field of its own")

    def _settle_labels(self) -> None:
        names = None if self.id2label is None else _label_names(self.id2label)
        count = self.num_labels
        if count is None:
            count = 2 if names is None else len(names)
        if not 1 <= count <= _MOST_LABELS:
            raise ConfigError(f"num_labels={count} must lie between 1 and {_MOST_LABELS}")
        if names is None and count != 2:
            names = {i: f"LABEL_{i}" for i in range(count)}
        if names is not None and len(names) != count:
            raise ConfigError(
                f"num_labels={count} contradicts id2label, which names {len(names)} "
                f"label{'s' * (len(names) != 1)}; give one of the two"
            )
        derived = {"model_type": MODEL_TYPE, "label2id": _inverse(names)}
        extra = {k: v for k, v in self.extra.items() if k not in derived or v != derived[k]}
        object.__setattr__(self, "id2label", names)
        object.__setattr__(self, "num_labels", count)
        object.__setattr__(self, "extra", extra)

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
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}"
                )
        if not self.tie_word_embeddings:
            raise ConfigError(
                "tie_word_embeddings=False is not VisualBERT, whose language-model head decodes "
                "with the word table; set it to true"
            )


_refuse = VisualBertConfig.__setattr__


def _assign(config: VisualBertConfig, name: str, value: Any) -> None:
    """transformers' `Trainer` sets `use_cache` on the config of every model; nothing reads it."""
    if name == "use_cache":
        return
    try:
        _refuse(config, name, value)
    except dataclasses.FrozenInstanceError:
        shown = f"{name}={reprlib.repr(value)}" if name in _field_names() else "…"
        raise dataclasses.FrozenInstanceError(
            f"{name!r} cannot be assigned, as a VisualBertConfig never changes; make a copy: "
            f"config = config.replace({shown})"
        ) from None


VisualBertConfig.__setattr__ = _assign  # type: ignore[method-assign, assignment]


def checked(config: Any) -> VisualBertConfig:
    """`config`, if it is a VisualBertConfig.

    Raises:
        ConfigError: it is not, with the way to make one of it.
    """
    if isinstance(config, VisualBertConfig):
        return config
    kind = type(config)
    if isinstance(config, Mapping):
        way = "; convert it: VisualBertConfig.from_dict(config)"
    elif hasattr(config, "to_dict"):
        way = "; convert it: VisualBertConfig.from_dict(config.to_dict())"
    elif isinstance(config, (str, os.PathLike)):
        way = "; read it: VisualBertConfig.from_pretrained(config)"
    else:
        way = ""
    package = kind.__module__.partition(".")[0]
    name = kind.__name__ if package == "builtins" else f"{package}.{kind.__name__}"
    raise ConfigError(f"config is of type {name}, expected visualbert.VisualBertConfig{way}")


def _config_file(source: str | os.PathLike, revision: str | None) -> Path:
    """The config.json that `source` names; from the Hub where it is the id of a repository."""
    path, name = Path(source), os.fspath(source)
    if os.path.isdir(path):
        return path / CONFIG_FILE
    local = os.path.lexists(path) or path.is_absolute() or name.startswith((".", "~"))
    if local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or path.suffix == ".json":
        return path
    from visualbert.hub import fetch

    try:
        found = fetch(name, revision, [CONFIG_FILE], "folder") / CONFIG_FILE
    except ValueError:
        return path
    if not found.is_file():
        raise ConfigError(f"{name}: the repository holds no {CONFIG_FILE}")
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ConfigError: the file is missing, too large, or not a JSON object.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path}: not a file, so there is no JSON to read")
        if found.st_size > 64 * 2**20:
            raise ConfigError(f"{path}: a JSON file of more than 64 MiB is not a configuration")
        text = path.read_text(encoding="utf-8")
        if sum(map(text.count, ",[{")) > _MOST_VALUES:
            raise ConfigError(f"{path}: holds more values than any configuration has")
        values = json.loads(text, object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a checkpoint folder needs one") from None
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {_JSON_WORDS[type(values)]}")
    return values


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{reprlib.repr(twice)} occurs twice")
    return found


def _field_names() -> set[str]:
    return {f.name for f in dataclasses.fields(VisualBertConfig)}


def _refuse_unknown(changes: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(changes) - known)
    if not unknown:
        return
    raise ConfigError(
        f"VisualBertConfig has no field {', '.join(map(repr, unknown))}"
        + did_you_mean(unknown[0], known)
    )


def _relabels(changes: Mapping[str, Any], count: Any) -> bool:
    """Whether `changes` leave the names of `count` labels without a meaning."""
    return "id2label" in changes or changes.get("num_labels", count) != count


def _inverse(names: Mapping[int, str] | None) -> dict[str, int] | None:
    return None if names is None else {name: index for index, name in names.items()}


def _label_names(labels: Any) -> dict[int, str]:
    """`id2label` with integer keys, in order; JSON has them as text."""
    if not isinstance(labels, Mapping) or not all(isinstance(n, str) for n in labels.values()):
        raise ConfigError(f"id2label must map label numbers to names, got {reprlib.repr(labels)}")
    names = {str(number): name for number, name in labels.items()}
    if set(names) != {str(i) for i in range(len(labels))}:
        raise ConfigError(
            "id2label must name every label from 0 up, each once and without a gap, got the "
            f"numbers {reprlib.repr(list(labels))}"
        )
    return {i: names[str(i)] for i in range(len(names))}
