import copy
import dataclasses
import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsd_dist import schema
from tests.helpers.synthetic import make_manifest

MANIFEST = dataclasses.replace(
    make_manifest(),
    splits=(
        schema.Split("pretrain", ("pretrain/part-00000.parquet",), 3, 9, 0, None, None),
        schema.Split("train", ("train/part-00000.parquet", "train/b.parquet"), 5, 20, 9, 100, 200),
    ),
    skipped={"no item": 3},
    sources=({"path": "log.csv", "bytes": 10, "sha256": "ab"},),
    options={"min_count": 2, "names": ["a"]},
    command="python -m data_pipeline.build",
)


def write(folder, raw):
    (folder / "manifest.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return folder


def as_json():
    return json.loads(json.dumps(dataclasses.asdict(MANIFEST)))


def changed(*path, to):
    raw = as_json()
    entry = raw
    for key in path[:-1]:
        entry = entry[key]
    if to is ...:
        del entry[path[-1]]
    else:
        entry[path[-1]] = to
    return raw


def test_round_trip(tmp_path):
    schema.write_manifest(MANIFEST, tmp_path)
    assert schema.read_manifest(tmp_path) == MANIFEST == schema.read_manifest(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_whole_number_is_a_number(tmp_path):
    raw = changed("features", 3, "mean", to=2)
    assert schema.read_manifest(write(tmp_path, raw)).features[3].mean == 2


@pytest.mark.parametrize(
    ("field", "value"), [("mean", "2"), ("mean", None), ("std", True), ("std", 0.0), ("std", -1.0)]
)
def test_wrong_moments_are_value_errors(tmp_path, field, value):
    with pytest.raises(ValueError, match=r"manifest\.json"):
        schema.read_manifest(write(tmp_path, changed("features", 3, field, to=value)))


def test_writing_replaces_the_old_one(tmp_path):
    write(tmp_path, "old")
    schema.write_manifest(MANIFEST, tmp_path)
    assert schema.read_manifest(tmp_path).source == MANIFEST.source


def test_a_missing_manifest_names_the_command(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/manifest.json does not exist.*data_pipeline.build --out_dir"):
        schema.read_manifest(tmp_path / "nowhere")


BROKEN = {  # name: (content, words of the message)
    "not JSON": ("{", "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "a list": ("[]", "schema version 'list'"),
    "nested too deep": ("[" * 100_000, "not valid JSON"),
    "other version": (changed("schema_version", to=2), "schema version 2, this code reads 1"),
    "no version": (changed("schema_version", to=...), "schema version None"),
    "version as text": (changed("schema_version", to="1"), "schema version '1'"),
    "two features of one name": (changed("features", 1, "name", to="item"), "names of features must differ"),
    "two tables of one name": (changed("tables", 1, "name", to="item"), "names of tables must differ"),
    "two splits of one name": (changed("splits", 1, "name", to="pretrain"), "names of splits must differ"),
    "missing part": (changed("tables", to=...), "tables"),
    "unknown part": (changed("colour", to=1), "colour"),
    "unknown field": (changed("features", 0, "colour", to=1), "colour"),
    "missing field": (changed("features", 0, "name", to=...), "name"),
    "feature of no kind": (changed("features", 0, "kind", to="words"), "kind 'words'"),
    "feature nowhere": (changed("features", 0, "places", to=[]), "places"),
    "feature elsewhere": (changed("features", 0, "places", to=["future"]), "places"),
    "number with a table": (changed("features", 3, "table", to="item"), "table is 'item'"),
    "category without table": (changed("features", 0, "table", to=None), "table is None"),
    "bag of numbers": (changed("features", 3, "is_bag", to=True), "bag"),
    "dangling table": (changed("features", 1, "table", to="brand"), "table 'brand', which is not listed"),
    "dangling task": (changed("tasks", 1, "given", to="view"), "given 'view', which is not a task"),
    "no item": (changed("item_feature", to="video"), "item feature 'video' must occur in history and candidate"),
    "item in history alone": (changed("features", 0, "places", to=["history"]), "must occur in history and candidate"),
    "table too small": (changed("tables", 0, "num_rows", to=1), "num_rows 1"),
    "rows as text": (changed("tables", 0, "num_rows", to="200"), "num_rows"),
    "rows as fraction": (changed("tables", 0, "num_rows", to=200.5), "num_rows"),
    "rows as truth": (changed("tables", 0, "num_rows", to=True), "num_rows"),
    "absolute path": (changed("splits", 0, "files", to=["/etc/passwd"]), "'/etc/passwd', which is no file"),
    "path upwards": (changed("splits", 1, "files", to=["a.parquet", "train/../../x"]), "'train/../../x'"),
    "files as text": (changed("splits", 0, "files", to="a.parquet"), "files"),
    "file as number": (changed("splits", 0, "files", to=[3]), "files"),
    "no files": (changed("splits", 0, "files", to=None), "files"),
    "name as list": (changed("tables", 0, "name", to=["item"]), "name"),
    "name as object": (changed("tables", 0, "name", to={}), "name"),
    "length as text": (changed("max_history_length", to="50"), "max_history_length"),
    "split rows as text": (changed("splits", 0, "num_rows", to="3"), "num_rows"),
    "table as list": (changed("features", 0, "table", to=["item"]), "table"),
    "given as object": (changed("tasks", 1, "given", to={}), "given"),
    "features as number": (changed("features", to=3), "manifest.json"),
    "sources as number": (changed("sources", to=3), "manifest.json"),
    "feature as text": (changed("features", 0, to="item"), "manifest.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_manifests_are_value_errors_that_name_file_and_problem(tmp_path, name):
    content, words = BROKEN[name]
    with pytest.raises(ValueError) as caught:
        schema.read_manifest(write(tmp_path, content))
    assert str(tmp_path / "manifest.json") in str(caught.value) and words in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="not valid JSON"):
        schema.read_manifest(tmp_path)


def test_all_problems_come_at_once(tmp_path):
    raw = changed("features", 1, "table", to="brand")
    raw["tasks"][1]["given"] = "view"
    with pytest.raises(ValueError, match=r"brand.*view"):
        schema.read_manifest(write(tmp_path, raw))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["item", "history"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def spots(value, path=()):
    """Every place in a JSON document."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from spots(entry, (*path, key))


SPOTS = [path for path in spots(as_json()) if path]


@settings(max_examples=300, deadline=None)
@given(mutations=st.lists(st.tuples(st.sampled_from(SPOTS), VALUES | st.just(...)), min_size=1, max_size=3))
def test_any_change_of_the_file_is_read_or_a_value_error(tmp_path_factory, mutations):
    raw = as_json()
    for path, value in mutations:
        entry = raw
        try:
            for key in path[:-1]:
                entry = entry[key]
            if value is ...:
                del entry[path[-1]]
            else:
                entry[path[-1]] = copy.deepcopy(value)
        except (LookupError, TypeError):
            pass  # an earlier mutation has taken the place away
    folder = write(tmp_path_factory.mktemp("fuzz"), raw)
    try:
        manifest = schema.read_manifest(folder)
    except ValueError as error:
        assert "manifest.json" in str(error)
        return
    for split in ("pretrain", "train"):  # what was read is usable
        assert isinstance(schema.arrow_schema(manifest, split), pa.Schema)
    assert all(manifest.table(f.table).num_rows >= 2 for f in manifest.features if f.table is not None)
    assert isinstance(manifest.max_history_length, int)
    assert manifest.feature(manifest.item_feature).places


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30) | VALUES.map(json.dumps))
def test_any_file_is_a_value_error(tmp_path_factory, text):
    with pytest.raises(ValueError):
        schema.read_manifest(write(tmp_path_factory.mktemp("fuzz"), text))


@pytest.mark.parametrize("what", ["feature", "table", "split"])
def test_unknown_names_list_the_known_ones(what):
    with pytest.raises(ValueError, match=rf"no {what} 'nope'; it has \['"):
        getattr(MANIFEST, what)("nope")
    assert getattr(MANIFEST, what)({"feature": "item", "table": "tag", "split": "train"}[what])


def test_features_of_a_place_are_in_manifest_order():
    names = {place: [f.name for f in MANIFEST.features_in(place)] for place in schema.PLACES}
    assert names == {
        "history": ["item", "category", "tags", "price", "behaviour"],
        "candidate": ["item", "category", "tags", "price", "tab", "discount"],
        "context": ["segment", "interests", "age"],
    }


def test_columns_of_a_split():
    history = ["history.item", "history.category", "history.tags", "history.price", "history.behaviour"]
    first = ["user_id", "user_hash", "history_length", *history, "history.time_s"]
    assert schema.arrow_schema(MANIFEST, "pretrain").names == first
    columns = schema.arrow_schema(MANIFEST, "train")
    candidate = [f"candidate.{name}" for name in ("item", "category", "tags", "price", "tab", "discount")]
    context = ["context.segment", "context.interests", "context.age"]
    assert columns.names == [*first, "request_time_s", *candidate, *context, "label.click", "label.buy"]
    types = {
        "history.item": pa.list_(pa.int64()),
        "candidate.tags": pa.list_(pa.list_(pa.int64())),
        "history.price": pa.list_(pa.float32()),
        "context.segment": pa.int64(),
        "context.interests": pa.list_(pa.int64()),
        "context.age": pa.float32(),
        "label.click": pa.list_(pa.float32()),
    }
    assert {name: columns.field(name).type for name in types} == types


def test_splits_can_be_read_one_after_the_other():
    train, valid = (
        schema.Split(name, (f"{name}/a.parquet",), n, 2 * n, n, 5 * n, 9 * n)
        for name, n in (("train", 4), ("valid", 3))
    )
    manifest = dataclasses.replace(make_manifest(), splits=(train, valid, dataclasses.replace(train, name="pretrain")))
    both = manifest.split("train+valid")
    assert (both.files, both.num_rows) == (train.files + valid.files, train.num_rows + valid.num_rows)
    assert (both.num_history_tokens, both.time_from_s, both.time_to_s) == (14, 15, 36)
    for wrong in ("train+train", "pretrain+train"):
        with pytest.raises(ValueError, match="they must differ"):
            manifest.split(wrong)
    with pytest.raises(ValueError, match="no split 'hold'"):
        manifest.split("train+hold")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("tables", 0, "num_rows"), 2**50, "at most 281474976710656"),
        (("splits", 0, "num_rows"), 10**400, "expected 0 .."),
        (("splits", 0, "num_rows"), -1, "has num_rows -1"),
        (("splits", 0, "num_history_tokens"), 10**15, "history tokens in 3 rows of at most 30"),
        (("splits", 1, "files"), ["a.parquet", "a.parquet"], "lists a file twice"),
        (("splits", 1, "files"), [""], "which is no file in the data folder"),
        (("max_history_length",), 10**9, "is not in 1 .."),
        (("features", 3, "std"), 1e-300, "std above 0"),
        (("features", 3, "window_s"), 2**62, "a window of 0 s to 2^40 s"),
        (("features", 3, "prior_exposures"), 20, "one that counts may have prior_exposures"),
        (
            ("options",),
            json.loads("[" * 40 + "]" * 40),
            "nest more than 32 deep",
        ),
    ],
)
def test_values_that_no_data_set_has_are_refused(tmp_path, path, value, words):
    with pytest.raises(ValueError) as caught:
        schema.read_manifest(write(tmp_path, changed(*path, to=value)))
    assert words in str(caught.value) and "manifest.json" in str(caught.value)


def test_a_manifest_that_is_too_large_is_refused_unread(tmp_path):
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(2**40)  # takes no place on the disk
    with pytest.raises(ValueError, match="which no manifest has"):
        schema.read_manifest(tmp_path)


def test_a_message_shows_the_start_of_a_long_value(tmp_path):
    with pytest.raises(ValueError) as caught:
        schema.read_manifest(write(tmp_path, changed("source", to=["x" * 100_000])))
    assert len(str(caught.value)) < 500
