"""The opcodes that the pickles of checkpoints are made of, carried out by hand: records come out, and nothing runs.

A pickle is a program for a machine with a stack. This one knows the opcodes that Python's own pickler writes for plain
records, and no other; it makes nothing but the records that its caller has for a name. Opcodes are counted, as each of
them may take memory, and keys of dicts are texts, numbers, records, or tuples of such: what nests may take for ever to
hash.

Source of the opcodes: the documentation in Python's `pickletools`.
"""

import struct
from collections.abc import Callable
from typing import Any

OPCODES_LIMIT = 2_000_000  # 71 for each stored chunk: 28,000 chunks; weights and optimizer of 405B on TP8 have 16,000
_KEY_LIMIT = 8  # parts of a tuple
_INT, _LENGTH, _LONG_LENGTH, _FLOAT = (struct.Struct(f) for f in ("<i", "<I", "<Q", ">d"))


class Record:
    """Stands in for a pickled object: keeps the arguments and the state that came with it."""

    __slots__ = ("arguments", "fields", "state")

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.fields: dict[str, Any] = {}
        self.state: Any = None

    def set_state(self, state: Any) -> None:
        self.state = state
        self.fields = state if isinstance(state, dict) else {}


Named = Callable[[str, str], Any]
Stored = Callable[[Any], Any]


def run(data: bytes, named: Named, *, stored: Stored | None = None) -> Any:
    """What the pickle `data` stands for.

    `named` gives for a module and a name in it a subclass of Record, a function that is as harmless, `dict` or a
    constant, and None for what no such pickle needs; `stored` answers references to storages, which are refused without
    it. Raises ValueError, in one line, for what is not such a pickle.
    """
    machine = _Machine(data, named, stored)
    try:
        return machine.run()
    except (IndexError, struct.error):
        raise ValueError(f"it ends or makes no sense at byte {machine.at}") from None


class _Machine:
    def __init__(self, data: bytes, named: Named, stored: Stored | None) -> None:
        self.data, self.named, self.stored, self.at = data, named, stored, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data = self.data
        for _ in range(OPCODES_LIMIT):
            code = data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self.stack.pop()
            carry_out = _OPCODES.get(code)
            if carry_out is None:
                raise ValueError(f"it has the opcode {bytes([code])!r}, which no checkpoint needs")
            carry_out(self)
        raise ValueError(f"it has more than {OPCODES_LIMIT} opcodes; no checkpoint needs that many")

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def bytes(self, length: int) -> bytes:
        if length > len(self.data) - self.at:
            raise ValueError("it ends inside of a text")
        self.at += length
        return self.data[self.at - length : self.at]

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        return str(self.bytes(end + 1 - self.at)[:-1], "utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def text(self, length: int) -> None:
        self.push(str(self.bytes(length), "utf-8"))

    def above_mark(self) -> list[Any]:
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    def tuple_of(self, count: int) -> None:
        values = tuple(self.stack[-count:])
        if len(values) < count:
            raise IndexError
        self.stack[-count:] = [values]

    def memoize(self, at: int) -> None:
        self.memo[at] = self.stack[-1]

    def recall(self, at: int) -> None:
        try:
            self.push(self.memo[at])
        except KeyError:
            raise ValueError("it recalls what it never kept") from None

    def extend(self, values: list[Any]) -> None:
        _kind(self.stack[-1], list).extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = _kind(self.stack[-1], dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not _is_key(key):
                raise ValueError(f"it has a key that is a {type(key).__name__}")
            target[key] = value

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it has a name that is no text")
        if (found := self.named(module, name)) is None:
            raise ValueError(f"it names {f'{module}.{name}'[:100]}, which no checkpoint needs")
        self.push(found)

    def make(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind is dict and arguments == ():
            return self.push({})
        if kind is dict or not (callable(kind) and isinstance(arguments, tuple)):  # all that can be called is our own
            raise ValueError("it calls what is no record")
        self.push(kind(*arguments))

    def reference(self) -> None:
        if self.stored is None:
            raise ValueError("it holds a persistent id, which no checkpoint needs")
        self.push(self.stored(self.stack.pop()))

    def build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], dict):  # attributes of an OrderedDict: what torch notes of a module
            _kind(self.stack[-1], Record).set_state(state)

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)


def _is_key(value: Any) -> bool:
    is_tuple = isinstance(value, tuple) and len(value) <= _KEY_LIMIT
    return isinstance(value, str | int | Record) or is_tuple and all(isinstance(part, str | int) for part in value)


def _kind(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"it takes a {type(value).__name__} for a {kind.__name__}")
    return value


_OPCODES: dict[int, Callable[[_Machine], object]] = {
    0x80: lambda m: m.byte(),  # PROTO
    0x95: lambda m: m.number(_LONG_LENGTH),  # FRAME
    0x28: lambda m: m.marks.append(len(m.stack)),  # MARK
    0x4E: lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    0x4A: lambda m: m.push(m.number(_INT)),
    0x4B: lambda m: m.push(m.byte()),
    0x4D: lambda m: m.push(int.from_bytes(m.bytes(2), "little")),
    0x8A: lambda m: m.push(int.from_bytes(m.bytes(m.byte()), "little", signed=True)),  # LONG1
    0x47: lambda m: m.push(m.number(_FLOAT)),
    0x8C: lambda m: m.text(m.byte()),  # SHORT_BINUNICODE
    0x58: lambda m: m.text(m.number(_LENGTH)),
    0x8D: lambda m: m.text(m.number(_LONG_LENGTH)),
    0x43: lambda m: m.push(m.bytes(m.byte())),  # SHORT_BINBYTES
    0x42: lambda m: m.push(m.bytes(m.number(_LENGTH))),
    0x5D: lambda m: m.push([]),
    0x7D: lambda m: m.push({}),
    0x29: lambda m: m.push(()),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    0x74: lambda m: m.push(tuple(m.above_mark())),
    0x61: lambda m: m.extend([m.stack.pop()]),  # APPEND
    0x65: lambda m: m.extend(m.above_mark()),
    0x73: lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),  # SETITEM
    0x75: lambda m: m.set_items(m.above_mark()),
    0x94: lambda m: m.memoize(len(m.memo)),
    0x71: lambda m: m.memoize(m.byte()),
    0x72: lambda m: m.memoize(m.number(_LENGTH)),
    0x68: lambda m: m.recall(m.byte()),
    0x6A: lambda m: m.recall(m.number(_LENGTH)),
    0x63: lambda m: m.name(m.line(), m.line()),  # GLOBAL
    0x93: lambda m: m.stack_name(),
    0x52: lambda m: m.make(),  # REDUCE
    0x81: lambda m: m.make(),  # NEWOBJ
    0x62: lambda m: m.build(),
    0x51: lambda m: m.reference(),  # BINPERSID
}
