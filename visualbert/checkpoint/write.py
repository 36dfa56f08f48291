"""Writing checkpoints so that a crash or a full disk leaves what was there before.

Every file is written beside its target, flushed to the disk, and only when all of them are whole
are they renamed into place.
"""

import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from visualbert.checkpoint.read import CHECKSUM, SAFETENSORS
from visualbert.checkpoint.tensors import Tensors
from visualbert.config import CONFIG_FILE, VisualBertConfig
from visualbert.errors import CheckpointError


def replace_files(
    folder: str | os.PathLike, writers: Mapping[str, Callable[[Path], object]]
) -> None:
    """Write several files of `folder`, all or none.

    Args:
        folder: made where it does not exist.
        writers: file name to a function that writes it at the path it is given. A writer may make a
            directory instead of a file.

    Raises:
        CheckpointError: the folder cannot be written; what it held is untouched.
    """
    folder = Path(folder)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as temporary:
            for name, write in writers.items():
                path = Path(temporary) / name
                write(path)
                if path.is_file():
                    os.chmod(path, 0o666 & ~_umask())
                    _flush(path)
            for name in writers:
                _swap(Path(temporary) / name, folder / name, Path(temporary))
            _flush(folder)
    except (OSError, SafetensorError) as error:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"cannot write {folder}: {reason}; nothing there was changed"
        ) from error
    except BaseException:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _swap(new: Path, target: Path, temporary: Path) -> None:
    if target.is_dir():
        os.replace(target, temporary / f"{target.name}.old")
    os.replace(new, target)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_safetensors(path: Path, tensors: Tensors, progress: Callable[[int], object]) -> None:
    """Write every tensor of `tensors` to `path`; `progress` is called with each one's bytes.

    The metadata carries `format: pt`, which transformers asks for, and a CRC-32 of the data.
    """
    # safetensors writes the memory as it lies: a transposed view would come out silently wrong.
    arrays = {}
    for name in tensors.specs:
        arrays[name] = np.ascontiguousarray(tensors.read(name)).reshape(tensors.specs[name].shape)
        progress(arrays[name].nbytes)
    # The order in which the library lays tensors out: widest type first, then by name.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    checksum = 0
    for name in order:
        checksum = zlib.crc32(arrays[name].reshape(-1).view(np.uint8), checksum)
    save_file(arrays, path, {"format": "pt", CHECKSUM: f"{checksum:08x}"})


def write_folder(
    folder: str | os.PathLike,
    tensors: Tensors,
    config: VisualBertConfig,
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Write config.json and model.safetensors, a folder that transformers loads too."""
    replace_files(
        folder,
        {
            SAFETENSORS: lambda path: write_safetensors(path, tensors, progress),
            CONFIG_FILE: lambda path: path.write_text(config.to_json_string(), encoding="utf-8"),
        },
    )
