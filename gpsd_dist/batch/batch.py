"""Defines one packed mini-batch, which the loader hands to the model, on the host or on the device.

Shape letters: B requests, T history tokens, C candidates, U unique rows of a table, M next-item positions,
G sets of negatives, N negatives per set.
"""

import dataclasses
import typing

import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.batch.padding import PaddedPacking
from gpsd_dist.batch.transfer import map_tensors, to_device

if typing.TYPE_CHECKING:  # serving makes batches too, whose rows come from mapped files: it must not need TorchRec
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclasses.dataclass(frozen=True)
class Bag:
    """Holds several rows per token: `rows[b]` for `offsets[i] <= b < offsets[i + 1]` belong to token i."""

    rows: torch.Tensor  # int64 [sum of bag sizes]
    offsets: torch.Tensor  # int64 [tokens + 1]


Column: typing.TypeAlias = torch.Tensor | Bag
"""Categorical: int64 row numbers, [tokens] or Bag. For a table in `Batch.lookup` they count inside its U unique rows,
for any other table they are table indices. Numerical: float32 [tokens]."""


@dataclasses.dataclass(frozen=True)
class RawIds:
    """Describes the entries of a managed table in `Batch.lookup`: ids until `tables.id_remapping` gives them rows."""

    count_U: torch.Tensor  # int64: occurrences of each distinct id in this rank's batch
    num_draws: int  # Entries that follow the ids: random numbers for negatives


@dataclasses.dataclass(frozen=True)
class NextItem:
    """Says where and what to predict in pretraining: the item after every history token that has a successor.

    Nothing is predicted from the last token of a history, and no other token sees it: so the batch's `history` and
    `packing` leave it out, and it is here alone, as a target.
    """

    token_M: torch.Tensor  # int64: history token whose hidden state predicts
    target: dict[str, torch.Tensor]
    """Feature with one value -> [M]: that of the target, the next token of the same request; as in `Batch.history`."""
    item_M: torch.Tensor  # int64 item-table index of the target, to find accidental hits
    group_offsets: tuple[int, ...] | None
    """G + 1 cuts of M: positions [cut g, cut g + 1) see the negatives of group g. None: G = M, each has its own."""
    negative_item_GN: torch.Tensor  # int64 item-table indices
    negative_row_GN: torch.Tensor  # int64: their rows among the U unique rows of the item table
    negative_log_q_GN: torch.Tensor | None = None  # float32: log(N x probability of the draw), to be taken from a logit
    time_s_M: torch.Tensor | None = None  # int64: time of the target, -1 where the log does not say
    is_real_M: torch.Tensor | None = None  # bool: False where padding stands in the place of a target; None: nowhere


@dataclasses.dataclass(frozen=True)
class Batch:
    """Holds all tensors of one rank's batch; requests are sorted by history length."""

    # Packed: histories stand one after the other without padding, so a short history costs what it has, and no result
    # depends on the longest history of the batch.

    lookup: "KeyedJaggedTensor"
    """One key per TorchRec table, stride `bags_per_table`: the U distinct table indices (or ids, see `raw_ids`) that
    this batch needs (int64)."""
    packing: Packing
    history: dict[str, Column]  # Feature -> [T]
    candidate: dict[str, Column]  # Feature -> [C]; empty in pretraining
    context: dict[str, Column]  # Feature -> [B]
    labels: dict[str, torch.Tensor]  # Task -> float32 [C], NaN where not observed
    sampling: dict[str, torch.Tensor]  # "weight" and "negative_rate", as far as the data set has them: float32 [C]
    history_item_T: torch.Tensor  # int64 item-table indices
    candidate_item_C: torch.Tensor
    history_time_s_T: torch.Tensor  # int64, -1 where the log does not say
    request_time_s_B: torch.Tensor  # int64; in pretraining, the time of the event that the last token predicts
    user_hash_B: torch.Tensor
    source_row_B: torch.Tensor  # int64: position of each request in the Arrow table that the batch was made of
    next_item: NextItem | None = None
    padded: PaddedPacking | None = None  # Geometry that the tower runs in, if not that of `packing`
    epoch_and_step: tuple[int, int] = (0, 0)  # Epoch, and number of the batch in it
    num_read_tokens: int = 0  # History tokens of all requests; in pretraining more than the tower runs on: `NextItem`
    raw_ids: dict[str, RawIds] = dataclasses.field(default_factory=dict)
    """Managed table -> its entries in `lookup`. Empty once rows are assigned."""

    def to(self, device: torch.device) -> "Batch":
        """Copies everything the device needs, in one copy if the batch is `transfer.pinned`."""
        return to_device(self, device)

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the allocator that `stream` uses the tensors (called by the prefetching pipeline)."""
        # They were copied on another stream: without this the allocator could hand their memory out again while the
        # step still reads it.

        def record(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(stream)
            return tensor

        map_tensors(self, record, {}, with_host_parts=False)
