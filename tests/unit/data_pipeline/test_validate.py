# ruff: noqa: E501  (one table row per case)
import dataclasses
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import validate
from gpsd_dist import schema


def set_value(column, row, value):
    """A corruption: one row of one column gets another value (unchecked against the contract)."""

    def corrupt(path):
        table = pq.read_table(path)
        values = table[column].to_pylist()
        values[row] = value(values[row]) if callable(value) else value
        place = table.column_names.index(column)
        pq.write_table(table.set_column(place, column, pa.array(values, table.schema.field(column).type)), path)

    return corrupt


CORRUPTIONS = [
    ("train", set_value("history.item", 1, lambda v: [0] + v[1:]), "column 'history.item', row 1: found 0, expected no padding"),
    ("train", set_value("candidate.item", 0, lambda v: [999] + v[1:]), "column 'candidate.item', row 0: found 999, expected an index"),
    ("train", set_value("candidate.item", 2, lambda v: [-3] + v[1:]), "row 2: found -3, expected an index 1 ... "),
    ("train", set_value("candidate.item", 2, lambda v: v[:1] * 2), "no negative that equals the row's positive"),
    ("train", set_value("history.category", 1, lambda v: v[1:]), "column 'history.category', row 1: found 1, expected as many"),
    ("train", set_value("label.click", 1, [2.0, 0.0]), "column 'label.click', row 1: found 2.0, expected 0, 1 or null"),
    ("train", set_value("label.click", 1, [1.0]), "column 'label.click', row 1: found 1, expected as many elements as candidates"),
    ("train", set_value("history_length", 0, 51), "column 'history_length', row 0: found 51, expected 0 ... 50"),
    ("train", set_value("history.time_s", 1, [20, 10]), "column 'history.time_s', row 1: found 10, expected times that do not fall"),
    ("train", set_value("history.time_s", 1, [20, 4000]), "column 'history.time_s', row 1: found 4000, expected times not later"),
    ("train", set_value("history.item", 0, None), "column 'history.item', row 0: found nothing"),
    ("train", set_value("request_time_s", 0, 62), "train.time_to_s"),
    ("pretrain", set_value("history_length", 0, 1), "found 1, expected at least 2 events"),
    ("train", lambda path: pq.write_table(pq.read_table(path).slice(1), path), "the files hold num_rows = 2, the manifest says 3"),
    ("train", lambda path: pq.write_table(pq.read_table(path).drop(["label.click"]), path), "missing columns ['label.click']"),
    ("train", lambda path: path.unlink(), "does not exist"),
    ("train", lambda path: path.write_bytes(path.read_bytes()[:-30]), "is not a readable Parquet file"),
]  # fmt: skip


@pytest.mark.parametrize(("split", "corrupt", "message"), CORRUPTIONS)
def test_each_planted_corruption_is_found(grocery, tmp_path, split, corrupt, message):
    out = tmp_path / "out"
    shutil.copytree(grocery, out)
    validate.check(out)
    corrupt(out / split / "part-00000.parquet")
    with pytest.raises(ValueError, match="breaks the data contract") as caught:
        validate.check(out)
    if message.endswith("time_to_s"):
        message = "holds"
        assert "time_to_s = 62" in str(caught.value)
        return
    assert message in str(caught.value)


def test_wrong_type_vocabulary_and_items_are_found(grocery, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(grocery, out)
    path = out / "test" / "part-00000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("history_length")
    pq.write_table(table.set_column(place, "history_length", table["history_length"].cast(pa.int64())), path)
    vocab = out / "vocab" / "category.parquet"
    words = pq.read_table(vocab).to_pylist()
    words[0]["raw_id"] = "other"
    pq.write_table(pa.Table.from_pylist(words, pq.read_schema(vocab)), vocab)
    pq.write_table(pq.read_table(out / "items.parquet").slice(1), out / "items.parquet")
    assert validate.main([str(out)]) == 1
    error = capsys.readouterr().err
    assert "column 'history_length': found int64, expected int32" in error
    assert "category.parquet" in error and "fingerprint" in error
    assert "items.parquet, column 'index'" in error


def test_splits_that_overlap_are_found(grocery, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(grocery, out)
    manifest = schema.read_manifest(out)
    train, test = manifest.split("train"), manifest.split("test")
    swapped = (
        manifest.split("pretrain"),
        dataclasses.replace(test, name="train"),
        manifest.split("valid"),
        dataclasses.replace(train, name="test"),
    )
    schema.write_manifest(dataclasses.replace(manifest, splits=swapped), out)
    with pytest.raises(ValueError, match=r"split 'valid' starts at 61, before split 'train' ends at 95"):
        validate.check(out)
    twice = (*manifest.splits[:3], dataclasses.replace(manifest.split("valid"), name="test"))
    schema.write_manifest(dataclasses.replace(manifest, splits=twice), out)
    with pytest.raises(ValueError, match="1 users lie in 'valid' and in 'test'"):
        validate.check(out)


def test_a_history_event_in_the_second_of_the_request_is_a_leak_where_splits_are_cut_by_time(kuairand, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(kuairand, out)
    path = out / "valid" / "part-00000.parquet"
    time_s = pq.read_table(path)["request_time_s"][0].as_py()
    set_value("history.time_s", 0, [None, None, None, time_s])(path)
    with pytest.raises(ValueError, match=f"found {time_s}, expected times earlier than request_time_s"):
        validate.check(out)
    set_value("context.user_click_log_odds", 0, float("nan"))(path)
    with pytest.raises(ValueError, match="expected a finite number"):
        validate.check(out)
