"""`visualbert convert`: from any family of files to the canonical folder or a framework's own."""

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from visualbert.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from visualbert.checkpoint.match import Match
    from visualbert.checkpoint.tensors import Tensors
    from visualbert.config import VisualBertConfig
    from visualbert.pretrained import Checkpoint

DTYPES = ("float32", "float64", "float16", "bfloat16")
FORMATS = ("safetensors", "keras", "flax", "msgpack", "bin")
RECORD = "conversion.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def register(commands: Any) -> None:
    """Add the command to the parser."""
    from visualbert.cli.common import add_source

    parser = commands.add_parser(
        "convert",
        help="convert between every family of VisualBERT files",
        description="Convert a checkpoint. SRC may be a folder, a Hub id, the authors' .th, MMF's "
        "archive or .pth, a Keras, Orbax or msgpack file, or a BERT (transformers' or Google's), "
        "which becomes a VisualBERT that starts from it (--architecture says which). What is done "
        f"to which tensor is printed and written to {RECORD}.",
    )
    add_source(parser, "src")
    parser.add_argument("dst", help="folder to write")
    parser.add_argument("--to", choices=FORMATS, default="safetensors", help="format of DST")
    parser.add_argument("--dtype", choices=DTYPES, help="type of DST; as in SRC if left out")
    parser.add_argument("--new-head", action="store_true", help="draw the task head anew")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that DST holds")
    parser.add_argument(
        "--visual-embedding-dim", type=int, metavar="F", help="of a VisualBERT made from a BERT"
    )
    parser.add_argument("--seed", type=int, default=0, help="of whatever is drawn anew")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="split safetensors at this size, such as 200MB"
    )
    parser.add_argument(
        "--fingerprint", metavar="BERT", help="say whether the pooler is that of this BERT"
    )
    parser.set_defaults(run=run)


class Digests:
    """SHA-256 of files, taken in the background."""

    def __init__(self) -> None:
        self._found: dict[Path, Any] = {}

    def start(self, paths: Iterable[Path]) -> None:
        """Begin with those that have not been begun with."""
        for path in paths:
            if path not in self._found:
                begun = threading.Event()
                self._found[path] = _background(_digest, path, begun)
                begun.wait(1)  # or importing would keep Python's lock from it

    def of(self, files: dict[str, Path]) -> dict[str, str]:
        """The digest of each, when it is there."""
        return {name: self._found[path].result() for name, path in files.items()}


def _background(function: Callable[..., Any], *arguments: Any) -> Any:
    """The future result of a function; an exit does not wait for it."""
    from concurrent.futures import Future

    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _digest(path: Path, begun: threading.Event) -> str:
    from visualbert.checkpoint.pieces import pieces

    found = hashlib.sha256()
    with open(path, "rb") as file:
        begun.set()
        for piece in pieces(file, 0, os.fstat(file.fileno()).st_size):
            found.update(piece)
    return found.hexdigest()


def _likely_files(source: str) -> list[Path]:
    """The one large file that will probably be read, so that hashing it can begin."""
    names = ("", "model.safetensors", "pytorch_model.bin", "model.weights.h5", "flax_model.msgpack")
    paths = [Path(source, name) for name in names]
    return [path for path in paths if path.is_file()][:1]


def _files(checkpoint: "Checkpoint") -> dict[str, Path]:
    """Every file that a checkpoint is read from, those of a folder by their place in it."""
    found: dict[str, Path] = {}
    tops = (*checkpoint.files, *getattr(checkpoint.aside, "paths", ()))
    for top in tops:
        paths = sorted(p for p in top.rglob("*") if p.is_file()) if top.is_dir() else [top]
        found |= {path.relative_to(top.parent).as_posix(): path for path in paths}
    return found


class Plan(NamedTuple):
    """What is going to be written."""

    architecture: str
    tensors: "Canonical"
    config: "VisualBertConfig"
    checkpoint: "Checkpoint"
    notes: dict[str, tuple[str, ...]]  # what was done -> to which tensors
    files: dict[str, Path]  # that were read, by the names under which they are recorded


def run(args: argparse.Namespace) -> int:
    """Convert, and print what became of every tensor."""
    digests = Digests()
    digests.start(_likely_files(args.src))  # while everything else is imported
    from visualbert.checkpoint.write import shards
    from visualbert.cli.common import counted, megabytes, worded

    dst = Path(args.dst)
    largest = _shard_size(args)
    _refuse_to_overwrite(dst, args.src, args.force)
    plan = _prepare(args)
    _refuse_to_replace(dst, plan.files.values())
    size = write(dst, plan, args, largest, digests)
    files = len(shards(plan.tensors, largest)) if largest else 1
    lines = [
        f"{args.src} → {dst} ({args.to}): {plan.architecture}, "
        f"{counted(len(plan.tensors.specs), 'tensor')}, {megabytes(size)}"
        + (f" in {files} shards" if files > 1 else ""),
        f"  read as: {plan.checkpoint.family.title} ({plan.checkpoint.format})",
        *(f"  {note}: {', '.join(names)}" for note, names in plan.notes.items() if names),
    ]
    print("\n".join(map(worded, lines)))
    return 0


def _shard_size(args: argparse.Namespace) -> int | None:
    if args.max_shard_size is None:
        return None
    found = re.fullmatch(r"([0-9]{1,15})\s*([KMG]I?B)?", args.max_shard_size.strip().upper())
    size = int(found[1]) * _UNITS[found[2] or ""] if found else 0
    if size < 1:
        raise UsageError(f"--max-shard-size {args.max_shard_size!r} is not a size such as 200MB")
    if args.to != "safetensors":
        raise UsageError(f"--max-shard-size splits safetensors; --to {args.to} has one file")
    return size


def _refuse_to_overwrite(dst: Path, src: str, force: bool) -> None:
    from visualbert.checkpoint.write import held_files

    if os.path.lexists(dst) and not dst.is_dir():
        raise UsageError(f"{dst} is a file; DST must be a folder")
    if dst.exists() and (os.path.exists(src) or os.path.isfile(src + ".index")):
        if os.path.isdir(src) and dst.samefile(src):
            raise UsageError(f"{dst} is the source itself; write to another folder")
        if not os.path.isdir(src) and dst.samefile(Path(src).absolute().parent):
            raise UsageError(f"{dst} is the source's own folder; write to another one")
    held = held_files(dst)
    if held and not force:
        raise UsageError(f"{dst} already holds {', '.join(held)}; pass --force to replace it")


def _refuse_to_replace(dst: Path, files: Iterable[Path]) -> None:
    """No file that is read, wherever a link to it leads, may be one that goes."""
    from visualbert.checkpoint.write import held_files

    held = {
        os.path.realpath(dst / name) for name in held_files(dst) if not (dst / name).is_symlink()
    }
    for file in files:
        real = os.path.realpath(file)
        if any(real == name or real.startswith(name + os.sep) for name in held):
            raise UsageError(f"{file} lies in {dst}, where it would be replaced; write elsewhere")


def _open(args: argparse.Namespace) -> tuple["Checkpoint", str]:
    """The checkpoint, and the class that it is or shall become."""
    from visualbert.checkpoint.open import is_bert, open_bert
    from visualbert.cli.common import choose_architecture, open_any, read_changes
    from visualbert.errors import CheckpointError, ConfigError

    try:
        checkpoint = open_any(args)
    except (CheckpointError, ConfigError):  # a BERT is none; nothing is unpacked twice to ask
        if not is_bert(args.src, args.revision):
            raise
    else:
        if args.visual_embedding_dim is not None:
            raise UsageError(f"--visual-embedding-dim is for a BERT; {args.src} is a VisualBERT")
        return checkpoint, choose_architecture(checkpoint, args.architecture)
    if args.architecture is None:
        raise UsageError(
            f"{args.src} is a BERT; say with --architecture which VisualBERT it shall become"
        )
    width = args.visual_embedding_dim
    changes = read_changes(args) | ({} if width is None else {"visual_embedding_dim": width})
    bert = open_bert(
        args.src,
        args.architecture,
        revision=args.revision,
        config=args.config,
        seed=args.seed,
        **changes,
    )
    return bert, args.architecture


def _prepare(args: argparse.Namespace) -> Plan:
    """Canonical tensors under canonical names, the config for them, and what to tell about them."""
    from visualbert.checkpoint.initial import InitialValues
    from visualbert.checkpoint.match import check_ties, match
    from visualbert.checkpoint.tensors import common_dtype
    from visualbert.cli.common import notes_of

    checkpoint, architecture = _open(args)
    config = checkpoint.config
    found = match(checkpoint.tensors, architecture, config, new_head=args.new_head)
    check_ties(checkpoint.tensors, found)
    notes = notes_of(checkpoint, args.architecture)
    notes.setdefault("not needed", found.ignored)
    notes.setdefault("drawn anew", found.fresh)
    notes["tied, kept once"] = tuple(sorted(found.ties))
    if checkpoint.aside is not None:
        notes["kept beside the model"] = tuple(checkpoint.aside.specs)
    chosen = args.dtype or common_dtype(checkpoint.tensors)
    extra = {k: v for k, v in config.extra.items() if k not in ("dtype", "torch_dtype")}
    config = config.replace(architectures=(architecture,), extra={**extra, "dtype": chosen})
    tensors = Canonical(
        checkpoint.tensors, found, InitialValues(architecture, config, args.seed), chosen
    )
    if args.fingerprint is not None:
        notes["pooler"] = (_fingerprint(tensors, args.fingerprint),)
    return Plan(architecture, tensors, config, checkpoint, notes, _files(checkpoint))


def _fingerprint(tensors: "Canonical", source: str) -> str:
    """Whether the pooler, which the original never trained, is that of the BERT at `source`."""
    import numpy as np

    from visualbert.checkpoint.open import open_bert
    from visualbert.schema import PREFIX

    bert = open_bert(source, "VisualBertModel").tensors
    difference = 0.0
    for name in ("pooler.dense.weight", "pooler.dense.bias"):
        own = tensors.read(name if name in tensors.specs else PREFIX + name)
        theirs = bert.read(name)
        if own.shape != theirs.shape:
            return f"is not that of {source}: {own.shape}, not {theirs.shape}"
        gap = np.abs(own.astype(np.float64) - theirs.astype(np.float64)).max()
        difference = max(difference, float(gap))
    if difference:
        return f"is not that of {source}: the largest difference is {difference:.3g}"
    return f"is that of {source}, bit for bit"


class Canonical:
    """`Tensors` under their canonical names and in one type."""

    def __init__(self, tensors: "Tensors", found: "Match", fresh: "Tensors", dtype: str) -> None:
        from visualbert.checkpoint.tensors import Spec

        self.label = tensors.label
        self.dtype = dtype
        self._tensors: Any = tensors
        self._records = hasattr(tensors, "recorded")
        self._found, self._fresh = found, fresh
        self.specs = {name: Spec(spec.shape, dtype) for name, spec in fresh.specs.items()}

    def read(self, name: str) -> "np.ndarray":
        from visualbert.checkpoint.tensors import cast

        source = self._found.sources.get(name)
        array = self._fresh.read(name) if source is None else self._tensors.read(source)
        return cast(array, self.dtype)

    def recorded(self, name: str) -> int | None:
        """The CRC-32 of what `read` gives, where the source records it."""
        source = self._found.sources.get(name)
        known = source is not None and self._tensors.specs[source].dtype == self.dtype
        return self._tensors.recorded(source) if known and self._records else None

    def compared(self) -> list[str]:
        """The source's tensors that whoever writes safetensors compares with their CRC-32."""
        return [s for name, s in self._found.sources.items() if self.recorded(name) is not None]


def write(
    dst: Path, plan: Plan, args: argparse.Namespace, largest: int | None, digests: Digests
) -> int:
    """Write `plan` to `dst`, and remove what was there, all or nothing.

    What is read is compared with its checksum meanwhile, and hashed: the last file to be written
    waits for both, so that damage never comes out under a fresh checksum.

    Returns:
        The bytes of the tensors.
    """
    from visualbert.checkpoint.tensors import total_bytes
    from visualbert.checkpoint.write import held_files, replace_files
    from visualbert.cli.common import byte_progress, verify_checksum

    digests.start(plan.files.values())
    besides = plan.tensors.compared() if args.to == "safetensors" else ()
    sound = _background(verify_checksum, plan.checkpoint, besides)

    def record() -> dict[str, Any]:
        return _record(plan, args.src, digests.of(plan.files))

    def gone() -> list[str]:
        held = held_files(dst)
        if held and not args.force:  # another process was quicker
            raise UsageError(f"{dst} already holds {', '.join(held)}; pass --force to replace it")
        return held

    def write_record(path: Path) -> None:
        sound.result()
        path.write_text(json.dumps(record(), indent=2) + "\n", encoding="utf-8")

    aside = plan.checkpoint.aside
    size = total_bytes(plan.tensors)
    with byte_progress(f"writing {dst}", plan.tensors) as progress:
        writers = _writers(plan, args, largest, progress, record)
        writers[RECORD] = write_record
        replace_files(dst, writers, gone, size + (total_bytes(aside) if aside else 0))
    return size


def _writers(
    plan: Plan, args: argparse.Namespace, largest: int | None, progress: Any, record: Any
) -> dict[str, Any]:
    """Every file but the record, by name."""
    from visualbert.checkpoint.open import DETECTOR, PROCESSOR
    from visualbert.checkpoint.write import write_safetensors
    from visualbert.config import CONFIG_FILE
    from visualbert.schema import parameters

    config, aside = plan.config, plan.checkpoint.aside
    if args.to == "safetensors":
        blank = _record(plan, args.src, dict.fromkeys(plan.files, "0" * 64))
        metadata = _metadata(blank), lambda: _metadata(record())
        writers = _safetensors_writers(plan.tensors, largest, progress, *metadata)
    else:
        name, native = _native(args.to)
        params = parameters(plan.architecture, config)
        writers = {name: lambda path: native(path, plan.tensors, params, progress)}
    if aside is not None:
        writers[DETECTOR] = lambda path: write_safetensors(path, aside)
    for name in PROCESSOR:  # which belong to the model in any format
        own = plan.checkpoint.folder / name
        if own.is_file():
            writers[name] = functools.partial(shutil.copyfile, own)
    text = config.to_json_string()
    writers[CONFIG_FILE] = lambda path: path.write_text(text, encoding="utf-8")
    return writers


def _native(to: str) -> tuple[str, Any]:
    """The file of a format, and the function that writes it."""
    from visualbert.checkpoint.flax_files import MSGPACK, ORBAX, write_msgpack
    from visualbert.checkpoint.keras_files import KERAS, write_keras
    from visualbert.checkpoint.orbax_write import write_orbax
    from visualbert.checkpoint.read import TORCH
    from visualbert.checkpoint.torch_write import write_torch

    return {
        "keras": (KERAS, write_keras),
        "flax": (ORBAX, write_orbax),
        "msgpack": (MSGPACK, write_msgpack),
        "bin": (TORCH, write_torch),
    }[to]


def _safetensors_writers(
    tensors: Canonical,
    largest: int | None,
    progress: Any,
    metadata: dict[str, str],
    later: Callable[[], dict[str, str]],
) -> dict[str, Any]:
    """One file, or several and their index."""
    from visualbert.checkpoint.read import INDEX, SAFETENSORS
    from visualbert.checkpoint.tensors import Selected, total_bytes
    from visualbert.checkpoint.write import shards, write_safetensors

    groups = shards(tensors, largest) if largest else [list(tensors.specs)]
    if len(groups) == 1:
        return {
            SAFETENSORS: lambda path: write_safetensors(path, tensors, progress, metadata, later)
        }
    stem = SAFETENSORS.removesuffix(".safetensors")
    names = [f"{stem}-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    writers: dict[str, Any] = {
        name: lambda path, group=group: write_safetensors(
            path, Selected(tensors, group), progress, metadata, later
        )
        for name, group in zip(names, groups, strict=True)
    }
    places = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
    index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    writers[SAFETENSORS + INDEX] = lambda path: path.write_text(text, encoding="utf-8")
    return writers


def _record(plan: Plan, source: str, digests: dict[str, str]) -> dict[str, Any]:
    """Where a folder came from: what conversion.json holds."""
    from visualbert import __version__

    return {
        "source": source,
        "family": plan.checkpoint.family.title,
        "format": plan.checkpoint.format,
        "sha256": digests,
        "tool": f"visualbert {__version__}",
        "architecture": plan.architecture,
        "dtype": plan.tensors.dtype,
        **{note: list(names) for note, names in plan.notes.items() if names},
    }


def _metadata(record: dict[str, Any]) -> dict[str, str]:
    """`record` as safetensors keeps it: text by name."""
    return {
        f"conversion.{name}": value if isinstance(value, str) else json.dumps(value)
        for name, value in record.items()
    }
