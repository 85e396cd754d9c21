"""Reads and writes the files of torch.distributed.checkpoint (DCP) at a `Location`.

Written files are hashed on the way. Of the index (`.metadata`, a pickle) only the classes that DCP puts there are
loaded, so that a checkpoint from elsewhere cannot run code; DCP's own reader would run whatever the pickle says. The
data files are read with `weights_only=True`.
"""

import collections.abc
import contextlib
import copy
import hashlib
import io
import os
import pathlib
import pickle
import typing

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensorBase
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata

from gpsd_dist.checkpoint.integrity import FileSum
from gpsd_dist.checkpoint.storage import Location, Remote
from gpsd_dist.distributed.watchdog import Watchdog

INDEX_NAME = ".metadata"
_ALLOWED = {
    # BytesStorageMetadata is left out on purpose: DCP loads such entries with pickle, and we save tensors only
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", *(str(value).split(".")[1] for value in vars(torch).values() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},  # looks a layout up by name
    "pathlib": {"PosixPath", "Path"},  # where the checkpoint was first written
}


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes of `_ALLOWED` and nothing else."""

    def find_class(self, module: str, name: str) -> typing.Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no index of ours holds: it was made to run code, or by another "
                "version of torch; nothing of it was run"
            )
        return super().find_class(module, name)


def read_index(checkpoint: Location) -> Metadata:
    """Names, shapes and places of the tensors. ValueError names the file if it is broken, or more than an index."""
    path = checkpoint / INDEX_NAME
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"{path} is refused as the index of a checkpoint: {error}") from error
    if not isinstance(index, Metadata):
        raise ValueError(f"{path} is refused as the index of a checkpoint: it holds a {type(index).__name__}")
    return index


class _HashedStream:
    """A binary stream that hashes what is written to it, and shows the watchdog that it gets on."""

    def __init__(self, stream: typing.Any, watchdog: Watchdog):
        self._stream, self._watchdog = stream, watchdog
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def write(self, content: typing.Any) -> int:
        self._digest.update(content)
        self._num_bytes += memoryview(content).nbytes
        self._watchdog.alive()
        return int(self._stream.write(content))

    def tell(self) -> int:
        return self._num_bytes

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """Left to the owner of the stream."""

    def sum(self) -> FileSum:
        return FileSum(self._digest.hexdigest(), self._num_bytes)


class _Files(FileSystemBase):
    """DCP's file operations at a `Location`; keeps the checksum of every file it wrote."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.written: dict[str, FileSum] = {}
        self._watchdog = watchdog

    @contextlib.contextmanager
    def create_stream(self, path: typing.Any, mode: str) -> collections.abc.Iterator[io.IOBase]:
        with path.open(mode) as stream:
            if mode == "rb":
                yield stream
                return
            hashed = _HashedStream(stream, self._watchdog)
            with self._watchdog.writing():
                yield typing.cast(io.IOBase, hashed)
                if isinstance(path, pathlib.Path):
                    stream.flush()
                    os.fsync(stream.fileno())
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
    """For one `dcp.save` of CPU tensors into `folder`."""

    def __init__(self, folder: Location, watchdog: Watchdog | None = None):
        # we sync ourselves: for a stream without a file number DCP would sync every disk of the machine
        super().__init__(str(folder), sync_files=False, per_thread_copy_ahead=0)
        self.fs, self.path = _Files(watchdog or Watchdog()), folder

    @property
    def checkpoint_id(self) -> str:
        """Goes into the index."""
        return str(self.path)

    @property
    def written(self) -> dict[str, FileSum]:
        """Files that this rank wrote."""
        return self.fs.written


class Reader(dcp.FileSystemReader):
    """For one `dcp.load` from `checkpoint`; reads its index once, when built."""

    def __init__(self, checkpoint: Location):
        super().__init__(str(checkpoint))
        self.fs, self.path = _Files(Watchdog()), checkpoint
        self.index = read_index(checkpoint)

    def read_metadata(self, *args: typing.Any, **kwargs: typing.Any) -> Metadata:
        """The index; there is none of a single rank."""
        return copy.copy(self.index)


def staged(tensors: dict[str, typing.Any], before: dict[str, typing.Any] | None) -> dict[str, typing.Any]:
    """A copy of nested dicts of tensors and ShardedTensors on the CPU, local shards only.

    `before`: the result of an earlier call, whose memory is used again where shapes agree (fresh pages cost more than
    the copy). Waits for the GPU. No collective.
    """
    copies = {}
    for key, value in tensors.items():
        old = (before or {}).get(key)
        if isinstance(value, dict):
            copies[key] = staged(value, old)
        elif isinstance(value, ShardedTensor):
            old_shards = old.local_shards() if old is not None else []
            shards = [
                Shard(_copied(shard.tensor, old_shards[i].tensor if i < len(old_shards) else None), shard.metadata)
                for i, shard in enumerate(value.local_shards())
            ]
            # the base's constructor asks no other rank, and takes CPU copies of shards that are placed on a GPU:
            # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/_shard/sharded_tensor/api.py
            copies[key] = ShardedTensorBase._init_from_local_shards_and_global_metadata(shards, value.metadata())
        else:
            copies[key] = _copied(value, old)
    return copies


def _copied(tensor: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
        old = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return old.copy_(tensor.detach())
