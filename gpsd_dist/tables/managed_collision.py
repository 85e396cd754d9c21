"""Maps the 64-bit ids of a managed table to rows, with admission and eviction (TorchRec's managed collision).

docs/ids.md has the exact rules. Map and eviction are TorchRec's MCHManagedCollisionModule, updated in every step; its
sharded wrapper is not used, because it resets evicted rows by an operator that has no CPU version. `AdmissionFilter`
counts ids before admission. The state depends only on the ids and counts given to `update`, so it is equal on ranks
that give the same.

Shape letters: U distinct ids, K rows that pass to another id.
"""

import torch
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    MCHEvictionPolicy,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor

from gpsd_dist.config.ids import IdsConfig
from gpsd_dist.schema import NUM_RESERVED_ROWS, UNKNOWN_INDEX
from gpsd_dist.tables.admission_filter import NO_ID, AdmissionFilter

_POLICIES: dict[str, type[MCHEvictionPolicy]] = {
    "lfu": LFU_EvictionPolicy,
    "lru": LRU_EvictionPolicy,
    "distance_lfu": DistanceLFU_EvictionPolicy,
}
_LAST_SEEN = "last_access_iter"
_STATE = {
    "_mch_sorted_raw_ids": "ids",
    "_mch_remapped_ids_mapping": "rows",
    "_mch_counts": "counts",
    f"_mch_{_LAST_SEEN}": "last_seen",
    "_current_iter_tensor": "updates",
}
"""Buffers of the module -> names in checkpoints."""


def map_bytes(num_rows: int, eviction: str) -> int:
    """Returns the memory of one map in bytes: int64 id, row and policy metadata of every row, and as many ids that wait
    for admission with count and time.
    """
    return 8 * num_rows * (2 + len(_POLICIES[eviction]().metadata_info) + 3)


class ManagedCollisionMap:
    """Knows which id owns which row of one table."""

    def __init__(self, num_rows: int, config: IdsConfig, device: torch.device):
        """`num_rows` counts all rows of the table, the reserved ones too."""
        self.num_rows = num_rows
        self._threshold = config.admission_threshold
        # TorchRec maps every unknown id to the module's last row. The module gets one row more than the table, so that
        # no real row is shared, and `rows` can tell such ids by their row.
        self._module = MCHManagedCollisionModule(
            zch_size=num_rows - NUM_RESERVED_ROWS + 1,
            device=device,
            eviction_policy=_POLICIES[config.eviction](),
            eviction_interval=1,
            output_global_offset=NUM_RESERVED_ROWS,
        )
        self._waiting = AdmissionFilter(num_rows, device)

    @property
    def num_updates(self) -> int:
        """Counts the updates so far, of this run and of the runs that it resumed."""
        return int(self._buffer("_current_iter_tensor").item())

    def rows(self, id_U: torch.Tensor) -> torch.Tensor:
        """Returns the row of each id, int64 [U]; UNKNOWN_INDEX where it has none. Changes nothing."""
        lengths = torch.ones_like(id_U)
        found = self._module.remap({"table": JaggedTensor(values=id_U, lengths=lengths)})["table"].values()
        return torch.where(found < self.num_rows, found, UNKNOWN_INDEX)

    def occupied(self) -> torch.Tensor:
        """Returns the rows that belong to an id, ascending, int64."""
        return self._buffer("_mch_remapped_ids_mapping")[self._buffer("_mch_sorted_raw_ids") != NO_ID].sort().values

    def share_used(self) -> float:
        """Returns the share of the rows that belong to an id. Waits for the device."""
        return float((self._buffer("_mch_sorted_raw_ids") != NO_ID).sum()) / (self.num_rows - NUM_RESERVED_ROWS)

    def update(self, id_U: torch.Tensor, count_U: torch.Tensor) -> torch.Tensor:
        """Counts distinct ids, admits and evicts. Returns the rows that got a new id, int64 [K].

        Ids below NUM_RESERVED_ROWS stand for padding and unknown, and are left out.
        """
        is_id_U = id_U >= NUM_RESERVED_ROWS
        id_U, order_U = id_U[is_id_U].sort()
        count_U = count_U[is_id_U][order_U]
        has_row_U = self.rows(id_U) != UNKNOWN_INDEX
        total_U = torch.where(has_row_U, count_U, count_U + self._waiting.counts_of(id_U))
        is_offered_U = has_row_U | (total_U >= self._threshold)
        changed_K = self._offer(id_U[is_offered_U], total_U[is_offered_U])
        # An id that had a row and lost it in this very update counts from zero again, like all evicted ids.
        waits_U = ~has_row_U & (self.rows(id_U) == UNKNOWN_INDEX)
        self._waiting.put(id_U[~has_row_U], total_U[~has_row_U], waits_U[~has_row_U], self.num_updates)
        return changed_K

    def _offer(self, id_U: torch.Tensor, count_U: torch.Tensor) -> torch.Tensor:
        """Runs one round of TorchRec's eviction policy over ascending distinct ids. All private names are used here.

        The public `profile` does not serve: it collects ids in a buffer that the first batch sizes, and drops the rest:
        https://github.com/meta-pytorch/torchrec/blob/v1.8.0/torchrec/modules/mc_modules.py (`profile`).
        """
        module = self._module
        self._buffer("_current_iter_tensor").add_(1)
        module._current_iter = self.num_updates
        metadata = {_LAST_SEEN: torch.full_like(id_U, module._current_iter)}
        module._update_and_evict(id_U, count_U, metadata)
        changed = module.evict()
        assert changed is not None, "TorchRec reports changed rows after every update"
        return changed

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the live tensors that a checkpoint needs; it is loaded into them in place."""
        buffers = dict(self._module.named_buffers())
        kept = {name: buffers[buffer] for buffer, name in _STATE.items() if buffer in buffers}
        return kept | {f"waiting_{name}": value for name, value in self._waiting.state().items()}

    def _buffer(self, name: str) -> torch.Tensor:
        return self._module.get_buffer(name)
