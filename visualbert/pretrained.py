"""from_pretrained and save_pretrained, written once for every framework.

A load is always the same four steps: find the files, match them with the table, create the model,
match it with the table too, and only then write. A failed load leaves nothing behind.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from visualbert.backend import Backend, get_backend, native_name, to_native
from visualbert.checkpoint.initial import InitialValues
from visualbert.checkpoint.match import check_ties, match
from visualbert.checkpoint.read import (
    INDEX,
    SAFETENSORS,
    TORCH,
    read_weights,
)
from visualbert.checkpoint.tensors import (
    ArrayTensors,
    Spec,
    Tensors,
    cast,
    common_dtype,
    dtype_name,
)
from visualbert.checkpoint.warm_start import WarmStart, config_from_bert
from visualbert.checkpoint.write import write_folder
from visualbert.config import CONFIG_FILE, VisualBertConfig, read_json_object
from visualbert.errors import CheckpointError, ConfigError, HubError, UsageError
from visualbert.schema import Param, check_architecture, parameters


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
        dtype: Any = None,
        new_head: bool = False,
        seed: int = 0,
        **changes: Any,
    ) -> Self:
        """A model in evaluation mode with the weights of a checkpoint.

        Args:
            source: a folder with config.json and weights, or a Hub id such as
                "uclanlp/visualbert-vqa".
            revision: branch, tag or commit on the Hub.
            dtype: "float32", "float64", "float16" or "bfloat16", or the framework's own object for
                one of them; the checkpoint's own when left out.
            new_head: draw the task head anew from `seed`, whatever the file holds for it.
            seed: of whatever is drawn anew.
            **changes: fields of `VisualBertConfig` to change, such as `num_labels` or
                `attn_implementation`.

        Raises:
            HubError: the Hub id cannot be reached.
            ConfigError: the configuration is missing or broken.
            CheckpointError: the weights are missing, broken, or do not fit; nothing was loaded.
        """
        checkpoint = open_checkpoint(source, revision=revision, **changes)
        return load_model(
            get_backend(cls.framework), cls, checkpoint, dtype=dtype, new_head=new_head, seed=seed
        )

    @classmethod
    def from_bert(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        dtype: Any = None,
        seed: int = 0,
        **changes: Any,
    ) -> Self:
        """A model that starts from a BERT (paper section 3.3); visual tables are copies of the text
        tables.

        Args:
            source: a transformers BERT folder or Hub id.
            revision: branch, tag or commit on the Hub.
            dtype: as in `from_pretrained`.
            seed: of the visual projection, the head, and whatever else a BERT does not have.
            **changes: fields of `VisualBertConfig`, above all `visual_embedding_dim`.

        Raises:
            CheckpointError: the folder does not hold a BERT.
        """
        checkpoint = open_bert(source, cls.architecture, revision=revision, seed=seed, **changes)
        return load_model(get_backend(cls.framework), cls, checkpoint, dtype=dtype)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write config.json and model.safetensors to `folder`, which transformers can load too.

        Raises:
            CheckpointError: the folder cannot be written; what it held is untouched.
        """
        save_model(get_backend(self.framework), self, folder)

    def initialise(self, seed: int | None) -> None:
        """Set every parameter to its initial value; None leaves them to whoever fills them next."""
        if seed is not None:
            backend = get_backend(self.framework)
            values = InitialValues(self.architecture, self.config, seed)
            _fill(backend, self, values, {name: name for name in values.specs}, None, (), None)


@dataclass(frozen=True)
class Checkpoint:
    """A configuration and the tensors that go with it."""

    label: str
    config: VisualBertConfig
    tensors: Tensors
    folder: Path


def open_checkpoint(
    source: str | os.PathLike, *, revision: str | None = None, **changes: Any
) -> Checkpoint:
    """Find a VisualBERT checkpoint, list its tensors and parse its configuration; read no
    tensor.
    """
    folder = find_folder(source, revision)
    config = VisualBertConfig.from_pretrained(folder, **changes)
    return Checkpoint(str(source), config, read_weights(folder, str(source)), folder)


def open_bert(
    source: str | os.PathLike,
    architecture: str,
    *,
    revision: str | None = None,
    seed: int = 0,
    **changes: Any,
) -> Checkpoint:
    """Find a BERT checkpoint and present it as the VisualBERT `architecture` that starts from
    it.
    """
    check_architecture(architecture)
    folder = find_folder(source, revision)
    values = read_json_object(folder / CONFIG_FILE)
    if values.get("model_type", "bert") != "bert":
        raise ConfigError(
            f"{folder / CONFIG_FILE}: model_type is {values['model_type']!r}, expected 'bert'"
        )
    try:
        config = config_from_bert(values, **changes)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG_FILE}: {error}") from None
    bert = read_weights(folder, str(source))
    return Checkpoint(str(source), config, WarmStart(bert, architecture, config, seed), folder)


def find_folder(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The local folder of a checkpoint; a Hub id's files are fetched into the Hub's cache.

    Raises:
        CheckpointError: `source` looks like a path and is not there.
        HubError: it looks like a Hub id and cannot be had.
    """
    path, name = Path(source), os.fspath(source)
    if not name.strip():
        raise CheckpointError("the checkpoint's name is empty; expected a folder or a Hub id")
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise CheckpointError(f"{name} is a file; expected a folder with {CONFIG_FILE} and weights")
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local or name.endswith("/"):
        raise CheckpointError(f"{name}: no such folder")
    return _fetch(name, revision)


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [CONFIG_FILE, SAFETENSORS, SAFETENSORS + INDEX, "model-*.safetensors"]
    pickles = [TORCH, TORCH + INDEX, "pytorch_model-*.bin"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, *pickles])
            )
        return folder
    except HFValidationError:
        raise CheckpointError(
            f"{name}: no such folder, and not a Hub id of the form owner/name"
        ) from None
    except Exception as error:  # the client raises what a proxy's answer makes it trip over
        at = f" at revision {revision}" if revision else ""
        raise HubError(
            f"{name}: no such folder here, and the Hub did not give it{at} ({_hub_reason(error)}); "
            "check the name and the connection, or pass a local folder"
        ) from error


def _hub_reason(error: Exception) -> str:
    from huggingface_hub import errors

    known = (
        (errors.GatedRepoError, "access to this repository has to be asked for there"),
        (errors.RepositoryNotFoundError, "no such repository, or it is private: hf auth login"),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError, "it cannot be reached, and nothing is in the cache"),
    )
    reason = next((words for kind, words in known if isinstance(error, kind)), None)
    return reason or (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def load(
    source: str | os.PathLike, backend: str = "pt", *, revision: str | None = None, **options: Any
) -> Any:
    """A model of the class that the folder's `architectures` names, in the framework you ask for.

    Args:
        source: a folder or Hub id, as in `from_pretrained`.
        backend: "pt", "tf", "flax", or a registered other.
        revision: branch, tag or commit on the Hub.
        **options: further arguments of `from_pretrained`.

    Raises:
        ConfigError: the folder's config does not say which architecture it is.
    """
    chosen = get_backend(backend)
    folder = find_folder(source, revision)
    config = VisualBertConfig.from_pretrained(folder)
    cls: Any = chosen.models[architecture_of(config, str(source))]
    return cls.from_pretrained(folder, **options)


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
    found = match(tensors, architecture, config, new_head=new_head, backend=backend.name)
    check_ties(tensors, found)
    chosen = dtype_name(dtype) if dtype is not None else common_dtype(tensors)
    if config.architectures != (architecture,):
        config = config.replace(architectures=(architecture,))
    model = backend.create(cls, config, chosen)
    fresh = InitialValues(architecture, config, seed) if found.fresh else None
    _fill(backend, model, tensors, found.sources, fresh, found.fresh, chosen)
    return model


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
    variables = native_variables(backend, model)
    for param, variable in variables.items():
        if param.name in fresh_names:
            assert fresh is not None
            array = fresh.read(param.name)
        else:
            array = tensors.read(sources[param.name])
        if dtype is not None:
            array = cast(array, dtype)
        backend.push(variable, to_native(backend, param, array))


def native_variables(backend: Backend, model: Any) -> dict[Param, Any]:
    """The handle of every parameter in the table, once model and table are found to agree.

    Raises:
        CheckpointError: they do not; a fault of the model's code or of its class's table.
    """
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


def option_error(name: str, value: Any, choices: Any) -> UsageError:
    """The one sentence for an option that is not one of its choices."""
    return UsageError(f"{name}={value!r} is not one of {', '.join(choices)}")
