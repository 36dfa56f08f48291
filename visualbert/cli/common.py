"""What the commands share: finding a checkpoint in any format, tables, progress."""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from visualbert.errors import ConfigError, UsageError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from visualbert.backend import Backend
    from visualbert.checkpoint.tensors import Tensors
    from visualbert.pretrained import Checkpoint


def add_source(parser: argparse.ArgumentParser, name: str = "path") -> None:
    """The checkpoint and the options that say how to read it."""
    parser.add_argument(
        name, help="checkpoint folder or file, or Hub id such as uclanlp/visualbert-vqa"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--architecture",
        type=_architecture,
        metavar="CLASS",
        help="class to read it as, where it does not say (VisualBertModel, "
        "VisualBertForPreTraining, …)",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="config.json, or MMF's YAML, in place of its own"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field of the configuration, such as num_attention_heads=12; repeatable",
    )


def _architecture(name: str) -> str:
    from visualbert.schema import ARCHITECTURES, check_architecture

    try:
        return check_architecture(name)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{error}{did_you_mean(name, ARCHITECTURES)}") from None


def open_any(args: argparse.Namespace) -> "Checkpoint":
    """The checkpoint that the options of `add_source` describe."""
    from visualbert.pretrained import open_checkpoint

    if args.config is not None and not os.path.exists(args.config):
        raise UsageError(f"--config {args.config}: no such file")
    source = args.path if "path" in args else args.src
    return open_checkpoint(source, revision=args.revision, config=args.config, **read_changes(args))


def read_changes(args: argparse.Namespace) -> dict[str, Any]:
    """What --set says, values as JSON where they are some.

    Raises:
        UsageError: an entry has no `=`, or its key is no field of the configuration.
    """
    from visualbert.config import VisualBertConfig

    known = [f.name for f in dataclasses.fields(VisualBertConfig) if f.name != "extra"]
    changes = {}
    for entry in args.set:
        key, equals, text = entry.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {entry!r} is not of the form KEY=VALUE")
        key = key.strip()
        if key not in known:
            hint = did_you_mean(key, known, 2, 0.5) or f"; it has {', '.join(known)}"
            raise UsageError(f"--set {key}: the configuration has no such field{hint}")
        try:
            changes[key] = json.loads(text)
        except (ValueError, RecursionError):
            changes[key] = text
    return changes


def load_backend(name: str) -> "Backend":
    """The backend called `name`; what its framework prints while it starts is shown only if it
    fails.
    """
    from visualbert.backend import get_backend

    with quiet_stderr(unless=BaseException):
        return get_backend(name)


@contextlib.contextmanager
def quiet_stderr(unless: type[BaseException] | tuple[()] = ()) -> Iterator[None]:
    """Keep standard error, also that of C++, to itself; write it out after an `unless`.

    After another exception, whose message is all there is to say, threads that are still at work
    have nothing to say either.
    """
    sys.stderr.flush()
    try:
        terminal = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
            sys.unraisablehook = hook
        except unless:
            sys.unraisablehook = hook
            sys.stderr.flush()
            held.seek(0)
            os.write(terminal, held.read())
            raise
        except BaseException:
            logging.getLogger("asyncio").disabled = True
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)


def verify_checksum(checkpoint: "Checkpoint", besides: Collection[str] = ()) -> None:
    """Compare a checkpoint's data with its checksum, if its format has one.

    Args:
        checkpoint: what is read.
        besides: tensors that somebody else compares.

    Raises:
        CheckpointError: they differ.
    """
    check = getattr(checkpoint.tensors, "verify_checksum", None)
    if check is not None:
        check(*([besides] if besides else ()))


def worded(message: str) -> str:
    """A message of the library in the command line's words, without control characters."""
    message = message.replace("pass new_head=True.", "convert it with --new-head.")
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)


def choose_architecture(checkpoint: "Checkpoint", asked: str | None) -> str:
    """The class that the option or else the config names."""
    from visualbert.pretrained import architecture_of

    if asked is not None:
        return asked
    return architecture_of(checkpoint.config, checkpoint.label)


def notes_of(checkpoint: "Checkpoint", asked: str | None) -> dict[str, tuple[str, ...]]:
    """What was done to a checkpoint, and to what; a class that was asked for is not inferred."""
    notes = dict(checkpoint.notes)
    if asked is not None:
        lines = notes.get("inferred", ())
        notes["inferred"] = tuple(x for x in lines if not x.startswith("architecture="))
    return {note: names for note, names in notes.items() if names}


def console(stderr: bool = False) -> "Console":
    """Where tables go: as wide as the terminal, and wide enough for them in a file."""
    from rich.console import Console

    class Pipe(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with the status of a check that failed

    stream = sys.stderr if stderr else sys.stdout
    columns = os.environ.get("COLUMNS", "")
    width = None if stream.isatty() else int(columns) if columns.isdecimal() else 160
    return Pipe(stderr=stderr, width=width, highlight=False, soft_wrap=False)


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
    if not sys.stderr.isatty():
        yield lambda size: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from visualbert.checkpoint.tensors import total_bytes

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task(title, total=total_bytes(tensors))
        yield lambda size: progress.advance(task, size)


@contextlib.contextmanager
def count_progress(title: str, total: int, done: int = 0) -> Iterator[Callable[[int], object]]:
    """A progress bar over things that are counted, on standard error when that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total, completed=done)
        yield lambda count: progress.advance(task, count)


@contextlib.contextmanager
def step_progress(title: str) -> Iterator[Callable[[str], object]]:
    """Names the step at hand on standard error: by a spinner on a terminal, by a line in a log."""
    if not sys.stderr.isatty():
        yield lambda step: print(f"{title}: {step}", file=sys.stderr, flush=True)
        return
    with console(stderr=True).status(title) as status:
        yield lambda step: status.update(f"{title}: {step}")


def counted(count: int, word: str) -> str:
    """A number of things: 1 head, 2 heads."""
    return f"{count} {word}{'s' * (count != 1)}"


def megabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e6:.1f} MB"
