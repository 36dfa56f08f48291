"""transformers' own VisualBERT under the backend protocol, to be compared with and nothing else.

It is loaded by transformers itself. Inputs are bent to what its forward methods can take; what they
cannot run raises `NotComparable` with the reason.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from visualbert.backend import flatten_outputs
from visualbert.config import VisualBertConfig
from visualbert.inputs.contract import INPUTS, is_floating
from visualbert.pt.backend import TorchBackend
from visualbert.pt.convert import to_numpy
from visualbert.schema import ARCHITECTURES, BODY


class NotComparable(Exception):
    """transformers cannot run this, or means something else by it."""


class TransformersBackend(TorchBackend):
    """See `visualbert.backend.Backend`; parameters already carry the canonical names."""

    name = "transformers"
    models: Mapping[str, type] = {name: getattr(transformers, name) for name in ARCHITECTURES}

    def create(
        self, architecture: str | type, config: VisualBertConfig, dtype: str = "float32"
    ) -> Any:
        cls = self.models[architecture] if isinstance(architecture, str) else architecture
        values = {**config.to_dict(), "architectures": None}
        theirs = transformers.VisualBertConfig.from_dict(values)
        return cls(theirs).to(getattr(torch, dtype)).eval()

    def load(self, folder: Path, architecture: str, dtype: str) -> Any:
        """The model as transformers reads it from `folder`."""
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        cls: Any = self.models[architecture]
        return cls.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def call(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        adapted = adapt(type(model).__name__, model.config, inputs)
        labels = {name: adapted.pop(name) for name in list(adapted) if "labels" in name}
        with torch.no_grad():
            found = {n: to_numpy(v) for n, v in flatten_outputs(model(**adapted)) if v is not None}
            # Given labels, the question-answering class returns log-probabilities as its logits.
            if labels:
                found["loss"] = to_numpy(model(**adapted, **labels).loss)
        return found

    def predictor(
        self, model: Any, **options: Any
    ) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
        return lambda inputs: self.call(model, {**inputs, **options})

    def gradients(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return super().gradients(model, adapt(type(model).__name__, model.config, inputs))


def adapt(architecture: str, config: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` as this class of transformers needs them.

    Raises:
        NotComparable: it cannot run them, or would read another token.
    """
    regions = inputs.get("visual_embeds") is not None
    mask = inputs.get("attention_mask")
    if config.bypass_transformer and regions:
        raise NotComparable("its bypass_transformer raises IndexError")
    if architecture != BODY and getattr(config, "classifier_head", "linear") != "linear":
        raise NotComparable(f"its {architecture} has no classifier_head but the linear one")
    if architecture == "VisualBertForMultipleChoice" and "image_text_alignment" in inputs:
        raise NotComparable("it does not flatten image_text_alignment")
    if mask is not None and not np.all(np.asarray(mask)[..., 0]):
        raise NotComparable("under left padding it pools, and answers from, the wrong token")
    adapted = {name: _tensor(architecture, name, x) for name, x in inputs.items() if x is not None}
    if architecture == "VisualBertForMultipleChoice":
        _add_choices(adapted)
    _add_masks(architecture, adapted)
    if architecture == "VisualBertForPreTraining" and "labels" in adapted:
        adapted["labels"] = _full_length(adapted)
    return adapted


def _tensor(architecture: str, name: str, x: Any) -> Any:
    if isinstance(x, bool):
        return x
    tensor = torch.as_tensor(np.asarray(x))
    owner = architecture if name in INPUTS[architecture] else BODY
    if is_floating(owner, name):
        return tensor
    tensor = tensor.long()
    return torch.where(tensor == -1, -100, tensor) if "labels" in name else tensor


def _add_choices(adapted: dict[str, Any]) -> None:
    choices = adapted["input_ids"].shape[1]
    for name, rank in (
        ("visual_embeds", 3),
        ("visual_attention_mask", 2),
        ("visual_token_type_ids", 2),
    ):
        x = adapted.get(name)
        if x is not None and x.ndim == rank:
            adapted[name] = x[:, None].expand(x.shape[0], choices, *x.shape[1:]).contiguous()


def _add_masks(architecture: str, adapted: dict[str, Any]) -> None:
    adapted.setdefault("attention_mask", torch.ones_like(adapted["input_ids"]))
    if "visual_embeds" in adapted:
        ones = torch.ones(adapted["visual_embeds"].shape[:-1], dtype=torch.long)
        adapted.setdefault("visual_attention_mask", ones)
    elif architecture == "VisualBertForPreTraining":
        # Its pretraining loss asks for the length of a mask that text alone does not have.
        adapted.setdefault("visual_attention_mask", torch.ones_like(adapted["input_ids"])[..., :0])


def _full_length(adapted: dict[str, Any]) -> Any:
    labels = adapted["labels"]
    total = adapted["attention_mask"].shape[1] + adapted["visual_attention_mask"].shape[1]
    padding = labels.new_full((labels.shape[0], total - labels.shape[1]), -100)
    return torch.cat([labels, padding], dim=1)


backend = TransformersBackend()
