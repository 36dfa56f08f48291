"""TensorFlow (Keras 3) as a backend: five leaves, and how its arrays go in and out."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from visualbert.backend import Leaf, flatten_outputs
from visualbert.config import VisualBertConfig
from visualbert.schema import ARCHITECTURES, Kind
from visualbert.tf import modeling
from visualbert.tf.predictor import Predictor

_ALIGNMENT = 64  # bytes; an operation on anything less aligned ends the process


class TensorFlowBackend:
    """See `visualbert.backend.Backend`."""

    name = "tf"
    leaves: Mapping[Kind, Leaf] = {
        Kind.EMBEDDING: Leaf("embeddings"),
        Kind.LINEAR: Leaf("kernel", transposed=True),
        Kind.BIAS: Leaf("bias"),
        Kind.SCALE: Leaf("gamma"),
        Kind.SHIFT: Leaf("beta"),
    }
    models: Mapping[str, type] = {name: getattr(modeling, "TF" + name) for name in ARCHITECTURES}

    def create(
        self, architecture: str | type, config: VisualBertConfig, dtype: str = "float32"
    ) -> Any:
        cls = self.models[architecture] if isinstance(architecture, str) else architecture
        model = cls(config, seed=None, dtype=dtype)
        model.build()
        return model

    def variables(self, model: keras.Model) -> dict[str, keras.Variable]:
        # A path starts with the model's own name.
        return {v.path.partition("/")[2].replace("/", "."): v for v in model.weights}

    def shape(self, variable: keras.Variable) -> tuple[int, ...]:
        return tuple(variable.shape)

    def pull(self, variable: keras.Variable) -> np.ndarray:
        return variable.numpy()

    def push(self, variable: keras.Variable, array: np.ndarray) -> None:
        variable.assign(_in_place(array))

    def call(self, model: keras.Model, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in flatten_outputs(model(**inputs))}

    def predictor(
        self, model: keras.Model, **options: Any
    ) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
        return Predictor(model, **options)

    def gradients(self, model: keras.Model, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        variables = self.variables(model)
        with tf.GradientTape() as tape:
            loss = model(**inputs).loss
        found = tape.gradient(
            loss, [v.value for v in variables.values()], unconnected_gradients="zero"
        )
        return {
            name: tf.convert_to_tensor(gradient).numpy()
            for name, gradient in zip(variables, found, strict=True)
        }


def _in_place(array: np.ndarray) -> tf.Tensor:
    """A tensor over the memory of `array` where TensorFlow can compute on it, else over a copy."""
    flags = array.flags
    aligned = flags.c_contiguous and flags.writeable and array.ctypes.data % _ALIGNMENT == 0
    if not aligned or not array.size or array.dtype.kind != "f":  # bfloat16 is of no kind
        return tf.convert_to_tensor(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


backend = TensorFlowBackend()
