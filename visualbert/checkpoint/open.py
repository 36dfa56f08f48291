"""Any VisualBERT or BERT checkpoint, whatever wrote it, as one configuration and canonical tensors.

A file is known by what it contains, never by its name: first the format (safetensors, torch, HDF5,
msgpack, tar, TensorFlow), then the family of names in it. What a bare file does not say (sizes,
head, labels) is read off the shapes and reported. Nothing is read but headers and names.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visualbert.checkpoint import families
from visualbert.checkpoint.archives import (
    CONFIGS,
    WEIGHTS,
    is_archive,
    open_archive,
    read_yaml,
)
from visualbert.checkpoint.families import HUGGING_FACE, MMF, Family
from visualbert.checkpoint.flax_files import MSGPACK, ORBAX, MsgpackFile, OrbaxFolder, is_orbax
from visualbert.checkpoint.keras_files import KERAS, KerasFile
from visualbert.checkpoint.mapped import open_file
from visualbert.checkpoint.read import (
    INDEX,
    SAFETENSORS,
    TORCH,
    SafetensorsFiles,
    has_weights,
    read_weights,
)
from visualbert.checkpoint.tensors import Tensors
from visualbert.checkpoint.tf_bundle import BundleFiles
from visualbert.checkpoint.torch_files import TorchFiles, open_torch
from visualbert.checkpoint.warm_start import WarmStart, assumed_fields, config_from_bert
from visualbert.checkpoint.write import finish_commits
from visualbert.config import CONFIG_FILE, MODEL_TYPE, VisualBertConfig, read_json_object
from visualbert.errors import CheckpointError, ConfigError
from visualbert.schema import PREFIX, check_architecture

DETECTOR = "detector.safetensors"
BERT_CONFIG = "bert_config.json"
PROCESSOR = (  # what goes with a model
    *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
)
NATIVE: dict[str, Callable[[str, Path], Tensors]] = {
    KERAS: KerasFile,
    ORBAX: OrbaxFolder,
    MSGPACK: MsgpackFile,
}
_BUNDLE = ".index"  # behind the name of a TensorFlow checkpoint
_HDF5 = b"\x89HDF\r\n\x1a\n"
_PNG = b"\x89PNG"  # which begins as a mapping of msgpack does
_TORCH_STARTS = (b"PK\x03\x04", b"\x80")  # a zip, a pickle
_SUFFIXES = (*WEIGHTS, ".tar", ".tar.gz", ".tgz", ".safetensors", ".h5", ".keras", ".msgpack")
_MMF_MODELS = ("model_config", "model_attributes")  # today's name, and Pythia's
_MMF_FIELDS = (  # what MMF's configuration calls as this package does
    "num_attention_heads",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
    "initializer_range",
)


@dataclass(frozen=True)
class Checkpoint:
    """A configuration and the tensors that go with it."""

    label: str
    config: VisualBertConfig
    tensors: Tensors
    folder: Path
    family: Family = HUGGING_FACE
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # what was done -> to what
    aside: Tensors | None = None  # of a detector, kept beside the model
    files: tuple[Path, ...] = ()  # that it was read from
    format: str = ""  # of those files


@dataclass(frozen=True)
class _Found:
    """A weight file or folder before its names are looked at."""

    tensors: Any  # `Tensors` with a `format`
    files: tuple[Path, ...]
    config: Path | None = None  # the config.json or bert_config.json that belongs to it
    loose: Path | None = None  # a file that has none
    mmf: Mapping[str, Any] | None = None  # MMF's configuration, of the same archive


def open_checkpoint(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    config: str | os.PathLike | VisualBertConfig | None = None,
    **changes: Any,
) -> Checkpoint:
    """Find a VisualBERT checkpoint of any family, list its tensors and settle its configuration;
    read no tensor.

    Args:
        source: a folder, a file, or a Hub id.
        revision: branch, tag or commit on the Hub.
        config: a configuration, or the file of one, in place of the checkpoint's own.
        **changes: fields of `VisualBertConfig`.

    Raises:
        CheckpointError: it is none, is broken, or is a BERT, which has no regions.
        ConfigError: its configuration is missing or broken.
    """
    path, label = find_source(source, revision), str(source)
    own = path / CONFIG_FILE if _keeps_config(path) else None
    if isinstance(config, VisualBertConfig):
        config = config.replace(**changes)
    elif config is None and own is not None:
        config = VisualBertConfig.from_pretrained(own, **changes)  # its absence is said first
    found = _find(path, label)
    family = families.recognise(found.tensors)
    if family.bert:
        raise CheckpointError(
            f"{label!r} is {family.title}, not a VisualBERT; one starts from it with from_bert "
            "(on the command line, convert --architecture CLASS)"
        )
    written = families.rewrite(found.tensors, family)
    _refuse_pairs(written.tensors)
    chosen, notes = _settle(found, family, written.tensors, config, changes)
    folder = _home(path)
    aside, beside = written.aside, folder / DETECTOR
    if aside is None and (path.is_dir() or found.config) and beside.is_file():
        aside = SafetensorsFiles(str(beside), [beside])
    return Checkpoint(
        *(label, chosen, written.tensors, folder, family, notes, aside, found.files),
        found.tensors.format,
    )


def open_bert(
    source: str | os.PathLike,
    architecture: str,
    *,
    revision: str | None = None,
    config: str | os.PathLike | None = None,
    seed: int = 0,
    **changes: Any,
) -> Checkpoint:
    """Find a BERT checkpoint and present it as the VisualBERT `architecture` that starts from
    it.

    Args:
        source, revision, **changes: as in `open_checkpoint`.
        architecture: the class that it becomes.
        config: the file of a BERT's configuration, in place of its own.
        seed: of whatever a BERT does not have.

    Raises:
        CheckpointError: there is none, or it is a VisualBERT already.
        ConfigError: it is built differently, or says that it is another model.
    """
    check_architecture(architecture)
    path, label = find_source(source, revision), str(source)
    own = Path(config) if config is not None else _bert_config(path)
    values = None if own is None else _bert_values(own)  # its absence is said first
    found = _find(path, label)
    family = families.recognise(found.tensors)
    if not family.bert:
        raise CheckpointError(f"{label!r} is {family.title}, not a BERT; load it as it is")
    written = families.rewrite(found.tensors, family)
    notes: dict[str, tuple[str, ...]] = {}
    where = own or found.config
    if values is None and where is not None:
        values = _bert_values(where)
    elif values is None:
        values, notes["inferred"] = families.infer_config(written.tensors, changes)
    try:
        chosen = config_from_bert(values, **changes)
    except ConfigError as error:
        raise ConfigError(f"{where or label}: {error}") from None
    start = WarmStart(written.tensors, architecture, chosen, seed)
    notes |= {
        "assumed": assumed_fields(architecture, chosen, values, changes),
        "copied from the text tables": start.derived,
        "drawn anew": start.fresh,
        "not needed": (*start.ignored, *written.dropped),
    }
    return Checkpoint(
        *(label, chosen, start, _home(path), family, notes, None, found.files), found.tensors.format
    )


def is_bert(source: str | os.PathLike, revision: str | None = None) -> bool:
    """Whether a checkpoint is a BERT, by the model_type of its config.json or else by its names."""
    path = find_source(source, revision)
    own = _bert_config(path)
    if own is not None and (own.is_file() or not has_weights(path)):
        model_type = read_json_object(own).get("model_type")
        if model_type is not None:
            return model_type == "bert"
    return families.recognise(_find(path, str(source)).tensors).bert


def _bert_config(path: Path) -> Path | None:
    """The configuration of a folder: config.json, or what it was called in BERT's first year."""
    older = path / BERT_CONFIG
    if not _keeps_config(path):
        return None
    return older if older.is_file() and not (path / CONFIG_FILE).exists() else path / CONFIG_FILE


def _keeps_config(path: Path) -> bool:
    """Whether a config.json is due: in every folder but one of a family that has none."""
    if not path.is_dir():
        return False
    if os.path.lexists(path / CONFIG_FILE):
        return True
    bare = is_orbax(path) or _bundles(path) or _loose_files(path)
    return has_weights(path) or any((path / name).exists() for name in NATIVE) or not bare


def _home(path: Path) -> Path:
    """The folder whose config.json and detector belong to a checkpoint: around a file or an Orbax
    folder.
    """
    if os.path.isdir(path) and not is_orbax(path):
        return path
    return path.parent if path.name not in ("", "..") else path / ".."


def _bert_values(path: Path) -> dict[str, Any]:
    values = read_json_object(path)
    if values.get("model_type", "bert") != "bert":
        found = values["model_type"]
        way = "; load it with from_pretrained" if found == MODEL_TYPE else ""
        raise ConfigError(f"{path}: model_type is {found!r}, expected 'bert'{way}")
    return values


def _settle(
    found: _Found,
    family: Family,
    tensors: Tensors,
    config: str | os.PathLike | VisualBertConfig | None,
    changes: Mapping[str, Any],
) -> tuple[VisualBertConfig, dict[str, tuple[str, ...]]]:
    """The configuration that was given, that lies beside the file, or that its shapes show."""
    if isinstance(config, VisualBertConfig):
        return config, {}
    if config is not None and Path(config).suffix.lower() not in CONFIGS:
        chosen = VisualBertConfig.from_pretrained(config, **changes)
        if chosen.architectures:
            return chosen, {}
        values, lines = families.infer_config(tensors, chosen.to_dict())
        return chosen.replace(architectures=tuple(values["architectures"])), {"inferred": lines[:1]}
    if config is None and found.config is not None:
        return VisualBertConfig.from_pretrained(found.config, **changes), {}
    given: dict[str, Any] = {}
    if config is not None:
        given = _mmf_fields(str(config), read_yaml(Path(config)))
    elif family is MMF:
        given = _mmf_config(found)
    strategy = given.pop("pooler_strategy", None)
    pooled = None if strategy is None else strategy != "vqa"
    values, lines = families.infer_config(tensors, {**given, **changes}, pooled)
    try:
        return VisualBertConfig.from_dict({**values, **given}, **changes), {"inferred": lines}
    except ConfigError as error:
        raise ConfigError(f"{config or tensors.label}: {error}") from None


def _refuse_pairs(tensors: Tensors) -> None:
    """MMF's NLVR2 reads the two images apart and joins what it pooled: twice the hidden size."""
    dense = tensors.specs.get("cls.transform.dense.weight")
    words = tensors.specs.get(PREFIX + "embeddings.word_embeddings.weight")
    if dense and words and dense.shape == (2 * words.shape[-1],) * 2:
        raise CheckpointError(
            f"{tensors.label!r} is MMF's NLVR2 model, which runs once for each image and joins the "
            "two; this package's VisualBertForVisualReasoning reads both at once, as the original"
        )


def _mmf_config(found: _Found) -> dict[str, Any]:
    """The fields of MMF's configuration: in the archive, beside the file, or else inside it."""
    label = str(found.files[0])
    if found.mmf is not None:
        return _mmf_fields(label, found.mmf)
    if found.loose is None:
        return {}
    for path in _yaml_beside(found.loose):
        values = read_yaml(path)
        if _mmf_model(values) is not None or path.stem == found.loose.stem:
            return _mmf_fields(str(path), values)
    if isinstance(found.tensors, TorchFiles):
        state = open_torch(found.loose).value
        inside = state.get("config") if isinstance(state, dict) else None
        if isinstance(inside, dict) and _mmf_model(inside) is not None:
            return _mmf_fields(label, inside)
    return {}


def _mmf_model(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a configuration of MMF says about the model."""
    for key in _MMF_MODELS:
        models = values.get(key)
        if isinstance(models, dict) and isinstance(models.get("visual_bert"), dict):
            return models["visual_bert"]
    return None


def _mmf_fields(label: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same under this package's names, as far as it tells more than the shapes."""
    model = _mmf_model(values)
    if model is None:
        raise ConfigError(
            f"{label}: its configuration has no model_config.visual_bert, as MMF's has"
        )
    fields = (*_MMF_FIELDS, "pooler_strategy")
    return {name: model[name] for name in fields if model.get(name) is not None}


def _find(path: Path, label: str) -> _Found:
    """The weights in a folder or file."""
    if not path.is_dir():
        return _find_file(path, label)
    if has_weights(path):
        tensors = read_weights(path, label)
        return _Found(tensors, tuple(tensors.paths), path / CONFIG_FILE)
    for name, kind in NATIVE.items():
        if (path / name).exists():
            return _Found(kind(label, path / name), (path / name,), path / CONFIG_FILE)
    if is_orbax(path):
        config = _home(path) / CONFIG_FILE
        found = config if config.is_file() else None
        return _Found(OrbaxFolder(label, path), (path,), found)
    candidates = [*_bundles(path), *_loose_files(path)]
    if len(candidates) == 1:
        return _find_file(candidates[0], label)
    if candidates:
        raise CheckpointError(
            f"{label}: holds more than one weight file, {', '.join(c.name for c in candidates[:4])}"
            + (f" and {len(candidates) - 4} more" if len(candidates) > 4 else "")
            + "; name the one you mean"
        )
    raise CheckpointError(
        f"{path}: no weights found; looked for {SAFETENSORS} and {TORCH}, for the {INDEX[1:]} of "
        f"either, for {', '.join(NATIVE)}, for a TensorFlow checkpoint, and for one file ending "
        f"in {', '.join(_SUFFIXES)}"
    )


def _bundles(folder: Path) -> list[Path]:
    """TensorFlow checkpoints in a folder, by their prefix."""
    found = sorted(folder.glob("*" + _BUNDLE))
    return [path.with_name(path.name.removesuffix(_BUNDLE)) for path in found]


def _loose_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.lower().endswith(_SUFFIXES)
        and not (path.name == DETECTOR or path.name.startswith("."))
        and path.is_file()
    )


def _find_file(path: Path, label: str) -> _Found:
    """The weights in one file, by what it starts with."""
    index = path.with_name(path.name + _BUNDLE)
    if index.is_file() and not path.exists():
        beside = path.with_name(BERT_CONFIG)
        bundle = BundleFiles(label, path)
        return _Found(bundle, tuple(bundle.paths), beside if beside.is_file() else None)
    with open_file(path) as file:
        head = file.read(512)
    if is_archive(head):
        archive = open_archive(path)
        inside = Path(f"{path}:{archive.name}")
        return _Found(TorchFiles(label, [inside], [archive.weights]), (path,), mmf=archive.config)
    kind = _kind(path, head)
    beside = path.with_name(CONFIG_FILE)
    known = path.name in (SAFETENSORS, TORCH, *NATIVE)
    config = beside if known and beside.is_file() else None
    return _Found(kind(label, path), (path,), config, None if config else path)


def _kind(path: Path, head: bytes) -> Callable[[str, Path], Tensors]:
    if head[8:9] == b"{":  # asked first: its length comes before, and may begin as a pickle does
        return lambda label, path: SafetensorsFiles(label, [path])
    if head.startswith(_TORCH_STARTS):
        return lambda label, path: TorchFiles(label, [path])
    if head.startswith(_HDF5):
        return KerasFile
    mapping = head[:1] and (head[0] >> 4 == 0x8 or head[0] in (0xDE, 0xDF))
    if mapping and not head.startswith(_PNG):
        return MsgpackFile
    raise CheckpointError(
        f"{path}: none of the formats that are read: torch's (zip or older), safetensors, HDF5, "
        "msgpack, a tar archive, or a TensorFlow checkpoint (give its name without .index)"
    )


def _yaml_beside(path: Path) -> list[Path]:
    """Where MMF's configuration may be: under the file's own name, or alone in its folder."""
    others = sorted(p for p in path.parent.iterdir() if p.suffix.lower() in CONFIGS and p.is_file())
    same = [other for other in others if other.stem == path.stem]
    return same or (others if len(others) == 1 else [])


def find_source(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The local folder or file of a checkpoint; a Hub id's files are fetched into the Hub's cache.

    Raises:
        CheckpointError: `source` looks like a path and is not there.
        HubError: it looks like a Hub id and cannot be had.
    """
    path, name = Path(source), os.fspath(source)
    if not name.strip():
        raise CheckpointError("the checkpoint's name is empty; expected a folder or a Hub id")
    finish_commits(_home(path))
    if os.path.exists(path) or os.path.isfile(name + _BUNDLE):
        return path
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local or name.endswith("/") or name.lower().endswith(_SUFFIXES):
        raise CheckpointError(f"{name}: no such file or folder")
    return _fetch(name, revision)


def _fetch(name: str, revision: str | None) -> Path:
    from visualbert.hub import fetch

    beside = [CONFIG_FILE, BERT_CONFIG, DETECTOR, *PROCESSOR]
    patterns = [*beside, SAFETENSORS, SAFETENSORS + INDEX, "model-*.safetensors"]
    pickles = [*beside, TORCH, TORCH + INDEX, "pytorch_model-*.bin"]
    try:
        folder = fetch(name, revision, patterns, "folder")
        if not any(folder.glob("model*.safetensors")):
            folder = fetch(name, revision, pickles, "folder")
    except ValueError:
        raise CheckpointError(
            f"{name}: no such folder, and not a Hub id of the form owner/name"
        ) from None
    if not folder.is_dir():
        raise CheckpointError(
            f"{name}: the repository holds no checkpoint; looked for {CONFIG_FILE}, {SAFETENSORS} "
            f"and {TORCH}"
        )
    return folder
