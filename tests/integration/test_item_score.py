"""A learnt bias, recent counts and corrected negatives: trained, resumed, sharded, ranked, searched with one score."""

import dataclasses
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gpsd_dist.checkpoint import manager
from gpsd_dist.config import OptimizerConfig
from gpsd_dist.export.raw_requests import RawRequests
from gpsd_dist.index.__main__ import main
from gpsd_dist.preflight import check_options_against_data
from gpsd_dist.schema import read_manifest
from gpsd_dist.serving.retriever import load
from gpsd_dist.trained_run import evaluate_checkpoint
from tests.helpers.distributed import run_distributed
from tests.integration.serving.test_index import bags_of_the_pipeline, hit_rates
from tests.integration.tiny_data import (
    cpu_runtime,
    differing,
    fixed_negatives,
    read_checkpoint,
    rounding,
    step_folder,
    tiny_run,
    train_runs,
    write_tiny_data,
)

# The fixture starts ranks.
pytestmark = [pytest.mark.equivalence, pytest.mark.timeout(420)]

NUM_ITEMS, STEPS, DAYS = 400, 8, (0.2, 30_000.0)
SCORE = {"item_bias": True, "recent_days": DAYS, "temperature": 1.0}  # so that offsets weigh as much as cosines
DRAWS = {"log_q": True, "popular_share": 0.5}
KINDS = {"group": {}, "position": {"negatives_per": "position", "num_negatives": 9}}


def _run(data_dir, output_dir, per, steps=STEPS, **pretrain):
    return tiny_run(
        "pretrain",
        data_dir,
        output_dir,
        pretrain=SCORE | KINDS[per] | pretrain,
        dense=OptimizerConfig("adamw", 5e-2, weight_decay=0.1, eps=1e-4),
        train={"max_steps": steps, "keep_last": 9, "save_interval_steps": 2},
    )


def _train_with_fixed_negatives(rank: int, world_size: int, runs):
    with fixed_negatives():
        return train_runs(rank, world_size, runs)


@pytest.fixture(scope="module")
def root(tmp_path_factory, one_rank):
    """Data, and for both ways to share negatives a run, the same in two parts, and one with other numbers of ranks."""
    root = tmp_path_factory.mktemp("score")
    with bags_of_the_pipeline():
        write_tiny_data(root / "data", num_items=NUM_ITEMS)
    whole = [_run(root / "data", root / per, per, **DRAWS) for per in KINDS]
    train_runs(0, 1, [*whole, *(_run(root / "data", root / f"parts_{per}", per, STEPS // 2, **DRAWS) for per in KINDS)])
    train_runs(0, 1, [_run(root / "data", root / f"parts_{per}", per, **DRAWS) for per in KINDS])
    ranks = {n: [_run(root / "data", root / f"{n}_{per}", per, num_negative_groups=1) for per in KINDS] for n in (1, 2)}
    _train_with_fixed_negatives(0, 1, ranks[1])
    run_distributed(_train_with_fixed_negatives, 2, root, ranks[2], timeout_s=300)
    return root


@pytest.mark.parametrize("per", KINDS)
def test_resume_matches_the_uninterrupted_run(root, per):
    whole, parts = (read_checkpoint(step_folder(root / name, STEPS)) for name in (per, f"parts_{per}"))
    assert not differing(whole, parts)
    assert whole["dense.item_score.bias_V"].abs().max() > 0.01 and (whole["dense.item_score.weight_WF"] != 0).all()


@pytest.mark.parametrize("per", KINDS)
def test_two_ranks_train_as_one(root, per):
    one, two = (read_checkpoint(step_folder(root / f"{n}_{per}", STEPS)) for n in (1, 2))
    assert not differing(one, two, rtol=rounding(STEPS))


def test_two_ranks_rank_as_one(root, one_rank):
    [other, _] = run_distributed(_evaluate, 2, root, root / "group", timeout_s=120)
    expected = evaluate_checkpoint(root / "group", None, "valid", one_rank)["next_item"]
    assert other["next_item"] == pytest.approx(expected, rel=1e-12)  # sums of 1 / rank, in another order


def _evaluate(rank: int, world_size: int, folder):
    return evaluate_checkpoint(folder, None, "valid", cpu_runtime(rank, world_size))


def _reference(root, weights, query_BE) -> list[int]:
    """Ranks every positive of `valid`, item by item: cosine + bias + weight x log(1 + count) of what came before."""
    seen, ranks = set(), []
    for split in ("pretrain", "train", "valid", "test"):
        for row in pq.read_table(root / "data" / split).to_pylist():
            seen |= {(row["user_hash"], *pair) for pair in zip(row["history.item"], row["history.time_s"], strict=True)}
            for item, label in zip(row.get("candidate.item", ()), row.get("label.click", ()), strict=True):
                seen |= {(row["user_hash"], item, row["request_time_s"])} if label == 1 else set()
    item_VE = torch.nn.functional.normalize(weights["table.item"].double())
    bias, weight_WF = weights["dense.item_score.bias_V"].tolist(), weights["dense.item_score.weight_WF"].double()
    for row, query_E in zip(pq.read_table(root / "data/valid").to_pylist(), query_BE, strict=True):
        now, scores = row["request_time_s"], {}
        last = [None, *row["history.time_s"]][-1]
        gap = 0 if last is None else math.log1p(now - last) / 20
        weight = (weight_WF @ torch.tensor([*query_E.tolist(), gap, 1.0]).double()).tolist()
        counts = np.zeros((2, NUM_ITEMS))
        for _, item, time in seen:
            for window, days in enumerate(DAYS):
                counts[window, item] += time is not None and now - round(days * 86_400) <= time < now
        cosines = (item_VE @ torch.from_numpy(query_E).double()).tolist()
        for item in range(2, NUM_ITEMS):
            added = bias[item] + sum(w * math.log1p(c[item]) for w, c in zip(weight, counts, strict=True))
            scores[item] = round(cosines[item] + added, 5)
        visible = set(row["history.item"][-10:])
        for target, label in zip(row["candidate.item"], row["label.click"], strict=True):
            if label == 1:
                rivals = [s for item, s in scores.items() if item not in visible - {target} and item != target]
                is_last = target < 2 or not row["history.item"]
                ranks.append(len(rivals) + 1 if is_last else 1 + sum(s >= scores[target] for s in rivals))
    return ranks


def test_evaluate_index_and_a_plain_reference_agree(root, tmp_path, one_rank):
    run, artefact = root / "group", str(tmp_path / "index")
    assert main(["build", "--checkpoint", str(run), "--data", str(root / "data"), "--out", artefact]) == 0
    expected = evaluate_checkpoint(run, None, "valid", one_rank)["next_item"]
    retriever = load(artefact)  # replays its examples, too
    manifest, rows = read_manifest(root / "data"), pq.read_table(root / "data/valid/part-00000.parquet")
    requests = RawRequests(root / "data", manifest)(rows)
    count, found = hit_rates(retriever, rows.to_pylist(), requests.to_pylist(), NUM_ITEMS)
    assert count == expected["rows"] > 10
    assert found == {cut: expected[f"hr@{cut}"] for cut in found} and len(set(found.values())) > 2

    tokens = retriever.reader(requests)
    weights = read_checkpoint(manager.find(run))
    ranks = _reference(root, weights, retriever.encode(tokens))
    assert expected["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]), rel=1e-9)
    plain = _reference(root, weights | {"dense.item_score.weight_WF": torch.zeros(2, 18)}, retriever.encode(tokens))
    assert sum(a != b for a, b in zip(ranks, plain, strict=True)) > len(ranks) / 2  # the counts did decide


def test_items_are_written_with_their_bias(root, tmp_path):
    artefact = str(tmp_path / "index")
    assert main(["build", "--checkpoint", str(root / "group"), "--data", str(root / "data"), "--out", artefact]) == 0
    assert main(["items", artefact, "--out", str(tmp_path / "items")]) == 0
    bias_V = read_checkpoint(manager.find(root / "group"))["dense.item_score.bias_V"]
    found = pq.read_table(tmp_path / "items")["bias"].to_numpy()
    np.testing.assert_allclose(found, bias_V[2:], rtol=1e-6)


def test_items_without_rows_of_their_own_have_no_score_of_their_own(root):
    run, manifest = _run(root / "data", root / "none", "group", **DRAWS), read_manifest(root / "data")
    hashed = dataclasses.replace(manifest, unbounded={"item": "hashed"})
    with pytest.raises(ValueError, match=r"PretrainConfig.log_q, item_bias, recent_days with hashed items"):
        check_options_against_data(run, hashed)
