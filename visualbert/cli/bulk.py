"""Answers to a file of questions: one line out for every line in, in order, and resumable.

A line that cannot be answered becomes a line that says why, and the rest goes on. Regions of images
are found by as many processes as there are cores while the model answers.
"""

import argparse
import contextlib
import io
import json
import os
import re
import signal
import sys
import warnings
from codecs import BOM_UTF8
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import count, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TextIO

from visualbert.cli.common import count_progress, worded
from visualbert.errors import InputError, UsageError, VisualBertError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from visualbert.answering import Answered, QuestionAnswering
    from visualbert.regions import RegionExtractor

_BATCH = 32  # lines
_AHEAD = 4  # batches whose images are being looked at
_KEPT = 512  # images whose regions are kept for later questions
_FEW = 16  # questions for which no process is worth its start
_LONGEST = 1 << 20  # bytes of a line
_ASKED = ("image", "question")
_PASSED_ON = ("id", "question_id", "image_id")
_EXAMPLE = re.compile(r"(text|regions) (\d+)")  # of a batch, in messages
_CALLED = {"text": "the question", "regions": "the regions"}

Look = Callable[[str | None], Any]


class _Line(NamedTuple):
    """A line of the file, or why it is none."""

    number: int
    values: dict[str, Any]
    error: str = ""


class _Output(NamedTuple):
    """Where answers go, and what is there already: lines, and how many of them failed."""

    file: TextIO
    done: int = 0
    failed: int = 0


def answer_file(args: argparse.Namespace, prepare: Callable[[argparse.Namespace], Any]) -> int:
    """Answer `args.questions`; 1 if a line failed, now or earlier."""
    path = Path(args.questions)
    total = _count_lines(path)
    with contextlib.ExitStack() as stack:
        out = _Output(sys.stdout)
        if args.out is not None:
            out = _opened(Path(args.out), path, stack)
        failed = out.failed
        if out.done < total:
            failed += _answer_rest(args, prepare, out, total, stack)
    where = "" if args.out is None else f" → {args.out}"
    earlier = f", {out.done} of them earlier" if out.done else ""
    print(f"{total} questions{earlier}, {failed} failed{where}", file=sys.stderr)
    return 1 if failed else 0


def _answer_rest(
    args: argparse.Namespace,
    prepare: Callable[[argparse.Namespace], Any],
    out: _Output,
    total: int,
    stack: contextlib.ExitStack,
) -> int:
    """Answer the lines that are left; how many of them failed."""
    from visualbert.cli.answer import as_line

    pipeline, look = prepare(args)
    path, failed = Path(args.questions), 0
    many = args.features is None and total - out.done > _FEW
    eyes: _Eyes | _Store = _Store(look)
    if args.features is None:
        eyes = stack.enter_context(_Eyes(look, path.parent, _workers() if many else 0))
    advance = stack.enter_context(count_progress("answering", total, out.done))
    for batch in _ahead(islice(_read(path), out.done, None), eyes):
        for record in _answer(batch, pipeline, eyes, args.top):
            _write(args, out.file, as_line(record, out.file) + "\n")
            if "error" in record:
                failed += 1
                said = worded(f"{path}, line {record['line']}: {record['error']}")
                print(said, file=sys.stderr)
        _write(args, out.file)
        advance(len(batch))
    return failed


def _write(args: argparse.Namespace, file: TextIO, text: str = "") -> None:
    """Write a line; without one, what is still held back."""
    try:
        file.write(text) if text else file.flush()
    except OSError as error:
        if args.out is None:
            raise
        raise UsageError(
            f"--out {args.out!r}: cannot be written: {error.strerror or error}; the same command "
            "goes on from there"
        ) from None


def _count_lines(path: Path) -> int:
    count, chunk = 0, b"\n"
    try:
        with open(path, "rb") as file:
            while read := file.read(_LONGEST):
                count += read.count(b"\n")
                chunk = read
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    return count + (not chunk.endswith(b"\n"))


def _read(path: Path) -> Iterator[_Line]:
    with open(path, "rb") as file:
        for number in count(1):
            row = part = file.readline(_LONGEST)
            if not row:
                return
            size = len(row)
            while len(part) == _LONGEST and not part.endswith(b"\n"):
                part = file.readline(_LONGEST)
                size += len(part)
            if size > len(row):
                yield _Line(number, {}, f"{size} bytes are too long for a line")
            else:
                yield _parse(number, row.removeprefix(BOM_UTF8) if number == 1 else row)


def _parse(number: int, row: bytes) -> _Line:
    if not row.strip():
        return _Line(number, {}, "the line is empty")
    try:
        values = json.loads(row.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        return _Line(number, {}, f"not readable as JSON: {reason}")
    if not isinstance(values, dict):
        return _Line(number, {}, 'expected an object such as {"image": …, "question": …}')
    wrong = [key for key in _ASKED if not isinstance(values.get(key), str)]
    if wrong:
        return _Line(number, values, f"{wrong[0]!r} is missing or not a string")
    return _Line(number, values)


def _opened(out: Path, questions: Path, stack: contextlib.ExitStack) -> _Output:
    """The file to write to, behind what an earlier run wrote there."""
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {str(out)!r}: there is no such folder")
    if out.exists() and out.samefile(questions):
        raise UsageError(f"--out {str(out)!r} is the file of the questions itself")
    resumable = out.is_file() or not out.exists()  # and no pipe or device
    try:
        file = open(out, "a+b" if resumable else "wb")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"--out {str(out)!r}: cannot be written: {error.strerror}") from None
    stack.callback(_close, file)
    done = failed = 0
    if resumable:
        _lock(file, out)
        done, failed = _done(file, out, questions)
    text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="\n")
    stack.callback(_close, text)
    return _Output(text, done, failed)


def _close(file: IO[Any]) -> None:
    """All that was answered has been flushed, and what could not be has been said."""
    with contextlib.suppress(OSError):
        file.close()


def _lock(file: IO[bytes], out: Path) -> None:
    """Keep other runs from the same file."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"--out {str(out)!r}: another run is writing there") from None
    except OSError:  # a file system without locks
        pass


def _done(file: IO[bytes], out: Path, questions: Path) -> tuple[int, int]:
    """How many lines of an earlier run `file` holds, and how many of them failed; a line that was
    being written is removed.
    """
    end = done = failed = 0
    wrong = UsageError(
        f"{out} exists and does not hold answers to {questions}; remove it, or write elsewhere"
    )
    file.seek(0)
    for line in _read(questions):
        row = file.readline(8 * _LONGEST)
        if not row.endswith(b"\n"):
            start = f'{{"line": {line.number}, '.encode()
            if not (row.startswith(start) or start.startswith(row)):
                raise wrong
            break
        try:
            found = json.loads(row)
            same = found["line"] == line.number
            same &= all(found.get(key) in (None, line.values.get(key)) for key in _ASKED)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise wrong from None
        if not same:
            raise wrong
        end += len(row)
        done += 1
        failed += "error" in found
    else:
        if file.read(1):
            raise wrong
    file.truncate(end)
    file.seek(end)
    return done, failed


class _Store:
    """Regions of images that a detector looked at long ago."""

    def __init__(self, look: Look) -> None:
        self.regions = look

    def begin(self, image: str) -> None:
        """Nothing has to be done ahead."""


class _Eyes:
    """Regions of images, found ahead of time by other processes, and kept for a while.

    Args:
        look: the extractor.
        folder: where images are looked for.
        workers: how many processes; none for 0.
    """

    def __init__(self, look: "RegionExtractor", folder: Path, workers: int) -> None:
        self._look, self._folder, self._workers = look, folder, workers
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._pool = self._started()

    def __enter__(self) -> "_Eyes":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _started(self) -> ProcessPoolExecutor | None:
        if not self._workers:
            return None
        return ProcessPoolExecutor(self._workers, get_context("spawn"), _end_with_parent)

    def begin(self, image: str) -> None:
        """Start to look at an image."""
        if self._pool is None or image in self._kept:
            return
        with _held_back():
            try:
                future = self._pool.submit(_extract, self._look.name, self._found(image))
            except BrokenProcessPool:
                self._restart()
            else:
                self._keep(image, future)

    def regions(self, image: str) -> Any:
        """What there is in it.

        Raises:
            InputError: it is no image.
        """
        try:
            held = self._kept.get(image)
            if isinstance(held, Future):
                held = held.result()
        except BrokenProcessPool:
            self._restart()
            held = None
        if held is None:
            held = self._look(self._found(image))
        self._keep(image, held)
        return held

    def _found(self, image: str) -> str:
        return str(self._folder / image)

    def _keep(self, image: str, held: Any) -> None:
        self._kept[image] = held
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)

    def _restart(self) -> None:
        """Begin anew after somebody ended a process, with which all that was under way is lost."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = self._started()
        under_way = [image for image, held in self._kept.items() if isinstance(held, Future)]
        for image in under_way:
            del self._kept[image]


def _workers() -> int:
    """As many processes as there are cores for this one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Ctrl-C waits, and never comes to the processes that are started meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Have this process end when the one that started it is no more, whatever ended that."""
    parent = parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def _extract(extractor: str, image: str) -> Any:
    from visualbert.regions import get_extractor

    return get_extractor(extractor)(image)


def _ahead(lines: Iterator[_Line], eyes: _Eyes | _Store) -> Iterator[list[_Line]]:
    """The lines in batches; the images of the next few are being looked at meanwhile."""
    waiting: deque[list[_Line]] = deque()
    while True:
        batch = list(islice(lines, _BATCH))
        for line in batch:
            if not line.error:
                eyes.begin(line.values["image"])
        if batch:
            waiting.append(batch)
        if not waiting:
            return
        if not batch or len(waiting) > _AHEAD:
            yield waiting.popleft()


def _answer(
    batch: list[_Line], pipeline: "QuestionAnswering", eyes: _Eyes | _Store, top: int
) -> Iterator[dict[str, Any]]:
    """The record of every line of a batch."""
    errors = {line.number: line.error for line in batch if line.error}
    regions: dict[int, Any] = {}
    for line in batch:
        if not line.error:
            try:
                regions[line.number] = eyes.regions(line.values["image"])
            except VisualBertError as error:
                errors[line.number] = str(error)
    good = [line for line in batch if line.number in regions]
    answered = _ask(good, regions, pipeline, top, errors)
    for line in batch:
        kept = (*_PASSED_ON, *_ASKED) if line.number in errors else _PASSED_ON
        passed = {key: line.values[key] for key in kept if key in line.values}
        if line.number in errors:
            yield {"line": line.number, **passed, "error": errors[line.number]}
        else:
            from visualbert.cli.answer import as_json

            found = as_json(answered[line.number], line.values["image"])
            yield {"line": line.number, **passed, **found}


def _ask(
    lines: list[_Line],
    regions: dict[int, Any],
    pipeline: "QuestionAnswering",
    top: int,
    errors: dict[int, str],
) -> "dict[int, Answered]":
    """Answers by line; where a batch is refused, its halves are asked, to find the one at fault."""
    if not lines:
        return {}
    try:
        with warnings.catch_warnings(record=True) as caught:
            found = pipeline.ask(
                [line.values["question"] for line in lines],
                [regions[line.number] for line in lines],
                top=top,
            )
    except InputError as error:
        if len(lines) == 1:
            errors[lines[0].number] = _worded(str(error))
            return {}
        half = len(lines) // 2
        parts = (lines[:half], lines[half:])
        return {
            number: answer
            for part in parts
            for number, answer in _ask(part, regions, pipeline, top, errors).items()
        }
    for warning in caught:
        said = str(warning.message)
        about = _EXAMPLE.match(said)
        where = f"line {lines[int(about[2])].number}: " if about and about[1] == "text" else ""
        warnings.warn(where + _worded(said), stacklevel=1)
    return {line.number: answer for line, answer in zip(lines, found, strict=True)}


def _worded(message: str) -> str:
    """What is said of an example of a batch, for the line that brought it."""
    return _EXAMPLE.sub(lambda found: _CALLED[found[1]], message, count=1)
