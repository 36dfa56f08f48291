"""VisualBERT in PyTorch, TensorFlow and Flax: one checkpoint, three frameworks, the same numbers.

Importing this package imports no framework; each public name brings its own when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HEADS = (
    "Model",
    "ForPreTraining",
    "ForMultipleChoice",
    "ForQuestionAnswering",
    "ForVisualReasoning",
    "ForRegionToPhraseAlignment",
)
_HOMES = {
    "VisualBertConfig": "visualbert.config",
    "ModelOutput": "visualbert.outputs",
    "VisualBertProcessor": "visualbert.inputs.processor",
    "Regions": "visualbert.inputs.regions",
    "load": "visualbert.pretrained",
    "predictor": "visualbert.backend",
    "Packing": "visualbert.packing",
    "plan_packing": "visualbert.packing",
    "pipeline": "visualbert.answering",
    "get_backend": "visualbert.backend",
    "backend_names": "visualbert.backend",
    "VisualBertError": "visualbert.errors",
    "ConfigError": "visualbert.errors",
    "CheckpointError": "visualbert.errors",
    "InputError": "visualbert.errors",
    "HubError": "visualbert.errors",
    "MissingBackendError": "visualbert.errors",
    "UsageError": "visualbert.errors",
}
_FRAMEWORKS = {
    "": ("visualbert.pt", "pt"),
    "TF": ("visualbert.tf", "tf"),
    "Flax": ("visualbert.flax", "flax"),
}
for _prefix, (_module, _extra) in _FRAMEWORKS.items():
    _HOMES |= {f"{_prefix}VisualBert{_head}": _module for _head in _HEADS}

__all__ = sorted([*_HOMES, "__version__"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from visualbert.errors import did_you_mean

        way = did_you_mean(name, _HOMES, cutoff=0.8)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{way}")
    home = _HOMES[name]
    extra = dict(_FRAMEWORKS.values()).get(home)
    if extra is not None:
        from visualbert.backend import get_backend

        get_backend(extra)  # a missing framework becomes the sentence that says how to install it
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
