"""Starts the rows that a table has gained since a checkpoint like rows that are trained, and trains new rows alone.

Until it gets a row, an id reads the unknown row. So its row begins there, and that of an item is moved by what old
rows with its attributes have in common. Sums are sums of integers: any number of ranks and any plan give the same bits.

Shape letters: U distinct rows of a batch, P pairs of a row and a group, N new rows, G groups, C columns, E width.
"""

import pathlib
import typing

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gpsd_dist.data.gather import one_chunk
from gpsd_dist.distributed.collectives import all_sum
from gpsd_dist.schema import NUM_RESERVED_ROWS, UNKNOWN_INDEX, Manifest

_BLOCK_PAIRS = 65_536  # bounds the float64 copy of rows; untuned
_Shards = list[tuple[int, int, torch.Tensor]]  # (first row, first column, live weights) of this rank


class Alike(typing.NamedTuple):
    """Says which rows of a table share a value of one attribute: pairs (row, group), old rows and new ones."""

    row_P: np.ndarray
    group_P: np.ndarray


def shared_attributes(items: pathlib.Path, manifest: Manifest, num_old: int) -> dict[str, Alike]:
    """Reads `items.parquet`: categorical attribute -> rows by value, of the values that old and new items have.

    ValueError if the file is missing.
    """
    if not items.is_file():
        raise ValueError(
            f"{items} does not exist, by which new items find items that are alike; build the data again, or set "
            "--gin.TablesConfig.new_rows=unknown"
        )
    table, found = pq.read_table(items), {}
    index = one_chunk(table["index"]).to_numpy()
    for name in table.column_names:
        if name == "index" or (feature := manifest.feature(name)).kind != "categorical":
            continue
        values, row_P = one_chunk(table[name]), index
        if feature.is_bag:
            row_P, values = index[pc.list_parent_indices(values).to_numpy()], pc.list_flatten(values)
        value_P = values.to_numpy()
        is_new, is_known = row_P >= num_old, value_P > UNKNOWN_INDEX
        shared = np.intersect1d(value_P[is_new & is_known], value_P[~is_new])
        keep = np.isin(value_P, shared)
        if len(shared):
            found[name] = Alike(row_P[keep], np.searchsorted(shared, value_P[keep]))
    return found


@torch.no_grad()
def start_new_rows(
    weight: torch.Tensor | ShardedTensor, num_old: int, attributes: typing.Collection[Alike] = ()
) -> None:
    """Writes the rows from `num_old` on: the unknown row + mean of the old rows that share attributes - that of all.

    Each attribute of a row counts once, each of its values alike. A row that shares none is the unknown row. Without
    the subtraction, what all rows have in common would be there twice. Collective for a tensor that is spread.
    """
    if isinstance(weight, DTensor):
        whole = weight.full_tensor()
        start_new_rows(whole, num_old, attributes)
        weight.to_local().copy_(distribute_tensor(whole, weight.device_mesh, weight.placements).to_local())
        return
    shards = _shards(weight)
    num_new, is_spread = weight.size()[0] - num_old, isinstance(weight, ShardedTensor)
    num_terms = max([num_old, *(len(alike.row_P) for alike in attributes)])
    bits = _bits_of_a_sum(shards, num_terms, is_spread, weight.device)

    def means_GC(row_P: np.ndarray, group_P: np.ndarray, num_groups: int) -> np.ndarray:
        sums_GC = torch.zeros(num_groups, weight.size()[1], dtype=torch.int64, device=weight.device)
        for shard in shards:
            _add_rows(sums_GC, shard, row_P, group_P, bits)
        sums_GC = all_sum(sums_GC) if is_spread else sums_GC
        counts_G = np.maximum(np.bincount(group_P, minlength=num_groups), 1)
        return np.ldexp(sums_GC.cpu().numpy().astype(np.float64), -bits) / counts_G[:, None]

    nearby_NC, num_found_N = np.zeros((num_new, weight.size()[1])), np.zeros(num_new)
    for row_P, group_P in attributes:
        is_old = row_P < num_old
        mean_GC = means_GC(row_P[is_old], group_P[is_old], int(group_P.max()) + 1)
        new_P, count_N = row_P[~is_old] - num_old, np.bincount(row_P[~is_old] - num_old, minlength=num_new)
        np.add.at(nearby_NC, new_P, mean_GC[group_P[~is_old]] / count_N[new_P, None])
        num_found_N += count_N > 0
    old = np.arange(num_old)
    _, unknown_C, mean_C = means_GC(old, np.minimum(old, NUM_RESERVED_ROWS), NUM_RESERVED_ROWS + 1)
    offset_NC = nearby_NC / np.maximum(num_found_N, 1)[:, None] - mean_C
    start_NC = torch.from_numpy(unknown_C + np.where(num_found_N[:, None] > 0, offset_NC, 0))
    for first, column, rows in shards:
        begin = max(first, num_old)
        if begin < first + len(rows):
            piece = start_NC[begin - num_old : first + len(rows) - num_old, column : column + rows.shape[1]]
            rows[begin - first :].copy_(piece)


def only_new_rows(
    embeddings: dict[str, torch.Tensor], lookup: KeyedJaggedTensor, frozen_rows: dict[str, int]
) -> dict[str, torch.Tensor]:
    """Cuts the gradient of the rows below `frozen_rows[table]` off the `embeddings` (table -> [U, E]) of a batch.

    Every optimizer of tables but LAMB leaves a row whose gradients were all zero as it is, bit for bit.
    """
    cut = {}
    for table in frozen_rows.keys() & embeddings.keys():
        rows_UE, is_new_U = embeddings[table], lookup[table].values() >= frozen_rows[table]
        cut[table] = torch.where(is_new_U[:, None], rows_UE, rows_UE.detach())
    return embeddings | cut


def _shards(weight: torch.Tensor | ShardedTensor) -> _Shards:
    if isinstance(weight, ShardedTensor):
        return [(*shard.metadata.shard_offsets, shard.tensor) for shard in weight.local_shards()]
    return [(0, 0, weight)]


def _bits_of_a_sum(shards: _Shards, num_terms: int, is_spread: bool, device: torch.device) -> int:
    """Returns b, so that the sum of `num_terms` values of the tensor, each times 2^b, fits into 62 bits."""
    largest = torch.zeros((), dtype=torch.float64, device=device)
    for rows in (rows for _, _, rows in shards if rows.numel()):  # the last rank may have no row
        largest = torch.maximum(largest, rows.abs().max().double())
    if is_spread and dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return 62 - num_terms.bit_length() - int(np.frexp(float(largest))[1])


def _add_rows(
    sums_GC: torch.Tensor, shard: tuple[int, int, torch.Tensor], row_P: np.ndarray, group_P: np.ndarray, bits: int
) -> None:
    """Adds this rank's rows to the sums of their groups, as whole numbers of 2^-bits."""
    first, column, rows = shard
    here = np.flatnonzero((row_P >= first) & (row_P < first + len(rows)))
    for begin in range(0, len(here), _BLOCK_PAIRS):
        pairs = here[begin : begin + _BLOCK_PAIRS]
        row, group = (torch.from_numpy(part).to(rows.device) for part in (row_P[pairs] - first, group_P[pairs]))
        whole = rows[row].double().mul_(2.0**bits).round_().long()
        sums_GC[:, column : column + rows.shape[1]].index_add_(0, group, whole)
