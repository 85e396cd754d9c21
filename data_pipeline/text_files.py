"""Reads delimited text files (CSV, TSV, .dat; also .gz) with Arrow, and says what is wrong with a line that it refuses.

Arrow is fast but lenient: it accepts a quote that never closes, and text after a closing quote. So a file that holds a
quote is read a second time by the strict parser of Python's csv module, which must find the same number of rows.
"""

import codecs
import collections.abc
import csv
import dataclasses
import gzip
import pathlib
import re
import typing
import zlib

import pyarrow as pa
import pyarrow.csv

from gpsd_dist.disk.reading import raise_if_passing

MAX_LINE_BYTES = 2 << 20
"""Longest line: it bounds the memory that a file can claim."""
_BLOCK_BYTES = 2 * MAX_LINE_BYTES  # Arrow needs a row to lie within one block
_ONE_BYTE_SEPARATOR = "\x1f"  # stands for a separator of several letters, because Arrow knows separators of one only
_READ_ERRORS = (OSError, EOFError, zlib.error)


@dataclasses.dataclass(frozen=True)
class TextStyle:
    """Says how text files are written."""

    separator: str = ","
    columns: tuple[str, ...] = ()
    """Names in order, for files without a header line."""
    quote: str | None = None
    """None: a double quote, and quotes that seem to join rows are refused. "": quotes are letters like others."""
    escape: str = ""
    """Letter before a quote that belongs to a value; "": such a quote is doubled."""
    keeps_blank_lines: bool = False
    """A blank line is a row without values."""

    @property
    def quotechar(self) -> str:
        """Names the quote in force; "" for none."""
        return '"' if self.quote is None else self.quote

    @property
    def one_letter_separator(self) -> str:
        """Names the separator after `edited`."""
        return self.separator if len(self.separator) == 1 else _ONE_BYTE_SEPARATOR

    def edited(self, block: bytes) -> bytes:
        """Brings whole lines to the dialect that Arrow and the csv module read alike: doubled quotes, one separator."""
        if self.escape and (escape := self.escape.encode()) in block:
            quote = self.quotechar.encode()
            new = {escape + escape: escape, escape + quote: quote + quote}
            pairs = b"|".join(re.escape(pair) for pair in new)
            block = re.sub(pairs, lambda match: new[match[0]], block)
        if len(self.separator) > 1:
            block = block.replace(self.separator.encode(), _ONE_BYTE_SEPARATOR.encode())
        return block


class TextFile:
    """One text file. `names` are its columns; `batches` streams them as text."""

    def __init__(self, path: pathlib.Path, style: TextStyle):
        """Reads the first line. ValueError where it cannot be read, or has another number of fields than expected."""
        self.path, self.style = path, style
        self.num_joined = 0
        """Rows with a line end inside of quotes; known after `batches` has ended."""
        self._num_blank, first = 0, []
        for first, *_ in self._records(_lines(path, style)):
            if first:
                break
            self._num_blank += 1
        self.names = list(style.columns) or first
        if first and len(first) != len(self.names):
            raise ValueError(
                f"{path}: the first line has {len(first)} fields, expected {len(self.names)}: {self.names}; check the "
                "separator"
            )

    def batches(self, names: collections.abc.Sequence[str]) -> typing.Iterator[pa.RecordBatch]:
        """Streams the columns `names` as strings, "" for an empty field. ValueError names the line that is wrong."""
        stream, num_rows = _Stream(self.path, self.style), 0
        places = [f"c{self.names.index(name)}" for name in names]
        try:
            for batch in self._arrow_batches(stream, places):
                num_rows += batch.num_rows
                yield batch.rename_columns(list(names))
        except _READ_ERRORS as error:
            raise_if_passing(self.path, error)
            raise ValueError(_unreadable(self.path, error)) from error
        except pa.ArrowInvalid as error:
            self.count_rows()  # finds the line, and words the mistake
            raise ValueError(f"{self.path} cannot be read as text ({str(error)[:200]}); correct the file") from error
        if stream.has_quotes and (strict := self.count_rows()) != num_rows:
            raise ValueError(
                f"{self.path}: its quotes can be read in two ways, as {num_rows:,} or as {strict:,} rows; state "
                '`quote` and `escape` in [csv]; `quote = ""` if quotes are letters like others'
            )

    def _arrow_batches(self, stream: "_Stream", places: list[str]) -> typing.Iterator[pa.RecordBatch]:
        every = [f"c{number}" for number in range(len(self.names))]
        style = self.style
        try:
            reader = pa.csv.open_csv(
                pa.PythonFile(stream, mode="r"),
                read_options=pa.csv.ReadOptions(
                    column_names=every,
                    skip_rows_after_names=0 if style.columns else 1 + self._num_blank,
                    block_size=_BLOCK_BYTES,
                ),
                parse_options=pa.csv.ParseOptions(
                    delimiter=style.one_letter_separator,
                    quote_char=style.quotechar or False,
                    newlines_in_values=bool(style.quotechar),
                    ignore_empty_lines=not style.keeps_blank_lines,
                ),
                convert_options=pa.csv.ConvertOptions(
                    column_types=dict.fromkeys(every, pa.string()), include_columns=places, strings_can_be_null=False
                ),
            )
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):
                return
            raise
        yield from reader

    def count_rows(self) -> int:
        """Counts the rows with a strict parser. ValueError for the first line that it refuses, and for joined rows."""
        num_fields, num_rows, self.num_joined = len(self.names), 0 if self.style.columns else -1, 0
        try:
            for fields, line, lines in self._records(_lines(self.path, self.style)):
                if fields:
                    num_rows += 1
                    if len(fields) != num_fields:
                        raise ValueError(
                            f"{self.path}, line {line}: found {len(fields)} fields, expected {num_fields}: "
                            f"{_shown(lines)}; correct the line, or state `separator`, `quote` and `escape` in [csv]"
                        )
                self.num_joined += len(lines) > 1
                if len(lines) > 1 and self.style.quote is None and self._are_rows(lines, num_fields):
                    raise ValueError(
                        f"{self.path}, line {line}: a quote opens a value that ends only in line "
                        f"{line + len(lines) - 1}, and each line between looks like a row of its own: {_shown(lines)}; "
                        'state `quote = ""` in [csv] if quotes are letters like others, or `quote = \'"\'` if the '
                        "value really has these line ends"
                    )
        except csv.Error as error:
            raise ValueError(_quote_mistake(self.path, self._last_start, self._last_lines, error)) from error
        return max(num_rows, 0)

    def _records(self, lines: typing.Iterator[str]) -> typing.Iterator[tuple[list[str], int, list[str]]]:
        """Yields (fields, number of its first line, its lines) of every row."""
        self._last_start, self._last_lines = 1, []
        csv.field_size_limit(_BLOCK_BYTES)
        for fields in csv.reader(
            self._remembered(lines),
            delimiter=self.style.one_letter_separator,
            quotechar=self.style.quotechar or None,
            quoting=csv.QUOTE_MINIMAL if self.style.quotechar else csv.QUOTE_NONE,
            strict=True,
        ):
            yield fields, self._last_start, self._last_lines
            self._last_start, self._last_lines = self._last_start + len(self._last_lines), []

    def _remembered(self, lines: typing.Iterator[str]) -> typing.Iterator[str]:
        for line in lines:
            self._last_lines.append(line)
            yield line

    def _are_rows(self, lines: list[str], num_fields: int) -> bool:
        """Tells whether every line would be a row by itself, if quotes were letters."""
        return num_fields > 1 and all(line.count(self.style.one_letter_separator) == num_fields - 1 for line in lines)


class _Stream:
    """Gives a file's bytes to Arrow, whole lines at a time, without ever holding more than a few of them."""

    closed = False

    def __init__(self, path: pathlib.Path, style: TextStyle):
        self.has_quotes = False
        self._quote = style.quotechar.encode()
        self._blocks, self._left = _blocks(path, style), b""

    def read(self, num_bytes: int = -1) -> bytes:
        """Returns up to that many bytes, b"" at the end."""
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return b""
            self.has_quotes |= bool(self._quote) and self._quote in block
            self._left = block
        num_bytes = len(self._left) if num_bytes < 0 else num_bytes
        part, self._left = self._left[:num_bytes], self._left[num_bytes:]
        return part

    def readable(self) -> bool:
        """Tells Arrow that the stream is to be read."""
        return True

    def close(self) -> None:
        """Does nothing: the file is closed when the stream is forgotten."""


def _open(path: pathlib.Path) -> gzip.GzipFile | typing.BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _is_utf8(block: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(block)  # a character may be cut at its end
    except UnicodeDecodeError:
        return False
    return True


def _blocks(path: pathlib.Path, style: TextStyle) -> typing.Iterator[bytes]:
    """Yields the file in blocks that end with a line. ValueError for a line longer than MAX_LINE_BYTES."""
    with _open(path) as file:
        rest = b""
        while block := file.read(1 << 20):
            end = max(block.rfind(b"\n"), block.rfind(b"\r", 0, -1)) + 1  # never between \\r and \\n
            # What is no UTF-8 either is named by the decoder, with its line.
            if (place := block.find(b"\0")) >= 0 and _is_utf8(block):
                raise ValueError(
                    f"{path} holds a byte 0, after {block[max(place - 30, 0) : place]!r}: it is UTF-16, damaged, or no "
                    "text; convert it to UTF-8, or fetch it again"
                )
            if end:
                yield style.edited(rest + block[:end])
                rest = block[end:]
            else:
                rest += block
            if len(rest) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}: a line is longer than {MAX_LINE_BYTES >> 20} MB, expected rows of text; it begins with "
                    f"{rest[:60]!r}: is it a file of another kind?"
                )
        if rest:
            yield style.edited(rest)


def _lines(path: pathlib.Path, style: TextStyle) -> typing.Iterator[str]:
    """Yields the lines of a UTF-8 file with their ends."""
    number = 0
    try:
        for block in _blocks(path, style):
            for line in block.splitlines(keepends=True):
                number += 1
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        is_gzip = number == 1 and line.startswith(b"\x1f\x8b")
        fix = "it is compressed: let its name end with .gz" if is_gzip else "convert the file to UTF-8"
        raise ValueError(f"{path}, line {number}: not UTF-8 text ({error}); {fix}") from error
    except _READ_ERRORS as error:
        raise_if_passing(path, error)
        raise ValueError(_unreadable(path, error)) from error


def _unreadable(path: pathlib.Path, error: Exception) -> str:
    if path.suffix == ".gz":
        return f"{path} is not a whole gzip file ({error}): truncated or changed on its way; fetch it again"
    return f"{path} cannot be read to its end ({error}); fetch it again"


def _quote_mistake(path: pathlib.Path, line: int, lines: list[str], error: Exception) -> str:
    has_escapes = any('\\"' in text for text in lines)
    fix = "state `escape = '\\'` in [csv]" if has_escapes else "correct the line"
    words = "a quote is not closed" if "unexpected end" in str(error) else str(error)
    return (
        f'{path}, line {line}: {words}: {_shown(lines)}; {fix}, or state `quote = ""` there if quotes are letters like '
        "others"
    )


def _shown(lines: list[str]) -> str:
    return repr(lines[0].rstrip("\r\n")[:120]) if lines else "''"
