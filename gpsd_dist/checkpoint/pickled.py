"""What a pickle says, as plain data: nothing is imported, called or built. For the index that DCP writes as a pickle.

A small interpreter of the opcodes (pickletools describes them) that dataclasses, dicts, lists, tuples, strings and
integers need; any other opcode is an error. Time and memory are bounded by the length of the pickle.
"""

import collections.abc
import dataclasses
import pickle
import struct
import typing


class Pairs(list[tuple[typing.Any, typing.Any]]):
    """A dict, as its (key, value) pairs: keys of a pickle may be anything, hashing them may take for ever."""


@dataclasses.dataclass(eq=False)
class Named:
    """Something that the pickle imports (`arguments` is None), or calls and builds."""

    name: str
    """module.name"""
    arguments: tuple[typing.Any, ...] | None = None
    state: typing.Any = None
    """What it would set on the object."""


def parse(content: bytes, names: typing.Container[str]) -> typing.Any:
    """The pickled object. ValueError if it is broken, or asks for anything that is not in `names`."""
    machine = _Machine(content, names)
    try:
        machine.run()
        (result,) = machine.stack
    except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"it is broken ({type(error).__name__}: {error})") from error
    return result


class _Machine:
    """Stack and memo of the pickle machine. Wrong operands raise IndexError, KeyError, TypeError or ValueError."""

    def __init__(self, content: bytes, names: typing.Container[str]):
        self.stack: list[typing.Any] = []
        self._content, self._names, self._position = content, names, 0
        self._marks: list[int] = []
        self._memo: dict[int, typing.Any] = {}

    def run(self) -> None:
        """All operations, up to STOP."""
        content, push, operations = self._content, self.stack.append, self._operations()
        while (code := content[self._position]) != pickle.STOP[0]:
            self._position += 1
            if code in _NUMBERS:
                push(self._number(code))
            elif code in _CONSTANTS:
                push(_CONSTANTS[code])
            elif code in operations:
                operations[code]()
            else:
                raise ValueError(f"it holds the operation {chr(code)!r}, which no index needs; nothing of it was run")

    def _operations(self) -> dict[int, collections.abc.Callable[[], None]]:
        """By opcode. Only what pickle's protocols from 2 on write for plain data and dataclasses."""
        named: dict[bytes, collections.abc.Callable[[], None]] = {
            pickle.PROTO: lambda: self._skip(1),
            pickle.FRAME: lambda: self._skip(8),
            pickle.MARK: lambda: self._marks.append(len(self.stack)),
            pickle.MEMOIZE: lambda: self._memo.__setitem__(len(self._memo), self.stack[-1]),
            pickle.BINPUT: lambda: self._memo.__setitem__(self._read("<B", 1), self.stack[-1]),
            pickle.LONG_BINPUT: lambda: self._memo.__setitem__(self._read("<I", 4), self.stack[-1]),
            pickle.BINGET: lambda: self.stack.append(self._memo[self._read("<B", 1)]),
            pickle.LONG_BINGET: lambda: self.stack.append(self._memo[self._read("<I", 4)]),
            pickle.LONG1: lambda: self.stack.append(self._long()),
            pickle.SHORT_BINUNICODE: lambda: self.stack.append(self._take(self._read("<B", 1)).decode()),
            pickle.BINUNICODE: lambda: self.stack.append(self._take(self._read("<I", 4)).decode()),
            pickle.EMPTY_DICT: lambda: self.stack.append(Pairs()),
            pickle.EMPTY_LIST: lambda: self.stack.append([]),
            pickle.EMPTY_TUPLE: lambda: self.stack.append(()),
            pickle.TUPLE1: lambda: self.stack.append(tuple(self._pop(1))),
            pickle.TUPLE2: lambda: self.stack.append(tuple(self._pop(2))),
            pickle.TUPLE3: lambda: self.stack.append(tuple(self._pop(3))),
            pickle.TUPLE: lambda: self.stack.append(tuple(self._pop_marked())),
            pickle.APPEND: lambda: self._extend(list, self._pop(1)),
            pickle.APPENDS: lambda: self._extend(list, self._pop_marked()),
            pickle.SETITEM: lambda: self._extend(Pairs, _paired(self._pop(2))),
            pickle.SETITEMS: lambda: self._extend(Pairs, _paired(self._pop_marked())),
            pickle.GLOBAL: lambda: self._import(self._line(), self._line()),
            pickle.STACK_GLOBAL: lambda: self._import(*self._pop(2)),
            pickle.REDUCE: self._call,
            pickle.NEWOBJ: self._call,
            pickle.BUILD: self._build,
        }
        return {code[0]: operation for code, operation in named.items()}

    def _number(self, code: int) -> typing.Any:
        return self._read(*_NUMBERS[code])

    def _read(self, form: str, size: int) -> typing.Any:
        (value,) = struct.unpack_from(form, self._content, self._position)
        self._position += size
        return value

    def _long(self) -> int:
        return int.from_bytes(self._take(self._read("<B", 1)), "little", signed=True)

    def _take(self, size: int) -> bytes:
        self._skip(size)
        return self._content[self._position - size : self._position]

    def _skip(self, size: int) -> None:
        self._position += size
        if self._position > len(self._content):
            raise IndexError("it ends too early")

    def _line(self) -> str:
        end = self._content.index(b"\n", self._position)
        return self._take(end + 1 - self._position)[:-1].decode()

    def _call(self) -> None:
        called, arguments = self._pop(2)
        if not (isinstance(called, Named) and called.arguments is None and isinstance(arguments, tuple)):
            raise TypeError("it calls what it did not import")
        self.stack.append(Named(called.name, arguments))

    def _build(self) -> None:
        (state,) = self._pop(1)
        made = self.stack[-1]
        if not isinstance(made, Named) or made.arguments is None:
            raise TypeError("it changes what it did not make")
        made.state = state

    def _extend(self, kind: type, values: list[typing.Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list) or type(target) is not kind:
            raise TypeError(f"an operation on {kind.__name__} meets {type(target).__name__}")
        target.extend(values)

    def _pop(self, count: int) -> list[typing.Any]:
        start = len(self.stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise IndexError("it takes more than there is")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _pop_marked(self) -> list[typing.Any]:
        start = self._marks.pop()
        return self._pop(len(self.stack) - start)

    def _import(self, module: typing.Any, name: typing.Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("it imports what has no name")
        if f"{module}.{name}" not in self._names:
            raise ValueError(
                f"it asks for {module[:80]}.{name[:80]}, which no index of ours holds: it was made to run code, or by "
                "another version of torch; nothing of it was run"
            )
        self.stack.append(Named(f"{module}.{name}"))


def _paired(values: list[typing.Any]) -> list[tuple[typing.Any, typing.Any]]:
    return list(zip(values[::2], values[1::2], strict=True))


_CONSTANTS = {pickle.NONE[0]: None, pickle.NEWTRUE[0]: True, pickle.NEWFALSE[0]: False}
_NUMBERS = {pickle.BININT[0]: ("<i", 4), pickle.BININT1[0]: ("<B", 1), pickle.BININT2[0]: ("<H", 2)}
