"""Holds the big embedding tables as two TorchRec collections, a trainable and a frozen one, before they are sharded.

Shape letters: U unique rows of a table, E embedding width.
"""

import torch
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from gpsd_dist.config import TablesConfig
from gpsd_dist.parameter_names import module_key
from gpsd_dist.schema import Manifest, Table


def lookup_tables(manifest: Manifest, config: TablesConfig, with_candidates: bool) -> tuple[Table, ...]:
    """Tables that go into TorchRec collections, in manifest order; smaller ones are replicated with the dense part.

    The item table and managed ones always are among them. Pretraining (`with_candidates` False) has tables of history
    features only.
    """
    places = ("history", "candidate", "context") if with_candidates else ("history",)
    used = {f.table for place in places for f in manifest.features_in(place)}
    item_table = manifest.feature(manifest.item_feature).table
    unknown = (set(config.sharding) | set(config.transfer)) - {table.name for table in manifest.tables}
    if unknown:
        known = [table.name for table in manifest.tables]
        raise ValueError(f"tables {sorted(unknown)} are named in TablesConfig, but the data set has {known}")
    always = {item_table} | {name for name, kind in manifest.unbounded.items() if kind == "managed"}
    return tuple(
        table
        for table in manifest.tables
        if table.name in used and (table.name in always or table.num_rows > config.small_table_max_rows)
    )


class Tables(nn.Module):
    """Two EmbeddingCollections, because freezing is a property of a collection: the frozen one runs without autograd,
    gets no optimizer, allocates no state and exchanges no gradient.

    (Leaving a table out of the optimizer does not freeze it: FBGEMM would train it with its default SGD. A zero
    learning rate keeps the weights, but still allocates state and sends gradients.)
    """

    def __init__(self, tables: tuple[Table, ...], frozen: tuple[str, ...], config: TablesConfig, device: torch.device):
        super().__init__()
        missing = set(frozen) - {table.name for table in tables}
        if missing:
            names = [table.name for table in tables]
            raise ValueError(
                f"cannot freeze tables {sorted(missing)}: the sharded tables are {names}. One of at most "
                f"TablesConfig.small_table_max_rows={config.small_table_max_rows} rows is kept with the dense part"
            )
        frozen_type = DataType.FP16 if config.frozen_dtype == "fp16" else DataType.FP32
        trained, kept = ([t for t in tables if (t.name in frozen) == is_kept] for is_kept in (False, True))
        self.trainable = _collection(trained, config.stored_dim, DataType.FP32, device)
        self.frozen = _collection(kept, config.stored_dim, frozen_type, device)
        self.unpadded, self.thawed = _Unpadded(config.embedding_dim), _Thawed(config.embedding_dim)

    def forward(self, lookup: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        """Rows [U, E] of every table, without their padding. Collective when the collections are sharded: all ranks
        must call.
        """
        # TorchRec's pipeline traces this: no loop over what a collection returns, no other use of `lookup`
        trainable = {} if self.trainable is None else self.unpadded(self.trainable(lookup))
        if self.frozen is None:
            return trainable
        with torch.no_grad():  # `thawed` waits for the exchange, so it belongs inside
            frozen = self.thawed(self.frozen(lookup))
        return frozen if self.trainable is None else trainable | frozen


class _Unpadded(nn.Module):
    """Table -> its rows [U, E]; a module because it is what the pipeline's tracing does not look into."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, found: dict[str, JaggedTensor]) -> dict[str, torch.Tensor]:
        """[U, stored_dim] -> [U, E]; the gradient of the padding is zero, so it stays what it was."""
        stored = {name: jagged.values() for name, jagged in found.items()}
        return {n: rows if rows.shape[1] == self.width else rows[:, : self.width] for n, rows in stored.items()}


class _Thawed(_Unpadded):
    """Gives the rows of frozen tables in float32, whatever they are stored in."""

    def forward(self, found: dict[str, JaggedTensor]) -> dict[str, torch.Tensor]:
        """[U, stored_dim] -> [U, E]"""
        return {name: rows.float() for name, rows in super().forward(found).items()}


def _collection(
    tables: list[Table], columns: int, data_type: DataType, device: torch.device
) -> EmbeddingCollection | None:
    if not tables:
        return None
    configs = [
        EmbeddingConfig(
            name=module_key(table.name),
            feature_names=[table.name],
            num_embeddings=table.num_rows,
            embedding_dim=columns,
            data_type=data_type,
        )
        for table in tables
    ]
    return EmbeddingCollection(tables=configs, device=device)
