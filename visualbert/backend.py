"""What a framework has to offer to take part, and the registry that finds it.

A backend is one package with an object that satisfies `Backend`. It is found by name: the three of
this package below, others through the entry-point group `visualbert.backends`. A framework is
imported only when its backend is asked for.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple, Protocol

import numpy as np

from visualbert.config import VisualBertConfig
from visualbert.errors import MissingBackendError, UsageError
from visualbert.schema import Kind, Param

ENTRY_POINTS = "visualbert.backends"


class Leaf(NamedTuple):
    """How a framework spells the last part of a parameter's name, and how it lays the array out."""

    name: str
    transposed: bool = False


class Backend(Protocol):
    """One framework. Models are of the classes in `models`; arrays go in and out as numpy."""

    name: str
    leaves: Mapping[Kind, Leaf]
    models: Mapping[str, type]

    def create(
        self, architecture: str | type, config: VisualBertConfig, dtype: str = "float32"
    ) -> Any:
        """A model in evaluation mode whose parameters have a shape but no value yet."""
        ...

    def variables(self, model: Any) -> dict[str, Any]:
        """Every parameter's dotted path in the framework's spelling, and its native handle."""
        ...

    def shape(self, variable: Any) -> tuple[int, ...]:
        """The shape behind a handle, in the framework's layout."""
        ...

    def pull(self, variable: Any) -> np.ndarray:
        """The value behind a handle."""
        ...

    def push(self, variable: Any, array: np.ndarray) -> None:
        """Make `array`, of the framework's layout, the value behind a handle, whose dtype is kept.

        The array's memory is the backend's from then on: nobody else writes to it.
        """
        ...

    def call(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the model; tuples come out as `hidden_states.0`, `hidden_states.1`, …"""
        ...

    def predictor(
        self, model: Any, **options: Any
    ) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
        """`call` for many calls with the same `options`, and the weights that the model has now."""
        ...

    def gradients(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The gradient of `loss` by every parameter, keyed as `variables`; zeros where there is
        none.
        """
        ...


class _Home(NamedTuple):
    module: str
    needs: str  # the framework's import name
    install: str


_BACKENDS = {
    "pt": _Home("visualbert.pt.backend", "torch", "pip install visualbert[pt]"),
    "tf": _Home("visualbert.tf.backend", "tensorflow", "pip install visualbert[tf]"),
    "flax": _Home("visualbert.flax.backend", "flax", "pip install visualbert[flax]"),
}
# Runs transformers' own classes under the protocol, to be compared with; never a default.
_REFERENCES = {
    "transformers": _Home(
        "visualbert.pt.transformers", "transformers", "pip install visualbert[pt,transformers]"
    ),
}


_ALSO_CALLED = {
    **dict.fromkeys(("pt", "torch", "pytorch"), "pt"),
    **dict.fromkeys(("tf", "tensorflow", "keras"), "tf"),
    **dict.fromkeys(("flax", "jax", "nnx"), "flax"),
}


def backend_names(installed: bool = False) -> list[str]:
    """The registered backends, this package's first; only those whose framework is there if
    `installed`.
    """
    names = [n for n, h in _BACKENDS.items() if not installed or importlib.util.find_spec(h.needs)]
    return names + sorted(set(_third_parties()) - set(_BACKENDS))


@cache
def get_backend(name: str) -> Backend:
    """The backend called `name`: "pt", "tf", "flax", or one that another package registered.

    Raises:
        UsageError: there is none of that name.
        MissingBackendError: its framework is not installed, or not whole; the sentence says how to
            install it.
    """
    home = {**_BACKENDS, **_REFERENCES}.get(name)
    if home is None:
        third = _third_parties()
        if name not in third:
            meant = _ALSO_CALLED.get(str(name).lower())
            way = (
                f"did you mean {meant!r}?"
                if meant
                else f"expected one of {', '.join(backend_names())}"
            )
            raise UsageError(f"unknown backend {name!r}; {way}")
        return third[name].load()
    if importlib.util.find_spec(home.needs) is None:
        raise MissingBackendError(f"backend {name!r} needs {home.needs}: {home.install}")
    try:
        return importlib.import_module(home.module).backend
    except MissingBackendError:
        raise
    except ImportError as error:
        raise MissingBackendError(
            f"backend {name!r} cannot be imported ({error}); {home.install} mends an incomplete "
            "installation"
        ) from error


def predictor(model: Any, **options: Any) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
    """The fastest way to call a model many times, in evaluation mode: its weights laid out once,
    few compilations, no work on padding.

    Args:
        model: of any framework. It is not changed; what the predictor knows are the weights that it
            has now.
        **options: of every call, such as `output_hidden_states=True`.

    Returns:
        A function of a batch, numpy arrays by input name, that gives numpy arrays by output name;
        hidden states and attentions come as `hidden_states.0`, `hidden_states.1`, …
    """
    return get_backend(model.framework).predictor(model, **options)


def native_name(backend: Backend, param: Param) -> str:
    """`param`'s dotted path in the backend's spelling."""
    return param.name.rpartition(".")[0] + "." + backend.leaves[param.kind].name


def to_native(backend: Backend, param: Param, array: np.ndarray) -> np.ndarray:
    """A canonical array in the backend's layout: a view."""
    return array.T if backend.leaves[param.kind].transposed else array


# A transposition is its own inverse.
from_native = to_native


def flatten_outputs(output: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`name, value` of every array in an output, tuples numbered."""
    for key, value in output.items():
        if isinstance(value, (tuple, list)):
            yield from ((f"{key}.{i}", item) for i, item in enumerate(value))
        else:
            yield key, value


def _third_parties() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}
