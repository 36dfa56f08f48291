"""VisualBERT in TensorFlow (Keras 3)."""

import keras
import optree

from visualbert.errors import MissingBackendError
from visualbert.outputs import ModelOutput, flatten, unflatten

if keras.backend.backend() != "tensorflow":
    raise MissingBackendError(
        f"visualbert.tf runs on Keras's tensorflow backend, but KERAS_BACKEND is "
        f"{keras.backend.backend()!r}; set it to tensorflow before Keras is imported"
    )

from visualbert.tf.modeling import (
    TFVisualBertForMultipleChoice,
    TFVisualBertForPreTraining,
    TFVisualBertForQuestionAnswering,
    TFVisualBertForRegionToPhraseAlignment,
    TFVisualBertForVisualReasoning,
    TFVisualBertModel,
)

__all__ = [
    "TFVisualBertForMultipleChoice",
    "TFVisualBertForPreTraining",
    "TFVisualBertForQuestionAnswering",
    "TFVisualBertForRegionToPhraseAlignment",
    "TFVisualBertForVisualReasoning",
    "TFVisualBertModel",
]

optree.register_pytree_node(
    ModelOutput,
    lambda output: (*flatten(output), tuple(output)),  # type: ignore[arg-type]
    unflatten,  # type: ignore[arg-type]
    namespace="keras",
)
