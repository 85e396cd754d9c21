"""Turns rows of tables into vectors of tokens and of the context.

Shape letters: S tokens in packed order, B requests, C candidates, E embedding width.
"""

import torch
from torch import nn

from gpsd_dist.batch.batch import Bag, Batch, Column
from gpsd_dist.config import TablesConfig
from gpsd_dist.parameter_names import module_key
from gpsd_dist.schema import Feature, Manifest, Table


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
