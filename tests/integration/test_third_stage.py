"""A third stage is one file and one line: this one learns which items are clicked, from their embeddings alone."""

import json
import typing

import pytest
import torch
from torch import nn

from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.metrics.classification import Predictions, gather_metrics
from gpsd_dist.stages import registry
from gpsd_dist.trainer import Trainer
from tests.integration.tiny_data import SHARDED_TABLES, differing, read_checkpoint, step_folder, tiny_run, train_losses


class _ItemBias(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, embeddings, batch) -> torch.Tensor:
        return self.score(embeddings["item"][batch.candidate["item"]]).squeeze(-1)


class ItemBias:
    """Squared error of the first task's label."""

    with_candidates: typing.ClassVar[bool] = True
    loss_weights: typing.ClassVar[dict[str, float]] = {"squared_error": 1.0}
    scored_losses = ()

    def __init__(self, run, manifest):
        self.run, self.task = run, manifest.tasks[0].name

    def model(self, sharded):
        return _ItemBias(self.run.tables.embedding_dim)

    def counts(self, batch):
        return (~batch.labels[self.task].isnan()).sum().float().reshape(1)

    def loss_sums(self, model, embeddings, batch):
        label_C = batch.labels[self.task]
        error_C = model(embeddings, batch) - label_C
        return error_C[~label_C.isnan()].square().sum().reshape(1)

    def evaluate(self, components, batches, rank_cut):
        predictions = Predictions()
        for (batch,) in batches:
            embeddings = components.tables(batch.lookup)
            label_C, user_C = batch.labels[self.task], batch.user_hash_B[batch.packing.request_C]
            predictions.add(components.model(embeddings, batch), label_C, user_C, ~label_C.isnan())
        return gather_metrics({self.task: predictions})

    def default_metric(self, metrics):
        return f"{self.task}/auc"


@pytest.mark.parametrize("pipeline", ["plain", "sparse_dist"])
def test_a_registered_stage_trains_validates_saves_and_resumes(data_dir, tmp_path, one_rank, monkeypatch, pipeline):
    monkeypatch.setitem(registry.STAGES, "item_bias", lambda: ItemBias)

    def run(name: str, max_steps: int) -> None:
        options = {"train": {"max_steps": max_steps, "profile": True}, "execution": {"pipeline": pipeline}}
        Trainer(tiny_run("item_bias", data_dir, tmp_path / name, **options), one_rank).train()

    run("whole", 12)
    run("parts", 6)
    run("parts", 12)
    whole, parts = (read_checkpoint(step_folder(tmp_path / name, 12)) for name in ("whole", "parts"))
    assert not differing(whole, parts)
    assert {f"table.{name}" for name in SHARDED_TABLES} | {"dense.score.weight"} <= set(whole)
    losses = train_losses(tmp_path / "whole")
    assert len(losses) == 12 and losses[12] < losses[1]
    entries = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [0 < entry["valid/click/auc"] < 1 for entry in entries if "valid/click/auc" in entry] == [True, True]


def test_a_stage_that_is_not_registered_is_refused(data_dir, tmp_path, one_rank):
    with pytest.raises(ValueError, match="stage 'item_bias' is not one of"):
        Trainer(tiny_run("item_bias", data_dir, tmp_path), one_rank)


def test_options_that_act_on_a_tower_are_refused_where_the_stage_has_none(data_dir, tmp_path, one_rank, monkeypatch):
    monkeypatch.setitem(registry.STAGES, "item_bias", lambda: ItemBias)
    run = tiny_run("item_bias", data_dir, tmp_path, model={"compile": True},
                   execution={"activation_checkpointing": True})  # fmt: skip
    with pytest.raises(ValueError, match=r"compile, ExecutionConfig.activation_checkpointing: the model of"):
        Trainer(run, one_rank)


def test_a_third_stage_may_read_the_options_of_both_others():
    files = ["configs/stage/pretrain.gin", "configs/data/grocery.gin"]
    argv = [argument for file in files for argument in ("--gin_file", file)]
    overrides = ["STAGE=item_bias", "OUTPUT_DIR=a", "PretrainConfig.temperature=0.1", "FinetuneConfig.esmm=True"]
    run = load_run_config([*argv, *(f"--gin.{override}" for override in overrides)]).run
    assert run.pretrain.temperature == 0.1 and run.finetune.esmm
