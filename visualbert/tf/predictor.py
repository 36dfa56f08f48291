"""Calling a TensorFlow model many times: one traced function for all shapes, on rows of real
tokens.

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

        self.run = tf.function(run, reduce_retracing=True)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        batch = check_batch(self.config, self.architecture, inputs)
        if self.packs:
            batch = plan_batch(batch, late_fusion=self.config.bypass_transformer, step=1)
        found = self.run({name: as_tensors(x) for name, x in batch.items()})
        return {name: value.numpy() for name, value in found.items()}

    @property
    def compilations(self) -> int:
        """How many traces there are."""
        return self.run.experimental_get_tracing_count()


def as_tensors(x: Any) -> Any:
    """An array, or a packing's arrays, as tensors."""
    return tf.nest.map_structure(lambda part: None if part is None else tf.constant(part), x)
