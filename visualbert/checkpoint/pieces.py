"""Parts of files, mapped piece by piece, for whoever has to look at every byte once."""

import mmap
import zlib
from collections.abc import Iterator
from typing import BinaryIO

_PIECE = 1 << 26


def pieces(file: BinaryIO, start: int, size: int) -> Iterator[memoryview]:
    """A part of a file, mapped piece by piece; each leaves memory when the next one is asked for.

    Large pieces, so that a thread that digests them seldom waits for Python's lock.
    """
    if not size:
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as whole:
        if hasattr(data, "madvise"):
            data.madvise(mmap.MADV_SEQUENTIAL)
        for at in range(start, start + size, _PIECE):
            with whole[at : min(at + _PIECE, start + size)] as piece:
                yield piece
            if hasattr(data, "madvise"):
                page = at // mmap.PAGESIZE * mmap.PAGESIZE
                data.madvise(mmap.MADV_DONTNEED, page, min(_PIECE, len(data) - page))


def crc_of(file: BinaryIO, start: int, size: int) -> int:
    """The CRC-32 of a part of a file."""
    value = 0
    for piece in pieces(file, start, size):
        value = zlib.crc32(piece, value)
    return value
