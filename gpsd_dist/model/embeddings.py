"""Everything that turns indices into vectors: the big tables (TorchRec, shardable) and what is added around them.

Shape letters: U unique rows of a table, S tokens in packed order, B requests, C candidates, E embedding width.
"""

import torch
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from gpsd_dist.config import TablesConfig
from gpsd_dist.data.batch import Bag, Batch, Column
from gpsd_dist.model.row_codes import decode
from gpsd_dist.schema import Feature, Manifest, Table


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


def module_key(name: str) -> str:
    """Key of a feature, table or task in a module dict; `type` and the like are attributes there, dots separate."""
    key = name.replace(".", "_")
    is_taken = any(hasattr(cls(), key) for cls in (nn.ModuleDict, nn.ParameterDict))
    return f"{key}_" if is_taken else key


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
        width, is_coded = config.embedding_dim, config.frozen_dtype == "int8"
        frozen_type = DataType.FP16 if config.frozen_dtype == "fp16" else DataType.FP32
        trained, kept = ([t for t in tables if (t.name in frozen) == is_kept] for is_kept in (False, True))
        self.trainable = _collection(trained, config.stored_dim, DataType.FP32, device)
        self.frozen = _collection(kept, config.frozen_columns, frozen_type, device)
        self.unpadded, self.thawed = _Unpadded(width), _Thawed(width, is_coded)

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
    """As `_Unpadded`, for frozen tables: float32, whatever they are stored in."""

    def __init__(self, width: int, is_coded: bool):
        super().__init__(width)
        self.is_coded = is_coded

    def forward(self, found: dict[str, JaggedTensor]) -> dict[str, torch.Tensor]:
        """[U, frozen_columns] -> [U, E]"""
        if not self.is_coded:
            return {name: rows.float() for name, rows in super().forward(found).items()}
        return {name: decode(jagged.values(), self.width) for name, jagged in found.items()}


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


class TokenEmbedder(nn.Module):
    """Token vectors: the sum of the token's features and its segment (history or candidate), or one per feature.

    Features of sharded tables arrive as looked-up rows; small tables and numerical features are parameters here.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: TablesConfig,
        sharded: tuple[Table, ...],
        as_fields: bool = False,
        has_segments: bool = True,
    ):
        super().__init__()
        self.as_fields = as_fields
        self.features = {place: _token_features(manifest, place) for place in ("history", "candidate")}
        sharded_names = {table.name for table in sharded}
        token_features = {f.name: f for place in self.features.values() for f in place}
        self.small = nn.ModuleDict(
            {
                module_key(f.table): nn.Embedding(manifest.table(f.table).num_rows, config.embedding_dim)
                for f in token_features.values()
                if f.kind == "categorical" and f.table not in sharded_names
            }
        )
        self.numerical = nn.ParameterDict(
            {
                module_key(f.name): torch.zeros(config.embedding_dim)
                for f in token_features.values()
                if f.kind == "numerical"
            }
        )
        self.segment = nn.Embedding(2, config.embedding_dim) if has_segments and not as_fields else None
        for embedding in (*self.small.values(), *([self.segment] if self.segment is not None else [])):
            nn.init.normal_(embedding.weight, std=config.init_std)

    @property
    def num_fields(self) -> int:
        """F: features of a history token."""
        return len(self.features["history"])

    def forward(self, rows: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Looked-up rows and a batch -> token vectors [S, E], or [S, F, E] one per feature of a history token.

        Candidates lack some of these features (what the user did with the item): their vectors are zero.
        """
        tokens = [self._tokens(rows, "history", batch.history)]
        if batch.packing.num_candidates:
            tokens.append(self._tokens(rows, "candidate", batch.candidate))
        return torch.cat(tokens)

    def _tokens(self, rows: dict[str, torch.Tensor], place: str, columns: dict[str, Column]) -> torch.Tensor:
        vectors = {f.name: self._embed(rows, f, columns[f.name]) for f in self.features[place]}
        if self.as_fields:
            missing = torch.zeros_like(next(iter(vectors.values())))
            return torch.stack([vectors.get(f.name, missing) for f in self.features["history"]], dim=1)
        if self.segment is None:
            return sum(vectors.values())
        return sum(vectors.values(), start=self.segment.weight[0 if place == "history" else 1])

    def _embed(self, rows: dict[str, torch.Tensor], feature: Feature, column: Column) -> torch.Tensor:
        if feature.kind == "numerical":
            return column[:, None] * self.numerical[module_key(feature.name)]
        key = module_key(feature.table)
        return embed(self.small[key].weight if key in self.small else rows[feature.table], column)


def embed(weight: torch.Tensor, column: Column) -> torch.Tensor:
    """Rows of `weight` [rows, E] for one column -> [tokens, E]; a bag gives the mean of its rows (0 if it is empty)."""
    if isinstance(column, Bag):
        return nn.functional.embedding_bag(column.rows, weight, column.offsets, mode="mean", include_last_offset=True)
    return nn.functional.embedding(column, weight)


def _token_features(manifest: Manifest, place: str) -> tuple[Feature, ...]:
    """Features that make up a token. A feature of candidates alone is not one: it goes to the ranking heads."""
    return tuple(f for f in manifest.features_in(place) if "history" in f.places)


class ContextEmbedder(nn.Module):
    """What a ranking head sees besides the hidden state: features of the request and of the candidate alone."""

    def __init__(self, manifest: Manifest, config: TablesConfig, context_dim: int, sharded: tuple[Table, ...]):
        super().__init__()
        self.request_features = manifest.features_in("context")
        self.candidate_features = tuple(f for f in manifest.features_in("candidate") if "history" not in f.places)
        features = (*self.request_features, *self.candidate_features)
        sharded_names = {table.name for table in sharded}
        self.small = nn.ModuleDict(
            {
                module_key(f.name): nn.Embedding(manifest.table(f.table).num_rows, context_dim)
                for f in features
                if f.kind == "categorical" and f.table not in sharded_names
            }
        )
        for embedding in self.small.values():
            nn.init.normal_(embedding.weight, std=config.init_std)
        self.numerical_scale = nn.ParameterDict(
            {module_key(f.name): torch.ones(1) for f in features if f.kind == "numerical"}
        )
        widths = [
            1 if f.kind == "numerical" else context_dim if module_key(f.name) in self.small else config.embedding_dim
            for f in features
        ]
        self.width = sum(widths)
        """Width of the output; 0 if the data set has no such feature."""

    def forward(self, rows: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """-> [C, self.width]; request features are repeated for the request's candidates."""
        request = [self._embed(rows, f, batch.context[f.name]) for f in self.request_features]
        parts = [torch.cat(request, dim=-1)[batch.packing.request_C]] if request else []
        parts += [self._embed(rows, f, batch.candidate[f.name]) for f in self.candidate_features]
        return torch.cat(parts, dim=-1)

    def _embed(self, rows: dict[str, torch.Tensor], feature: Feature, column: Column) -> torch.Tensor:
        if feature.kind == "numerical":
            return column[:, None] * self.numerical_scale[module_key(feature.name)]
        key = module_key(feature.name)
        return embed(self.small[key].weight if key in self.small else rows[feature.table], column)
