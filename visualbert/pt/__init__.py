"""VisualBERT in PyTorch."""

from torch.serialization import add_safe_globals
from torch.utils import _pytree

from visualbert.outputs import ModelOutput, flatten, unflatten
from visualbert.packing import Packing
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
_pytree._register_namedtuple(Packing, serialized_type_name="visualbert.Packing")
add_safe_globals([Packing])  # an exported program's file holds the inputs it was made with
