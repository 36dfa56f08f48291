"""Parts of files, mapped piece by piece, for whoever has to look at every byte once; and CRC-32s of
what follows one another.
"""

import mmap
import zlib
from collections.abc import Iterator
from functools import cache
from typing import BinaryIO

_PIECE = 1 << 26
_POLYNOMIAL = 0xEDB88320  # of CRC-32, its highest power at the lowest bit
_ONE = 1 << 31


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


def joined(first: int, second: int, size: int) -> int:
    """The CRC-32 of two runs of bytes, from those of each; `size` bytes are in the second.

    Source: `crc32_combine` of zlib.
    """
    return _product(_power(size), first) ^ second


@cache
def _power(size: int) -> int:
    """x to the power of 8 · `size`, modulo the polynomial."""
    result, square = _ONE, _ONE >> 8
    while size:
        if size & 1:
            result = _product(square, result)
        square, size = _product(square, square), size >> 1
    return result


def _product(a: int, b: int) -> int:
    """The product of two polynomials modulo the polynomial."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return result
