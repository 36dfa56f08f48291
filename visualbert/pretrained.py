"""from_pretrained and save_pretrained, written once for every framework.

A load is always the same four steps: find the files, match them with the table, create the model,
match it with the table too, and only then write. A failed load leaves nothing behind.
"""

import dataclasses
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, Self

import numpy as np

from visualbert.backend import Backend, get_backend, native_name, to_native
from visualbert.checkpoint.initial import InitialValues
from visualbert.checkpoint.match import check_ties, match
from visualbert.checkpoint.open import Checkpoint, open_bert, open_checkpoint
from visualbert.checkpoint.tensors import (
    ArrayTensors,
    Memory,
    Spec,
    Tensors,
    cast,
    common_dtype,
    dtype_name,
    transpose,
)
from visualbert.checkpoint.write import write_folder
from visualbert.config import VisualBertConfig, checked
from visualbert.errors import CheckpointError, ConfigError, UsageError
from visualbert.keywords import check_keywords, check_source, without_habits
from visualbert.schema import Kind, Param, check_architecture, parameters

_THREADS = os.cpu_count() or 1
_FIELDS = {f.name for f in dataclasses.fields(VisualBertConfig)} - {"extra"}
_OWN = {"revision", "config", "dtype", "new_head", "seed"}


class PreTrained:
    """What every public model class of every framework has in common."""

    framework: ClassVar[str]
    architecture: ClassVar[str]
    config: VisualBertConfig

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        config: str | os.PathLike | VisualBertConfig | None = None,
        dtype: Any = None,
        new_head: bool = False,
        seed: int = 0,
        **changes: Any,
    ) -> Self:
        """A model in evaluation mode with the weights of a checkpoint.

        Args:
            source: a folder with config.json and weights, a Hub id such as
                "uclanlp/visualbert-vqa", or a file or folder of any family in the README's table
                (the authors' `.th`, MMF's archives, Keras, Orbax, msgpack).
            revision: branch, tag or commit on the Hub.
            config: a configuration or the file of one, in place of the checkpoint's own.
            dtype: "float32", "float64", "float16" or "bfloat16", or the framework's own object for
                one of them; the checkpoint's own when left out or "auto". "int8", in PyTorch on a
                CPU, is float32 with linear layers in int8, for inference alone.
            new_head: draw the task head anew from `seed`, whatever the file holds for it.
            seed: of whatever is drawn anew.
            **changes: fields of `VisualBertConfig` to change, such as `num_labels` or
                `attn_implementation`. `torch_dtype` is `dtype`, and what transformers has beside
                these is refused where it asks for anything (`visualbert.keywords`).

        Raises:
            UsageError: a keyword that means nothing here.
            HubError: the Hub id cannot be reached.
            ConfigError: the configuration is missing or broken.
            CheckpointError: the weights are missing, broken, or do not fit; nothing was loaded.
        """
        dtype, changes = _settle("from_pretrained", source, config, dtype, changes)
        checkpoint = open_checkpoint(source, revision=revision, config=config, **changes)
        return load_model(
            get_backend(cls.framework), cls, checkpoint, dtype=dtype, new_head=new_head, seed=seed
        )

    @classmethod
    def from_bert(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        config: str | os.PathLike | None = None,
        dtype: Any = None,
        seed: int = 0,
        **changes: Any,
    ) -> Self:
        """A model that starts from a BERT (paper section 3.3); visual tables are copies of the text
        tables.

        Args:
            source: a transformers BERT folder or Hub id, or Google's TensorFlow checkpoint (its
                name without `.index`, or its folder).
            revision: branch, tag or commit on the Hub.
            config: the file of the BERT's configuration, in place of its own.
            dtype: as in `from_pretrained`.
            seed: of the visual projection, the head, and whatever else a BERT does not have.
            **changes: fields of `VisualBertConfig`, above all `visual_embedding_dim`.

        Raises:
            UsageError: a keyword that means nothing here.
            CheckpointError: the folder does not hold a BERT.
        """
        dtype, changes = _settle("from_bert", source, config, dtype, changes)
        if isinstance(config, VisualBertConfig):
            raise UsageError(
                "from_bert() takes the file of a BERT's configuration as config, got a "
                "VisualBertConfig; pass the fields to change as keywords"
            )
        checkpoint = open_bert(
            source, cls.architecture, revision=revision, config=config, seed=seed, **changes
        )
        return load_model(get_backend(cls.framework), cls, checkpoint, dtype=dtype)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write config.json and model.safetensors to `folder`, which transformers can load too.

        Raises:
            CheckpointError: the folder cannot be written; what it held is untouched.
        """
        save_model(get_backend(self.framework), self, folder)

    def num_parameters(self, *, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters hold, all or those that are no table of vectors; the
        decoder, which is the word table, is not counted again.
        """
        backend = get_backend(self.framework)
        tables = {
            native_name(backend, p)
            for p in parameters(self.architecture, self.config)
            if exclude_embeddings and p.kind is Kind.EMBEDDING
        }
        variables = backend.variables(self)
        return sum(math.prod(backend.shape(v)) for k, v in variables.items() if k not in tables)

    def initialise(self, seed: int | None) -> None:
        """Set every parameter to its initial value; None leaves them to whoever fills them next."""
        if seed is not None:
            backend = get_backend(self.framework)
            values = InitialValues(self.architecture, self.config, seed)
            _fill(backend, self, values, {name: name for name in values.specs}, None, (), None)


def load(
    source: str | os.PathLike,
    backend: str = "pt",
    *,
    revision: str | None = None,
    config: str | os.PathLike | VisualBertConfig | None = None,
    dtype: Any = None,
    new_head: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """A model of the class that the checkpoint is, in the framework you ask for.

    Args:
        source: a folder, file or Hub id, as in `from_pretrained`.
        backend: "pt", "tf", "flax", or a registered other.
        revision, config, dtype, new_head, seed, **changes: as in `from_pretrained`.

    Raises:
        UsageError: there is no such backend, or a keyword that means nothing here.
        ConfigError: the folder's config does not say which architecture it is.
    """
    chosen = get_backend(backend)
    dtype, changes = _settle("load", source, config, dtype, changes)
    checkpoint = open_checkpoint(source, revision=revision, config=config, **changes)
    architecture = architecture_of(checkpoint.config, str(source))
    return load_model(chosen, architecture, checkpoint, dtype=dtype, new_head=new_head, seed=seed)


def _settle(
    function: str, source: Any, config: Any, dtype: Any, changes: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The type and the changed fields that a caller of `function` asks for."""
    check_source(function, source)
    if not isinstance(config, (str, os.PathLike, type(None))):
        checked(config)
    changes = without_habits(function, changes)
    given = changes.pop("torch_dtype", None)
    dtype = given if dtype is None else dtype
    own = _OWN - {"new_head"} if function == "from_bert" else _OWN
    check_keywords(function, changes, _FIELDS, own)
    return None if isinstance(dtype, str) and dtype == "auto" else dtype, changes


def architecture_of(config: VisualBertConfig, label: str) -> str:
    """The one architecture that `config` names.

    Raises:
        ConfigError: it names none, or one that this package does not have.
    """
    for name in config.architectures or ():
        return check_architecture(name.removeprefix("TF").removeprefix("Flax"))
    raise ConfigError(
        f"{label}: config.json names no architecture; load it with the class you mean, or pass "
        "--architecture on the command line"
    )


def load_model(
    backend: Backend,
    cls: str | type,
    checkpoint: Checkpoint,
    *,
    dtype: Any = None,
    new_head: bool = False,
    seed: int = 0,
) -> Any:
    """A model of `cls` with the tensors of `checkpoint`."""
    architecture = cls if isinstance(cls, str) else cls.architecture  # type: ignore[attr-defined]
    config, tensors = checkpoint.config, checkpoint.tensors
    if checkpoint.aside is not None and checkpoint.aside.label == tensors.label:  # one file
        warnings.warn(
            f"{checkpoint.label}: {len(checkpoint.aside.specs)} tensors of the detector that made "
            "the region features are not part of the model; visualbert convert keeps them beside "
            "it",
            stacklevel=3,
        )
    found = match(tensors, architecture, config, new_head=new_head, backend=backend.name)
    check_ties(tensors, found)
    asked = None if dtype is None else dtype_name(dtype)
    quantize = _quantizer(backend) if asked == "int8" else None
    chosen = common_dtype(tensors) if asked in (None, "int8") else asked  # int8 is cut from it
    if config.architectures != (architecture,):
        config = config.replace(architectures=(architecture,))
    model = backend.create(cls, config, chosen)
    fresh = InitialValues(architecture, config, seed) if found.fresh else None
    _fill(backend, model, tensors, found.sources, fresh, found.fresh, chosen)
    return model if quantize is None else quantize(model)


def _quantizer(backend: Backend) -> Callable[[Any], Any]:
    """What turns linear layers into int8 ones."""
    quantize = getattr(backend, "_quantize", None)
    if quantize is None:
        raise UsageError(
            f"dtype='int8' is for PyTorch on a CPU, not for backend {backend.name!r}; load the "
            "model with backend 'pt', or in bfloat16"
        )
    return quantize


def fill(backend: Backend, model: Any, tensors: Tensors) -> None:
    """Set every parameter of `model` from canonically named `tensors`; its dtypes stay.

    Raises:
        CheckpointError: they do not fit or cannot be read; the model is as it was.
    """
    found = match(tensors, model.architecture, model.config, backend=backend.name)
    check_ties(tensors, found)
    arrays = {name: tensors.read(name) for name in found.sources.values()}
    _fill(backend, model, ArrayTensors(tensors.label, arrays), found.sources, None, (), None)


def _fill(
    backend: Backend,
    model: Any,
    tensors: Tensors,
    sources: Mapping[str, str],
    fresh: Tensors | None,
    fresh_names: tuple[str, ...],
    dtype: str | None,
) -> None:
    def read(param: Param) -> np.ndarray:
        if param.name in fresh_names:
            assert fresh is not None
            array = fresh.read(param.name)
        else:
            array = tensors.read(sources[param.name])
        return array if dtype is None else cast(array, dtype)

    variables = native_variables(backend, model)
    for param, array in _native_arrays(backend, model.config, variables, read):
        backend.push(variables[param], array)


def _native_arrays(
    backend: Backend,
    config: VisualBertConfig,
    params: Iterable[Param],
    read: Callable[[Param], np.ndarray],
) -> Iterator[tuple[Param, np.ndarray]]:
    """Every parameter with its array in the backend's layout; all cores transpose."""
    turned = {param for param in params if backend.leaves[param.kind].transposed}
    memory = Memory(sum(Memory.room(param.shape(config)) for param in turned))
    jobs: deque[tuple[Param, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for param in params:
            array = read(param)
            if param not in turned:
                yield param, array
                continue
            into = memory.take(array.shape[::-1], array.dtype)
            jobs.append((param, pool.submit(transpose, array, into)))
            if len(jobs) > 2 * _THREADS:
                first, job = jobs.popleft()
                yield first, job.result()
        for last, job in jobs:
            yield last, job.result()


def native_variables(backend: Backend, model: Any) -> dict[Param, Any]:
    """The handle of every parameter in the table, once model and table are found to agree.

    Raises:
        UsageError: the weights are rounded to int8.
        CheckpointError: they do not; a fault of the model's code or of its class's table.
    """
    if getattr(model, "quantized", False):
        raise UsageError(
            "a model in int8 is neither saved nor filled, as its weights are rounded; use the "
            "checkpoint that it was loaded from"
        )
    handles = backend.variables(model)
    table = {native_name(backend, p): p for p in parameters(model.architecture, model.config)}
    wrong = sorted(set(table) ^ set(handles))
    wrong += [
        f"{name} {backend.shape(handles[name])}"
        for name, p in table.items()
        if name in handles
        and backend.shape(handles[name]) != _native_shape(backend, p, model.config)
    ]
    if wrong:
        raise CheckpointError(
            f"{type(model).__name__} and the table of {model.architecture} disagree on "
            f"{', '.join(wrong[:4])}" + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        )
    return {p: handles[name] for name, p in table.items()}


def _native_shape(backend: Backend, param: Param, config: VisualBertConfig) -> tuple[int, ...]:
    shape = param.shape(config)
    return shape[::-1] if backend.leaves[param.kind].transposed else shape


class ModelTensors:
    """A model in memory as `Tensors`: what saving and comparing read."""

    def __init__(self, backend: Backend, model: Any) -> None:
        self.label = f"{type(model).__name__} in memory"
        self._backend = backend
        self._variables = {p.name: (p, v) for p, v in native_variables(backend, model).items()}
        self.specs = {
            name: Spec(p.shape(model.config), backend.pull(v).dtype.name)
            for name, (p, v) in self._variables.items()
        }

    def read(self, name: str) -> np.ndarray:
        param, variable = self._variables[name]
        return to_native(self._backend, param, self._backend.pull(variable))


def save_model(backend: Backend, model: Any, folder: str | os.PathLike) -> None:
    """Write any backend's model as a canonical folder."""
    tensors = ModelTensors(backend, model)
    write_folder(folder, tensors, saved_config(model, common_dtype(tensors)))


def saved_config(model: Any, dtype: str) -> VisualBertConfig:
    """The config that describes `model` on disk."""
    extra = {k: v for k, v in model.config.extra.items() if k not in ("dtype", "torch_dtype")}
    return model.config.replace(
        architectures=(model.architecture,), extra={**extra, "dtype": dtype}
    )
