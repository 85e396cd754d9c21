"""Reads the index of a checkpoint (`.metadata` of torch.distributed.checkpoint, a pickle) without unpickling it.

Names, shapes and places of the tensors are checked one by one, so that what DCP then does with them cannot leave the
folder of the checkpoint nor take more memory than its files have bytes. DCP's own reader runs what the pickle says.
"""

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

from gpsd_dist.checkpoint import pickled
from gpsd_dist.checkpoint.pickled import Named, Pairs
from gpsd_dist.checkpoint.storage import Location, is_plain_name, read_bytes

INDEX_NAME = ".metadata"
MAX_BYTES = 2**28  # untuned: an entry takes some 300 bytes, one per tensor and rank
_MAX_DIMENSIONS = 16
_METADATA = "torch.distributed.checkpoint.metadata."
_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_DTYPES = {f"torch.{n}": value for n, value in vars(torch).items() if isinstance(value, torch.dtype)}
_NAMES = {
    # BytesStorageMetadata is left out on purpose: DCP loads such entries with pickle, and we save tensors only
    *(f"{_METADATA}{name}" for name in ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta")),
    *(f"{_METADATA}{name}" for name in ("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    _INFO,
    "torch.Size",
    "torch.serialization._get_layout",
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath")),  # where it was first written
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath")),  # the same by Python 3.13
    *_DTYPES,
}


def read_index(checkpoint: Location) -> Metadata:
    """The index. ValueError names the file if it is broken, or more than an index."""
    path = checkpoint / INDEX_NAME
    content = read_bytes(path, MAX_BYTES)
    try:
        return _metadata(pickled.parse(content, _NAMES), len(content))
    except ValueError as error:
        raise ValueError(f"{path} is refused as the index of a checkpoint: {error}") from error


def _metadata(root: typing.Any, num_bytes: int) -> Metadata:
    fields = _fields(root, f"{_METADATA}Metadata")
    storage = dict(_storage_entry(*pair) for pair in _pairs(fields.get("storage_data")))
    tensors: dict[str, typing.Any] = {}
    num_chunks = 0
    for name, entry in _pairs(fields.get("state_dict_metadata")):
        if not isinstance(name, str) or name in tensors:
            raise ValueError(f"the name of a tensor is {_shown(name)}, or comes twice")
        values = _fields(entry, f"{_METADATA}TensorStorageMetadata")
        chunks = values.get("chunks")
        if not isinstance(chunks, list):
            raise ValueError(f"tensor {name!r} has no list of chunks")
        num_chunks += len(chunks)
        if num_chunks > num_bytes:  # one object may stand in many places of a pickle
            raise ValueError("it has more chunks than bytes")
        tensors[name] = _tensor(name, values, chunks, storage)
    return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta())


def _tensor(
    name: str, values: dict[str, typing.Any], chunks: list[typing.Any], storage: dict[MetadataIndex, _StorageInfo]
) -> TensorStorageMetadata:
    """Its chunks lie inside of it, hold as many elements as it has, and have a place in a file that is large enough."""
    size, dtype = _size(values.get("size")), _dtype(values.get("properties"))
    made = []
    for chunk in chunks:
        parts = _fields(chunk, f"{_METADATA}ChunkStorageMetadata")
        offsets, sizes = _size(parts.get("offsets")), _size(parts.get("sizes"))
        fits = len(offsets) == len(sizes) == len(size)
        if not fits or any(at + num > whole for at, num, whole in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"tensor {name!r} of shape {size} has a chunk of {sizes} at {offsets}")
        place = storage.get(MetadataIndex(name, offsets))
        if place is None or place.length < math.prod(sizes) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} has a chunk of {sizes} at {offsets} without a place in a file")
        made.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    if sum(math.prod(chunk.sizes) for chunk in made) != math.prod(size):
        raise ValueError(f"the chunks of tensor {name!r} do not make up its shape {size}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), made)


def _storage_entry(key: typing.Any, value: typing.Any) -> tuple[MetadataIndex, _StorageInfo]:
    index, info = _fields(key, f"{_METADATA}MetadataIndex"), _fields(value, _INFO)
    name, path = index.get("fqn"), info.get("relative_path")
    if not isinstance(name, str):
        raise ValueError("a file entry names no tensor")
    if not is_plain_name(path):
        raise ValueError(f"tensor {name!r} is in {_shown(path)}, which is no file of the checkpoint's folder")
    if info.get("transform_descriptors"):
        raise ValueError(f"tensor {name!r} is stored in a transformed form, which we never write")
    places = info.get("offset"), info.get("length")
    if not all(isinstance(number, int) and 0 <= number < 2**62 for number in places):
        raise ValueError(f"tensor {name!r} has no place in {path}")
    return MetadataIndex(name, _size(index.get("offset"))), _StorageInfo(path, *places)


def _shown(value: typing.Any) -> str:
    """For a message; a container may be endless."""
    return repr(value[:80]) if isinstance(value, str) else type(value).__name__


def _fields(made: typing.Any, name: str) -> dict[str, typing.Any]:
    """State of a dataclass. ValueError if it is something else."""
    if not isinstance(made, Named) or made.name != name or not isinstance(made.state, Pairs):
        found = made.name if isinstance(made, Named) else type(made).__name__
        raise ValueError(f"it holds {found} where {name} belongs")
    return {key: value for key, value in made.state if isinstance(key, str)}


def _pairs(value: typing.Any) -> Pairs:
    if not isinstance(value, Pairs):
        raise ValueError(f"it holds {type(value).__name__} where a dict belongs")
    return value


def _size(value: typing.Any) -> tuple[int, ...]:
    """`torch.Size` of a tuple of ints."""
    if isinstance(value, Named) and value.name == "torch.Size" and value.arguments is not None:
        numbers = value.arguments[0] if len(value.arguments) == 1 else None
        if isinstance(numbers, tuple | list) and not isinstance(numbers, Pairs) and len(numbers) <= _MAX_DIMENSIONS:
            if all(type(number) is int and 0 <= number < 2**48 for number in numbers):
                return tuple(numbers)
    raise ValueError("a shape is no tuple of sizes")


def _dtype(properties: typing.Any) -> torch.dtype:
    is_known = isinstance(properties, Named) and properties.name == f"{_METADATA}TensorProperties"
    state = properties.state if is_known else None
    kind = state[0] if isinstance(state, tuple) and len(state) == 5 else None
    if not isinstance(kind, Named) or kind.arguments is not None or kind.name not in _DTYPES:
        raise ValueError("a tensor has no type")
    return _DTYPES[kind.name]
