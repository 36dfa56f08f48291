"""VisualBERT in Flax (NNX)."""

import json

import jax
import jax.export

from visualbert.flax.modeling import (
    FlaxVisualBertForMultipleChoice,
    FlaxVisualBertForPreTraining,
    FlaxVisualBertForQuestionAnswering,
    FlaxVisualBertForRegionToPhraseAlignment,
    FlaxVisualBertForVisualReasoning,
    FlaxVisualBertModel,
)
from visualbert.outputs import ModelOutput, flatten, unflatten

__all__ = [
    "FlaxVisualBertForMultipleChoice",
    "FlaxVisualBertForPreTraining",
    "FlaxVisualBertForQuestionAnswering",
    "FlaxVisualBertForRegionToPhraseAlignment",
    "FlaxVisualBertForVisualReasoning",
    "FlaxVisualBertModel",
]

jax.tree_util.register_pytree_with_keys(
    ModelOutput,
    lambda output: (
        [(jax.tree_util.DictKey(key), value) for key, value in output.items()],
        tuple(output),
    ),
    unflatten,
    flatten,
)
jax.export.register_pytree_node_serialization(
    ModelOutput,
    serialized_name="visualbert.ModelOutput",
    serialize_auxdata=lambda keys: json.dumps(keys).encode(),
    deserialize_auxdata=lambda keys: tuple(json.loads(keys)),
)
