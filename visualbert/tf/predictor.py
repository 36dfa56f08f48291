"""Calling a TensorFlow model many times: one trace for the first sizes and one for all others, on
rows of real tokens.

The function reads the model's variables, so that a predictor follows the model's weights.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from visualbert.backend import flatten_outputs
from visualbert.inputs.contract import check_batch
from visualbert.packing import plan_batch
from visualbert.tf.modeling import choose


class Predictor:
    """See `visualbert.backend.Backend.predictor`."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.architecture, self.config = model.architecture, model.config
        attentions = choose(options.get("output_attentions"), model.config.output_attentions)
        self.packs = model.config.packing != "never" and not attentions

        def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
            return dict(flatten_outputs(model(**inputs, **options)))

        self.run = tf.function(run)
        self.first: dict[Any, Any] = {}  # sizes, by what else there is to know of a batch
        self.traces: dict[Any, Any] = {}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        batch = check_batch(self.config, self.architecture, inputs)
        if self.packs:
            batch = plan_batch(batch, late_fusion=self.config.bypass_transformer, step=1)
        tensors = {name: as_tensors(x) for name, x in batch.items()}
        return {name: value.numpy() for name, value in self.trace(tensors)(tensors).items()}

    def trace(self, tensors: Mapping[str, Any]) -> Any:
        """The function for a batch, with its sizes if it is the first one of its kind."""
        free = tf.nest.map_structure(any_size, tensors)
        kind = *tensors, *tf.nest.flatten(free)
        sizes = tuple(None if x is None else x.shape for x in tf.nest.flatten(tensors))
        exact = self.first.setdefault(kind, sizes) == sizes
        if (kind, exact) not in self.traces:
            specs = tf.nest.map_structure(same_size, tensors) if exact else free
            self.traces[kind, exact] = self.run.get_concrete_function(specs)
        return self.traces[kind, exact]

    @property
    def compilations(self) -> int:
        """How many traces there are."""
        return len(self.traces)


def as_tensors(x: Any) -> Any:
    """An array, or a packing's arrays, as tensors."""
    return tf.nest.map_structure(lambda part: None if part is None else tf.constant(part), x)


def same_size(x: Any) -> Any:
    """What a tensor is."""
    return None if x is None else tf.TensorSpec(x.shape, x.dtype)


def any_size(x: Any) -> Any:
    """What a tensor is, with axes of any length but the last one of features and answers."""
    if x is None:
        return None
    last = x.shape[-1:] if x.dtype.is_floating else [None] * min(x.shape.rank, 1)
    return tf.TensorSpec([None] * (x.shape.rank - len(last)) + list(last), x.dtype)
