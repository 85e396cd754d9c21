"""Keeps decoded row groups of one split on disk, as Arrow IPC that is mapped into memory: what Parquet costs, once.

    BASE/pretrain.<data>.<columns>/17.arrow    row group 17: an IPC stream, then 32 bytes of its SHA-256

BASE is `.decoded` in the folder of the data, which a version of `versions/` takes with it when it is deleted, or a
folder in `cache_dir`. `<data>` names the files by their footers, sizes and times: a folder of other data is deleted.
Files are written whole and never change, so ranks and jobs share them. Nothing here can fail a run: where the cache
cannot be read or written, one line says so, and Parquet is decoded as without it. On file systems that other machines
write to, files are read and not mapped: a mapped file that another client deletes ends the process (SIGBUS).
"""

import collections.abc
import contextlib
import hashlib
import logging
import os
import pathlib
import re
import secrets
import shutil

import pyarrow as pa
import pyarrow.compute as pc

from gpsd_dist.disk.reading import why_passing

FOLDER_NAME = ".decoded"
_FORMAT = 1
_HASH_BYTES = 32
_MIN_FREE = 0.05  # share of the disk that is left to others (untuned)
_RECOUNT_SHARE = 16  # other ranks write too: count again after each 1/16 of what is allowed
_MAX_INT32 = 2**31 - 1
_LOCAL = frozenset(("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"))

log = logging.getLogger(__name__)


def base_folder(data_dir: pathlib.Path, cache_dir: str) -> pathlib.Path:
    """Returns BASE: beside the data, or in `cache_dir`, a folder for several data sets."""
    if not cache_dir:
        return data_dir / FOLDER_NAME
    return pathlib.Path(cache_dir) / _short(os.path.abspath(data_dir))


class DecodedCache:
    """Reads and writes the row groups of one split; may be asked by one thread at a time."""

    def __init__(
        self,
        base: pathlib.Path,
        max_bytes: int,
        split: str,
        files: collections.abc.Iterable[tuple[pathlib.Path, bytes]],
        schema: pa.Schema,
    ):
        """`max_bytes`: of BASE, over all splits. `files`: paths of the split, each with the hash of its footer."""
        facts = [(path.name, footer, (found := path.stat()).st_size, found.st_mtime_ns) for path, footer in files]
        data, columns = _short(repr((_FORMAT, facts))), _short(str(schema))
        self._base, self._max_bytes, self._schema = base, max_bytes, schema
        self._folder = base / f"{split}.{data}.{columns}"
        self._is_writable, self._left_bytes, self._until_recount = True, 0, 0
        self._verified: set[int] = set()
        self._open = pa.memory_map if _is_local(base) else pa.OSFile
        with self._unharmed():
            for other in base.glob(f"{split}.*"):
                if other.name.split(".")[-2] != data:
                    shutil.rmtree(other, ignore_errors=True)

    def read(self, group: int) -> pa.Table | None:
        """Maps or reads a row group. None if it is not there, cannot be read now, or is damaged and so removed."""
        path = self._path(group)
        try:
            with self._open(str(path)) as file:
                content = file.read_buffer()
            stream, sum_of_stream = content[:-_HASH_BYTES], content[-_HASH_BYTES:]
            # Once for each process: page checksums of Parquet do not reach here.
            if group not in self._verified and hashlib.sha256(stream).digest() != sum_of_stream.to_pybytes():
                raise ValueError("it differs from its checksum")
            self._verified.add(group)
            with pa.ipc.open_stream(stream) as reader:
                return reader.read_all()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (MemoryError, OSError, pa.ArrowException, ValueError) as error:
            log.warning("%s is decoded again: %s", path, error)
            if why_passing(error) or getattr(error, "errno", None):
                return None  # says nothing about the bytes
            with self._unharmed():
                path.unlink(missing_ok=True)
            return None

    def write(self, group: int, table: pa.Table) -> None:
        """Writes a row group, if it is not there and there is room."""
        path = self._path(group)
        if not self._is_writable:
            return
        with self._unharmed():
            if path.exists():
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            stream = sink.getvalue()
            if not self._has_room(stream.size):
                return
            partial = path.with_name(f".{secrets.token_hex(8)}")
            try:
                with partial.open("wb") as file:
                    file.write(stream)
                    file.write(hashlib.sha256(stream).digest())
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)

    def _path(self, group: int) -> pathlib.Path:
        return self._folder / f"{group}.arrow"

    def _has_room(self, num_bytes: int) -> bool:
        if self._until_recount < num_bytes:
            used = sum(file.stat().st_size for file in self._base.rglob("*") if file.is_file())
            self._left_bytes, self._until_recount = self._max_bytes - used, self._max_bytes // _RECOUNT_SHARE
            disk = shutil.disk_usage(self._base)
            self._left_bytes = min(self._left_bytes, int(disk.free - _MIN_FREE * disk.total))
        if num_bytes > self._left_bytes:
            self._close(f"is full: {self._max_bytes / 2**30:g} GiB are allowed (DataConfig.cache_gib), and a part of "
                        "the disk stays free; further row groups are decoded each time they are read")  # fmt: skip
            return False
        self._left_bytes -= num_bytes
        self._until_recount -= num_bytes
        return True

    @contextlib.contextmanager
    def _unharmed(self) -> collections.abc.Iterator[None]:
        """Goes on without the cache if the file system does not do what is asked inside the block."""
        try:
            yield
        except FileNotFoundError as error:  # another process was faster, or the data set is being deleted
            log.debug("%s", error)
        except OSError as error:
            self._close(f"cannot be written ({error.strerror}), so row groups are decoded each time they are read; "
                        "DataConfig.cache_dir names another place, DataConfig.cache_gib=0 goes without")  # fmt: skip

    def _close(self, why: str) -> None:
        if not self._is_writable:
            return
        log.info("cache of decoded data: %s %s", self._base, why)
        self._is_writable = False  # what is there is read all the same


def _is_local(folder: pathlib.Path) -> bool:
    """Says whether a folder, which need not be there yet, is on a file system that this machine alone writes to."""
    path, found = os.path.realpath(folder), ("", "")
    with contextlib.suppress(OSError), open("/proc/self/mounts", errors="surrogateescape") as mounts:
        for line in mounts:
            _, place, kind, *_ = line.split(" ")
            place = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), place)
            if len(place) >= len(found[0]) and os.path.commonpath((path, place)) == place:
                found = place, kind
    return found[1] in _LOCAL


def narrowed(table: pa.Table) -> pa.Table:
    """Casts lists of int64 to int32 where every value fits: half the bytes to keep and to move."""
    for number, field in enumerate(table.schema):
        if field.type == pa.list_(pa.int64()) and _fits(table.column(number)):
            narrow = field.with_type(pa.list_(pa.int32()))
            table = table.set_column(number, narrow, table.column(number).cast(narrow.type))
    return table


def _fits(column: pa.ChunkedArray) -> bool:
    found = pc.min_max(pc.list_flatten(column)).as_py()
    return found["min"] is not None and found["min"] >= 0 and found["max"] <= _MAX_INT32


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
