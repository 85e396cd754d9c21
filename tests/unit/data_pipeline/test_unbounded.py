"""--hashed_features and --managed_features: the same rows, with ids of 60 bits where the vocabulary's indices were."""

import hashlib
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import validate
from gpsd_dist import schema
from gpsd_dist.data import data_versions
from tests.unit.data_pipeline.conftest import (
    DAY_S,
    log_row,
    make_grocery,
    make_kuairand,
    manifest_of,
    rows_of,
    run,
    words_of,
    write_log,
)

OPTIONS = ("--hashed_features", "author:50,tag:9", "--managed_features", "item:20")
UNBOUNDED = {"author": "hashed", "tag": "hashed", "item": "managed"}


def id_of(word: str) -> int:
    """The documented id, computed without the pipeline's code."""
    return 2 + int(hashlib.md5(word.encode()).hexdigest()[:15], 16)


def build(raw, out, *options) -> int:
    return run("--source", "kuairand_pure", "--raw_dir", raw, "--out_dir", out, *options)


@pytest.fixture(scope="module")
def unbounded(tmp_path_factory):
    """(raw folder, prepared KuaiRand without vocabularies of items, authors and the bag of tags); not to be changed."""
    root = tmp_path_factory.mktemp("unbounded")
    raw, out = make_kuairand(root / "raw"), root / "out"
    assert build(raw, out, *OPTIONS) == 0
    return raw, data_versions.current(out)


def assert_same(found, index, words) -> None:
    """An id for every known index; what the vocabulary does not know may have an id too."""
    if isinstance(index, list):
        assert len(found) == len(index)
        for pair in zip(found, index, strict=True):
            assert_same(*pair, words)
    else:
        assert found == (id_of(words[index]) if index > 1 else found) and 1 <= found <= schema.MAX_ID


@pytest.mark.parametrize("split", ["pretrain", "train", "valid", "test"])
def test_rows_are_those_of_the_vocabulary_with_ids_for_indices(unbounded, kuairand, split):
    ids, indices = rows_of(unbounded[1], split), rows_of(kuairand, split)
    assert len(ids) == len(indices) > 0
    tags = words_of(kuairand, "tag")
    manifest = manifest_of(unbounded[1])
    tables = {f"{place}.{f.name}": f.table for f in manifest.features for place in f.places}
    for found, expected in zip(ids, indices, strict=True):
        for column, value in expected.items():
            table = tables.get(column)
            if table not in UNBOUNDED:
                assert found[column] == value
            elif table == "tag":
                for bag, expected_bag in zip(found[column], value, strict=True):
                    assert len(bag) == len(expected_bag) and bag == sorted(bag)  # ascending by id, not by index
                    assert {id_of(tags[i]) for i in expected_bag if i > 1} <= set(bag)
            else:
                assert_same(found[column], value, words_of(kuairand, table))


def test_an_id_that_was_never_in_training_is_an_id_like_any_other(unbounded):
    rows = [row for row in rows_of(unbounded[1], "test") if row["user_id"] == "1"]
    assert rows[-1]["candidate.item"] == [id_of("14")]


def test_manifest_says_what_the_columns_hold(unbounded):
    manifest = validate.check(unbounded[1])
    assert manifest.unbounded == UNBOUNDED
    assert {table.name: table.num_rows for table in manifest.tables if table.name in UNBOUNDED} == {
        "item": 20,
        "author": 50,
        "tag": 9,
    }
    assert manifest.table("author").fingerprint == "hashed-1-50"
    assert not {path.stem for path in (unbounded[1] / "vocab").iterdir()} & set(UNBOUNDED)
    items = pq.read_table(unbounded[1] / "items.parquet").to_pydict()
    assert items["index"] == sorted(id_of(str(video)) for video in range(10, 16))


def test_a_later_day_gets_the_same_ids(unbounded, tmp_path):
    shutil.copytree(unbounded[1], tmp_path / "out")
    (tmp_path / "later").mkdir()
    write_log(tmp_path / "later" / "log_may01.csv", [log_row(1, 11, 6 * DAY_S, click=1), log_row(9, 77, 6 * DAY_S + 9)])
    assert build(tmp_path / "later", tmp_path / "out", "--split", "holdout") == 0
    rows = rows_of(tmp_path / "out", "holdout")
    assert [row["candidate.item"] for row in rows] == [[id_of("11")], [id_of("77")]]
    assert rows[0]["history.item"] == [id_of(v) for v in ("12", "10", "12", "11", "11")]
    assert rows[1]["candidate.author"] == [1]  # nothing is known of video 77


def test_negatives_are_drawn_as_with_a_vocabulary(tmp_path):
    raw = make_grocery(tmp_path / "raw")
    lines = (raw / "interactions.csv").read_text().splitlines()[1:]
    (raw / "log.csv").write_text("user,item,category,time\n" + "\n".join(lines) + "\n")
    (raw / "schema.toml").write_text(
        '[history]\nfiles = "log.csv"\nuser = "user"\nitem = "item"\ntime = "time"\n'
        '[items]\nfeature = [{ column = "category" }]\n[split]\ntest_fraction = 0.4\n'
        '[options]\nhashed_features = "item:30, category:5"\n'
    )
    common = ["--source", "generic", "--raw_dir", raw, "--valid_fraction", 0.25]
    assert run(*common, "--out_dir", tmp_path / "ids") == 0
    assert run(*common, "--out_dir", tmp_path / "indices", "--hashed_features", "category:5") == 0
    assert manifest_of(tmp_path / "ids").unbounded == {"item": "hashed", "category": "hashed"}
    assert manifest_of(tmp_path / "indices").unbounded == {"category": "hashed"}, "the command line goes first"
    words = words_of(tmp_path / "indices", "item")
    for split in ("train", "test"):
        ids, indices = (rows_of(tmp_path / name, split) for name in ("ids", "indices"))
        assert len(ids) == len(indices) > 0
        for found, expected in zip(ids, indices, strict=True):
            assert found["label.click"] == expected["label.click"] == [1.0, 0.0]
            assert_same(found["candidate.item"], expected["candidate.item"], words)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("authors:50", "'authors' is not a categorical feature of"),
        ("author", "expected NAME:ROWS with ROWS > 2"),
        ("author:2", "expected NAME:ROWS with ROWS > 2"),
        ("author:50,author:60", "of this feature is Unbounded(kind='hashed', num_rows=50)"),
        ("log_watches:50", "'log_watches' is not a categorical feature"),
    ],
)
def test_wrong_options_are_errors(unbounded, tmp_path, capsys, option, message):
    assert build(unbounded[0], tmp_path / "out", "--hashed_features", option) == 2
    assert message in capsys.readouterr().err


def test_validation_finds_an_id_out_of_range(unbounded, tmp_path):
    shutil.copytree(unbounded[1], tmp_path / "out")
    path = tmp_path / "out" / "train" / "part-00000.parquet"
    rows = pq.read_table(path)
    place = rows.column_names.index("candidate.item")
    lists = rows["candidate.item"].to_pylist()
    lists[0][0] = schema.MAX_ID + 1
    pq.write_table(rows.set_column(place, rows.schema.field(place), pa.array(lists, pa.list_(pa.int64()))), path)
    with pytest.raises(ValueError, match=f"row 0: found {schema.MAX_ID + 1}, expected an index"):
        validate.check(tmp_path / "out")
