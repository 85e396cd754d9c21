# ruff: noqa: E501  (one table row per case)
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import build
from gpsd_dist import schema
from gpsd_dist.data import data_versions
from tests.assets.cases import logs
from tests.helpers.parquet_rows import rows_sha256
from tests.unit.data_pipeline.conftest import manifest_of, rows_of, run


def build_grocery(raw, out, *options) -> int:
    return run("--source", "amazon_grocery", "--raw_dir", raw, "--out_dir", out, "--valid_fraction", 0.25, *options)


def test_files_have_exactly_the_types_of_the_contract(grocery, kuairand):
    for out in (grocery, kuairand):
        manifest = schema.read_manifest(out)
        for split in manifest.splits:
            for file in split.files:
                assert pq.read_schema(out / file).remove_metadata() == schema.arrow_schema(manifest, split.name)


def test_rerun_is_a_noop_until_a_source_or_an_option_changes(grocery_raw, tmp_path, capsys):
    out = tmp_path / "out"
    assert build_grocery(grocery_raw, out) == 0
    before = (out / "current.json").stat().st_mtime_ns
    assert build_grocery(grocery_raw, out) == 0
    assert "is up to date" in capsys.readouterr().out
    assert (out / "current.json").stat().st_mtime_ns == before
    assert build_grocery(grocery_raw, out, "--max_history_length", 3) == 0
    assert manifest_of(out).max_history_length == 3
    path = grocery_raw / "interactions.csv"
    path.write_text(path.read_text().replace("a,1,k1,10\n", "a,3,k1,9\na,1,k1,10\n"))
    assert build_grocery(grocery_raw, out, "--max_history_length", 3) == 0
    assert next(row for row in rows_of(out, "train") if row["user_id"] == "a")["history_length"] == 3
    (data_versions.current(out) / "train" / "part-00000.parquet").unlink()
    assert build_grocery(grocery_raw, out, "--max_history_length", 3) == 0
    assert (data_versions.current(out) / "train" / "part-00000.parquet").is_file()


def test_rows_do_not_depend_on_threads_or_on_how_files_are_cut(grocery_raw, tmp_path):
    assert build_grocery(grocery_raw, tmp_path / "a", "--threads", 1) == 0
    assert build_grocery(grocery_raw, tmp_path / "b", "--threads", 2, "--row_group_rows", 1, "--file_rows", 2) == 0
    files = manifest_of(tmp_path / "b").split("train").files
    assert len(files) == 2
    a, b = (data_versions.current(tmp_path / name) for name in "ab")
    one = pq.read_table(a / "train" / "part-00000.parquet")
    assert pa.concat_tables([pq.read_table(b / file) for file in files]).equals(one)


def test_rows_do_not_depend_on_the_number_of_buckets(kuairand_raw, kuairand, tmp_path):
    common = ("--source", "kuairand_pure", "--raw_dir", kuairand_raw, "--out_dir", tmp_path / "out")
    assert run(*common, "--num_buckets", 3) == 0
    files = [path.relative_to(kuairand) for path in sorted(kuairand.rglob("*.parquet"))]
    assert len(files) > 20
    for file in files:
        assert rows_sha256(data_versions.current(tmp_path / "out") / file) == rows_sha256(kuairand / file), file


def test_manifest_names_sources_command_and_rule(grocery):
    manifest = schema.read_manifest(grocery)
    assert manifest.command.startswith("python -m data_pipeline.build --source amazon_grocery --raw_dir ")
    assert [len(entry["sha256"]) for entry in manifest.sources] == [64, 64]
    assert "target = last event" in manifest.split_rule
    assert manifest.split("test").time_from_s == 90
    assert manifest.split("test").time_to_s == 95


def test_a_failed_build_leaves_the_old_data_set_and_no_debris(grocery_raw, tmp_path):
    out = tmp_path / "out"
    assert build_grocery(grocery_raw, out) == 0
    path = grocery_raw / "interactions.csv"
    path.write_text(path.read_text().replace("k1,10", "k1,noon", 1))
    assert build_grocery(grocery_raw, out) == 2
    assert manifest_of(out).split("train").num_rows == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "raw"]


def test_a_folder_that_is_no_data_set_is_not_overwritten(grocery_raw, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    assert build_grocery(grocery_raw, tmp_path / "thesis") == 2
    assert "exists and is not a data set" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "chapter.txt").is_file()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("interactions.csv", lambda text: text.replace("timestamp", "when"), "has no column 'timestamp'"),
        ("interactions.csv", lambda text: text.replace("c,5,k1,50", "c,5,k1,soon"), "data row 8: found 'soon', expected int64"),
        ("interactions.csv", lambda text: text.replace("c,5,k1,50", "c,,k1,50"), "column 'item', data row 8: found nothing"),
        ("interactions.csv", lambda text: text.splitlines()[0] + "\n", "has no rows, only a header"),
        ("interactions.csv", lambda text: "", "is empty (0 bytes)"),
        ("samples.csv", lambda text: text.replace("eval", "test"), "column 'split', data row 4: found 'test', expected one of"),
        ("samples.csv", lambda text: text + text.splitlines()[1] + "\n", "expected each value once"),
        ("samples.csv", lambda text: text.replace("a,3,k1,5,k1,train", "a,3"), "line 2: found 2 fields, expected 6"),
    ],
)  # fmt: skip
def test_bad_input_names_the_file_and_what_to_do(grocery_raw, tmp_path, capsys, name, change, message):
    path = grocery_raw / name
    path.write_text(change(path.read_text()))
    assert build_grocery(grocery_raw, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert name in error


def test_a_described_log_without_rows_names_each_column_once(tmp_path, capsys):
    twice = logs.HISTORY + 'event = "kind"\nfeature = [{ column = "kind" }]\n'
    raw = logs.write(tmp_path / "raw", twice, {"log.csv": logs.lines([], header="user_id,item_id,ts,kind")})
    assert run("--source", "generic", "--raw_dir", raw, "--out_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "no row in 1 file, such as" in error and error.count("'kind'") == 1


def test_missing_and_truncated_files_are_errors(kuairand_raw, tmp_path, capsys):
    path = kuairand_raw / "log_standard.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    assert run("--source", "kuairand_pure", "--raw_dir", kuairand_raw, "--out_dir", tmp_path / "out") == 2
    assert "is not a readable Parquet file, perhaps truncated" in capsys.readouterr().err
    (kuairand_raw / "video_features_basic_pure.csv").unlink()
    assert run("--source", "kuairand_pure", "--raw_dir", kuairand_raw, "--out_dir", tmp_path / "out") == 2
    assert "video_features_basic_pure.csv does not exist" in capsys.readouterr().err
    path.unlink()
    assert run("--source", "kuairand_pure", "--raw_dir", kuairand_raw, "--out_dir", tmp_path / "out") == 2
    assert "holds no log_*.parquet or log_*.csv" in capsys.readouterr().err


def test_bad_options_are_errors(tmp_path, capsys):
    common = ["--source", "amazon_grocery", "--out_dir", str(tmp_path / "out")]
    assert build.main([*common, "--max_history_length", "1", "--valid_fraction", "1.5"]) == 2
    error = capsys.readouterr().err
    assert "--max_history_length 1 must be at least 2" in error
    assert "--valid_fraction 1.5 must lie between 0 and 1" in error
    assert build.main(common) == 2
    assert "give their folder with --raw_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build.main([*common, "--no_such_option", "1"])


@pytest.mark.parametrize("option", [("--memory_limit", "lots"), ("--threads", "0")])
def test_options_that_the_engine_refuses_are_errors(grocery_raw, tmp_path, capsys, option):
    assert build_grocery(grocery_raw, tmp_path / "out", *option) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the engine cannot start") and " ".join(option) in error
    assert not (tmp_path / "out").exists()


def test_a_manifest_of_another_version_is_built_again(grocery_raw, tmp_path):
    out = tmp_path / "out"
    assert build_grocery(grocery_raw, out) == 0
    path = data_versions.current(out) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 0}))
    assert build_grocery(grocery_raw, out) == 0
    assert manifest_of(out).schema_version == schema.SCHEMA_VERSION
