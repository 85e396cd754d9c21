"""One packed mini-batch: what the loader hands to the model, on the host or on the device.

Shape letters: B requests, T history tokens, C candidates, U unique rows of a table, M next-item positions,
G negative groups, N negatives per group.
"""

import dataclasses
import typing

import numpy as np
import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gpsd_dist.batch.packing import Bucket, Packing, Slots
from gpsd_dist.batch.padding import PaddedPacking


@dataclasses.dataclass(frozen=True)
class Bag:
    """Several rows per token: `rows[b]` for `offsets[i] <= b < offsets[i + 1]` belong to token i."""

    rows: torch.Tensor
    """int64 [sum of bag sizes]"""
    offsets: torch.Tensor
    """int64 [tokens + 1]"""


Column: typing.TypeAlias = torch.Tensor | Bag
"""Categorical: int64 row numbers, [tokens] or Bag. For a table in `Batch.lookup` they count inside its U unique rows,
for any other table they are table indices. Numerical: float32 [tokens]."""


@dataclasses.dataclass(frozen=True)
class RawIds:
    """Of a managed table, whose entries in `Batch.lookup` are ids until `ids.assignment` gives them rows."""

    count_U: torch.Tensor
    """int64: occurrences of each distinct id in this rank's batch."""
    num_draws: int
    """Entries that follow the ids: random numbers for negatives."""


@dataclasses.dataclass(frozen=True)
class NextItem:
    """Where and what to predict in pretraining: the item after every history token that has a successor."""

    token_M: torch.Tensor
    """int64: history token whose hidden state predicts."""
    target_token_M: torch.Tensor
    """int64: history token that is to be predicted (the next one of the same request)."""
    item_M: torch.Tensor
    """int64 item-table index of the target, to find accidental hits."""
    group_offsets: tuple[int, ...] | None
    """G + 1 cuts of M: positions [cut g, cut g + 1) see the negatives of group g. None: G = M, each has its own."""
    negative_item_GN: torch.Tensor
    """int64 item-table indices, uniform over known items."""
    negative_row_GN: torch.Tensor
    """int64: their rows among the U unique rows of the item table."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """All tensors of one rank's batch; requests are sorted by history length."""

    lookup: KeyedJaggedTensor
    """One key per TorchRec table, stride `bags_per_table`: the U distinct table indices (or ids, see `raw_ids`) that
    this batch needs (int64)."""
    packing: Packing
    history: dict[str, Column]
    """Feature -> [T]"""
    candidate: dict[str, Column]
    """Feature -> [C]; empty in pretraining."""
    context: dict[str, Column]
    """Feature -> [B]"""
    labels: dict[str, torch.Tensor]
    """Task -> float32 [C], NaN where not observed."""
    history_item_T: torch.Tensor
    """int64 item-table indices."""
    candidate_item_C: torch.Tensor
    history_time_s_T: torch.Tensor
    """int64, -1 where the log does not say."""
    request_time_s_B: torch.Tensor
    """int64, -1 in pretraining, which has no requests."""
    user_hash_B: torch.Tensor
    source_row_B: torch.Tensor
    """int64: position of each request in the Arrow table that the batch was made of."""
    next_item: NextItem | None = None
    padded: PaddedPacking | None = None
    """Geometry that the tower runs in, if not that of `packing`."""
    place: tuple[int, int] = (0, 0)
    """Epoch, and number of the batch in it."""
    raw_ids: dict[str, RawIds] = dataclasses.field(default_factory=dict)
    """Managed table -> what `lookup` has of it. Empty once rows are assigned."""

    @property
    def num_requests(self) -> int:
        """B"""
        return self.packing.num_requests

    def to(self, device: torch.device) -> "Batch":
        """Copies everything the device needs; asynchronous if the tensors are pinned."""
        return to_device(self, device)

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the allocator that `stream` uses the tensors (called by the prefetching pipeline)."""

        def record(tensor):
            tensor.record_stream(stream)
            return tensor

        _map_tensors(self, record)


def bags_per_table(device_type: str, world_size: int) -> int:
    """Number of bags over which `lookup_of` spreads the rows of one table; the same on every rank.

    On CUDA, FBGEMM's lookup, its bounds check and its index linearisation give one warp to each bag: with one bag per
    table, a single warp would copy the whole table's rows. 8192 warps fill a Hopper GPU once (132 SMs x 64 warps;
    untuned). Every rank sends every other one 8 bytes per bag and table, and looks up the bags of all of them: beyond
    8 ranks, each makes fewer. On CPU, one bag is the fastest: 8192 of them add 0.16 ms to a lookup of three tables,
    forward and backward (2 % at 10,000 rows, 15 % at 1000).
    """
    return max(1, min(8192, 65536 // world_size)) if device_type == "cuda" else 1


def lookup_of(tables: tuple[str, ...], index_U: torch.Tensor, sizes: list[int]) -> KeyedJaggedTensor:
    """Packs the distinct rows of every table into one KeyedJaggedTensor with `bags_per_table` bags per table.

    `index_U`: int64, table after table; `sizes`: how many of them belong to each. A table's rows keep their order and
    are spread evenly over its bags; with fewer rows than bags, the last bags are empty. The number of bags must not
    depend on the batch: it is the stride of the KeyedJaggedTensor, which TorchRec shares between tables and ranks.
    """
    # `index_U` may still be on the host, on its way to the device
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    num_bags = bags_per_table(device_type, dist.get_world_size() if dist.is_initialized() else 1)
    lengths = np.empty((len(sizes), num_bags), np.int64)
    for table, size in enumerate(sizes):
        rows_per_bag, num_longer_bags = divmod(size, num_bags)
        lengths[table, :num_longer_bags], lengths[table, num_longer_bags:] = rows_per_bag + 1, rows_per_bag
    # `length_per_key`: TorchRec would ask the device for these numbers, which the host has
    return KeyedJaggedTensor(
        keys=list(tables),
        values=index_U,
        lengths=torch.from_numpy(lengths).view(-1).to(index_U.device),
        length_per_key=list(sizes),
    )


def to_device(value: typing.Any, device: torch.device) -> typing.Any:
    """A batch, all parts of a step's batch, or a piece of one (a Packing, say) with all tensors there; asynchronous if
    they are pinned. What parts share (the lookup) is copied once.
    """
    return _map_tensors(value, _once(lambda tensor: tensor.to(device, non_blocking=True)))


def pinned(value: typing.Any) -> typing.Any:
    """The same with every tensor page-locked; what parts share, once."""
    return _map_tensors(value, _once(lambda tensor: tensor.pin_memory()))


def _once(fn: typing.Callable[[torch.Tensor], torch.Tensor]) -> typing.Callable[[torch.Tensor], torch.Tensor]:
    """A tensor that stands in several places goes through `fn` once, and its result stands in all of them."""
    done: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = tensor, fn(tensor)  # kept, or another tensor could get its id
        return done[id(tensor)][1]

    return apply


_CONTAINERS = (Bag, RawIds, NextItem, Packing, PaddedPacking, Bucket, Slots, Batch)


def _map_tensors(value: typing.Any, fn: typing.Callable[[torch.Tensor], torch.Tensor]) -> typing.Any:
    """Applies `fn` to every tensor inside dataclasses, dicts, tuples and KeyedJaggedTensors; leaves the rest alone."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, KeyedJaggedTensor):
        return KeyedJaggedTensor(
            keys=value.keys(),
            values=fn(value.values()),
            lengths=fn(value.lengths()),
            length_per_key=value.length_per_key_or_none(),
        )
    if isinstance(value, _CONTAINERS):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(**{name: _map_tensors(entry, fn) for name, entry in fields.items()})
    if isinstance(value, dict):
        return {key: _map_tensors(entry, fn) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(_map_tensors(entry, fn) for entry in value)
    return value
