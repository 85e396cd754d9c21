"""GPSD's two dense models on one tower: next item (pretraining) and ranking (finetuning). arXiv:2506.03699, figure 2.

They take looked-up rows of tables and a batch and return outputs; losses are in `stages/losses.py`, the tables in
`tables/collections.py`.

Shape letters: S tokens in packed order, T history tokens, C candidates, D width, E embedding width.
"""

import typing

import torch
from torch import nn

from gpsd_dist.batch.batch import Batch
from gpsd_dist.config import ModelConfig, TablesConfig
from gpsd_dist.config.model import MODELS, models_with
from gpsd_dist.model.embeddings import ContextEmbedder, TokenEmbedder
from gpsd_dist.model.heads import ProjectionIn, ProjectionOut, RankingHeads
from gpsd_dist.model.registry import TOWERS, Times
from gpsd_dist.parameter_names import module_key
from gpsd_dist.schema import Manifest, Table


class Backbone(nn.Module):
    """Token embedder, projection in and tower: the part that full transfer copies."""

    def __init__(self, manifest: Manifest, tables: TablesConfig, model: ModelConfig, sharded: tuple[Table, ...]):
        super().__init__()
        tower = TOWERS[model.name]
        self.embedder = TokenEmbedder(manifest, tables, sharded, tower.reads_fields, tower.has_segments)
        self.project_in = ProjectionIn(tables.embedding_dim, model.width, model.init_std)
        self.dropout = nn.Dropout(0.0 if tower.drops_inputs else model.dropout)
        self.tower = tower.build(model, self.embedder.num_fields)
        self.call_padded: typing.Callable[..., torch.Tensor] | None = None
        """What runs the tower on padded batches; None: the tower itself."""

    def forward(self, rows: dict[str, torch.Tensor], batch: Batch, candidates_only: bool = False) -> torch.Tensor:
        """-> hidden states [S, D], or those of the candidates [C, out_width]"""
        x, padded = self._tokens(rows, batch), batch.padded
        if padded is None:
            return self.tower(x, batch.packing, candidates_only, _times(batch))
        call = self.call_padded or self.tower
        return padded.take(call(padded.fill(x), padded.packing, candidates_only), candidates_only)

    def with_history(self, rows: dict[str, torch.Tensor], batch: Batch) -> tuple[torch.Tensor, "HistoryStates"]:
        """The candidates' states [C, out_width], and those of their histories (towers that `supervises_history`)."""
        x_SFD = self._tokens(rows, batch)
        state_C, state_TN = self.tower(x_SFD, batch.packing, True, _times(batch), with_history=True)
        return state_C, HistoryStates(state_TN, x_SFD[: batch.packing.num_history_tokens].flatten(1))

    def _tokens(self, rows: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        return self.dropout(self.project_in(self.embedder(rows, batch)))


def _times(batch: Batch) -> Times:
    return Times(batch.history_time_s_T, batch.request_time_s_B)


class HistoryStates(typing.NamedTuple):
    """What the next-behaviour loss compares."""

    state_TN: torch.Tensor
    """What the model knows after each history token."""
    token_TN: torch.Tensor
    """Vector of each history token: its features side by side."""


class NextItemOutputs(typing.NamedTuple):
    """Of `NextItemModel`."""

    hidden_TE: torch.Tensor
    """Compared with item rows by cosine."""
    auxiliary_weight: dict[str, torch.Tensor]
    """Feature -> [rows, E]: the input table of each auxiliary target, tied to its output."""


class NextItemModel(nn.Module):
    """Generative pretraining: the state at every history token predicts the next item and its attributes."""

    def __init__(
        self,
        manifest: Manifest,
        tables: TablesConfig,
        model: ModelConfig,
        sharded: tuple[Table, ...],
        auxiliary: tuple[str, ...],
    ):
        super().__init__()
        if not MODELS[model.name].is_generative:
            generative = models_with("is_generative")
            raise ValueError(f"model {model.name!r} predicts no next item; pretrain one of {generative}")
        self.backbone = Backbone(manifest, tables, model, sharded)
        self.project_out = ProjectionOut(model.width, tables.embedding_dim, model.init_std)
        self.auxiliary_table = {name: manifest.feature(name).table for name in auxiliary}
        for name, table in self.auxiliary_table.items():
            if table is None or module_key(table) not in self.backbone.embedder.small or manifest.feature(name).is_bag:
                small = sorted(self.backbone.embedder.small)
                raise ValueError(
                    f"auxiliary target {name!r} needs a full softmax, so it must be a token feature with one value "
                    f"and a small table (those are {small}); raise TablesConfig.small_table_max_rows or leave it out"
                )

    def forward(self, rows: dict[str, torch.Tensor], batch: Batch) -> NextItemOutputs:
        """See NextItemOutputs."""
        hidden_SD = self.backbone(rows, batch)
        hidden_TE = self.project_out(hidden_SD[: batch.packing.num_history_tokens]).float()
        weights = {name: self.backbone.embedder.small[module_key(t)].weight for name, t in self.auxiliary_table.items()}
        # views: FSDP2 hooks every output of the model, and on the parameter itself its hooks would pile up
        return NextItemOutputs(hidden_TE, {name: weight.view_as(weight) for name, weight in weights.items()})


class RankingModel(nn.Module):
    """Discriminative training: the state at each candidate, with its context, gives one logit per task."""

    def __init__(
        self,
        manifest: Manifest,
        tables: TablesConfig,
        model: ModelConfig,
        sharded: tuple[Table, ...],
        tasks: tuple[str, ...],
    ):
        super().__init__()
        self.backbone = Backbone(manifest, tables, model, sharded)
        self.context = ContextEmbedder(manifest, tables, model.context_dim, sharded)
        tower = self.backbone.tower
        in_width = tower.out_width + self.context.width
        self.heads = RankingHeads(tasks, in_width, tower.mlp_widths, model.init_std, tower.direct_width)

    def forward(self, rows: dict[str, torch.Tensor], batch: Batch, with_history: bool = False):
        """-> task -> logits float32 [C]; `with_history`: (the same, HistoryStates)"""
        if not with_history:
            return self._logits(self.backbone(rows, batch, candidates_only=True), rows, batch)
        state_C, history = self.backbone.with_history(rows, batch)
        return self._logits(state_C, rows, batch), history

    def _logits(self, x_C: torch.Tensor, rows: dict[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        if self.context.width:
            x_C = torch.cat((x_C, self.context(rows, batch)), dim=-1)
        return self.heads(x_C)
