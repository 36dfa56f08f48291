"""Pickles that hold numpy arrays, read without running anything in them.

The interpreter is `visualbert.checkpoint.pickles`; what it learns here are arrays of numbers, of
text and of other values, whose type, shape and bytes are checked against each other before numpy
sees them. Every other global in a stream is refused by its name.
"""

import io
import math
import pickletools
import re
from typing import Any

import numpy as np

from visualbert.checkpoint import pickles
from visualbert.errors import InputError

MOST_BYTES = 1 << 28
_MOST_STEPS = 300_000
_DTYPE = re.compile(r"\?|b1|[iuf][1248]|O8?|[SU]\d{1,6}")


class _Type:
    """What `numpy.dtype` stands for in a stream."""

    def __init__(self, name: Any, *flags: Any) -> None:
        if isinstance(name, bytes):
            name = name.decode("latin-1")
        if not isinstance(name, str) or not _DTYPE.fullmatch(name):
            raise pickles.Refused(f"arrays of the type {pickles.shown(str(name))}")
        try:
            self.dtype = np.dtype(name)
        except TypeError:  # a float of one byte
            raise pickles.Broken(f"{name} is no type of numbers") from None

    def build(self, state: Any) -> None:
        """Only the byte order is taken: the rest follows from the name."""
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        order = order.decode("latin-1") if isinstance(order, bytes) else order
        if not isinstance(order, str) or order not in "<>=|":
            raise pickles.Broken("a type of numbers has no byte order")
        if order == ">":
            self.dtype = self.dtype.newbyteorder(">")


_ARRAY_CLASS = object()


def _empty(cls: Any, *_: Any) -> np.ndarray:
    if cls is not _ARRAY_CLASS:
        raise pickles.Refused("an array of a class of its own")
    return np.empty(0, np.int8)


def _fill(array: np.ndarray, state: Any) -> None:
    """Give an array the type, shape and values of its state, once they fit each other."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise pickles.Broken("an array has no state")
    _, shape, kind, fortran, data = state
    dtype, count = _checked(kind, shape)
    if dtype.hasobject:
        if not isinstance(data, list) or len(data) != count:
            raise pickles.Broken(f"an array of shape {shape} does not have {count} values")
    else:
        data = _bytes(data)
        if len(data) != count * dtype.itemsize:
            raise pickles.Broken(
                f"an array of shape {shape} has {len(data)} bytes, expected "
                f"{count * dtype.itemsize}"
            )
    state = (1, shape, dtype, bool(fortran), data)
    array.__setstate__(state)  # type: ignore[arg-type]


def _checked(kind: Any, shape: Any) -> tuple[np.dtype, int]:
    """The type, and how many values the shape has."""
    if not isinstance(kind, _Type):
        raise pickles.Broken("an array has no type")
    if not isinstance(shape, tuple) or len(shape) > 32:
        raise pickles.Broken("an array has no shape")
    for size in shape:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 40:
            raise pickles.Broken("an array has an impossible shape")
    return kind.dtype, math.prod(shape)


def _bytes(data: Any) -> bytes | bytearray:
    if isinstance(data, str):  # Python 2's
        data = data.encode("latin-1")
    if not isinstance(data, bytes | bytearray):
        raise pickles.Broken("an array has no bytes")
    return data


def _scalar(kind: Any, data: Any = b"") -> Any:
    dtype, _ = _checked(kind, ())
    data = _bytes(data)
    if dtype.hasobject or len(data) != dtype.itemsize or not data:
        raise pickles.Broken("a number has not the bytes of its type")
    return np.frombuffer(data, dtype)[0]


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    dtype, count = _checked(kind, shape)
    data = _bytes(data)
    if dtype.hasobject or not dtype.itemsize or len(data) != count * dtype.itemsize:
        raise pickles.Broken(f"an array of shape {shape} has not the bytes of its type")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickles.Refused("an encoding other than latin1")
    return text.encode("latin-1")


def _dictionary(*arguments: Any) -> dict:
    if arguments:
        raise pickles.Refused("a dictionary made by a call")
    return {}


_TABLE: dict[tuple[str, str], Any] = {
    **{(f"numpy.{m}.multiarray", "_reconstruct"): _empty for m in ("core", "_core")},
    **{(f"numpy.{m}.multiarray", "scalar"): _scalar for m in ("core", "_core")},
    **{(f"numpy.{m}.numeric", "_frombuffer"): _from_buffer for m in ("core", "_core")},
    ("numpy", "ndarray"): _ARRAY_CLASS,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _dictionary,
}


class _Machine(pickles._Machine):
    """The interpreter, which here also gives arrays their values."""

    def __init__(self, steps: int) -> None:
        super().__init__(_TABLE, None, ())
        self._left = steps

    def _build(self, _: Any) -> None:
        state, target = self.pop(), self._top()
        if isinstance(target, _Type):
            target.build(state)
        elif isinstance(target, np.ndarray):
            _fill(target, state)
        else:
            raise pickles.Refused("the opcode BUILD on something other than an array")

    def _bytearray8(self, argument: Any) -> None:
        self._stack.append(argument)


def load(data: bytes | memoryview, steps: int = _MOST_STEPS) -> Any:
    """The value of a pickle of arrays, dictionaries, lists, text and numbers.

    Args:
        data: the stream.
        steps: opcodes that it may have.

    Raises:
        InputError: it is damaged, too large, or asks for anything else.
    """
    if len(data) > MOST_BYTES:
        raise InputError(f"its pickle has {len(data)} bytes, more than {MOST_BYTES}")
    machine = _Machine(steps)
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            if opcode.name == "STOP":
                return machine.pop()
            machine.spend(1)
            machine.step(opcode.name, argument)
    except pickles.Refused as error:
        raise InputError(
            f"refused: its pickle asks for {error}, and only arrays, dictionaries, lists, text and "
            "numbers are read (such a file can run code when it is loaded)"
        ) from None
    except Exception as error:  # whatever a damaged stream makes the parser trip over
        reason = pickles.shown(str(error)) or type(error).__name__
        raise InputError(f"not a whole pickle ({reason})") from None
    raise InputError("not a whole pickle (it has no end)")
