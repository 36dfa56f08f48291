"""VisualBERT in PyTorch."""

from types import SimpleNamespace
from typing import Any

from torch.utils import _pytree

from visualbert.config import VisualBertConfig
from visualbert.outputs import ModelOutput, flatten, unflatten
from visualbert.pt.modeling import (
    VisualBertForMultipleChoice,
    VisualBertForPreTraining,
    VisualBertForQuestionAnswering,
    VisualBertForRegionToPhraseAlignment,
    VisualBertForVisualReasoning,
    VisualBertModel,
)

__all__ = [
    "VisualBertForMultipleChoice",
    "VisualBertForPreTraining",
    "VisualBertForQuestionAnswering",
    "VisualBertForRegionToPhraseAlignment",
    "VisualBertForVisualReasoning",
    "VisualBertModel",
]

_pytree.register_pytree_node(
    ModelOutput,
    flatten,
    lambda children, keys: unflatten(keys, children),
    serialized_type_name="visualbert.ModelOutput",
    flatten_with_keys_fn=lambda output: (
        [(_pytree.MappingKey(key), value) for key, value in output.items()],
        tuple(output),
    ),
)


_refuse = VisualBertConfig.__setattr__


def _assign(config: VisualBertConfig, name: str, value: Any) -> None:
    """transformers' `Trainer` assigns `use_cache` to the config of every model; nothing reads it."""
    if name != "use_cache":
        _refuse(config, name, value)


def _special_tokens(config: VisualBertConfig) -> SimpleNamespace:
    """What `Trainer` overwrites with its tokenizer's ids: a copy, as no model reads them."""
    ids = ("eos_token_id", "bos_token_id", "pad_token_id")
    return SimpleNamespace(**{name: getattr(config, name) for name in ids})


VisualBertConfig.__setattr__ = _assign  # type: ignore[method-assign, assignment]
VisualBertConfig.get_text_config = _special_tokens  # type: ignore[attr-defined]
