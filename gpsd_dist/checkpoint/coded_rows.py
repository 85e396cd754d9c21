"""Fills a table of codes (`model/row_codes.py`) from a checkpoint of float32 rows, piece by piece as they are read.

Shape letters: R rows of a piece, S columns of saved rows, P columns of coded ones.
"""

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from gpsd_dist.tables.int8_rows import encode

_BLOCK_ROWS = 4096


class CodedRows:
    """What DCP takes for a sharded table of shape [rows, S]; its memory is that of the codes.

    A piece that was read is a copy in host memory until all of its columns are there (a checkpoint may be cut by
    columns), then it is encoded; the device sees no more than `_BLOCK_ROWS` float32 rows at a time.
    """

    def __init__(self, codes: ShardedTensor, width: int, saved_columns: int):
        """`codes` [rows, P], whole rows on every rank that has some; `width`: E of the S = `saved_columns`."""
        self.codes = codes
        self._shards = {shard.metadata.shard_offsets[0]: shard.tensor for shard in codes.local_shards()}
        self._width, self._columns = width, saved_columns
        self._num_rows = codes.metadata().size[0]
        self._begun: dict[tuple[int, int, int], torch.Tensor] = {}
        self._missing: dict[tuple[int, int, int], int] = {}

    def size(self) -> torch.Size:
        """[rows, S]"""
        return torch.Size((self._num_rows, self._columns))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """DCP asks by this name for what is on this rank."""
        return [
            ChunkStorageMetadata(torch.Size((first, 0)), torch.Size((len(codes), self._columns)))
            for first, codes in self._shards.items()
        ]

    @property
    def is_waiting(self) -> bool:
        """Whether columns of some rows were read and others not."""
        return bool(self._begun)

    def target(self, item: ReadItem) -> torch.Tensor:
        """Where DCP shall copy the piece to: float32 on the host."""
        piece = _piece(item)
        if piece not in self._begun:
            self._begun[piece] = torch.zeros(piece[2], self._columns)
            self._missing[piece] = self._columns
        first, num = item.dest_offsets[1], item.lengths[1]
        return self._begun[piece][:, first : first + num]

    def done(self, item: ReadItem) -> None:
        """The piece has been copied."""
        piece = _piece(item)
        self._missing[piece] -= item.lengths[1]
        if self._missing[piece] > 0:
            return
        rows_RS = self._begun.pop(piece)
        shard, first, num = piece
        codes_RP = self._shards[shard][first : first + num]
        for start in range(0, num, _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            codes_RP[block] = encode(rows_RS[block, : self._width].to(codes_RP.device), codes_RP.shape[1])


def _piece(item: ReadItem) -> tuple[int, int, int]:
    """(first row of the shard in the table, of the piece in the shard, number of rows)."""
    assert item.dest_index.offset is not None
    return item.dest_index.offset[0], item.dest_offsets[0], item.lengths[0]
