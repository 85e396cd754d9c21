"""Reads and writes the files of torch.distributed.checkpoint (DCP) at a `Location`.

Written files are hashed on the way. Files that are read cannot run code: the index is JSON (`index`), the data files
are read with `weights_only=True`, and neither takes more memory than the files have bytes.
"""

import collections.abc
import contextlib
import copy
import hashlib
import io
import itertools
import logging
import mmap
import os
import pathlib
import typing
import zipfile

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensorBase
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from gpsd_dist.checkpoint import storage
from gpsd_dist.checkpoint.index import INDEX_NAME, read_index, to_json
from gpsd_dist.checkpoint.integrity import FileSum, read_checksums
from gpsd_dist.checkpoint.storage import Location, Remote
from gpsd_dist.disk.reading import why_passing
from gpsd_dist.disk.writing import PIECE_BYTES, create
from gpsd_dist.distributed.main_rank import described
from gpsd_dist.distributed.watchdog import Watchdog

log = logging.getLogger(__name__)
_ALIGNMENT = 64  # bytes: a cache line


class _HashedStream:
    """Hashes what is written to a binary stream, piece by piece, and tells the watchdog of each.

    On a disk every piece is synced: 60 GB that go to the page cache at once would be minutes of silence in one fsync.
    """

    def __init__(self, stream: typing.Any, watchdog: Watchdog, is_on_disk: bool):
        self._stream, self._watchdog, self._is_on_disk = stream, watchdog, is_on_disk
        self._digest = hashlib.sha256()
        self._num_bytes = self._num_synced = 0
        self.failure: OSError | None = None

    def write(self, content: typing.Any) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._digest.update(piece)
            self._num_bytes += len(piece)
            try:
                with self._watchdog.syncing():  # a store is sent a part of the file in some of these calls
                    self._stream.write(piece)
                if self._is_on_disk and self._num_bytes - self._num_synced >= PIECE_BYTES:
                    self.sync()
            except OSError as error:
                self.failure = error
                raise
        return len(view)

    def sync(self) -> None:
        """Waits until what was written is on the disk."""
        self._stream.flush()
        with self._watchdog.syncing():
            os.fsync(self._stream.fileno())
        self._num_synced = self._num_bytes

    def tell(self) -> int:
        return self._num_bytes

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """Does nothing: `_Files.create_stream` closes the stream beneath."""

    def sum(self) -> FileSum:
        return FileSum(self._digest.hexdigest(), self._num_bytes)


class _Files(FileSystemBase):
    """Gives DCP its file operations at a `Location`, and keeps the checksum of every file written."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.written: dict[str, FileSum] = {}
        self._watchdog = watchdog

    @contextlib.contextmanager
    def create_stream(self, path: typing.Any, mode: str) -> collections.abc.Iterator[io.IOBase]:
        if mode == "rb":
            with storage.open_read(path) as stream:
                yield stream
            return
        is_on_disk = isinstance(path, pathlib.Path)
        with contextlib.ExitStack() as closing, self._watchdog.writing():
            stream = closing.enter_context(os.fdopen(create(path), mode) if is_on_disk else path.open(mode))
            hashed = _HashedStream(stream, self._watchdog, is_on_disk)
            try:
                yield typing.cast(io.IOBase, hashed)
            except RuntimeError as error:  # torch's zip writer reports a wrong position instead of the failed write
                raise hashed.failure or error from error
            if is_on_disk:
                hashed.sync()
            with self._watchdog.syncing():  # the last part of an upload is sent here
                closing.close()
        self.written[path.name] = hashed.sum()

    def concat_path(self, path: typing.Any, suffix: str) -> typing.Any:
        return path / suffix

    def rename(self, path: typing.Any, new_path: typing.Any) -> None:
        path.rename(new_path)
        self.written[new_path.name] = self.written.pop(path.name)

    def init_path(self, path: typing.Any) -> typing.Any:
        return path

    def mkdir(self, path: typing.Any) -> None:
        path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: typing.Any) -> bool:
        return isinstance(checkpoint_id, pathlib.Path | Remote)

    def exists(self, path: typing.Any) -> bool:
        return bool(path.is_file())

    def rm_file(self, path: typing.Any) -> None:
        path.unlink()


class Writer(dcp.FileSystemWriter):
    """Writes CPU tensors into `folder`. Made for one `dcp.save`."""

    def __init__(self, folder: Location, watchdog: Watchdog | None = None):
        # `_Files` syncs each file. DCP would sync every disk of the machine for a stream without a file number.
        super().__init__(str(folder), sync_files=False, per_thread_copy_ahead=0)
        self.fs, self.path = _Files(watchdog or Watchdog()), folder

    @property
    def checkpoint_id(self) -> str:
        """Names the folder; DCP records it in `.metadata`."""
        return str(self.path)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes both forms of the index: `.metadata` for DCP's own tools, `index.json` for us. Rank 0 only."""
        super().finish(metadata, results)
        with self.fs.create_stream(self.fs.concat_path(self.path, INDEX_NAME), "wb") as file:
            file.write(to_json(metadata))

    @property
    def written(self) -> dict[str, FileSum]:
        """Checksums of the files that this rank has written, by name."""
        return self.fs.written


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint. Made for one `dcp.load`; the index is read when it is built.

    ValueError if the index is refused, or names bytes that its files do not have.
    """

    def __init__(self, checkpoint: Location):
        super().__init__(str(checkpoint))
        self.fs, self.path = _Files(Watchdog()), checkpoint
        self.index = read_index(checkpoint)
        _check_places(checkpoint, self.index)

    def read_metadata(self, *args: typing.Any, **kwargs: typing.Any) -> Metadata:
        """Returns the index. The arguments ask for one rank's own index, which we do not write."""
        return copy.copy(self.index)

    def row_shards(self, name: str) -> collections.abc.Iterator[torch.Tensor]:
        """Yields the saved shards of a tensor in the order of its rows, one in memory at a time. Not collective.

        Shards of columns are joined. KeyError if no tensor has the name.
        """
        entry = self.index.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        chunks = sorted(entry.chunks, key=lambda chunk: tuple(chunk.offsets))
        for _, columns in itertools.groupby(chunks, key=lambda chunk: tuple(chunk.offsets[:1])):
            parts = [self._saved(name, chunk, entry.properties.dtype) for chunk in columns]
            yield torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _saved(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> torch.Tensor:
        place = self.index.storage_data[MetadataIndex(name, chunk.offsets)]
        with self.fs.create_stream(self.path / place.relative_path, "rb") as file:
            tensor = torch.load(self._slice_file(file, place), map_location="cpu", weights_only=True)
        if not isinstance(tensor, torch.Tensor) or tensor.shape != chunk.sizes or tensor.dtype != dtype:
            raise ValueError(f"{place.relative_path} does not hold {name} as its index says: {chunk.sizes}, {dtype}")
        return tensor

    def _slice_file(self, file: typing.Any, sinfo: _StorageInfo) -> typing.IO[bytes]:
        """Returns the bytes of one tensor, which torch.save wrote as a zip archive. ValueError if that is compressed.

        An archive that only stores cannot take more memory than its file has bytes.

        https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/checkpoint/filesystem.py
        """
        with zipfile.ZipFile(io.BufferedReader(_Part(file, sinfo))) as archive:
            entries = archive.infolist()
        is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not is_stored or sum(entry.file_size for entry in entries) > sinfo.length:
            raise ValueError(f"{sinfo.relative_path} holds a tensor that is larger unpacked than in the file")
        return typing.cast(typing.IO[bytes], super()._slice_file(file, sinfo))


class _Part(io.RawIOBase):
    """Shows part of a file as a stream of its own. DCP has such a view, but it does not end where the part ends."""

    def __init__(self, file: typing.Any, place: _StorageInfo):
        self._file, self._start, self._length, self._at = file, place.offset, place.length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("before the start of the part")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: typing.Any) -> int:
        self._file.seek(self._start + self._at)
        content = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _check_places(checkpoint: Location, index: Metadata) -> None:
    """Checks that every byte range in the index lies inside its file.

    `read_index` has checked that shapes fit byte ranges, so no shape asks for more memory than the files have bytes.
    """
    ends: dict[str, int] = {}
    for info in index.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    checksums = read_checksums(checkpoint)
    for name, end in ends.items():
        if checksums is None:
            num_bytes = storage.num_bytes(checkpoint / name)
        elif name in checksums.files:
            num_bytes = checksums.files[name].num_bytes
        else:
            raise ValueError(f"the index of {checkpoint} names the file {name}, which has no checksum")
        if num_bytes < end:
            raise ValueError(f"the index of {checkpoint} speaks of {end:,} bytes of {name}, which has {num_bytes:,}")


class Staging:
    """Copies the tensors of a run to the host, for a thread that writes them while training goes on.

    All copies lie in one block of memory that is used again: fresh pages cost more than the copy. For a GPU the block
    is page-locked. torch's own allocator of such memory rounds each tensor up to a power of two: 64 GiB for 33.
    """

    def __init__(self) -> None:
        self._layout: list[tuple[torch.Size, torch.dtype]] = []
        self._copies: list[torch.Tensor] = []
        self._locked: torch.Tensor | None = None  # Any tensor at the start of the block

    def copy(self, tensors: dict[str, typing.Any]) -> dict[str, typing.Any]:
        """Copies nested dicts of tensors, ShardedTensors and DTensors, local shards only. Not collective.

        Waits for the GPU, once. The result of the call before is overwritten.
        """
        live = [part.detach() for part in _local_parts(tensors)]
        layout = [(part.shape, part.dtype) for part in live]
        is_cuda = any(part.is_cuda for part in live)
        if layout != self._layout:
            self._unlock()
            self._copies = host_block(layout)
            self._layout = layout
            if is_cuda:
                self._lock()
        for target, part in zip(self._copies, live, strict=True):
            target.copy_(part, non_blocking=is_cuda)
        if is_cuda:
            torch.cuda.current_stream().synchronize()
        return _rebuilt(tensors, iter(self._copies))

    def _lock(self) -> None:
        filled = [copy for copy in self._copies if copy.numel()]
        num_bytes = filled[-1].data_ptr() + filled[-1].nbytes - filled[0].data_ptr()
        if (status := int(torch.cuda.cudart().cudaHostRegister(filled[0].data_ptr(), num_bytes, 0))) != 0:
            log.warning(
                "%.1f GiB could not be page-locked for checkpoints (CUDA error %d, see `ulimit -l`): copies from the "
                "GPU are slower",
                num_bytes / 2**30,
                status,
            )
            # CUDA remembers the error until it is asked for, and torch asks behind each kernel: this one, not a step's.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")
            return
        self._locked = filled[0]

    def _unlock(self) -> None:
        if self._locked is not None:
            torch.cuda.cudart().cudaHostUnregister(self._locked.data_ptr())
            self._locked = None


def host_block(layout: list[tuple[torch.Size, torch.dtype]]) -> list[torch.Tensor]:
    """Allocates tensors side by side in one block, each with a storage of its own, without which DCP would copy it."""
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in layout]
    starts = list(itertools.accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
    block = mmap.mmap(-1, max(starts[-1], 1))  # begins on a page, as page-locking wants it
    return [
        torch.frombuffer(block, dtype=dtype, count=shape.numel(), offset=start).view(shape)
        if shape.numel()
        else torch.empty(shape, dtype=dtype)
        for (shape, dtype), start in zip(layout, starts)
    ]


def _local_parts(tensors: dict[str, typing.Any]) -> collections.abc.Iterator[torch.Tensor]:
    for value in tensors.values():
        if isinstance(value, dict):
            yield from _local_parts(value)
        elif isinstance(value, ShardedTensor):
            yield from (shard.tensor for shard in value.local_shards())
        else:
            yield value.to_local() if isinstance(value, DTensor) else value


def _rebuilt(tensors: dict[str, typing.Any], copies: collections.abc.Iterator[torch.Tensor]) -> dict[str, typing.Any]:
    """Puts copies in the place of the local parts, in their order."""
    rebuilt = {}
    for key, value in tensors.items():
        if isinstance(value, dict):
            rebuilt[key] = _rebuilt(value, copies)
        elif isinstance(value, ShardedTensor):
            shards = [Shard(next(copies), shard.metadata) for shard in value.local_shards()]
            # The base class asks no other rank, and takes CPU copies of shards whose metadata name a GPU:
            # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/_shard/sharded_tensor/api.py
            rebuilt[key] = ShardedTensorBase._init_from_local_shards_and_global_metadata(shards, value.metadata())
        elif isinstance(value, DTensor):
            # `DTensor.from_local` would move the copy back to the device of the mesh:
            # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/tensor/_api.py
            rebuilt[key] = DTensor(next(copies), value._spec, requires_grad=False)
        else:
            rebuilt[key] = next(copies)
    return rebuilt


def passing_failure(error: CheckpointException) -> BaseException | None:
    """Returns the first failure of a rank that may pass by itself, if there is one. All ranks get the same."""
    failures = [failure for _, (failure, _) in sorted(error.failures.items())]
    return next(filter(why_passing, failures), None)


def first_failure(error: CheckpointException) -> str:
    """Says which rank failed in DCP, and how. All ranks get the same text."""
    rank, (first, _) = min(error.failures.items())
    return f"rank {rank}: {described(first)}"
