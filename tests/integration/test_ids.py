"""Tables without a vocabulary in whole runs: hashed and managed ids, on 1 and 2 ranks, resumed, transferred, frozen."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from gpsd_dist import trained_run
from gpsd_dist.baselines.registry import evaluate_baseline
from gpsd_dist.checkpoint import manager
from gpsd_dist.config import OptimizerConfig
from gpsd_dist.config.ids import IdsConfig
from gpsd_dist.data.hashing import hashed_rows
from gpsd_dist.schema import write_manifest
from gpsd_dist.tables.admission_filter import NO_ID
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.integration.test_resume import _load_and_save
from tests.integration.tiny_data import (
    NUM_ITEMS,
    differing,
    fixed_negatives,
    read_checkpoint,
    rounding,
    step_folder,
    tiny_run,
    train_losses,
    train_runs,
)
from tests.integration.unbounded_data import id_of, write_unbounded_data

pytestmark = [pytest.mark.equivalence, pytest.mark.timeout(420)]  # the fixture starts ranks, with a limit of 150 s

STEPS, HALF = 8, 4  # an epoch has 6
TABLES = {  # 59 items and 35 tags occur: the managed tables are full from the first steps on
    "managed": {"item": ("managed", 32), "tag": ("managed", 14)},
    "hashed": {"item": ("hashed", NUM_ITEMS), "tag": ("hashed", 25)},
}
IDS = IdsConfig(admission_threshold=2, eviction="lfu")


def _run(stage: str, data_dir, output_dir, strategy="NT", source="", max_steps=STEPS, **changes):
    return tiny_run(
        stage,
        data_dir,
        output_dir,
        strategy,
        source,
        ids=IDS,
        pretrain={"num_negative_groups": 1},
        dense=OptimizerConfig("adamw", 1e-2, weight_decay=0.1, eps=1e-4),  # see test_sharding.py
        train={"max_steps": max_steps, "save_interval_steps": 1, "keep_last": 100},
        **changes,
    )


def _train_all(rank: int, world_size: int, root, data) -> None:
    """The runs that 1 and 2 ranks are compared in: pretraining of both kinds, finetuning that transfers or freezes."""
    for kind, data_dir in data.items():
        source = root / "one" / kind / "pretrain"  # the same for both, or nothing could be compared
        with fixed_negatives():
            train_runs(rank, world_size, [_run("pretrain", data_dir, root / _name(world_size) / kind / "pretrain")])
        runs = [
            _run("finetune", data_dir, root / _name(world_size) / kind / strategy, strategy, source)
            for strategy in ("ST", "ST_SF")
        ]
        train_runs(rank, world_size, runs)
    if world_size == 2:
        there = _run("finetune", data["managed"], root / "elsewhere", "ST", root / "one" / "managed" / "pretrain")
        _load_and_save(rank, world_size, there, step_folder(root / "one" / "managed" / "ST", STEPS), root / "resharded")


def _name(world_size: int) -> str:
    return {1: "one", 2: "two"}[world_size]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp(f"data_{kind}") for kind in TABLES}
    for kind, folder in folders.items():
        write_unbounded_data(folder, TABLES[kind])
    return folders


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data, one_rank):
    root = tmp_path_factory.mktemp("ids")
    _train_all(0, 1, root, data)
    run_distributed(_train_all, 2, root, root, data, timeout_s=150)
    return root


@pytest.mark.parametrize("run", ["pretrain", "ST", "ST_SF"])
@pytest.mark.parametrize("kind", TABLES)
def test_two_ranks_are_one_rank(trained, kind, run):
    for step in (1, STEPS):
        one, two = (read_checkpoint(step_folder(trained / ranks / kind / run, step)) for ranks in ("one", "two"))
        maps = {name for name in one if name.startswith("ids.")}
        assert bool(maps) == (kind == "managed")
        assert not differing({n: one[n] for n in maps}, {n: two[n] for n in maps}), "the maps differ"
        others = [{n: v for n, v in part.items() if n not in maps} for part in (one, two)]
        assert not differing(*others, rtol=rounding(step))
    losses = [train_losses(trained / ranks / kind / run) for ranks in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5 * STEPS)


def test_the_curves_show_how_full_a_table_is(trained):
    lines = (trained / "one" / "managed" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if "ids/item_rows_used" in entry]
    assert len(entries) == STEPS
    assert entries[-1]["ids/item_rows_used"] == entries[-1]["ids/tag_rows_used"] == 1.0
    assert sum(entry["ids/item_changed_rows"] for entry in entries) > TABLES["managed"]["item"][1]
    assert all(0 < entry["ids/item_unknown"] < 1 for entry in entries)


def test_managed_tables_were_full_and_evicted(trained):
    """Or the tests here would not show what they claim."""
    first, last = (read_checkpoint(step_folder(trained / "one" / "managed" / "pretrain", step)) for step in (3, STEPS))
    for table, (_, num_rows) in TABLES["managed"].items():
        ids = [set(part[f"ids.{table}.ids"].tolist()) - {NO_ID} for part in (first, last)]
        assert len(ids[1]) == num_rows - 2
        assert ids[0] - ids[1], f"nothing was evicted from {table}"


def test_a_map_is_bit_identical_after_resharding_to_two_ranks_and_back(trained, data, tmp_path, one_rank):
    before = read_checkpoint(step_folder(trained / "one" / "managed" / "ST", STEPS))
    assert not differing(before, read_checkpoint(trained / "resharded"))
    run = _run("finetune", data["managed"], tmp_path / "run", "ST", trained / "one" / "managed" / "pretrain")
    _load_and_save(0, 1, run, trained / "resharded", tmp_path / "back")
    assert not differing(before, read_checkpoint(tmp_path / "back"))


@pytest.mark.parametrize(("kind", "stage"), [("managed", "pretrain"), ("managed", "finetune"), ("hashed", "pretrain")])
def test_resume_is_uninterrupted(data, tmp_path, one_rank, kind, stage):
    changes = {"ids": IdsConfig(admission_threshold=2, eviction="distance_lfu")}

    def run(name, max_steps):
        made = _run(stage, data[kind], tmp_path / name, max_steps=max_steps)
        return dataclasses.replace(made, **changes)

    train_runs(0, 1, [run("whole", STEPS), run("parts", HALF), run("parts", STEPS)])
    whole, parts = (read_checkpoint(step_folder(tmp_path / name, STEPS)) for name in ("whole", "parts"))
    assert not differing(whole, parts)


def test_a_transferred_map_goes_with_its_table_and_a_frozen_one_never_changes(trained):
    source = read_checkpoint(manager.find(trained / "one" / "managed" / "pretrain"))
    for strategy in ("ST", "ST_SF"):
        first, last = (read_checkpoint(step_folder(trained / "one" / "managed" / strategy, s)) for s in (1, STEPS))
        maps = [name for name in source if name.startswith("ids.item.")]
        assert len(maps) == 7
        changed = [name for name in maps if not torch.equal(source[name], last[name])]
        assert bool(changed) == (strategy == "ST")
        assert torch.equal(source["table.item"], last["table.item"]) == (strategy == "ST_SF")
        assert int(first["ids.item.updates"]) == int(source["ids.item.updates"]) + (strategy == "ST")
        assert int(first["ids.tag.updates"]) == 1, "a table that is not transferred begins with an empty map"


@pytest.mark.parametrize("kind", TABLES)
def test_a_checkpoint_scores_as_in_training_and_reading_changes_no_map(trained, data, one_rank, kind):
    for run in ("pretrain", "ST", "ST_SF"):
        checkpoint = step_folder(trained / "one" / kind / run, STEPS)
        saved = manager.read_state(checkpoint).metrics
        scored = trained_run.evaluate_checkpoint(checkpoint, None, "valid", one_rank)
        flat = {f"{task}/{key}": value for task, values in scored.items() for key, value in values.items()}
        assert saved and flat == pytest.approx(saved, nan_ok=True)


def test_hashed_ids_train_as_a_vocabulary_of_their_rows(tmp_path, one_rank):
    tag = {"tag": TABLES["hashed"]["tag"]}
    manifest = write_unbounded_data(tmp_path / "ids", tag)
    write_unbounded_data(tmp_path / "rows", tag, lambda i: int(hashed_rows(np.array([id_of(i)]), tag["tag"][1])[0]))
    write_manifest(dataclasses.replace(manifest, unbounded={}), tmp_path / "rows")
    train_runs(0, 1, [_run("finetune", tmp_path / name, tmp_path / f"run_{name}") for name in ("ids", "rows")])
    assert not differing(*(read_checkpoint(step_folder(tmp_path / f"run_{name}", STEPS)) for name in ("ids", "rows")))


def test_baselines_see_the_rows_of_hashed_ids(tmp_path):
    item = {"item": TABLES["hashed"]["item"]}
    manifest = write_unbounded_data(tmp_path / "ids", item)
    write_unbounded_data(tmp_path / "rows", item, lambda i: int(hashed_rows(np.array([id_of(i)]), item["item"][1])[0]))
    write_manifest(dataclasses.replace(manifest, unbounded={}), tmp_path / "rows")
    for name in ("popularity", "rates", "gbdt", "next_item_popularity"):
        ids, rows = (evaluate_baseline(name, tmp_path / folder, "test") for folder in ("ids", "rows"))
        for task in rows:
            assert ids[task] == pytest.approx(rows[task], nan_ok=True)


def test_rows_of_new_owners_start_afresh_and_others_keep_their_bytes(data, tmp_path, one_rank):
    run = _run("finetune", data["managed"], tmp_path / "run", max_steps=2)
    trainer = Trainer(run, one_rank)
    trainer.train()
    tables = trainer.components.tables
    weight = tables.weights()["item"].local_shards()[0].tensor
    (state,) = [value.local_shards()[0].tensor for value in tables.optimizer_state()["item"].values()]
    used = state.reshape(len(weight), -1).abs().sum(1).nonzero().squeeze(1)
    assert len(used) > 4
    before, state_before = weight.clone(), state.clone()
    trainer.components.ids._resets["item"](used[:2], 17)
    assert not torch.isclose(weight[used[:2]], before[used[:2]]).any()
    assert state[used[:2]].abs().sum() == 0
    kept = torch.ones(len(weight)).bool()
    kept[used[:2]] = False
    assert torch.equal(weight[kept], before[kept]) and torch.equal(state[kept], state_before[kept])
    assert weight[used[:2]].std() == pytest.approx(run.tables.init_std, rel=0.6)  # of 32 numbers


def test_every_row_that_changes_hands_is_reset_in_that_step(data, tmp_path, one_rank):
    trainer = Trainer(_run("finetune", data["managed"], tmp_path, max_steps=4), one_rank)
    resets, calls = trainer.components.ids._resets, []
    reset = resets["item"]
    resets["item"] = lambda rows, turn: (calls.append((turn, sorted(rows.tolist()))), reset(rows, turn))
    trainer.train()
    owners: dict[int, int] = {}
    expected = []
    for step in range(1, 5):
        saved = read_checkpoint(step_folder(tmp_path, step))
        pairs = zip(saved["ids.item.rows"].tolist(), saved["ids.item.ids"].tolist(), strict=True)
        now = {row: id_ for row, id_ in pairs if id_ != NO_ID}
        expected.append((step, sorted(row for row, id_ in now.items() if owners.get(row) != id_)))
        owners = now
    assert calls == expected and len(expected[-1][1]) > 0


def test_a_run_chooses_kind_and_size(data, tmp_path, one_rank):
    ids = IdsConfig(kinds={"tag": "hashed"}, rows={"tag": 29, "item": 50})
    trainer = Trainer(dataclasses.replace(_run("finetune", data["managed"], tmp_path), ids=ids), one_rank)
    assert trainer.manifest.table("tag").num_rows == 29 and trainer.manifest.unbounded["tag"] == "hashed"
    assert {name: value.size()[0] for name, value in trainer.components.tables.weights().items()} == {
        "item": 50,
        "tag": 29,
    }
    assert set(trainer.components.ids.state()) == {"item"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ids": IdsConfig(rows={"category": 50})},
            "IdsConfig names tables \\['category'\\], but those with 64-bit ids",
        ),
        ({"execution": {"pipeline": "sparse_dist"}}, "looks rows up ahead of their step"),
        ({"tables": {"sharding": {"item": "column_wise"}}}, "'item' has managed ids and is column_wise"),
    ],
)
def test_what_cannot_be_followed_is_refused(data, tmp_path, one_rank, changes, message):
    run = _run("finetune", data["managed"], tmp_path, **{n: v for n, v in changes.items() if n != "ids"})
    run = dataclasses.replace(run, ids=changes.get("ids", IDS))
    with pytest.raises(ValueError, match=message):
        Trainer(run, one_rank)


def test_a_table_of_another_kind_or_size_is_not_transferred(trained, data, tmp_path, one_rank):
    run = _run("finetune", data["managed"], tmp_path, "ST", trained / "one" / "managed" / "pretrain")
    run = dataclasses.replace(run, ids=dataclasses.replace(IDS, rows={"item": 40}))
    trainer = Trainer(run, one_rank)
    with pytest.raises(ValueError, match="table 'item' has another vocabulary \\(32 rows there, 40 here\\)"):
        trainer.load_weights()


def test_another_eviction_policy_cannot_read_the_map(trained, data, tmp_path, one_rank):
    run = _run("finetune", data["managed"], tmp_path, "ST", trained / "one" / "managed" / "pretrain")
    trainer = Trainer(dataclasses.replace(run, ids=dataclasses.replace(IDS, eviction="lru")), one_rank)
    with pytest.raises(ValueError, match=r"ids\.item\.last_seen is not in it"):
        trainer.load_weights()
