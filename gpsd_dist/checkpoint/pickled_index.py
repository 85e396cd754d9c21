"""Reads the index of a checkpoint from before `index.json` out of DCP's pickle `.metadata`, as data.

Each class that the pickle imports is replaced by a stand-in, which keeps what it is given: nothing is imported, called
or built. Time and memory are bounded by the length of the pickle.
"""

import io
import operator
import pickle
import typing

import torch

_METADATA = "torch.distributed.checkpoint.metadata."
_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_NAMES = {
    # BytesStorageMetadata is left out on purpose: DCP unpickles such entries, and we have only ever saved tensors
    *(f"{_METADATA}{name}" for name in ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta")),
    *(f"{_METADATA}{name}" for name in ("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    *(_INFO, "torch.Size", "torch.serialization._get_layout"),
    # Python 3.11.2 (Debian 12) pickles a member of an enum as getattr(enum, name); nothing here calls it.
    *("builtins.getattr", "__builtin__.getattr"),
    *(f"{module}.{name}Path" for module in ("pathlib", "pathlib._local") for name in ("", "Posix", "Windows")),
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
_OPERATIONS = (  # those with which pickle's protocols 2 to 5 write plain data and dataclasses
    "PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 "
    "LONG1 SHORT_BINUNICODE BINUNICODE EMPTY_LIST APPEND APPENDS SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 "
    "TUPLE3 GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD"
)


def read_pickled(content: bytes) -> dict[str, typing.Any]:
    """Returns the index in the form of `index.json`, its values unchecked. ValueError if it is not an index of ours."""
    try:
        return _document(unpickled(content), len(content))
    except ValueError:
        raise
    except Exception as error:  # a broken pickle can fail in any way; only code of this file and of `pickle` has run
        raise ValueError(f"it is broken ({type(error).__name__}: {error})") from error


class StandIn:
    """Stands for an object of one class that the pickle imports, and keeps what it would be built from."""

    name: typing.ClassVar[str] = ""  # module.name of the class
    arguments: tuple[typing.Any, ...]
    state: typing.Any

    def __new__(cls, *arguments: typing.Any) -> "StandIn":
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: typing.Any) -> None:
        self.state = state


class Pairs:
    """Stands for a dict. It does not hash its keys: those of a hostile pickle can be made to take for ever."""

    def __init__(self) -> None:
        self.items: list[tuple[typing.Any, typing.Any]] = []

    def __setitem__(self, key: typing.Any, value: typing.Any) -> None:
        self.items.append((key, value))


class _Unpickler(pickle._Unpickler):
    """Unpickles into stand-ins. Derived from Python's unpickler in Python: the one in C has fixed operations, and
    allocates as much memory as a memo number in the file asks for.
    """

    dispatch: typing.ClassVar = {
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _OPERATIONS.split())
    } | {pickle.EMPTY_DICT[0]: lambda self: self.append(Pairs())}

    def find_class(self, module: str, name: str) -> type[StandIn]:
        full = f"{module}.{name}"
        if full not in _NAMES:
            raise ValueError(
                f"it asks for {full[:160]}, which no index of ours holds: it was made to run code, or by another "
                "version of torch; nothing of it was run"
            )
        return type(name, (StandIn,), {"name": full})


def unpickled(content: bytes) -> typing.Any:
    """Unpickles into stand-ins, pairs, lists, tuples, strings and integers."""
    return _Unpickler(io.BytesIO(content)).load()


def _document(root: typing.Any, num_bytes: int) -> dict[str, typing.Any]:
    fields = _fields(root, f"{_METADATA}Metadata")
    places = {}
    for key, value in fields["storage_data"].items:
        index, info = _fields(key, f"{_METADATA}MetadataIndex"), _fields(value, _INFO)
        if info.get("transform_descriptors"):
            raise ValueError("a tensor is stored in a transformed form, which we never write")
        where = {"first_byte": operator.index(info["offset"]), "num_bytes": operator.index(info["length"])}
        places[_text(index["fqn"]), *_size(index["offset"])] = where | {"file": _text(info["relative_path"])}
    tensors, num_chunks = {}, 0
    for name, value in fields["state_dict_metadata"].items:
        entry = _fields(value, f"{_METADATA}TensorStorageMetadata")
        num_chunks += len(entry["chunks"])
        if num_chunks > num_bytes:  # one list can stand in many places of a pickle
            raise ValueError("it has more chunks than bytes")
        chunks = []
        for chunk in entry["chunks"]:
            part = _fields(chunk, f"{_METADATA}ChunkStorageMetadata")
            offsets, sizes = _size(part["offsets"]), _size(part["sizes"])
            chunks.append({"offsets": offsets, "sizes": sizes, **places[_text(name), *offsets]})
        dtype = entry["properties"].state[0].name.removeprefix("torch.")
        tensors[_text(name)] = {"dtype": dtype, "size": _size(entry["size"]), "chunks": chunks}
    return {"version": 1, "tensors": tensors}


def _fields(made: typing.Any, name: str) -> dict[str, typing.Any]:
    """Returns the attributes of an object of class `name`. ValueError if it is of another class."""
    if not isinstance(made, StandIn) or made.name != name:
        raise ValueError(f"it holds {getattr(made, 'name', type(made).__name__)} where {name} belongs")
    return {key: value for key, value in made.state.items if isinstance(key, str)}


def _size(made: StandIn) -> list[int]:
    (numbers,) = made.arguments
    return [operator.index(number) for number in numbers]


def _text(value: typing.Any) -> str:
    if not isinstance(value, str):  # never shown nor hashed: a tuple of tuples can be endless
        raise TypeError(f"a name is a {type(value).__name__}")
    return value
