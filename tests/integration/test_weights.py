"""Sample weights and sampled negatives, from Parquet to weights and metrics of a run.

Parquet columns are added to tiny data; the model has no dropout, so that equal rows give equal gradients.
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpsd_dist import schema, trained_run
from gpsd_dist.config import OptimizerConfig
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import (
    cpu_runtime,
    differing,
    read_checkpoint,
    rounding,
    step_folder,
    tiny_run,
    train_losses,
    train_runs,
    write_tiny_data,
)

STEPS = 4
SPLITS = ("train", "valid", "test")
pytestmark = [pytest.mark.equivalence, pytest.mark.timeout(300)]


def rewrite(data_dir: pathlib.Path, change, sampling: tuple[str, ...]) -> pathlib.Path:
    """Writes tiny data whose tables of candidates went through `change`, with those columns of `sampling`."""
    manifest = write_tiny_data(data_dir)
    splits = []
    for split in manifest.splits:
        if split.name in SPLITS:
            path = data_dir / split.files[0]
            table = change(pq.read_table(path))
            pq.write_table(table, path, row_group_size=7)
            counts = np.diff(table["candidate.item"].combine_chunks().offsets.to_numpy())
            split = dataclasses.replace(split, num_candidates=int(counts.sum()))
        splits.append(split)
    schema.write_manifest(dataclasses.replace(manifest, splits=tuple(splits), sampling=sampling), data_dir)
    return data_dir


def constant(value: float, name: str = "weight"):
    """Gives every candidate that weight or rate."""

    def change(table: pa.Table) -> pa.Table:
        lists = [[value] * len(row) for row in table["candidate.item"].to_pylist()]
        return table.append_column(f"sampling.{name}", pa.array(lists, pa.list_(pa.float32())))

    return change


def drawn_weights(table: pa.Table) -> pa.Table:
    """Gives every other candidate a weight of 2, and some one of 0."""
    lists, number = [], 0
    for row in table["candidate.item"].to_pylist():
        lists.append([float((2, 1, 0, 1)[(number + place) % 4]) for place in range(len(row))])
        number += len(row)
    return table.append_column("sampling.weight", pa.array(lists, pa.list_(pa.float32())))


def repeated(table: pa.Table) -> pa.Table:
    """Writes every candidate as often as its drawn weight says, instead of the weight."""
    table = drawn_weights(table)
    times = table["sampling.weight"].to_pylist()
    columns = {}
    for name in table.column_names[:-1]:
        values = table[name]
        if name.startswith(("candidate.", "label.")):
            rows = [np.repeat(np.arange(len(w)), np.asarray(w, int)) for w in times]
            values = pa.array([[v[i] for i in r] for v, r in zip(values.to_pylist(), rows)], values.type)
        columns[name] = values
    return pa.table(columns)


def run_of(data_dir, output_dir, **changes):
    return tiny_run(
        "finetune",
        data_dir,
        output_dir,
        dense=OptimizerConfig("adamw", 1e-2, weight_decay=0.1, eps=1e-4),
        model={"dropout": 0.0},
        train={"max_steps": STEPS, "save_interval_steps": 1, "keep_last": 100},
        **changes,
    )


def weights_of(run, step: int = STEPS):
    return read_checkpoint(step_folder(run.output_dir, step))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The runs of this file: name -> run. Two have two ranks."""
    root = tmp_path_factory.mktemp("weights")
    data = {
        "plain": rewrite(root / "d_plain", lambda table: table, ()),
        "ones": rewrite(root / "d_ones", constant(1.0), ("weight",)),
        "halves": rewrite(root / "d_halves", constant(0.25), ("weight",)),
        "drawn": rewrite(root / "d_drawn", drawn_weights, ("weight",)),
        "repeated": rewrite(root / "d_repeated", repeated, ()),
        "rate of 1": rewrite(root / "d_rate", constant(1.0, "negative_rate"), ("negative_rate",)),
    }
    runs = {name: run_of(folder, root / name.replace(" ", "_")) for name, folder in data.items()}
    run_distributed(train_runs, 1, root, list(runs.values()), timeout_s=150)
    runs["drawn, 2 ranks"] = run_of(data["drawn"], root / "drawn_2")
    run_distributed(train_runs, 2, root, [runs["drawn, 2 ranks"]], timeout_s=150)
    return runs


@pytest.mark.parametrize("name", ["ones", "rate of 1"])
def test_weights_of_one_change_no_bit(trained, name):
    assert differing(weights_of(trained["plain"]), weights_of(trained[name])) == {}
    assert train_losses(trained["plain"].output_dir) == train_losses(trained[name].output_dir)


def test_equal_weights_cancel_however_small(trained):
    """Sums and counts are weighted: a count below 1 is a count."""
    assert differing(weights_of(trained["plain"]), weights_of(trained["halves"]), rtol=rounding(STEPS)) == {}


def test_a_weight_of_two_is_the_row_twice_and_one_of_zero_no_row(trained):
    drawn, repeated = trained["drawn"], trained["repeated"]
    assert differing(weights_of(drawn), weights_of(repeated), rtol=rounding(STEPS)) == {}
    assert list(train_losses(drawn.output_dir).values()) == pytest.approx(
        list(train_losses(repeated.output_dir).values()), rel=rounding(STEPS)
    )
    assert differing(weights_of(drawn), weights_of(trained["plain"]), rtol=rounding(STEPS))


def test_ranks_share_weighted_counts(trained):
    assert differing(weights_of(trained["drawn"]), weights_of(trained["drawn, 2 ranks"]), rtol=rounding(STEPS)) == {}


def _scored(rank: int, world_size: int, checkpoint: str, cases: list[tuple[str, bool]]) -> list:
    """For `run_distributed`: the metrics of a checkpoint on test for each (data, is_weighted), or what was wrong."""
    runtime, found = cpu_runtime(rank, world_size), []
    for data_dir, is_weighted in cases:
        try:
            options = (checkpoint, data_dir, "test", runtime, "last")
            found.append(trained_run.evaluate_checkpoint(*options, is_weighted=is_weighted))
        except ValueError as error:
            found.append(str(error))
    return found


def test_metrics_are_weighted_on_request(trained, tmp_path):
    run, data = trained["drawn"], {name: run.data_dir for name, run in trained.items()}
    cases = [(data["plain"], False), (data["drawn"], False), (data["ones"], True), (data["drawn"], True)]
    cases += [(data["repeated"], False), (data["plain"], True)]
    [found] = run_distributed(_scored, 1, tmp_path, run.output_dir, cases, timeout_s=150)
    plain, unweighted, ones, weighted, repeated, refused = found
    assert plain == unweighted == ones != weighted
    assert "has no weights" in refused
    [(on_two_ranks,), _] = run_distributed(_scored, 2, tmp_path, run.output_dir, cases[3:4], timeout_s=150)
    for task, values in weighted.items():
        for key in ("auc", "gauc", "gauc_user_day", "log_loss", "ne", "calibration", "label_rate"):
            assert values[key] == pytest.approx(repeated[task][key], rel=1e-6, nan_ok=True), (task, key)
            assert values[key] == pytest.approx(on_two_ranks[task][key], rel=1e-6, nan_ok=True), (task, key)
