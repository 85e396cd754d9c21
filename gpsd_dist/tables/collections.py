"""Builds the big embedding tables as two unsharded TorchRec collections: a trainable and a frozen one.

Shape letters: U unique rows of a table, E embedding width.
"""

import typing

import torch
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from gpsd_dist.config import TablesConfig
from gpsd_dist.parameter_names import module_key
from gpsd_dist.schema import Manifest, Table


def lookup_tables(manifest: Manifest, config: TablesConfig, with_candidates: bool) -> tuple[Table, ...]:
    """Lists the tables that go into TorchRec collections, in manifest order; smaller ones stay with the dense part.

    The item table and managed tables are always sharded. Pretraining (`with_candidates` False) needs the tables of
    history features only.
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
    """Holds two EmbeddingCollections, because TorchRec can only freeze a whole collection.

    The frozen one runs without autograd: no optimizer, no state, no gradient to send. Other ways do not work: FBGEMM
    trains a table without an optimizer by its default SGD, and a zero learning rate still costs state and gradients.
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
        self.embeddings = _Embeddings(config.embedding_dim)

    def forward(self, sparse_features: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        """Looks up the embeddings float32 [U, E] of every table. Collective if sharded: all ranks must call."""
        # TorchRec's pipeline traces this function: it must not loop over what a collection returns, nor use its
        # argument in any other way, or the all-to-all is not prefetched.
        trainable = {} if self.trainable is None else self.embeddings(self.trainable(sparse_features))
        if self.frozen is None:
            return trainable
        with torch.no_grad():  # reading the result waits for the all-to-all, which must run without autograd too
            frozen = self.embeddings(self.frozen(sparse_features))
        return frozen if self.trainable is None else trainable | frozen


class _Embeddings(nn.Module):
    """Reads the embeddings of every table. It is a module because tracing stops at modules."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, found: dict[str, JaggedTensor]) -> dict[str, torch.Tensor]:
        """Cuts off the padding and casts to float32: [U, stored_dim] -> [U, E]. Padding gets a zero gradient."""
        stored = {name: jagged.values().float() for name, jagged in found.items()}
        return {n: rows if rows.shape[1] == self.width else rows[:, : self.width] for n, rows in stored.items()}


def _collection(
    tables: list[Table], columns: int, data_type: DataType, device: torch.device
) -> EmbeddingCollection | None:
    if not tables:
        return None
    shared: dict[str, typing.Any] = {"embedding_dim": columns, "data_type": data_type}
    configs = [
        EmbeddingConfig(name=module_key(t.name), feature_names=[t.name], num_embeddings=t.num_rows, **shared)
        for t in tables
    ]
    return EmbeddingCollection(tables=configs, device=device)
