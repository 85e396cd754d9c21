"""`predict` writes every candidate once, in the order of the split, with the scores that `evaluate` counts."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from gpsd_dist.metrics.classification import Predictions
from gpsd_dist.predict import split as predict
from gpsd_dist.trained_run import evaluate_checkpoint, load_trained
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import cpu_runtime, tiny_run, train_runs, write_tiny_data
from tests.integration.unbounded_data import write_unbounded_data

pytestmark = pytest.mark.timeout(420)
PLAN = {"item": "row_wise", "tag": "table_wise"}


def _predict(rank: int, world_size: int, run: str, data: str, split: str, out) -> dict:
    runtime = cpu_runtime(rank, world_size)
    return predict.predict_split(load_trained(run, data, split, runtime), split, out, runtime)


def _read(out) -> pa.Table:
    files = json.loads((out / predict.SUMMARY_NAME).read_text())["files"]
    return pa.concat_tables([pq.read_table(out / file) for file in files]).unify_dictionaries()


@pytest.fixture(scope="module")
def root(tmp_path_factory, one_rank):
    """A pretrained and a finetuned run, and predictions of `valid` by one rank and by two."""
    root = tmp_path_factory.mktemp("predict")
    write_tiny_data(root / "data", rows={"test": 1})
    runs = [
        tiny_run(stage, root / "data", root / stage, tables={"sharding": PLAN}, train={"max_steps": 4})
        for stage in ("pretrain", "finetune")
    ]
    train_runs(0, 1, runs)
    for split in ("valid", "test"):
        _predict(0, 1, str(root / "finetune"), str(root / "data"), split, root / f"{split}_1")
        options = (str(root / "finetune"), str(root / "data"), split, root / f"{split}_2")
        run_distributed(_predict, 2, root, *options, timeout_s=300)
    return root


@pytest.mark.equivalence
@pytest.mark.parametrize("split", ["valid", "test"])
def test_two_ranks_write_the_rows_of_one(root, split):
    one, two = _read(root / f"{split}_1"), _read(root / f"{split}_2")
    assert one.schema == two.schema and len(pq.read_table(root / f"{split}_2" / "part-00001.parquet")) < len(one)
    for name in one.column_names:
        left, right = one[name].to_pylist(), two[name].to_pylist()
        assert left == (pytest.approx(right, abs=1e-6) if "." in name and "label" not in name else right), name


def test_rows_are_the_candidates_of_the_split_with_raw_ids(root):
    found = _read(root / "valid_1")
    split = pq.read_table(root / "data" / "valid" / "part-00000.parquet")
    vocabulary = pq.read_table(root / "data" / "vocab" / "item.parquet").to_pydict()
    raw_id = dict(zip(vocabulary["index"], vocabulary["raw_id"], strict=True))
    expected = [
        (row["user_id"], number, row["request_time_s"], raw_id.get(item), item, *labels)
        for number, row in enumerate(split.to_pylist())
        for item, *labels in zip(row["candidate.item"], row["label.click"], row["label.buy"], strict=True)
    ]
    names = ("user_id", "request", "request_time_s", "item_id", "item_index", "click.label", "buy.label")
    assert list(zip(*(found[name].to_pylist() for name in names), strict=True)) == expected
    assert any(row[3] is None for row in expected) and any(row[6] is None for row in expected)


def test_metrics_of_the_file_are_those_of_evaluate(root, one_rank):
    found = _read(root / "valid_1")
    metrics = evaluate_checkpoint(root / "finetune", None, "valid", one_rank)
    for task, is_scored in (("click", None), ("buy", pc.fill_null(pc.equal(found["click.label"], 1), False))):
        rows = found if is_scored is None else found.filter(is_scored)
        rows = rows.filter(rows[f"{task}.label"].is_valid())
        again = Predictions()
        again.add(rows[f"{task}.logit"].to_numpy(), rows[f"{task}.label"].to_numpy(), np.zeros(len(rows), np.int64))
        for name in ("auc", "log_loss", "ne", "calibration", "rows", "label_rate"):
            assert again.metrics()[name] == metrics[task][name], (task, name)


def test_probabilities_and_products(root):
    found = _read(root / "valid_1")
    for task in ("click", "buy"):
        logit = found[f"{task}.logit"].to_numpy().astype(np.float64)
        np.testing.assert_allclose(found[f"{task}.probability"].to_numpy(), 1 / (1 + np.exp(-logit)), rtol=1e-6)
    product = found["click.probability"].to_numpy() * found["buy.probability"].to_numpy()
    np.testing.assert_allclose(found["buy.product"].to_numpy(), product, rtol=1e-6)
    assert "click.product" not in found.column_names
    [version] = set(found["checkpoint"].to_pylist())
    assert (
        version.startswith("step ")
        and version == json.loads((root / "valid_1/predictions.json").read_text())["version"]
    )


def test_a_split_without_labels_and_managed_ids(tmp_path, one_rank):
    data = tmp_path / "data"
    write_unbounded_data(data, {"item": ("managed", 40), "tag": ("hashed", 20)})
    train_runs(0, 1, [tiny_run("finetune", data, tmp_path / "run", train={"max_steps": 2})])
    path = data / "test" / "part-00000.parquet"
    rows = pq.read_table(path)
    for name in ("label.click", "label.buy"):
        nulls = pa.array([[None] * len(row) for row in rows[name].to_pylist()], rows.schema.field(name).type)
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), nulls)
    group_rows = pq.ParquetFile(path).metadata.row_group(0).num_rows
    pq.write_table(rows, path, row_group_size=group_rows)
    summary = _predict(0, 1, str(tmp_path / "run"), str(data), "test", tmp_path / "out")
    found = _read(tmp_path / "out")
    assert len(found) == summary["candidates"] == sum(len(row) for row in rows["candidate.item"].to_pylist())
    assert found["click.label"].null_count == len(found) and np.isfinite(found["click.logit"].to_numpy()).all()
    assert found["item_index"].to_pylist() == [item for row in rows["candidate.item"].to_pylist() for item in row]
    assert found["item_id"].null_count == len(found)  # a managed table has no vocabulary


def test_mistakes(root, one_rank, tmp_path):
    data, run = str(root / "data"), str(root / "finetune")
    with pytest.raises(ValueError, match="was pretrained: it ranks all items and scores no candidates"):
        _predict(0, 1, str(root / "pretrain"), data, "valid", tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not an empty folder; name another one, or delete it"):
        _predict(0, 1, run, data, "valid", root / "valid_1")
    with pytest.raises(ValueError, match="no split 'nope'"):
        _predict(0, 1, run, data, "nope", tmp_path / "out")
    assert not (tmp_path / "out").exists()
