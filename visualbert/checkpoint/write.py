"""Writing checkpoints so that a crash or a full disk leaves what was there before.

Every file is written beside its target and flushed to the disk; when all of them are whole, one
renaming of their folder commits them, and they are moved into place, which an error undoes. A
process that is killed leaves the old files if it had not committed; if it had, whoever opens the
folder next moves the rest. Tensors are written one at a time, so memory holds one of them.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import stat
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
_YOUNG = 60  # seconds


def replace_files(
    folder: str | os.PathLike,
    writers: Mapping[str, Callable[[Path], object]],
    remove: Iterable[str] = (),
    size: int = 0,
) -> None:
    """Write several files of `folder`, all or none.

    Args:
        folder: made where it does not exist.
        writers: file name to a function that writes it at the path it is given. A writer may make a
            directory instead of a file.
        remove: names of what goes when the new files are there.
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
        finish_commits(folder)
        _clear_leftovers(folder)
        _check_space(folder, size)
        with _workspace(folder) as new, _workspace(folder) as old:
            for name, write in writers.items():
                write(new / name)
                _settle(new / name)
            commit = _commit(folder, new, [n for n in remove if n not in writers])
            _swap(folder, commit, old, list(writers))
            _flush(folder)
            shutil.rmtree(commit, ignore_errors=True)
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


def _commit(folder: Path, new: Path, remove: list[str]) -> Path:
    """Rename the folder of whole new files: from here on they are the checkpoint."""
    (new / _REMOVE).write_text(json.dumps(remove), encoding="utf-8")
    _flush(new / _REMOVE)
    _flush(new)
    commit = folder / new.name.replace(_PREFIX, _COMMITTED, 1)
    os.rename(new, commit)
    _flush(folder)
    return commit


def finish_commits(folder: Path) -> None:
    """Move into place what a process that was killed in doing so had committed.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    for commit in sorted(folder.glob(_COMMITTED + "*")):
        lock = _lock(commit)
        if lock is None and fcntl is not None:
            continue  # its process is alive
        try:
            with _workspace(folder) as old:
                names = [path.name for path in commit.iterdir() if path.name != _REMOVE]
                _swap(folder, commit, old, names)
            shutil.rmtree(commit, ignore_errors=True)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: an interrupted write cannot be finished ({error.strerror}); make the "
                "folder writable and try again"
            ) from None
        finally:
            if lock is not None:
                os.close(lock)


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
def _workspace(folder: Path) -> Iterator[Path]:
    """A directory in `folder` for as long as the block lasts, locked as a sign of life."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder) as name:
        lock = _lock(Path(name))
        try:
            yield Path(name)
        finally:
            if lock is not None:
                os.close(lock)


def _clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left: workspaces that nobody holds a lock on."""
    for path in folder.glob(_PREFIX + "*"):
        try:
            young = time.time() - path.stat().st_mtime < _YOUNG  # not locked yet, perhaps
        except OSError:
            continue
        lock = None if young else _lock(path)
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
    """Flush a finished file to the disk, with the mode that the umask gives new files."""
    if not path.is_file():
        return
    probe = path.with_name(path.name + ".mode")
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    os.chmod(path, stat.S_IMODE(os.fstat(descriptor).st_mode))
    os.close(descriptor)
    probe.unlink()
    _flush(path)


def _swap(folder: Path, commit: Path, old: Path, names: list[str]) -> None:
    """Move `names` from `commit` into `folder` and what it lists out of it; undo it all if one
    fails.
    """
    remove = json.loads((commit / _REMOVE).read_text(encoding="utf-8"))
    undo: list[tuple[Path, Path]] = []
    try:
        for name in names:
            if os.path.lexists(folder / name):
                _keep(folder / name, old / name)
                undo.append((old / name, folder / name))
            os.replace(commit / name, folder / name)
            undo.append((folder / name, commit / name))
        for name in remove:
            if os.path.lexists(folder / name):
                os.replace(folder / name, old / name)
                undo.append((old / name, folder / name))
    except BaseException:
        for source, target in reversed(undo):
            with contextlib.suppress(OSError):
                os.replace(source, target)
        shutil.rmtree(commit, ignore_errors=True)
        raise


def _keep(target: Path, backup: Path) -> None:
    """A second name for what `target` holds; a directory cannot have two and is moved."""
    if target.is_dir() and not target.is_symlink():
        os.replace(target, backup)
        return
    try:
        os.link(target, backup, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(target, backup, follow_symlinks=False)


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
) -> None:
    """Write every tensor of `tensors` to `path`, one at a time.

    The metadata carries `format: pt`, which transformers asks for, and a CRC-32 of all data. Equal
    tensors and metadata give equal files.

    Args:
        path: of the file.
        tensors: what to write.
        progress: called with each tensor's bytes.
        metadata: further entries.
    """
    order = sorted(tensors.specs, key=lambda name: (-_itemsize(tensors, name), name))
    entries: dict[str, Any] = {}
    end = 0
    for name in order:
        spec = tensors.specs[name]
        start, end = end, end + math.prod(spec.shape) * _itemsize(tensors, name)
        place = {"shape": spec.shape, "data_offsets": [start, end]}
        entries[name] = {"dtype": CODES[spec.dtype], **place}
    head = {**(metadata or {}), "format": "pt", CHECKSUM: "0" * 8}
    size = len(_header(head, entries))
    checksum = 0
    with open(path, "wb") as file:
        file.seek(size)
        for name in order:
            spec = tensors.specs[name]
            array = np.ascontiguousarray(tensors.read(name), STORED[spec.dtype])
            if array.size != math.prod(spec.shape):
                raise CheckpointError(f"{tensors.label!r}: {name} is not of the shape {spec.shape}")
            data = array.reshape(-1).view(np.uint8).data
            checksum = zlib.crc32(data, checksum)
            file.write(data)
            progress(len(data))
        file.seek(0)
        file.write(_header({**head, CHECKSUM: f"{checksum:08x}"}, entries))


def _itemsize(tensors: Tensors, name: str) -> int:
    return STORED[tensors.specs[name].dtype].itemsize


def _header(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> bytes:
    """The length, and the JSON padded to whole words."""
    head = {"__metadata__": dict(sorted(metadata.items())), **entries}
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
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
        size=total_bytes(tensors),
    )
