"""Gives rows of a sharded table new weights and an empty optimizer state, on whichever rank they are."""

import dataclasses

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from gpsd_dist.config import TablesConfig
from gpsd_dist.tables.fresh_rows import fresh_rows
from gpsd_dist.tables.sharding import ShardedTables


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Rows of the table that this rank has; `values` aliases the live tensor, whose first dimension they are."""

    first: int
    values: torch.Tensor

    def local(self, row_K: np.ndarray) -> np.ndarray:
        """Those of the rows that are here."""
        return row_K[(row_K >= self.first) & (row_K < self.first + len(self.values))]


class RowReset:
    """Of one trainable table."""

    def __init__(self, tables: ShardedTables, table: str, config: TablesConfig, seed: int):
        """`table`: not cut by columns (`preflight.check_options_against_data`), for then its state is not by row."""
        assert config.sharding.get(table) != "column_wise", table
        self._table, self._config, self._seed = table, config, seed
        weight = tables.weights()[table]
        self._weights = [_Piece(s.metadata.shard_offsets[0], s.tensor) for s in weight.local_shards()]
        self._state = [
            _Piece(shard.metadata.shard_offsets[0], shard.tensor)
            for value in tables.optimizer_state().get(table, {}).values()
            if isinstance(value, ShardedTensor) and value.size()[0] == weight.size()[0]
            for shard in value.local_shards()
        ]

    def __call__(self, row_K: torch.Tensor, turn: int) -> None:
        """`row_K`: table rows int64 [K]; `turn`: see fresh_rows. Not collective: every rank resets what it has."""
        rows = row_K.cpu().numpy()
        if not len(rows):
            return
        with torch.no_grad():
            for piece in self._weights:
                here, width = piece.local(rows), self._config.embedding_dim
                fresh = fresh_rows(self._seed, self._table, turn, here, width) * self._config.init_std
                place = torch.from_numpy(here - piece.first).to(piece.values.device)
                piece.values[place, :width] = torch.from_numpy(fresh).to(piece.values)
            for piece in self._state:
                place = torch.from_numpy(piece.local(rows) - piece.first).to(piece.values.device)
                piece.values[place] = 0
