"""Calling a Flax model many times: one compiled function for few shapes, query, key and value in
one product.

The model itself is not changed. A predictor keeps the weights of the moment it was made.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from visualbert.backend import flatten_outputs
from visualbert.buckets import Buckets
from visualbert.flax.modeling import Linear, SelfAttention, choose, module_options
from visualbert.inputs.contract import check_batch


class Predictor:
    """See `visualbert.backend.Backend.predictor`."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.architecture, self.config, self.dtype = model.architecture, model.config, model.dtype
        attentions = choose(options.get("output_attentions"), model.config.output_attentions)
        self.buckets = Buckets(model.architecture, model.config, packs=not attentions)
        with precision(self.dtype):
            structure, shared = nnx.split(joined(model))
        self.state = jax.tree.map(lambda x: x, shared)  # variables of its own

        def run(state: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
            return dict(flatten_outputs(nnx.merge(structure, state)(**inputs, **options)))

        self.run = jax.jit(run)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        fitted = self.buckets.fit(check_batch(self.config, self.architecture, inputs))
        with precision(self.dtype):
            found = self.run(self.state, jax.tree.map(jnp.asarray, fitted.inputs))
        return self.buckets.cut({name: np.asarray(x) for name, x in found.items()}, fitted)

    @property
    def compilations(self) -> int:
        """How many shapes were compiled for."""
        return self.run._cache_size()  # type: ignore[attr-defined]


def joined(model: Any) -> Any:
    """A twin of `model` that shares its arrays and makes query, key and value in one product."""
    twin = nnx.merge(*nnx.split(model))
    twin.eval()
    for attention in [x for _, x in nnx.iter_graph(twin) if isinstance(x, SelfAttention)]:
        parts: Any = attention.query, attention.key, attention.value
        kernel = jnp.concatenate([part.kernel.get_value() for part in parts], axis=1)
        options = module_options(dtype=parts[0].dtype, param_dtype=kernel.dtype)
        joint: Any = Linear(kernel.shape[0], kernel.shape[1], **options)
        joint.kernel.set_value(kernel)
        joint.bias.set_value(jnp.concatenate([part.bias.get_value() for part in parts]))
        attention.joint = nnx.data(joint)
    return twin


def precision(dtype: Any) -> contextlib.AbstractContextManager:
    """64-bit arithmetic for a float64 model, whatever the process is set to."""
    wide = jnp.dtype(dtype) == np.float64
    return jax.enable_x64(True) if wide else contextlib.nullcontext()
