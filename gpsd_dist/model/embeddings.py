"""Turns embeddings of tables into vectors of tokens and of the context.

Shape letters: U distinct rows of a table, S tokens in packed order, B requests, C candidates, E embedding width.
"""

import torch
from torch import nn

from gpsd_dist.batch.batch import Bag, Batch, Column
from gpsd_dist.config import ModelConfig, TablesConfig
from gpsd_dist.model.matches import NUM_MATCHES, matches
from gpsd_dist.model.number_buckets import NumberBuckets
from gpsd_dist.parameter_names import module_key
from gpsd_dist.schema import Feature, Manifest, Table


class TokenEmbedder(nn.Module):
    """Sums the features of a token and its segment (history or candidate), or keeps one vector per feature.

    Features of sharded tables arrive as looked-up embeddings; small tables and numerical features are parameters here.
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
        # Small tables are replicated with the dense part: their gradients join its all-reduce, and no lookup of theirs
        # has to be exchanged. Features that share a table share the module.
        self.small = nn.ModuleDict(
            {
                module_key(f.table): nn.Embedding(manifest.table(f.table).num_rows, config.embedding_dim)
                for f in token_features.values()
                if f.kind == "categorical" and f.table not in sharded_names
            }
        )
        self.numerical = nn.ParameterDict(
            {
                # Zero at first: a token begins as its item, and training decides where the number moves it.
                module_key(f.name): torch.zeros(config.embedding_dim)
                for f in token_features.values()
                if f.kind == "numerical"
            }
        )
        # A causal tower cannot tell by position alone a candidate from the next event that has really happened.
        self.segment = nn.Embedding(2, config.embedding_dim) if has_segments and not as_fields else None
        for embedding in (*self.small.values(), *([self.segment] if self.segment is not None else [])):
            nn.init.normal_(embedding.weight, std=config.init_std)

    @property
    def num_fields(self) -> int:
        """Counts the features of a history token (F)."""
        return len(self.features["history"])

    def forward(self, embeddings: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Embeds all tokens of a batch: vectors [S, E], or [S, F, E] one per feature of a history token.

        `embeddings`: sharded table -> [U, E].
        """
        tokens = [self._tokens(embeddings, "history", batch.history)]
        if batch.packing.num_candidates:
            tokens.append(self._tokens(embeddings, "candidate", batch.candidate))
        return torch.cat(tokens)

    def _tokens(self, embeddings: dict[str, torch.Tensor], place: str, columns: dict[str, Column]) -> torch.Tensor:
        vectors = {f.name: self._embed(embeddings, f, columns[f.name]) for f in self.features[place]}
        if self.as_fields:
            # A candidate lacks what the user did with the item: that is not known before it is shown, and would leak.
            missing = torch.zeros_like(next(iter(vectors.values())))
            return torch.stack([vectors.get(f.name, missing) for f in self.features["history"]], dim=1)
        if self.segment is None:
            return sum(vectors.values())
        return sum(vectors.values(), start=self.segment.weight[0 if place == "history" else 1])

    def _embed(self, embeddings: dict[str, torch.Tensor], feature: Feature, column: Column) -> torch.Tensor:
        if feature.kind == "numerical":
            return column[:, None] * self.numerical[module_key(feature.name)]
        key = module_key(feature.table)
        return embed(self.small[key].weight if key in self.small else embeddings[feature.table], column)


def embed(weight: torch.Tensor, column: Column) -> torch.Tensor:
    """Takes rows of `weight` [rows, E] for a column: [tokens, E]; a bag gives the mean of its rows (0 if empty)."""
    if isinstance(column, Bag):
        return nn.functional.embedding_bag(column.rows, weight, column.offsets, mode="mean", include_last_offset=True)
    return nn.functional.embedding(column, weight)


def _token_features(manifest: Manifest, place: str) -> tuple[Feature, ...]:
    """Lists the features that make up a token. One of candidates alone is none: it goes to the ranking heads."""
    return tuple(f for f in manifest.features_in(place) if "history" in f.places)


class ContextEmbedder(nn.Module):
    """Gives the ranking heads what the state lacks: request features, those of candidates alone, and `matches`.

    With `offset`, the name of a numerical feature of candidates, the last column is its value as in the log. ValueError
    if it is none.
    """

    def __init__(
        self,
        manifest: Manifest,
        tables: TablesConfig,
        model: ModelConfig,
        sharded: tuple[Table, ...],
        offset: str = "",
    ):
        super().__init__()
        self.offset = manifest.feature(offset) if offset else None
        if self.offset and (self.offset.kind != "numerical" or "candidate" not in self.offset.places):
            raise ValueError(f"offset {offset!r} is no numerical feature of candidates")
        context_dim = model.context_dim
        self.request_features = manifest.features_in("context")
        self.candidate_features = tuple(f for f in manifest.features_in("candidate") if "history" not in f.places)
        features = (*self.request_features, *self.candidate_features)
        sharded_names = {table.name for table in sharded}
        # By feature and not by table: the heads get narrow vectors of their own, apart from what tokens mean.
        self.small = nn.ModuleDict(
            {
                module_key(f.name): nn.Embedding(manifest.table(f.table).num_rows, context_dim)
                for f in features
                if f.kind == "categorical" and f.table not in sharded_names
            }
        )
        shown = (*self.request_features, *manifest.features_in("candidate"))
        numbers = {f.name: f for f in shown if f.kind == "numerical"} if model.number_buckets else {}
        self.numbers = tuple(numbers)
        self.buckets = nn.ModuleDict({module_key(f.name): NumberBuckets(f, context_dim) for f in numbers.values()})
        for embedding in (*self.small.values(), *(bucket.embedding for bucket in self.buckets.values())):
            nn.init.normal_(embedding.weight, std=context_dim**-0.5 if model.starts_by_width else tables.init_std)
        self.numerical_scale = nn.ParameterDict(
            {module_key(f.name): torch.ones(1) for f in features if f.kind == "numerical"}
        )
        widths = [
            1 if f.kind == "numerical" else context_dim if module_key(f.name) in self.small else tables.embedding_dim
            for f in features
        ]
        shared = [f for f in manifest.features_in("candidate") if "history" in f.places]
        wanted = [f for f in shared if f.kind == "categorical" and (model.bag_matches or not f.is_bag)]
        matched = wanted if model.matches else []
        self.matched = tuple(f.name for f in matched)
        # 0 if the data set has no such feature
        self.width = sum(widths) + NUM_MATCHES * len(matched) + context_dim * len(self.buckets) + bool(offset)

    def forward(self, embeddings: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Returns [C, self.width]; request features are repeated for the request's candidates."""
        request = [self._embed(embeddings, f, batch.context[f.name]) for f in self.request_features]
        request += [self.buckets[module_key(n)](batch.context[n]) for n in self.numbers if n in batch.context]
        parts = [torch.cat(request, dim=-1)[batch.packing.request_C]] if request else []
        parts += [self._embed(embeddings, f, batch.candidate[f.name]) for f in self.candidate_features]
        parts += [self.buckets[module_key(n)](batch.candidate[n]) for n in self.numbers if n not in batch.context]
        parts += [matches(batch.history[name], batch.candidate[name], batch.packing) for name in self.matched]
        if (offset := self.offset) is not None:
            standard_C = batch.candidate[offset.name]
            assert isinstance(standard_C, torch.Tensor)  # a number is no bag
            parts.append((standard_C * offset.std + offset.mean)[:, None])
        return torch.cat(parts, dim=-1)

    def _embed(self, embeddings: dict[str, torch.Tensor], feature: Feature, column: Column) -> torch.Tensor:
        if feature.kind == "numerical":
            return column[:, None] * self.numerical_scale[module_key(feature.name)]
        key = module_key(feature.name)
        return embed(self.small[key].weight if key in self.small else embeddings[feature.table], column)
