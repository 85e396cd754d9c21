"""Runs a model of this project with the weights and inputs of `tests/assets/golden` and compares what comes out.

Parameters of the model are made from the official ones by torch operations (renaming, joining, permuting, folding), so
autograd carries the gradients back to the official parameters, whatever a map does.

Shape letters: B rows, N positions of a padded history, D width.
"""

import dataclasses
import pathlib
import typing

import numpy as np
import pyarrow as pa
import torch

from gpsd_dist import schema
from gpsd_dist.batch.batch import Batch
from gpsd_dist.config import DataConfig, ModelConfig, PretrainConfig, RunConfig, TablesConfig
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.parquet_dataset import BatchKey
from gpsd_dist.stages.finetune import Finetune
from gpsd_dist.stages.pretrain import Pretrain
from gpsd_dist.tables.collections import lookup_tables

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "assets" / "golden"
OUTPUTS_RTOL, GRADIENTS_RTOL = 3e-6, 2e-5
"""Relative to the largest value of a tensor. Seen: 1.0e-6 and 5.3e-6."""
_ROUNDED_ZERO = 1e-7  # A gradient that is zero but for rounding has no relative error.
Weights = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]

# --- names: ours -> official. "{i}": layer or head; "*": weight and bias; "+": joined along dimension 0. -------------

_TRANSFORMER = {
    "backbone.embedder.segment.weight": "segment_embeddings.weight",
    "backbone.tower.norm.weight": "norm.weight",
    "backbone.tower.blocks.{i}.attention_norm.weight": "layers.{i}.attention_norm.weight",
    "backbone.tower.blocks.{i}.ffn_norm.weight": "layers.{i}.ffn_norm.weight",
    "backbone.tower.blocks.{i}.qkv.weight": " + ".join(f"layers.{{i}}.attention.w{x}.weight" for x in "qkv"),
    "backbone.tower.blocks.{i}.attention_out.weight": "layers.{i}.attention.wo.weight",
    "backbone.tower.blocks.{i}.gate_up.weight": "layers.{i}.feed_forward.w1.weight + layers.{i}.feed_forward.w3.weight",
    "backbone.tower.blocks.{i}.down.weight": "layers.{i}.feed_forward.w2.weight",
    "backbone.project_in.layers.0.weight": "pre_projector.pre_norm.weight",
    "backbone.project_in.layers.1.weight": "pre_projector.linear.weight",
    "project_out.layers.0.weight": "post_projector.linear.weight",
    "project_out.layers.1.weight": "post_projector.post_norm.weight",
    "heads.mlps.click.0.*": "rank_head.w1.*",
    "heads.mlps.click.2.*": "rank_head.w2.*",
}
_HSTU_LAYER = "_hstu._attention_layers.{i}."
_HSTU = {
    "backbone.tower.positions.table.weight": "_input_features_preproc._pos_emb.weight",
    "backbone.tower.blocks.{i}.out.*": f"{_HSTU_LAYER}_o.*",
    "backbone.tower.blocks.{i}.position_bias": f"{_HSTU_LAYER}_rel_attn_bias._pos_w",
    "backbone.tower.blocks.{i}.time_bias": f"{_HSTU_LAYER}_rel_attn_bias._ts_w",
}
_SASREC = {
    "backbone.tower.positions.table.weight": "_input_features_preproc._pos_emb.weight",
    "backbone.tower.blocks.{i}.attention_out.*": "attention_layers.{i}.out_proj.*",
    "backbone.tower.blocks.{i}.up.bias": "forward_layers.{i}._conv1d.0.bias",
    "backbone.tower.blocks.{i}.down.bias": "forward_layers.{i}._conv1d.3.bias",
}
_MLP = {f"heads.mlps.click.{ours}.*": f"mlp.{theirs}.*" for ours, theirs in ((0, 0), (2, 3), (4, 6))}
_DEEPFM = {ours: f"fm_layer.lr_layer.{theirs}" for ours, theirs in _MLP.items()}
_DEEPFM["heads.mlps.click.6.bias"] = "output_proj.bias"
_DIEN = _MLP | {"backbone.tower.extractor.*l0": "extraction_module.*l0"}
_DMIN = _MLP | {
    "backbone.tower.refiner_qkv.weight": "behavior_refiner.attention.in_proj_weight",
    "backbone.tower.refiner_qkv.bias": "behavior_refiner.attention.in_proj_bias",
    "backbone.tower.refiner.project.*": "behavior_refiner.attention.out_proj.*",
    "backbone.tower.refiner.ffn.0.*": "behavior_refiner.ffn.0.*",
    "backbone.tower.refiner.ffn.2.*": "behavior_refiner.ffn.2.*",
    "backbone.tower.extractor_qkv.weight": "multi_interest_extractor.W_qkv.weight",
    "backbone.tower.interests.{i}.project.weight": "multi_interest_extractor.W_o.{i}.weight",
    "backbone.tower.interests.{i}.ffn.0.*": "multi_interest_extractor.ffn.{i}.0.*",
    "backbone.tower.interests.{i}.ffn.2.*": "multi_interest_extractor.ffn.{i}.2.*",
}
_WUKONG_LAYER = "interaction_layers.{i}."
_WUKONG = {
    "backbone.tower.layers.{i}.norm.*": f"{_WUKONG_LAYER}norm.*",
    "backbone.tower.layers.{i}.fm.2.*": f"{_WUKONG_LAYER}fmb.mlp.4.*",
    "heads.mlps.click.0.*": "projection_head.0.*",
    "heads.mlps.click.2.*": "projection_head.3.*",
}
_EXPANSIONS = {"*": ("weight", "bias"), "*l0": ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")}


def _renamed(w: Weights, names: dict[str, str]) -> Weights:
    """Takes all official weights that `names` has; what is missed shows as a parameter that the model lacks."""
    made = {}
    for ours, theirs in names.items():
        place = "*l0" if ours.endswith("*l0") else "*" if ours.endswith("*") else ""
        for i in range(8 if "{i}" in ours else 1):
            for kind in _EXPANSIONS.get(place, ("",)):
                parts = [part.replace("{i}", str(i)) for part in theirs.split(" + ")]
                parts = [part.replace(place, kind) if place else part for part in parts]
                key = ours.replace("{i}", str(i))
                if parts[0] in w:
                    made[key.replace(place, kind) if place else key] = torch.cat([w[part] for part in parts])
    return made


def _hstu(w: Weights) -> Weights:
    uvqk = {f"backbone.tower.blocks.{i}.uvqk.weight": w[f"_hstu._attention_layers.{i}._uvqk"].T for i in range(2)}
    return _renamed(w, _HSTU) | uvqk


def _sasrec(w: Weights) -> Weights:
    made = _renamed(w, _SASREC)
    for i in range(2):
        block, width = f"backbone.tower.blocks.{i}.", w["_embedding_module._item_emb.weight"].shape[1]
        for kind in ("weight", "bias"):
            parts = w[f"attention_layers.{i}.in_proj_{kind}"].tensor_split([width])
            made[f"{block}query.{kind}"], made[f"{block}key_value.{kind}"] = parts
        for ours, theirs in (("up", 0), ("down", 3)):
            made[f"{block}{ours}.weight"] = w[f"forward_layers.{i}._conv1d.{theirs}.weight"].squeeze(-1)
    return made


def _activation_unit(w: Weights, ours: str, theirs: str) -> Weights:
    """Maps DIN's attention: Dice learns what the official one takes from running means and variances."""
    names = {"linears.0.*": "0.*", "linears.1.*": "3.*", "linears.2.weight": "6.weight"}
    names |= {"dices.0.alpha": "1.alpha", "dices.1.alpha": "4.alpha"}
    made = _renamed(w, {f"{ours}{key}": f"{theirs}{name}" for key, name in names.items()})
    for dice, place in ((0, 1), (1, 4)):
        made[f"{ours}dices.{dice}.threshold"] = w[f"{theirs}{place}.bn.running_mean"]
        made[f"{ours}dices.{dice}.slope"] = (w[f"{theirs}{place}.bn.running_var"] + 1e-9).rsqrt()
    return made


def _din(w: Weights) -> Weights:
    return _renamed(w, _MLP) | _activation_unit(w, "backbone.tower.attention.", "item_attention.active_unit.fc.")


def _dien(w: Weights) -> Weights:
    made = _renamed(w, _DIEN)
    made |= _activation_unit(w, "backbone.tower.attention.", "attention_module.attn_mlp.fc.")
    for ours, theirs in (("of_input", "x2h"), ("of_state", "h2h")):
        for kind in ("weight", "bias"):
            update, reset, new = w[f"evolving_module.gru_cell.{theirs}.{kind}"].chunk(3)
            made[f"backbone.tower.evolution.{ours}.{kind}"] = torch.cat((reset, update, new))
    return made


def _deepfm(w: Weights) -> Weights:
    """The official code adds the interactions to every unit of the last layer: their weight here is the sum."""
    last = w["output_proj.weight"]
    return _renamed(w, _DEEPFM) | {"heads.mlps.click.6.weight": torch.cat((last, last.sum(1, keepdim=True)), dim=1)}


def _dmin(w: Weights) -> Weights:
    made = _renamed(w, _DMIN)
    for head in range(4):
        theirs = f"multi_interest_extractor.target_attention.{head}.attn_mlp.fc."
        made |= _activation_unit(w, f"backbone.tower.attentions.{head}.", theirs)
    return made


def _wukong(w: Weights) -> Weights:
    """Permutes the fields of the first layer, and folds the batch norm, as in evaluation, into the layer before it."""
    made = _renamed(w, _WUKONG)
    for layer in range(2):
        ours, theirs = f"backbone.tower.layers.{layer}.", f"interaction_layers.{layer}."
        mixing = [w[f"{theirs}{name}.weight"] for name in ("fmb", "lcb")]
        if layer == 0:
            mixing.append(w[f"{theirs}residual_projection.weight"])
        # Theirs: items of the slots, their categories, candidate. Ours: candidate, then item and category of each slot.
        order = [10, 11, 0, 5, 1, 6, 2, 7, 3, 8, 4, 9] if layer == 0 else list(range(32))
        made[f"{ours}mixing"] = torch.cat(mixing, dim=1)[order]
        for kind in ("weight", "bias"):
            made[f"{ours}fm_norm.{kind}"] = w[f"{theirs}fmb.norm.{kind}"].view(-1, 24)[order].flatten()
        norm = f"{theirs}fmb.mlp.1."
        scale = w[f"{norm}weight"] * (w[f"{norm}running_var"] + 1e-5).rsqrt()
        weight = w[f"{theirs}fmb.mlp.0.weight"].unflatten(1, (-1, 24))[:, order].flatten(1)
        made[f"{ours}fm.0.weight"] = scale[:, None] * weight
        bias = w[f"{theirs}fmb.mlp.0.bias"] - w[f"{norm}running_mean"]
        made[f"{ours}fm.0.bias"] = scale * bias + w[f"{norm}bias"]
    return made


class Case(typing.NamedTuple):
    """One file of the folder."""

    model: ModelConfig
    embedding_dim: int
    parameters: typing.Callable[[Weights], Weights]
    negatives_per: str = ""
    """As the official code draws them in pretraining; empty: the model does not pretrain."""
    rows_of: str = ""
    """Prefix of the arrays to compare with."""


def _transformer(w: Weights) -> Weights:
    return _renamed(w, _TRANSFORMER)


CASES = {
    "transformer": Case(ModelConfig("transformer", 2, 32, 4), 32, _transformer, "request"),
    "transformer_projected": Case(ModelConfig("transformer", 1, 32, 4), 16, _transformer, "request"),
    "hstu": Case(ModelConfig("hstu", 2, 16, 2, max_positions=31, head_width=8), 16, _hstu, "position"),
    "sasrec": Case(ModelConfig("sasrec", 2, 16, 2, max_positions=31, ffn_width=16), 16, _sasrec, "position"),
    "din": Case(ModelConfig("din", width=16), 16, _din),
    "dien": Case(ModelConfig("dien", width=8), 8, _dien),
    "deepfm": Case(ModelConfig("deepfm", width=16), 16, _deepfm, rows_of="unpadded/"),
    "dmin": Case(ModelConfig("dmin", width=8, heads=4), 8, _dmin),
    "wukong": Case(ModelConfig("wukong", 2, 8, max_positions=5), 8, _wukong),
}
_TABLES = {"item_embeddings.weight", "_embedding_module._item_emb.weight"}


class Golden:
    """One case with its arrays, ready to run. `revision`, `temperature`: planted changes."""

    def __init__(self, name: str, *, revision: int = 3, temperature: float = 0.05):
        self.case = CASES[name]
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            self.arrays: Arrays = dict(file)
        self.official = {
            key.removeprefix("weights/"): torch.from_numpy(value).requires_grad_("running" not in key)
            for key, value in self.arrays.items()
            if key.startswith("weights/")
        }
        self.has_category = "input/category" in self.arrays
        self.max_length = self.arrays["input/item"].shape[1]
        self.manifest = _manifest(self.has_category, self.max_length)
        self.run = RunConfig(
            "finetune",
            "data",
            "out",
            data=DataConfig(max_history_length=self.max_length),
            tables=TablesConfig(embedding_dim=self.case.embedding_dim, small_table_max_rows=20),
            model=dataclasses.replace(self.case.model, revision=revision),
            pretrain=PretrainConfig(temperature, auxiliary=("category",) if self.has_category else ()),
        )

    def with_parameters(self, model: torch.nn.Module) -> typing.Callable[..., typing.Any]:
        """Gives the model the official parameters: exactly those it has."""
        made = self.case.parameters(self.official)
        if self.has_category:
            made["backbone.embedder.small.category.weight"] = self.official["cate_embeddings.weight"]
        own = {key: value for key, value in made.items() if key.split(".")[0] in dict(model.named_children())}
        own = {key: value for key, value in own.items() if "layers" in key or not key.startswith("project_out")}
        assert {key: value.shape for key, value in own.items()} == {
            key: value.shape for key, value in model.named_parameters()
        }
        return lambda *args, **options: torch.func.functional_call(model, own, args, options)

    def embeddings(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Looks up the rows of a batch in the official item table."""
        [name] = _TABLES & self.official.keys()
        return {"item": self.official[name][batch.lookup.values()]}

    def gradients(self, loss: torch.Tensor) -> Weights:
        """Differentiates by every official parameter; zero where the loss does not depend on one."""
        leaves = {key: value for key, value in self.official.items() if value.requires_grad}
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))


def _manifest(has_category: bool, max_length: int) -> schema.Manifest:
    names = ("item", "category") if has_category else ("item",)
    rows = {"item": 104, "category": 12}
    return schema.Manifest(
        source="golden numbers",
        features=tuple(schema.Feature(name, ("history", "candidate"), table=name) for name in names),
        tables=tuple(schema.Table(name, rows[name], fingerprint=name) for name in names),
        tasks=(schema.Task("click"),),
        splits=(),
        max_history_length=max_length,
    )


def _rows(golden: Golden, prefix: str, split: str, requests: list[list[int]]) -> pa.Table:
    """Makes one Parquet row per request, whose candidates are those of the given rows of the file."""
    given = {key.removeprefix(prefix): value for key, value in golden.arrays.items() if key.startswith(prefix)}
    given.setdefault("time_s", np.zeros_like(given["item"]))
    for name in ("request_time_s", "label"):
        given.setdefault(name, np.zeros(len(given["length"]), np.int64))
    first = [rows[0] for rows in requests]
    columns: dict[str, list] = {
        "user_id": [str(row) for row in first],
        "user_hash": first,
        "history_length": given["length"][first].tolist(),
    }
    for name in (*(feature.name for feature in golden.manifest.features), "time_s"):
        columns[f"history.{name}"] = [given[name][row, : given["length"][row]].tolist() for row in first]
    if split != "pretrain":
        columns["request_time_s"] = given["request_time_s"][first].tolist()
        for feature in golden.manifest.features:
            columns[f"candidate.{feature.name}"] = [given[f"candidate_{feature.name}"][r].tolist() for r in requests]
        columns["label.click"] = [given["label"][rows].astype(float).tolist() for rows in requests]
    return pa.table(columns, schema=schema.arrow_schema(golden.manifest, split))


def ranking(golden: Golden, requests: list[list[int]] | None = None) -> tuple[dict[str, torch.Tensor], Weights]:
    """Runs the ranking stage: (outputs by the file's names, gradients of the loss), padded and ordered as in the file.

    `requests`: rows of the file that share a request; None: every row is one. States are left out where a model has
    none for histories, logits and loss where the file has none.
    """
    length = golden.arrays["input/length"]
    requests = requests or [[row] for row in range(len(length))]
    stage = Finetune(golden.run, golden.manifest)
    sharded = lookup_tables(golden.manifest, golden.run.tables, with_candidates=True)
    collate = Collate(golden.manifest, ("item",), golden.max_length, with_candidates=True)
    [batch] = collate(_rows(golden, "input/", "train", requests), BatchKey(0, 0, 0))
    model, embeddings = stage.model(sharded), golden.embeddings(batch)
    outputs, gradients = {}, {}
    row_C = torch.tensor([row for request in batch.source_row_B.tolist() for row in requests[request]])
    if f"{golden.case.rows_of}output/logit" in golden.arrays:
        called = golden.with_parameters(model)
        logit_C = called(embeddings, batch)["click"]
        outputs["logit"] = torch.empty(len(length)).index_copy(0, row_C, logit_C)
        outputs["probability"] = outputs["logit"].sigmoid()
        loss = stage.loss_sums(called, embeddings, batch) / stage.counts(batch)
        outputs["loss"], gradients = loss[0], golden.gradients(loss.sum())
    if golden.case.negatives_per:
        states_SD = golden.with_parameters(_BackboneAlone(model.backbone))(embeddings, batch)
        history_TD, candidate_CD = states_SD.tensor_split([batch.packing.num_history_tokens])
        outputs["candidate_states"] = torch.empty(len(length), states_SD.shape[1]).index_copy(0, row_C, candidate_CD)
        padded_BND = torch.zeros(len(length), golden.max_length, states_SD.shape[1])
        parts = history_TD.split(batch.packing.history_offsets.diff().tolist())
        for request, part in zip(batch.source_row_B.tolist(), parts, strict=True):
            for row in requests[request]:
                padded_BND[row, : len(part)] = part.detach()
        outputs["history_states"] = padded_BND
    return outputs, gradients


class _BackboneAlone(torch.nn.Module):
    """Gives the states of histories and candidates, with parameters named as in the whole model."""

    def __init__(self, backbone: torch.nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, *args: typing.Any) -> torch.Tensor:
        return self.backbone(*args)


def pretraining(golden: Golden) -> tuple[dict[str, torch.Tensor], Weights]:
    """Runs the pretraining stage on the negatives of the file: (outputs by the file's names, gradients of the loss)."""
    arrays = {key.removeprefix("pretraining/input/"): value for key, value in golden.arrays.items()}
    length, negatives = arrays["length"], arrays["negative_item"]
    order = np.argsort(length, kind="stable")
    if golden.case.negatives_per == "position":
        drawn = np.concatenate([negatives[row, : max(length[row] - 1, 0)] for row in order])
    else:
        drawn = negatives[order]
    stage = Pretrain(golden.run, golden.manifest)
    sharded = lookup_tables(golden.manifest, golden.run.tables, with_candidates=False)
    collate = Collate(
        golden.manifest,
        ("item",),
        golden.max_length,
        with_candidates=False,
        negatives_per=golden.case.negatives_per,
        num_negatives=negatives.shape[-1],
        sampler=lambda *_: drawn,
    )
    rows = _rows(golden, "pretraining/input/", "pretrain", [[row] for row in range(len(length))])
    [batch] = collate(rows, BatchKey(0, 0, 0))
    assert np.array_equal(batch.source_row_B, order)
    called, embeddings = golden.with_parameters(stage.model(sharded)), golden.embeddings(batch)
    loss = stage.loss_sums(called, embeddings, batch) / stage.counts(batch)
    outputs = dict(zip(("next_item_loss", "next_category_loss"), loss))
    if "pretraining/output/states" in golden.arrays:
        hidden_TE = called(embeddings, batch).hidden_TE
        padded = torch.zeros(len(length), golden.max_length, hidden_TE.shape[1])
        # Nothing follows the last token of a history, so it has no state.
        for row, part in zip(order, hidden_TE.split(np.maximum(length[order] - 1, 0).tolist())):
            padded[row, : len(part)] = part.detach()
        outputs["states"] = padded
    return outputs, golden.gradients(loss.sum())


def errors(golden: Golden, prefix: str, outputs: dict[str, torch.Tensor], gradients: Weights) -> dict[str, float]:
    """Returns the error of every array of the file under `prefix`, in units of what is allowed: 1 is the limit."""
    found = {}
    for key, array in golden.arrays.items():
        kind, _, name = key.removeprefix(prefix).partition("/")
        if not key.startswith(prefix) or kind not in ("output", "gradient", "gradient_norm", "gradient_first8"):
            continue
        ours = outputs[name] if kind == "output" else gradients[name]
        ours = ours.norm() if kind == "gradient_norm" else ours.flatten()[:8] if kind == "gradient_first8" else ours
        found[key] = error(ours, array) / (OUTPUTS_RTOL if kind == "output" else GRADIENTS_RTOL)
    return found


def error(ours: torch.Tensor, array: np.ndarray) -> float:
    """Returns the largest difference over the largest value."""
    theirs = torch.from_numpy(array)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference, largest = (ours.detach() - theirs).abs().max(), theirs.abs().max()
    return float(difference / largest if largest > _ROUNDED_ZERO else difference)
