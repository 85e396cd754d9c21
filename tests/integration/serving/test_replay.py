"""Raw log -> raw requests -> tokens equal the tokens that training reads from Parquet: every source, split and row.

`raw_logs.py` reads the logs by itself. A drawn negative is in no log: its raw id is looked up in the vocabulary.
"""

import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpsd_dist import features, schema
from gpsd_dist.data import data_versions
from gpsd_dist.data.columns import ColumnReader
from gpsd_dist.serving import counters
from gpsd_dist.serving.items import Items
from gpsd_dist.serving.requests import Limits, RequestReader
from gpsd_dist.serving.tokens import Tokens
from gpsd_dist.serving.vocabulary import Vocabulary
from tests.assets.cases import logs
from tests.integration.serving import raw_logs
from tests.unit.data_pipeline import test_engines_agree as folders
from tests.unit.data_pipeline.conftest import make_grocery, make_kuairand, real_data, run

LABELLED = ("train", "valid", "test", "holdout")
KINDS = {
    "synthetic": (folders.make_synthetic, raw_logs.described, ("--min_count", 2)),
    "generic": (folders.make_generic, raw_logs.described, ("--counts", "7d,30d,total", "--rates", 3)),
    "generic_unbounded": (
        folders.make_generic,
        raw_logs.described,
        ("--managed_features", "item:50,tags:30", "--hashed_features", "category:9,device:7"),
    ),
    "movielens": (folders.make_movielens, raw_logs.movielens, ("--num_negatives", 1, "--negatives", "popularity")),
    "taobao": (folders.make_taobao, raw_logs.taobao, ("--num_negatives", 2, "--allow_empty")),
    "amazon_reviews": (folders.make_amazon_reviews, raw_logs.amazon_reviews, ("--all_categories", "--allow_empty")),
    "amazon_grocery": (make_grocery, raw_logs.amazon_grocery, ("--valid_fraction", 0.25, "--counts", "1d,total")),
    "kuairand_pure": (make_kuairand, raw_logs.kuairand, ("--counts", "1h,2d,total", "--rates", 20)),
}
REAL = {
    "amazon_grocery": ("amazon_grocery", raw_logs.amazon_grocery, ("--counts", "7d,30d,total")),
    "kuairand_pure": ("kuairand_pure", raw_logs.kuairand, ()),
    "movielens": ("movietweetings", raw_logs.movielens, ("--num_negatives", 2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_requests_from_the_raw_log_become_the_tokens_of_the_data_set(kind, tmp_path):
    make, read, options = KINDS[kind]
    make(tmp_path / "raw")
    source = kind.removesuffix("_unbounded")
    assert run("--source", source, "--raw_dir", tmp_path / "raw", "--out_dir", tmp_path / "out", *options) == 0
    check(tmp_path, tmp_path / "raw", read)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("source", REAL)
def test_real_logs(source, tmp_path):
    name, read, options = REAL[source]
    raw = real_data(name)
    assert run("--source", source, "--raw_dir", raw, "--out_dir", tmp_path / "out", *options) == 0
    print(source, check(tmp_path, raw, read))


def check(tmp_path: pathlib.Path, raw: pathlib.Path, read) -> dict[str, int]:
    """Compares every row of every labelled split; returns how many there were."""
    data = Data(tmp_path / "out", tmp_path / "artefact")
    samples = {}
    for split, user, request in read(raw):
        when = int(request["request_time_s"] // 1) if data.is_cut_by_time else None
        key = (split, user, when)
        assert key not in samples, f"two requests {key}"
        samples[key] = request
    compared = {}
    for split in data.manifest.splits:
        if split.name not in LABELLED:
            continue
        for file in split.files:
            table = pq.read_table(data.path / file)
            for start in range(0, table.num_rows, 2000):
                rows = table.slice(start, 2000).combine_chunks()
                requests = []
                for row in rows.to_pylist():
                    when = row["request_time_s"] if data.is_cut_by_time else None
                    keys = [(split.name, row["user_id"], when), ("last", row["user_id"], when)]
                    requests.append(data.with_candidates(next(samples.pop(k) for k in keys if k in samples), row))
                compare(data.reader(data.reader.from_json(requests)), data, rows)
            compared[split.name] = compared.get(split.name, 0) + table.num_rows
    left = {split for split, _, _ in samples} - {"holdout"}
    assert sum(compared.values()) and not left, f"requests of {left} have no row"
    return compared


class Data:
    """A data set, and the parts of an artefact made of it."""

    def __init__(self, path: pathlib.Path, artefact: pathlib.Path):
        artefact.mkdir()
        self.path = path = data_versions.current(path)
        self.manifest = schema.read_manifest(path)
        self.is_cut_by_time = self.manifest.options["split_rule"] == "TimeBoundaries"
        vocabularies, self.raw_ids = {}, {}
        for table in self.manifest.tables:
            kind, file = self.manifest.unbounded.get(table.name), artefact / table.name
            if kind is None:
                words = pq.read_table(path / "vocab" / f"{table.name}.parquet")
                self.raw_ids[table.name] = dict(
                    zip(*(words[name].to_pylist() for name in ("index", "raw_id")), strict=True)
                )
                Vocabulary.write(file, features.id_of(features.raw_ids(words["raw_id"])), words["index"].to_numpy())
            elif kind == "managed":  # every other id of the data has a row, as after a training
                ids = np.unique(np.concatenate(list(self._ids_of(table.name))))
                ids = ids[ids > 1][::2]
                Vocabulary.write(file, ids, np.arange(2, 2 + len(ids)))
            if kind != "hashed":
                vocabularies[table.name] = Vocabulary.open(file, 2**31)
        Items.write(artefact / "items", path / "items.parquet", self.manifest)
        counted = None
        if counters.needs(self.manifest):  # through the files, as a server does
            assert counters.publish(artefact, counters.from_data(path, self.manifest))
            counted = counters.open_counters(artefact, self.manifest)
        items = Items.open(artefact / "items")
        self.reader = RequestReader(self.manifest, vocabularies, items, Limits(), counters=counted)
        self.vocabularies = vocabularies

    def _ids_of(self, table: str):
        for split in self.manifest.splits:
            for file in split.files:
                rows = pq.read_table(self.path / file)
                for name in rows.column_names:
                    place, _, feature = name.partition(".")
                    if place in schema.PLACES and feature != "time_s" and self.manifest.feature(feature).table == table:
                        column = rows[name].combine_chunks()
                        while pa.types.is_list(column.type):
                            column = column.flatten()
                        yield column.to_numpy()

    def with_candidates(self, request: dict, row: dict) -> dict:
        """Puts drawn negatives in: the log holds the event that is the target alone."""
        if len(request["candidate.item"]) == len(row["candidate.item"]):
            return request
        place = row["label.click"].index(1.0)
        made = dict(request)
        for feature in self.manifest.features_in("candidate"):
            column = f"candidate.{feature.name}"
            words = {1: None} | self.raw_ids[feature.table]
            decoded = [[words[i] for i in v] if feature.is_bag else words[v] for v in row[column]]
            decoded[place] = request[column][0]
            made[column] = decoded
        made["candidate.item"] = [item or "an item that nobody knows" for item in made["candidate.item"]]
        return made


def compare(found: Tokens, data: Data, rows: pa.Table) -> None:
    """Holds tokens against what the trainer's reader of columns makes of Parquet rows."""
    manifest = data.manifest
    reader = ColumnReader(manifest, rows, np.arange(rows.num_rows))
    counts = reader.lengths(f"candidate.{manifest.item_feature}")
    assert np.array_equal(found.history_length_B, reader.integers("history_length"))
    assert np.array_equal(found.candidate_count_B, counts)
    assert np.array_equal(found.request_time_s_B, reader.integers("request_time_s"))
    assert np.array_equal(found.history_time_s_T, reader.history_time_s(None))
    for place in schema.PLACES:
        for feature in manifest.features_in(place):
            name = f"{place}.{feature.name}"
            if place == "context":
                expected = reader.flat(name, feature)
            else:
                expected = reader.jagged(name, feature, lengths=counts if place == "candidate" else None)
            values, given = found.columns[place][feature.name], expected
            if feature.is_bag:
                assert np.array_equal(values[1], expected[1]), name
                values, given = values[0], expected[0]
            if manifest.unbounded.get(feature.table) == "managed":
                given = data.vocabularies[feature.table].rows(given)
            assert values.dtype == given.dtype and np.array_equal(values, given), name


def test_what_the_pipeline_did_to_values_is_done_to_requests(tmp_path):
    """The items file has ids such as 1000.0, a price that is cut off, and a word for a missing category."""
    logs.items_file(tmp_path / "raw", "{}.0")
    path, price = tmp_path / "raw/schema.toml", '{ column = "price", kind = "numerical", clip_quantile = 0.1 }'
    path.write_text(path.read_text().replace('{ column = "cat" }]', '{ column = "cat" }, ' + price + "]"))
    lines = [f"{1000 + n}.0,{'NULL' if n == 3 else f'c{n % 3}'},{n}" for n in range(20)]
    (tmp_path / "raw/items.csv").write_text("\n".join(["item_id,cat,price", *lines]) + "\n")
    assert run("--source", "generic", "--raw_dir", tmp_path / "raw", "--out_dir", tmp_path / "out") == 0
    data = Data(tmp_path / "out", tmp_path / "artefact")
    assert data.manifest.options["reading"]["whole"] == ["item"]
    assert data.manifest.options["reading"]["clip"] == {"price": [2.0, 17.0]}
    items = {row["index"]: row for row in pq.read_table(data.path / "items.parquet").to_pylist()}
    for n in range(20):
        made = {"request_time_s": 2_000_000_000, "history.item": [], "history.time_s": []}
        made["candidate.item"] = [f"{1000 + n}.0", "new"]
        made |= {"candidate.cat": ["NULL" if n == 3 else f"c{n % 3}"] * 2, "candidate.price": [n, n]}
        found = data.reader(data.reader.from_json([made])).columns["candidate"]
        assert items[found["item"][0]]["price"] == np.clip(n, 2, 17) and found["item"][1] == 1
        for name in ("cat", "price"):  # what an unknown item brings reads like what the log had
            assert found[name][0] == found[name][1]


def test_the_readers_use_nothing_of_the_package():
    source = pathlib.Path(raw_logs.__file__).read_text()
    assert "gpsd_dist" not in source and "data_pipeline" not in source
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print({'gpsd_dist', 'data_pipeline'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code, raw_logs.__file__], capture_output=True, text=True)
    assert found.stdout.strip() == "set()"
