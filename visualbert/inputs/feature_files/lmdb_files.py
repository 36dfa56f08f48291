"""MMF's LMDB files: under an image's path or number the pickle of a dictionary.

The file is mapped by its library and opened without a lock, so that it may lie on a disk that
cannot be written. Source: MMF's feature_readers.py and tools/scripts/features/lmdb_conversion.py.
"""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from visualbert.errors import InputError, MissingBackendError
from visualbert.inputs.feature_files import pickled
from visualbert.inputs.feature_files.records import regions_of
from visualbert.inputs.feature_files.store import FeatureStore, words
from visualbert.inputs.regions import Regions

_FILE = "data.mdb"
_MAGIC = bytes.fromhex("dec0efbe")  # behind the header of the first page
_KEYS = b"keys"  # a pickled list of the others
_LONGEST = 511  # bytes of a key
# The library opens a file once in a process; it is closed when the last store lets go of it.
_OPENED: WeakValueDictionary[str, Any] = WeakValueDictionary()
_LOCK = threading.Lock()


class LmdbStore(FeatureStore):
    """A folder with `data.mdb`, or such a file alone."""

    form = "LMDB file"

    @staticmethod
    def recognises(path: Path, head: bytes) -> bool:
        return (path / _FILE).is_file() if path.is_dir() else head[16:20] == _MAGIC

    def _open(self) -> None:
        try:
            import lmdb
        except ImportError:
            raise MissingBackendError(
                f"{self.path}: LMDB files need lmdb: pip install visualbert[features]"
            ) from None
        self._lmdb = lmdb
        self._check_whole()
        self._environment = self._connect()
        with self._begin() as look:
            self._entries = look.stat()["entries"] - (look.get(_KEYS) is not None)

    def _check_whole(self) -> None:
        """A file that has been cut short would end the process, for it is mapped."""
        file = self.path / _FILE if self.path.is_dir() else self.path
        with open(file, "rb") as opened:
            head = opened.read(1 << 16)
        size = os.path.getsize(file)
        page = int.from_bytes(head[40:44], "little")
        metas = [head[at : at + 152] for at in (0, page) if head[at + 16 : at + 20] == _MAGIC]
        if not metas or not 512 <= page <= 1 << 15:
            raise InputError(f"{self.path}: not a whole {self.form}; fetch or write it again")
        newest = max(metas, key=lambda meta: int.from_bytes(meta[144:152], "little"))
        need = (int.from_bytes(newest[136:144], "little") + 1) * page
        if need > size:
            raise InputError(
                f"{self.path}: not a whole {self.form} (it has {size} bytes and needs {need}); "
                "fetch or write it again"
            )

    def _connect(self) -> Any:
        path = os.path.realpath(self.path)
        with _LOCK:
            environment = _OPENED.get(path)
            if environment is None:
                environment = _OPENED[path] = self._environment_of(path)
            return environment

    def _environment_of(self, path: str) -> Any:
        try:
            return self._lmdb.open(
                path,
                subdir=self.path.is_dir(),
                readonly=True,
                lock=False,
                readahead=False,
                create=False,
            )
        except self._lmdb.Error as error:
            raise InputError(
                f"{self.path}: not a whole {self.form} ({words(error)}); fetch or write it again"
            ) from None

    def _begin(self) -> Any:
        """A transaction; without a lock a forked process may use its parent's environment."""
        if self._closed:
            raise InputError(f"{self.path}: it has been closed")
        return self._environment.begin(buffers=True)

    def _find(self, name: str) -> bytes | None:
        key = name.encode("utf-8", "replace")
        if not 0 < len(key) <= _LONGEST or key == _KEYS or self._closed:
            return None
        with self._begin() as look:
            return None if look.get(key) is None else key

    def _read(self, place: bytes) -> Regions:
        try:
            with self._begin() as look:
                record = pickled.load(look.get(place))
        except self._lmdb.Error as error:
            raise InputError(words(error)) from None
        return regions_of(record, self.provenance)

    def __iter__(self) -> Iterator[str]:
        with self._begin() as look:
            for key in look.cursor().iternext(values=False):
                if bytes(key) != _KEYS:
                    yield bytes(key).decode("utf-8", "replace")

    def __len__(self) -> int:
        return self._entries

    def _close(self) -> None:
        self._environment = None
