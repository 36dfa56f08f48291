"""PyTorch as a backend: five leaves, and how its arrays go in and out."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from visualbert.backend import Leaf, flatten_outputs
from visualbert.config import VisualBertConfig
from visualbert.pt import modeling
from visualbert.pt.convert import from_numpy, to_numpy
from visualbert.pt.predictor import Predictor
from visualbert.pt.quantized import quantize
from visualbert.schema import ARCHITECTURES, Kind


class TorchBackend:
    """See `visualbert.backend.Backend`."""

    name = "pt"
    leaves: Mapping[Kind, Leaf] = {
        Kind.EMBEDDING: Leaf("weight"),
        Kind.LINEAR: Leaf("weight"),
        Kind.BIAS: Leaf("bias"),
        Kind.SCALE: Leaf("weight"),
        Kind.SHIFT: Leaf("bias"),
    }
    models: Mapping[str, type] = {name: getattr(modeling, name) for name in ARCHITECTURES}

    def create(
        self, architecture: str | type, config: VisualBertConfig, dtype: str = "float32"
    ) -> Any:
        cls = self.models[architecture] if isinstance(architecture, str) else architecture
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            return cls(config, seed=None).eval()
        finally:
            torch.set_default_dtype(before)

    def variables(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        return dict(model.named_parameters())

    def shape(self, variable: torch.Tensor) -> tuple[int, ...]:
        return tuple(variable.shape)

    def pull(self, variable: torch.Tensor) -> np.ndarray:
        return to_numpy(variable)

    def push(self, variable: torch.Tensor, array: np.ndarray) -> None:
        tensor = from_numpy(array).to(device=variable.device, dtype=variable.dtype)
        variable.data = tensor.contiguous()  # takes the array's memory over where it can

    def call(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            output = model(**inputs)
        return {name: to_numpy(value) for name, value in flatten_outputs(output)}

    def predictor(
        self, model: torch.nn.Module, **options: Any
    ) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
        return Predictor(model, **options)

    def _quantize(self, model: torch.nn.Module) -> torch.nn.Module:
        return quantize(model)

    def gradients(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        variables = self.variables(model)
        loss = model(**inputs).loss
        found = torch.autograd.grad(loss, list(variables.values()), allow_unused=True)
        return {
            name: to_numpy(variable.new_zeros(variable.shape) if gradient is None else gradient)
            for (name, variable), gradient in zip(variables.items(), found, strict=True)
        }


backend = TorchBackend()
