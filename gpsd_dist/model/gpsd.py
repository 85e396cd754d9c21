"""GPSD's two dense models on one tower: next item (pretraining) and ranking (finetuning). arXiv:2506.03699, figure 2.

They take looked-up embeddings of tables and a batch and return outputs; losses are in `stages/losses.py`, the tables in
`tables/collections.py`.

Shape letters: U distinct rows of a table, S tokens in packed order, T history tokens, C candidates, D width,
E embedding width.
"""

import typing

import torch
from torch import nn

from gpsd_dist.batch.batch import Batch
from gpsd_dist.config import ModelConfig, TablesConfig
from gpsd_dist.config.model import MODELS, models_with
from gpsd_dist.model.embeddings import ContextEmbedder, TokenEmbedder
from gpsd_dist.model.heads import Projection, RankingHeads
from gpsd_dist.model.item_score import ItemScore
from gpsd_dist.model.registry import TOWERS, Times
from gpsd_dist.model.replaceable import Replaceable, call
from gpsd_dist.parameter_names import module_key
from gpsd_dist.schema import Manifest, Table


class Backbone(nn.Module):
    """Embeds tokens, projects them to the tower's width and runs the tower: the part that full transfer copies."""

    def __init__(self, manifest: Manifest, tables: TablesConfig, model: ModelConfig, sharded: tuple[Table, ...]):
        super().__init__()
        model.refuse_foreign()
        tower = TOWERS[model.name]
        model.check_revision()
        self.embedder = TokenEmbedder(manifest, tables, sharded, tower.reads_fields, tower.has_segments)
        eps = model.projection_eps
        self.project_in = Projection(tables.embedding_dim, model.width, model.init_std, norm_first=True, eps=eps)
        # Where no norm follows, rows of 0.02 would leave a product of two of them at 4e-4. SASRec and HSTU scale alike.
        scales = tower.reads_fields and model.starts_by_width
        self.token_scale = tables.embedding_dim**0.5 if scales else 1.0
        # A tower that adds positions or times to its input drops out the sum, as its paper does: not twice.
        self.dropout = nn.Dropout(0.0 if tower.drops_inputs else model.dropout)
        self.tower = tower(model, self.embedder.num_fields)
        self.call_padded: typing.Callable[..., torch.Tensor] = call  # Runs padded batches, as a CUDA graph if asked

    def forward(self, embeddings: dict[str, torch.Tensor], batch: Batch, candidates_only: bool = False) -> torch.Tensor:
        """Runs a batch with its `embeddings` (table -> [U, E]): states [S, D], or of candidates [C, out_width]."""
        x, padded = self.tokens(embeddings, batch), batch.padded
        if padded is None:
            return self.tower(x, batch.packing, candidates_only, Times(batch.history_time_s_T, batch.request_time_s_B))
        # Only the tower meets the padding: embedder and heads run on real tokens, so no loss or gradient sees it.
        states = self.call_padded(self.tower, padded.fill(x), padded.packing, candidates_only)
        return padded.take(states, candidates_only)

    def with_history(self, embeddings: dict[str, torch.Tensor], batch: Batch) -> tuple[torch.Tensor, "HistoryStates"]:
        """Gives the candidates' states [C, out_width], and those of histories (towers that `supervises_history`)."""
        x_SFD = self.tokens(embeddings, batch)
        times = Times(batch.history_time_s_T, batch.request_time_s_B)
        state_C, state_TN = self.tower(x_SFD, batch.packing, True, times, with_history=True)
        return state_C, HistoryStates(state_TN, x_SFD[: batch.packing.num_history_tokens].flatten(1))

    def tokens(self, embeddings: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Makes the tower's input: a vector per token [S, D], or one per feature of it."""
        return self.dropout(self.project_in(self.embedder(embeddings, batch)) * self.token_scale)


class HistoryStates(typing.NamedTuple):
    """Pairs what the next-behaviour loss compares."""

    state_TN: torch.Tensor  # State after each history token, which knows that token and the ones before it
    token_TN: torch.Tensor  # Vector of each history token: its features side by side


class NextItemOutputs(typing.NamedTuple):
    """Holds the output of `NextItemModel.forward`."""

    hidden_TE: torch.Tensor
    """State at each history token, in the space of the items: compared with their embeddings by cosine."""
    auxiliary_weight: dict[str, torch.Tensor]
    """Feature -> [rows, E]: the input table of each auxiliary target, tied to its output."""
    bias_V: torch.Tensor | None = None
    weight_WF: torch.Tensor | None = None
    """These two add to cosines: a bias per item, and weights of recent counts (`item_score.window_weights`)."""


class NextItemModel(Replaceable):
    """Predicts the next item, and its attributes, from the state at every history token (generative pretraining)."""

    def __init__(
        self,
        manifest: Manifest,
        tables: TablesConfig,
        model: ModelConfig,
        sharded: tuple[Table, ...],
        auxiliary: tuple[str, ...],
        item_bias: bool = False,
        num_windows: int = 0,
    ):
        super().__init__()
        # A tower that gives states to candidates alone has nothing that could predict a history's next item.
        if not MODELS[model.name].is_generative:
            generative = models_with("is_generative")
            raise ValueError(f"model {model.name!r} predicts no next item; pretrain one of {generative}")
        self.backbone = Backbone(manifest, tables, model, sharded)
        width, eps = tables.embedding_dim, model.projection_eps
        self.project_out = Projection(model.width, width, model.init_std, norm_first=False, eps=eps)
        self.auxiliary_table = {name: manifest.feature(name).table for name in auxiliary}
        for name, table in self.auxiliary_table.items():
            if table is None or module_key(table) not in self.backbone.embedder.small or manifest.feature(name).is_bag:
                small = sorted(self.backbone.embedder.small)
                raise ValueError(
                    f"auxiliary target {name!r} needs a full softmax, so it must be a token feature with one value "
                    f"and a small table (those are {small}); raise TablesConfig.small_table_max_rows or leave it out"
                )

        rows = manifest.table(manifest.feature(manifest.item_feature).table).num_rows
        has_score = item_bias or num_windows
        self.item_score = ItemScore(rows, item_bias, num_windows, width) if has_score else None

    def forward(self, embeddings: dict[str, torch.Tensor], batch: Batch) -> NextItemOutputs:
        """Runs a batch with its `embeddings` (table -> [U, E]): states [T, E], and weights of small output layers."""
        return self.outputs(self.backbone(embeddings, batch)[: batch.packing.num_history_tokens])

    def outputs(self, hidden_TD: torch.Tensor) -> NextItemOutputs:
        """Projects the tower's states of history tokens."""
        hidden_TE = self.project_out(hidden_TD).float()
        weights = {name: self.backbone.embedder.small[module_key(t)].weight for name, t in self.auxiliary_table.items()}
        # Views, because FSDP2 hooks every output of the model, and on the parameter itself its hooks would pile up.
        views = {name: weight.view_as(weight) for name, weight in weights.items()}
        return NextItemOutputs(hidden_TE, views, *(self.item_score.views() if self.item_score else ()))


class RankingModel(Replaceable):
    """Scores each candidate: its state, with its context, gives one logit per task (discriminative training)."""

    def __init__(
        self,
        manifest: Manifest,
        tables: TablesConfig,
        model: ModelConfig,
        sharded: tuple[Table, ...],
        tasks: tuple[str, ...],
        offset: str = "",
    ):
        super().__init__()
        self.backbone = Backbone(manifest, tables, model, sharded)
        self.context = ContextEmbedder(manifest, tables, model, sharded, offset)
        tower, has_offset = self.backbone.tower, bool(offset)
        in_width = tower.out_width + self.context.width - has_offset
        sizes = in_width, tower.mlp_widths, model.head_init_std, tower.direct_width
        self.heads = RankingHeads(tasks, *sizes, has_offset)

    def forward(self, embeddings: dict[str, torch.Tensor], batch: Batch, with_history: bool = False):
        """Returns task -> logits float32 [C]; `with_history`: (those logits, HistoryStates)."""
        # Only candidates leave the tower, so histories are computed no further than candidates need them.
        if not with_history:
            return self._logits(self.backbone(embeddings, batch, candidates_only=True), embeddings, batch)
        state_C, history = self.backbone.with_history(embeddings, batch)
        return self._logits(state_C, embeddings, batch), history

    def _logits(self, x_C: torch.Tensor, embeddings: dict[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        # The context joins behind the tower, so that one pass over a history serves all candidates of the request.
        if self.context.width:
            x_C = torch.cat((x_C, self.context(embeddings, batch)), dim=-1)
        return self.heads(x_C)
