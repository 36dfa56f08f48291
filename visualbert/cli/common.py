"""What the commands share: finding a checkpoint in any format, tables, progress."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visualbert.errors import CheckpointError

if TYPE_CHECKING:
    from rich.console import Console

    from visualbert.checkpoint.tensors import Tensors
    from visualbert.pretrained import Checkpoint


def add_source(parser: argparse.ArgumentParser, name: str = "path") -> None:
    """The checkpoint and the options that say how to read it."""
    parser.add_argument(name, help="checkpoint folder, or Hub id such as uclanlp/visualbert-vqa")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--architecture",
        metavar="CLASS",
        help="class to read it as, where config.json does not say (VisualBertModel, "
        "VisualBertForPreTraining, …)",
    )


def open_any(source: str, revision: str | None = None) -> "Checkpoint":
    """A checkpoint in the canonical format or in a framework's own.

    Raises:
        CheckpointError: the folder holds neither.
    """
    from visualbert.backend import backend_names, get_backend
    from visualbert.checkpoint.read import find_weights
    from visualbert.config import VisualBertConfig
    from visualbert.pretrained import (
        Checkpoint,
        ModelTensors,
        architecture_of,
        find_folder,
        open_checkpoint,
    )

    folder = find_folder(source, revision)
    try:
        find_weights(folder)
    except CheckpointError:
        name = next((n for n, file in NATIVE.items() if (folder / file).exists()), None)
        if name is None:
            raise
        assert name in backend_names()
        config = VisualBertConfig.from_pretrained(folder)
        backend = get_backend(name)
        dtype = config.extra.get("dtype") or "float32"
        model = backend.create(architecture_of(config, source), config, dtype)
        backend.load_native(model, folder / NATIVE[name])
        return Checkpoint(source, config, ModelTensors(backend, model), folder)
    return open_checkpoint(source, revision=revision)


# File or folder of a framework's own format. The canonical folder needs no framework.
NATIVE = {"tf": "model.weights.h5", "flax": "orbax"}


def choose_architecture(checkpoint: "Checkpoint", asked: str | None) -> str:
    """The class that the option or else the config names."""
    from visualbert.pretrained import architecture_of
    from visualbert.schema import check_architecture

    if asked is not None:
        return check_architecture(asked)
    return architecture_of(checkpoint.config, checkpoint.label)


def console(stderr: bool = False) -> "Console":
    """Where tables go: as wide as the terminal, and wide enough for them in a file."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else int(os.environ.get("COLUMNS", 120))
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Any:
    """An empty table in the one style of this command line."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


@contextlib.contextmanager
def byte_progress(title: str, tensors: "Tensors") -> Iterator[Callable[[int], object]]:
    """A progress bar over the bytes of `tensors`, on standard error when that is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    total = sum(spec_bytes(spec) for spec in tensors.specs.values())
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task(title, total=total)
        yield lambda size: progress.advance(task, size)


@contextlib.contextmanager
def step_progress(title: str) -> Iterator[Callable[[str], object]]:
    """A spinner that names the step at hand, on standard error when that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    with console(stderr=True).status(title) as status:
        yield lambda step: status.update(f"{title}: {step}")


def spec_bytes(spec: Any) -> int:
    """Bytes of a tensor from its spec."""
    import math

    import ml_dtypes
    import numpy as np

    dtype = ml_dtypes.bfloat16 if spec.dtype == "bfloat16" else np.dtype(spec.dtype)
    return math.prod(spec.shape) * np.dtype(dtype).itemsize


def megabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e6:.1f} MB"


def show_path(path: Path) -> str:
    """A path as the user would write it."""
    return os.fspath(path)
