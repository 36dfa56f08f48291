"""Writing checkpoints so that a crash or a full disk leaves what was there before.

Every file is written beside its target and flushed to the disk; when all of them are whole, one
renaming of their folder commits them, and they are moved into place, which an error undoes. A
process that is killed leaves the old files if it had not committed; if it had, whoever opens the
folder next moves the rest, and until then config.json is missing for readers that know nothing of
this. Tensors are written one at a time, so memory holds one of them.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import stat
import struct
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from visualbert.checkpoint.pieces import joined
from visualbert.checkpoint.read import CHECKSUM, CODES, SAFETENSORS
from visualbert.checkpoint.tensors import STORED, Tensors, total_bytes
from visualbert.config import CONFIG_FILE, VisualBertConfig
from visualbert.errors import CheckpointError, VisualBertError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".writing-"
_COMMITTED = ".commit-"
_REMOVE = ".remove.json"  # in a commit: names that go
_OLD = ".old"  # in a commit: what went
_PATIENCE = 60  # seconds
_BLOCK = 1 << 20  # bytes
_AHEAD = 16  # blocks whose checksum is still to come
_FLUSHED = 1 << 26  # bytes at a time
RECORD = "conversion.json"
_OURS = re.compile(  # the files of a checkpoint in any format
    r"(config|conversion)\.json|model\.weights\.h5|flax_model\.msgpack|orbax|"
    r"(model|pytorch_model|detector)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
_BESIDE = re.compile(  # and what else is written through `replace_files`
    r"(processor_config|tokenizer|tokenizer_config)\.json|vocab\.txt|.+\.safetensors"
)
_ALIGNMENT = 64  # bytes; TensorFlow's, the largest


def replace_files(
    folder: str | os.PathLike,
    writers: Mapping[str, Callable[[Path], object]],
    remove: Iterable[str] | Callable[[], Iterable[str]] = (),
    size: int = 0,
) -> None:
    """Write several files of `folder`, all or none.

    Args:
        folder: made where it does not exist.
        writers: file name to a function that writes it at the path it is given. A writer may make a
            directory instead of a file.
        remove: names of what goes when the new files are there, or a function that lists them when
            no other process can change the folder any more.
        size: bytes that the writers need about; refused at once where there are fewer.

    Raises:
        CheckpointError: the folder cannot be written; what it held is untouched.
    """
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    if not missing and not folder.is_dir():
        raise CheckpointError(f"cannot write {folder}: it is not a folder; nothing was changed")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _finish(folder)
            _clear_leftovers(folder)
        _check_space(folder, size)
        with _workspace(folder) as new:
            for name, write in writers.items():
                write(new / name)
                _settle(new / name)
            with _alone(folder):
                _finish(folder)
                gone = remove() if callable(remove) else remove
                _replace(folder, new, [name for name in gone if name not in writers])
    except VisualBertError:
        raise
    except Exception as error:  # a full disk is another exception in every framework's writer
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0]
        raise CheckpointError(
            f"cannot write {folder}: {reason}; nothing there was changed"
        ) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()  # empty only where writing failed


def held_files(folder: Path) -> list[str]:
    """The names in `folder` that belong to a checkpoint of any format."""
    try:
        return sorted(name for name in os.listdir(folder) if _OURS.fullmatch(name))
    except OSError:  # it is not there, or cannot be read: writing will say so
        return []


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and bool(_OURS.fullmatch(name) or _BESIDE.fullmatch(name))


def _replace(folder: Path, new: Path, remove: list[str]) -> None:
    """Commit the whole new files in `new` and move them into place; undo it all if that fails."""
    names = os.listdir(new)
    (new / _OLD).mkdir()
    (new / _REMOVE).write_text(json.dumps(remove), encoding="utf-8")
    _flush(new / _REMOVE)
    _flush(new)
    commit = folder / new.name.replace(_PREFIX, _COMMITTED, 1)
    undo: list[tuple[Path, Path]] = []
    try:
        os.rename(new, commit)  # from here on they are the checkpoint
        _flush(folder)
        _swap(folder, commit, names, remove, undo)
        _flush(folder)
        os.rename(commit, new)  # what it holds now is what went
    except BaseException:
        with contextlib.suppress(OSError):
            os.rename(new, commit)
        for source, target in reversed(undo):
            with contextlib.suppress(OSError):
                os.replace(source, target)
        with contextlib.suppress(OSError):
            os.rename(commit, new)
        raise


def finish_commits(folder: Path) -> None:
    """Move into place what a process that was killed in doing so had committed, and wait for one
    that is doing so.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    if not os.path.isdir(folder) or not any(folder.glob(_COMMITTED + "*")):
        return
    try:
        with _alone(folder):
            _finish(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: an interrupted write cannot be finished ({error.strerror}); make the "
            "folder writable and try again"
        ) from None


def _finish(folder: Path) -> None:
    """As `finish_commits`, where no other process can be at work."""
    for commit in sorted(folder.glob(_COMMITTED + "*")):
        names = _still_to_move(folder, commit)
        remove = _removals(commit)
        if names:  # or all has been moved, and what is there now may be newer
            (commit / _OLD).mkdir(exist_ok=True)
            _swap(folder, commit, names, remove, [])
            _flush(folder)
        done = folder / commit.name.replace(_COMMITTED, _PREFIX, 1)
        os.rename(commit, done)
        shutil.rmtree(done, ignore_errors=True)


def _still_to_move(folder: Path, commit: Path) -> list[str]:
    """The files in a commit; in a downloaded one they can replace nothing but a checkpoint's."""
    if commit.is_symlink() or not commit.is_dir() or (commit / _OLD).is_symlink():
        raise _foreign(commit)
    names = [name for name in os.listdir(commit) if name not in (_REMOVE, _OLD)]
    for name in names:
        if name.startswith(".") or (os.path.lexists(folder / name) and not _is_ours(name)):
            raise _foreign(commit)
    return names


def _removals(commit: Path) -> list[str]:
    """What a commit lists; nothing but files of checkpoints can be meant."""
    try:
        with open(commit / _REMOVE, encoding="utf-8") as file:
            found = json.loads(file.read(1 << 20))
    except (FileNotFoundError, ValueError, RecursionError):
        raise _foreign(commit) from None
    if not isinstance(found, list) or not all(map(_is_ours, found)):
        raise _foreign(commit)
    return found


def _foreign(commit: Path) -> CheckpointError:
    return CheckpointError(
        f"{commit}: it is named like an interrupted write and is none of this package; remove it"
    )


def _check_space(folder: Path, size: int) -> None:
    """Say beforehand that the disk is too small: not every framework's writer survives it."""
    disk = shutil.disk_usage(folder)
    need = size + size // 50 + 2**16
    if size and disk.total and disk.free < need:
        raise OSError(
            errno.ENOSPC,
            f"it needs {need / 1e6:.1f} MB and the disk has {disk.free / 1e6:.1f} MB left",
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process that asks for it too moves files of `folder` while the block lasts.

    Raises:
        CheckpointError: another one does not come to an end.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        end = time.monotonic() + _PATIENCE
        while not _locked(descriptor):
            if time.monotonic() > end:
                raise CheckpointError(
                    f"{folder}: another process has been writing it for {_PATIENCE} seconds; try "
                    "again when it has ended"
                )
            time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Whether the lock is ours now; a file system without locks has it for everyone."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """A directory in `folder` for as long as the block lasts, locked as a sign of life."""
    with _alone(folder):
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        lock = _lock(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left: workspaces that nobody holds a lock on."""
    for path in folder.glob(_PREFIX + "*"):
        lock = _lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock on a directory until it is closed; None if it cannot."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by a live process, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _settle(path: Path) -> None:
    """Flush a finished file or directory to the disk; a file has the mode that the umask gives."""
    if path.is_dir():
        for inner in sorted(path.rglob("*")):
            _flush(inner)
        _flush(path)
        return
    probe = path.with_name(path.name + ".mode")
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    os.chmod(path, stat.S_IMODE(os.fstat(descriptor).st_mode))
    os.close(descriptor)
    probe.unlink()
    _flush(path)


def _swap(
    folder: Path, commit: Path, names: list[str], remove: list[str], undo: list[tuple[Path, Path]]
) -> None:
    """Move `names` from `commit` into `folder` and `remove` out of it; `undo` lists what was moved.

    config.json leaves first and comes last: a reader that knows nothing of commits finds no model
    rather than a mix of two.
    """
    names = sorted(names, key=lambda name: (name == CONFIG_FILE, name))
    first = [CONFIG_FILE] if names[-1:] == [CONFIG_FILE] and len(names) + len(remove) > 1 else []
    old = commit / _OLD
    for name in (*first, *remove):
        if os.path.lexists(folder / name):
            undo.append((old / name, folder / name))
            _discard(old / name)
            os.replace(folder / name, old / name)
    for name in names:
        if os.path.lexists(folder / name):
            undo.append((old / name, folder / name))
            _keep(folder / name, old / name)
        undo.append((folder / name, commit / name))
        os.replace(commit / name, folder / name)


def _keep(target: Path, backup: Path) -> None:
    """A second name for what `target` holds; a directory cannot have two and is moved."""
    _discard(backup)
    if target.is_dir() and not target.is_symlink():
        os.replace(target, backup)
        return
    try:
        os.link(target, backup, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(target, backup, follow_symlinks=False)


def _discard(path: Path) -> None:
    """Remove what an earlier attempt at the same commit has put here."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_safetensors(
    path: Path,
    tensors: Tensors,
    progress: Callable[[int], object] = lambda size: None,
    metadata: Mapping[str, str] | None = None,
    later: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Write every tensor of `tensors` to `path`, one at a time.

    The metadata carries `format: pt`, which transformers asks for, and a CRC-32 of all data. Equal
    tensors and metadata give equal files.

    Args:
        path: of the file.
        tensors: what to write.
        progress: called with each tensor's bytes.
        metadata: further entries.
        later: what these are when the tensors have been written; as long as they are now.
    """
    order = sorted(tensors.specs, key=lambda name: (-_itemsize(tensors, name), name))
    entries: dict[str, Any] = {}
    end = 0
    for name in order:
        spec = tensors.specs[name]
        start, end = end, end + math.prod(spec.shape) * _itemsize(tensors, name)
        place = {"shape": spec.shape, "data_offsets": [start, end]}
        entries[name] = {"dtype": CODES[spec.dtype], **place}
    own = {"format": "pt", CHECKSUM: "0" * 8}
    blank = _header({**(metadata or {}), **own}, entries)
    recorded = getattr(tensors, "recorded", lambda name: None)
    with open(path, "wb") as file, _Beside(file, tensors.label) as beside:
        file.write(blank)
        for name in order:
            spec = tensors.specs[name]
            array = np.ascontiguousarray(tensors.read(name), STORED[spec.dtype])
            if array.size != math.prod(spec.shape):
                raise CheckpointError(f"{tensors.label!r}: {name} is not of the shape {spec.shape}")
            data = array.reshape(-1).view(np.uint8).data
            for at in range(0, len(data), _BLOCK):
                beside.take(data[at : at + _BLOCK])
                file.write(data[at : at + _BLOCK])
            beside.end(name, recorded(name))
            progress(len(data))
        own[CHECKSUM] = f"{beside.checksum():08x}"
        header = _header({**(later() if later else metadata or {}), **own}, entries)
        assert len(header) == len(blank)
        file.seek(0)
        file.write(header)


class _Beside:
    """What need not hold up writing, done beside it: the checksum, and the way to the disk."""

    def __init__(self, file: BinaryIO, label: str) -> None:
        self._file, self._label = file, label
        self._adder, self._flusher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._sums: deque[Future[None]] = deque()
        self._flush: Future[None] | None = None
        self._whole = self._part = self._size = 0  # CRC-32s, and the bytes in the part
        self._written = 0

    def __enter__(self) -> "_Beside":
        return self

    def __exit__(self, *error: object) -> None:
        self._adder.shutdown()
        self._flusher.shutdown()

    def take(self, data: memoryview) -> None:
        """Add `data` to the checksum, and begin to flush what was written before it."""
        if len(self._sums) >= _AHEAD:
            self._sums.popleft().result()
        self._sums.append(self._adder.submit(self._add, data))
        if self._written >= _FLUSHED and (self._flush is None or self._flush.done()):
            self._settle()
            self._flush = self._flusher.submit(os.fsync, self._file.fileno())
            self._written = 0
        self._written += len(data)

    def end(self, name: str, recorded: int | None) -> None:
        """A tensor is whole; its source records this CRC-32 of it, if any."""
        self._sums.append(self._adder.submit(self._end, name, recorded))

    def _add(self, data: memoryview) -> None:
        self._part = zlib.crc32(data, self._part)
        self._size += len(data)

    def _end(self, name: str, recorded: int | None) -> None:
        if recorded not in (None, self._part):
            raise CheckpointError(
                f"{self._label}: the data has changed since it was written (CRC-32 of {name}); "
                "fetch or convert the checkpoint again"
            )
        self._whole = joined(self._whole, self._part, self._size)
        self._part = self._size = 0

    def _settle(self) -> None:
        if self._flush is not None:
            self._flush.result()

    def checksum(self) -> int:
        """The CRC-32 of all that was taken.

        Raises:
            OSError: a part could not be flushed.
            CheckpointError: a tensor is not what its source records.
        """
        while self._sums:
            self._sums.popleft().result()
        self._settle()
        return self._whole


def _itemsize(tensors: Tensors, name: str) -> int:
    return STORED[tensors.specs[name].dtype].itemsize


def _header(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> bytes:
    """The length, and the JSON padded so that the data can be used in place by every framework."""
    head = {"__metadata__": dict(sorted(metadata.items())), **entries}
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT - 8)
    return struct.pack("<Q", len(text)) + text


def shards(tensors: Tensors, largest: int) -> list[list[str]]:
    """Names in groups of at most `largest` bytes, in order; a larger tensor has one of its own."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, spec in tensors.specs.items():
        size = math.prod(spec.shape) * STORED[spec.dtype].itemsize
        if groups[-1] and held + size > largest:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def write_folder(
    folder: str | os.PathLike,
    tensors: Tensors,
    config: VisualBertConfig,
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Write config.json and model.safetensors, a folder that transformers loads too."""
    text = config.to_json_string()
    replace_files(
        folder,
        {
            SAFETENSORS: lambda path: write_safetensors(path, tensors, progress),
            CONFIG_FILE: lambda path: path.write_text(text, encoding="utf-8"),
        },
        remove=[RECORD],  # it was of other weights
        size=total_bytes(tensors),
    )
