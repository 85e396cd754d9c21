"""Resets table rows that managed collision gives to a new id: new weights, empty optimizer state, on every rank."""

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from gpsd_dist.config import TablesConfig
from gpsd_dist.data.hashing import mix
from gpsd_dist.tables.sharding import ShardedTables

_TO_UNIT = 2.0**-53


class RowReset:
    """Resets rows of one trainable table."""

    def __init__(self, tables: ShardedTables, table: str, config: TablesConfig, seed: int):
        """Collects this rank's shards of the table: (first row, live tensor of weights or of optimizer state).

        A table cut by columns is not possible: its optimizer state is not by row, so preflight refuses it.
        """
        assert config.sharding.get(table) != "column_wise", table
        self._table, self._config, self._seed = table, config, seed
        weight = tables.weights()[table]
        self._weights = [(shard.metadata.shard_offsets[0], shard.tensor) for shard in weight.local_shards()]
        self._state = [
            (shard.metadata.shard_offsets[0], shard.tensor)
            for value in tables.optimizer_state().get(table, {}).values()
            if isinstance(value, ShardedTensor) and value.size()[0] == weight.size()[0]
            for shard in value.local_shards()
        ]

    def __call__(self, row_K: torch.Tensor, update: int) -> None:
        """Resets `row_K` (table rows, int64 [K]) in that update. Not collective: every rank resets its own rows."""
        rows = row_K.cpu().numpy()
        if not len(rows):
            return
        width = self._config.embedding_dim
        with torch.no_grad():
            for first, weights in self._weights:
                here, place = _in_shard(rows, first, weights)
                fresh = initial_rows(self._seed, self._table, update, here, width) * self._config.init_std
                weights[place, :width] = torch.from_numpy(fresh).to(weights)
            for first, state in self._state:
                state[_in_shard(rows, first, state)[1]] = 0


def _in_shard(row_K: np.ndarray, first: int, shard: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Returns the rows that lie in this shard, and their places in it."""
    here = row_K[(row_K >= first) & (row_K < first + len(shard))]
    return here, torch.from_numpy(here - first).to(shard.device)


def initial_rows(seed: int, table: str, update: int, row_K: np.ndarray, width: int) -> np.ndarray:
    """Draws standard normal weights, float32 [K, width], for rows int64 [K]: Box-Muller on a counter-based hash.

    A row's numbers depend on (seed, table, update, row, column) only, so every rank can draw its own rows.
    """
    key = np.array([seed], np.int64)
    for number in (update, *table.encode()):
        key = mix(key + number)
    cell_KW = mix(mix(key + row_K)[:, None] + np.arange(width))
    radius_KW = np.sqrt(-2.0 * np.log1p(-_unit(cell_KW)))
    return (radius_KW * np.cos(2.0 * np.pi * _unit(mix(cell_KW + 1)))).astype(np.float32)


def _unit(bits: np.ndarray) -> np.ndarray:
    """Maps the upper 53 bits to float64 in [0, 1)."""
    return ((bits >> 11) & ((1 << 53) - 1)) * _TO_UNIT
