"""The datasets in an HDF5 file as Keras writes it, by their names and places; nothing is read.

HDF5's own library follows the pointers of a damaged file until it crashes or hangs, so the part of
the format that h5py writes by default is read here: groups with symbol tables, plain arrays in one
piece. Whatever else the format knows (links, filters, chunks, external and virtual arrays) is
refused. Source: HDF5 File Format Specification 3.0, sections II to IV.
"""

import itertools
import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from visualbert.checkpoint.mapped import Place

MOST_STEPS = 200_000  # structures that are looked at; a model of 24 layers has some 10,000
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_NOWHERE = 2**64 - 1
_SHARED = 2
_LEAVES, _BRANCHES = 8, 32  # that a node of a group's tree has room for
_SYMBOLIC = 2

# Kinds of messages in an object's header.
_SPACE, _TYPE, _LAYOUT, _ATTRIBUTE, _MORE, _TABLE = 0x01, 0x03, 0x08, 0x0C, 0x10, 0x11
_NEWER = (0x02, 0x06)  # links of a group, as they are since HDF5 1.8
_EXTERNAL, _FILTERS = 0x07, 0x0B
_CONTIGUOUS = 1

_FLOATS = {  # bytes, exponent bits, mantissa bits, exponent bias
    (2, 5, 10, 15): "float16",
    (2, 8, 7, 127): "bfloat16",
    (4, 8, 23, 127): "float32",
    (8, 11, 52, 1023): "float64",
}
_OTHERS = (
    *("fixed", "float", "time", "string", "bitfield", "opaque"),
    *("compound", "reference", "enum", "variable", "array"),
)


class Refused(Exception):
    """The file holds something that no Keras file has; the text continues "PATH: "."""


class _Entry(NamedTuple):
    names: tuple[str, ...]
    header: int
    symbolic: bool = False


def datasets(data: memoryview, skip: tuple[str, ...] = ()) -> dict[tuple[str, ...], Place]:
    """The place of every dataset in the file `data`, by the names that lead to it.

    Args:
        data: the whole file.
        skip: groups at its root that are passed over.

    Raises:
        Refused: it holds what no Keras file has.
        ValueError: it is damaged; so are IndexError and struct.error.
    """
    return _Reader(data).read(skip)


class _Reader:
    """One file, and how much of it has been looked at."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._steps = data, 0
        self._taken: list[tuple[int, int]] = []  # where structures and arrays are

    def read(self, skip: tuple[str, ...]) -> dict[tuple[str, ...], Place]:
        found: dict[tuple[str, ...], Place] = {}
        waiting, seen = [_Entry((), self._root())], set()
        while waiting:
            entry = waiting.pop()
            if entry.names[:1] and entry.names[0] in skip:
                continue
            where = repr("/".join(entry.names)[:200])
            if entry.symbolic:
                raise Refused(f"{where} is a link to another place; only plain arrays are read")
            if entry.header in seen or len(entry.names) > 32:
                raise Refused(f"{where} leads back into the file's own groups")
            seen.add(entry.header)
            messages = self._messages(entry.header)
            if any(kind in messages for kind in _NEWER):
                raise Refused(f"{where} is a group in HDF5's newer form, which Keras never writes")
            if _TABLE in messages:
                waiting += self._children(entry, messages[_TABLE][0])
            else:
                found[entry.names] = self._dataset(messages, where)
        self._check_overlaps()
        return found

    def _bytes(self, start: int, size: int) -> bytes:
        if size < 0 or start + size > len(self._data):
            raise ValueError("a structure reaches beyond its end")
        return bytes(self._data[start : start + size])

    def _unpack(self, form: str, start: int) -> tuple[Any, ...]:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise ValueError("it holds more structures than any model")
        return struct.unpack(form, self._bytes(start, struct.calcsize(form)))

    def _expect(self, signature: bytes, start: int, size: int, used: int) -> None:
        """Take a structure of `size` bytes, of which all behind the first `used` are zero."""
        whole = self._bytes(start, size)
        if not whole.startswith(signature) or used > size or any(whole[used:]):
            raise ValueError(f"byte {start} should start a {signature.decode()} structure")
        self._taken.append((start, size))

    def _root(self) -> int:
        """The address of the root group's header, from the superblock."""
        if self._bytes(0, 8) != _SIGNATURE:
            raise ValueError("it does not start as HDF5 files do")
        version, *sizes = self._unpack("<B4xBBxHH", 8)
        if version != 0 or sizes != [8, 8, _LEAVES // 2, _BRANCHES // 2]:
            raise Refused(
                f"it is HDF5 of the superblock version {version}, which Keras never writes; save "
                "it with Keras's save_weights"
            )
        base, _, end, _, _, header = self._unpack("<6Q", 24)
        if base != 0 or end != len(self._data):
            raise ValueError(f"it should be {end} bytes long and is {len(self._data)}")
        self._taken.append((0, 96))
        return header

    def _messages(self, header: int) -> dict[int, list[bytes]]:
        """The contents of an object's header, by their kind."""
        version, count, size = self._unpack("<BxH4xI", header)
        if version != 1:
            raise ValueError(f"byte {header} should start a header of version 1")
        self._taken.append((header, 16 + size))
        blocks, found = [(header + 16, size)], {}  # type: ignore[var-annotated]
        total = 0
        while blocks:
            at, size = blocks.pop()
            end = at + size
            while at + 8 <= end:
                kind, size, flags = self._unpack("<HHB3x", at)
                if at + 8 + size > end:
                    raise ValueError("a message reaches beyond its header")
                body, total = self._bytes(at + 8, size), total + 1
                at += 8 + size
                if flags & _SHARED:
                    raise Refused("it shares a type between arrays, which Keras never does")
                if kind == _MORE:
                    start, size = struct.unpack_from("<2Q", body)
                    self._bytes(start, size)
                    self._taken.append((start, size))
                    blocks.append((start, size))
                else:
                    found.setdefault(kind, []).append(body)
        if total != count:
            raise ValueError(f"byte {header} starts a header of {total} messages, not {count}")
        return found

    def _children(self, group: _Entry, table: bytes) -> list[_Entry]:
        """The members of a group: names in its heap, places in the leaves of its tree."""
        tree, heap = struct.unpack_from("<2Q", table)
        self._expect(b"HEAP", heap, 32, 32)
        size, _, names = self._unpack("<3Q", heap + 8)
        self._bytes(names, size)
        self._taken.append((names, size))
        found = []
        for leaf in self._leaves(tree):
            (count,) = self._unpack("<2xH", leaf + 4)
            self._expect(b"SNOD", leaf, 8 + 40 * _LEAVES, 8 + 40 * count)
            for at in range(leaf + 8, leaf + 8 + 40 * count, 40):
                name, header, cached = self._unpack("<QQI", at)
                if name >= size:
                    raise ValueError("a name lies outside its heap")
                text, zero, _ = self._bytes(names + name, min(500, size - name)).partition(b"\0")
                if not zero or not text or b"/" in text:
                    raise ValueError("a name has no end")
                found.append(_Entry((*group.names, text.decode()), header, cached == _SYMBOLIC))
        if len({entry.names for entry in found}) != len(found):
            raise ValueError("a name occurs twice in a group")
        return found

    def _leaves(self, tree: int) -> Iterator[int]:
        """The symbol nodes below a tree's root, depth first."""
        waiting = [(tree, -1)]
        while waiting:
            at, expected = waiting.pop()
            kind, level, count = self._unpack("<BBH", at + 4)
            self._expect(b"TREE", at, 32 + 16 * _BRANCHES, 32 + 16 * count)
            if kind != 0 or expected not in (-1, level):
                raise ValueError("a tree of another kind stands where a group's should")
            children = [self._unpack("<8xQ", at + 24 + 16 * i)[0] for i in range(count)]
            if level == 0:
                yield from children
            else:
                waiting += [(child, level - 1) for child in reversed(children)]

    def _dataset(self, messages: dict[int, list[bytes]], where: str) -> Place:
        if any(len(messages.get(kind, ())) != 1 for kind in (_SPACE, _TYPE, _LAYOUT)):
            raise ValueError(f"{where} is neither a group nor an array")
        version, layout = messages[_LAYOUT][0][:2]
        strange = _EXTERNAL in messages or _FILTERS in messages
        if strange or version not in (3, 4) or layout != _CONTIGUOUS:
            raise Refused(
                f"{where} is chunked, compressed or kept elsewhere, which Keras never does; only "
                "plain arrays are read"
            )
        start, size = struct.unpack_from("<2Q", messages[_LAYOUT][0], 2)
        shape, (dtype, itemsize) = _shape(messages[_SPACE][0]), _dtype(messages[_TYPE][0])
        if dtype == "opaque" and itemsize == 2 and self._is_bfloat16(messages.get(_ATTRIBUTE, [])):
            dtype = "bfloat16"
        if size != math.prod(shape) * itemsize:
            raise ValueError(f"{where} has {size} bytes for the shape {shape}")
        if size == 0:
            return Place(0, shape, dtype)
        if start == _NOWHERE:
            raise Refused(f"{where} was never written")
        self._taken.append((start, size))
        return Place(start, shape, dtype)

    def _is_bfloat16(self, attributes: list[bytes]) -> bool:
        """Whether Keras says so in an attribute, since HDF5 has no such type."""
        for body in attributes:
            version, *sizes = struct.unpack_from("<Bx3H", body)
            at = 9 if version == 3 else 8
            padded = [-(-size // 8) * 8 if version == 1 else size for size in sizes]
            name = body[at : at + sizes[0]].rstrip(b"\0")
            kind = body[at + padded[0] : at + padded[0] + 1]
            value = body[at + sum(padded) :]
            if name == b"dtype" and kind[0] & 0x0F == _OTHERS.index("variable"):
                value = self._from_heap(*struct.unpack_from("<IQI", value))
            if name == b"dtype":
                return value.rstrip(b"\0") == b"bfloat16"
        return False

    def _from_heap(self, size: int, heap: int, number: int) -> bytes:
        """A text of variable length, from the file's global heap."""
        (length,) = self._unpack("<Q", heap + 8)
        if self._bytes(heap, 4) != b"GCOL":
            raise ValueError(f"byte {heap} should start a GCOL structure")
        at = heap + 16
        while at + 16 <= heap + length:
            found, held = self._unpack("<H6xQ", at)
            if found == number and size <= held:
                return self._bytes(at + 16, size)
            if found == 0:
                break
            at += 16 + -(-held // 8) * 8
        raise ValueError("a text is not in its heap")

    def _check_overlaps(self) -> None:
        """Two things at one place: a pointer has changed, or never was honest."""
        for (start, size), (following, _) in itertools.pairwise(sorted(self._taken)):
            if start + size > following:
                raise ValueError(f"byte {following} belongs to two of its parts")


def _shape(body: bytes) -> tuple[int, ...]:
    version, rank, limited = body[:3]
    if version not in (1, 2) or limited > 1:
        raise ValueError("a shape is of an unknown version")
    start = 8 if version == 1 else 4
    if len(body) != -(-(start + 8 * rank * (1 + limited)) // 8) * 8:
        raise ValueError(f"a shape of {rank} axes takes {len(body)} bytes")
    return struct.unpack_from(f"<{rank}Q", body, start)


def _dtype(body: bytes) -> tuple[str, int]:
    """The name of an element type, as numpy has it where it is a plain number, and its bytes."""
    kind, order, sign, _, size = struct.unpack_from("<4BI", body)
    name = _OTHERS[kind & 0x0F] if kind & 0x0F < len(_OTHERS) else "unknown"
    bits = 8 * size
    if name not in ("fixed", "float") or kind >> 4 not in (1, 2, 3, 4, 5):
        return name, size
    offset, precision = struct.unpack_from("<2H", body, 8)
    if len(body) != (16 if name == "fixed" else 24):
        raise ValueError(f"a {name} type takes {len(body)} bytes")
    if order & 1 or offset != 0 or precision != bits:
        return f"big-endian or padded {name}", size
    if name == "fixed":
        return f"{'' if order & 8 else 'u'}int{bits}", size
    exponent_at, exponent, mantissa_at, mantissa, bias = struct.unpack_from("<4BI", body, 12)
    plain = (exponent_at, mantissa_at, sign) == (mantissa, 0, bits - 1)
    return _FLOATS.get((size, exponent, mantissa, bias), "unknown float") if plain else name, size
