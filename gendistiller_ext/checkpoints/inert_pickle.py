"""Reads a pickle as data: no class is looked up, no object of the file's choice is made, nothing is called.

Numbers, strings, lists, tuples, dicts and sets are built. Every global becomes a `Global`, every object made
from one an `Opaque` that records its arguments and its state. The caller gives the few names it knows a
meaning by functions of its own (`known`), and persistent ids theirs. Only what Python 3's pickler writes in
protocols 2 to 5 is read, and Python 2's strings; extension codes, out-of-band buffers and the text opcodes of
protocol 0 are a ValueError.

Opcodes: CPython, Lib/pickletools.py.
"""
from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

_ATOMS = (str, bytes, int, float, type(None))


class Global:
    """A name "module.qualname" that a pickle mentions."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"Global({self.name[:200]!r})"


class Opaque:
    """What a pickle wanted made by calling the global `name`: its arguments, state and items, all inert."""

    __slots__ = ("name", "args", "state", "items")

    def __init__(self, name: str, args: tuple):
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: list = []

    def __repr__(self) -> str:
        return f"Opaque({self.name[:200]!r})"


def dictionary(*args: Any) -> dict:
    """What `collections.OrderedDict(*args)` holds: args are () or (pairs,)."""
    result: dict = {}
    if len(args) > 1 or args and not isinstance(args[0], (list, tuple, dict)):
        raise ValueError("a dict made of something else than pairs")
    pairs = args[0].items() if args and isinstance(args[0], dict) else args[0] if args else ()
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError("a dict made of something else than pairs")
        result[_key(pair[0])] = pair[1]
    return result


def _key(value: Any) -> Any:
    # Hashing recurses into tuples without a limit, so a file's nested ones are kept out.
    if isinstance(value, _ATOMS) or isinstance(value, (Global, Opaque)):
        return value
    if isinstance(value, tuple) and all(isinstance(item, _ATOMS) for item in value):
        return value
    raise ValueError(f"a {type(value).__name__} as the key of a dict or set")


class _Stop(Exception):
    pass


class _Reader:
    def __init__(self, data: bytes, known: Mapping[str, Callable], persistent: Callable | None):
        self.data = data
        self.at = 0
        self.known = known
        self.persistent = persistent
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, Any] = {}

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise ValueError("it ends early")
        piece = self.data[self.at:end]
        self.at = end
        return piece

    def unpack(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise ValueError("it ends early")
        text = self.data[self.at:end].decode("utf-8")
        self.at = end + 1
        return text

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("its stack is empty")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise ValueError("its stack is empty")
        return self.stack[-1]

    def pop_mark(self) -> list:
        if not self.marks:
            raise ValueError("a mark is missing")
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def remember(self, slot: int) -> None:
        self.memo[slot] = self.top()

    def recall(self, slot: int) -> None:
        if slot not in self.memo:
            raise ValueError(f"memo slot {slot} is empty")
        self.stack.append(self.memo[slot])

    def find_global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global without a name")
        self.push(Global(f"{module}.{name}"))

    def make(self, target: Any, args: Any) -> None:
        """Where pickle would call target(*args): a function of ours, or a record."""
        if not isinstance(args, tuple):
            raise ValueError("arguments that are no tuple")
        if isinstance(target, Global) and target.name in self.known:
            self.push(self.known[target.name](*args))
        elif isinstance(target, (Global, Opaque)):
            self.push(Opaque(target.name, args))
        else:
            raise ValueError(f"a call of a {type(target).__name__}")

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, Opaque):
            target.state = state
        elif isinstance(target, (Global, str, bytes, int, float, tuple, list, set, type(None))):
            raise ValueError(f"a state for a {type(target).__name__}")
        # Attributes of an OrderedDict (state_dict's _metadata) or of a tensor carry no data: dropped.

    def extend(self, items: list) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Opaque):
            target.items.extend(items)
        else:
            raise ValueError(f"items for a {type(target).__name__}")

    def update(self, items: list) -> None:
        target = self.top()
        if len(items) % 2:
            raise ValueError("a key without a value")
        pairs = zip(items[::2], items[1::2])
        if isinstance(target, dict):
            for key, value in pairs:
                target[_key(key)] = value
        elif isinstance(target, Opaque):
            target.items.extend(pairs)
        else:
            raise ValueError(f"keys for a {type(target).__name__}")

    def add(self, items: list) -> None:
        target = self.top()
        if not isinstance(target, set):
            raise ValueError(f"members for a {type(target).__name__}")
        target.update(map(_key, items))

    def tuple_of(self, size: int) -> None:
        items = [self.pop() for _ in range(size)]
        self.push(tuple(reversed(items)))

    def text(self, size: int) -> None:
        self.push(self.take(size).decode("utf-8", "surrogatepass"))

    def long(self, size: int) -> None:
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise ValueError("a persistent id")
        self.push(self.persistent(self.pop()))

    def new_object_with_keywords(self) -> None:
        keywords = self.pop()
        args = self.pop()
        target = self.pop()
        if not isinstance(target, (Global, Opaque)):
            raise ValueError(f"a call of a {type(target).__name__}")
        self.push(Opaque(target.name, (args, keywords)))

    def reduce(self) -> None:
        args = self.pop()
        self.make(self.pop(), args)

    def stack_global(self) -> None:
        name = self.pop()
        self.find_global(self.pop(), name)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def stop(self) -> None:
        raise _Stop

    def run(self) -> Any:
        try:
            while True:
                if self.at >= len(self.data):
                    raise ValueError("it ends early")
                code = self.data[self.at]
                self.at += 1
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise ValueError(f"opcode 0x{code:02x} is not read")
                operation(self)
        except _Stop:
            return self.pop()


def _second_last(reader: _Reader) -> None:
    value = reader.pop()
    reader.update([reader.pop(), value])


_OPERATIONS: dict[int, Callable[[_Reader], None]] = {
    ord("("): _Reader.mark,
    ord("."): _Reader.stop,
    ord("0"): lambda r: r.pop() and None,  # POP
    ord("1"): lambda r: r.pop_mark() and None,  # POP_MARK
    ord("N"): lambda r: r.push(None),
    0x88: lambda r: r.push(True),
    0x89: lambda r: r.push(False),
    ord("J"): lambda r: r.push(r.unpack("<i")),
    ord("K"): lambda r: r.push(r.unpack("<B")),
    ord("M"): lambda r: r.push(r.unpack("<H")),
    0x8a: lambda r: r.long(r.unpack("<B")),  # LONG1
    0x8b: lambda r: r.long(r.unpack("<I")),  # LONG4
    ord("G"): lambda r: r.push(r.unpack(">d")),
    ord("X"): lambda r: r.text(r.unpack("<I")),  # BINUNICODE
    0x8c: lambda r: r.text(r.unpack("<B")),  # SHORT_BINUNICODE
    0x8d: lambda r: r.text(r.unpack("<Q")),  # BINUNICODE8
    ord("U"): lambda r: r.push(r.take(r.unpack("<B")).decode("latin-1")),  # SHORT_BINSTRING, Python 2's str
    ord("T"): lambda r: r.push(r.take(r.unpack("<I")).decode("latin-1")),  # BINSTRING
    ord("B"): lambda r: r.push(r.take(r.unpack("<I"))),  # BINBYTES
    ord("C"): lambda r: r.push(r.take(r.unpack("<B"))),  # SHORT_BINBYTES
    0x8e: lambda r: r.push(r.take(r.unpack("<Q"))),  # BINBYTES8
    0x96: lambda r: r.push(r.take(r.unpack("<Q"))),  # BYTEARRAY8
    ord("]"): lambda r: r.push([]),
    ord("}"): lambda r: r.push({}),
    0x8f: lambda r: r.push(set()),  # EMPTY_SET
    ord(")"): lambda r: r.push(()),
    0x85: lambda r: r.tuple_of(1),
    0x86: lambda r: r.tuple_of(2),
    0x87: lambda r: r.tuple_of(3),
    ord("t"): lambda r: r.push(tuple(r.pop_mark())),
    0x91: lambda r: r.push(frozenset(map(_key, r.pop_mark()))),  # FROZENSET
    ord("a"): lambda r: r.extend([r.pop()]),  # APPEND
    ord("e"): lambda r: r.extend(r.pop_mark()),  # APPENDS
    ord("s"): _second_last,  # SETITEM
    ord("u"): lambda r: r.update(r.pop_mark()),  # SETITEMS
    0x90: lambda r: r.add(r.pop_mark()),  # ADDITEMS
    ord("h"): lambda r: r.recall(r.unpack("<B")),  # BINGET
    ord("j"): lambda r: r.recall(r.unpack("<I")),  # LONG_BINGET
    ord("q"): lambda r: r.remember(r.unpack("<B")),  # BINPUT
    ord("r"): lambda r: r.remember(r.unpack("<I")),  # LONG_BINPUT
    0x94: lambda r: r.remember(len(r.memo)),  # MEMOIZE
    ord("c"): lambda r: r.find_global(r.line(), r.line()),  # GLOBAL
    0x93: _Reader.stack_global,
    ord("R"): _Reader.reduce,
    0x81: _Reader.reduce,  # NEWOBJ
    0x92: _Reader.new_object_with_keywords,  # NEWOBJ_EX
    ord("b"): _Reader.build,
    ord("Q"): _Reader.persistent_id,  # BINPERSID
    0x80: lambda r: r.take(1) and None,  # PROTO
    0x95: lambda r: r.take(8) and None,  # FRAME
}


def loads(data: bytes, known: Mapping[str, Callable] | None = None,
          persistent: Callable[[Any], Any] | None = None) -> Any:
    """The object that the pickle `data` describes, made of plain containers, `Global` and `Opaque`.

    known       name of a global -> the function of ours to use where the pickle calls that global; it gets
                the pickle's arguments, whatever they are, and raises ValueError if they are wrong
    persistent  gives persistent ids their meaning; without it they are an error

    Raises ValueError that says at which byte what is wrong.
    """
    reader = _Reader(data, known or {}, persistent)
    try:
        return reader.run()
    except ValueError as error:
        raise ValueError(f"damaged pickle (byte {reader.at}): {error}") from None
