"""A VisualBERT that starts from a BERT, as the paper's models did (section 3.3).

Text tables, encoder, pooler and, where there is one, the language-model head are the BERT's; the
visual segment and position tables are copies of the text tables; the visual projection and whatever
the BERT lacks are drawn anew, in the BERT's type. `derived` and `fresh` list what did not come out
of the file.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from visualbert.checkpoint.initial import InitialValues
from visualbert.checkpoint.match import _rename
from visualbert.checkpoint.tensors import Spec, Tensors, cast, common_dtype
from visualbert.config import VisualBertConfig
from visualbert.errors import CheckpointError, ConfigError
from visualbert.schema import COPIED, DIMENSIONS, IGNORED, PREFIX, TIED, parameters

_BERT_PREFIX = "bert."
_NEEDED = ("embeddings.", "encoder.layer.")  # BERTs without a pooler or a head are BERTs
_VISUAL = "embeddings.visual_"
_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)

_ASSUMED = {  # what a BERT does not say, and the option that does
    "num_attention_heads": "--set num_attention_heads=N",
    "visual_embedding_dim": "--visual-embedding-dim F",
    "num_labels": "--set num_labels=N",
}


def config_from_bert(values: dict[str, Any], **changes: Any) -> VisualBertConfig:
    """The VisualBERT config of the same size as the BERT whose config.json holds `values`.

    Raises:
        ConfigError: this BERT is built differently (relative positions, a decoder,
            cross-attention).
    """
    unlike = [
        f"{key}={values[key]!r}"
        for key, plain in (
            ("position_embedding_type", "absolute"),
            ("is_decoder", False),
            ("add_cross_attention", False),
        )
        if values.get(key, plain) != plain
    ]
    if unlike:
        raise ConfigError(f"VisualBERT cannot start from a BERT with {', '.join(unlike)}")
    shared = {key: values[key] for key in _SHARED_FIELDS if key in values}
    return VisualBertConfig.from_dict(shared, **changes)


def assumed_fields(
    architecture: str, config: VisualBertConfig, values: Collection[str], changes: Collection[str]
) -> tuple[str, ...]:
    """A line for each size of `architecture` that neither a BERT's `values` nor `changes` say."""
    used = {DIMENSIONS.get(s) for p in parameters(architecture, config) for s in p.symbols.split()}
    used.add("num_attention_heads")
    said = {*(name for name in _SHARED_FIELDS if name in values), *changes}
    if "id2label" in said:
        said.add("num_labels")
    return tuple(
        f"{name}={getattr(config, name)} (if not, {option})"
        for name, option in _ASSUMED.items()
        if name in used and name not in said
    )


class WarmStart:
    """`Tensors` of `architecture` under `config`, taken from the `bert` tensors or derived from
    them.
    """

    def __init__(
        self, bert: Tensors, architecture: str, config: VisualBertConfig, seed: int = 0
    ) -> None:
        self.label = bert.label
        self._bert = bert
        self._initial = InitialValues(architecture, config, seed)
        self._dtype = common_dtype(bert)
        found = {_rename(name).removeprefix(_BERT_PREFIX): name for name in bert.specs}
        if len(found) < len(bert.specs):
            raise CheckpointError(f"{bert.label!r} holds a tensor under two of its names")
        names = [p.name for p in parameters(architecture, config)]
        short = {name: name.removeprefix(PREFIX) for name in names}
        self._taken = {name: found[s] for name, s in short.items() if s in found}
        self._copied = {
            name: found[COPIED[s]]
            for name, s in short.items()
            if config.special_visual_initialize and COPIED.get(s) in found
        }
        self._taken |= {
            repeated: found[repeated]
            for repeated, original in TIED.items()
            if repeated in found and original in self._taken
        }
        self.derived = tuple(self._copied)
        self.fresh = tuple(n for n in names if n not in self._taken and n not in self._copied)
        used = {*self._taken.values(), *self._copied.values()}
        ignorable = {name for s, name in found.items() if s in IGNORED or s.startswith("cls.")}
        self.ignored = tuple(sorted(set(bert.specs) - used))
        missing = [
            short[name]
            for name in self.fresh
            if short[name].startswith(_NEEDED) and not short[name].startswith(_VISUAL)
        ]
        if missing:
            raise CheckpointError(
                f"{bert.label!r} is not a BERT of {config.num_hidden_layers} layers: it lacks "
                f"{missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            )
        unknown = sorted(set(self.ignored) - ignorable)
        if unknown:
            raise CheckpointError(
                f"{bert.label!r} holds tensors that no BERT has: {', '.join(unknown[:3])}"
                + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            )

    @property
    def specs(self) -> dict[str, Spec]:
        specs = {n: Spec(spec.shape, self._dtype) for n, spec in self._initial.specs.items()}
        for name, source in {**self._taken, **self._copied}.items():
            specs[name] = self._bert.specs[source]
        return specs

    def read(self, name: str) -> np.ndarray:
        source = self._taken.get(name) or self._copied.get(name)
        return self._bert.read(source) if source else cast(self._initial.read(name), self._dtype)

    def verify_checksum(self) -> bool:
        """As that of the BERT's file, where it has one."""
        check = getattr(self._bert, "verify_checksum", None)
        return check is not None and check()
