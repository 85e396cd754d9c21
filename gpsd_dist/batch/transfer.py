"""Moves batches to a device: all tensors lie side by side in one page-locked block, which one copy takes along.

A GPU copies from page-locked memory by itself, while the host goes on; from other memory the host waits for each copy.
torch keeps such a block until the copy is done, and hands it out again.
"""

import collections.abc
import dataclasses
import itertools
import typing

import torch

_ALIGNMENT = 64  # bytes: kernels load up to 16 at a time
_BLOCK = "gpsd_block"  # attribute of a tensor that lies in a block
Tensors: typing.TypeAlias = collections.abc.Iterator[tuple[torch.Tensor, int]]


def pinned(value: typing.Any) -> typing.Any:
    """Copies every tensor of a batch, or of all parts of a step, into one page-locked block; what parts share, once.

    Length buckets, which only some kernels read, have a block for each packing.
    """
    blocks: dict[int, dict[int, torch.Tensor]] = {}
    for tensor, owner in _tensors(value):
        blocks.setdefault(owner, {})[id(tensor)] = tensor
    copies = {}
    for tensors in blocks.values():
        views = _side_by_side(list(tensors.values()))
        copies |= dict(zip(tensors, zip(tensors.values(), views, strict=True), strict=True))
    return map_tensors(value, torch.Tensor.pin_memory, copies)


def to_device(value: typing.Any, device: torch.device, *, with_host_parts: bool = False) -> typing.Any:
    """Copies a batch, all parts of a step's batch, or a piece of one (a Packing, say) to a device.

    What `pinned` has put into one block travels in one copy, asynchronously. What parts share (the lookup) is copied
    once. Length buckets stay on the host, unless asked for: `Packing.device_buckets` copies them for the kernels that
    read them. A CPU gets the value itself.
    """
    if device.type == "cpu":
        return value
    moved: dict[tuple[int, torch.dtype], torch.Tensor] = {}  # Block and type -> the whole block on the device

    def move(tensor: torch.Tensor) -> torch.Tensor:
        block = getattr(tensor, _BLOCK, None)
        if block is None:
            return tensor.to(device, non_blocking=True)
        whole, key = (id(block), torch.uint8), (id(block), tensor.dtype)
        if whole not in moved:
            moved[whole] = block.to(device, non_blocking=True)
        if key not in moved:
            moved[key] = moved[whole].view(tensor.dtype)
        return moved[key].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return map_tensors(value, move, {}, with_host_parts=with_host_parts)


def map_tensors(
    value: typing.Any,
    fn: collections.abc.Callable[[torch.Tensor], torch.Tensor],
    done: dict[int, tuple[torch.Tensor, torch.Tensor]],
    *,
    with_host_parts: bool = True,
) -> typing.Any:
    """Applies `fn` to every tensor inside dataclasses, dicts, tuples and KeyedJaggedTensors; leaves the rest alone.

    A tensor that stands in several places goes through it once: `done` has the results by id, and the tensor beside
    each, because another one could get the id of one that is freed. `with_host_parts`: also inside dataclasses with the
    class variable `stays_on_host`.
    """

    def mapped(entry: typing.Any) -> typing.Any:
        return map_tensors(entry, fn, done, with_host_parts=with_host_parts)

    if isinstance(value, torch.Tensor):
        if id(value) not in done:
            done[id(value)] = value, fn(value)
        return done[id(value)][1]
    if hasattr(value, "length_per_key_or_none"):  # only a KeyedJaggedTensor has it
        # `length_per_key` goes along, or TorchRec would ask the GPU for it and make the host wait.
        values, lengths = mapped(value.values()), mapped(value.lengths())
        return type(value)(value.keys(), values, lengths=lengths, length_per_key=value.length_per_key_or_none())
    if dataclasses.is_dataclass(value) and (with_host_parts or not hasattr(value, "stays_on_host")):
        kind: typing.Any = type(value)
        return kind(**{field.name: mapped(getattr(value, field.name)) for field in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {key: mapped(entry) for key, entry in value.items()}
    return tuple(map(mapped, value)) if isinstance(value, tuple) else value


def _tensors(value: typing.Any, owner: int = 0) -> Tensors:
    """Yields what `map_tensors` meets, with a number for the block that it belongs to."""
    if isinstance(value, torch.Tensor):
        yield value, owner
    elif hasattr(value, "length_per_key_or_none"):
        yield from ((value.values(), owner), (value.lengths(), owner))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name), owner)
    elif isinstance(value, dict | tuple):
        entries = value if isinstance(value, tuple) else value.values()
        stays = isinstance(value, tuple) and value and hasattr(value[0], "stays_on_host")
        for entry in entries:
            yield from _tensors(entry, id(value) if stays else owner)


def _side_by_side(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies tensors into one page-locked block; returns views of it."""
    sizes = (-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)
    starts = list(itertools.accumulate(sizes, initial=0))
    block = page_locked(starts[-1])
    views = []
    for tensor, start in zip(tensors, starts, strict=False):
        view = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        setattr(view, _BLOCK, block)
        views.append(view.copy_(tensor))
    return views


def page_locked(num_bytes: int) -> torch.Tensor:
    """Allocates page-locked memory, uint8 [num_bytes]."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
