"""Reads and writes `index.json` of a checkpoint, which says where in which file each part of a tensor lies.

torch.distributed.checkpoint (DCP) keeps the same facts in `.metadata`, a pickle. It is written for DCP's own tools, but
a program that unpickles a file runs what the file says, so we read `index.json`. Checkpoints from before it have only
the pickle, which `pickled_index` reads as data.

Names, shapes and places are checked one by one. What DCP then does with them cannot leave the folder of the checkpoint,
nor take more memory than its files have bytes.
"""

import json
import math
import typing

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from gpsd_dist.checkpoint import storage
from gpsd_dist.checkpoint.pickled_index import read_pickled
from gpsd_dist.checkpoint.storage import Location

INDEX_NAME = "index.json"
PICKLED_NAME = ".metadata"
VERSION = 1
MAX_BYTES = 2**28  # untuned: a chunk takes some 120 bytes, one per tensor and rank
_MAX_DIMENSIONS = 16
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def to_json(metadata: Metadata) -> bytes:
    """Converts the index that DCP has just built. All entries must be tensors; we save nothing else."""
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name
        chunks = []
        for chunk in entry.chunks:
            place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            where = {"file": place.relative_path, "first_byte": place.offset, "num_bytes": place.length}
            chunks.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), **where})
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "size": list(entry.size), "chunks": chunks}
    return json.dumps({"version": VERSION, "tensors": tensors}).encode()


def read_index(checkpoint: Location) -> Metadata:
    """Reads the index into DCP's own form. ValueError names the file if it is broken, or more than an index."""
    path = checkpoint / INDEX_NAME
    try:
        if path.is_file():
            return _metadata(storage.read_json(path, MAX_BYTES))
        path = checkpoint / PICKLED_NAME
        return _metadata(read_pickled(storage.read_bytes(path, MAX_BYTES)))
    except ValueError as error:
        raise ValueError(f"{path} is refused as the index of a checkpoint: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:  # an entry is missing, or is of another type
        raise ValueError(f"{path} is refused as the index of a checkpoint: {type(error).__name__} {error}") from error


def _metadata(document: dict[str, typing.Any]) -> Metadata:
    if document["version"] != VERSION:
        raise ValueError(f"it has version {document['version']!r}, this program knows {VERSION}: use a newer one")
    places: dict[MetadataIndex, _StorageInfo] = {}
    tensors: dict[str, typing.Any] = {}
    for name, entry in document["tensors"].items():
        size, dtype = _size(entry["size"]), _DTYPES[entry["dtype"]]
        chunks = []
        for part in entry["chunks"]:
            chunks.append(_chunk(name, size, part))
            places[MetadataIndex(name, chunks[-1].offsets)] = _place(
                name, part, chunks[-1].sizes.numel() * dtype.itemsize
            )
        if sum(chunk.sizes.numel() for chunk in chunks) != math.prod(size):
            raise ValueError(f"the chunks of tensor {name!r} do not make up its shape {size}")
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), chunks)
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())


def _chunk(name: str, size: list[int], part: dict[str, typing.Any]) -> ChunkStorageMetadata:
    """Reads offsets and sizes of one part of a tensor. It must lie inside the tensor's shape `size`."""
    offsets, sizes = _size(part["offsets"]), _size(part["sizes"])
    fits = len(offsets) == len(sizes) == len(size)
    if not fits or any(at + num > whole for at, num, whole in zip(offsets, sizes, size, strict=True)):
        raise ValueError(f"tensor {name!r} of shape {size} has a chunk of {sizes} at {offsets}")
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def _place(name: str, part: dict[str, typing.Any], min_bytes: int) -> _StorageInfo:
    """Reads where a chunk lies. That must be in a file of the folder, with bytes enough for its elements."""
    file, first_byte, num_bytes = part["file"], part["first_byte"], part["num_bytes"]
    if not storage.is_plain_name(file):
        raise ValueError(f"tensor {name!r} is in {file!r:.80}, which is no file of the checkpoint's folder")
    if not all(type(number) is int and 0 <= number < 2**62 for number in (first_byte, num_bytes)):
        raise ValueError(f"tensor {name!r} has no place in {file}")
    if num_bytes < min_bytes:
        raise ValueError(f"tensor {name!r} has a chunk of {min_bytes:,} bytes, for which {file} has {num_bytes:,}")
    return _StorageInfo(file, first_byte, num_bytes)


def _size(numbers: typing.Any) -> list[int]:
    if isinstance(numbers, list) and len(numbers) <= _MAX_DIMENSIONS:
        if all(type(number) is int and 0 <= number < 2**48 for number in numbers):
            return numbers
    raise ValueError(f"a shape is no list of at most {_MAX_DIMENSIONS} sizes")
