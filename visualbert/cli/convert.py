"""`visualbert convert`: between the canonical folder and each framework's own files."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visualbert.errors import UsageError

# Format -> the backend that writes it; the canonical folder is written by none.
FORMATS = {"safetensors": None, "bin": "pt", "keras": "tf", "flax": "flax"}
_SHARDS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")


def register(commands: Any) -> None:
    """Add the command to the parser."""
    from visualbert.cli.common import add_source

    parser = commands.add_parser(
        "convert",
        help="convert between safetensors, Keras, Orbax and PyTorch files",
        description="Convert a checkpoint. SRC may be a canonical folder, one that this command "
        "wrote in another format, or a BERT, which becomes a VisualBERT that starts from it "
        "(--architecture says which).",
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
    parser.set_defaults(run=run)


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
    held = _refuse_to_overwrite(dst, args.src, args.force)
    tensors, config, notes = _prepare(args)
    size = write(dst, tensors, config, args.to, remove=held)
    out = console()
    out.print(
        f"{worded(args.src)} → {worded(str(dst))} ({args.to}): {config.architectures[0]}, "
        f"{len(tensors.specs)} tensors, {megabytes(size)}",
        soft_wrap=True,
        markup=False,
    )
    for note, names in notes.items():
        if names:
            out.print(f"  {note}: {', '.join(names)}", soft_wrap=True, markup=False)
    return 0


def _refuse_to_overwrite(dst: Path, src: str, force: bool) -> list[str]:
    """The checkpoint files that `dst` holds and that may go."""
    from visualbert.checkpoint.read import INDEX, SAFETENSORS, TORCH
    from visualbert.cli.common import NATIVE
    from visualbert.config import CONFIG_FILE

    if dst.exists() and not dst.is_dir():
        raise UsageError(f"{dst} is a file; DST must be a folder")
    if dst.exists() and os.path.exists(src) and dst.samefile(src):
        raise UsageError(f"{dst} is the source itself; write to another folder")
    held = [CONFIG_FILE, SAFETENSORS, TORCH, SAFETENSORS + INDEX, TORCH + INDEX, *NATIVE.values()]
    found = [name for name in held if os.path.lexists(dst / name)]
    if found:
        found += sorted(p.name for glob in _SHARDS for p in dst.glob(glob))
    if found and not force:
        raise UsageError(f"{dst} already holds {', '.join(found)}; pass --force to replace it")
    return found


def _prepare(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Canonical tensors under canonical names, the config for them, and what to tell about them."""
    from visualbert.checkpoint.initial import InitialValues
    from visualbert.checkpoint.match import check_ties, match
    from visualbert.checkpoint.tensors import common_dtype, dtype_name
    from visualbert.checkpoint.warm_start import WarmStart
    from visualbert.cli.common import choose_architecture, open_any, verify_checksum
    from visualbert.config import CONFIG_FILE, MODEL_TYPE, read_json_object
    from visualbert.pretrained import find_folder, open_bert

    folder = find_folder(args.src, args.revision)
    values = read_json_object(folder / CONFIG_FILE)
    notes: dict[str, Any] = {}
    if values.get("model_type", MODEL_TYPE) == "bert":
        if args.architecture is None:
            raise UsageError(
                f"{args.src} is a BERT; say with --architecture which VisualBERT it shall become"
            )
        width = args.visual_embedding_dim
        changes = {} if width is None else {"visual_embedding_dim": width}
        checkpoint = open_bert(folder, args.architecture, seed=args.seed, **changes)
        architecture = args.architecture
        start = checkpoint.tensors
        assert isinstance(start, WarmStart)
        notes = {
            "copied from the text tables": start.derived,
            "drawn anew": start.fresh,
            "not needed": start.ignored,
        }
    else:
        if args.visual_embedding_dim is not None:
            raise UsageError(f"--visual-embedding-dim is for a BERT; {args.src} is a VisualBERT")
        checkpoint = open_any(args.src, args.revision)
        architecture = choose_architecture(checkpoint, args.architecture)
    config = checkpoint.config
    verify_checksum(checkpoint)  # or damage would come out under a fresh checksum
    found = match(checkpoint.tensors, architecture, config, new_head=args.new_head)
    check_ties(checkpoint.tensors, found)
    notes.setdefault("not needed", found.ignored)
    notes.setdefault("drawn anew", found.fresh)
    chosen = dtype_name(args.dtype) if args.dtype else common_dtype(checkpoint.tensors)
    extra = {k: v for k, v in config.extra.items() if k not in ("dtype", "torch_dtype")}
    config = config.replace(architectures=(architecture,), extra={**extra, "dtype": chosen})
    fresh = InitialValues(architecture, config, args.seed)
    return Canonical(checkpoint.tensors, found, fresh, chosen), config, notes


class Canonical:
    """`Tensors` under their canonical names and in one type."""

    def __init__(self, tensors: Any, found: Any, fresh: Any, dtype: str) -> None:
        from visualbert.checkpoint.tensors import Spec

        self.label = tensors.label
        self.dtype = dtype
        self._tensors, self._found, self._fresh = tensors, found, fresh
        self.specs = {name: Spec(fresh.specs[name].shape, dtype) for name in fresh.specs}

    def read(self, name: str) -> Any:
        from visualbert.checkpoint.tensors import cast

        source = self._found.sources.get(name)
        array = self._fresh.read(name) if source is None else self._tensors.read(source)
        return cast(array, self.dtype)


def write(dst: Path, tensors: Any, config: Any, to: str, remove: Iterable[str] = ()) -> int:
    """Write `tensors` to `dst` in the format `to`, and `remove` what was there, all or nothing; the
    bytes that were written.
    """
    from visualbert.checkpoint.tensors import total_bytes
    from visualbert.checkpoint.write import replace_files, write_safetensors
    from visualbert.cli.common import byte_progress, load_backend, quiet_stderr
    from visualbert.config import CONFIG_FILE
    from visualbert.pretrained import fill

    def write_config(path: Path) -> None:
        path.write_text(config.to_json_string(), encoding="utf-8")

    name = FORMATS[to]
    with byte_progress(f"writing {dst}", tensors) as progress:
        if name is None:
            from visualbert.checkpoint.read import SAFETENSORS

            writers: dict[str, Any] = {
                SAFETENSORS: lambda path: write_safetensors(path, tensors, progress)
            }
        else:
            backend = load_backend(name)
            with quiet_stderr():
                model = backend.create(config.architectures[0], config, tensors.dtype)
            fill(backend, model, _Counted(tensors, progress))

            def save(path: Path) -> None:
                with quiet_stderr():
                    backend.save_native(model, path)

            writers = {backend.native: save}
        size = total_bytes(tensors)
        replace_files(dst, {**writers, CONFIG_FILE: write_config}, remove, size)
    return size


class _Counted:
    """`Tensors` that tell a progress bar what was read."""

    def __init__(self, tensors: Any, progress: Any) -> None:
        self.label, self.specs = tensors.label, tensors.specs
        self._tensors, self._progress = tensors, progress

    def read(self, name: str) -> Any:
        array = self._tensors.read(name)
        self._progress(array.nbytes)
        return array
