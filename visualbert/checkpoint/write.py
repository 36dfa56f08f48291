"""Writing checkpoints so that a crash or a full disk leaves what was there before.

Every file is written beside its target, flushed to the disk, and only when all of them are whole
are they renamed into place, which an error undoes. What a killed process leaves is removed by the
next one that writes there.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from visualbert.checkpoint.read import CHECKSUM, SAFETENSORS, add_to_checksum
from visualbert.checkpoint.tensors import DTYPES, Tensors, total_bytes
from visualbert.config import CONFIG_FILE, VisualBertConfig
from visualbert.errors import CheckpointError, VisualBertError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".writing-"
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
        _clear_leftovers(folder)
        _check_space(folder, size)
        with _workspace(folder) as new, _workspace(folder) as old:
            for name, write in writers.items():
                write(new / name)
                _settle(new / name)
            _swap(folder, new, old, list(writers), [n for n in remove if n not in writers])
            _flush(folder)
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


def _swap(folder: Path, new: Path, old: Path, names: list[str], remove: list[str]) -> None:
    """Move `names` from `new` into `folder` and `remove` out of it; undo it all if one fails."""
    undo: list[tuple[Path, Path]] = []
    try:
        for name in names:
            if os.path.lexists(folder / name):
                _keep(folder / name, old / name)
                undo.append((old / name, folder / name))
            os.replace(new / name, folder / name)
            undo.append((folder / name, new / name))
        for name in remove:
            if os.path.lexists(folder / name):
                os.replace(folder / name, old / name)
                undo.append((old / name, folder / name))
    except BaseException:
        for source, target in reversed(undo):
            with contextlib.suppress(OSError):
                os.replace(source, target)
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


def write_safetensors(path: Path, tensors: Tensors, progress: Callable[[int], object]) -> None:
    """Write every tensor of `tensors` to `path`; `progress` is called with each one's bytes.

    The metadata carries `format: pt`, which transformers asks for, and a CRC-32 of the tensors in
    the order of their names, which is not always that of the file.
    """
    # safetensors writes the memory as it lies: a transposed view would come out silently wrong.
    arrays = {}
    for name, spec in tensors.specs.items():
        native = DTYPES.get(spec.dtype)  # in this machine's byte order, as the checksum assumes
        arrays[name] = np.ascontiguousarray(tensors.read(name), native).reshape(spec.shape)
        progress(arrays[name].nbytes)
    checksum = 0
    for name in sorted(arrays):
        checksum = add_to_checksum(checksum, arrays[name])
    save_file(arrays, path, {"format": "pt", CHECKSUM: f"{checksum:08x}"})
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Order the metadata, which the library writes at random: equal models, equal files."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


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
