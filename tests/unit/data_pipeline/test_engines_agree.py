"""DuckDB and Spark give the same data set: manifests (with all counts) and the rows of every file, in order.

Needs the extra `spark` and Java 17 (tests/README.md); one JVM serves all tests of the file.
"""

import dataclasses
import gzip
import importlib.util
import pathlib
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import append, holdout, synthesize, synthetic_log, validate
from gpsd_dist import schema
from gpsd_dist.data import data_versions
from tests.assets.cases import logs
from tests.helpers.parquet_rows import rows_sha256
from tests.unit.data_pipeline import test_append, test_holdout
from tests.unit.data_pipeline.conftest import DAY_S, make_grocery, make_kuairand, run, write_log
from tests.unit.data_pipeline_sources import test_amazon_reviews as amazon_reviews
from tests.unit.data_pipeline_sources import test_generic as generic
from tests.unit.data_pipeline_sources import test_movielens as movielens
from tests.unit.data_pipeline_sources import test_taobao as taobao

HAS_SPARK = importlib.util.find_spec("pyspark") is not None and shutil.which("java") is not None
needs_spark = pytest.mark.skipif(not HAS_SPARK, reason="needs PySpark (the extra `spark`) and Java 17")
SPARK = ("--engine", "spark", "--spark_master", "local[2]", "--memory_limit", "1GB")


def make_taobao(raw: pathlib.Path) -> None:
    raw.mkdir()
    (raw / "UserBehavior.csv").write_text(taobao._csv())


def make_movielens(raw: pathlib.Path) -> None:
    raw.mkdir()
    (raw / "ratings.dat").write_text(movielens.DAT)
    (raw / "movies.dat").write_text(movielens.MOVIES)


def make_amazon_reviews(raw: pathlib.Path) -> None:
    raw.mkdir()
    (raw / "reviews_Food_5.json.gz").write_bytes(gzip.compress(amazon_reviews._reviews().encode()))
    (raw / "meta_Food.json.gz").write_bytes(gzip.compress(amazon_reviews.META_2014.encode()))


def make_generic(raw: pathlib.Path) -> None:
    (raw / "events").mkdir(parents=True)
    for name, text in (
        ("schema.toml", generic.SCHEMA),
        ("events/1.csv", generic.EVENTS_1),
        ("events/2.csv", generic.EVENTS_2),
        ("shown.jsonl", generic.SHOWN),
        ("items.csv", generic.ITEMS),
    ):
        (raw / name).write_text(text)
    users = pa.table({"uid": ["a", "b"], "city": ["P", None], "age": [30, 40]})
    pq.write_table(users, raw / "users.parquet")


def make_synthetic(raw: pathlib.Path) -> None:
    synthesize.write(synthetic_log.SyntheticConfig(num_users=150, num_items=1_600, requests_per_day=40), raw)


CASES = [
    ("synthetic", make_synthetic, ("--min_count", 2)),
    ("generic", make_generic, ()),
    ("movielens", make_movielens, ("--num_negatives", 1, "--negatives", "popularity")),
    ("taobao", make_taobao, ("--num_negatives", 2, "--num_buckets", 2, "--allow_empty")),
    ("amazon_reviews", make_amazon_reviews, ("--all_categories", "--allow_empty")),
    ("amazon_grocery", make_grocery, ("--valid_fraction", 0.25)),
    ("kuairand_pure", make_kuairand, ()),
]


LOGS = {
    "names that are patterns": (logs.names_that_are_patterns,),
    "folder named like a column": (logs.folder_named_like_a_column, "parquet"),
    "folders are columns": (logs.partitions,),
    "integer and float shards": (logs.integer_and_float_shards,),
    "ids that end in .0": (logs.items_file, "{}.0"),
    "zones in the text": (logs.text_times, " UTC"),
    "parts of a second": (logs.parts_of_a_second, "ms"),
    "backslashes": (logs.backslashes, "escape = '\\'"),
    "line ends in values": (logs.line_ends_in_values,),
    "missing users": (logs.word_for_missing_users, "nan"),
    "every event twice": (logs.every_event_twice,),
    "attributes end": (logs.attributes_end,),
    "lists": (logs.lists_of, pa.large_list(pa.large_string())),
    "columns that differ in case": (logs.columns_that_differ_in_case, ("shop", "kind")),
    "missing numbers": (logs.number_column, "NaN"),
    "clicks in both logs": (logs.clicks_in_both_logs,),
    "weights and rates": (logs.weighted,),
    "two labels": (logs.two_labels,),
    "ids of 26 digits in JSON": (logs.json_log, lambda user: user + 10**25),
    "two labels and a history": (logs.two_labels, 'feature = [{ column = "what", name = "action" }]\n'),
}
"""Logs that were read wrongly once, `tests/assets/cases/logs.py`."""


def content_of(out_dir: pathlib.Path) -> dict[str, str]:
    """{relative path of every Parquet file: hash of its types and rows in order}."""
    folder = data_versions.current(out_dir)
    return {str(path.relative_to(folder)): rows_sha256(path) for path in sorted(folder.rglob("*.parquet"))}


def manifest_of(out_dir: pathlib.Path) -> schema.Manifest:
    """The manifest without the command lines in it, which name the engine."""
    manifest = schema.read_manifest(data_versions.current(out_dir))
    options = dict(manifest.options)
    if append.CHAIN in options:
        options[append.CHAIN] = [step | {"command": ""} for step in options[append.CHAIN]]
    if holdout.NAME in options:
        options[holdout.NAME] = options[holdout.NAME] | {"command": ""}
    return dataclasses.replace(manifest, command="", options=options)


def check_same(spark: pathlib.Path, duckdb: pathlib.Path) -> None:
    validate.check(spark)
    assert manifest_of(spark) == manifest_of(duckdb)
    assert content_of(spark) == content_of(duckdb)


def check_engines_agree(tmp_path: pathlib.Path, source: str, options: tuple) -> None:
    common = ("--source", source, "--raw_dir", tmp_path / "raw", *options)
    assert run(*common, "--out_dir", tmp_path / "duckdb") == 0
    assert run(*common, "--out_dir", tmp_path / "spark", *SPARK) == 0
    check_same(tmp_path / "spark", tmp_path / "duckdb")


@needs_spark
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_spark_and_duckdb_append_the_same_day(tmp_path):
    synthesize.write(test_append.CONFIG, tmp_path / "whole")
    until_s = test_append.FIRST_DAY_UNTIL_S
    logs = [test_append.cut_log(tmp_path / "whole", tmp_path / f"raw{n}", until_s + n * DAY_S) for n in range(2)]
    assert test_append.build(logs[0], tmp_path / "day1") == 0
    for name, options in (("duckdb", ()), ("spark", SPARK)):
        added = ("--append_to", tmp_path / "day1", "--num_buckets", 2, *options)
        assert test_append.build(logs[1], tmp_path / name, *added) == 0
    check_same(tmp_path / "spark", tmp_path / "duckdb")
    grown = manifest_of(tmp_path / "spark").options[append.CHAIN][0]["new_rows"]
    assert grown["item"] > 0


@needs_spark
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_spark_and_duckdb_write_the_same_holdout(tmp_path, kuairand):
    later = tmp_path / "later"
    later.mkdir()
    write_log(later / "log_may01.csv", test_holdout.LATER)
    for name, options in (("duckdb", ()), ("spark", SPARK)):
        shutil.copytree(kuairand, tmp_path / name)
        assert test_holdout.add(tmp_path / name, later, "--num_buckets", 2, *options) == 0
    check_same(tmp_path / "spark", tmp_path / "duckdb")
    assert manifest_of(tmp_path / "spark").split(holdout.NAME).num_rows == 3


@needs_spark
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("source", "make", "options"), CASES, ids=[case[0] for case in CASES])
def test_spark_and_duckdb_write_the_same_rows(tmp_path, source, make, options):
    make(tmp_path / "raw")
    check_engines_agree(tmp_path, source, options)


@needs_spark
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LOGS)
def test_spark_reads_odd_logs_as_duckdb_does(tmp_path, name):
    write, *arguments = LOGS[name]
    write(tmp_path / "raw", *arguments)
    check_engines_agree(tmp_path, "generic", ())
