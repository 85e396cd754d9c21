"""Reads from a Parquet footer how many values and bytes every column chunk has.

Arrow knows these too, but ends the process when one is asked for and a damaged footer breaks one of its rules: its
`RowGroupMetaData.column` lets an exception of C++ through that Python cannot catch (pyarrow 26). Format: thrift's
compact protocol (github.com/apache/thrift, doc/specs/thrift-compact-protocol.md) of the structs in parquet.thrift
(github.com/apache/parquet-format).
"""

import os
import pathlib
import typing

_TAIL = 8  # bytes at the end of the file: length of the footer, then "PAR1"
_ROW_GROUPS, _COLUMNS, _META_DATA, _NUM_VALUES, _STORED_BYTES = 4, 1, 3, 5, 7  # numbers of the fields in their structs
_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 12  # types
_SIZES = {_TRUE: 0, _FALSE: 0, _BYTE: 1, _DOUBLE: 8}  # bytes of a value; the type of a boolean field is its value


class Chunk(typing.NamedTuple):
    """Holds the sizes of one column of one row group."""

    num_values: int  # Counts as Parquet does: an empty or missing list is one value
    stored_bytes: int  # Compressed size


def read_bytes(path: pathlib.Path) -> bytes:
    """Reads the encoded footer of a file. OSError if there is none."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TAIL, 0))
        length = int.from_bytes(file.read(4), "little")
        if length + _TAIL > size:
            raise OSError(f"the footer should have {length} bytes, but the file has {size}")
        file.seek(size - _TAIL - length)
        return file.read(length)


def chunks(footer: bytes) -> list[tuple[Chunk, ...]]:
    """Decodes the column chunks of every row group, in the order of the leaves of the schema. OSError for damage."""
    try:
        groups = _Decoder(footer).struct()[_ROW_GROUPS]
        metas = [[column[_META_DATA] for column in group[_COLUMNS]] for group in groups]
        found = [tuple(Chunk(meta[_NUM_VALUES], meta[_STORED_BYTES]) for meta in group) for group in metas]
    except (IndexError, KeyError, TypeError, RecursionError) as error:
        raise OSError("the footer is damaged") from error
    if not all(type(number) is int for group in found for chunk in group for number in chunk):
        raise OSError("the footer is damaged: a size is no number")
    return found


class _Decoder:
    """Decodes structs to {number of the field: value}; numbers and lists only, everything else is None."""

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    def struct(self) -> dict[int, typing.Any]:
        fields, number = {}, 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15)
        return fields

    def _value(self, kind: int) -> typing.Any:
        if kind in _INTEGERS:
            return self._integer()
        if kind == _STRUCT:
            return self.struct()
        if kind in _LISTS:
            return self._list()
        if kind == _BINARY:
            num_bytes = self._unsigned()
        elif kind in _SIZES:
            num_bytes = _SIZES[kind]
        else:
            raise OSError(f"the footer is damaged: it has a value of type {kind}")
        self._at += num_bytes
        return None

    def _list(self) -> list:
        head = self._byte()
        size = head >> 4 if head >> 4 < 15 else self._unsigned()
        kind = _BYTE if head & 15 in (_TRUE, _FALSE) else head & 15  # in a list a boolean has a byte
        if size > len(self._content):  # every element has a byte at least
            raise OSError(f"the footer is damaged: it has a list of {size} values")
        return [self._value(kind) for _ in range(size)]

    def _integer(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)

    def _unsigned(self) -> int:
        value = shift = 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise OSError("the footer is damaged: a number has more than 64 bits")

    def _byte(self) -> int:
        byte = self._content[self._at]
        self._at += 1
        return byte
