"""`visualbert convert`: from any family of files to the canonical folder or a framework's own."""

import argparse
import contextlib
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from visualbert.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from visualbert.checkpoint.match import Match
    from visualbert.checkpoint.tensors import Tensors
    from visualbert.config import VisualBertConfig
    from visualbert.pretrained import Checkpoint

FORMATS = ("safetensors", "keras", "flax", "msgpack", "bin")
RECORD = "conversion.json"
_SHARDS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
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
    parser.add_argument(
        "--dtype", help="float32, float64, float16 or bfloat16; as in SRC if left out"
    )
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


class Plan(NamedTuple):
    """What is going to be written."""

    architecture: str
    tensors: "Canonical"
    config: "VisualBertConfig"
    checkpoint: "Checkpoint"
    notes: dict[str, tuple[str, ...]]  # what was done -> to which tensors
    digests: dict[str, str]  # SHA-256 of what was read


def run(args: argparse.Namespace) -> int:
    """Convert, and print what became of every tensor."""
    from visualbert.checkpoint.tensors import dtype_name
    from visualbert.cli.common import console, megabytes, worded
    from visualbert.schema import check_architecture

    dst = Path(args.dst)
    if args.dtype is not None:
        dtype_name(args.dtype)  # a wrong one is an error before anything is fetched
    if args.architecture is not None:
        check_architecture(args.architecture)
    largest = _shard_size(args)
    held = _refuse_to_overwrite(dst, args.src, args.force)
    plan = _prepare(args)
    size = write(dst, plan, args.to, held, largest, args.src)
    out = console()
    out.print(
        f"{worded(args.src)} → {worded(str(dst))} ({args.to}): {plan.architecture}, "
        f"{len(plan.tensors.specs)} tensors, {megabytes(size)}",
        soft_wrap=True,
        markup=False,
    )
    kind = f"{plan.checkpoint.family.title} ({plan.checkpoint.format})"
    out.print(f"  read as: {kind}", soft_wrap=True, markup=False)
    for note, names in plan.notes.items():
        if names:
            out.print(worded(f"  {note}: {', '.join(names)}"), soft_wrap=True, markup=False)
    return 0


def _shard_size(args: argparse.Namespace) -> int | None:
    if args.max_shard_size is None:
        return None
    found = re.fullmatch(r"(\d{1,15})\s*([KMG]I?B)?", args.max_shard_size.strip().upper())
    size = int(found[1]) * _UNITS[found[2] or ""] if found else 0
    if size < 1:
        raise UsageError(f"--max-shard-size {args.max_shard_size!r} is not a size such as 200MB")
    if args.to != "safetensors":
        raise UsageError(f"--max-shard-size splits safetensors; --to {args.to} has one file")
    return size


def _refuse_to_overwrite(dst: Path, src: str, force: bool) -> list[str]:
    """The checkpoint files that `dst` holds and that may go."""
    from visualbert.checkpoint.open import DETECTOR, NATIVE
    from visualbert.checkpoint.read import INDEX, SAFETENSORS, TORCH
    from visualbert.config import CONFIG_FILE

    if dst.exists() and not dst.is_dir():
        raise UsageError(f"{dst} is a file; DST must be a folder")
    if dst.exists() and os.path.exists(src):
        if dst.samefile(src):
            raise UsageError(f"{dst} is the source itself; write to another folder")
        if os.path.isfile(src) and dst.samefile(Path(src).absolute().parent):
            raise UsageError(f"{dst} is the source's own folder; write to another one")
    held = [CONFIG_FILE, SAFETENSORS, TORCH, SAFETENSORS + INDEX, TORCH + INDEX, *NATIVE]
    found = [name for name in (*held, DETECTOR, RECORD) if os.path.lexists(dst / name)]
    if found:
        found += sorted(p.name for glob in _SHARDS for p in dst.glob(glob))
    if found and not force:
        raise UsageError(f"{dst} already holds {', '.join(found)}; pass --force to replace it")
    return found


def _prepare(args: argparse.Namespace) -> Plan:
    """Canonical tensors under canonical names, the config for them, and what to tell about them."""
    from visualbert.checkpoint.initial import InitialValues
    from visualbert.checkpoint.match import check_ties, match
    from visualbert.checkpoint.open import is_bert, open_bert
    from visualbert.checkpoint.tensors import common_dtype, dtype_name
    from visualbert.cli.common import choose_architecture, open_any, read_changes, verify_checksum

    if is_bert(args.src, args.revision):
        if args.architecture is None:
            raise UsageError(
                f"{args.src} is a BERT; say with --architecture which VisualBERT it shall become"
            )
        width = args.visual_embedding_dim
        changes = read_changes(args) | ({} if width is None else {"visual_embedding_dim": width})
        architecture = args.architecture
        checkpoint = open_bert(
            args.src, architecture, revision=args.revision, seed=args.seed, **changes
        )
    else:
        if args.visual_embedding_dim is not None:
            raise UsageError(f"--visual-embedding-dim is for a BERT; {args.src} is a VisualBERT")
        checkpoint = open_any(args)
        architecture = choose_architecture(checkpoint, args.architecture)
    config = checkpoint.config
    with ThreadPoolExecutor(1) as pool:  # hashing lets go of Python's lock
        digests = pool.submit(_digest, checkpoint.files)
        verify_checksum(checkpoint)  # or damage would come out under a fresh checksum
    found = match(checkpoint.tensors, architecture, config, new_head=args.new_head)
    check_ties(checkpoint.tensors, found)
    notes = dict(checkpoint.notes)
    notes.setdefault("not needed", found.ignored)
    notes.setdefault("drawn anew", found.fresh)
    if checkpoint.aside is not None:
        notes["kept beside the model"] = tuple(checkpoint.aside.specs)
    chosen = dtype_name(args.dtype) if args.dtype else common_dtype(checkpoint.tensors)
    extra = {k: v for k, v in config.extra.items() if k not in ("dtype", "torch_dtype")}
    config = config.replace(architectures=(architecture,), extra={**extra, "dtype": chosen})
    tensors = Canonical(
        checkpoint.tensors, found, InitialValues(architecture, config, args.seed), chosen
    )
    if args.fingerprint is not None:
        notes["pooler"] = (_fingerprint(tensors, args.fingerprint),)
    return Plan(architecture, tensors, config, checkpoint, notes, digests.result())


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
        self._tensors, self._found, self._fresh = tensors, found, fresh
        self.specs = {name: Spec(spec.shape, dtype) for name, spec in fresh.specs.items()}

    def read(self, name: str) -> "np.ndarray":
        from visualbert.checkpoint.tensors import cast

        source = self._found.sources.get(name)
        array = self._fresh.read(name) if source is None else self._tensors.read(source)
        return cast(array, self.dtype)


def write(
    dst: Path, plan: Plan, to: str, remove: list[str], largest: int | None, source: str
) -> int:
    """Write `plan` to `dst` in the format `to`, and `remove` what was there, all or nothing.

    Returns:
        The bytes of the tensors.
    """
    from visualbert.checkpoint.open import DETECTOR
    from visualbert.checkpoint.tensors import total_bytes
    from visualbert.checkpoint.write import replace_files, write_safetensors
    from visualbert.cli.common import byte_progress, quiet_stderr
    from visualbert.config import CONFIG_FILE
    from visualbert.schema import parameters

    config, aside = plan.config, plan.checkpoint.aside
    record = _record(plan, source)
    with byte_progress(f"writing {dst}", plan.tensors) as progress:
        if to == "safetensors":
            writers = _safetensors_writers(plan.tensors, largest, progress, _metadata(record))
        else:
            name, native = _native(to)
            params = parameters(plan.architecture, config)
            writers = {name: lambda path: native(path, plan.tensors, params, progress)}
        if aside is not None:
            writers[DETECTOR] = lambda path: write_safetensors(path, aside)
        texts = {CONFIG_FILE: config.to_json_string(), RECORD: json.dumps(record, indent=2) + "\n"}
        for name, text in texts.items():
            writers[name] = lambda path, text=text: path.write_text(text, encoding="utf-8")
        size = total_bytes(plan.tensors)
        with quiet_stderr() if to == "flax" else contextlib.nullcontext():
            replace_files(dst, writers, remove, size + (total_bytes(aside) if aside else 0))
    return size


def _native(to: str) -> tuple[str, Any]:
    """The file of a format, and the function that writes it."""
    from visualbert.checkpoint.flax_files import MSGPACK, ORBAX, write_msgpack, write_orbax
    from visualbert.checkpoint.keras_files import KERAS, write_keras
    from visualbert.checkpoint.read import TORCH
    from visualbert.checkpoint.torch_files import write_torch

    return {
        "keras": (KERAS, write_keras),
        "flax": (ORBAX, write_orbax),
        "msgpack": (MSGPACK, write_msgpack),
        "bin": (TORCH, write_torch),
    }[to]


def _safetensors_writers(
    tensors: Canonical, largest: int | None, progress: Any, metadata: dict[str, str]
) -> dict[str, Any]:
    """One file, or several and their index."""
    from visualbert.checkpoint.read import INDEX, SAFETENSORS
    from visualbert.checkpoint.tensors import Selected, total_bytes
    from visualbert.checkpoint.write import shards, write_safetensors

    groups = shards(tensors, largest) if largest else [list(tensors.specs)]
    if len(groups) == 1:
        return {SAFETENSORS: lambda path: write_safetensors(path, tensors, progress, metadata)}
    stem = SAFETENSORS.removesuffix(".safetensors")
    names = [f"{stem}-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    writers: dict[str, Any] = {
        name: lambda path, group=group: write_safetensors(
            path, Selected(tensors, group), progress, metadata
        )
        for name, group in zip(names, groups, strict=True)
    }
    places = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
    index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    writers[SAFETENSORS + INDEX] = lambda path: path.write_text(text, encoding="utf-8")
    return writers


def _record(plan: Plan, source: str) -> dict[str, Any]:
    """Where a folder came from: what conversion.json holds."""
    from visualbert import __version__

    return {
        "source": source,
        "family": plan.checkpoint.family.title,
        "format": plan.checkpoint.format,
        "sha256": plan.digests,
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


def _digest(files: tuple[Path, ...]) -> dict[str, str]:
    """SHA-256 of every file, those of a folder by their place in it."""
    found = {}
    for top in files:
        paths = sorted(p for p in top.rglob("*") if p.is_file()) if top.is_dir() else [top]
        for path in paths:
            with open(path, "rb") as file:
                name = path.relative_to(top.parent).as_posix()
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
