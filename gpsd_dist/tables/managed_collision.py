"""Rows for the ids that occur often enough: one table's map from 64-bit ids to rows, with admission and eviction.

Exact rules: docs/ids.md. The map and its eviction are TorchRec's MCHManagedCollisionModule, without its sharded wrapper
(whose reset of evicted rows has no CPU operator) and with an update in every step; counting before admission is
`WaitingList`. Everything is a function of the ids and counts that `update` was given, so ranks that give the same hold
the same map.

Shape letters: U distinct ids, K rows that change hands.
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
from gpsd_dist.tables.admission_filter import NO_ID, WaitingList

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
    """Of one map: id, row and metadata for every row, id, count and time for as many that wait; int64 each."""
    return 8 * num_rows * (2 + len(_POLICIES[eviction]().metadata_info) + 3)


class ManagedMap:
    """Which id has which row of one table."""

    def __init__(self, num_rows: int, config: IdsConfig, device: torch.device):
        """`num_rows`: of the table, with the reserved ones."""
        self.num_rows = num_rows
        self._threshold = config.admission_threshold
        # The module gives its last row to ids without one of their own: let that be one that the table does not have.
        self._module = MCHManagedCollisionModule(
            zch_size=num_rows - NUM_RESERVED_ROWS + 1,
            device=device,
            eviction_policy=_POLICIES[config.eviction](),
            eviction_interval=1,
            output_global_offset=NUM_RESERVED_ROWS,
        )
        self._waiting = WaitingList(num_rows, device)

    @property
    def num_updates(self) -> int:
        """Updates so far, in this run and those that it continues."""
        return int(self._buffer("_current_iter_tensor").item())

    def rows(self, id_U: torch.Tensor) -> torch.Tensor:
        """Row of each id, int64 [U]; UNKNOWN_INDEX where it has none. Changes nothing."""
        lengths = torch.ones_like(id_U)
        found = self._module.remap({"table": JaggedTensor(values=id_U, lengths=lengths)})["table"].values()
        return torch.where(found < self.num_rows, found, UNKNOWN_INDEX)

    def occupied(self) -> torch.Tensor:
        """Rows that belong to an id, ascending, int64."""
        return self._buffer("_mch_remapped_ids_mapping")[self._buffer("_mch_sorted_raw_ids") != NO_ID].sort().values

    @property
    def part_used(self) -> float:
        """Part of the rows that belong to an id."""
        return float((self._buffer("_mch_sorted_raw_ids") != NO_ID).sum()) / (self.num_rows - NUM_RESERVED_ROWS)

    def update(self, id_U: torch.Tensor, count_U: torch.Tensor) -> torch.Tensor:
        """Counts occurrences (distinct ids and how often each), admits and evicts; rows that got a new id, int64 [K].

        Ids below NUM_RESERVED_ROWS are left out.
        """
        is_id_U = id_U >= NUM_RESERVED_ROWS
        id_U, order_U = id_U[is_id_U].sort()
        count_U = count_U[is_id_U][order_U]
        has_row_U = self.rows(id_U) != UNKNOWN_INDEX
        total_U = torch.where(has_row_U, count_U, count_U + self._waiting.counts_of(id_U))
        is_offered_U = has_row_U | (total_U >= self._threshold)
        changed_K = self._offer(id_U[is_offered_U], total_U[is_offered_U])
        # One that had a row and lost it in this very update begins anew, as all evicted ids do.
        waits_U = ~has_row_U & (self.rows(id_U) == UNKNOWN_INDEX)
        self._waiting.put(id_U[~has_row_U], total_U[~has_row_U], waits_U[~has_row_U], self.num_updates)
        return changed_K

    def _offer(self, id_U: torch.Tensor, count_U: torch.Tensor) -> torch.Tensor:
        """One round of TorchRec's policy over ascending distinct ids; the only use of the module's private names.

        `profile` would do the same, but from a buffer that is sized by the first batch and drops what does not fit:
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
        """Everything that a checkpoint needs, aliasing the live tensors; to be loaded in place."""
        buffers = dict(self._module.named_buffers())
        kept = {name: buffers[buffer] for buffer, name in _STATE.items() if buffer in buffers}
        return kept | {f"waiting_{name}": value for name, value in self._waiting.state().items()}

    def _buffer(self, name: str) -> torch.Tensor:
        """A part of the module's state, by its name in state dicts."""
        return self._module.get_buffer(name)
