"""A table of codes is filled from float32 rows piece by piece, however the checkpoint is cut."""

import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensorBase
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.utils._python_dispatch import TorchDispatchMode

from gpsd_dist.checkpoint import files, loading
from gpsd_dist.checkpoint.coded_rows import CodedRows
from gpsd_dist.tables.int8_rows import encode

ROWS, WIDTH, COLUMNS, CODED = 9_000, 6, 8, 4  # S = 8, two of them padding; P = 4


def _cut(values, row_cuts, column_cuts):
    """A sharded tensor, all of it here, in the pieces between the cuts."""
    places = list(itertools.product(itertools.pairwise(row_cuts), itertools.pairwise(column_cuts)))
    metadata = [ShardMetadata([r, c], [r_end - r, c_end - c], "rank:0/cpu") for (r, r_end), (c, c_end) in places]
    pieces = [values[r:r_end, c:c_end].contiguous() for (r, r_end), (c, c_end) in places]
    shards = [Shard(piece, place) for piece, place in zip(pieces, metadata, strict=True)]
    whole = ShardedTensorMetadata(metadata, values.size())
    return ShardedTensorBase._init_from_local_shards_and_global_metadata(shards, whole)


class LargestMade(TorchDispatchMode):
    """Elements of the largest tensor that torch makes inside; views of `known` are not made."""

    def __init__(self, known):
        super().__init__()
        self.num_elements, self._known = 0, known.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else (made,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() != self._known:
                self.num_elements = max(self.num_elements, value.untyped_storage().nbytes() // 4)
        return made


@pytest.fixture
def rows():
    rows = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    rows[:, WIDTH:] = 0
    return rows


def _load(folder, rows, row_cuts, column_cuts, num_rows=ROWS):
    """(codes [num_rows, P] after the load, elements of the largest tensor made on the way)"""
    dcp.save({"table": {"item": _cut(rows, row_cuts, column_cuts)}}, storage_writer=files.Writer(folder), no_dist=True)
    table = _cut(torch.full((num_rows, CODED), -1.0), (0, num_rows), (0, CODED))
    coded = CodedRows(table, WIDTH, COLUMNS)
    grown = frozenset({"table.item"} if num_rows > ROWS else ())
    codes = table.local_shards()[0].tensor
    with LargestMade(codes) as largest:
        loading.fill_tensors(folder, {"table": {"item": coded}}, grown)
    assert not coded.is_waiting
    return codes, largest.num_elements


@pytest.mark.parametrize(
    ("row_cuts", "column_cuts"),
    [((0, ROWS), (0, COLUMNS)), ((0, 3000, 6000, ROWS), (0, COLUMNS)), ((0, ROWS), (0, 4, COLUMNS))],
)
def test_any_cut_gives_the_codes_of_the_rows(tmp_path, rows, row_cuts, column_cuts):
    codes, _ = _load(tmp_path, rows, row_cuts, column_cuts)
    assert torch.equal(codes, encode(rows[:, :WIDTH], CODED))


def test_float32_rows_are_never_there_all_at_once(tmp_path, rows):
    _, largest = _load(tmp_path, rows, range(0, ROWS + 1, 1000), (0, COLUMNS))
    assert largest <= 1000 * COLUMNS


def test_new_rows_of_a_grown_table_keep_their_bits(tmp_path, rows):
    codes, _ = _load(tmp_path, rows, (0, 5000, ROWS), (0, COLUMNS), num_rows=ROWS + 7)
    assert torch.equal(codes[:ROWS], encode(rows[:, :WIDTH], CODED))
    assert (codes[ROWS:] == -1).all()


def test_columns_that_are_missing_show(rows):
    """An index that names a piece twice and another one never passes the check of its size."""
    coded = CodedRows(_cut(torch.zeros(ROWS, CODED), (0, ROWS), (0, CODED)), WIDTH, COLUMNS)
    assert coded.size() == (ROWS, COLUMNS)
    assert coded.__create_chunk_list__() == [ChunkStorageMetadata(torch.Size((0, 0)), coded.size())]
    half = ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex("table.item", torch.Size((0, 0))),
        dest_offsets=torch.Size((10, 0)),
        storage_index=MetadataIndex("table.item", torch.Size((0, 0))),
        storage_offsets=torch.Size((0, 0)),
        lengths=torch.Size((5, 4)),
    )
    coded.target(half).copy_(rows[10:15, :4])
    coded.done(half)
    assert coded.is_waiting
