"""Opens and checks the Parquet files of one split, then reads them row group by row group.

Knows files, columns and row groups; knows nothing of batches, shuffling or ranks.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import pathlib
import typing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpsd_dist import schema
from gpsd_dist.data import parquet_footer
from gpsd_dist.data.decoded_cache import DecodedCache, narrowed
from gpsd_dist.disk import reading
from gpsd_dist.disk.reading import why_passing

MAX_OPEN_FILES = 32
DEFAULT_CACHE_BYTES = 256 * 2**20
_FOOTER_THREADS = 8
_MAX_SHOWN = 10  # problems in one message
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError)  # the last: a damaged name in a footer


@dataclasses.dataclass(frozen=True)
class BatchKey:
    """Names one batch of one rank; seeds whatever is drawn for it (negatives)."""

    epoch: int
    step: int  # Batch of the epoch, from 0
    rank: int


class BadValue(ValueError):
    """Says which value of a batch breaks the contract. Collate raises it, the loader adds the file."""

    def __init__(self, column: str, row_in_batch: int, problem: str):
        super().__init__(f"column {column!r}, row {row_in_batch} of the batch: {problem}")
        self.column = column
        self.row_in_batch = row_in_batch
        self.problem = problem


class RowGroup(typing.NamedTuple):
    """Locates a row group."""

    path: pathlib.Path
    number: int  # Number of the row group in its file, from 0
    first_row: int  # Row in the file of its first row
    num_rows: int
    num_history_tokens: int  # A row without history counts as 1
    chunks: tuple[parquet_footer.Chunk, ...]  # Sizes of each of its columns in the file
    footer_sha256: bytes  # Hash of the file's footer: a file that is replaced during the run has another one


class ParquetSplit:
    """Reads row groups of one split. Not thread-safe: one reader at a time.

    Keeps at most `MAX_OPEN_FILES` files open and the most recently used decoded row groups up to `cache_bytes`, so a
    data set that fits is decoded once, not once per data shard and epoch. What does not fit goes to the cache on disk.
    """

    def __init__(
        self,
        data_dir: str | pathlib.Path,
        manifest: schema.Manifest,
        split: str,
        columns: typing.Sequence[str] | None = None,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        disk_cache: tuple[pathlib.Path, int] | None = None,
    ):
        """Reads all footers, no data. `columns`: what `read_group` returns, None means all columns of the split.

        `disk_cache`: folder and bytes for what does not stay in memory (`decoded_cache`). With it, lists of int64
        come as int32 where all values of a row group fit.

        Raises:
            ValueError: listing every missing, empty, unreadable or wrongly typed file, or a row count that differs
                from the manifest.
        """
        self.data_dir = pathlib.Path(data_dir)
        self.split = manifest.split(split)
        self._max_history_length = manifest.max_history_length
        self.full_schema = schema.arrow_schema(manifest, split)
        self.schema = self._select(columns)
        if not self.split.files:
            fix = "read another split, or build the data from a log that has rows in it"
            raise ValueError(f"split {split!r} of {self.data_dir} lists no files, so it has no rows; {fix}")
        self._paths = [self.data_dir / file for file in self.split.files]
        self.groups = self._read_footers(f"history.{manifest.item_feature}")
        self.group_rows_G = np.array([group.num_rows for group in self.groups], np.int64)
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._disk: DecodedCache | None = None
        if disk_cache is not None:
            files = {group.path: group.footer_sha256 for group in self.groups}
            self._disk = DecodedCache(*disk_cache, split, files.items(), self.schema)
        self._cache: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._open: collections.OrderedDict[pathlib.Path, pq.ParquetFile] = collections.OrderedDict()

    @property
    def num_rows(self) -> int:
        """Counts the rows of the split; the manifest says as many."""
        return self.split.num_rows

    def fingerprint(self) -> str:
        """Hashes file names and row group sizes: two data sets read alike only if it agrees."""
        lines = [f"{group.path.relative_to(self.data_dir).as_posix()} {group.num_rows}" for group in self.groups]
        return _short_hash("\n".join(lines))

    @functools.cached_property
    def content(self) -> str:
        """Hashes the stored sizes of all columns of all row groups, from the footers: the same for copies, and
        practically never for a data set whose values differ. Equal values that another version of Arrow wrote may
        have another one.
        """
        stored_bytes = [tuple(chunk.stored_bytes for chunk in group.chunks) for group in self.groups]
        return _short_hash(repr(stored_bytes))

    def read_group(self, group: int) -> pa.Table:
        """Reads the columns of one row group, from the cache if it is there.

        Raises:
            ValueError: the data of the row group cannot be decoded, or a page differs from its checksum.
        """
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        table = self._disk.read(group) if self._disk is not None else None
        if table is None:
            table = self._decode(group, self.schema)
            table = narrowed(table) if self._disk is not None else table
        dropped = [(group, table)]
        if table.nbytes <= self._cache_bytes:
            self._cache[group], dropped = table, []
            self._cached_bytes += table.nbytes
            while self._cached_bytes > self._cache_bytes:
                dropped.append(self._cache.popitem(last=False))
                self._cached_bytes -= dropped[-1][1].nbytes
        if self._disk is not None:  # what stays in memory needs no file: small data sets leave none
            for number, rows in dropped:
                self._disk.write(number, rows)
        return table

    def read_history_length(self, group: int) -> np.ndarray:
        """Reads the column `history_length` of one row group, and no other: int32 [rows]."""
        field = self.full_schema.field("history_length")
        column = self._decode(group, pa.schema([field])).column(0)
        if column.null_count:
            raise ValueError(
                f"{self.groups[group].path}: column 'history_length' has {column.null_count} nulls in row group "
                f"{self.groups[group].number}, expected none; build the data set again"
            )
        return column.to_numpy()

    def token_weights(self, longest: int | None) -> tuple[np.ndarray, int]:
        """Returns (int64 [G]: history tokens of every row group with at least 1 a row, tokens of the split).

        At most `longest` tokens of a row count. Only if there are longer ones, all history lengths are read.
        """
        if longest is None or longest >= self._max_history_length:
            weight_G = np.array([group.num_history_tokens for group in self.groups], np.int64)
            return weight_G, self.split.num_history_tokens
        lengths = [np.minimum(self.read_history_length(group), longest) for group in range(len(self.groups))]
        weight_G = np.array([np.maximum(part, 1).sum() for part in lengths], np.int64)
        return weight_G, sum(int(part.sum()) for part in lengths)

    def origin(self, group: int, row_in_group: int) -> tuple[pathlib.Path, int]:
        """Returns file, and row in it (from 0), of one row of a row group."""
        return self.groups[group].path, self.groups[group].first_row + row_in_group

    def close(self) -> None:
        """Closes the files and drops what was decoded; reading again opens them anew."""
        while self._open:
            self._open.popitem()[1].close()
        self._cache.clear()
        self._cached_bytes = 0

    def _select(self, columns: typing.Sequence[str] | None) -> pa.Schema:
        if columns is None:
            return self.full_schema
        unknown = [name for name in columns if name not in self.full_schema.names]
        if unknown:
            raise ValueError(f"split {self.split.name!r} has no columns {unknown}; it has {self.full_schema.names}")
        return pa.schema([self.full_schema.field(name) for name in columns])

    def _read_footers(self, history: str) -> list[RowGroup]:
        """Checks all files; `history` is a list column with one entry per history token."""
        needed = {field.name: field for field in [*self.schema, self.full_schema.field("history_length")]}
        with concurrent.futures.ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            footers = list(
                pool.map(
                    lambda path: reading.again(
                        path, lambda: _read_footer(self.data_dir, path, list(needed.values()), history)
                    ),
                    self._paths,
                )
            )
        problems = [problem for _, found in footers for problem in found]
        if problems:
            more = f"\n  ... and {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
            listing = "\n  ".join(problems[:_MAX_SHOWN])
            raise ValueError(f"split {self.split.name!r} of {self.data_dir} cannot be read:\n  {listing}{more}")
        counts = [sum(group.num_rows for group in groups) for groups, _ in footers]
        if sum(counts) != self.split.num_rows:
            shown = ", ".join(f"{path} {rows}" for path, rows in list(zip(self._paths, counts))[:_MAX_SHOWN])
            raise ValueError(
                f"split {self.split.name!r}: the files have {sum(counts)} rows, {schema.MANIFEST_NAME} says "
                f"{self.split.num_rows} (rows per file: {shown}); files and manifest are not from the same build, "
                "build the data set again"
            )
        return [group for groups, _ in footers for group in groups]

    def _decode(self, group: int, wanted: pa.Schema) -> pa.Table:
        path = self.groups[group].path
        return reading.again(path, lambda: self._decode_once(group, wanted))

    def _decode_once(self, group: int, wanted: pa.Schema) -> pa.Table:
        path, index, num_rows = self.groups[group].path, self.groups[group].number, self.groups[group].num_rows
        try:
            # Not memory-mapped: the speed is the same and a file that shrinks is an error, not a SIGBUS.
            file = self._file(self.groups[group])
            table = file.read_row_group(index, columns=wanted.names, use_threads=False)
            table = table.select(wanted.names).replace_schema_metadata(None)
            _check_num_values(table, file.schema_arrow.names, self.groups[group].chunks)
            if table.schema != wanted:  # other names or nullability of list elements
                table = table.cast(wanted)
        except _UNREADABLE as error:
            if why_passing(error):
                if (stale := self._open.pop(path, None)) is not None:  # a new handle may work
                    stale.close()
                raise
            raise ValueError(
                f"{path}: row group {index} cannot be decoded ({error}); the file is damaged or was changed after the "
                "run had opened it, copy it again or build the data set again"
            ) from error
        if table.num_rows != num_rows:
            raise ValueError(f"{path}: row group {index} has {table.num_rows} rows, at the start it had {num_rows}")
        return table

    def _file(self, group: RowGroup) -> pq.ParquetFile:
        path = group.path
        if path not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[path] = pq.ParquetFile(path, page_checksum_verification=True)
            if _sha256(parquet_footer.read_bytes(path)) != group.footer_sha256:
                self._open.pop(path).close()
                raise OSError("its footer is not that of the start")
        self._open.move_to_end(path)
        return self._open[path]


def _read_footer(
    data_dir: pathlib.Path, path: pathlib.Path, needed: list[pa.Field], history: str
) -> tuple[list[RowGroup], list[str]]:
    """Reads one footer: row groups with at least one row, and what is wrong with the file."""
    root = data_dir.resolve()
    if root not in path.resolve().parents:
        return [], [f"{path} is a link that leads out of {root}; copy the file, or use the folder that it is in"]
    if not path.is_file():
        return [], [f"{path} does not exist, but {schema.MANIFEST_NAME} lists it; copy it or build the data set again"]
    if path.stat().st_size == 0:
        return [], [f"{path} is empty (0 bytes), expected a Parquet file; copy it again or build the data set again"]
    try:
        with pq.ParquetFile(path) as file:
            found, metadata = file.schema_arrow, file.metadata
            rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
            footer = parquet_footer.read_bytes(path)
            chunks = parquet_footer.chunks(footer)
            if [len(group) for group in chunks] != [metadata.num_columns] * len(rows):
                raise OSError("a row group has other columns than the schema")
            tokens = _history_tokens(metadata, chunks, history)
    except _UNREADABLE as error:
        if why_passing(error):
            raise
        return [], [f"{path} is truncated or not a Parquet file ({error}); copy it again or build the data set again"]
    problems = []
    if sum(rows) == 0:
        problems.append(f"{path} is empty: it has columns but no rows; build the data set again")
    for field in needed:
        if field.name not in found.names:
            problems.append(
                f"{path}: column {field.name!r} is missing, the file has {found.names}; build the data set again"
            )
        elif not _is_same_type(found.field(field.name).type, field.type):
            problems.append(
                f"{path}: column {field.name!r} has type {found.field(field.name).type}, expected {field.type}; "
                "build the data set again"
            )
    starts, sha256 = np.cumsum([0, *rows]), _sha256(footer)
    groups = [
        RowGroup(path, number, int(starts[number]), num, tokens[number], chunks[number], sha256)
        for number, num in enumerate(rows)
        if num
    ]
    return groups, problems


def _short_hash(text: str) -> str:
    return _sha256(text.encode()).hex()[:16]


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _history_tokens(
    metadata: pq.FileMetaData, chunks: list[tuple[parquet_footer.Chunk, ...]], history: str
) -> list[int]:
    """Counts values of every row group, undecoded; an empty list is one to Parquet. Rows where the column is not."""
    columns = range(metadata.num_columns)
    leaf = [i for i in columns if metadata.schema.column(i).path.startswith(f"{history}.")]
    if leaf:
        return [group[leaf[0]].num_values for group in chunks]
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


def _check_num_values(table: pa.Table, names: list[str], chunks: tuple[parquet_footer.Chunk, ...]) -> None:
    """Raises OSError if a column holds another number of values than the footer says.

    The checksum of a page leaves out the header of the page, and a number of values that is too small there silently
    cuts off the end of a list.
    """
    for name in table.column_names:
        expected = chunks[names.index(name)].num_values  # a column is one leaf here
        found = sum(_num_values(chunk) for chunk in table[name].chunks)
        if found != expected:
            raise OSError(f"column {name!r} has {found} values, the footer says {expected}")


def _num_values(array: pa.Array) -> int:
    """Counts values as Parquet does: an empty or missing list is one."""
    if not pa.types.is_list(array.type):
        return len(array)
    empty = len(array) - int(np.count_nonzero(np.diff(array.offsets.to_numpy())))
    return empty + _num_values(array.flatten())


def _is_same_type(left: pa.DataType, right: pa.DataType) -> bool:
    """Compares types up to the name and nullability of list elements, in which writers differ."""
    if pa.types.is_list(left) and pa.types.is_list(right):
        return _is_same_type(left.value_type, right.value_type)
    return left == right
