"""Flax (NNX) as a backend: five leaves, and how its arrays go in and out."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from visualbert.backend import Leaf, flatten_outputs
from visualbert.config import VisualBertConfig
from visualbert.flax import modeling
from visualbert.flax.predictor import Predictor, precision
from visualbert.schema import ARCHITECTURES, Kind


class FlaxBackend:
    """See `visualbert.backend.Backend`."""

    name = "flax"
    leaves: Mapping[Kind, Leaf] = {
        Kind.EMBEDDING: Leaf("embedding"),
        Kind.LINEAR: Leaf("kernel", transposed=True),
        Kind.BIAS: Leaf("bias"),
        Kind.SCALE: Leaf("scale"),
        Kind.SHIFT: Leaf("bias"),
    }
    models: Mapping[str, type] = {name: getattr(modeling, "Flax" + name) for name in ARCHITECTURES}

    def create(
        self, architecture: str | type, config: VisualBertConfig, dtype: str = "float32"
    ) -> Any:
        cls = self.models[architecture] if isinstance(architecture, str) else architecture
        with precision(dtype):
            model = cls(config, seed=None, param_dtype=jnp.dtype(dtype))
        model.eval()
        return model

    def variables(self, model: Any) -> dict[str, nnx.Param]:
        return {
            ".".join(map(str, path)): node
            for path, node in nnx.iter_graph(model)
            if isinstance(node, nnx.Param)
        }

    def shape(self, variable: nnx.Param) -> tuple[int, ...]:
        return tuple(variable.get_value().shape)

    def pull(self, variable: nnx.Param) -> np.ndarray:
        return np.asarray(variable.get_value())

    def push(self, variable: nnx.Param, array: np.ndarray) -> None:
        dtype = variable.get_value().dtype
        with precision(dtype):
            made = jax.device_put(np.asarray(array, dtype), may_alias=True)
            variable.set_value(made)

    def call(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        with precision(model.dtype):
            output = model(**inputs)
        return {name: np.asarray(value) for name, value in flatten_outputs(output)}

    def predictor(
        self, model: Any, **options: Any
    ) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
        return Predictor(model, **options)

    def gradients(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        with precision(model.dtype):
            found = nnx.grad(lambda m: m(**inputs).loss)(model)
        return {
            ".".join(map(str, path)): np.asarray(value.get_value())
            for path, value in nnx.to_flat_state(found)
        }


backend = FlaxBackend()
