"""Evaluation over ranks equals evaluation on one, counts every row once, and ranks like a loop over all items."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from gpsd_dist.baselines.frequent_items import frequent_item_metrics
from gpsd_dist.baselines.registry import evaluate_baseline
from gpsd_dist.checkpoint import manager
from gpsd_dist.data.loaders import evaluation_loader
from gpsd_dist.metrics.binary_metrics import classification_metrics
from gpsd_dist.metrics.scores import read_scores, scores_file
from gpsd_dist.schema import NUM_RESERVED_ROWS, read_manifest
from gpsd_dist.stages.stage import evaluate_split
from gpsd_dist.trained_run import evaluate_checkpoint
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import NUM_ITEMS, cpu_runtime, edit_state, tiny_run, train_runs, write_tiny_data

pytestmark = pytest.mark.timeout(420)  # the fixture starts ranks, each call with its own limit of 150 s

RUNS = ("pretrain", "finetune")
PLAN = {"item": "row_wise", "tag": "table_wise"}


def _scores(rank: int, world_size: int, runs):
    """[run][split] -> metrics"""
    runtime, results = cpu_runtime(rank, world_size), []
    for run in runs:
        trainer = Trainer(run, runtime)
        trainer.load_weights()
        splits = ("valid", "test")
        results.append({s: evaluate_split(run, trainer.manifest, trainer.components, s) for s in splits})
    return results


@pytest.fixture(scope="module")
def scored(tmp_path_factory, one_rank):
    """World size -> rank -> run -> split -> metrics. `valid` has 21 rows, `test` one row: fewer than ranks."""
    root = tmp_path_factory.mktemp("evaluation")
    write_tiny_data(root / "data", rows={"test": 1})
    options = {"tables": {"sharding": PLAN}, "train": {"max_steps": 4}}
    runs = [tiny_run(stage, root / "data", root / stage, **options) for stage in RUNS]
    train_runs(0, 1, runs)
    return {
        "root": root,
        1: [_scores(0, 1, runs)],
        2: run_distributed(_scores, 2, root, runs, timeout_s=300),
    }


@pytest.mark.equivalence
@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("run", range(len(RUNS)))
def test_metrics_do_not_depend_on_world_size(scored, run, split):
    one, (two, two_other) = scored[1][0][run][split], (ranks[run][split] for ranks in scored[2])
    for task, values in one.items():
        assert two[task] == pytest.approx(values, abs=1e-6, nan_ok=True)
        assert two_other[task] == pytest.approx(two[task], abs=0, nan_ok=True)  # every rank knows the result


@pytest.mark.parametrize("split", ["valid", "test"])
def test_every_row_counts_once(scored, split):
    labels = _labels(scored["root"] / "data", split)
    click, buy = (np.array(labels[task], float) for task in ("click", "buy"))
    positive = click == 1
    for world_size in (1, 2):
        pretrained, finetuned = scored[world_size][0]
        assert finetuned[split]["click"]["rows"] == np.isfinite(click).sum()
        assert finetuned[split]["buy"]["rows"] == (np.isfinite(buy) & positive).sum()
        assert pretrained[split]["next_item"]["rows"] == positive.sum()


@pytest.mark.parametrize("what", ["finetune", "rates"])
def test_kept_scores_are_those_of_the_metrics(scored, one_rank, tmp_path, what):
    """Written, read, and measured again."""
    data, keep, path = scored["root"] / "data", {}, tmp_path / "scores.parquet"
    if what == "rates":
        metrics = evaluate_baseline(what, data, "valid", keep=keep)
    else:
        metrics = evaluate_checkpoint(scored["root"] / what, str(data), "valid", one_rank, keep=keep)
    path.write_bytes(scores_file(keep))
    found = read_scores(path)
    assert set(found) == set(metrics) == {"click", "buy"}
    for task, columns in found.items():
        again = classification_metrics(columns["score"], columns["label"], columns["user_hash"], day_N=columns["day"])
        assert again == pytest.approx(metrics[task], abs=0, nan_ok=True)
    labels = _labels(data, "valid")["click"]
    assert sorted(found["click"]["label"]) == sorted(label for label in labels if label is not None)


def test_models_and_baselines_count_items_on_the_same_rows(scored, one_rank):
    data, found = str(scored["root"] / "data"), []
    for name in ("rates", "gbdt", "finetune"):
        keep = {}
        if name == "finetune":
            evaluate_checkpoint(scored["root"] / name, data, "valid", one_rank, keep=keep)
        else:
            evaluate_baseline(name, data, "valid", keep=keep)
        # Label, user, day, item. What follows is the length of the history, which rates do not read.
        rows = {task: sorted(zip(*made.arrays()[1:5])) for task, made in keep.items()}
        counted = {task: values["rows_item_count@2"] for task, values in frequent_item_metrics(keep, data, 2).items()}
        found.append((rows, counted))
    rows, counted = found[0]
    assert all(other == found[0] for other in found)
    assert 0 < counted["click"] < len(rows["click"])


def test_scores_that_are_not_there(scored, one_rank, tmp_path):
    with pytest.raises(ValueError, match="ranks items and scores no candidates: leave out --scores_out"):
        evaluate_checkpoint(scored["root"] / "pretrain", None, "valid", one_rank, keep={})
    with pytest.raises(ValueError, match="ranks items, which have no sample weights"):
        evaluate_checkpoint(scored["root"] / "pretrain", None, "valid", one_rank, is_weighted=True)
    (tmp_path / "no").write_text("scores")
    for path in (tmp_path / "no", tmp_path / "missing"):
        with pytest.raises(ValueError, match="holds no scores"):
            read_scores(path)


def _labels(data_dir, split: str):
    table = pq.read_table(data_dir / f"{split}/part-00000.parquet")
    names = {"click": "label.click", "buy": "label.buy"}
    return {task: [value for row in table[name].to_pylist() for value in row] for task, name in names.items()}


@pytest.mark.equivalence
def test_next_item_ranking_equals_a_loop_over_all_items(scored, one_rank):
    root = scored["root"]
    run = tiny_run("pretrain", root / "data", root / "pretrain", tables={"sharding": PLAN}, train={"max_steps": 4})
    trainer = Trainer(run, one_rank)
    trainer.load_weights()
    model, tables = trainer.model.eval(), trainer.components.tables
    item_VE = F.normalize(trainer.components.weights()["table"]["item"].local_shards()[0].tensor.double(), dim=-1)
    ranks = []
    loader = evaluation_loader(run, read_manifest(run.data_dir), trainer.components.lookup_names, "valid", one_rank)
    for (batch,) in loader:
        with torch.no_grad():
            hidden_TE = model(tables(batch.lookup), batch).hidden_TE.double()
        offsets = batch.packing.history_offsets.tolist()
        for candidate, request in enumerate(batch.packing.request_C.tolist()):
            if batch.labels["click"][candidate] != 1:
                continue
            start, stop = offsets[request], offsets[request + 1]
            target, seen = int(batch.candidate_item_C[candidate]), set(batch.history_item_T[start:stop].tolist())
            rivals = [i for i in range(NUM_RESERVED_ROWS, NUM_ITEMS) if i != target and i not in seen]
            if target < NUM_RESERVED_ROWS or start == stop:
                ranks.append(1 + len(rivals))
                continue
            query_E = F.normalize(hidden_TE[stop - 1], dim=-1)
            score = float((query_E @ item_VE[target]).float())
            ranks.append(1 + sum(float((query_E @ item_VE[i]).float()) >= score for i in rivals))
    metrics = scored[1][0][0]["valid"]["next_item"]
    assert metrics["rows"] == len(ranks)
    assert metrics["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]), abs=1e-6)
    assert metrics["hr@10"] == pytest.approx(np.mean([rank <= 10 for rank in ranks]), abs=1e-6)
    gains = [1 / np.log2(rank + 1) if rank <= 10 else 0 for rank in ranks]
    assert metrics["ndcg@10"] == pytest.approx(np.mean(gains), abs=1e-6)


def test_a_rank_cut_changes_the_mrr_alone(scored, one_rank):
    """59 known items; ranks beyond 10 count as 11, so the cut MRR is that of the ranks clamped."""
    root = scored["root"]
    exact = evaluate_checkpoint(root / "pretrain", None, "valid", one_rank, which="last")["next_item"]
    cut = evaluate_checkpoint(root / "pretrain", None, "valid", one_rank, which="last", rank_cut=10)["next_item"]
    assert cut["mrr"] > exact["mrr"] and cut["rows"] == exact["rows"]
    within_10 = exact["hr@10"] * exact["rows"]
    assert cut["mrr"] * cut["rows"] >= (exact["rows"] - within_10) / 11
    assert {n: v for n, v in cut.items() if n in ("hr@1", "hr@10", "ndcg@10")} == {
        n: v for n, v in exact.items() if n in ("hr@1", "hr@10", "ndcg@10")
    }
    with pytest.raises(ValueError, match=r"--rank_cut belongs to next-item ranking; .* scores \['click', 'buy'\]"):
        evaluate_checkpoint(root / "finetune", None, "valid", one_rank, which="last", rank_cut=10)


def test_a_run_with_a_cuda_only_table_optimizer_is_scored_on_a_cpu(scored, one_rank, tmp_path):
    shutil.copytree(scored["root"] / "finetune", tmp_path / "run")
    edit_state(manager.find(tmp_path / "run", "last"), lambda state: state["run_config"]["sparse"].update(name="adam"))
    metrics = evaluate_checkpoint(tmp_path / "run", None, "valid", one_rank, which="last")
    assert metrics["click"]["rows"] == scored[1][0][1]["valid"]["click"]["rows"]


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("model", {"width": 2**21}),
        ("model", {"layers": 10**9}),
        ("model", {"context_dim": 2**40}),
        ("tables", {"embedding_dim": 2**40}),
    ],
)
def test_options_that_claim_a_larger_model_than_there_is_take_no_memory(scored, one_rank, tmp_path, part, options):
    shutil.copytree(scored["root"] / "finetune", tmp_path / "run")
    checkpoint = manager.find(tmp_path / "run", "last")
    edit_state(checkpoint, lambda state: state["run_config"][part].update(options))
    with pytest.raises(ValueError, match="does not fit this model") as error:
        evaluate_checkpoint(tmp_path / "run", None, "valid", one_rank, which="last")
    assert str(checkpoint) in str(error.value)
