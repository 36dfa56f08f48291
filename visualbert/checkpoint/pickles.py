"""A pickle interpreter that builds dictionaries, lists, tuples, numbers and text, and nothing else.

No class is imported and no function of the stream's choosing is called: a global is looked up in a
table that the caller passes, and one that is not there ends the load by its name. The opcodes come
from the standard library's `pickletools`, which only parses. Bytes, steps and the length of numbers
are bounded and nothing recurses, so a stream cannot take the machine's memory or its stack either.
"""

import io
import pickletools
from collections.abc import Callable, Collection, Mapping
from typing import Any, BinaryIO

MOST_BYTES = 1 << 24
_MOST_STEPS = 300_000
_MOST_BITS = 1024
_KEYS = (str, int, float, bytes, bool, type(None))


class Refused(Exception):
    """The stream asks for what is not in the table."""


class Broken(Exception):
    """The stream is not a whole pickle."""


class Inert:
    """Stands for whatever an allowed but unneeded class would have made: it takes everything in and
    holds nothing.
    """

    def __repr__(self) -> str:
        return "an object of a class that is not read"


class _Mark:
    pass


INERT = Inert()
_MARK = _Mark()
_CONSTANTS: dict[str, Any] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
# The argument is the value.
_LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    }
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})


def load(
    stream: BinaryIO,
    table: Mapping[tuple[str, str], Any],
    persistent: Callable[[Any], Any] | None = None,
    inert: Collection[str] = (),
) -> Any:
    """The value of the pickle at the stream's position, which is left behind its end.

    Args:
        stream: the bytes; at most `MOST_BYTES` of them are looked at.
        table: what (module, name) stands for. A function is what REDUCE may call, with the
            arguments from the stream; it has to check them. `INERT` swallows all that is done
            to it.
        persistent: what a persistent id stands for; none is allowed if left out.
        inert: packages of which everything else is `INERT`.

    Raises:
        Refused: the stream names a global that is not in `table`, or does what needs one.
        Broken: it is damaged, truncated, or too large.
    """
    start = stream.tell()
    window = io.BytesIO(stream.read(MOST_BYTES))
    machine = _Machine(table, persistent, inert)
    try:
        for opcode, argument, _ in pickletools.genops(window):
            if opcode.name == "STOP":
                stream.seek(start + window.tell())
                return machine.pop()
            machine.spend(1)
            machine.step(opcode.name, argument)
    except (Refused, Broken):
        raise
    except Exception as error:  # whatever a damaged stream makes the parser trip over
        if window.tell() >= MOST_BYTES:
            raise Broken(f"its index is longer than {MOST_BYTES} bytes") from None
        raise Broken(shown(str(error)) or type(error).__name__) from None
    raise Broken("it has no end")


class _Machine:
    """The stack and the memo of one load."""

    def __init__(
        self, table: Mapping[tuple[str, str], Any], persistent: Any, inert: Collection[str]
    ) -> None:
        self._table, self._persistent, self._inert = table, persistent, inert
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._left = _MOST_STEPS

    def spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise Broken("it has too many parts")

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise Broken("a mark stands where a value should")
        return value

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            if isinstance(argument, int) and argument.bit_length() > _MOST_BITS:
                raise Broken("a number in it is too long")
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            self._stack.append(tuple([self.pop() for _ in range(count)][::-1]))
        elif name in _GETS:
            self._stack.append(self._memo[int(argument)])
        elif name in _PUTS:
            self._memo[int(argument)] = self._top()
        else:
            do = getattr(self, "_" + name.lower(), None)
            if do is None:
                raise Refused(f"the opcode {name}")
            do(argument)

    def _top(self) -> Any:
        value = self._stack[-1]
        if value is _MARK:
            raise Broken("a mark stands where a value should")
        return value

    def _marked(self) -> list[Any]:
        """Everything above the topmost mark, which goes too."""
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise Broken("a mark is missing")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def _proto(self, version: Any) -> None:
        if version > 5:
            raise Broken(f"pickle protocol {version} is unknown")

    def _frame(self, length: Any) -> None:
        pass

    def _pop(self, _: Any) -> None:
        self._stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._marked()

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._marked()))

    def _list(self, _: Any) -> None:
        self._stack.append(self._marked())

    def _dict(self, _: Any) -> None:
        items = self._marked()
        self._stack.append({})
        self._set(items)

    def _append(self, _: Any) -> None:
        value = self.pop()
        self._fill(list, [value])

    def _appends(self, _: Any) -> None:
        self._fill(list, self._marked())

    def _setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._set([key, value])

    def _setitems(self, _: Any) -> None:
        self._set(self._marked())

    def _additems(self, _: Any) -> None:
        self._fill(set, self._marked())

    def _set(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise Broken("a key has no value")
        self._fill(dict, items)

    def _fill(self, kind: type, values: list[Any]) -> None:
        """Add `values` to the container on top, which is of `kind`."""
        target = self._top()
        if target is INERT:
            return
        if not isinstance(target, kind):
            raise Broken(f"a {type(target).__name__} stands where a {kind.__name__} should")
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(map(_key, values))
        elif isinstance(target, dict):
            held = len(target) + len(values) // 2
            target.update(zip(map(_key, values[::2]), values[1::2], strict=True))
            if len(target) != held:
                raise Broken("a key occurs twice")

    def _global(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self._look_up(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self._look_up(module, name)

    def _look_up(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Broken("a global has no name")
        if (module, name) in self._table:
            self._stack.append(self._table[module, name])
        elif module.partition(".")[0] in self._inert:
            self._stack.append(INERT)
        else:
            raise Refused(shown(f"{module}.{name}"))

    def _inst(self, argument: Any) -> None:
        values = tuple(self._marked())
        self._global(argument)
        self._call(self.pop(), values)

    def _obj(self, _: Any) -> None:
        function, *values = self._marked()
        self._call(function, tuple(values))

    def _newobj(self, _: Any) -> None:
        self._reduce(_)

    def _newobj_ex(self, _: Any) -> None:
        self.pop()
        self._reduce(_)

    def _reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self._call(function, arguments)

    def _call(self, function: Any, arguments: Any) -> None:
        if function is INERT:
            self._stack.append(INERT)
            return
        if not callable(function) or not isinstance(arguments, tuple):
            raise Refused("a call of what is no function")
        self.spend(len(arguments) + sum(len(a) for a in arguments if isinstance(a, list | tuple)))
        self._stack.append(function(*arguments))

    def _build(self, _: Any) -> None:
        """A state dict's `_metadata` is set this way; it says nothing about the weights."""
        state, target = self.pop(), self._top()
        if target is not INERT and not (isinstance(target, dict) and isinstance(state, dict)):
            raise Refused("the opcode BUILD on something other than a dictionary")

    def _binpersid(self, _: Any) -> None:
        if self._persistent is None:
            raise Refused("a persistent id")
        self._stack.append(self._persistent(self.pop()))


def _key(value: Any) -> Any:
    if not isinstance(value, _KEYS):
        raise Broken(f"a {type(value).__name__} cannot be a key")
    return value


def shown(text: str) -> str:
    """The beginning of a text from a stream, fit for a sentence."""
    text = text[:200]
    return text if text.isprintable() else repr(text)[1:-1]
